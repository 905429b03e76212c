"""The trainer: connects a run with its callbacks, environments and checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from worldloom.algorithm import TrainState
from worldloom.config import as_integer, check
from worldloom.distributed import check_processes, has_left, leaving_on_error
from worldloom.envs import VectorEnv, is_env, make_env
from worldloom.envs.across_processes import across_processes
from worldloom.errors import NonFiniteError
from worldloom.explain import explain_arguments, explain_attributes
from worldloom.training.callbacks import EpisodesCallback, LoggingCallback, ProgressCallback
from worldloom.training.callbacks.base import as_callback
from worldloom.training.callbacks.checkpointing import recovery_hint
from worldloom.training.callbacks.evaluation import default_evaluation
from worldloom.training.callbacks.runner import CallbackRunner
from worldloom.training.config import TrainingConfig
from worldloom.training.evaluation import evaluate
from worldloom.training.fit import fit
from worldloom.training.interrupts import Interrupts
from worldloom.training.on_device.fit import fit_on_device, runs_on_device
from worldloom.training.resume import resume_run
from worldloom.training.run_info import facts
from worldloom.training.run_state import Run

_log = logging.getLogger("worldloom")


@explain_attributes({"add_callback": "Callbacks are given at once: Trainer(model, config, callbacks=[…])."})
class Trainer:
    """Trains a world model and runs callbacks; the loop is :func:`worldloom.training.fit.fit`.

    The model keeps its old weights during :meth:`train` and holds the trained ones afterwards, also after an error.
    Everything else that training changes is in :attr:`state`.

    Args:
      model: a world model of any family, or of a subclass.
      config: the training config; None means the defaults.
      callbacks: :class:`~worldloom.training.callbacks.Callback` objects, functions of a ``StepInfo``, or pairs
        ``(updates, function)``. None adds a progress bar, a console log and, online, an evaluation of
        ``eval_episodes`` episodes every ``eval_interval`` updates, an empty list nothing. Only callbacks given here
        write to disk.

    Raises:
      DeviceError: ``config.device`` is a numbered device that does not exist.
      ConfigError: the model was changed in a way that training would ignore.
      TypeError: an object is not a callback, or a callback has a method that is never called.
    """

    @explain_arguments()
    def __init__(self, model: Any, config: TrainingConfig | None = None, callbacks: Sequence[Any] | None = None):
        self.run = Run(model, config or TrainingConfig())
        self._add_evaluation = callbacks is None
        callbacks = [ProgressCallback(), LoggingCallback()] if callbacks is None else callbacks
        self._callbacks = CallbackRunner([as_callback(callback) for callback in callbacks])
        self._made_env: tuple[Any, VectorEnv] | None = None

    @property
    def model(self) -> Any:
        """The model being trained."""
        return self.run.model

    @property
    def config(self) -> TrainingConfig:
        """The training config. A new one applies from the next :meth:`train`; ``ConfigError`` if it cannot."""
        return self.run.config

    @config.setter
    def config(self, config: TrainingConfig) -> None:
        self.run.reconfigure(config)

    @property
    def state(self) -> TrainState:
        """Step, weights, optimizer state and root key. In callbacks, use ``StepInfo.read_state`` instead."""
        return self.run.state

    @property
    def step(self) -> int:
        """Updates done."""
        return self.run.step

    @property
    def stop_reason(self) -> str | None:
        """Reason for which a callback stopped the last call of :meth:`train`; None if none did."""
        return self._callbacks.stop_reason

    @property
    def replay(self) -> Any:
        """The buffer that online training collects into; None before the first online call of :meth:`train`."""
        return self.run.collector.replay if self.run.collector else None

    def train(
        self, source: Any, *, total_steps: int | None = None, resume: bool | str | Path = False, replay: Any = None
    ) -> TrainState:
        """Train until ``total_steps`` updates are done in total, and return the state; a further call continues.

        Online, updates follow environment steps at the ratio ``config.train_ratio``, after ``config.prefill`` decision
        steps; ``config.env_steps`` environment steps end training, unless that is 0 or ``total_steps`` is given.

        Args:
          source: a :class:`~worldloom.replay.ReplayBuffer` of recorded episodes; or environments: a
            :class:`~worldloom.envs.VectorEnv`, or an argument of ``make_env`` (an id such as ``"Pendulum-v1"``, a
            function). They are reset when training begins, and the caller closes them. A further call continues the
            current episodes, unless the environments were reset or stepped in between.
          total_steps: total number of updates, including earlier calls and a resumed run; None means the config's.
          resume: ``"auto"`` resumes from the newest checkpoint in the folder of the ``CheckpointCallback`` if there is
            one, True requires one, a path names another folder of checkpoints or a single one. With the same data or
            environments, the resumed run equals an uninterrupted one bit for bit. ``"continue"`` takes along what fits
            (weights, optimizer, replay, statistics) when config, environment or number of environments were changed,
            and logs what is different: then the run is no longer the uninterrupted one.
          replay: buffer to collect into, possibly with episodes; None creates one of ``config.replay_capacity`` rows.

        Raises:
          DataError: the buffer is empty, has other shapes than the model, or no episode is as long as a window.
          CheckpointError: there is no readable checkpoint to resume from, or the folder cannot be written to.
          ConfigError: the checkpoint belongs to a run with another config; environment and model do not fit.
          NonFiniteError: a loss or gradient became NaN or infinite. State and model are those before that update.
          KeyboardInterrupt, SystemExit: on Ctrl-C or SIGTERM, after callbacks have saved and closed their files.
        """
        run = self.run
        if is_env(source):
            self._use_env(self._env(source), replay)
        else:
            check(replay is None, "replay= is a buffer to collect into; recorded data are trained on as they are.")
            run.use_data(source)
        if resume:
            resume_run(run, self._callbacks, resume)
        total = self._total(total_steps)
        check_processes(facts(run) | {"total_steps": total, "callbacks": self._callbacks.names})
        if run.step >= total:
            _log.warning("Nothing to train: step %d of total_steps=%d is done.", run.step, total)
            # A run that was killed at its end may lack the files that callbacks write there.
            if not resume or run.step > total:
                return run.state
        self._callbacks.start(run.config, run.new_metrics())
        with jax.default_device(run.device), Interrupts() as interrupts:  # precision="auto" reads the default device
            try:
                with leaving_on_error():
                    (fit_on_device if runs_on_device(run) else fit)(run, total, self._callbacks, interrupts)
            except NonFiniteError as error:
                raise NonFiniteError(f"{error} {recovery_hint(self._callbacks.callbacks)}") from None
            finally:
                self._callbacks.close()
                if not has_left():
                    run.sync_model()
        interrupts.raise_received()
        return run.state

    def evaluate(self, buffer: Any, *, batches: int = 8, seed: int = 0) -> dict[str, float]:
        """Mean loss terms of the model on held-out data; see :func:`worldloom.training.evaluate`."""
        return evaluate(self.model, buffer, self.config, batches=batches, seed=seed)

    def check_length(self, env: VectorEnv) -> None:
        """Raise ``ConfigError`` if ``config.env_steps`` in ``env`` end before the first update."""
        self._use_env(env, None)
        self._total(None)

    def _env(self, source: Any) -> VectorEnv:
        """``source``, or environments made from it, which are kept for the next call; with those of other processes."""
        if isinstance(source, VectorEnv):
            return across_processes(source)
        if self._made_env is None or self._made_env[0] != source or self._made_env[1].closed:
            self._made_env = source, across_processes(make_env(source, seed=self.config.seed))
        return self._made_env[1]

    def _use_env(self, env: VectorEnv, replay: Any) -> None:
        """Collect in ``env``; a new collector also needs new callbacks."""
        begins = self.run.use_env(env, replay)
        # Without evaluations no environments are made for them.
        evaluates = self._add_evaluation and bool(self.config.eval_interval)
        if begins or evaluates:
            given = [callback for callback in self._callbacks.callbacks if not isinstance(callback, EpisodesCallback)]
            given += default_evaluation(env, self.config.eval_episodes) if evaluates else []
            self._add_evaluation = self._add_evaluation and not evaluates
            self._callbacks = CallbackRunner([EpisodesCallback(self.run.collector), *given])

    def _total(self, total_steps: int | None) -> int:
        """Total number of updates, by the argument or by the config's ``env_steps`` or ``total_steps``."""
        if total_steps is None and self.run.collector is not None and self.config.env_steps:
            return self.run.updates_for(self.config.env_steps)
        total = self.config.total_steps if total_steps is None else total_steps
        return as_integer("total_steps", total)
