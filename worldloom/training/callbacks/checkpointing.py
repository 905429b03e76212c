"""Save the run now and then, and keep the best."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from worldloom.config import check
from worldloom.errors import CheckpointError
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
    """Writes checkpoints of the whole run in the background: at every ``save_every`` steps, and when training ends.

    The best one is chosen among these, never written for its own sake: by the mean of a training metric over the steps
    since the save before, or by the newest measurement published since then. One noisy batch decides nothing.

    Args:
      save_dir: folder of the checkpoints; one run each. ``load_weights`` and ``Trainer.train(…, resume=…)`` read it.
      save_every: steps between two saves. Not given, it is ``TrainingConfig.save_interval`` (10,000 by default); given,
        it is what was given, also 10,000.
      keep_last: how many of the newest to keep.
      save_best: keep the best one too.
      monitor: metric that decides which is best.
      mode: ``"min"``, ``"max"``, or ``"auto"``: max for names of returns, scores, successes, accuracies and lengths.

    Raises:
      CheckpointError: when training begins, if the folder cannot be written to or holds another run.
      ConfigError: a value is out of range; at the first save, when there is no metric of that name.
    """

    order = 1
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
        check(
            isinstance(save_every, int) and save_every >= 1, f"save_every must be an integer ≥ 1, not {save_every!r}."
        )
        check(isinstance(keep_last, int) and keep_last >= 1, f"keep_last must be an integer ≥ 1, not {keep_last!r}.")
        self.save_dir, self.save_every = Path(save_dir), save_every
        self.monitor = Monitor(monitor, mode) if save_best else None
        judged = {"mode": self.monitor.mode, "monitor": self.monitor.name} if self.monitor else {}
        self.checkpointer = Checkpointer(save_dir, keep_last=keep_last, **judged)
        self._measured: float | None = None
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
        """Refuse a folder that will not do, before any work."""
        self.checkpointer.open(info.run_id)
        self._saved_step = info.step if info.step in self.checkpointer.steps() else None
        return None

    def on_eval(self, info: StepInfo, measurements: Mapping[str, float]) -> CallbackResult:
        """Remember the monitored measurement for the next save."""
        if self.monitor:
            self._measured = measurements.get(self.monitor.name, self._measured)
        return None

    def on_step(self, info: StepInfo) -> CallbackResult:
        """Save in the background. A write that failed is warned of; the next save tries again."""
        try:
            self.checkpointer.wait()
        except CheckpointError as error:
            warnings.warn(str(error), stacklevel=2)
        self._save(info)
        return None

    def on_train_end(self, info: StepInfo) -> CallbackResult:
        """Save where training ended, unless that is saved, and wait until it is written."""
        if info.step != self._saved_step:
            self.on_step(info)
        self.checkpointer.wait()
        return None

    def close(self) -> None:
        """Finish the write that is under way."""
        self.checkpointer.close()

    def _save(self, info: StepInfo) -> None:
        value = None
        if self.monitor:
            trained = self.monitor.trained(info)
            value, self._measured = (self._measured if trained is None else trained), None
        self.checkpointer.save(info.snapshot(), value)
        self._saved_step = info.step

    def state_dict(self) -> dict[str, Any]:
        """A measurement that no save has used yet."""
        return {"measured": self._measured}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._measured = state["measured"]


def recovery_hint(callbacks: Iterable[Callback]) -> str:
    """What a user can do about a loss that is not finite, and which checkpoint is good."""
    saved = [callback.latest for callback in callbacks if isinstance(callback, CheckpointCallback)]
    kept = next((f"The last good checkpoint is {path}." for path in saved if path), "No checkpoint was saved.")
    return (
        f"{kept} The model holds the weights before it. Look at the data of that step, lower learning_rate or "
        "grad_clip, or set skip_nonfinite=True to leave such updates out."
    )
