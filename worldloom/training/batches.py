"""Batches on their way to the device, in chunks of one compiled call: from recorded data or from environments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from worldloom.algorithm import TrainState
from worldloom.errors import DataError
from worldloom.training.collector import Collector
from worldloom.training.sampler import SequenceSampler
from worldloom.training.train_ratio import TrainRatio
from worldloom.training.writeback import LatentWriteback


class UpdateChunk(NamedTuple):
    """The updates of one compiled call.

    Attributes:
      step: updates done before it.
      updates: how many it does.
      callbacks_due: whether a callback runs after it.
      batches: arrays [K, B, T, ...] on the device; entries from ``updates`` on are padding.
      row_ids: the rows of each batch, [B, T] each, or None from a source that does not number its rows.
    """

    step: int
    updates: int
    callbacks_due: bool
    batches: dict[str, Any]
    row_ids: list[Any]


class BatchSource:
    """The chunks of one call of ``train``, in an order that depends on configs and data alone.

    Recorded data: a background thread writes due latents and draws the next chunk while the device computes this one.
    Environments: everything happens in the calling thread, which steps them until an update is due; acting overlaps
    with the update that is still running on the device.

    Args:
      sampler: draws the batches.
      writeback: latents that a batch drawn later may see.
      seed: of the run.
      device: where batches go.
      capacity: K, batches per call.
      collector: steps the environments; None for recorded data.
      ratio: when updates are due, with a collector.
      read_state: function () → the newest state, for acting.
    """

    def __init__(
        self,
        sampler: SequenceSampler,
        writeback: LatentWriteback,
        *,
        seed: int,
        device: jax.Device,
        capacity: int,
        collector: Collector | None = None,
        ratio: TrainRatio | None = None,
        read_state: Callable[[], TrainState] | None = None,
    ):
        self._sampler, self._writeback = sampler, writeback
        self._seed, self._device, self._capacity = seed, device, capacity
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

        Raises what sampling, writing latents back or the environments raise.
        """
        plan = _Plan(total_steps, self._capacity, next_callback_step)
        while step < total_steps and not stop_requested():
            if self._worker is None:
                due = self._updates_due(step)
                chunk = self._draw_due(plan.next(step, due)) if due else None
            else:
                self._writeback.raise_errors()
                loading = self._prefetched or self._prefetch(self._worker, plan.next(step))
                end = step + plan.next(step).updates
                # Started before this chunk's updates are: the device never waits for the host.
                self._prefetched = self._prefetch(self._worker, plan.next(end)) if end < total_steps else None
                chunk = loading.result()
            if chunk is not None:
                yield self._complete(chunk)
                step = chunk.step + chunk.updates

    # ---- recorded data ----------------------------------------------------------------------------------------------

    def _prefetch(self, worker: ThreadPoolExecutor, planned: _Planned) -> Future[UpdateChunk]:
        if self._sampler.on_device is None:
            self._writeback.write_due(planned.step, executor=worker)
        return worker.submit(self._draw, planned)

    # ---- environments -----------------------------------------------------------------------------------------------

    def _updates_due(self, step: int) -> int:
        """Updates due now; steps the environments once if there are none."""
        assert self._collector is not None
        assert self._ratio is not None
        assert self._read_state is not None
        if self._collector.updates_due(self._ratio) <= step:
            self._collector.step(self._read_state())
        return max(0, self._collector.updates_due(self._ratio) - step)

    def _draw_due(self, planned: _Planned) -> UpdateChunk:
        assert self._collector is not None
        if self._sampler.on_device is None:
            self._writeback.write_due(planned.step)
        try:
            return self._draw(planned)
        except DataError as error:
            raise DataError(
                f"{error} So far {self._collector.decisions} decision steps were taken in "
                f"{self._collector.env.num_envs} environments; a larger prefill takes more before the first update."
            ) from None

    # ---- both -------------------------------------------------------------------------------------------------------

    def _draw(self, planned: _Planned) -> UpdateChunk:
        """Draw the batches [K, B, T, ...] of a chunk, padded to the capacity, and send them to the device."""
        drawn = [self._sampler.draw(self._seed, planned.step + i) for i in range(planned.updates)]
        stacked = jax.tree.map(lambda *arrays: _stack(arrays, self._capacity), *(batch for batch, _ in drawn))
        return UpdateChunk(*planned, jax.device_put(stacked, self._device), [row_ids for _, row_ids in drawn])

    def _complete(self, chunk: UpdateChunk) -> UpdateChunk:
        """Where rows are held on the device: bring it up to date, and say where the chunk's rows are."""
        on_device = self._sampler.on_device
        if on_device is None:
            return chunk
        on_device.copy_new_rows()
        self._writeback.write_due(chunk.step, target=on_device)
        return chunk._replace(batches=self._sampler.attach_slots(chunk.batches, chunk.row_ids, self._capacity))


class _Planned(NamedTuple):
    """The updates of one call before its batches are drawn; fields as in :class:`UpdateChunk`."""

    step: int
    updates: int
    callbacks_due: bool


class _Plan(NamedTuple):
    """How a run is cut into calls: a function of the step alone, so that a resumed run cuts in the same places."""

    total_steps: int
    capacity: int
    next_callback_step: Callable[[int], int | None]

    def next(self, step: int, most: int | None = None) -> _Planned:
        """The call after ``step``, of at most ``most`` updates."""
        callback_step = min(self.next_callback_step(step) or self.total_steps, self.total_steps)
        # Calls end at multiples of the capacity, whatever step the run was resumed from.
        boundary = (step // self.capacity + 1) * self.capacity
        end = min(callback_step, boundary, step + (self.capacity if most is None else most))
        return _Planned(step, end - step, callbacks_due=end == callback_step)


def _stack(arrays: tuple[np.ndarray, ...], capacity: int) -> np.ndarray:
    if capacity == 1:
        return arrays[0][None]
    stacked = np.zeros((capacity, *arrays[0].shape), arrays[0].dtype)
    np.stack(arrays, out=stacked[: len(arrays)])
    return stacked
