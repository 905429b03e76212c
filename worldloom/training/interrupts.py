"""Ctrl-C, SIGTERM and SIGHUP: the first makes the loop save and stop, a second ends the process at once."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_log = logging.getLogger("worldloom")

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""SIGHUP arrives when the terminal is closed; ``nohup`` has it ignored."""
_active: list[Interrupts] = []
"""Those within whose ``with`` block the main thread is, the innermost last."""


class Interrupted(Exception):
    """Something long within a callback was given up, because a signal asked the training around it to stop.

    A callback lets it pass: the ``on_step`` that it cut off is called again when the run goes on.
    """


def interrupted() -> bool:
    """Whether training in this thread was asked to stop; what takes long within a callback asks this now and then."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    return in_main_thread and bool(_active) and _active[-1].received is not None


class Interrupts:
    """Context manager that records the first SIGINT, SIGTERM or SIGHUP in ``received`` instead of ending the process.

    Handlers are installed only in the main thread (Python allows no other) and only in place of the default ones, so a
    program's own handlers stay in effect. They are uninstalled when the first signal arrives, or on exit.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            _active.append(self)
            for number in _SIGNALS:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if self in _active:
            _active.remove(self)

    def raise_received(self) -> None:
        """Raise ``KeyboardInterrupt`` after SIGINT, ``SystemExit`` (143) after SIGTERM, (129) after SIGHUP."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        _log.warning("Stopping once this update is done and callbacks have saved; the same signal again ends at once.")

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())
