"""Optional keys: with ``None`` every sample is its distribution's mode, and keys derived from ``None`` are ``None``."""

from __future__ import annotations

import jax


def split_key(key: jax.Array | None, num: int = 2) -> tuple[jax.Array | None, ...]:
    """``num`` independent keys, or ``num`` times None for None; ``key`` is consumed."""
    return (None,) * num if key is None else tuple(jax.random.split(key, num))


def step_keys(key: jax.Array | None, num: int) -> jax.Array | None:
    """Keys [num] to scan over, or None for None (an empty pytree, which ``lax.scan`` accepts); ``key`` is consumed."""
    return None if key is None else jax.random.split(key, num)
