"""What a callback is, what it sees, and what it may answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from worldloom.errors import ConfigError
from worldloom.state import TrainState
from worldloom.training.checkpoint_files import Snapshot
from worldloom.training.config import TrainingConfig


class StopTraining(Exception):
    """Ask training to stop after this step: raise it in a callback, or return it. The message is the reason."""


@dataclasses.dataclass(frozen=True)
class StepInfo:
    """What a callback sees of a run, once every update up to ``step`` has been started.

    Nothing waits for the device until something is read: ``metrics``, ``means`` and ``updates_per_second`` fetch when
    first used and stay valid; the accessors are valid during the call they were handed to, and what they return is a
    copy on the host to keep.

    Attributes:
      step: updates done.
      env_steps: environment steps taken, action repeat counted; 0 when training from recorded episodes.
      total_steps: updates at which this call of ``train`` ends.
      metrics: metrics of the last update by name, as the family's ``update`` returns them.
      means: their means over the updates since this callback last looked; values that are not finite are left out.
      measurements: the newest values that callbacks published, such as ``eval/loss``.
      config: the run's training config.
      loss_terms: which metrics are terms of the loss.
      replay_size: rows in replay.
      run_id: names the run; a resumed run keeps it.
      measured: whether a callback is there that publishes measurements.
      updates_per_second: function () → updates per second since this callback last looked.
      read_state: function () → the :class:`TrainState`.
      model: function () → a world model of its own with the weights of this step.
      snapshot: function () → everything that a checkpoint needs.
    """

    step: int
    env_steps: int
    total_steps: int
    metrics: Mapping[str, float]
    means: Mapping[str, float]
    measurements: Mapping[str, float]
    config: TrainingConfig
    loss_terms: tuple[str, ...]
    replay_size: int
    run_id: str
    measured: bool
    updates_per_second: Callable[[], float] = dataclasses.field(repr=False)
    read_state: Callable[[], TrainState] = dataclasses.field(repr=False)
    model: Callable[[], Any] = dataclasses.field(repr=False)
    snapshot: Callable[[], Snapshot] = dataclasses.field(repr=False)

    @property
    def lr(self) -> float:
        """Learning rate of the last update; NaN when the family does not report it."""
        return self.metrics.get("lr", float("nan"))

    def params(self) -> dict[str, Any]:
        """All weights as a nested dict of NumPy arrays."""
        return self.read_state().params


Answer = StopTraining | Mapping[str, float] | None
"""Nothing, a wish to stop, or measurements to publish by name (``{"eval/return_mean": 3.5}``)."""


class Callback:
    """Something on the host that looks at a run now and then. Subclass, and override what you need.

    Between two looks of any callback, updates run on the device without the host; a callback that looks at every step
    therefore slows small models down.

    Attributes:
      every: updates between two calls of :meth:`on_step`; None follows ``TrainingConfig.log_interval``, 0 is never.
      order: callbacks look in increasing order: −1 measures, 0 is everyone else, 1 saves what the others concluded.
      measures: whether it publishes measurements.
    """

    every: int | None = None
    order: int = 0
    measures: bool = False

    def interval(self, config: TrainingConfig) -> int:
        """Updates between two calls of :meth:`on_step` in a run with ``config``; 0 is never."""
        return config.log_interval if self.every is None else self.every

    def on_train_begin(self, info: StepInfo) -> Answer:
        """Training is about to begin, or to go on after a resume. Check folders here."""

    def on_step(self, info: StepInfo) -> Answer:
        """``info.step`` is a multiple of the interval."""

    def on_eval(self, info: StepInfo, measurements: Mapping[str, float]) -> Answer:
        """Some callback published ``measurements`` of this step."""

    def on_train_end(self, info: StepInfo) -> Answer:
        """Training ended: done, stopped or interrupted, but not by an error."""

    def close(self) -> None:
        """Release files and threads. Called however training ended."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume, as JSON-serialisable values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""


class FunctionCallback(Callback):
    """A plain function ``f(info)`` as a callback; see :func:`every`."""

    measures = True  # It may: a function's answer is not known beforehand.

    def __init__(self, function: Callable[[StepInfo], Answer], every: int | None = None):
        if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ConfigError(f"every must be an integer ≥ 1, not {every!r}.")
        self.function, self.every = function, every

    def on_step(self, info: StepInfo) -> Answer:
        """Call the function."""
        return self.function(info)


def every(updates: int, function: Callable[[StepInfo], Answer]) -> Callback:
    """Call ``function(info)`` every so many updates."""
    return FunctionCallback(function, updates)


def as_callback(value: Any) -> Callback:
    """A callback from what a user gave: a :class:`Callback`, a function, or a pair ``(updates, function)``.

    Raises ``TypeError`` for anything else.
    """
    if isinstance(value, Callback):
        return value
    if isinstance(value, type):
        raise TypeError(f"Give an instance: {value.__name__}(…) instead of {value.__name__}.")
    if callable(value):
        return FunctionCallback(value)
    if isinstance(value, tuple) and len(value) == 2 and callable(value[1]):
        return FunctionCallback(value[1], value[0])
    raise TypeError(
        f"A callback is a Callback, a function of a StepInfo, or a pair (updates, function); got {value!r}."
    )


def name_of(callback: Callback) -> str:
    """Name for messages and checkpoints: that of the class or function."""
    if isinstance(callback, FunctionCallback):
        return getattr(callback.function, "__qualname__", type(callback.function).__name__)
    return type(callback).__name__
