"""Gradient accumulation: a batch is processed in microbatches when the activations of the whole do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from worldloom.devices import resolve_device
from worldloom.ops.keys import step_keys
from worldloom.sharding import row_shards
from worldloom.xla_workarounds import needs_unrolled_scan

Averaged = TypeVar("Averaged")
Kept = TypeVar("Kept")


def split_rows(rows: Any, parts: int) -> Any:
    """Arrays [B, ...] as [parts, B / parts, ...]; ``parts`` divides B.

    On a mesh, row i goes to part ``i % parts``, so that every device works on its own rows in each; the trainer gives
    them in the order of :func:`worldloom.sharding.interleaved`, and parts are the same as on one device.
    """
    if row_shards() > 1:
        return jax.tree.map(lambda x: jnp.swapaxes(jnp.reshape(x, (-1, parts, *x.shape[1:])), 0, 1), rows)
    return jax.tree.map(lambda x: jnp.reshape(x, (parts, -1, *x.shape[1:])), rows)


def join_rows(rows: Any) -> Any:
    """Inverse of :func:`split_rows`."""
    if row_shards() > 1:
        rows = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), rows)
    return jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[2:])), rows)


def part_keys(key: jax.Array | None, parts: int) -> jax.Array | None:
    """A key for each microbatch, [parts]; a single one gets ``key`` itself, so that it equals the whole batch."""
    return key[None] if key is not None and parts == 1 else step_keys(key, parts)


def accumulate(function: Callable[[Any], tuple[Averaged, Kept]], parts: Any) -> tuple[Averaged, Kept]:
    """Apply ``function`` to one microbatch after another, so that memory holds the activations of one at a time.

    Args:
      function: microbatch → (arrays to average over microbatches, arrays to keep of each).
      parts: arrays [parts, B / parts, ...].

    Returns:
      The averaged arrays, and the kept ones stacked along a new first axis, [parts, ...].
    """
    leaves = jax.tree.leaves(parts)
    first = jax.tree.map(lambda x: x[0], parts)
    if len(leaves[0]) == 1:
        averaged, kept = function(first)
        return averaged, jax.tree.map(lambda x: x[None], kept)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first)[0])

    def step(total: Averaged, part: Any) -> tuple[Averaged, Kept]:
        # Where the scan is unrolled, the barrier keeps XLA from working on microbatches side by side.
        total, part = jax.lax.optimization_barrier((total, part))
        averaged, kept = function(part)
        return jax.tree.map(jnp.add, total, averaged), kept

    total, kept = jax.lax.scan(step, zeros, parts, unroll=needs_unrolled_scan(resolve_device(), parts))
    return jax.tree.map(lambda x: x / len(leaves[0]), total), kept
