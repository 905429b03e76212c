"""Runs the callbacks of one trainer: schedules them, builds their ``StepInfo``, handles their results."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from worldloom.algorithm import TrainState
from worldloom.distributed import is_primary
from worldloom.errors import FileFormatError, NonFiniteError
from worldloom.training.callbacks.base import Callback, CallbackResult, StepInfo, StopTraining, name_of
from worldloom.training.checkpoint_files import Snapshot
from worldloom.training.config import TrainingConfig
from worldloom.training.interrupts import Interrupted
from worldloom.training.metrics import LazyMetrics, MetricsAccumulator, MetricsStream
from worldloom.training.run_info import with_params

if TYPE_CHECKING:
    from worldloom.training.run_state import Run

_log = logging.getLogger("worldloom")


class CallbackRunner:
    """Callbacks in execution order, each with the metrics accumulated since it last ran.

    Args:
      callbacks: the callbacks; they are sorted by :attr:`Callback.order`, and keep their order where it is equal.

    Attributes:
      callbacks: the sorted callbacks.
      names: their unique names in checkpoints and messages.
      measurements: the newest values that callbacks published, by name.
      stop_reason: reason for which a callback stopped this call of ``train``; None if none did.
    """

    def __init__(self, callbacks: Sequence[Callback]):
        self.callbacks = sorted(callbacks, key=lambda callback: callback.order)
        self.names = _unique([name_of(callback) for callback in self.callbacks])
        self.measurements: dict[str, float] = {}
        self.stop_reason: str | None = None
        self._every = [0] * len(self.callbacks)
        self._accumulators = [MetricsAccumulator(0) for _ in self.callbacks]
        self._stream = MetricsStream()
        self._cut_off: set[str] = set()  # whose ``on_step`` a signal has cut off

    @property
    def any_measures(self) -> bool:
        """Whether any callback may publish measurements."""
        return any(callback.measures for callback in self.callbacks)

    def start(self, config: TrainingConfig, stream: MetricsStream) -> None:
        """Prepare for one call of ``train``, with intervals from ``config`` and metrics from ``stream``."""
        self._every = [callback.interval(config) for callback in self.callbacks]
        self._stream, self.stop_reason = stream, None
        for accumulator in self._accumulators:
            stream.register(accumulator)

    def next_step(self, step: int) -> int | None:
        """The first step after ``step`` at which a callback is due; None if there is none."""
        return min(((step // every + 1) * every for every in self._every if every), default=None)

    def on_train_begin(self, run: Run) -> None:
        """Call ``on_train_begin`` of all callbacks, then ``on_step`` again of those that a signal cut off in it."""
        run.collect_state()
        for index, callback in enumerate(self.callbacks):
            self._call(index, run, callback.on_train_begin, self._partial(index, run.step))
        cut_off, self._cut_off = self._cut_off, set()
        for index, callback in enumerate(self.callbacks):
            if self.names[index] in cut_off:
                self._call(index, run, callback.on_step, self._partial(index, run.step))

    def on_call(self, run: Run) -> None:
        """Call ``on_step`` of the callbacks that follow every compiled call."""
        self._on_steps(run, [index for index, callback in enumerate(self.callbacks) if callback.after_every_call])

    def on_step(self, run: Run) -> None:
        """Call ``on_step`` of the callbacks that are due."""
        due = [index for index, every in enumerate(self._every) if every and run.step % every == 0]
        run.collect_state()
        # Those that follow every call have just been called.
        self._on_steps(run, [index for index in due if not self.callbacks[index].after_every_call])

    def _on_steps(self, run: Run, due: Sequence[int]) -> None:
        finished = {}
        # Replace all accumulators before any callback runs: a checkpoint must save them as they are after this step.
        for index in due:
            finished[index] = self._accumulators[index]
            finished[index].close(run.step)
            self._accumulators[index] = self._stream.register(MetricsAccumulator(run.step))
        for index in due:
            self._call(index, run, self.callbacks[index].on_step, finished[index])

    def on_train_end(self, run: Run) -> None:
        """Call ``on_train_end`` of all callbacks; accumulators stay open for the next call of ``train``."""
        if self.stop_reason:
            _log.info("Training stopped at step %d. %s.", run.step, self.stop_reason)
        run.collect_state()
        for index, callback in enumerate(self.callbacks):
            self._call(index, run, callback.on_train_end, self._partial(index, run.step))

    def close(self) -> None:
        """Call ``close`` of all callbacks."""
        for callback in self.callbacks:
            callback.close()

    def state_dict(self) -> dict[str, Any]:
        """The state of callbacks, accumulators and measurements for a checkpoint."""
        return {
            "states": {n: callback.state_dict() for n, callback in zip(self.names, self.callbacks, strict=True)},
            "intervals": {n: each.state_dict() for n, each in zip(self.names, self._accumulators, strict=True)},
            "measurements": dict(self.measurements),
            "cut_off": sorted(self._cut_off),
        }

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Inverse of :meth:`state_dict`. Metrics of a callback without saved state are accumulated from ``step``.

        Raises ``FileFormatError`` if ``state`` is not what :meth:`state_dict` returned.
        """
        name = ""
        try:
            self.measurements = {str(key): float(value) for key, value in state["measurements"].items()}
            self._cut_off = {str(name) for name in state.get("cut_off", ())}
            for index, (name, callback) in enumerate(zip(self.names, self.callbacks, strict=True)):
                saved = state["intervals"].get(name)
                accumulator = MetricsAccumulator.from_state_dict(saved) if saved else MetricsAccumulator(step)
                self._accumulators[index] = accumulator
                if name in state["states"]:
                    callback.load_state_dict(state["states"][name])
        except (LookupError, TypeError, AttributeError) as error:
            raise FileFormatError(f"The saved state of the callbacks {name} cannot be restored: {error!r}.") from error

    def _call(
        self, index: int, run: Run, method: Callable[..., CallbackResult], accumulator: MetricsAccumulator
    ) -> None:
        """Call a method of callback ``index``, and ``on_eval`` of all callbacks with the measurements it returns."""
        if not _is_called(self.callbacks[index]):
            return
        try:
            result = self._checked_call(index, run.step, method, self._info(run, accumulator))
        except Interrupted:
            if method.__name__ == "on_step":
                self._cut_off.add(self.names[index])
            return
        if isinstance(result, Mapping):
            self.measurements.update(result)
            for other, callback in enumerate(self.callbacks):
                if not _is_called(callback):
                    continue
                info = self._info(run, self._partial(other, run.step))
                if isinstance(self._checked_call(other, run.step, callback.on_eval, info, result), Mapping):
                    raise TypeError(f"{self.names[other]}.on_eval may return None or StopTraining, not measurements.")

    def _checked_call(self, index: int, step: int, method: Callable[..., CallbackResult], *args: Any) -> CallbackResult:
        """Call ``method``; returns measurements as floats, or None.

        A request to stop sets :attr:`stop_reason`. Exceptions get a note naming the callback; ``TypeError`` for an
        invalid result.
        """
        name = f"{self.names[index]}.{method.__name__}"
        try:
            result = method(*args)
        except StopTraining as request:
            result = request
        except (NonFiniteError, Interrupted):
            raise  # The first is raised when the callback read metrics: the callback did not cause it.
        except Exception as error:
            error.add_note(f"Raised by the callback {name} at step {step}.")
            raise
        if isinstance(result, StopTraining):
            self.stop_reason = self.stop_reason or f"{self.names[index]}: {result}"
            return None
        if result is not None and not isinstance(result, Mapping):
            raise TypeError(
                f"The callback {name} returned {result!r}; it may return None, StopTraining('why') or measurements "
                "such as {'eval/return': 1.0}."
            )
        if result is None:
            return None
        try:
            return {str(name): float(value) for name, value in result.items()}
        except (TypeError, ValueError):
            raise TypeError(f"The callback {name} returned {result!r}; measurements are numbers.") from None

    def _info(self, run: Run, accumulator: MetricsAccumulator) -> StepInfo:
        stream = self._stream

        def rate() -> float:
            stream.sync()
            return accumulator.rate()

        return step_info(
            run,
            self.state_dict,
            metrics=LazyMetrics(stream, accumulator, mean=False),
            means=LazyMetrics(stream, accumulator, mean=True),
            updates_per_second=rate,
            measurements=dict(self.measurements),
            measured=self.any_measures,
        )

    def _partial(self, index: int, step: int) -> MetricsAccumulator:
        """The metrics of callback ``index`` up to ``step``; its accumulator stays open."""
        return self._stream.register(self._accumulators[index].closed_copy(step))


def step_info(run: Run, callback_state: Callable[[], dict[str, Any]], **runner_fields: Any) -> StepInfo:
    """The :class:`StepInfo` of the step that ``run`` is at.

    Args:
      run: the run.
      callback_state: function () → the callbacks' part of a snapshot.
      **runner_fields: the fields of :class:`StepInfo` that the callback runner provides.
    """
    assert run.sampler is not None
    step = run.step

    def check_step() -> None:
        if run.step != step:
            raise RuntimeError(f"The state of step {step} is no longer available; read it before the callback returns.")

    def read_state() -> TrainState:
        check_step()
        return run.read_state()

    def snapshot() -> Snapshot:
        check_step()
        return run.snapshot(run.state_to_save(), callback_state())

    return StepInfo(
        step=step,
        env_steps=run.env_steps,
        total_steps=run.total_steps,
        config=run.config,
        model_config=run.model.config,
        model_class=type(run.model),
        loss_terms=run.loss_terms,
        replay_size=len(run.sampler.buffer),
        run_id=run.run_id,
        read_state=read_state,
        model=lambda: with_params(run.model, read_state().params),
        snapshot=snapshot,
        episodes=lambda: list(run.collector.ends) if run.collector else [],
        episodes_ended=run.collector.episodes if run.collector else 0,
        **runner_fields,
    )


def _is_called(callback: Callback) -> bool:
    """Whether this process calls ``callback``: of several processes, the first calls all."""
    return is_primary() or callback.in_every_process


def _unique(names: list[str]) -> list[str]:
    """Number repeated names from the second on; the same callbacks get the same names after a resume."""
    return [f"{name}-{names[:i].count(name) + 1}" if name in names[:i] else name for i, name in enumerate(names)]
