"""Settings of a training run."""

from __future__ import annotations

from typing import Annotated

from worldloom.config import BaseConfig, Ge, Gt, Lt, OneOf, check, config_dataclass
from worldloom.devices import check_device_name


@config_dataclass
class TrainingConfig(BaseConfig):
    """How long, on what and how a model is trained. Steps are optimizer updates.

    ``learning_rate``, ``warmup_steps``, ``weight_decay`` and ``grad_clip`` reach the optimizer of either family;
    what else its optimizer needs (AGC, epsilon, groups) belongs to the model's config.
    """

    total_steps: Annotated[int, Ge(1)] = 50_000
    """Updates in all."""
    batch_size: Annotated[int, Ge(1)] = 16
    """Windows per update."""
    sequence_length: Annotated[int, Ge(1)] = 50
    """Rows per window that gradients run through."""
    learning_rate: Annotated[float, Gt(0)] = 3e-4
    """Step size after warm-up; the reference programs use 4e-5 (DreamerV3) and 3e-4 (TD-MPC2)."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled decay of kernels, multiplied by the learning rate; 0 is off."""
    grad_clip: Annotated[float, Ge(0)] = 100.0
    """Largest global gradient norm; 0 is off. DreamerV3's adaptive clipping is a field of its own config."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Updates over which the learning rate rises linearly from 0."""
    log_interval: Annotated[int, Ge(1)] = 1_000
    """Updates between two log records."""
    eval_interval: Annotated[int, Ge(0)] = 5_000
    """Updates between two evaluations; 0 is never."""
    save_interval: Annotated[int, Ge(0)] = 10_000
    """Updates between two checkpoints; 0 is only at the end."""
    device: str = "cuda"
    """``auto cpu cuda gpu tpu`` or numbered (``cuda:1``); ``cuda`` without a GPU trains on what JAX has."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 42
    """Root of all randomness of the run: batches, sampling, dropout."""
    env_steps: Annotated[int, Ge(0)] = 0
    """Environment steps in all, action repeat counted, at which online training ends; 0: ``total_steps`` decides."""
    prefill: Annotated[int, Ge(1)] = 1_000
    """Decision steps before the first online update: TD-MPC2 takes random actions, DreamerV3 its initial policy's."""
    prefill_updates: Annotated[int, Ge(0)] = 0
    """Updates done in a burst when the prefill is there; the TD-MPC2 reference does as many as prefill steps."""
    train_ratio: Annotated[float, Ge(0)] = 0.0
    """Rows replayed per decision step, of which an update replays ``batch_size`` × ``sequence_length`` (TD-MPC2:
    rows of its window); 0 is one update per decision step."""
    replay_capacity: Annotated[int, Ge(1)] = 1_000_000
    """Rows that online training keeps; ignored for a buffer of your own."""
    updates_per_call: Annotated[int, Ge(0)] = 0
    """Most updates in one compiled call (it holds as many batches on the device); 0 is 1 on a CPU and 8 elsewhere.
    Models of images do one on a CPU, where convolutions are slow in loops. The result does not depend on it."""
    microbatches: Annotated[int, Ge(1)] = 1
    """Parts in which a batch is worked through, one after the other, with one optimizer step at the end. Gradients are
    those of the whole batch, memory that of ``batch_size / microbatches`` windows. Divides ``batch_size``."""
    remat: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    replay_storage: Annotated[str, OneOf("auto", "host", "device")] = "auto"
    """Where batches are put together. ``host``: in the computer's memory, and sent to the device. ``device``: rows are
    copied to the device once, which takes memory for ``replay_capacity`` of them (of recorded data: for those there
    are). ``auto``: on a GPU or TPU if they take at most half of what is free there. Batches are the same."""
    skip_nonfinite: bool = False
    """Leave out updates whose loss or gradient is NaN or infinite and count them, instead of stopping."""

    def __post_init__(self) -> None:
        check(
            self.batch_size % self.microbatches == 0,
            f"microbatches={self.microbatches} must divide batch_size={self.batch_size}.",
        )
        check_device_name(self.device)

    def of_update(self) -> TrainingConfig:
        """This config with everything at its default that one update does not read.

        It is a static part of the compiled state: runs that differ in seed or length only share one program.
        """
        read = ("batch_size", "sequence_length", "learning_rate", "weight_decay", "grad_clip", "warmup_steps")
        return TrainingConfig(**{name: getattr(self, name) for name in (*read, "microbatches", "remat")})
