"""Settings of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from worldloom.config import BaseConfig, Between, FrozenMapping, Ge, Gt, Lt, OneOf, check, config_dataclass
from worldloom.devices import check_device_name
from worldloom.sharding import check_mesh


@config_dataclass
class TrainingConfig(BaseConfig):
    """Length, batches, optimizer and schedule of a training run. Steps are optimizer updates.

    ``learning_rate``, ``warmup_steps``, ``lr_schedule``, ``weight_decay`` and ``grad_clip`` apply to the optimizer of
    either family; its other constants (AGC, epsilon, parameter groups) belong to the model's config.

    Raises:
      ConfigError: a value is of another type than its field or out of range; ``UnknownFieldError`` for a field that
        does not exist.
    """

    total_steps: Annotated[int, Ge(1)] = 50_000
    """Total number of updates."""
    batch_size: Annotated[int, Ge(1)] = 16
    """Windows per update."""
    sequence_length: Annotated[int, Ge(1)] = 50
    """Rows per window, all of which gradients flow through."""
    learning_rate: Annotated[float, Gt(0)] = 3e-4
    """Step size after warm-up; the reference programs use 4e-5 (DreamerV3) and 3e-4 (TD-MPC2)."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay of kernels, multiplied by the learning rate; 0 is off."""
    grad_clip: Annotated[float, Ge(0)] = 100.0
    """Largest global gradient norm; 0 is off. DreamerV3's adaptive clipping is ``agc`` in its own config."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Updates over which the learning rate rises linearly from 0."""
    lr_schedule: Annotated[str, OneOf("constant", "linear", "cosine")] = "constant"
    """Course of the learning rate after warm-up: ``linear`` and ``cosine`` fall to 0 at the end of the run."""
    log_interval: Annotated[int, Ge(1)] = 1_000
    """Updates between two log records."""
    eval_interval: Annotated[int, Ge(0)] = 5_000
    """Updates between two evaluations; 0 is never."""
    eval_episodes: Annotated[int, Ge(1)] = 10
    """Episodes of an evaluation in environments."""
    eval_at_start: bool = False
    """Whether a run folder's evaluation also measures the untrained weights, at step 0."""
    eval_at_end: bool = True
    """Whether a run folder's evaluation also measures the final weights."""
    eval_greedy: bool | None = None
    """Whether an evaluation also plays as many episodes in which every draw takes its mode (``eval/greedy_return``);
    None: if the family's evaluation policy samples its actions (DreamerV3)."""
    save_interval: Annotated[int, Ge(0)] = 10_000
    """Updates between two checkpoints; 0 saves only at the end."""
    device: str = "cuda"
    """``auto cpu cuda gpu tpu`` or numbered (``cuda:1``); ``cuda`` without a GPU trains on what JAX has."""
    mesh: Mapping[str, int] = FrozenMapping({})
    """Devices that an update is divided over: ``{"data": 4}`` divides its windows, ``{"fsdp": 4}`` also weights and
    optimizer state, ``{"data": 2, "fsdp": 4}`` does both; -1 is all devices that are left. Empty: one device. In
    ``train_many``, ``{"data": 4}`` divides the members."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 42
    """Seed of all randomness of the run: batches, sampling, dropout."""
    env_steps: Annotated[int, Ge(0)] = 0
    """Total environment steps, counting action repeat, at which online training ends, with the last update that is due
    by then; 0: ``total_steps`` decides."""
    prefill: Annotated[int, Ge(1)] = 1_000
    """Decision steps before the first online update: TD-MPC2 takes random actions, DreamerV3 its initial policy's."""
    prefill_policy: Annotated[str, OneOf("auto", "random", "initial", "correlated")] = "auto"
    """Actions of the prefill: uniformly ``random``; ``correlated``: random, but kept for ten steps on average, so that
    inert bodies move; those of the ``initial``, untrained policy; ``auto``: the family's choice."""
    prefill_updates: Annotated[int, Ge(0)] = 0
    """Updates done at once when the prefill is complete; the TD-MPC2 reference does as many as prefill steps."""
    train_ratio: Annotated[float, Ge(0)] = 0.0
    """Rows replayed per decision step, of which an update replays ``batch_size`` × ``sequence_length`` (TD-MPC2:
    rows of its window); 0 is one update per decision step (no updates at all: ``training.collect``)."""
    replay_capacity: Annotated[int, Ge(1)] = 1_000_000
    """Capacity of the replay buffer of online training, in rows; ignored if you pass a buffer."""
    offline_updates: Annotated[int, Ge(0)] = 0
    """With recorded data and environments: updates on the data before the first step in the environments."""
    mix: Annotated[float, Between(0, 1)] = 0.5
    """Share of the windows of each online batch that come from the recorded data, if there are any."""
    mix_end: Annotated[float | None, Between(0, 1)] = None
    """Share that ``mix`` changes to, linearly over ``mix_updates`` updates; None keeps it."""
    mix_updates: Annotated[int, Ge(1)] = 10_000
    """Online updates over which the share changes to ``mix_end``."""
    updates_per_call: Annotated[int, Between(0, 10_000)] = 0
    """Maximum number of updates per compiled call, which holds as many batches on the device; 0 is 1 on a CPU and 8
    elsewhere. Image models do one on a CPU, where convolutions are slow in loops. Results do not depend on it,
    unless the family stores latents (DreamerV3): batches see those of earlier groups of so many updates. A run that is
    resumed keeps its groups."""
    microbatches: Annotated[int, Ge(1)] = 1
    """Number of parts of a batch whose gradients are accumulated before one optimizer step. Gradients are those of the
    whole batch, activation memory is that of ``batch_size / microbatches`` windows. Divides ``batch_size``."""
    remat: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, more time."""
    replay_storage: Annotated[str, OneOf("auto", "host", "device")] = "auto"
    """Where batches are assembled. ``host``: in host memory, then copied to the device. ``device``: each row is copied
    to the device once, which needs memory for ``replay_capacity`` rows (for recorded data: for its rows). ``auto``: on
    a GPU or TPU if the rows need at most half of its free memory. Batches are the same."""
    latent_dtype: Annotated[str, OneOf("float32", "bfloat16")] = "float32"
    """Precision of the stored latents that windows start from. ``bfloat16`` halves their memory on a device and rounds
    them to 8 significant bits (by 0.4 % at most; one-hot draws exactly), wherever replay is kept: results do not depend
    on that. On the host, and in checkpoints, they are float32. For families that store latents (DreamerV3)."""
    loop: Annotated[str, OneOf("auto", "host", "device")] = "auto"
    """Where the loop of online training in JAX environments runs. ``device``: act, step, store, draw and update in one
    compiled program, replay in the device's memory. ``host``: as in any other environment. ``auto``: on the device
    wherever that is possible. Rows, batches and draws are the same."""
    max_episode_steps: Annotated[int, Ge(1)] = 27_000
    """Decision steps at which an episode of an evaluation is cut, and up to which a resumed run replays an episode in
    progress, if the environment has no time limit of its own."""
    skip_nonfinite: bool = False
    """Skip and count updates whose loss or gradient is NaN or infinite, instead of stopping."""

    def __post_init__(self) -> None:
        check(
            self.batch_size % self.microbatches == 0,
            f"microbatches={self.microbatches} must divide batch_size={self.batch_size}.",
        )
        check(
            self.batch_size * self.sequence_length < 2**31,
            f"batch_size={self.batch_size} × sequence_length={self.sequence_length} rows are too many for one batch.",
        )
        check_device_name(self.device)
        check_mesh(self.mesh)
        check(
            not self.mesh or ":" not in self.device,
            f"device='{self.device}' is one device, mesh={dict(self.mesh)} takes several; name the platform alone.",
        )
        check(
            not self.mesh or self.replay_storage != "device",
            f"replay_storage='device' keeps replay on one device; with mesh={dict(self.mesh)} it stays on the host.",
        )

    @property
    def divides_weights(self) -> bool:
        """Whether :attr:`mesh` divides weights and optimizer state."""
        return self.mesh.get("fsdp", 1) != 1

    def of_update(self, total_steps: int | None = None) -> TrainingConfig:
        """A copy with all fields at their defaults that a single update does not read.

        It is a static argument of the compiled update: runs that differ only in seed or length share one compilation.

        Args:
          total_steps: updates at which the learning rate's schedule ends; None is the field of that name.
        """
        read = ("batch_size", "sequence_length", "learning_rate", "weight_decay", "grad_clip", "warmup_steps")
        kept = {name: getattr(self, name) for name in (*read, "microbatches", "remat", "latent_dtype")}
        if self.divides_weights:
            kept["mesh"] = self.mesh  # It decides the form of the optimizer's state.
        if self.lr_schedule != "constant":
            kept |= {"lr_schedule": self.lr_schedule, "total_steps": total_steps or self.total_steps}
        return TrainingConfig(**kept)
