"""The checkpoints of a run: which there are, writing them in the background, keeping the right ones, going back."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.errors import CheckpointError, FileFormatError
from worldloom.replay.store import PendingWrite, ReplayStore
from worldloom.state import TrainState
from worldloom.training.checkpoint_files import (
    Snapshot,
    delete_checkpoint,
    read_checkpoint,
    read_params,
    read_summary,
    write_checkpoint,
)

REPLAY_FOLDER = "replay"
"""Beside the checkpoints: the chunk files that they refer to."""


class Checkpointer:
    """The checkpoints in one folder, written in the background one at a time.

    Replay that training changes lies in the same folder under ``replay/``, each row once, for all of them.

    Args:
      folder: where they are; created by :meth:`open`.
      keep_last: newest ones to keep.
      mode: ``"min"`` or ``"max"`` keeps the one with the lowest or highest value too; None keeps the newest only.
      monitor: what the values are of; those of another quantity, saved before a resume, are not compared with them.
    """

    def __init__(self, folder: str | Path, *, keep_last: int = 3, mode: str | None = None, monitor: str | None = None):
        self.folder = Path(folder)
        self._keep_last, self._mode, self._monitor = keep_last, mode, monitor
        self._store = ReplayStore(self.folder / REPLAY_FOLDER)
        self._values: dict[int, float | None] = {}
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def open(self, run_id: str) -> None:
        """Make the folder ready for the run ``run_id``.

        Raises ``CheckpointError`` if it cannot be written to or holds the checkpoints of another run.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / ".writable"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise CheckpointError(f"Checkpoints cannot be written to {self.folder}: {error}.") from error
        self._values = {}
        for step in self.steps():
            record = read_summary(self.folder / str(step))
            if record and record.get("run_id") != run_id:
                raise CheckpointError(
                    f"{self.folder} holds checkpoints of another run, up to step {self.steps()[-1]}. Go on with that "
                    "run by train(…, resume='auto'), or choose another folder."
                )
            self._values[step] = _value(record, self._monitor)
        for leftover in self.folder.glob("*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="worldloom-checkpoint")

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were completely written, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir())

    @property
    def best_step(self) -> int | None:
        """Step of the one with the best value; None while none has a value."""
        return _best(self._values, self._mode) if self._mode else None

    def save(self, snapshot: Snapshot, value: float | None = None) -> None:
        """Write ``snapshot`` in the background, after the one before it; ``value`` decides which is best.

        Raises ``CheckpointError`` if that one failed.
        """
        self.wait()
        assert self._writer is not None, "open() comes first"
        value = None if value is None or not np.isfinite(value) else float(value)
        replay = None if snapshot.replay is None else self._store.snapshot(snapshot.replay)
        self._pending = self._writer.submit(self._write, snapshot, value, replay)

    def wait(self) -> None:
        """Return when nothing is being written. Raises ``CheckpointError`` if the last write failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish writing and release the thread. Errors of the last write are left to :meth:`wait`."""
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None

    def restore(self, template: TrainState, step: int | None = None) -> Snapshot:
        """The newest undamaged checkpoint, or that of ``step``, in the structure of ``template``.

        A damaged one is named in a warning, and the one before it is taken.

        Raises:
          CheckpointError: there is none, or none that can be read.
          ConfigError: it belongs to a run with another config.
        """
        self.wait()
        steps = self.steps() if step is None else [s for s in self.steps() if s == step]
        if not steps:
            wanted = "" if step is None else f" of step {step}"
            raise CheckpointError(f"There is no checkpoint{wanted} in {self.folder}.")
        problems = []
        for number in reversed(steps):
            try:
                found = read_checkpoint(self.folder / str(number), template)
                reference = found.record.get("replay")
                return found if reference is None else found._replace(replay=self._store.load(reference))
            except FileFormatError as error:
                problems.append(str(error))
                if number != steps[0]:
                    warnings.warn(f"{error} Going back to the checkpoint before it.", stacklevel=2)
        raise CheckpointError(f"No checkpoint in {self.folder} can be read. {' '.join(problems)}")

    def _write(self, snapshot: Snapshot, value: float | None, replay: PendingWrite | None) -> None:
        try:
            judged = {"value": value, "mode": self._mode, "monitor": self._monitor}
            further = {"replay": replay.write() if replay else None}
            write_checkpoint(self.folder / str(snapshot.step), snapshot, **judged, **further)
        except Exception as error:
            raise CheckpointError(
                f"The checkpoint of step {snapshot.step} could not be written to {self.folder}: {error}. "
                "Those before it are as they were."
            ) from error
        self._values[snapshot.step] = value
        self._prune(snapshot.step)

    def _prune(self, newest: int) -> None:
        # Later steps than the newest are left from before a resume; they are replaced when the run gets there.
        past = [step for step in self.steps() if step <= newest]
        keep = {*past[-self._keep_last :], self.best_step}
        for step in past:
            if step not in keep:
                delete_checkpoint(self.folder / str(step))
                self._values.pop(step, None)
        references = [read_summary(self.folder / str(step)).get("replay") for step in self.steps()]
        self._store.collect(reference for reference in references if reference)


def load_weights(model: Any, folder: str | Path, step: int | str = "latest") -> int:
    """Put the weights of a checkpoint into ``model``.

    Args:
      model: a world model with the config of the run.
      folder: ``save_dir`` of the :class:`CheckpointCallback`.
      step: ``"latest"``, ``"best"`` (by the monitored value), or a step.

    Returns:
      The step of the checkpoint.

    Raises:
      CheckpointError: there is no such checkpoint.
      FileFormatError: it is damaged.
      ConfigError: it belongs to a model with another config.
    """
    folder = Path(folder)
    steps = Checkpointer(folder).steps()
    if not steps:
        raise CheckpointError(f"There is no checkpoint in {folder}.")
    if step == "best":
        records = {s: read_summary(folder / str(s)) for s in steps}
        newest = records[steps[-1]]
        values = {s: _value(record, newest.get("monitor")) for s, record in records.items()}
        step = _best(values, newest.get("mode") or "min") or steps[-1]
    number = steps[-1] if step == "latest" else step
    if number not in steps:
        raise CheckpointError(f"There is no checkpoint of step {number} in {folder}; there are {steps}.")
    model.load_params(read_params(folder / str(number), model))
    return int(number)


def _value(record: Mapping[str, Any], monitor: str | None) -> float | None:
    """The value that a checkpoint was judged by, if it is one of ``monitor``."""
    return record.get("value") if record.get("monitor") == monitor else None


def _best(values: Mapping[int, float | None], mode: str) -> int | None:
    known = {step: value for step, value in values.items() if value is not None}
    # Of equal values the earliest.
    return (min if mode == "min" else max)(sorted(known), key=known.__getitem__, default=None)
