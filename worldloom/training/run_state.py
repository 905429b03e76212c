"""One training run as an object: its state, its data, its counters, and how it is saved and restored."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from worldloom.algorithm import TrainState
from worldloom.config import check
from worldloom.devices import resolve_device
from worldloom.distributed import is_primary
from worldloom.envs import EnvSpaces, VectorEnv
from worldloom.errors import ConfigError, NonFiniteError
from worldloom.families import class_name
from worldloom.replay import ReplayBuffer
from worldloom.sharding import ActingState, Placement
from worldloom.training import run_info, update_loop
from worldloom.training.batches import BatchSource, UpdateChunk
from worldloom.training.checkpoint_files import FORMAT, NEW_OPTIMIZER, Snapshot, flatten_state
from worldloom.training.collector import Collector, check_env_fits
from worldloom.training.config import TrainingConfig
from worldloom.training.env_identity import check_same_env
from worldloom.training.metrics import MetricsStream
from worldloom.training.mixed_replay import check_same_data, data_changes, data_identity, mix_data
from worldloom.training.sampler import SequenceSampler
from worldloom.training.train_ratio import TrainRatio
from worldloom.training.update_loop import CompiledUpdate, Learner, NonFiniteGuard, UpdateOutput
from worldloom.training.writeback import LatentWriteback, copy_latents, strip_prefix

_log = logging.getLogger("worldloom")

_OF_RATIO = ("prefill", "prefill_updates", "train_ratio", "batch_size", "sequence_length")
"""Those that say when updates are due."""


class Run:
    """Everything that changes while a model is trained; :func:`worldloom.training.fit.fit` loops over it.

    Args:
      model: the world model; it keeps its own arrays until :meth:`sync_model`.
      config: the training config.

    Attributes:
      step: updates done.
      learner: weights, optimizer state and non-finite guard, on the device; None before the first use.
      sampler: samples batches from replay or from recorded episodes.
      collector: steps the environments; None offline.
      data: recorded episodes that online batches take a share from, see ``offline_then_online``; None for none.
      writeback: writes fresh latents back to replay.
      metrics: queue of metrics that the device is still computing.
      total_steps: updates at which the current call of ``train`` ends.
      capacity: K, the maximum number of updates per compiled call.
      placement: where weights and batches are: on one device, or on a mesh.
      unrolled: whether a compiled call does one update without a loop; see ``needs_unrolled_updates``.

    Raises:
      DeviceError: ``config.device`` is a numbered device that does not exist.
      ConfigError: training would ignore a change of the model, see ``WorldModel.check_trainable``.
    """

    def __init__(self, model: Any, config: TrainingConfig):
        run_info.check_is_model(model)
        self.model, self.config = model, config
        self.device = resolve_device(config.device)
        self.placement = Placement.of(config.mesh, self.device)
        self.placement.check_batch(config.batch_size, config.microbatches)
        model.check_trainable(self.device)
        run_info.check_latents(model, config)
        self.capacity, self.unrolled = update_loop.call_capacity(model, config, self.device)
        self.run_id = uuid.uuid4().hex
        self.step = self.total_steps = self._skipped = 0
        self.learner: Learner | None = None
        self.sampler: SequenceSampler | None = None
        self.collector: Collector | None = None
        self.data: Any = None
        self.writeback = LatentWriteback(self.capacity)
        self.metrics = MetricsStream()
        self._update: CompiledUpdate | None = None
        self._collected: TrainState | None = None

    @property
    def loss_terms(self) -> tuple[str, ...]:
        """Names of the loss terms: the algorithm's, followed by those that the model's class adds."""
        return tuple(dict.fromkeys((*self.model.algorithm.loss_terms, *type(self.model).loss_terms)))

    @property
    def state(self) -> TrainState:
        """The newest state, possibly still being computed."""
        if self.learner is None:
            with jax.default_device(self.device):
                training = self.config.of_update()
                state = self.model.algorithm.init_state(self.model, training, run_info.root_key(self.config.seed))
            self._set_state(state)
        assert self.learner is not None
        return self.learner.state

    @property
    def env_steps(self) -> int:
        """Environment steps taken; 0 offline."""
        return self.collector.env_steps if self.collector else 0

    @property
    def ratio(self) -> TrainRatio:
        """Determines when updates are due in online training."""
        assert self.sampler is not None
        return TrainRatio.of(self.config, self.sampler.rows_under_gradient)

    # ---- sources of data --------------------------------------------------------------------------------------------

    def use_data(self, buffer: Any) -> None:
        """Train on recorded episodes."""
        self.sampler, self.collector = SequenceSampler(buffer, self.model, self.config), None
        if self.config.latent_dtype != "float32" and not self.sampler.uses_latents:
            _log.warning("latent_dtype='%s' has no effect here: the data store no latents.", self.config.latent_dtype)
        self.writeback.switch_buffer(buffer)

    def use_env(self, env: VectorEnv, replay: Any = None) -> bool:
        """Train on rows collected in ``env``; returns True for a new collector, False if the current one continues.

        ``replay`` is the buffer to collect into; None means the current collector's buffer, or a new one.
        """
        continues = self.collector is not None and self.collector.env is env
        if self.collector is not None and not continues and replay is None and len(self.collector.replay):
            _log.warning(
                "These are other environments than before: replay begins empty, without the %s rows collected so far. "
                "Give replay=trainer.replay to keep them.",
                f"{len(self.collector.replay):,}",
            )
        if self.collector is None or not continues or replay not in (None, self.collector.replay):
            # Other environments or another buffer: prepare the buffer for a new collector.
            check_env_fits(env, self.model)
            config = self.model.config
            if replay is None:
                shapes = {"obs_shape": config.obs_shape, "action_dim": config.action_dim}
                replay = ReplayBuffer(self.config.replay_capacity, **shapes, action_type=env.action_type)
            self.model.remember_env_spaces(EnvSpaces.underneath(env).to_json())
            replay.ensure_latents(self.model.algorithm.replay_spec(config, self.config).latents)
            continues = False
        else:
            replay = self.collector.replay
        self.sampler = self._online_sampler(replay)
        if not continues:
            store_latents = self.sampler.uses_latents
            self.collector = Collector(
                env,
                replay,
                self.model,
                self.config,
                store_latents=store_latents,
                updates_before=self.step,
                former=self.collector,
            )
        self.writeback.switch_buffer(self.sampler.buffer)
        return not continues

    def _online_sampler(self, replay: Any) -> SequenceSampler:
        return SequenceSampler(mix_data(replay, self.data, self.config), self.model, self.config, allow_empty=True)

    def updates_for(self, env_steps: int) -> int:
        """Total number of updates due after ``env_steps`` environment steps. Raises ``ConfigError`` if it is 0."""
        assert self.collector is not None
        decisions = self.collector.decisions_at(env_steps)
        due = self.ratio.updates(decisions)
        check(
            due >= 1,
            f"env_steps={env_steps} are {decisions} decision steps, which end before the first update: "
            f"prefill={self.config.prefill}. Take more steps (--steps) or a smaller prefill (--prefill).",
        )
        return self.collector.updates_before + due

    # ---- parts of the loop ------------------------------------------------------------------------------------------

    def begin(self, total_steps: int) -> CompiledUpdate:
        """Prepare for the updates up to ``total_steps``; returns the compiled update."""
        assert self.sampler is not None
        self.total_steps = total_steps
        # Updates donate the state, so copy the arrays that the model and callers still hold.
        self._set_state(update_loop.copy(self.state))
        self._update = update_loop.compiled_update(
            self.model.algorithm.make_update,
            self.model.config,
            self.config.of_update(total_steps),
            self.model.__class__,
            self.loss_terms,
            self.config.skip_nonfinite,
            self.sampler.uses_latents,
            self.unrolled,
            self.model.version(),
            *([self.placement] if self.placement.mesh else []),  # Runs on one device share programs, whichever it is.
        )
        return self._update

    @contextmanager
    def batches(
        self,
        total_steps: int,
        next_callback_step: Callable[[int], int | None],
        stop_requested: Callable[[], bool],
    ) -> Iterator[Iterator[UpdateChunk]]:
        """Context manager of the iterator over the chunks up to ``total_steps`` updates; see :class:`BatchSource`."""
        self.begin(total_steps)
        assert self.sampler is not None
        if self.placement.mesh is None:
            growing = self.collector is not None
            self.sampler.choose_storage(self.config.replay_storage, self.device, growing=growing)
        acting = ActingState(self.placement)
        source = BatchSource(
            self.sampler,
            self.writeback,
            seed=self.config.seed,
            placement=self.placement,
            windows=self.placement.windows(self.config.batch_size, self.config.microbatches),
            capacity=self.capacity,
            collector=self.collector,
            ratio=self.ratio if self.collector else None,
            read_state=lambda: acting(self.state),
        )
        with source:
            yield source.chunks(self.step, total_steps, next_callback_step, stop_requested)
        self.sampler.write_back()
        self._skipped = int(self._guard.skipped)

    def update(self, chunk: UpdateChunk) -> UpdateOutput:
        """Start the updates of a chunk on the device and replace :attr:`learner`, whose state is donated."""
        assert self._update is not None
        assert self.learner is not None
        assert self.sampler is not None
        if not self.metrics.names:
            with self.placement.context():
                names = self._update.metric_names(self.learner.state, chunk.batches, self.sampler.ring)
            guarded = () if self.config.skip_nonfinite else self._update.guarded(names)
            self.metrics.open(names, guarded)
        self.learner, output = self._update(self.learner, chunk.batches, chunk.updates, self.sampler.ring)
        latents = self.placement.in_order(output.latents, self.config.batch_size, self.config.microbatches)
        return output._replace(latents=latents)

    def sync(self) -> None:
        """Wait for all updates and writes in flight. Raises ``NonFiniteError`` naming step and term."""
        self.metrics.sync()
        self.writeback.flush()

    def sync_model(self) -> None:
        """Load the newest weights into the model."""
        # If a compiled call failed, its donated state is gone; the model keeps its weights.
        if self.learner is None or self.learner.state.step.is_deleted():
            self.learner = None
            return
        self.step = int(self.learner.state.step)
        self.model.load_params(self.placement.to_device(self.learner.state.params))

    # ---- reading, saving, restoring ---------------------------------------------------------------------------------

    def read_state(self) -> TrainState:
        """A copy of the state on the host, after all updates in flight.

        Where other processes hold a part of the weights, it is the copy that :meth:`collect_state` made.
        """
        self._finish_updates()
        collected = self._collected
        return (
            collected
            if collected and int(collected.step) == self.step
            else run_info.on_host(self.state, self.placement)
        )

    def collect_state(self) -> None:
        """Before callbacks: collect weights that are divided over processes, which all processes must do at once.

        The optimizer's state, which only checkpoints need, stays divided; it is () in the copy.
        """
        if self.placement.spans_processes and self.config.divides_weights:
            self._collected = run_info.on_host(self.state.replace(opt_state=()), self.placement)

    def state_to_save(self) -> TrainState:
        """What a checkpoint holds, after all updates in flight: a copy on the host.

        Of several processes, weights and optimizer stay where they are: each writes its part before the next update.
        """
        if not self.placement.spans_processes:
            return self.read_state()
        self._finish_updates()
        key = update_loop.copy(self.placement.to_device(self.state.key))
        return self.state.replace(step=np.array(self.state.step), key=key)

    def _finish_updates(self) -> None:
        self.sync()
        self._skipped = int(self._guard.skipped)

    def identity(self) -> dict[str, Any]:
        """Both configs and the model's class, which a checkpoint must match to be resumed."""
        return {
            "config": self.model.config.to_dict(),
            "training": self.config.to_dict(),
            "model_class": class_name(type(self.model)),
        }

    def snapshot(self, state: TrainState, callbacks: Mapping[str, Any]) -> Snapshot:
        """Everything that a resumed run needs, at this step.

        Args:
          state: from :meth:`state_to_save`.
          callbacks: ``CallbackRunner.state_dict()``.

        Raises ``NonFiniteError`` if a weight is not finite, because such a checkpoint would be useless. Of several
        processes, each sees a part only: they raise it together when it is written, and all but the first have nothing
        else to save.
        """
        assert self.sampler is not None
        if not is_primary():
            return Snapshot(state, {"step": self.step})
        for name, array in flatten_state(state).items():
            seen = name.startswith("params/") and not self.placement.spans_processes
            if seen and not np.isfinite(array).all():
                raise NonFiniteError(f"Step {self.step}: the weights {name} are not finite and are not saved.")
        self.sampler.write_back()
        record = {
            "format": FORMAT,
            "run_id": self.run_id,
            "step": self.step,
            "skipped": self._skipped,
            "replay_size": len(self.sampler.buffer),
            "data": data_identity(self.data),
            "processes": jax.process_count(),
            "latent_group": self.writeback.group if self.sampler.uses_latents else None,
            **self.identity(),
            "callbacks": dict(callbacks),
            "versions": run_info.versions(),
        }
        arrays = {f"fresh/{name}": value for name, value in self.writeback.state_arrays().items()}
        if self.collector is not None:
            record["collector"], collected = self.collector.state_dict()
            arrays |= {f"collector/{name}": value for name, value in collected.items()}
        replay = self.collector.replay if self.collector else self.sampler.buffer if self.sampler.uses_latents else None
        return Snapshot(state, record, arrays, replay)

    def restore(self, snapshot: Snapshot, folder: Path, *, exact: bool = True) -> list[str]:
        """Restore a snapshot, including replay content that the run collected; ``folder`` is named in messages.

        With ``exact=False``, what does not fit is left out, and named in the list that is returned.

        Raises ``ConfigError`` if the snapshot's run was offline and this one is online, or the reverse, if ``exact``.
        """
        changes = self._restore_data(snapshot, folder) if exact else self._take_along_data(snapshot)
        record = snapshot.record
        self.step, self._skipped, self.run_id = record["step"], record["skipped"], record["run_id"]
        self._set_state(snapshot.state)
        self.sync_model()
        return changes

    def _restore_data(self, snapshot: Snapshot, folder: Path) -> list[str]:
        """Online: rows, environments and pending actions. Offline: only latents, if the episodes are the same."""
        _, record, arrays, replay = snapshot
        assert self.sampler is not None
        saved, now = record["training"], self.config.to_dict()
        if now["lr_schedule"] != "constant" and any(saved[end] != now[end] for end in ("total_steps", "env_steps")):
            _log.warning("The run now ends elsewhere: its learning rate falls to 0 there (lr_schedule).")
        if (self.collector is None) != ("collector" not in record):
            kinds = ("recorded episodes", "environments")
            saved, given = kinds if self.collector else kinds[::-1]
            raise ConfigError(f"The run in {folder} was trained from {saved}; it cannot continue from {given}.")
        if self.collector is not None:
            check_same_env(record["collector"].get("env", {}), self.collector.env)
            check_same_data(record.get("data"), self.data)
            self.collector.replay.adopt(replay)
            self.collector.load_state_dict(record["collector"], strip_prefix(arrays, "collector/"))
            self.sampler = self._online_sampler(self.collector.replay)
        elif record["replay_size"] != len(self.sampler.buffer):
            _log.warning(
                "The run was saved with %d rows in replay, now there are %d: its batches will not be the same.",
                record["replay_size"],
                len(self.sampler.buffer),
            )
        elif replay is not None:
            copy_latents(replay, self.sampler.buffer)
        self.writeback.load_state_arrays(strip_prefix(arrays, "fresh/"))
        return []

    def _take_along_data(self, snapshot: Snapshot) -> list[str]:
        """The same as far as it fits; returns what is different."""
        _, record, arrays, replay = snapshot
        assert self.sampler is not None
        changes = ["the optimizer begins with an empty state"] if record.get(NEW_OPTIMIZER) else []
        online = "collector" in record
        if self.collector is None:
            if online:
                return [*changes, "recorded episodes in place of environments and what was collected there"]
            if record["replay_size"] != len(self.sampler.buffer):
                return [*changes, f"{record['replay_size']} → {len(self.sampler.buffer)} rows of data"]
            if replay is not None:
                copy_latents(replay, self.sampler.buffer)
        elif not online:
            self.collector.count_from(record["step"], self.ratio)
            return [*changes, "environments in place of recorded episodes, with an empty replay"]
        else:
            changes += self.collector.take_along(record["collector"], strip_prefix(arrays, "collector/"), replay)
            changes += data_changes(record.get("data"), self.data)
            self.sampler = self._online_sampler(self.collector.replay)
            saved = record.get("training") or {}
            if any(saved.get(name) != getattr(self.config, name) for name in _OF_RATIO):
                self.collector.count_from(record["step"], self.ratio)
        self.writeback.load_state_arrays(strip_prefix(arrays, "fresh/"))
        return changes

    def reconfigure(self, config: TrainingConfig) -> None:
        """Switch to ``config``.

        Raises ``ConfigError`` for a change that is impossible within a run: of seed, device, updates per call, the size
        of an existing replay buffer, or the structure of the optimizer's state.
        """
        check(isinstance(config, TrainingConfig), f"config must be a TrainingConfig, not a {type(config).__name__}.")
        run_info.check_latents(self.model, config)
        begun = self.learner is not None or self.step > 0
        run_info.check_fixed(self.config, config, begun=begun, online=self.collector is not None)
        if not begun:
            # Nothing depends on the old config yet: take what the constructor derives from the new one.
            new_run = Run(self.model, config)
            self.device, self.capacity, self.unrolled = new_run.device, new_run.capacity, new_run.unrolled
            self.placement = new_run.placement
            self.writeback = new_run.writeback
        elif self.learner is not None:
            run_info.check_optimizer(self.model, config, self.state)
        self.placement.check_batch(config.batch_size, config.microbatches)
        ratio = self.ratio if self.collector is not None else None
        self.config = config
        if self.collector is not None:
            self.sampler = self._online_sampler(self.collector.replay)
            self.collector.use_config(config)
            if self.ratio != ratio:
                self.collector.count_from(self.step, self.ratio)

    def new_metrics(self) -> MetricsStream:
        """Replace :attr:`metrics` by an empty stream, for one call of ``train``."""
        self.metrics = MetricsStream()
        return self.metrics

    @property
    def _guard(self) -> NonFiniteGuard:
        assert self.learner is not None
        return self.learner.guard

    def _set_state(self, state: TrainState) -> None:
        guard = NonFiniteGuard.create(self._skipped)
        self.learner = Learner(self.placement.put_state(state), self.placement.put_state(guard))
