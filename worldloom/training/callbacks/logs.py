"""Logs of a run: lines on the console, JSON lines and TensorBoard events in a folder, a Weights & Biases run."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worldloom.config import check
from worldloom.errors import MissingDependencyError
from worldloom.files import absolute_path, make_folder, write_atomically
from worldloom.training.callbacks.base import Callback, CallbackResult, StepInfo
from worldloom.training.callbacks.log_files import AppendFile, TensorBoardFile
from worldloom.training.metrics import tag

FILE_NAME = "metrics.jsonl"
_LATEST = ("lr", "skipped")
"""Metrics of which the last value is logged instead of the mean."""


class LoggingCallback(Callback):
    """Writes the means over every ``TrainingConfig.log_interval`` steps, and the measurements of each evaluation.

    Names are the same in all outputs: ``train/loss``, ``train/loss/<term>``, ``train/grad_norm``, ``train/lr``,
    ``fps/update``, ``replay/size``, ``collect/…``, ``eval/…``. Every JSON line has ``step`` (updates),
    ``env_steps`` and ``time``. TensorBoard's x-axis is the number of environment steps online and of updates offline.

    Args:
      log_dir: folder of ``metrics.jsonl``, which is always written, and TensorBoard events; None writes no files. A
        resumed run appends to the file; a new run first renames an existing file to ``metrics.<n>.jsonl``.
      log_to_console: whether to print a line as well.
      log_to_tensorboard: whether to write TensorBoard events as well; requires ``log_dir``.
      log_to_wandb: whether to log to Weights & Biases as well (extra ``wandb``): to the run of ``wandb.init`` if one is
        active, else to a new one with the id of this run and both configs. ``WANDB_PROJECT`` (default ``worldloom``),
        ``WANDB_MODE`` and its other variables are respected; ``WANDB_MODE=offline`` writes under ``log_dir`` only.

    Raises:
      ConfigError: TensorBoard without a folder.
      MissingDependencyError: the package ``wandb`` is not installed.
      OSError: when training begins, if the folder cannot be written to. Later, such as on a full disk, records are kept
        until they can be written, with a warning.
    """

    def __init__(
        self,
        log_dir: str | None = None,
        log_to_console: bool = True,
        log_to_tensorboard: bool = False,
        log_to_wandb: bool = False,
    ):
        check(
            not log_to_tensorboard or log_dir is not None,
            "log_to_tensorboard=True needs a folder: LoggingCallback(log_dir='./logs', log_to_tensorboard=True).",
        )
        self.log_dir = None if log_dir is None else absolute_path(log_dir)
        if log_to_wandb and importlib.util.find_spec("wandb") is None:
            raise MissingDependencyError("log_to_wandb=True needs: pip install 'worldloom[wandb]'.")
        self.log_to_console, self.log_to_tensorboard, self.log_to_wandb = (
            log_to_console,
            log_to_tensorboard,
            log_to_wandb,
        )
        self._file: AppendFile | None = None
        self._events: TensorBoardFile | None = None
        self._wandb: Any = None
        self._finish_wandb = False
        # Step at which training began or was resumed, and the names in each record that the file then had of it.
        self._begun_at, self._written = 0, set[frozenset[str]]()

    def on_train_begin(self, info: StepInfo) -> CallbackResult:
        """Open the files; a resumed run first removes records after its step."""
        if self.log_to_wandb:
            self._open_wandb(info)
        if self.log_dir is None:
            return None
        make_folder(self.log_dir)
        path = self.log_dir / FILE_NAME
        if path.exists():
            _truncate_or_rename(path, info.step)
        self._begun_at, self._written = info.step, _records_at(path, info.step)
        self._file = AppendFile(path)
        if self.log_to_tensorboard:
            self._events = TensorBoardFile(self.log_dir, _x_axis(info) + 1 if info.step else None)
        return None

    def on_step(self, info: StepInfo) -> CallbackResult:
        """Write the means since the last record."""
        values = {name: info.metrics[name] if name in _LATEST else mean for name, mean in info.means.items()}
        record = {tag(name, info.loss_terms): value for name, value in values.items()}
        record |= {"fps/update": info.updates_per_second(), "replay/size": info.replay_size}
        self._write(info, record)
        return None

    def on_eval(self, info: StepInfo, measurements: Mapping[str, float]) -> CallbackResult:
        """Write the measurements under their own names."""
        self._write(info, measurements)
        return None

    def on_train_end(self, info: StepInfo) -> CallbackResult:
        """Write the means over the steps since the last record."""
        if info.means:
            self.on_step(info)
        return None

    def close(self) -> None:
        """Close the files."""
        if self._events is not None:
            self._events.close()
        if self._file is not None:
            self._file.close()
        # A run that the user began is theirs to finish.
        if self._wandb is not None and self._finish_wandb:
            self._wandb.finish()
        self._events = self._file = self._wandb = None

    def _open_wandb(self, info: StepInfo) -> None:
        import wandb

        self._finish_wandb = wandb.run is None
        if self.log_dir is not None:
            self.log_dir.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb.run or wandb.init(
            project=os.environ.get("WANDB_PROJECT", "worldloom"),
            id=info.run_id,
            resume="allow",
            dir=self.log_dir,
            config={"model": info.model_config.to_dict(), "training": info.config.to_dict()},
        )
        # Its own step must increase; a resumed run repeats some. The x-axis is a metric instead.
        self._wandb.define_metric("*", step_metric="env_steps" if info.env_steps or info.config.env_steps else "step")

    def _write(self, info: StepInfo, record: Mapping[str, float]) -> None:
        if info.step == self._begun_at and frozenset(record) in self._written:
            return  # A run that was killed at its end, after this record, ends once more.
        if self.log_to_console:
            env_steps = f"env steps {info.env_steps:,}  " if info.env_steps else ""
            print_line(f"step {info.step:,}/{info.total_steps:,}  {env_steps}" + "  ".join(_console_items(record)))
        if self._file is not None:
            # JSON has no NaN or infinity.
            finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
            position = {"step": info.step, "env_steps": info.env_steps, "time": time.time()}
            self._file.write(json.dumps({**position, **finite}).encode() + b"\n")
        if self._wandb is not None:
            self._wandb.log({"step": info.step, "env_steps": info.env_steps, **record})
        if self._events is not None:
            self._events.add(record, _x_axis(info))


def _x_axis(info: StepInfo) -> int:
    """Position of a record on TensorBoard's x-axis: updates where recorded data come first, else environment steps."""
    return info.step if info.config.offline_updates else info.env_steps or info.step


def _console_items(record: Mapping[str, float]) -> list[str]:
    """Items such as ``loss 1.23``, without the prefixes of training metrics."""
    return [f"{name.removeprefix('train/').removeprefix('loss/')} {value:.4g}" for name, value in record.items()]


def print_line(line: str) -> None:
    """Print ``line`` above a progress bar. A terminal or pipe that was closed does not end training."""
    from tqdm import tqdm  # tqdm.auto warns in notebooks without ipywidgets

    with contextlib.suppress(OSError, ValueError):
        tqdm.write(line)
        sys.stdout.flush()  # A file or pipe would show it much later.


def _truncate_or_rename(path: Path, step: int) -> None:
    """For a resumed run, remove the records after ``step``; for a new one (step 0), rename the existing file."""
    if step == 0:
        rename_old(path)
        return
    kept = [line for line in path.read_bytes().splitlines(keepends=True) if _step_of(line) <= step]
    write_atomically(path, b"".join(kept))


def rename_old(path: Path) -> None:
    """Rename a file of an earlier run to ``name.<n>.jsonl``."""
    number = 1
    while (renamed := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(renamed)


def _records_at(path: Path, step: int) -> set[frozenset[str]]:
    """The names of the values in each record of ``step``."""
    if not path.exists():
        return set()
    records = [json.loads(line) for line in path.read_bytes().splitlines() if _step_of(line + b"\n") == step]
    return {frozenset(record) - {"step", "env_steps", "time"} for record in records}


def _step_of(line: bytes) -> float:
    """The step of a record; infinite if the line is incomplete because the process was killed while writing it."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return math.inf
