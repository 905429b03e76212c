"""Base class of callbacks, the record of a step that they receive, and the results that they may return."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from worldloom.algorithm import TrainState
from worldloom.config import as_integer, nearest
from worldloom.errors import UnknownFieldError
from worldloom.training.checkpoint_files import Snapshot
from worldloom.training.config import TrainingConfig


class StopTraining(Exception):
    """Stops training after this step: raise it in a callback, or return it. The message is the reason."""


@dataclasses.dataclass(frozen=True)
class StepInfo:
    """Immutable record of a run at one step; its updates have been started but are possibly still running.

    The host waits for the device only when a value is read: ``metrics``, ``means`` and ``updates_per_second`` are
    fetched on first use and stay valid. The functions ``read_state``, ``model`` and ``snapshot`` may be called until
    the callback returns; their results are copies on the host, which stay valid.

    Attributes:
      step: updates done.
      env_steps: environment steps taken, counting action repeat; 0 offline.
      total_steps: updates at which this call of ``train`` ends.
      metrics: metrics of the last update by name, as the family's ``update`` returns them.
      means: means of the finite values of the metrics over the updates since this callback last ran.
      measurements: the newest values that callbacks published, such as ``eval/loss``.
      config: the run's training config.
      model_config: the model's config.
      model_class: the model's class.
      loss_terms: names of the metrics that are loss terms.
      replay_size: number of rows in replay.
      run_id: identifies the run; a resumed run keeps it.
      measured: whether any callback publishes measurements.
      updates_per_second: function () → updates per second since this callback last ran.
      read_state: function () → the :class:`TrainState`; if weights are divided over processes, its ``opt_state`` is ().
      model: function () → a copy of the world model with the weights of this step.
      snapshot: function () → the content of a checkpoint; of several processes, weights and optimizer are those of the
        run, which the next update replaces.
      episodes: function () → the training episodes that ended since the last log record, as ``EpisodeRecord``.
      episodes_ended: number of training episodes that ended so far.
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
    episodes: Callable[[], list[Any]] = dataclasses.field(default=list, repr=False)
    episodes_ended: int = 0

    @property
    def lr(self) -> float:
        """Learning rate of the last update; NaN when the family does not report it."""
        return self.metrics.get("lr", float("nan"))

    def params(self) -> dict[str, Any]:
        """All weights as a nested dict of NumPy arrays."""
        return self.read_state().params


CallbackResult = StopTraining | Mapping[str, float] | None
"""A request to stop, measurements to publish by name (``{"eval/return_mean": 3.5}``), or None."""


class Callback:
    """Code that runs on the host at intervals of a training run. Subclass it and override some of its methods.

    Between two callbacks, updates run on the device without the host; a callback that runs at every step therefore
    slows down small models. ``Trainer`` refuses a subclass that has ``on_…`` methods other than those below.

    Attributes:
      every: updates between two calls of :meth:`on_step`; None follows ``TrainingConfig.log_interval``, 0 means never.
      order: callbacks run in ascending order: −1 for those that publish measurements, 0 by default, 1 for those that
        save the state of others.
      measures: whether the callback publishes measurements.
      in_every_process: whether every process of a distributed run calls it, and not only the first. All must have the
        same callbacks in any case: they determine where compiled calls end.
      after_every_call: whether :meth:`on_step` is called after every compiled call too, wherever that ends. Where the
        loop runs on the device, ``env_steps`` and ``replay_size`` are then those of the last other callback.
    """

    every: int | None = None
    order: int = 0
    measures: bool = False
    in_every_process: bool = False
    after_every_call: bool = False

    def interval(self, config: TrainingConfig) -> int:
        """Updates between two calls of :meth:`on_step` in a run with ``config``; 0 means never."""
        return config.log_interval if self.every is None else self.every

    def on_train_begin(self, info: StepInfo) -> CallbackResult:
        """Called before training begins or continues. Check folders here."""

    def on_step(self, info: StepInfo) -> CallbackResult:
        """Called when ``info.step`` is a multiple of the interval."""

    def on_eval(self, info: StepInfo, measurements: Mapping[str, float]) -> CallbackResult:
        """Called when a callback published ``measurements`` at this step."""

    def on_train_end(self, info: StepInfo) -> CallbackResult:
        """Called when training is complete, stopped or interrupted by a signal, but not after an error."""

    def close(self) -> None:
        """Release files and threads. Always called at the end of training, also after an error."""

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON-serializable values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""


_EVENTS = {"on_train_begin": 1, "on_step": 1, "on_eval": 2, "on_train_end": 1}
"""Methods that the runner calls, with the number of their arguments."""
_OTHER_NAMES = {
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
"""Names of these methods in the earlier library and in other libraries."""


def check_events(callback: Callback) -> None:
    """Raise ``UnknownFieldError`` for ``on_…`` methods that are never called, or that have another signature."""
    owner = type(callback).__name__
    for name in dir(callback):
        method = getattr(callback, name) if name.startswith("on_") else None
        if not callable(method):
            continue
        if name not in _EVENTS:
            correct = _OTHER_NAMES.get(name)
            hint = f" Did you mean '{correct}'?" if correct else nearest(name, _EVENTS)
            raise UnknownFieldError(
                f"{owner}.{name} would never be called: a callback has {', '.join(_EVENTS)}.{hint} Their argument info "
                "is a StepInfo (step, metrics, means, …), as in on_step(self, info); names of other methods must not "
                "begin with 'on_'."
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

    measures = True  # Whether the function returns measurements is only known when it is called.

    def __init__(self, function: Callable[[StepInfo], CallbackResult], every: int | None = None):
        self.function, self.every = function, None if every is None else as_integer("every", every)

    def on_step(self, info: StepInfo) -> CallbackResult:
        """Call the function."""
        return self.function(info)


def every(updates: int, function: Callable[[StepInfo], CallbackResult]) -> Callback:
    """A callback that calls ``function(info)`` every ``updates`` updates."""
    return FunctionCallback(function, updates)


def as_callback(value: Any) -> Callback:
    """Convert a :class:`Callback`, a function, or a pair ``(updates, function)`` to a :class:`Callback`.

    Raises ``TypeError`` for anything else, and for a Callback with methods that are never called.
    """
    if isinstance(value, Callback):
        check_events(value)
        return value
    if isinstance(value, type):
        raise TypeError(f"A callback must be an instance: {value.__name__}(…) instead of {value.__name__}.")
    if callable(value):
        return FunctionCallback(value)
    if isinstance(value, tuple) and len(value) == 2 and callable(value[1]):
        return FunctionCallback(value[1], value[0])
    raise TypeError(
        f"A callback is a Callback, a function of a StepInfo, or a pair (updates, function); got {value!r}."
    )


def name_of(callback: Callback) -> str:
    """Name of a callback in messages and checkpoints: that of its class or function."""
    if isinstance(callback, FunctionCallback):
        return getattr(callback.function, "__qualname__", type(callback.function).__name__)
    return type(callback).__name__
