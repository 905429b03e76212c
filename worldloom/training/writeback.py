"""Fresh latents on their way back to replay. This module alone decides when they are written."""

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
    """Latents that one call of updates computed, not yet written to replay.

    Attributes:
      step: updates done before the call.
      row_ids: the rows of each update's batch, [B, T'] each; the latents are those of the last T of them.
      output: of the call, perhaps still being computed.
    """

    step: int
    row_ids: list[Any]
    output: UpdateOutput

    def write(self, target: Any) -> None:
        """Write them to a buffer, update by update, or to a ``DeviceReplay``, which does not wait for them."""
        if isinstance(target, DeviceReplay):
            for i, ids in enumerate(self.row_ids):
                latents = {name: jnp.asarray(value[i]) for name, value in self.output.latents.items()}
                length = next(iter(latents.values())).shape[1]
                target.write_latents(ids[:, -length:], latents, jnp.asarray(self.output.applied[i]))
            return
        applied = np.asarray(self.output.applied)
        fetched = {name: np.asarray(value) for name, value in self.output.latents.items()}
        for i, ids in enumerate(self.row_ids):
            if applied[i]:
                latents = {name: value[i] for name, value in fetched.items()}
                length = next(iter(latents.values())).shape[1]
                target.write_latents(ids[:, -length:], latents)


class LatentWriteback:
    """Queue of fresh latents, in the order of their updates, and the rule when each is written.

    Updates are counted in groups of K, and a batch sees the latents of all groups but its own and the one before it.
    So a batch does not depend on how the updates of a group were split into calls, and the latents of the call that is
    still running are never waited for.

    Args:
      group: K, the most updates in one call.
    """

    def __init__(self, group: int):
        self._group = group
        self._queue: deque[PendingLatents] = deque()
        self._buffer: Any = None
        self._writes: list[Future[None]] = []

    def switch_buffer(self, buffer: Any) -> None:
        """Write to ``buffer`` from now on, after flushing what is pending for the previous one."""
        while self._buffer is not buffer and self._queue:
            self._queue.popleft().write(self._buffer)
        self._buffer = buffer

    def submit(self, step: int, row_ids: list[Any], output: UpdateOutput) -> None:
        """Queue the latents of the call that followed ``step`` updates; ``row_ids`` has one entry per update."""
        if output.latents:
            self._queue.append(PendingLatents(step, row_ids, output))

    def write_due(self, step: int, target: Any = None, executor: Executor | None = None) -> None:
        """Write what batch number ``step`` is to see.

        Args:
          step: updates done before that batch.
          target: a ``DeviceReplay``; None is the buffer.
          executor: where to write; one thread, which afterwards draws the batch. None writes at once.
        """
        target = self._buffer if target is None else target
        while self._queue and self._queue[0].step // self._group <= step // self._group - 2:
            pending = self._queue.popleft()
            if executor is None:
                pending.write(target)
            else:
                self._writes.append(executor.submit(pending.write, target))

    def raise_errors(self) -> None:
        """Raise what a write in the background raised, if one has."""
        for write in [write for write in self._writes if write.done()]:
            self._writes.remove(write)
            write.result()

    def flush(self) -> None:
        """Wait until no write is under way. What is not due yet stays queued."""
        while self._writes:
            self._writes.pop(0).result()

    def state_arrays(self) -> dict[str, np.ndarray]:
        """The queue as arrays for a checkpoint; waits until they are computed."""
        found: dict[str, np.ndarray] = {}
        for number, (step, row_ids, output) in enumerate(self._queue):
            found[f"{number}/step"] = np.array(step)
            found[f"{number}/row_ids"] = np.stack(row_ids)
            found[f"{number}/good"] = np.asarray(output.applied)
            found |= {f"{number}/latents/{name}": np.asarray(value) for name, value in output.latents.items()}
        return found

    def load_state_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of :meth:`state_arrays`."""
        self._queue.clear()
        while one := strip_prefix(arrays, f"{len(self._queue)}/"):
            latents: Any = strip_prefix(one, "latents/")
            applied: Any = one["good"]
            output = UpdateOutput(applied, latents, applied)
            self._queue.append(PendingLatents(int(one["step"]), list(one["row_ids"]), output))


def strip_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The entries whose name begins with ``prefix``, named without it."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def copy_latents(source: Any, target: Any, rows: int = 4096) -> None:
    """Give the rows of ``target`` the latents stored in ``source``, a buffer of the same rows, ``rows`` at a time."""
    first, end = source.state_dict().values()
    for begin in range(first, end, rows):
        ids = np.arange(begin, min(begin + rows, end))
        target.write_latents(ids, source.take(ids[:, None], latents=True)["context"])
