"""Ctrl-C and SIGTERM: the first asks the loop to save and leave, the second leaves at once."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_log = logging.getLogger("worldloom")


class Interrupts:
    """While entered, remembers the first SIGINT or SIGTERM instead of dying of it.

    Handlers are only installed in the main thread (Python allows no other), only in place of the default ones (a
    program that handles a signal itself goes on doing so), and are taken back when the first signal arrives or on exit.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def leave(self) -> None:
        """End the program as the signal would have: ``KeyboardInterrupt``, or ``SystemExit(143)`` for SIGTERM."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        _log.warning("Stopping once this update is done and callbacks have saved; the same signal again ends at once.")

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
