"""Ctrl-C and SIGTERM: the first makes the loop save and stop, a second ends the process at once."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_log = logging.getLogger("worldloom")


class Interrupts:
    """Context manager that records the first SIGINT or SIGTERM in ``received`` instead of ending the process.

    Handlers are installed only in the main thread (Python allows no other) and only in place of the default ones, so a
    program's own handlers stay in effect. They are uninstalled when the first signal arrives, or on exit.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def raise_received(self) -> None:
        """Raise ``KeyboardInterrupt`` after SIGINT, or ``SystemExit(143)`` after SIGTERM; return if none arrived."""
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
