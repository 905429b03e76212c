"""Batches on their way to the device: sampled, stacked and sent in the background, in a fixed order."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from worldloom.errors import DataError
from worldloom.replay.device import SLOTS, DeviceReplay, Ring, supports_device_storage
from worldloom.spaces import OBS, named
from worldloom.training.config import TrainingConfig
from worldloom.training.step import Batch, Outcome


class Chunk(NamedTuple):
    """The updates of one compiled call.

    Attributes:
      step: updates done before it.
      updates: how many it does.
      looks: whether a callback looks after it.
    """

    step: int
    updates: int
    looks: bool


class Fresh(NamedTuple):
    """Latents that a call of updates computed anew, to be written to replay.

    Attributes:
      step: updates done before the call.
      row_ids: the rows of each update's batch, [B, T'] each; the latents are those of the last T of them.
      outcome: of the call, perhaps still being computed.
    """

    step: int
    row_ids: list[Any]
    outcome: Outcome

    def write(self, buffer: Any) -> None:
        """Write them to ``buffer``, update by update; waits until they are computed unless it is on a device."""
        if isinstance(buffer, DeviceReplay):
            for i, ids in enumerate(self.row_ids):
                latents = {name: jnp.asarray(value[i]) for name, value in self.outcome.fresh.items()}
                length = next(iter(latents.values())).shape[1]
                buffer.write_latents(ids[:, -length:], latents, jnp.asarray(self.outcome.good[i]))
            return
        good = np.asarray(self.outcome.good)
        fresh = {name: np.asarray(value) for name, value in self.outcome.fresh.items()}
        for i, ids in enumerate(self.row_ids):
            if good[i]:
                latents = {name: value[i] for name, value in fresh.items()}
                length = next(iter(latents.values())).shape[1]
                buffer.write_latents(ids[:, -length:], latents)


class Unwritten:
    """Fresh latents in the order of their updates, until they are due.

    Updates are counted in groups of K, and a batch sees the latents of all groups but its own and the one before it.
    So it does not depend on how the updates of a group came to be split into calls, and the latents of the call that
    is still running are never waited for.

    Args:
      capacity: K, the most updates in one call.
    """

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._queue: deque[Fresh] = deque()
        self._buffer: Any = None

    def follow(self, buffer: Any) -> None:
        """Take those of ``buffer`` from now on; what is left of another buffer's is written there at once."""
        while self._buffer is not buffer and self._queue:
            self._queue.popleft().write(self._buffer)
        self._buffer = buffer

    def append(self, fresh: Fresh) -> None:
        """Add those of the newest call."""
        self._queue.append(fresh)

    def due(self, step: int) -> list[Fresh]:
        """Remove and return those that must be written before batch number ``step`` is drawn."""
        found = []
        while self._queue and self._queue[0].step // self._capacity <= step // self._capacity - 2:
            found.append(self._queue.popleft())
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """For a checkpoint; waits until they are computed."""
        found: dict[str, np.ndarray] = {}
        for number, (step, row_ids, outcome) in enumerate(self._queue):
            found[f"{number}/step"] = np.array(step)
            found[f"{number}/row_ids"] = np.stack(row_ids)
            found[f"{number}/good"] = np.asarray(outcome.good)
            found |= {f"{number}/latents/{name}": np.asarray(value) for name, value in outcome.fresh.items()}
        return found

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of :meth:`arrays`."""
        self._queue.clear()
        while one := below(arrays, f"{len(self._queue)}/"):
            latents: Any = below(one, "latents/")
            good: Any = one["good"]
            self._queue.append(Fresh(int(one["step"]), list(one["row_ids"]), Outcome(good, latents, good)))


class Windows:
    """Draws the batches that an algorithm asks for; batch n is a function of (seed, n, content).

    Latents stored in replay are used if the buffer keeps those the algorithm names; an ordinary dataset does not, and
    every window then starts from the initial latent.

    Args:
      buffer: a :class:`~worldloom.replay.ReplayBuffer`, or what samples like one.
      model: the world model the batches are for.
      config: batch size and sequence length.

      empty: whether the buffer may be empty, because it is yet to be filled.

    Raises:
      DataError: the buffer is empty or holds data of other shapes.
      TypeError: ``buffer`` cannot be sampled.
    """

    def __init__(self, buffer: Any, model: Any, config: TrainingConfig, *, empty: bool = False):
        if not callable(getattr(buffer, "sample", None)):
            raise TypeError(f"A ReplayBuffer is expected as the source of data, not a {type(buffer).__name__}.")
        if not len(buffer) and not empty:
            raise DataError("The buffer is empty; add episodes first.")
        if hasattr(buffer, "match") and len(buffer):
            shapes = {"obs_shape": model.config.obs_shape, "action_dim": model.config.action_dim}
            buffer.match(**shapes, action_type=getattr(model.config, "action_type", None))
        # DreamerV3 takes any data, TD-MPC2 terminal rows only if it learns terminations.
        door = getattr(model.algorithm, "check_data", None)
        if door is not None:
            door(model.config, has_terminals=getattr(buffer, "has_terminals", False))
        spec = model.algorithm.window(model.config, config)
        stored = getattr(buffer, "latents", {})
        self.latents = bool(spec.latents) and all(stored.get(k) == tuple(s) for k, s in spec.latents.items())
        # Context rows come before the ones that gradients run through; without stored latents there is no context.
        self.rows = spec.rows if self.latents or not spec.latents else config.sequence_length
        self.buffer, self._batch_size, self._cross_episodes = buffer, config.batch_size, spec.cross_episodes
        self.on_device: DeviceReplay | None = None
        self._shapes = list(named(model.config.obs_shape, OBS).values())

    @property
    def ring(self) -> Ring | None:
        """What :attr:`on_device` keeps."""
        return None if self.on_device is None else self.on_device.ring

    def write_back(self) -> None:
        """Have the buffer's own latents follow those on the device."""
        if self.on_device is not None and self.latents:
            self.on_device.write_back()

    def bytes_on_device(self, *, growing: bool) -> float:
        """What :meth:`hold_on` would take; without end if it cannot be done."""
        if not supports_device_storage(self.buffer):
            return math.inf
        # Images have three axes and stay uint8.
        width = sum(math.prod(shape) * (1 if len(shape) == 3 else 4) for shape in self._shapes)
        width += sum(4 * math.prod(shape) for shape in self.buffer.latents.values()) if self.latents else 0
        return width * (self.buffer.capacity if growing else len(self.buffer))

    def hold_on(self, device: jax.Device, *, growing: bool) -> None:
        """Keep a copy of what is large on ``device``, for as long as training runs.

        Args:
          device: where.
          growing: whether rows will come, up to the buffer's capacity.
        """
        capacity = self.buffer.capacity if growing else len(self.buffer)
        self.on_device = DeviceReplay(self.buffer, latents=self.latents, device=device, capacity=capacity)

    def complete(self, batches: Batch, row_ids: list[Any], updates: int, due: list[Fresh]) -> Batch:
        """``batches`` as an update takes them, after ``due`` has been written where they will be looked up."""
        if self.on_device is None:
            return batches
        self.on_device.copy_new_rows()
        for fresh in due:
            fresh.write(self.on_device)
        return batches | {SLOTS: self.on_device.slots(row_ids, updates)}

    def draw(self, seed: int, update: int) -> tuple[Batch, np.ndarray | None]:
        """Batch number ``update`` [B, T, ...] and its row numbers, if the buffer tells them.

        What :attr:`on_device` keeps is left out.
        """
        if self.on_device is not None:
            sizes, drawn = (self._batch_size, self.rows), {"seed": seed, "update": update}
            ids = self.buffer.draw(*sizes, **drawn, cross_episodes=self._cross_episodes)
            batch = self.buffer.take(ids, observations=False)
            return batch, batch.pop("row_ids")
        batch = self.buffer.sample(
            self._batch_size,
            self.rows,
            seed=seed,
            update=update,
            cross_episodes=self._cross_episodes,
            latents=self.latents,
        )
        return batch, batch.pop("row_ids", None)


class OfflineFeed:
    """Batches from a buffer, one call ahead of the device.

    One background thread samples and writes back, in an order that depends on the chunks alone.

    Args:
      windows: what to draw.
      config: the run's config (its seed).
      device: where the batches go.
      capacity: batches per call, K.
      plan: function (step) → the chunk after ``step``, or None at the end.
      unwritten: fresh latents, which a batch drawn later may see; what remains at the end is for the next feed.
    """

    def __init__(
        self,
        windows: Windows,
        config: TrainingConfig,
        device: jax.Device,
        capacity: int,
        plan: Callable[[int], Chunk | None],
        unwritten: Unwritten,
    ):
        self._windows, self._seed, self._device, self._capacity = windows, config.seed, device, capacity
        self._plan, self._unwritten = plan, unwritten
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="worldloom-feed")
        self._next: tuple[Chunk, Future[tuple[Batch, list[Any]]]] | None = None
        self._writes: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._next is not None:
            self._next[1].cancel()
        self._worker.shutdown()

    def take(self, step: int) -> tuple[Chunk, Batch, list[Any]] | None:
        """The chunk after ``step``, its batches [K, B, T, ...] on the device, and their row numbers.

        Entries from ``chunk.updates`` on are padding. Raises what sampling or writing back raised.
        """
        for write in [write for write in self._writes if write.done()]:
            self._writes.remove(write)
            write.result()
        if self._next is None:
            self._prefetch(step)
        assert self._next is not None
        (chunk, loading), self._next = self._next, None
        assert chunk.step == step
        due = [] if self._windows.on_device is None else self._unwritten.due(step)
        self._prefetch(step + chunk.updates)
        batches, row_ids = loading.result()
        return chunk, self._windows.complete(batches, row_ids, self._capacity, due), row_ids

    def give_back(self, chunk: Chunk, outcome: Outcome, row_ids: list[Any]) -> None:
        """Have the fresh latents of a call written back to replay, when a batch is to see them."""
        if self._windows.latents and outcome.fresh:
            self._unwritten.append(Fresh(chunk.step, row_ids[: chunk.updates], outcome))

    def settle(self) -> None:
        """Return when nothing is being written to replay."""
        while self._writes:
            self._writes.pop(0).result()

    def _prefetch(self, step: int) -> None:
        chunk = self._plan(step)
        if chunk is not None:
            for fresh in self._unwritten.due(step) if self._windows.on_device is None else ():
                self._writes.append(self._worker.submit(fresh.write, self._windows.buffer))
            arguments = self._windows, self._seed, chunk, self._capacity, self._device
            self._next = chunk, self._worker.submit(send, *arguments)


def send(
    windows: Windows, seed: int, chunk: Chunk, capacity: int, device: jax.Device
) -> tuple[Batch, list[np.ndarray | None]]:
    """The batches of a chunk [K, B, T, ...], padded to ``capacity``, sent to ``device``, and their row numbers."""
    drawn = [windows.draw(seed, chunk.step + i) for i in range(chunk.updates)]
    stacked = jax.tree.map(lambda *arrays: _stack(arrays, capacity), *(batch for batch, _ in drawn))
    return jax.device_put(stacked, device), [row_ids for _, row_ids in drawn]


def below(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The entries whose name begins with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def copy_latents(source: Any, target: Any, rows: int = 4096) -> None:
    """Give the rows of ``target`` the latents stored in ``source``, a buffer of the same rows, ``rows`` at a time."""
    first, end = source.state_dict().values()
    for begin in range(first, end, rows):
        ids = np.arange(begin, min(begin + rows, end))
        target.write_latents(ids, source.take(ids[:, None], latents=True)["context"])


def _stack(arrays: tuple[np.ndarray, ...], capacity: int) -> np.ndarray:
    if capacity == 1:
        return arrays[0][None]
    stacked = np.zeros((capacity, *arrays[0].shape), arrays[0].dtype)
    np.stack(arrays, out=stacked[: len(arrays)])
    return stacked
