"""Runs the callbacks of one trainer: when each looks, what it sees, what becomes of its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from worldloom.errors import NonFiniteError
from worldloom.training.callbacks.base import Answer, Callback, StepInfo, StopTraining, name_of
from worldloom.training.config import TrainingConfig
from worldloom.training.metrics import History, Interval, Reading


class Look(Protocol):
    """Makes the record of a look from the metrics of its updates."""

    def __call__(self, metrics: Reading, means: Reading, rate: Callable[[], float]) -> StepInfo:
        """See :class:`StepInfo`."""


class Hooks:
    """The callbacks in the order in which they look, each with the interval it has not looked at yet.

    Args:
      callbacks: in the order given; :attr:`Callback.order` goes first.
      config: the run's config.
    """

    def __init__(self, callbacks: Sequence[Callback], config: TrainingConfig):
        self.callbacks = sorted(callbacks, key=lambda callback: callback.order)
        self.names = _unique([name_of(callback) for callback in self.callbacks])
        self.every = [callback.interval(config) for callback in self.callbacks]
        self.intervals = [Interval(0) for _ in self.callbacks]
        self.measurements: dict[str, float] = {}
        self.stop_reason: str | None = None
        self._history: History | None = None

    @property
    def measured(self) -> bool:
        """Whether any callback may publish measurements."""
        return any(callback.measures for callback in self.callbacks)

    def next_look(self, step: int) -> int | None:
        """First step after ``step`` at which some callback looks; None if none ever does."""
        return min(((step // every + 1) * every for every in self.every if every), default=None)

    def attach(self, history: History) -> None:
        """Take metrics from ``history`` from now on."""
        self._history = history
        for interval in self.intervals:
            interval.restart_clock()
            history.follow(interval)

    def begin(self, step: int, look: Look) -> None:
        """Call ``on_train_begin`` of all."""
        self.stop_reason = None
        for index, callback in enumerate(self.callbacks):
            self._call(index, step, look, callback.on_train_begin, self._peek(index, step))

    def look(self, step: int, look: Look) -> None:
        """Call ``on_step`` of those whose turn it is."""
        due = [index for index, every in enumerate(self.every) if every and step % every == 0]
        seen = {}
        # All intervals change before anyone looks: whoever saves a checkpoint saves them as they go on.
        for index in due:
            seen[index] = self.intervals[index]
            seen[index].close(step)
            self.intervals[index] = self._follow(Interval(step))
        for index in due:
            self._call(index, step, look, self.callbacks[index].on_step, seen[index])

    def end(self, step: int, look: Look) -> None:
        """Call ``on_train_end`` of all; intervals stay open for the next call of ``train``."""
        for index, callback in enumerate(self.callbacks):
            self._call(index, step, look, callback.on_train_end, self._peek(index, step))

    def close(self) -> None:
        """Call ``close`` of all."""
        for callback in self.callbacks:
            callback.close()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the callbacks, by name."""
        return {
            "states": {n: callback.state_dict() for n, callback in zip(self.names, self.callbacks, strict=True)},
            "intervals": {n: interval.state_dict() for n, interval in zip(self.names, self.intervals, strict=True)},
            "measurements": dict(self.measurements),
        }

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Take back :meth:`state_dict`. A callback that was not there before starts at ``step``."""
        self.measurements = dict(state["measurements"])
        for index, (name, callback) in enumerate(zip(self.names, self.callbacks, strict=True)):
            saved = state["intervals"].get(name)
            self.intervals[index] = Interval.from_state_dict(saved) if saved else Interval(step)
            if name in state["states"]:
                callback.load_state_dict(state["states"][name])

    def _call(self, index: int, step: int, look: Look, method: Callable[..., Answer], interval: Interval) -> None:
        info = self._info(interval, look)
        answer = self._guarded(index, step, method, info)
        if isinstance(answer, Mapping):
            self.measurements.update(answer)
            for other, callback in enumerate(self.callbacks):
                info = self._info(self._peek(other, step), look)
                if isinstance(self._guarded(other, step, callback.on_eval, info, answer), Mapping):
                    raise TypeError(f"{self.names[other]}.on_eval may answer None or StopTraining, not measurements.")

    def _guarded(self, index: int, step: int, method: Callable[..., Answer], *args: Any) -> Answer:
        """The answer of a callback; notes a wish to stop, and says in any error whose it is."""
        try:
            answer = method(*args)
        except StopTraining as request:
            answer = request
        except NonFiniteError:
            raise  # Met while reading metrics: not the callback's doing.
        except Exception as error:
            error.add_note(f"Raised by the callback {self.names[index]}.{method.__name__} at step {step}.")
            raise
        if isinstance(answer, StopTraining):
            self.stop_reason = self.stop_reason or f"{self.names[index]}: {answer}"
            return None
        if answer is not None and not isinstance(answer, Mapping):
            raise TypeError(
                f"The callback {self.names[index]}.{method.__name__} answered {answer!r}; it may answer None, "
                "StopTraining('why') or measurements such as {'eval/return': 1.0}."
            )
        if answer is None:
            return None
        try:
            return {str(name): float(value) for name, value in answer.items()}
        except (TypeError, ValueError):
            raise TypeError(
                f"The callback {self.names[index]}.{method.__name__} answered {answer!r}; measurements are numbers."
            ) from None

    def _info(self, interval: Interval, look: Look) -> StepInfo:
        def rate() -> float:
            if self._history:
                self._history.sync()
            return interval.rate()

        history = self._history
        return look(Reading(history, interval, mean=False), Reading(history, interval, mean=True), rate)

    def _peek(self, index: int, step: int) -> Interval:
        return self._follow(self.intervals[index].peek(step))

    def _follow(self, interval: Interval) -> Interval:
        return self._history.follow(interval) if self._history else interval


def _unique(names: list[str]) -> list[str]:
    """Names with a number from the second of a kind on; the same callbacks get the same names after a resume."""
    return [f"{name}-{names[:i].count(name) + 1}" if name in names[:i] else name for i, name in enumerate(names)]
