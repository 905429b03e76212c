"""Stop when a metric no longer improves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worldloom.config import check
from worldloom.training.callbacks.base import Callback, CallbackResult, StepInfo, StopTraining
from worldloom.training.callbacks.monitor import Monitor
from worldloom.training.config import TrainingConfig


class EarlyStoppingCallback(Callback):
    """Stops training once ``monitor`` has not improved for ``patience`` steps.

    A training metric is judged by its mean over the steps since the last look, a measurement such as ``eval/loss``
    whenever it is published.

    Args:
      monitor: the metric.
      patience: steps without improvement.
      min_delta: smallest change that counts as one.
      mode: ``"min"`` or ``"max"``: what better means (or ``"auto"``: by the name).

    Raises:
      ConfigError: a value is out of range; at the first look, when there is no metric of that name.
    """

    def __init__(self, monitor: str = "loss", patience: int = 5000, min_delta: float = 1e-4, mode: str = "min"):
        check(isinstance(patience, int) and patience >= 1, f"patience must be an integer ≥ 1, not {patience!r}.")
        check(min_delta >= 0, f"min_delta must be ≥ 0, not {min_delta!r}.")
        self.monitor, self.patience, self.min_delta = Monitor(monitor, mode), patience, min_delta
        self.best: float | None = None
        self.best_step = 0

    def interval(self, config: TrainingConfig) -> int:
        """As often as the log, but not more rarely than patience runs out."""
        return min(config.log_interval, self.patience)

    def on_train_begin(self, info: StepInfo) -> CallbackResult:
        """Patience starts with training."""
        if self.best is None:
            self.best_step = info.step
        return None

    def on_step(self, info: StepInfo) -> CallbackResult:
        """Judge the mean of a training metric."""
        return self._judge(info.step, self.monitor.trained(info))

    def on_eval(self, info: StepInfo, measurements: Mapping[str, float]) -> CallbackResult:
        """Judge a measurement."""
        return self._judge(info.step, measurements.get(self.monitor.name))

    def _judge(self, step: int, value: float | None) -> CallbackResult:
        if value is None:
            return None
        if self.best is None or self.monitor.better(value, self.best, self.min_delta):
            self.best, self.best_step = value, step
        if step - self.best_step < self.patience:
            return None
        return StopTraining(
            f"{self.monitor.name} has not improved for {step - self.best_step} steps; its best was {self.best:.6g} "
            f"at step {self.best_step}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Best value and its step."""
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on waiting where the run was saved."""
        self.best, self.best_step = state["best"], state["best_step"]
