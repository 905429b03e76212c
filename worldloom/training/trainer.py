"""The trainer: a run, its callbacks, and where it reads and saves."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from worldloom.algorithm import TrainState
from worldloom.config import check
from worldloom.envs import VectorEnv, is_env, make_env
from worldloom.errors import NonFiniteError
from worldloom.training.callbacks import CheckpointCallback, EpisodesCallback, LoggingCallback, ProgressCallback
from worldloom.training.callbacks.base import as_callback
from worldloom.training.callbacks.checkpointing import recovery_hint
from worldloom.training.callbacks.evaluation import default_evaluation
from worldloom.training.callbacks.runner import CallbackRunner
from worldloom.training.checkpoint import Checkpointer, locate_checkpoint
from worldloom.training.config import TrainingConfig
from worldloom.training.evaluation import evaluate
from worldloom.training.fit import fit
from worldloom.training.interrupts import Interrupts
from worldloom.training.run_state import Run

_log = logging.getLogger("worldloom")


class Trainer:
    """Trains a world model; callbacks observe it. The loop itself is :func:`worldloom.training.fit.fit`.

    The model object keeps its own arrays while training runs and holds the trained weights afterwards, however it
    ended. Everything else that training changes is in :attr:`state`.

    Args:
      model: a world model of any family, or of a subclass.
      config: how to train; None takes the defaults.
      callbacks: :class:`~worldloom.training.callbacks.Callback` objects, functions of a ``StepInfo``, or pairs
        ``(updates, function)``. None is a progress bar, a log on the console and, online, an evaluation of 10 episodes
        every ``eval_interval`` updates; nothing is written to disk unless a callback is given that does. An empty list
        is silent.

    Raises:
      DeviceError: ``config.device`` is a numbered device that is not there.
      ConfigError: the model was changed in a way that training would not see.
      TypeError: a callback is none, or has a method that is never called.
    """

    def __init__(self, model: Any, config: TrainingConfig | None = None, callbacks: Sequence[Any] | None = None):
        self.run = Run(model, config or TrainingConfig())
        self._adds_evaluation = callbacks is None
        callbacks = [ProgressCallback(), LoggingCallback()] if callbacks is None else callbacks
        self._callbacks = CallbackRunner([as_callback(callback) for callback in callbacks])
        self._made: tuple[Any, VectorEnv] | None = None

    @property
    def model(self) -> Any:
        """The model being trained."""
        return self.run.model

    @property
    def config(self) -> TrainingConfig:
        """The training config. Assigning another takes effect at the next call of :meth:`train`, or raises
        ``ConfigError`` for what cannot change within a run."""
        return self.run.config

    @config.setter
    def config(self, config: TrainingConfig) -> None:
        self.run.reconfigure(config)

    @property
    def state(self) -> TrainState:
        """Step, weights, optimizer state and root key. Callbacks use ``StepInfo.read_state`` instead."""
        return self.run.state

    @property
    def step(self) -> int:
        """Updates done."""
        return self.run.step

    @property
    def stop_reason(self) -> str | None:
        """Why a callback stopped the last call of :meth:`train`; None if none did."""
        return self._callbacks.stop_reason

    @property
    def replay(self) -> Any:
        """The buffer that online training collects into; None before."""
        return self.run.collector.replay if self.run.collector else None

    def train(
        self, source: Any, *, total_steps: int | None = None, resume: bool | str | Path = False, replay: Any = None
    ) -> TrainState:
        """Train until ``total_steps`` updates are done in all; a further call continues from there.

        From an environment: act, store, and update as often as ``config.train_ratio`` says, after ``config.prefill``
        decision steps without updates. ``config.env_steps`` then sets the end, unless it is 0 or ``total_steps`` given.

        Args:
          source: recorded episodes, a :class:`~worldloom.replay.ReplayBuffer`; or environments: a
            :class:`~worldloom.envs.VectorEnv`, or what ``make_env`` makes one of (an id such as ``"Pendulum-v1"``, a
            function). They are reset when training begins, and yours to close. A further call continues in the same
            episodes, unless the environments were reset or stepped meanwhile.
          total_steps: updates in all, those of earlier calls and of a resumed run included; None takes the config's.
          resume: ``"auto"`` continues from the newest checkpoint in the folder of the ``CheckpointCallback`` if there
            is one, True requires one, a path names another folder of checkpoints or a single one. The run then equals
            one that was never stopped, bit for bit, if the data (the environments) are the same.
          replay: buffer to collect into, perhaps with episodes in it; None makes one of ``config.replay_capacity``.

        Returns:
          The state after training, also in :attr:`state`.

        Raises:
          DataError: the buffer is empty, has other shapes than the model, or no episode is as long as a window.
          CheckpointError: there is nothing (readable) to resume from, or nowhere to save.
          ConfigError: the checkpoint belongs to a run with another config; environment and model do not fit.
          NonFiniteError: a loss or gradient became NaN or infinite. State and model are as before that update.
          KeyboardInterrupt, SystemExit: on Ctrl-C or SIGTERM, after callbacks have saved and closed their files.
        """
        run = self.run
        if is_env(source):
            self._use_env(self._env(source), replay)
        else:
            run.use_data(source)
        if resume:
            self._resume(resume)
        total = self._total(total_steps)
        if run.step >= total:
            _log.warning("Nothing to train: step %d of total_steps=%d is done.", run.step, total)
            return run.state
        # Intervals that follow the calls follow their real size; precision "auto" follows the default device.
        self._callbacks.start(run.config.replace(updates_per_call=run.capacity), run.new_metrics())
        with jax.default_device(run.device), Interrupts() as interrupts:
            try:
                fit(run, total, self._callbacks, interrupts)
            except NonFiniteError as error:
                raise NonFiniteError(f"{error} {recovery_hint(self._callbacks.callbacks)}") from None
            finally:
                self._callbacks.close()
                run.sync_model()
        interrupts.leave()
        return run.state

    def evaluate(self, buffer: Any, *, batches: int = 8, seed: int = 0) -> dict[str, float]:
        """Mean loss terms of the model on held-out data; see :func:`worldloom.training.evaluate`."""
        return evaluate(self.model, buffer, self.config, batches=batches, seed=seed)

    def _env(self, source: Any) -> VectorEnv:
        """The environments meant by ``source``; those made from an id are kept for the next call."""
        if isinstance(source, VectorEnv):
            return source
        if self._made is None or self._made[0] != source or self._made[1].closed:
            self._made = source, make_env(source, seed=self.config.seed)
        return self._made[1]

    def _use_env(self, env: VectorEnv, replay: Any) -> None:
        """Collect in ``env``, with the callbacks that belong to a new collector."""
        if not self.run.use_env(env, replay):
            return
        given = [callback for callback in self._callbacks.callbacks if not isinstance(callback, EpisodesCallback)]
        if self._adds_evaluation:
            self._adds_evaluation = False
            given += default_evaluation(env)
        self._callbacks = CallbackRunner([EpisodesCallback(self.run.collector), *given])

    def _total(self, total_steps: int | None) -> int:
        """Updates in all."""
        total = self.config.total_steps if total_steps is None else total_steps
        check(isinstance(total, int) and total >= 1, f"total_steps must be an integer ≥ 1, not {total!r}.")
        if self.run.collector is None or total_steps is not None or not self.config.env_steps:
            return total
        return self.run.updates_for(self.config.env_steps)

    def _resume(self, resume: bool | str | Path) -> None:
        save_dirs = [c.save_dir for c in self._callbacks.callbacks if isinstance(c, CheckpointCallback)]
        folder, step = locate_checkpoint(resume, next(iter(save_dirs), None))
        checkpoints = Checkpointer(folder)
        if resume == "auto" and not checkpoints.steps():
            return
        snapshot = checkpoints.restore(self.run.state, self.run.identity(), step)
        self.run.restore(snapshot, folder)
        self._callbacks.load_state_dict(snapshot.record["callbacks"], self.run.step)


def train(
    model: Any,
    buffer: Any,
    config: TrainingConfig | None = None,
    *,
    callbacks: Sequence[Any] | None = None,
    resume: bool | str | Path = False,
    **overrides: Any,
) -> TrainState:
    """Train ``model`` on ``buffer``: ``train(model, buffer, total_steps=1000, batch_size=8)``.

    The model holds the trained weights afterwards. Arguments, result and errors are those of :class:`Trainer` and
    :meth:`Trainer.train`; ``overrides`` are fields of ``config`` to change.
    """
    trainer = Trainer(model, (config or TrainingConfig()).replace(**overrides), callbacks)
    return trainer.train(buffer, resume=resume)
