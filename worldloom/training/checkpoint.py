"""The checkpoints of a run: background writes, pruning, restoring, loading weights."""

from __future__ import annotations

import logging
import math
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from worldloom.algorithm import TrainState
from worldloom.config import is_number
from worldloom.distributed import Meeting, is_primary
from worldloom.errors import CheckpointError, ConfigError, FileFormatError, WorldloomError
from worldloom.files import absolute_path, make_folder
from worldloom.replay.store import PendingWrite, ReplayStore
from worldloom.training.checkpoint_files import (
    PARTIAL,
    Snapshot,
    delete_checkpoint,
    flatten_state,
    read_checkpoint,
    read_params,
    read_saved_params,
    read_summary,
    remove_tree,
    write_checkpoint,
)
from worldloom.training.shared_checkpoint import SharedWrite

_log = logging.getLogger("worldloom")

REPLAY_FOLDER = "replay"
"""Folder, next to the checkpoints, of the replay chunk files that they refer to."""


class Checkpointer:
    """Writes and reads the checkpoints in one folder; writes happen in the background, one at a time.

    Replay content that training changes is stored in the subfolder ``replay/``, each row once for all checkpoints.

    Of several processes, all call :meth:`open`, :meth:`save`, :meth:`wait` and :meth:`restore` at the same steps: each
    writes and reads its part of the state, process 0 everything else.

    Args:
      folder: folder of the checkpoints; created by :meth:`open`.
      keep_last: number of newest checkpoints to keep.
      mode: ``"min"`` or ``"max"`` also keeps the one with the lowest or highest value; None keeps only the newest.
      monitor: name of the metric whose values are compared; values of another metric, saved before a resume, are
        ignored.
    """

    def __init__(self, folder: str | Path, *, keep_last: int = 3, mode: str | None = None, monitor: str | None = None):
        self.folder = absolute_path(folder)
        self._keep_last, self._mode, self._monitor = keep_last, mode, monitor
        self._store = ReplayStore(self.folder / REPLAY_FOLDER)
        self._values: dict[int, float | None] = {}
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._meeting: Meeting | None = None
        # Warnings that were given, each of which is given once.
        self._warned: set[str] = set()

    def open(self, run_id: str) -> None:
        """Prepare the folder for the run ``run_id``, and start the background thread.

        Raises ``CheckpointError`` if the folder cannot be written to or holds the checkpoints of another run.
        """
        self._meeting = Meeting()
        self._meeting(lambda: self._prepare(run_id) if is_primary() else None)
        self._meeting(self._check_writable)  # By now, all processes must see the folder.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="worldloom-checkpoint")

    def _check_writable(self) -> None:
        try:
            probe = self.folder / f".writable-{jax.process_index()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise CheckpointError(f"Checkpoints cannot be written to {self.folder}: {error}.") from error

    def _prepare(self, run_id: str) -> None:
        try:
            make_folder(self.folder)
        except OSError as error:
            raise CheckpointError(f"Checkpoints cannot be written to {self.folder}: {error}.") from error
        self._check_writable()
        records = {step: read_summary(self.folder / str(step)) for step in self.steps()}
        others = [step for step, record in records.items() if record and record.get("run_id") != run_id]
        if others and not any(record.get("run_id") == run_id for record in records.values()):
            raise CheckpointError(
                f"{self.folder} holds checkpoints of another run, up to step {others[-1]}. Continue that run "
                "by train(…, resume='auto'), or choose another folder."
            )
        if others:
            _log.warning("The checkpoints of steps %s in %s name another run.", others, self.folder)
        self._values = {step: _value(record, self._monitor) for step, record in records.items()}
        # What a killed process was writing or deleting.
        for leftover in [path for path in self.folder.iterdir() if path.name.endswith(PARTIAL)]:
            remove_tree(leftover)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in ascending order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if _is_step(path.name) and path.is_dir())

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint with the best value; None if none has a value."""
        return _best(self._values, self._mode) if self._mode else None

    def save(self, snapshot: Snapshot, value: float | None = None) -> None:
        """Write ``snapshot`` in the background once the previous write is done; ``value`` decides which is best.

        Raises ``CheckpointError`` if the previous write failed; ``NonFiniteError`` if a weight that is divided over
        processes is not finite.
        """
        self.wait()
        assert self._writer is not None, "call open() first"
        assert self._meeting is not None
        value = None if value is None or not np.isfinite(value) else float(value)
        replay = None if snapshot.replay is None else self._store.snapshot(snapshot.replay)
        several = jax.process_count() > 1
        shared = SharedWrite(self.folder / str(snapshot.step), snapshot, self._meeting) if several else None
        self._pending = self._writer.submit(self._write, snapshot, value, replay, shared)

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

    def restore(
        self, template: TrainState, identity: Mapping[str, Any], step: int | None = None, *, exact: bool = True
    ) -> Snapshot:
        """The newest undamaged checkpoint, or the one of ``step``, in the structure of ``template``.

        A damaged checkpoint causes a warning and a fallback to the one before it.

        Args:
          template: a state of the run that resumes; only its shapes are read.
          identity: its ``Run.identity()``, which must equal the checkpoint's.
          step: updates done; None means the newest.
          exact: see :func:`read_checkpoint`.

        Raises:
          CheckpointError: there is no checkpoint, or none that can be read.
          ConfigError: it belongs to a run with another config or model class.
        """
        self.wait()
        meeting = Meeting()
        steps = self.steps() if step is None else [s for s in self.steps() if s == step]
        for process, seen in enumerate(meeting(lambda: steps)):
            if seen != steps:
                raise CheckpointError(
                    f"Process {process} finds the checkpoints {seen} in {self.folder}, process {jax.process_index()} "
                    f"finds {steps}; all processes must see the same folder."
                )
        if not steps:
            of_step = "" if step is None else f" of step {step}"
            raise CheckpointError(f"There is no checkpoint{of_step} in {self.folder}.")
        problems: list[str] = []
        found: list[Snapshot] = []

        def read() -> None:
            share = jax.process_index(), jax.process_count()
            snapshot = read_checkpoint(self.folder / str(number), template, identity, exact=exact, share=share)
            reference = snapshot.record.get("replay")
            found.append(snapshot if reference is None else snapshot._replace(replay=self._store.load(reference)))

        for number in reversed(steps):
            found.clear()
            try:
                meeting(read)
                return found[0]
            except FileFormatError as error:
                problems.append(str(error))
                if number != steps[0]:
                    warnings.warn(f"{error} Going back to the checkpoint before it.", stacklevel=2)
        raise CheckpointError(f"No checkpoint in {self.folder} can be read. {' '.join(problems)}")

    def _write(
        self, snapshot: Snapshot, value: float | None, replay: PendingWrite | None, shared: SharedWrite | None
    ) -> None:
        def values() -> dict[str, Any]:
            written = replay.write() if replay else None
            return {"value": value, "mode": self._mode, "monitor": self._monitor, "replay": written}

        arrays = sum(array.nbytes for array in (*flatten_state(snapshot.state).values(), *snapshot.arrays.values()))
        needed = arrays + (replay.nbytes if replay else 0)
        try:
            if is_primary():
                self._warn_of_full_disk(needed)
            if shared is None:
                write_checkpoint(self.folder / str(snapshot.step), snapshot, **values())
            else:
                shared.finish(values)
        except Exception as error:
            about = str(error).rstrip(".")
            raise CheckpointError(
                f"The checkpoint of step {snapshot.step} could not be written to {self.folder}: {about}. It needs up "
                f"to {_bytes_text(needed)}; {_bytes_text(_free_bytes(self.folder))} are free. Earlier checkpoints are "
                "unchanged."
            ) from error
        if not is_primary():
            return
        self._values[snapshot.step] = value
        try:
            self._prune(snapshot.step)
        except (OSError, WorldloomError) as error:
            self._warn("prune", f"Old checkpoints in {self.folder} are kept, since one cannot be handled: {error}")

    def _prune(self, newest: int) -> None:
        # Steps after the newest date from before a resume; they are kept until the run overwrites them.
        past = [step for step in self.steps() if step <= newest]
        keep = {*past[-self._keep_last :], self.best_step}
        for step in past:
            if step not in keep:
                delete_checkpoint(self.folder / str(step))
                self._values.pop(step, None)
        # Delete the replay chunks that no remaining checkpoint refers to. One whose record cannot be read refers to
        # unknown ones, so then none is deleted.
        references = []
        for step in self.steps():
            record = read_summary(self.folder / str(step))
            if not record:
                raise FileFormatError(f"{self.folder / str(step) / 'run.json'} cannot be read.")
            references.append(record.get("replay"))
        self._store.collect(reference for reference in references if reference is not None)

    def _warn_of_full_disk(self, needed: int) -> None:
        """Warn once if the disk has no room for two more checkpoints of ``needed`` bytes."""
        free = _free_bytes(self.folder)
        if free < 2 * needed:
            self._warn(
                "disk",
                f"The disk of {self.folder} is nearly full: a checkpoint needs up to {_bytes_text(needed)}, "
                f"{_bytes_text(free)} are free.",
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            _log.warning("%s", message)


def _is_step(name: str) -> bool:
    """Whether a folder of this name holds a complete checkpoint."""
    return re.fullmatch(r"0|[1-9][0-9]{0,18}", name) is not None


def _free_bytes(folder: Path) -> float:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return math.inf


def _bytes_text(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size > 1e5 else f"{size / 1e3:,.1f} kB"


def locate_checkpoint(resume: bool | str | Path, save_dir: Path | None) -> tuple[Path, int | None]:
    """The folder of checkpoints to resume from and, if ``resume`` is a single checkpoint, its step.

    Args:
      resume: True, ``"auto"`` or ``"continue"`` for ``save_dir``, or the path of a folder of checkpoints or of one.
      save_dir: folder in which the run saves; None if it saves nowhere.

    Raises ``ConfigError`` if there is no such folder.
    """
    if resume is not True and resume not in ("auto", "continue"):
        path = absolute_path(str(resume))
        single = (path / "run.json").exists() or (path / "manifest.json").exists()
        return (path.parent, int(path.name)) if single and _is_step(path.name) else (path, None)
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
    path = find_checkpoint(folder, step)
    model.load_params(read_params(path, model))
    return int(path.name)


def load_model(cls: Any, config: Any, folder: str | Path, step: int | str = "latest", device: str = "auto") -> Any:
    """The model ``cls`` of ``config`` with the weights of a checkpoint, and the step of that checkpoint.

    Sizes are compared before memory is allocated: the config may come from somebody else's file. Arguments and errors
    otherwise as of :func:`load_weights`.
    """
    path = find_checkpoint(folder, step)
    params = read_saved_params(path, cls, config)
    model = cls(config, device=device)
    model.load_params(params)
    return model, int(path.name)


def find_checkpoint(folder: str | Path, step: int | str = "latest") -> Path:
    """The folder of a checkpoint: ``"latest"``, ``"best"`` or a step. Raises ``CheckpointError`` if there is none."""
    folder = absolute_path(folder)
    steps = Checkpointer(folder).steps()
    if not steps:
        raise CheckpointError(f"There is no checkpoint in {folder}.")
    if step == "best":
        records = {s: read_summary(folder / str(s)) for s in steps}
        newest = records[steps[-1]]
        values = {s: _value(record, newest.get("monitor")) for s, record in records.items()}
        best = _best(values, str(newest.get("mode") or "min"))
        step = steps[-1] if best is None else best
    number = steps[-1] if step == "latest" else step
    if number not in steps:
        raise CheckpointError(f"There is no checkpoint of step {number} in {folder}; there are {steps}.")
    return folder / str(number)


def _value(record: Mapping[str, Any], monitor: str | None) -> float | None:
    """The value of ``monitor`` that was saved with a checkpoint; None if it was saved with another metric or none."""
    value = record.get("value") if record.get("monitor") == monitor else None
    return float(value) if value is not None and is_number(value) and np.isfinite(value) else None


def _best(values: Mapping[int, float | None], mode: str) -> int | None:
    """Step of the best value, the earliest if several are equal."""
    known = {step: value for step, value in values.items() if value is not None}
    return (min if mode == "min" else max)(sorted(known), key=known.__getitem__, default=None)
