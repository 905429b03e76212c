"""Records of a run: a line on the console, JSON lines and TensorBoard events in a folder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from worldloom.config import check
from worldloom.files import write_atomically
from worldloom.training.callbacks.base import Callback, CallbackResult, StepInfo
from worldloom.training.metrics import tag

FILE_NAME = "metrics.jsonl"
_LATEST = ("lr", "skipped")  # Where the last value says more than a mean.


class LoggingCallback(Callback):
    """Writes a record every ``TrainingConfig.log_interval`` steps, of means over these steps, and one per evaluation.

    Names are the same everywhere: ``train/loss``, ``train/loss/<term>``, ``train/grad_norm``, ``train/lr``,
    ``fps/update``, ``replay/size``, ``collect/…``, ``eval/…``. Every JSON line has ``step`` (updates),
    ``env_steps`` and ``time``. TensorBoard's x-axis is the number of environment steps online and of updates offline.

    Args:
      log_dir: folder of ``metrics.jsonl`` (always written there) and TensorBoard events; None writes no files. A
        resumed run goes on in the same file; a new run moves an older file to ``metrics.<n>.jsonl``.
      log_to_console: print a line too.
      log_to_tensorboard: write TensorBoard events too; needs ``log_dir``.

    Raises:
      ConfigError: TensorBoard without a folder.
      OSError: when training begins, if the folder cannot be written to.
    """

    def __init__(self, log_dir: str | None = None, log_to_console: bool = True, log_to_tensorboard: bool = False):
        check(
            not log_to_tensorboard or log_dir is not None,
            "log_to_tensorboard=True needs a folder: LoggingCallback(log_dir='./logs', log_to_tensorboard=True).",
        )
        self.log_dir = None if log_dir is None else Path(log_dir)
        self.log_to_console, self.log_to_tensorboard = log_to_console, log_to_tensorboard
        self._file: TextIO | None = None
        self._writer: Any = None

    def on_train_begin(self, info: StepInfo) -> CallbackResult:
        """Open the files; records after the step that a run goes on from are cut off."""
        if self.log_dir is None:
            return None
        self.log_dir.mkdir(parents=True, exist_ok=True)
        path = self.log_dir / FILE_NAME
        if path.exists():
            _make_room(path, info.step)
        self._file = path.open("a", encoding="utf-8")
        if self.log_to_tensorboard:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self.log_dir), purge_step=_x(info) + 1 if info.step else None)
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
        """Write the last record, of the steps that no record has covered."""
        if info.means:
            self.on_step(info)
        return None

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()
        if self._file is not None:
            self._file.close()
        self._writer = self._file = None

    def _write(self, info: StepInfo, record: Mapping[str, float]) -> None:
        if self.log_to_console:
            taken = f"env steps {info.env_steps:,}  " if info.env_steps else ""
            _print(f"step {info.step:,}/{info.total_steps:,}  {taken}" + "  ".join(_short(record)))
        if self._file is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
            place = {"step": info.step, "env_steps": info.env_steps, "time": time.time()}
            self._file.write(json.dumps({**place, **finite}) + "\n")
            self._file.flush()
        if self._writer is not None:
            for name, value in record.items():
                self._writer.add_scalar(name, value, _x(info))
            self._writer.flush()


def _x(info: StepInfo) -> int:
    return info.env_steps or info.step


def _short(record: Mapping[str, float]) -> list[str]:
    """``loss 1.23``: the names without what the reader knows."""
    return [f"{name.removeprefix('train/').removeprefix('loss/')} {value:.4g}" for name, value in record.items()]


def _print(line: str) -> None:
    from tqdm.auto import tqdm

    # Plain print would tear a progress bar apart.
    tqdm.write(line)


def _make_room(path: Path, step: int) -> None:
    """Keep the records up to ``step`` of a run that goes on; move those of another run aside."""
    if step == 0:
        number = 1
        while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
            number += 1
        path.rename(aside)
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if _step_of(line) <= step]
    write_atomically(path, "".join(kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # Cut off amid a write.
