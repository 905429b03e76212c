"""Batches from recorded episodes or from environments, prefetched and grouped into chunks of one compiled call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from worldloom.algorithm import TrainState
from worldloom.errors import DataError
from worldloom.sharding import Placement
from worldloom.training.collector import Collector
from worldloom.training.sampler import SequenceSampler
from worldloom.training.train_ratio import TrainRatio
from worldloom.training.writeback import LatentWriteback


class UpdateChunk(NamedTuple):
    """The updates of one compiled call.

    Attributes:
      step: updates done before the call.
      updates: number of updates in the call, at most K.
      callbacks_due: whether callbacks are due after the call.
      batches: arrays [K, B, T, ...] on the device; entries from ``updates`` on are padding.
      row_ids: row numbers [B, T] of each batch; None for each if the source does not number its rows.
    """

    step: int
    updates: int
    callbacks_due: bool
    batches: dict[str, Any]
    row_ids: list[Any]


class BatchSource:
    """Produces the chunks of one call of ``train``; their content and order depend on configs and data alone.

    Offline, a background thread writes due latents to replay and samples the next chunk while the device computes the
    current one. Online, the calling thread steps the environments until an update is due, then samples; acting overlaps
    with the update that is still running on the device.

    Args:
      sampler: samples the batches.
      writeback: writes latents that are due before a batch is sampled.
      seed: seed of the run.
      placement: where batches are sent to.
      windows: numbers of the windows of a batch that this process samples, in the order that devices get them.
      capacity: K, the maximum number of updates per call.
      collector: steps the environments; None offline.
      ratio: when updates are due; None offline.
      read_state: function () → the newest state, for acting; None offline.
    """

    def __init__(
        self,
        sampler: SequenceSampler,
        writeback: LatentWriteback,
        *,
        seed: int,
        placement: Placement,
        windows: np.ndarray | None = None,
        capacity: int,
        collector: Collector | None = None,
        ratio: TrainRatio | None = None,
        read_state: Callable[[], TrainState] | None = None,
    ):
        self._sampler, self._writeback = sampler, writeback
        self._seed, self._placement, self._windows, self._capacity = seed, placement, windows, capacity
        self._collector, self._ratio, self._read_state = collector, ratio, read_state
        self._worker = None if collector else ThreadPoolExecutor(1, thread_name_prefix="worldloom-batches")
        self._prefetched: Future[UpdateChunk] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._prefetched is not None:
            self._prefetched.cancel()
        if self._worker is not None:
            self._worker.shutdown()

    def chunks(
        self,
        step: int,
        total_steps: int,
        next_callback_step: Callable[[int], int | None],
        stop_requested: Callable[[], bool],
    ) -> Iterator[UpdateChunk]:
        """Chunks from ``step`` updates to ``total_steps``, until a stop is requested.

        Raises whatever sampling, writing latents or the environments raise.
        """
        schedule = _ChunkSchedule(total_steps, self._capacity, next_callback_step)
        while step < total_steps and not stop_requested():
            if self._worker is None:
                due = self._updates_due(step)
                chunk = self._sample_online(schedule.next(step, due)) if due else None
            else:
                self._writeback.raise_errors()
                current = self._prefetched or self._prefetch(self._worker, schedule.next(step))
                end = step + schedule.next(step).updates
                # Start sampling the next chunk before this one's updates, so that the device never waits for the host.
                self._prefetched = self._prefetch(self._worker, schedule.next(end)) if end < total_steps else None
                chunk = current.result()
            if chunk is not None:
                yield self._attach_device_rows(chunk)
                step = chunk.step + chunk.updates

    # ---- offline ----------------------------------------------------------------------------------------------------

    def _prefetch(self, worker: ThreadPoolExecutor, planned: _PlannedChunk) -> Future[UpdateChunk]:
        if self._sampler.on_device is None:
            self._writeback.write_due(planned.step, executor=worker)
        return worker.submit(self._sample, planned)

    # ---- online -----------------------------------------------------------------------------------------------------

    def _updates_due(self, step: int) -> int:
        """Number of updates due after ``step`` updates; steps the environments once if there are none."""
        assert self._collector is not None
        assert self._ratio is not None
        assert self._read_state is not None
        if self._collector.updates_due(self._ratio) <= step:
            self._collector.step(self._read_state())
        return max(0, self._collector.updates_due(self._ratio) - step)

    def _sample_online(self, planned: _PlannedChunk) -> UpdateChunk:
        assert self._collector is not None
        if self._sampler.on_device is None:
            self._writeback.write_due(planned.step)
        try:
            return self._sample(planned)
        except DataError as error:
            raise DataError(
                f"{error} So far {self._collector.decisions} decision steps were taken in "
                f"{self._collector.env.num_envs} environments; a larger prefill takes more before the first update."
            ) from None

    # ---- both -------------------------------------------------------------------------------------------------------

    def _sample(self, planned: _PlannedChunk) -> UpdateChunk:
        """Sample the batches [K, B, T, ...] of a chunk, padded to the capacity, and send them to the device."""
        queue = self._collector.queue if self._collector else None
        sampled = [
            self._sampler.sample(self._seed, planned.step + i, queue, self._windows) for i in range(planned.updates)
        ]
        stacked = jax.tree.map(lambda *arrays: _stack(arrays, self._capacity), *(batch for batch, _ in sampled))
        on_device = self._placement.put_batches(stacked, self._sampler.batch_size)
        return UpdateChunk(*planned, on_device, [row_ids for _, row_ids in sampled])

    def _attach_device_rows(self, chunk: UpdateChunk) -> UpdateChunk:
        """With replay on the device: copy new rows and due latents there, and add the slots of the chunk's rows."""
        on_device = self._sampler.on_device
        if on_device is None:
            return chunk
        on_device.copy_new_rows()
        self._writeback.write_due(chunk.step, target=on_device)
        return chunk._replace(batches=self._sampler.attach_slots(chunk.batches, chunk.row_ids, self._capacity))


class _PlannedChunk(NamedTuple):
    """A chunk before its batches are sampled; fields as in :class:`UpdateChunk`."""

    step: int
    updates: int
    callbacks_due: bool


class _ChunkSchedule(NamedTuple):
    """Groups updates into calls as a function of the step alone, so that a resumed run groups them identically."""

    total_steps: int
    capacity: int
    next_callback_step: Callable[[int], int | None]

    def next(self, step: int, limit: int | None = None) -> _PlannedChunk:
        """The chunk after ``step`` updates, of at most ``limit`` updates."""
        callback_step = min(self.next_callback_step(step) or self.total_steps, self.total_steps)
        # Calls end at multiples of the capacity, whatever step the run was resumed from.
        boundary = (step // self.capacity + 1) * self.capacity
        end = min(callback_step, boundary, step + (self.capacity if limit is None else limit))
        return _PlannedChunk(step, end - step, callbacks_due=end == callback_step)


def _stack(arrays: tuple[np.ndarray, ...], capacity: int) -> np.ndarray:
    """Arrays [...] stacked as [capacity, ...], padded with zeros."""
    if capacity == 1:
        return arrays[0][None]
    stacked = np.zeros((capacity, *arrays[0].shape), arrays[0].dtype)
    np.stack(arrays, out=stacked[: len(arrays)])
    return stacked
