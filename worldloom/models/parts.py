"""Working through a batch in parts, one after the other, for batches whose activations do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from worldloom.devices import resolve_device
from worldloom.ops.keys import step_keys

Averaged = TypeVar("Averaged")
Kept = TypeVar("Kept")


def split_rows(rows: Any, parts: int) -> Any:
    """Arrays [B, ...] as [parts, B / parts, ...]; ``parts`` divides B."""
    return jax.tree.map(lambda x: jnp.reshape(x, (parts, -1, *x.shape[1:])), rows)


def join_rows(rows: Any) -> Any:
    """Inverse of :func:`split_rows`."""
    return jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[2:])), rows)


def part_keys(key: jax.Array | None, parts: int) -> jax.Array | None:
    """A key for each part: the one given, where there is only one."""
    return key[None] if key is not None and parts == 1 else step_keys(key, parts)


def over_parts(function: Callable[[Any], tuple[Averaged, Kept]], parts: Any) -> tuple[Averaged, Kept]:
    """``function`` of each part, at most one at a time.

    Args:
      function: part → (what is averaged over parts, what is kept of each).
      parts: arrays [parts, ...].

    Returns:
      The averages, and what was kept stacked along a new first axis.
    """
    leaves = jax.tree.leaves(parts)
    first = jax.tree.map(lambda x: x[0], parts)
    if len(leaves[0]) == 1:
        averaged, kept = function(first)
        return averaged, jax.tree.map(lambda x: x[None], kept)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first)[0])

    def step(total: Averaged, part: Any) -> tuple[Averaged, Kept]:
        # Where there is no loop the barrier keeps parts from being worked on together.
        total, part = jax.lax.optimization_barrier((total, part))
        averaged, kept = function(part)
        return jax.tree.map(jnp.add, total, averaged), kept

    # Images are [parts, B, T, H, W, C]. On CPUs XLA's gradients of convolutions take a hundred times as long in a loop.
    unroll = resolve_device().platform == "cpu" and any(x.ndim == 6 for x in leaves)
    total, kept = jax.lax.scan(step, nothing, parts, unroll=unroll)
    return jax.tree.map(lambda x: x / len(leaves[0]), total), kept
