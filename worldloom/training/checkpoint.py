"""The checkpoints of a run: background writes, pruning, restoring, loading weights."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.algorithm import TrainState
from worldloom.errors import CheckpointError, ConfigError, FileFormatError
from worldloom.replay.store import PendingWrite, ReplayStore
from worldloom.training.checkpoint_files import (
    Snapshot,
    delete_checkpoint,
    read_checkpoint,
    read_params,
    read_summary,
    write_checkpoint,
)

REPLAY_FOLDER = "replay"
"""Folder, next to the checkpoints, of the replay chunk files that they refer to."""


class Checkpointer:
    """Writes and reads the checkpoints in one folder; writes happen in the background, one at a time.

    Replay content that training changes is stored in the subfolder ``replay/``, each row once for all checkpoints.

    Args:
      folder: folder of the checkpoints; created by :meth:`open`.
      keep_last: number of newest checkpoints to keep.
      mode: ``"min"`` or ``"max"`` also keeps the one with the lowest or highest value; None keeps only the newest.
      monitor: name of the metric whose values are compared; values of another metric, saved before a resume, are
        ignored.
    """

    def __init__(self, folder: str | Path, *, keep_last: int = 3, mode: str | None = None, monitor: str | None = None):
        self.folder = Path(folder)
        self._keep_last, self._mode, self._monitor = keep_last, mode, monitor
        self._store = ReplayStore(self.folder / REPLAY_FOLDER)
        self._values: dict[int, float | None] = {}
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def open(self, run_id: str) -> None:
        """Prepare the folder for the run ``run_id``, and start the background thread.

        Raises ``CheckpointError`` if the folder cannot be written to or holds the checkpoints of another run.
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
                    f"{self.folder} holds checkpoints of another run, up to step {self.steps()[-1]}. Continue that run "
                    "by train(…, resume='auto'), or choose another folder."
                )
            self._values[step] = _value(record, self._monitor)
        for leftover in self.folder.glob("*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="worldloom-checkpoint")

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in ascending order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir())

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint with the best value; None if none has a value."""
        return _best(self._values, self._mode) if self._mode else None

    def save(self, snapshot: Snapshot, value: float | None = None) -> None:
        """Write ``snapshot`` in the background once the previous write is done; ``value`` decides which is best.

        Raises ``CheckpointError`` if the previous write failed.
        """
        self.wait()
        assert self._writer is not None, "call open() first"
        value = None if value is None or not np.isfinite(value) else float(value)
        replay = None if snapshot.replay is None else self._store.snapshot(snapshot.replay)
        self._pending = self._writer.submit(self._write, snapshot, value, replay)

    def wait(self) -> None:
        """Wait for the pending write. Raises ``CheckpointError`` if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish the pending write and release the thread. An error of that write is raised by :meth:`wait`."""
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None

    def restore(self, template: TrainState, identity: Mapping[str, Any], step: int | None = None) -> Snapshot:
        """The newest undamaged checkpoint, or the one of ``step``, in the structure of ``template``.

        A damaged checkpoint causes a warning and a fallback to the one before it.

        Args:
          template: a state of the run that resumes; only its shapes are read.
          identity: its ``Run.identity()``, which must equal the checkpoint's.
          step: updates done; None means the newest.

        Raises:
          CheckpointError: there is no checkpoint, or none that can be read.
          ConfigError: it belongs to a run with another config or model class.
        """
        self.wait()
        steps = self.steps() if step is None else [s for s in self.steps() if s == step]
        if not steps:
            of_step = "" if step is None else f" of step {step}"
            raise CheckpointError(f"There is no checkpoint{of_step} in {self.folder}.")
        problems = []
        for number in reversed(steps):
            try:
                snapshot = read_checkpoint(self.folder / str(number), template, identity)
                reference = snapshot.record.get("replay")
                return snapshot if reference is None else snapshot._replace(replay=self._store.load(reference))
            except FileFormatError as error:
                problems.append(str(error))
                if number != steps[0]:
                    warnings.warn(f"{error} Going back to the checkpoint before it.", stacklevel=2)
        raise CheckpointError(f"No checkpoint in {self.folder} can be read. {' '.join(problems)}")

    def _write(self, snapshot: Snapshot, value: float | None, replay: PendingWrite | None) -> None:
        try:
            write_checkpoint(
                self.folder / str(snapshot.step),
                snapshot,
                value=value,
                mode=self._mode,
                monitor=self._monitor,
                replay=replay.write() if replay else None,
            )
        except Exception as error:
            raise CheckpointError(
                f"The checkpoint of step {snapshot.step} could not be written to {self.folder}: {error}. "
                "Earlier checkpoints are unchanged."
            ) from error
        self._values[snapshot.step] = value
        self._prune(snapshot.step)

    def _prune(self, newest: int) -> None:
        # Steps after the newest date from before a resume; they are kept until the run overwrites them.
        past = [step for step in self.steps() if step <= newest]
        keep = {*past[-self._keep_last :], self.best_step}
        for step in past:
            if step not in keep:
                delete_checkpoint(self.folder / str(step))
                self._values.pop(step, None)
        # Delete the replay chunks that no remaining checkpoint refers to.
        references = [read_summary(self.folder / str(step)).get("replay") for step in self.steps()]
        self._store.collect(reference for reference in references if reference)


def locate_checkpoint(resume: bool | str | Path, save_dir: Path | None) -> tuple[Path, int | None]:
    """The folder of checkpoints to resume from and, if ``resume`` is a single checkpoint, its step.

    Args:
      resume: True or ``"auto"`` for ``save_dir``, or a path to a folder of checkpoints or to one checkpoint.
      save_dir: folder in which the run saves; None if it saves nowhere.

    Raises ``ConfigError`` if there is no such folder.
    """
    if resume is not True and resume != "auto":
        path = Path(str(resume))
        single = (path / "run.json").exists() or (path / "manifest.json").exists()
        return (path.parent, int(path.name)) if single and path.name.isdecimal() else (path, None)
    if save_dir is None:
        raise ConfigError(f"resume={resume!r} needs a CheckpointCallback, or give the folder: resume='./checkpoints'.")
    return save_dir, None


def load_weights(model: Any, folder: str | Path, step: int | str = "latest") -> int:
    """Load the weights of a checkpoint into ``model``.

    Args:
      model: a world model with the config of the run.
      folder: ``save_dir`` of the :class:`CheckpointCallback`.
      step: ``"latest"``, ``"best"`` (by the monitored value), or a step.

    Returns:
      The step of the checkpoint.

    Raises:
      CheckpointError: there is no such checkpoint.
      FileFormatError: it is damaged.
      ConfigError: its model has another config.
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
    """The value of ``monitor`` that was saved with a checkpoint; None if it was saved with another metric or none."""
    return record.get("value") if record.get("monitor") == monitor else None


def _best(values: Mapping[int, float | None], mode: str) -> int | None:
    """Step of the best value, the earliest if several are equal."""
    known = {step: value for step, value in values.items() if value is not None}
    return (min if mode == "min" else max)(sorted(known), key=known.__getitem__, default=None)
