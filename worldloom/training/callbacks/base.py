"""What a callback is, what it is given, and what it may return."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from worldloom.algorithm import TrainState
from worldloom.config import nearest
from worldloom.errors import ConfigError, UnknownFieldError
from worldloom.training.checkpoint_files import Snapshot
from worldloom.training.config import TrainingConfig


class StopTraining(Exception):
    """Ask training to stop after this step: raise it in a callback, or return it. The message is the reason."""


@dataclasses.dataclass(frozen=True)
class StepInfo:
    """An immutable record of a run at one step, once every update up to it has been started.

    Nothing waits for the device until something is read: ``metrics``, ``means`` and ``updates_per_second`` fetch when
    first used and stay valid. The functions ``read_state``, ``model`` and ``snapshot`` may be called until the callback
    returns; their results are copies on the host to keep.

    Attributes:
      step: updates done.
      env_steps: environment steps taken, action repeat counted; 0 when training from recorded episodes.
      total_steps: updates at which this call of ``train`` ends.
      metrics: metrics of the last update by name, as the family's ``update`` returns them.
      means: their means over the updates since this callback last ran; values that are not finite are left out.
      measurements: the newest values that callbacks published, such as ``eval/loss``.
      config: the run's training config.
      model_config: the model's config.
      model_class: the model's class.
      loss_terms: which metrics are terms of the loss.
      replay_size: rows in replay.
      run_id: identifies the run; a resumed run keeps it.
      measured: whether some callback publishes measurements.
      updates_per_second: function () → updates per second since this callback last ran.
      read_state: function () → the :class:`TrainState`.
      model: function () → a copy of the world model with the weights of this step.
      snapshot: function () → everything that a checkpoint needs.
    """

    step: int
    env_steps: int
    total_steps: int
    metrics: Mapping[str, float]
    means: Mapping[str, float]
    measurements: Mapping[str, float]
    config: TrainingConfig
    model_config: Any
    model_class: type[Any]
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


CallbackResult = StopTraining | Mapping[str, float] | None
"""Nothing, a request to stop, or measurements to publish by name (``{"eval/return_mean": 3.5}``)."""


class Callback:
    """Code on the host that runs at intervals of a training run. Subclass, and override what you need.

    Between two callbacks, updates run on the device without the host; a callback that runs at every step therefore
    slows small models down. A subclass with an ``on_…`` method that is none of those below is refused by ``Trainer``.

    Attributes:
      every: updates between two calls of :meth:`on_step`; None follows ``TrainingConfig.log_interval``, 0 is never.
      order: callbacks run in increasing order: −1 measures, 0 is everyone else, 1 saves what the others concluded.
      measures: whether it publishes measurements.
    """

    every: int | None = None
    order: int = 0
    measures: bool = False

    def interval(self, config: TrainingConfig) -> int:
        """Updates between two calls of :meth:`on_step` in a run with ``config``; 0 is never."""
        return config.log_interval if self.every is None else self.every

    def on_train_begin(self, info: StepInfo) -> CallbackResult:
        """Training is about to begin, or to continue after a resume. Check folders here."""

    def on_step(self, info: StepInfo) -> CallbackResult:
        """``info.step`` is a multiple of the interval."""

    def on_eval(self, info: StepInfo, measurements: Mapping[str, float]) -> CallbackResult:
        """Some callback published ``measurements`` of this step."""

    def on_train_end(self, info: StepInfo) -> CallbackResult:
        """Training ended: done, stopped or interrupted, but not by an error."""

    def close(self) -> None:
        """Release files and threads. Called however training ended."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume, as JSON-serialisable values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""


_EVENTS = {"on_train_begin": 1, "on_step": 1, "on_eval": 2, "on_train_end": 1}
"""Methods that the runner calls, with the number of their arguments."""
_EARLIER_NAMES = {
    "on_step_end": "on_step",
    "on_batch_end": "on_step",
    "on_update": "on_step",
    "on_step_begin": "on_step",
    "on_evaluation": "on_eval",
    "on_eval_end": "on_eval",
    "on_training_start": "on_train_begin",
    "on_train_start": "on_train_begin",
    "on_training_end": "on_train_end",
    "on_checkpoint": "on_step",
    "on_epoch_end": "on_step",
}
"""What the earlier library and others call them."""


def check_events(callback: Callback) -> None:
    """Raise ``UnknownFieldError`` for ``on_…`` methods that are never called, or that take other arguments."""
    owner = type(callback).__name__
    for name in dir(callback):
        method = getattr(callback, name) if name.startswith("on_") else None
        if not callable(method):
            continue
        if name not in _EVENTS:
            right = _EARLIER_NAMES.get(name)
            hint = f" Did you mean '{right}'?" if right else nearest(name, _EVENTS)
            raise UnknownFieldError(
                f"{owner}.{name} would never be called: a callback has {', '.join(_EVENTS)}.{hint} Each takes a "
                "StepInfo (step, metrics, means, …) as in on_step(self, info); a helper of your own needs a name that "
                "does not begin with 'on_'."
            )
        arguments = ("info", "measurements")[: _EVENTS[name]]
        try:
            inspect.signature(method).bind(*arguments)
        except TypeError as error:
            raise UnknownFieldError(
                f"{owner}.{name} cannot be called as {name}({', '.join(arguments)}): {error}. Write def "
                f"{name}(self, {', '.join(arguments)}); step, metrics and means are attributes of info."
            ) from None


class FunctionCallback(Callback):
    """A plain function ``f(info)`` as a callback; see :func:`every`."""

    measures = True  # It may: what a function returns is not known beforehand.

    def __init__(self, function: Callable[[StepInfo], CallbackResult], every: int | None = None):
        if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ConfigError(f"every must be an integer ≥ 1, not {every!r}.")
        self.function, self.every = function, every

    def on_step(self, info: StepInfo) -> CallbackResult:
        """Call the function."""
        return self.function(info)


def every(updates: int, function: Callable[[StepInfo], CallbackResult]) -> Callback:
    """Call ``function(info)`` every so many updates."""
    return FunctionCallback(function, updates)


def as_callback(value: Any) -> Callback:
    """A callback from what a user gave: a :class:`Callback`, a function, or a pair ``(updates, function)``.

    Raises ``TypeError`` for anything else, and for a Callback with methods that are never called.
    """
    if isinstance(value, Callback):
        check_events(value)
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
