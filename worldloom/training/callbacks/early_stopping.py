"""Stops training when a metric no longer improves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worldloom.config import as_integer, check
from worldloom.training.callbacks.base import Callback, CallbackResult, StepInfo, StopTraining
from worldloom.training.callbacks.monitor import Monitor
from worldloom.training.config import TrainingConfig


class EarlyStoppingCallback(Callback):
    """Stops training once ``monitor`` has not improved for ``patience`` steps.

    A training metric is compared by its mean over the steps since the last comparison, a measurement such as
    ``eval/loss`` whenever it is published.

    Args:
      monitor: name of the metric.
      patience: number of steps without improvement after which training stops.
      min_delta: minimum change that counts as an improvement.
      mode: ``"min"`` if lower is better, ``"max"`` if higher is, ``"auto"`` to infer it from the name.

    Raises:
      ConfigError: a value is out of range; at the first comparison, if there is no metric of that name.
    """

    def __init__(self, monitor: str = "loss", patience: int = 5000, min_delta: float = 1e-4, mode: str = "min"):
        patience = as_integer("patience", patience)
        check(min_delta >= 0, f"min_delta must be ≥ 0, not {min_delta!r}.")
        self.monitor, self.patience, self.min_delta = Monitor(monitor, mode), patience, min_delta
        self.best: float | None = None
        self.best_step = 0

    def interval(self, config: TrainingConfig) -> int:
        """The log interval, but at most ``patience``."""
        return min(config.log_interval, self.patience)

    def on_train_begin(self, info: StepInfo) -> CallbackResult:
        """Count patience from the first step of training."""
        if self.best is None:
            self.best_step = info.step
        return None

    def on_step(self, info: StepInfo) -> CallbackResult:
        """Compare the mean of a training metric with the best so far."""
        return self._compare(info.step, self.monitor.training_mean(info))

    def on_eval(self, info: StepInfo, measurements: Mapping[str, float]) -> CallbackResult:
        """Compare a measurement with the best so far."""
        return self._compare(info.step, measurements.get(self.monitor.name))

    def _compare(self, step: int, value: float | None) -> CallbackResult:
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
        """Restore them."""
        self.best, self.best_step = state["best"], state["best_step"]
