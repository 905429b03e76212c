"""A progress bar, in terminals and notebooks."""

from __future__ import annotations

import time
from typing import Any

from worldloom.training.callbacks.base import Answer, Callback, StepInfo
from worldloom.training.config import TrainingConfig

_SECONDS_BETWEEN_LOSSES = 1.0


class ProgressCallback(Callback):
    """A bar with steps done, speed and the newest loss, on stderr. It moves after every compiled call.

    Args:
      description: text before the bar.
    """

    def __init__(self, description: str = "training"):
        self.description = description
        self._bar: Any = None
        self._read_at = 0.0

    def interval(self, config: TrainingConfig) -> int:
        """As often as the host has a moment anyway: once a call."""
        return max(1, config.updates_per_call)

    def on_train_begin(self, info: StepInfo) -> Answer:
        """Draw the bar."""
        from tqdm.auto import tqdm

        self._bar = tqdm(total=info.total_steps, initial=info.step, desc=self.description, unit="step")
        self._read_at = time.perf_counter()
        return None

    def on_step(self, info: StepInfo) -> Answer:
        """Move the bar. The loss is read once a second: reading waits for the device."""
        if time.perf_counter() - self._read_at > _SECONDS_BETWEEN_LOSSES and "loss" in info.metrics:
            self._bar.set_postfix(loss=f"{info.metrics['loss']:.4g}", refresh=False)
            self._read_at = time.perf_counter()
        self._bar.update(info.step - self._bar.n)
        return None

    def on_train_end(self, info: StepInfo) -> Answer:
        """Leave the bar where training ended."""
        if info.metrics:
            self._bar.set_postfix(loss=f"{info.metrics['loss']:.4g}", refresh=False)
        self._bar.update(info.step - self._bar.n)
        return None

    def close(self) -> None:
        """Take the bar off the screen's last line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
