"""Replay on a device: observations and latents in a ring, read and written there without passing through the host."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from worldloom.errors import ConfigError
from worldloom.replay.buffer import Batch, ReplayBuffer
from worldloom.replay.schema import bare, by_key, column_name, latent_name

Ring = dict[str, jax.Array]
"""``obs`` or ``obs/<key>`` and ``latents/<key>``, each [capacity, ...]; row i lies in slot ``i % capacity``."""

SLOTS = "slots"
"""Entry of a batch without observations: int32 [B, T], where in the ring its rows lie."""

_PIECE_BYTES = 64 << 20


class DeviceReplay:
    """Observations and latents of a :class:`ReplayBuffer`'s rows, on a device.

    The buffer keeps all rows and draws the windows, so that batches are the same, bit for bit, as without this. What
    is large stays on the device: a batch brings the slots of its rows and its small columns, and :func:`with_rows`
    looks up the rest inside the compiled update. Fresh latents are written in place, and go to the buffer at
    :meth:`write_back`; until then the buffer's own are out of date.

    Args:
      buffer: what holds the rows; :meth:`follow` copies them.
      latents: whether its latents are wanted, too.
      device: where to.
      capacity: rows that memory is taken for at once. If the buffer holds more one day, it is taken anew for twice as
        many, and whatever reads the ring is compiled anew.

    Attributes:
      ring: the arrays.

    Raises:
      ConfigError: ``buffer`` samples in a way of its own.
    """

    def __init__(self, buffer: ReplayBuffer, *, latents: bool, device: jax.Device, capacity: int):
        if not draws_windows(buffer):
            raise ConfigError(
                f"replay_storage='device' needs a ReplayBuffer that samples as ReplayBuffer does; a "
                f"{type(buffer).__name__} stays on the host (replay_storage='host')."
            )
        self._buffer, self._latents, self._device = buffer, latents, device
        self._empty(capacity)

    def _empty(self, capacity: int) -> None:
        self.ring: Ring = {}
        self._capacity, self._end = capacity, 0
        self._ids = np.full(capacity, -1)
        self._dirty = np.zeros(capacity, bool)

    def follow(self) -> None:
        """Copy the rows that have arrived since the last call."""
        first, end = self._buffer.state_dict().values()
        if end - first > self._capacity:
            self.write_back()
            self._empty(2 * (end - first))
        if not self.ring and end > first:
            columns = self._columns(np.arange(first, first + 1))
            sizes = {name: ((self._capacity, *value.shape[1:]), value.dtype) for name, value in columns.items()}
            with jax.default_device(self._device):
                self.ring = _zeros(tuple(sizes.items()))
        start = max(first, self._end)
        while start < end:
            width = sum(value.nbytes // self._capacity for value in self.ring.values())
            # Powers of two: a run has few different numbers of rows to compile for.
            rows = min(end - start, 1 << (max(1, _PIECE_BYTES // width).bit_length() - 1))
            ids = np.arange(start, start + rows)
            self._ids[self._place(ids)], self._dirty[self._place(ids)] = ids, False
            room = 1 << (rows - 1).bit_length()
            slots = np.full(room, self._capacity, np.int32)
            slots[:rows] = self._place(ids)
            columns = {n: np.resize(value, (room, *value.shape[1:])) for n, value in self._columns(ids).items()}
            self.ring = _write(self.ring, slots, columns, np.True_)
            start += rows
        self._end = end

    def slots(self, row_ids: list[np.ndarray], updates: int) -> jax.Array:
        """Where the rows [B, T] of each batch lie, int32 [updates, B, T]; batches that are not there have slot 0."""
        slots = np.zeros((updates, *row_ids[0].shape), np.int32)
        slots[: len(row_ids)] = self._place(np.stack(row_ids))
        return jax.device_put(slots, self._device)

    def write_latents(self, row_ids: np.ndarray, latents: Mapping[str, jax.Array], good: jax.Array) -> None:
        """:meth:`ReplayBuffer.write_latents` in place, if ``good``, without waiting for either."""
        ids = np.asarray(row_ids).ravel()
        # The last of equal numbers counts; a device writes them in any order.
        last = np.zeros(len(ids), bool)
        last[len(ids) - 1 - np.unique(ids[::-1], return_index=True)[1]] = True
        held = last & (self._ids[self._place(ids)] == ids)
        slots = np.where(held, self._place(ids), self._capacity)
        self._dirty[slots[held]] = True
        values = {latent_name(key): value for key, value in latents.items()}
        self.ring = _write(self.ring, slots.astype(np.int32), values, good)

    def write_back(self) -> None:
        """Give the buffer the latents written since the last call; waits until they are computed."""
        ids = np.sort(self._ids[self._dirty])
        ids = ids[ids >= self._buffer.state_dict()["first_row"]]
        names = {key: latent_name(key) for key in self._buffer.latents}
        for start in range(0, len(ids), 4096):
            part = ids[start : start + 4096]
            slots = jnp.asarray(self._place(part), jnp.int32)
            self._buffer.write_latents(part, {k: np.asarray(self.ring[name][slots]) for k, name in names.items()})
        self._dirty[:] = False

    def _place(self, ids: np.ndarray) -> np.ndarray:
        return ids % self._capacity

    def _columns(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        found = self._buffer.take(ids[:, None], latents=self._latents)
        columns = {column_name("obs", key): value[:, 0] for key, value in by_key(found["obs"]).items()}
        return columns | {latent_name(key): value for key, value in found.get("context", {}).items()}


def with_rows(ring: Ring, batch: Batch) -> Batch:
    """``batch`` with its observations [B, T, ...] and the latents of its first rows; pure, to be traced."""
    slots, batch = batch[SLOTS], {name: value for name, value in batch.items() if name != SLOTS}
    obs = {name.partition("/")[2]: rows[slots] for name, rows in ring.items() if name.startswith("obs")}
    head = {name.partition("/")[2]: rows[slots[:, 0]] for name, rows in ring.items() if name.startswith("latents/")}
    return batch | {"obs": bare(obs)} | ({"context": head} if head else {})


def draws_windows(buffer: Any) -> bool:
    """Whether a batch of ``buffer`` is the rows that :meth:`ReplayBuffer.draw` names."""
    methods = ("sample", "draw", "take", "write_latents")
    return isinstance(buffer, ReplayBuffer) and all(
        getattr(type(buffer), name) is getattr(ReplayBuffer, name) for name in methods
    )


@functools.partial(jax.jit, static_argnums=0)
def _zeros(sizes: tuple[tuple[str, tuple[tuple[int, ...], Any]], ...]) -> Ring:
    return {name: jnp.zeros(shape, dtype) for name, (shape, dtype) in sizes}


@functools.partial(jax.jit, donate_argnums=0)
def _write(ring: Ring, slots: jax.Array, values: Ring, good: jax.Array) -> Ring:
    """``values`` [..., ...] into ``slots`` [N], if ``good`` []; slots beyond the end are left out."""
    capacity = next(iter(ring.values())).shape[0]
    slots = jnp.where(good, slots, capacity)
    written = {
        name: ring[name].at[slots].set(value.reshape(len(slots), *ring[name].shape[1:]), mode="drop")
        for name, value in values.items()
    }
    return ring | written
