"""Saves checkpoints at intervals, and keeps the best one."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from worldloom.config import as_integer
from worldloom.distributed import is_primary
from worldloom.errors import CheckpointError
from worldloom.files import absolute_path
from worldloom.training.callbacks.base import Callback, CallbackResult, StepInfo
from worldloom.training.callbacks.monitor import Monitor
from worldloom.training.checkpoint import Checkpointer
from worldloom.training.config import TrainingConfig


def _note_arguments(init: Callable[..., None]) -> Callable[..., None]:
    """Have ``init`` keep in ``self.given`` the names of the arguments it was called with.

    A default that is shown as the number it usually is can so be told from the same number given.
    """
    names = list(inspect.signature(init).parameters)

    @functools.wraps(init)
    def noting(self: Any, *args: Any, **kwargs: Any) -> None:
        self.given = {*names[1 : len(args) + 1], *kwargs}
        init(self, *args, **kwargs)

    return noting


class CheckpointCallback(Callback):
    """Writes checkpoints of the whole run in the background, every ``save_every`` steps and when training ends.

    The best checkpoint is one of these; none is written only because it is the best. They are compared by the mean of a
    training metric over the steps since the previous save, or by the newest measurement since then, so that no single
    noisy batch decides.

    Args:
      save_dir: folder of the checkpoints of one run, read by ``load_weights`` and ``Trainer.train(…, resume=…)``.
      save_every: steps between two saves. If omitted, it is ``TrainingConfig.save_interval``; an explicit value always
        counts, also one that equals the default, 10,000.
      keep_last: number of newest checkpoints to keep.
      save_best: whether to keep the best one too.
      monitor: name of the metric that decides which is best.
      mode: ``"min"``, ``"max"``, or ``"auto"``: max for names of returns, scores, successes, accuracies and lengths.

    Raises:
      CheckpointError: when training begins, if the folder cannot be written to or holds another run.
      ConfigError: a value is out of range; at the first save, if there is no metric of that name.
    """

    order = 1
    in_every_process = True  # Each writes its part.
    given: set[str]

    @_note_arguments
    def __init__(
        self,
        save_dir: str,
        save_every: int = 10000,
        keep_last: int = 3,
        save_best: bool = True,
        monitor: str = "loss",
        *,
        mode: str = "auto",
    ):
        save_every, keep_last = as_integer("save_every", save_every), as_integer("keep_last", keep_last)
        self.save_dir, self.save_every = absolute_path(save_dir), save_every
        self.monitor = Monitor(monitor, mode) if save_best else None
        best = {"mode": self.monitor.mode, "monitor": self.monitor.name} if self.monitor else {}
        self.checkpointer = Checkpointer(save_dir, keep_last=keep_last, **best)
        self._measurement: float | None = None
        self._saved_step: int | None = None

    def interval(self, config: TrainingConfig) -> int:
        """``save_every`` if it was given, else ``config.save_interval``."""
        return self.save_every if "save_every" in self.given else config.save_interval

    @property
    def latest(self) -> Path | None:
        """Folder of the newest checkpoint."""
        steps = self.checkpointer.steps()
        return self.save_dir / str(steps[-1]) if steps else None

    @property
    def best(self) -> Path | None:
        """Folder of the best checkpoint."""
        step = self.checkpointer.best_step
        return None if step is None else self.save_dir / str(step)

    def on_train_begin(self, info: StepInfo) -> CallbackResult:
        """Refuse an unusable folder before training begins."""
        self.checkpointer.open(info.run_id)
        self._saved_step = info.step if info.step in self.checkpointer.steps() else None
        return None

    def on_eval(self, info: StepInfo, measurements: Mapping[str, float]) -> CallbackResult:
        """Keep the monitored measurement for the next save."""
        if self.monitor:
            self._measurement = measurements.get(self.monitor.name, self._measurement)
        return None

    def on_step(self, info: StepInfo) -> CallbackResult:
        """Save in the background. If the previous write failed, warn and continue."""
        try:
            self.checkpointer.wait()
        except CheckpointError as error:
            warnings.warn(str(error), stacklevel=2)
        self._save(info)
        return None

    def on_train_end(self, info: StepInfo) -> CallbackResult:
        """Save the final step, unless it is already saved, and wait for the write."""
        if info.step != self._saved_step:
            self.on_step(info)
        self.checkpointer.wait()
        return None

    def close(self) -> None:
        """Finish the pending write."""
        self.checkpointer.close()

    def _save(self, info: StepInfo) -> None:
        value = None
        if self.monitor and is_primary():
            mean = self.monitor.training_mean(info)
            value, self._measurement = (self._measurement if mean is None else mean), None
        self.checkpointer.save(info.snapshot(), value)
        self._saved_step = info.step

    def state_dict(self) -> dict[str, Any]:
        """The measurement that the next save will use."""
        return {"measured": self._measurement}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self._measurement = state["measured"]


def recovery_hint(callbacks: Iterable[Callback]) -> str:
    """Advice after a non-finite loss: the last good checkpoint, and settings to change."""
    latest = [callback.latest for callback in callbacks if isinstance(callback, CheckpointCallback)]
    saved = next((f"The last good checkpoint is {path}." for path in latest if path), "No checkpoint was saved.")
    return (
        f"{saved} The model holds the weights before that update. Check the data of that step, lower learning_rate or "
        "grad_clip, or set skip_nonfinite=True to skip such updates."
    )
