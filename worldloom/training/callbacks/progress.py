"""A progress bar, in terminals and notebooks."""

from __future__ import annotations

import time
from typing import Any

from worldloom.training.callbacks.base import Callback, CallbackResult, StepInfo
from worldloom.training.config import TrainingConfig

_SECONDS_BETWEEN_LOSSES = 1.0


class ProgressCallback(Callback):
    """A bar with steps done, speed and the newest loss, on stderr. It moves after every compiled call.

    Speed and time to go are of what comes after the first call, which waits for collecting and compiling.

    Args:
      description: text before the bar.
    """

    def __init__(self, description: str = "training"):
        self.description = description
        self._bar: Any = None
        self._read_at = 0.0
        self._waiting = False

    def interval(self, config: TrainingConfig) -> int:
        """As often as the host has a moment anyway: once a call."""
        return max(1, config.updates_per_call)

    def on_train_begin(self, info: StepInfo) -> CallbackResult:
        """Draw the bar."""
        from tqdm.auto import tqdm

        self._bar = tqdm(total=info.total_steps, initial=info.step, desc=self.description, unit="step")
        self._bar.set_postfix_str("compiling" if info.replay_size else "collecting, then compiling")
        self._read_at, self._waiting = time.perf_counter(), True
        return None

    def on_step(self, info: StepInfo) -> CallbackResult:
        """Move the bar. The loss is read once a second: reading waits for the device."""
        if (self._waiting or time.perf_counter() - self._read_at > _SECONDS_BETWEEN_LOSSES) and "loss" in info.metrics:
            self._bar.set_postfix(loss=f"{info.metrics['loss']:.4g}", refresh=False)
            self._read_at = time.perf_counter()
        if self._waiting:
            self._start(info.step)
        self._bar.update(info.step - self._bar.n)
        return None

    def on_train_end(self, info: StepInfo) -> CallbackResult:
        """Leave the bar where training ended."""
        if "loss" in info.metrics:
            self._bar.set_postfix(loss=f"{info.metrics['loss']:.4g}", refresh=False)
        self._bar.update(info.step - self._bar.n)
        return None

    def _start(self, step: int) -> None:
        """Count speed from here on, not from when the bar was drawn."""
        self._waiting = False
        self._bar.initial = self._bar.n = self._bar.last_print_n = step
        self._bar.last_print_t = time.time()  # The clock that tqdm reads.
        self._bar.refresh()

    def close(self) -> None:
        """Take the bar off the screen's last line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
