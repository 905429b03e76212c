"""Progress on stderr: a bar in terminals and notebooks, a line now and then in files."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
import time
from typing import Any

from worldloom.training.callbacks.base import Callback, CallbackResult, StepInfo
from worldloom.training.config import TrainingConfig

_SECONDS_BETWEEN_LOSSES = 1.0
"""Minimum time between two readings of the loss, because each waits for the device."""
_SECONDS_BETWEEN_LINES = 30.0


class ProgressCallback(Callback):
    """Updates done, speed, remaining time, environment steps and the newest loss, on stderr.

    A terminal or a notebook with ``ipywidgets`` shows a bar, which moves after every compiled call. Anything else (a
    file, the log of a CI job) gets a line every 30 seconds. Speed and remaining time exclude the first call, which
    includes collecting and compiling.

    Args:
      description: text before the bar.
    """

    def __init__(self, description: str = "training"):
        self.description = description
        self._display: _Bar | _Lines | None = None
        self._read_at = 0.0
        self._loss = ""

    after_every_call = True

    def interval(self, config: TrainingConfig) -> int:
        """Never: the bar moves after every call, however many updates that does."""
        return 0

    def on_train_begin(self, info: StepInfo) -> CallbackResult:
        """Say what happens before the first update."""
        kind = _Bar if _shows_bars() else _Lines
        self._display = kind(self.description, info.step, info.total_steps)
        self._display.wait("compiling" if info.replay_size else "collecting, then compiling")
        self._read_at, self._loss = 0.0, ""
        return None

    def on_step(self, info: StepInfo) -> CallbackResult:
        """Show the step."""
        self._show(info, time.perf_counter() - self._read_at > _SECONDS_BETWEEN_LOSSES)
        return None

    def on_train_end(self, info: StepInfo) -> CallbackResult:
        """Show the final step and loss."""
        self._show(info, True, last=True)
        return None

    def _show(self, info: StepInfo, loss_due: bool, *, last: bool = False) -> None:
        if self._display is None or not (last or self._display.is_due()):
            return
        if loss_due and "loss" in info.metrics:
            self._loss, self._read_at = f"loss {info.metrics['loss']:.4g}", time.perf_counter()
        env_steps = f"{info.env_steps:,} env steps" if info.env_steps else ""
        self._display.show(info.step, [text for text in (env_steps, self._loss) if text], last=last)

    def close(self) -> None:
        """Finish the bar."""
        if self._display is not None:
            self._display.close()
            self._display = None


class _Bar:
    """A bar by ``tqdm``."""

    def __init__(self, description: str, step: int, total: int):
        if _in_notebook():
            from tqdm.notebook import tqdm
        else:
            from tqdm import tqdm
        self._bar: Any = tqdm(total=total, initial=step, desc=description, unit=" updates")
        self._started, self._ticks = threading.Event(), threading.Thread(target=self._tick, daemon=True)

    def wait(self, reason: str) -> None:
        """Show why there is no step yet, and that time goes by."""
        self._bar.set_postfix_str(reason)
        self._ticks.start()

    def _tick(self) -> None:
        while not self._started.wait(1.0):
            self._bar.refresh()

    def is_due(self) -> bool:
        """Every step; ``tqdm`` itself draws ten times a second."""
        return True

    def show(self, step: int, facts: list[str], *, last: bool) -> None:
        """Move to ``step``; the clock for the speed starts at the first one."""
        if not self._started.is_set():
            self._stop_ticks()
            self._bar.initial = self._bar.n = self._bar.last_print_n = step
            self._bar.last_print_t = time.time()  # The clock that tqdm uses.
            self._bar.set_postfix_str(", ".join(facts))
            return
        self._bar.set_postfix_str(", ".join(facts), refresh=last)
        self._bar.update(step - self._bar.n)

    def _stop_ticks(self) -> None:
        self._started.set()
        self._ticks.join()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._ticks.is_alive():
            self._stop_ticks()
        self._bar.close()


class _Lines:
    """A line of text every 30 seconds."""

    def __init__(self, description: str, step: int, total: int):
        self._description, self._total = description, total
        self._first: tuple[int, float] | None = None
        self._shown_at, self._shown_step = time.monotonic(), step

    def wait(self, reason: str) -> None:
        """Say why there is no step yet."""
        self._print(f"{self._shown_step:,} of {self._total:,} updates, {reason}")

    def is_due(self) -> bool:
        """Whether 30 seconds have passed; every call before the first step is done counts as due."""
        return self._first is None or time.monotonic() - self._shown_at >= _SECONDS_BETWEEN_LINES

    def show(self, step: int, facts: list[str], *, last: bool) -> None:
        """Print ``step`` if it is due and new."""
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        due = now - self._shown_at >= _SECONDS_BETWEEN_LINES or last
        if not due or step == self._shown_step:
            return
        self._shown_at, self._shown_step = now, step
        (first_step, first_time), text = self._first, [f"{step:,} of {self._total:,} updates"]
        if step > first_step:
            speed = (step - first_step) / (now - first_time)
            text.append(f"{speed:.3g} updates/s")
            if step < self._total:
                text.append(f"{_duration((self._total - step) / speed)} left")
        self._print(", ".join([*text, *facts]))

    def _print(self, text: str) -> None:
        # A pipe that was closed does not end training.
        with contextlib.suppress(OSError, ValueError):
            print(f"{self._description}: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is left open."""


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{round(seconds)} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _in_notebook() -> bool:
    """Whether this is the kernel of a notebook that can show widgets."""
    return "ipykernel" in sys.modules and importlib.util.find_spec("ipywidgets") is not None


def _shows_bars() -> bool:
    return _in_notebook() or (sys.stderr is not None and sys.stderr.isatty())
