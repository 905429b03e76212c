"""A progress bar, in terminals and notebooks."""

from __future__ import annotations

import time
from typing import Any

from worldloom.training.callbacks.base import Callback, CallbackResult, StepInfo
from worldloom.training.config import TrainingConfig

_SECONDS_BETWEEN_LOSSES = 1.0
"""Minimum time between two readings of the loss, because each waits for the device."""


class ProgressCallback(Callback):
    """A progress bar on stderr with steps done, speed and the newest loss, updated after every compiled call.

    Speed and remaining time exclude the first call, which includes collecting and compiling.

    Args:
      description: text before the bar.
    """

    def __init__(self, description: str = "training"):
        self.description = description
        self._bar: Any = None
        self._read_at = 0.0
        self._before_first_call = False

    def interval(self, config: TrainingConfig) -> int:
        """Once per compiled call, which costs no additional calls."""
        return max(1, config.updates_per_call)

    def on_train_begin(self, info: StepInfo) -> CallbackResult:
        """Show the bar."""
        from tqdm.auto import tqdm

        self._bar = tqdm(total=info.total_steps, initial=info.step, desc=self.description, unit="step")
        self._bar.set_postfix_str("compiling" if info.replay_size else "collecting, then compiling")
        self._read_at, self._before_first_call = time.perf_counter(), True
        return None

    def on_step(self, info: StepInfo) -> CallbackResult:
        """Update the bar."""
        loss_due = self._before_first_call or time.perf_counter() - self._read_at > _SECONDS_BETWEEN_LOSSES
        if loss_due and "loss" in info.metrics:
            self._bar.set_postfix(loss=f"{info.metrics['loss']:.4g}", refresh=False)
            self._read_at = time.perf_counter()
        if self._before_first_call:
            self._start_clock(info.step)
        self._bar.update(info.step - self._bar.n)
        return None

    def on_train_end(self, info: StepInfo) -> CallbackResult:
        """Show the final step and loss."""
        if "loss" in info.metrics:
            self._bar.set_postfix(loss=f"{info.metrics['loss']:.4g}", refresh=False)
        self._bar.update(info.step - self._bar.n)
        return None

    def _start_clock(self, step: int) -> None:
        """Measure speed from ``step`` on, not from when the bar was first shown."""
        self._before_first_call = False
        self._bar.initial = self._bar.n = self._bar.last_print_n = step
        self._bar.last_print_t = time.time()  # The clock that tqdm uses.
        self._bar.refresh()

    def close(self) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
