"""The training loop."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from worldloom.config import check
from worldloom.devices import resolve_device
from worldloom.envs import VectorEnv, is_env, make_env
from worldloom.errors import ConfigError, NonFiniteError
from worldloom.replay import ReplayBuffer
from worldloom.state import TrainState
from worldloom.training.callbacks import (
    CheckpointCallback,
    EpisodesCallback,
    EvalCallback,
    LoggingCallback,
    ProgressCallback,
    StepInfo,
)
from worldloom.training.callbacks.base import as_callback
from worldloom.training.checkpoint import Checkpointer
from worldloom.training.checkpoint_files import FORMAT, Snapshot, flatten_state
from worldloom.training.collect import Collector, OnlineFeed, Schedule, check_match, check_same_kind
from worldloom.training.config import TrainingConfig
from worldloom.training.evaluation import evaluate
from worldloom.training.feed import Chunk, OfflineFeed, Unwritten, Windows, below, copy_latents
from worldloom.training.hooks import Hooks, Look
from worldloom.training.host import on_host, root_key, versions, with_params
from worldloom.training.interrupts import Interrupts
from worldloom.training.metrics import History, Reading
from worldloom.training.step import compiled_update, copy

_log = logging.getLogger("worldloom")

_EPISODES = 10
"""Episodes of the evaluation that comes by default."""


class Trainer:
    """Trains a world model, with callbacks looking on.

    The model object keeps its own arrays while training runs and holds the trained weights afterwards, however it
    ended. Everything else that training changes is in :attr:`state`.

    Args:
      model: a world model of either family.
      config: how to train; None takes the defaults.
      callbacks: :class:`~worldloom.training.callbacks.Callback` objects, functions of a ``StepInfo``, or pairs
        ``(updates, function)``. None is a progress bar, a log on the console and, online, an evaluation of 10 episodes
        every ``eval_interval`` updates; nothing is written to disk unless a callback is given that does. An empty list
        is silent.

    Raises:
      DeviceError: ``config.device`` is a numbered device that is not there.
    """

    def __init__(self, model: Any, config: TrainingConfig | None = None, callbacks: Sequence[Any] | None = None):
        self.model, self.config = model, config or TrainingConfig()
        self.stop_reason: str | None = None
        self._device = resolve_device(self.config.device)
        # On a CPU, a call costs little beside an update, and a short one answers Ctrl-C sooner.
        self._capacity = self.config.updates_per_call or (1 if self._device.platform == "cpu" else 8)
        self._single = self._device.platform == "cpu" and _sees_images(model)
        if self._single and self._capacity > 1:
            _log.warning(
                "updates_per_call=%d is taken as 1: on a CPU, XLA computes gradients of convolutions a hundred times "
                "slower inside the loop that several updates in one call are.",
                self._capacity,
            )
            self._capacity = 1
        self._evaluates = callbacks is None
        callbacks = [ProgressCallback(), LoggingCallback()] if callbacks is None else callbacks
        self._hooks = Hooks([as_callback(callback) for callback in callbacks], self._hooks_config())
        self._run_id = uuid.uuid4().hex
        self._state: TrainState | None = None
        self._step = self._skipped = 0
        self._collector: Collector | None = None
        self._unwritten = Unwritten(self._capacity)
        self._made: tuple[Any, VectorEnv] | None = None

    @property
    def state(self) -> TrainState:
        """Step, weights, optimizer state and root key. Callbacks use ``StepInfo.read_state`` instead."""
        return self._running().replace(training=self.config)

    @property
    def step(self) -> int:
        """Updates done."""
        return self._step

    @property
    def replay(self) -> Any:
        """The buffer that online training collects into; None before."""
        return self._collector.replay if self._collector else None

    def train(
        self, source: Any, *, total_steps: int | None = None, resume: bool | str | Path = False, replay: Any = None
    ) -> TrainState:
        """Train until ``total_steps`` updates are done in all; a further call goes on from there.

        From an environment: act, store, and update as often as ``config.train_ratio`` says, after ``config.prefill``
        decision steps without updates. ``config.env_steps`` then sets the end, unless it is 0 or ``total_steps`` given.

        Args:
          source: recorded episodes, a :class:`~worldloom.replay.ReplayBuffer`; or environments: a
            :class:`~worldloom.envs.VectorEnv`, or what ``make_env`` makes one of (an id such as ``"Pendulum-v1"``, a
            function). They are reset when training begins, and yours to close. A further call goes on in the same
            episodes, unless somebody else moved the environments meanwhile.
          total_steps: updates in all, those of earlier calls and of a resumed run included; None takes the config's.
          resume: ``"auto"`` goes on from the newest checkpoint in the folder of the ``CheckpointCallback`` if there is
            one, True insists on one, a path names another folder of checkpoints or a single one. The run then equals
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
        if is_env(source):
            windows = self._open(self._env(source), replay)
        else:
            windows, self._collector = Windows(source, self.model, self.config), None
        self._unwritten.follow(windows.buffer)
        if resume:
            windows = self._resume(resume, windows)
        total = self._total(windows, total_steps)
        if self._step >= total:
            _log.warning("Nothing to train: step %d of total_steps=%d is done.", self._step, total)
            return self.state
        # Precision "auto" follows the default device, also where the update is traced.
        with jax.default_device(self._device), Interrupts() as interrupts:
            try:
                self._train(windows, total, interrupts)
            except NonFiniteError as error:
                raise NonFiniteError(f"{error} {self._way_out()}") from None
            finally:
                self._hooks.close()
                self._hand_over()
        interrupts.leave()
        return self.state

    def _env(self, source: Any) -> VectorEnv:
        """The environments meant by ``source``; what is made of an id is kept for the next call."""
        if isinstance(source, VectorEnv):
            return source
        if self._made is None or self._made[0] != source or self._made[1].closed:
            self._made = source, make_env(source, seed=self.config.seed)
        return self._made[1]

    def _open(self, env: VectorEnv, replay: Any) -> Windows:
        """Make ready to collect from ``env``, or to go on collecting from it."""
        config, model = self.model.config, self.model
        if self._collector is not None and self._collector.env is env and replay in (None, self._collector.replay):
            return Windows(self._collector.replay, model, self.config, empty=True)
        check_match(env, model)
        if replay is None:
            shapes = {"obs_shape": config.obs_shape, "action_dim": config.action_dim}
            replay = ReplayBuffer(self.config.replay_capacity, **shapes, action_type=env.action_type)
        replay.ensure_latents(model.algorithm.window(config, self.config).latents)
        windows = Windows(replay, model, self.config, empty=True)
        self._collector = Collector(env, replay, model, self.config, windows.latents, trained=self._step)
        given = [callback for callback in self._hooks.callbacks if not isinstance(callback, EpisodesCallback)]
        if self._evaluates:
            self._evaluates = False
            try:
                other = env.another(_EPISODES, env.seed + 1)
            except ConfigError as error:
                _log.warning("There will be no evaluation: %s", error)
            else:
                given.append(EvalCallback(other, episodes=_EPISODES, seed=env.seed + 1))
        self._hooks = Hooks([EpisodesCallback(self._collector), *given], self._hooks_config())
        return windows

    def _hooks_config(self) -> TrainingConfig:
        return self.config.replace(updates_per_call=self._capacity)

    def _schedule(self, windows: Windows) -> Schedule:
        return Schedule.of(self.config, windows.rows - windows.latents)

    def _total(self, windows: Windows, total_steps: int | None) -> int:
        """Updates in all."""
        total = self.config.total_steps if total_steps is None else total_steps
        check(isinstance(total, int) and total >= 1, f"total_steps must be an integer ≥ 1, not {total!r}.")
        if self._collector is None or total_steps is not None or not self.config.env_steps:
            return total
        decisions = self.config.env_steps // self._collector.env.action_repeat
        due = self._schedule(windows).due(decisions)
        check(
            due >= 1,
            f"env_steps={self.config.env_steps} are {decisions} decision steps, which end before the first update: "
            f"prefill={self.config.prefill}.",
        )
        return self._collector.trained + due

    def evaluate(self, buffer: Any, *, batches: int = 8, seed: int = 0) -> dict[str, float]:
        """Mean loss terms of the model on held-out data; see :func:`worldloom.training.evaluate`."""
        return evaluate(self.model, buffer, self.config, batches=batches, seed=seed)

    def _running(self) -> TrainState:
        """The state as the compiled update takes it."""
        if self._state is None:
            with jax.default_device(self._device):
                state = self.model.algorithm.init_state(self.model, self.config.of_update(), root_key(self.config.seed))
            self._state = jax.device_put(state, self._device)
        return self._state

    def _train(self, windows: Windows, total: int, interrupts: Interrupts) -> None:
        algorithm, hooks = self.model.algorithm, self._hooks
        update = compiled_update(
            algorithm.update, tuple(algorithm.LOSS_TERMS), self.config.skip_nonfinite, windows.latents, self._single
        )
        history: History | None = None
        guard = jax.device_put(update.fresh_guard(self._skipped), self._device)
        # The update consumes its state; the arrays that the model and others hold must outlive it.
        self._state = copy(self._running())

        def plan(step: int, most: int) -> Chunk:
            look = min(hooks.next_look(step) or total, total)
            # Calls end at multiples of the capacity, so that a resumed run groups its updates in the same way.
            end = min(look, step + most, (step // self._capacity + 1) * self._capacity)
            return Chunk(step, end - step, looks=end == look)

        def read_host() -> TrainState:
            if history is not None:
                history.sync()
            feed.settle()
            self._skipped = int(guard.skipped)
            return on_host(self.state)

        look = self._looker(windows, total, read_host)
        self._place_replay(windows)
        with self._feed(windows, total, plan) as feed:
            hooks.begin(self._step, look)
            while self._step < total and not hooks.stop_reason and not interrupts.received:
                taken = feed.take(self._step)
                if taken is None:
                    continue
                chunk, batches, row_ids = taken
                if history is None:
                    names = update.names(self._state, batches, windows.ring)
                    history = History(names, () if self.config.skip_nonfinite else update.guarded(names))
                    hooks.attach(history)
                self._state, guard, outcome = update(self._state, guard, batches, chunk.updates, windows.ring)
                feed.give_back(chunk, outcome, row_ids)
                history.add(self._step, chunk.updates, outcome.rows)
                self._step += chunk.updates
                if chunk.looks:
                    hooks.look(self._step, look)
            if history is not None:
                history.sync()
            feed.settle()
            self.stop_reason = hooks.stop_reason
            if self.stop_reason:
                _log.info("Training stopped at step %d. %s.", self._step, self.stop_reason)
            hooks.end(self._step, look)
        windows.write_back()
        self._skipped = int(guard.skipped)

    def _place_replay(self, windows: Windows) -> None:
        """Have rows kept on the device, if the config says so or they fit well."""
        storage, growing = self.config.replay_storage, self._collector is not None
        if storage == "auto":
            memory = self._device.memory_stats() if self._device.platform != "cpu" else None
            free = memory["bytes_limit"] - memory["bytes_in_use"] if memory and "bytes_limit" in memory else 0
            storage = "device" if windows.bytes_on_device(growing=growing) <= free / 2 else "host"
        if storage == "device":
            windows.hold_on(self._device, growing=growing)

    def _feed(self, windows: Windows, total: int, plan: Callable[[int, int], Chunk]) -> OfflineFeed | OnlineFeed:
        arguments = windows, self.config, self._device, self._capacity
        if self._collector is None:
            offline = lambda step: plan(step, self._capacity) if step < total else None  # noqa: E731
            return OfflineFeed(*arguments, offline, self._unwritten)
        return OnlineFeed(self._collector, self._schedule(windows), *arguments, plan, self._unwritten, self._running)

    def _looker(self, windows: Windows, total: int, read_host: Callable[[], TrainState]) -> Look:
        """What makes the record that a callback sees; its accessors work for as long as the loop waits."""

        def look(metrics: Reading, means: Reading, rate: Callable[[], float]) -> StepInfo:
            step = self._step

            def read_state() -> TrainState:
                if self._step != step:
                    raise RuntimeError(f"The state of step {step} is gone; read it while the callback is called.")
                return read_host()

            return StepInfo(
                step=step,
                env_steps=self._collector.env_steps if self._collector else 0,
                total_steps=total,
                metrics=metrics,
                means=means,
                measurements=dict(self._hooks.measurements),
                config=self.config,
                loss_terms=tuple(self.model.algorithm.LOSS_TERMS),
                replay_size=len(windows.buffer),
                run_id=self._run_id,
                measured=self._hooks.measured,
                updates_per_second=rate,
                read_state=read_state,
                model=lambda: with_params(self.model, read_state().params),
                snapshot=lambda: self._snapshot(read_state(), windows),
            )

        return look

    def _snapshot(self, state: TrainState, windows: Windows) -> Snapshot:
        for name, array in flatten_state(state).items():
            if name.startswith("params/") and not np.isfinite(array).all():
                raise NonFiniteError(f"Step {self._step}: the weights {name} are not finite and are not saved.")
        windows.write_back()
        record = {
            "format": FORMAT,
            "run_id": self._run_id,
            "step": self._step,
            "skipped": self._skipped,
            "replay_size": len(windows.buffer),
            "config": self.model.config.to_dict(),
            "training": self.config.to_dict(),
            "callbacks": self._hooks.state_dict(),
            "versions": versions(),
        }
        arrays = {f"fresh/{name}": value for name, value in self._unwritten.arrays().items()}
        if self._collector is not None:
            record["collector"], around = self._collector.state_dict()
            arrays |= {f"collector/{name}": value for name, value in around.items()}
        changed = self._collector is not None or windows.latents
        return Snapshot(state, record, arrays, windows.buffer if changed else None)

    def _resume(self, resume: bool | str | Path, windows: Windows) -> Windows:
        """Go back to a checkpoint; returns what to draw from, with all in it that online training had collected."""
        folder, step = self._place(resume)
        checkpoints = Checkpointer(folder)
        if resume == "auto" and not checkpoints.steps():
            return windows
        state, record, arrays, replay = checkpoints.restore(self.state, step)
        if (self._collector is None) != ("collector" not in record):
            kinds = ("recorded episodes", "environments")
            saved, given = kinds if self._collector else kinds[::-1]
            raise ConfigError(f"The run in {folder} was trained from {saved}; it cannot go on from {given}.")
        if self._collector is not None:
            check_same_kind(record["collector"].get("env", {}), self._collector.env)
            self._collector.replay.adopt(replay)
            self._collector.load_state_dict(record["collector"], below(arrays, "collector/"))
            windows = Windows(self._collector.replay, self.model, self.config, empty=True)
        elif record["replay_size"] != len(windows.buffer):
            _log.warning(
                "The run was saved with %d rows in replay, now there are %d: its batches will not be the same.",
                record["replay_size"],
                len(windows.buffer),
            )
        elif replay is not None:
            copy_latents(replay, windows.buffer)
        self._unwritten.load(below(arrays, "fresh/"))
        self._state = jax.device_put(state.replace(training=self.config.of_update()), self._device)
        self._step, self._skipped, self._run_id = record["step"], record["skipped"], record["run_id"]
        self._hooks.load_state_dict(record["callbacks"], self._step)
        self._hand_over()
        return windows

    def _place(self, resume: bool | str | Path) -> tuple[Path, int | None]:
        """Folder of checkpoints and, if one was named, the step."""
        if resume is not True and resume != "auto":
            path = Path(str(resume))
            single = (path / "run.json").exists() or (path / "manifest.json").exists()
            return (path.parent, int(path.name)) if single and path.name.isdecimal() else (path, None)
        for callback in self._hooks.callbacks:
            if isinstance(callback, CheckpointCallback):
                return callback.save_dir, None
        raise ConfigError(f"resume={resume!r} needs a CheckpointCallback, or give the folder: resume='./checkpoints'.")

    def _hand_over(self) -> None:
        """Give the model the weights of the state. A call that failed amid an update has used the state up."""
        if self._state is None or self._state.step.is_deleted():
            self._state = None
            return
        self._step = int(self._state.step)
        self.model.load_params(self._state.params)

    def _way_out(self) -> str:
        saved = [c.latest for c in self._hooks.callbacks if isinstance(c, CheckpointCallback)]
        kept = next((f"The last good checkpoint is {path}." for path in saved if path), "No checkpoint was saved.")
        return (
            f"{kept} The model holds the weights before it. Look at the data of that step, lower learning_rate or "
            "grad_clip, or set skip_nonfinite=True to leave such updates out."
        )


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


def _sees_images(model: Any) -> bool:
    shape = getattr(model.config, "obs_shape", ())
    return any(len(each) == 3 for each in (shape.values() if isinstance(shape, Mapping) else [shape]))
