"""Replay on a device: a ring buffer of observations and latents, read and written without a copy through the host."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from worldloom.errors import ConfigError
from worldloom.replay.buffer import ReplayBuffer
from worldloom.replay.schema import column_name, latent_name
from worldloom.replay.storage import Batch
from worldloom.spaces import OBS, named

Ring = dict[str, jax.Array]
"""``obs`` or ``obs/<key>`` and ``latents/<key>``, each [capacity, ...]; row i is in slot ``i % capacity``."""

SLOTS = "slots"
"""Entry of a batch without observations: the slots of its rows in the ring, int32 [B, T]."""

_PIECE_BYTES = 64 << 20
"""About how much is copied to the device at a time."""


class DeviceReplay:
    """Observations and latents of a :class:`ReplayBuffer`'s rows, on a device.

    The buffer keeps all rows and draws the windows, so that batches are the same, bit for bit, as without this class.
    The large arrays stay on the device: a batch carries the slots of its rows and its small columns, and
    :func:`gather_rows` adds the rest inside the compiled update. Updated latents are written in place, and to the
    buffer by :meth:`write_back`; until then the buffer's own are out of date.

    Args:
      buffer: holds the rows; :meth:`copy_new_rows` copies them.
      latents: dtype to keep its latents in, too; None without them.
      device: where to keep them.
      capacity: rows to allocate memory for at once. Grows by doubling if the buffer holds more, which triggers a
        recompilation of whatever reads the ring.

    Attributes:
      ring: the arrays.

    Raises:
      ConfigError: ``buffer`` overrides a method of sampling or of writing latents.
    """

    def __init__(self, buffer: ReplayBuffer, *, latents: Any, device: jax.Device, capacity: int):
        if not supports_device_storage(buffer):
            raise ConfigError(
                f"replay_storage='device' needs a ReplayBuffer that samples as ReplayBuffer does; a "
                f"{type(buffer).__name__} stays on the host (replay_storage='host')."
            )
        self._buffer, self._latents, self._device = buffer, latents, device
        self._reset(capacity)

    def _reset(self, capacity: int) -> None:
        """Drop all copies; :meth:`copy_new_rows` then allocates ``capacity`` slots and fills them."""
        self.ring: Ring = {}
        self._capacity, self._end = capacity, 0
        # Per slot: the number of its row, and whether its latents are newer than the buffer's.
        self._ids = np.full(capacity, -1)
        self._dirty = np.zeros(capacity, bool)

    def copy_new_rows(self) -> None:
        """Copy the rows added since the last call to the device."""
        first, end = self._buffer.state_dict().values()
        if end - first > self._capacity:
            self.write_back()
            self._reset(2 * (end - first))
        if not self.ring and end > first:
            columns = self._columns(np.arange(first, first + 1))
            sizes = {name: ((self._capacity, *value.shape[1:]), value.dtype) for name, value in columns.items()}
            with jax.default_device(self._device):
                self.ring = _zeros(tuple(sizes.items()))
        # Copy in pieces of bounded size.
        start = max(first, self._end)
        while start < end:
            width = sum(value.nbytes // self._capacity for value in self.ring.values())
            # Padded to a power of two: a run compiles the write for few different numbers of rows.
            rows = min(end - start, 1 << (max(1, _PIECE_BYTES // width).bit_length() - 1))
            ids = np.arange(start, start + rows)
            self._ids[self._slot_of(ids)], self._dirty[self._slot_of(ids)] = ids, False
            padded = 1 << (rows - 1).bit_length()
            # Slots beyond the end are not written.
            slots = np.full(padded, self._capacity, np.int32)
            slots[:rows] = self._slot_of(ids)
            columns = {n: np.resize(value, (padded, *value.shape[1:])) for n, value in self._columns(ids).items()}
            self.ring = _write(self.ring, slots, columns, np.True_)
            start += rows
        self._end = end

    def slots(self, row_ids: list[np.ndarray], updates: int) -> jax.Array:
        """Slots of the rows [B, T] of each batch, int32 [updates, B, T] on the device; 0 for missing batches."""
        slots = np.zeros((updates, *row_ids[0].shape), np.int32)
        slots[: len(row_ids)] = self._slot_of(np.stack(row_ids))
        return jax.device_put(slots, self._device)

    def write_latents(self, row_ids: np.ndarray, latents: Mapping[str, jax.Array], good: jax.Array) -> None:
        """:meth:`ReplayBuffer.write_latents`, in place on the device and without waiting for the arguments.

        Args:
          row_ids: int [...]; rows evicted meanwhile are skipped.
          latents: {name: [..., *shape]}.
          good: bool []; if False, nothing is written.
        """
        ids = np.asarray(row_ids).ravel()
        # The last occurrence of a row counts; the device would write duplicates in any order.
        last = np.zeros(len(ids), bool)
        last[len(ids) - 1 - np.unique(ids[::-1], return_index=True)[1]] = True
        held = last & (self._ids[self._slot_of(ids)] == ids)
        slots = np.where(held, self._slot_of(ids), self._capacity)
        self._dirty[slots[held]] = True
        values = {latent_name(key): value for key, value in latents.items()}
        self.ring = _write(self.ring, slots.astype(np.int32), values, good)

    def write_back(self) -> None:
        """Copy the latents written since the last call to the buffer; waits until they are computed."""
        ids = np.sort(self._ids[self._dirty])
        ids = ids[ids >= self._buffer.state_dict()["first_row"]]
        names = {key: latent_name(key) for key in self._buffer.latents}
        for start in range(0, len(ids), 4096):
            part = ids[start : start + 4096]
            slots = jnp.asarray(self._slot_of(part), jnp.int32)
            self._buffer.write_latents(part, {key: self._found(name, slots) for key, name in names.items()})
        self._dirty[:] = False

    def _found(self, name: str, slots: jax.Array) -> np.ndarray:
        """The latents ``name`` in ``slots``, as the buffer has them."""
        return np.asarray(self.ring[name][slots]).astype(np.float32, copy=False)

    def _slot_of(self, ids: np.ndarray) -> np.ndarray:
        return ids % self._capacity

    def _columns(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The rows ``ids`` [N] as in the ring: {name: [N, ...]}."""
        found = self._buffer.take(ids[:, None], latents=self._latents is not None)
        obs, is_mapping = found["obs"], isinstance(found["obs"], Mapping)
        columns = {column_name("obs", key, is_mapping): value[:, 0] for key, value in named(obs, OBS).items()}
        context = found.get("context", {})
        return columns | {latent_name(key): value.astype(self._latents, copy=False) for key, value in context.items()}


def gather_rows(ring: Ring, batch: Batch) -> Batch:
    """``batch`` with its observations [B, T, ...] and the latents of its first rows [B, ...]; pure, to be traced."""
    slots, batch = batch[SLOTS], {name: value for name, value in batch.items() if name != SLOTS}
    obs = {name.removeprefix("obs/"): rows[slots] for name, rows in ring.items() if name.startswith("obs/")}
    context = {
        name.removeprefix("latents/"): rows[slots[:, 0]] for name, rows in ring.items() if name.startswith("latents/")
    }
    return batch | {"obs": obs or ring["obs"][slots]} | ({"context": context} if context else {})


def supports_device_storage(buffer: Any) -> bool:
    """Whether the batches of ``buffer`` are the rows that :meth:`ReplayBuffer.draw` returns: no override in the way."""
    methods = ("sample", "draw", "take", "write_latents")
    return isinstance(buffer, ReplayBuffer) and all(
        getattr(type(buffer), name) is getattr(ReplayBuffer, name) for name in methods
    )


@functools.partial(jax.jit, static_argnums=0)
def _zeros(sizes: tuple[tuple[str, tuple[tuple[int, ...], Any]], ...]) -> Ring:
    return {name: jnp.zeros(shape, dtype) for name, (shape, dtype) in sizes}


@functools.partial(jax.jit, donate_argnums=0)
def _write(ring: Ring, slots: jax.Array, values: Ring, good: jax.Array) -> Ring:
    """Write ``values`` [..., ...] to ``slots`` [N] if ``good`` []; slots beyond the end are skipped."""
    capacity = next(iter(ring.values())).shape[0]
    slots = jnp.where(good, slots, capacity)
    written = {
        name: ring[name]
        .at[slots]
        .set(value.reshape(len(slots), *ring[name].shape[1:]).astype(ring[name].dtype), mode="drop")
        for name, value in values.items()
    }
    return ring | written
