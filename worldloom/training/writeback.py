"""Writes fresh latents, those that updates computed, back to replay. This module alone decides when."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from worldloom.replay.device import DeviceReplay
from worldloom.training.update_loop import UpdateOutput


class PendingLatents(NamedTuple):
    """Latents that one compiled call computed and that are not yet written to replay.

    Attributes:
      step: updates done before the call.
      row_ids: row numbers [B, T'] of each update's batch; the latents [B, T] belong to the last T of the T' rows.
      output: output of the call, possibly still being computed.
    """

    step: int
    row_ids: list[Any]
    output: UpdateOutput

    def write(self, target: Any) -> None:
        """Write the latents, update by update, to a buffer, or to a ``DeviceReplay`` without waiting for them."""
        # On the device: the write is one more asynchronous computation; updates that were not applied are masked.
        if isinstance(target, DeviceReplay):
            for i, ids in enumerate(self.row_ids):
                latents = {name: jnp.asarray(value[i]) for name, value in self.output.latents.items()}
                length = next(iter(latents.values())).shape[1]
                target.write_latents(ids[:, -length:], latents, jnp.asarray(self.output.applied[i]))
            return
        # On the host: wait for the results.
        applied = np.asarray(self.output.applied)
        fetched = {name: np.asarray(value) for name, value in self.output.latents.items()}
        for i, ids in enumerate(self.row_ids):
            if applied[i]:
                latents = {name: value[i] for name, value in fetched.items()}
                length = next(iter(latents.values())).shape[1]
                target.write_latents(ids[:, -length:], latents)


class LatentWriteback:
    """Queue of fresh latents, in the order of their updates.

    Updates n are grouped by n // K. The batches of a group see the latents of all earlier groups except the previous
    one. Hence a batch does not depend on how callbacks split a group into calls, and sampling never waits for the call
    that is still running.

    Args:
      group: K, the maximum number of updates per call, or a multiple of it.

    Attributes:
      group: K.
    """

    def __init__(self, group: int):
        self.group = group
        self._queue: deque[PendingLatents] = deque()
        self._buffer: Any = None
        self._writes: list[Future[None]] = []

    @property
    def waiting(self) -> list[PendingLatents]:
        """The latents that are not written yet, in the order of their updates."""
        return list(self._queue)

    def switch_buffer(self, buffer: Any) -> None:
        """Switch to ``buffer``, writing pending latents to the previous buffer first."""
        while self._buffer is not buffer and self._queue:
            self._queue.popleft().write(self._buffer)
        self._buffer = buffer

    def submit(self, step: int, row_ids: list[Any], output: UpdateOutput) -> None:
        """Queue the latents of the call after ``step`` updates; ``row_ids`` has one entry, [B, T'], per update."""
        if output.latents:
            self._queue.append(PendingLatents(step, row_ids, output))

    def write_due(self, step: int, target: Any = None, executor: Executor | None = None) -> None:
        """Write the latents that batch number ``step`` must see.

        Args:
          step: updates done before that batch.
          target: a ``DeviceReplay``; None means the buffer.
          executor: writes in the background; it has a single thread, which samples the batch afterwards. None writes in
            the calling thread.
        """
        target = self._buffer if target is None else target
        while self._queue and self._queue[0].step // self.group <= step // self.group - 2:
            pending = self._queue.popleft()
            if executor is None:
                pending.write(target)
            else:
                self._writes.append(executor.submit(pending.write, target))

    def raise_errors(self) -> None:
        """Raise the exception of a background write that failed, if any."""
        for write in [write for write in self._writes if write.done()]:
            self._writes.remove(write)
            write.result()

    def flush(self) -> None:
        """Wait for background writes to finish. Latents that are not due yet stay queued."""
        while self._writes:
            self._writes.pop(0).result()

    def state_arrays(self) -> dict[str, np.ndarray]:
        """The queue as arrays for a checkpoint; waits for latents that are still being computed."""
        arrays: dict[str, np.ndarray] = {}
        for number, (step, row_ids, output) in enumerate(self._queue):
            arrays[f"{number}/step"] = np.array(step)
            arrays[f"{number}/row_ids"] = np.stack(row_ids)
            arrays[f"{number}/good"] = np.asarray(output.applied)
            arrays |= {f"{number}/latents/{name}": np.asarray(value) for name, value in output.latents.items()}
        return arrays

    def load_state_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of :meth:`state_arrays`."""
        self._queue.clear()
        while entry := strip_prefix(arrays, f"{len(self._queue)}/"):
            latents: Any = strip_prefix(entry, "latents/")
            applied: Any = entry["good"]
            output = UpdateOutput(metrics=applied, latents=latents, applied=applied)  # The metrics are not read.
            self._queue.append(PendingLatents(int(entry["step"]), list(entry["row_ids"]), output))


def strip_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The entries whose names begin with ``prefix``, under their names without it."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def copy_latents(source: Any, target: Any, rows: int = 4096) -> None:
    """Copy the stored latents from ``source`` to ``target``, a buffer of the same rows, ``rows`` at a time."""
    first, end = source.state_dict().values()
    for begin in range(first, end, rows):
        ids = np.arange(begin, min(begin + rows, end))
        target.write_latents(ids, source.take(ids[:, None], latents=True)["context"])
