"""Keys that may be absent: ``None`` means every draw takes its mode, and so do the keys derived from it."""

from __future__ import annotations

import jax


def split_key(key: jax.Array | None, num: int = 2) -> tuple[jax.Array | None, ...]:
    """``num`` independent keys, or ``num`` times None."""
    return (None,) * num if key is None else tuple(jax.random.split(key, num))


def step_keys(key: jax.Array | None, num: int) -> jax.Array | None:
    """Keys [num] to scan over, or None (an empty pytree, which scans as well)."""
    return None if key is None else jax.random.split(key, num)
