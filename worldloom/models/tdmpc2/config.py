"""Config of TD-MPC2."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from math import prod
from typing import Annotated, Any, ClassVar, Self, cast

import numpy as np

from worldloom.config import BaseConfig, Between, Ge, Lt, OneOf, check, config_dataclass, is_integer, nearest
from worldloom.errors import ConfigError
from worldloom.models.disagreement import check_explore_fields
from worldloom.models.pictures import check_sides, picture_layout
from worldloom.spaces import OBS

PICTURE_CHANNELS = 32
"""Channels of every convolution."""
_FIRST, _FURTHER, _LAST = ((7, 2), (5, 2), (3, 2)), (3, 2), (3, 1)
"""Kernel and stride of the reference's convolutions, and of those that larger pictures need besides."""
_LEAST_MAP = 3
"""The shorter side of the last feature map has at least so many pixels."""

# The reference's `MODEL_SIZE` table (`common/__init__.py`).
_SIZE_FIELDS = ("encoder_dim", "hidden_dim", "latent_dim", "encoder_layers", "num_q")
_SIZES = {
    "1m": (256, 384, 128, 2, 2),
    "5m": (256, 512, 512, 2, 5),
    "19m": (1024, 1024, 768, 3, 5),
    "48m": (1792, 1792, 768, 4, 5),
    "317m": (4096, 4096, 1376, 5, 8),
}
_PRESETS: dict[str, dict[str, Any]] = {
    # Not in the reference, for tests and laptops: planning at every step must be cheap on two cores.
    "tiny": dict(zip(_SIZE_FIELDS, (64, 64, 64, 2, 2), strict=True))
    | {"num_samples": 64, "num_elites": 12, "num_pi_trajs": 8, "iterations": 3},
    **{size: dict(zip(_SIZE_FIELDS, values, strict=True)) for size, values in _SIZES.items()},
}

# Fields of the earlier PyTorch library: renamed here, or without a counterpart.
_RENAMED = {"num_q_networks": "num_q", "num_hidden_layers": "mlp_layers", "gamma": "discount"}
_DROPPED = (
    "model_name", "latent_type", "deter_dim", "stoch_dim", "dynamics_type", "learning_rate", "grad_clip", "device",
    "dtype", "momentum", "use_decoder",
)  # fmt: skip


@config_dataclass
class TDMPC2Config(BaseConfig):
    """Sizes, loss and planner of TD-MPC2 (Hansen, Su, Wang 2024, arXiv 2310.16828).

    Defaults are those of the reference program's 5M model. Learning rate, gradient clip (20 in the reference), batch
    size and weight decay belong to ``TrainingConfig``.
    """

    preset_parameters: ClassVar[Mapping[str, int]] = {
        "tiny": 75_195, "1m": 1_214_651, "5m": 4_960_618, "19m": 18_062_442, "48m": 47_208_298, "317m": 312_595_417,
    }  # fmt: skip

    obs_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]]
    """Shape of one observation, or a mapping of names to shapes: ``(D,)`` is a vector, three axes are a (stacked)
    image, channels first or last, with sides from 5 to 256."""
    action_dim: Annotated[int, Ge(1)]
    """Dimensions A of a continuous action in [−1, 1], or number of discrete actions."""
    latent_dim: Annotated[int, Ge(1)] = 512
    """Latent size L, a multiple of ``simnorm_dim``. For 64 × 64 pixels, 512 is the reference's: another size adds a
    layer to its encoder."""
    num_q: Annotated[int, Ge(2)] = 5
    """Q networks N: two of them are drawn for each use."""
    mlp_layers: Annotated[int, Ge(1), Lt(1000)] = 2
    """Hidden layers of dynamics, reward, termination, policy and Q networks."""
    hidden_dim: Annotated[int, Ge(1)] = 512
    """Width M of these hidden layers (``mlp_dim``)."""
    encoder_dim: Annotated[int, Ge(1)] = 256
    """Width of the vector encoder's hidden layers (``enc_dim``)."""
    encoder_layers: Annotated[int, Ge(1), Lt(1000)] = 2
    """Layers of the vector encoder including its last; below 2 counts as 2 (``num_enc_layers``)."""
    simnorm_dim: Annotated[int, Ge(2)] = 8
    """Features V per simplex of the latent."""
    num_bins: Annotated[int, Ge(2)] = 101
    """Bins K of reward and value."""
    vmin: float = -10.0
    """Position of the lowest bin in symlog space: returns below −(e¹⁰ − 1) = −22025 are clipped."""
    vmax: float = 10.0
    """Position of the highest bin in symlog space."""
    dropout: Annotated[float, Between(0, 0.99)] = 0.01
    """Dropout rate in the first layer of the Q networks, active in the value and policy losses."""
    action_type: Annotated[str, OneOf("continuous", "discrete")] = "continuous"
    """``continuous`` or ``discrete``; the reference has no discrete actions, see ``networks``."""
    symlog_obs: bool = False
    """Feed symlog of vector observations to the encoder (what the oldest published checkpoints expect)."""
    episodic: bool = False
    """Learn terminations: a head, its loss, and plans that end. If False, episodes may only end by time limits."""

    num_tasks: Annotated[int, Ge(0)] = 0
    """Tasks of a multitask model; 0 is a single-task model, without embedding."""
    task_dim: Annotated[int, Ge(0)] = 96
    """Width E of the task embedding (the reference: 96, or 64 for the 30-task models 5m, 19m and 48m)."""
    action_dims: tuple[int, ...] = ()
    """Valid action dimensions per task; the remaining ones are masked. Empty: ``action_dim`` for all."""
    episode_lengths: tuple[int, ...] = ()
    """Decision steps of an episode per task; empty: ``episode_length`` for all."""

    episode_length: Annotated[int, Ge(1)] = 500
    """Decision steps T of an episode, which determine the discount."""
    discount: Annotated[float | None, Between(0, 1)] = None
    """γ; None is clip((f − 1) / f, discount_min, discount_max) with f = T / ``discount_denom``."""
    discount_denom: Annotated[float, Ge(1e-6)] = 5.0
    """Divisor of the episode length in that rule."""
    discount_min: Annotated[float, Between(0, 1)] = 0.95
    """Lower bound of γ in that rule."""
    discount_max: Annotated[float, Between(0, 1)] = 0.995
    """Upper bound of γ in that rule."""

    horizon: Annotated[int, Ge(1)] = 3
    """Steps H of the latent rollout, in the loss and in plans."""
    rho: Annotated[float, Between(0, 1)] = 0.5
    """ρ: weight ρᵗ of step t in the losses."""
    tau: Annotated[float, Between(0, 1)] = 0.01
    """Rate at which the target Q networks and the value scale move towards their newest values."""
    consistency_coef: Annotated[float, Ge(0)] = 20.0
    """Weight of the latent consistency loss."""
    reward_coef: Annotated[float, Ge(0)] = 0.1
    """Weight of the reward loss."""
    value_coef: Annotated[float, Ge(0)] = 0.1
    """Weight of the value loss."""
    termination_coef: Annotated[float, Ge(0)] = 1.0
    """Weight of the termination loss."""
    entropy_coef: Annotated[float, Ge(0)] = 1e-4
    """Weight β of the policy's (scaled) entropy beside its normalised value; for discrete actions the temperature of
    the Boltzmann policy that the prior is fitted to."""
    advantage_coef: Annotated[float | None, Between(0, 0.999)] = None
    """Weight α of the regret subtracted from TD targets, for discrete actions: widens the gap between their values
    1 / (1 − α) times. None is 0.9 for discrete and 0 for continuous actions. See ``advantage_weight``."""
    encoder_lr_scale: Annotated[float, Ge(0)] = 0.3
    """Factor on the learning rate of the encoder."""
    pi_adam_eps: Annotated[float, Between(1e-30, 1)] = 1e-5
    """Adam's ε of the policy; the model's is 1e-8. Not 0: the first gradients are exactly 0 where Q networks start."""
    log_std_min: float = -10.0
    """Lower bound of the policy's log standard deviation."""
    log_std_max: float = 2.0
    """Upper bound of the policy's log standard deviation."""

    mpc: bool = True
    """Act by planning; False acts by the policy prior alone."""
    iterations: Annotated[int | None, Ge(1)] = None
    """Iterations of a plan; None is 6, or 8 from 20 action dimensions on. See ``planner_iterations``."""
    num_samples: Annotated[int, Ge(1)] = 512
    """Candidate action sequences per iteration, policy trajectories included."""
    num_elites: Annotated[int, Ge(1)] = 64
    """Best candidates that the next distribution is fitted to."""
    num_pi_trajs: Annotated[int, Ge(0)] = 24
    """Candidates drawn from the policy prior, kept in every iteration."""
    temperature: Annotated[float, Ge(0)] = 0.5
    """Elite i weighs exp(temperature · (valueᵢ − best value))."""
    planner_lambda: Annotated[float | None, Between(0, 1)] = None
    """λ of a candidate's value: 1 bootstraps from the last latent alone (the reference); below 1 the Q values of
    earlier latents count too. None is 1 for continuous and 0.5 for discrete actions. See ``value_lambda``."""
    min_std: Annotated[float, Ge(0)] = 0.05
    """Lower bound of the plan's standard deviation. For discrete actions see ``least_std``: it keeps the share
    2 · min_std / (1 + 2 · min_std) of candidates uniform, 9 % by default, however many actions there are."""
    max_std: Annotated[float, Ge(0)] = 2.0
    """Initial and largest standard deviation of the plan."""

    explore: Annotated[str, OneOf("none", "disagreement")] = "none"
    """``disagreement`` adds an intrinsic reward to what the agent maximises: how differently several networks predict
    the next latent (Plan2Explore). For tasks whose reward random actions never find."""
    explore_weight: Annotated[float, Ge(0)] = 1.0
    """Weight of the intrinsic reward at the start; a transition of twice the average spread is worth that much."""
    explore_updates: Annotated[int, Ge(1)] = 20_000
    """Updates until that weight has fallen to 0, linearly."""
    explore_heads: Annotated[int, Ge(2)] = 5
    """Networks that predict the next latent."""
    precision: Annotated[str, OneOf("auto", "float32", "bfloat16")] = "auto"
    """Dtype of matrix products: ``float32``, ``bfloat16``, or ``auto``: bfloat16 on GPU and TPU."""
    model_type: Annotated[str, OneOf("tdmpc2")] = "tdmpc2"
    """Always ``tdmpc2``: the family that a ``config.json`` belongs to."""

    def __post_init__(self) -> None:
        self._check_observations()
        self._check_tasks()
        check(
            self.latent_dim % self.simnorm_dim == 0,
            f"latent_dim={self.latent_dim} must be a multiple of simnorm_dim={self.simnorm_dim}.",
        )
        check(self.vmin < self.vmax, f"vmin={self.vmin} must be below vmax={self.vmax}.")
        check(self.log_std_min < self.log_std_max, "log_std_min must be below log_std_max.")
        check(self.discount_min <= self.discount_max, "discount_min must not exceed discount_max.")
        check(self.min_std <= self.max_std, f"min_std={self.min_std} must not exceed max_std={self.max_std}.")
        check(
            self.num_elites <= self.num_samples,
            f"num_elites={self.num_elites} must not exceed num_samples={self.num_samples}.",
        )
        check(
            self.num_pi_trajs < self.num_samples,
            f"num_pi_trajs={self.num_pi_trajs} must be below num_samples={self.num_samples}.",
        )
        check(
            self.action_type == "discrete" or not self.advantage_coef,
            f"advantage_coef={self.advantage_coef} is for discrete actions; leave it out for continuous ones.",
        )

    def _check_observations(self) -> None:
        check(
            self.obs_shape not in ((), {}),
            "obs_shape is empty; give a shape like (24,) or a mapping of names to shapes.",
        )
        for name, shape in self.observations.items():
            field = f"obs_shape['{name}']" if isinstance(self.obs_shape, Mapping) else "obs_shape"
            whole = isinstance(shape, tuple) and all(is_integer(side) and side >= 1 for side in shape)
            fits = whole and len(shape) in ((0, 1, 2, 3) if isinstance(self.obs_shape, Mapping) else (1, 3))
            check(
                fits,
                f"{field}={shape!r} is not a shape; give a vector like (24,) or an image like (3, 64, 64).",
            )
            if len(shape) == 3:
                check_sides(field, shape)
        check(
            not (self.multitask and self.image_keys),
            "A multitask model takes vector observations, no images; give obs_shape=(D,).",
        )
        check(bool(self.vector_keys) or not self.symlog_obs, "symlog_obs is for vector observations.")

    def _check_tasks(self) -> None:
        check(not (self.multitask and self.episodic), "A multitask model has no terminations; leave episodic=False.")
        if not (self.action_dims or self.episode_lengths or self.num_tasks > 1):
            return
        for name in ("action_dims", "episode_lengths"):
            given = getattr(self, name)
            check(isinstance(given, tuple), f"{name} must be a list of integers, one for each task, not {given!r}.")
        tasks = max(self.num_tasks, 1)
        check(tasks == 1 or self.task_dim > 0, f"{tasks} tasks need task_dim ≥ 1.")
        check(
            all(is_integer(n) and 1 <= n <= self.action_dim for n in self.action_dims),
            f"action_dims={self.action_dims} must lie in [1, action_dim={self.action_dim}].",
        )
        check(
            all(is_integer(n) and n >= 1 for n in self.episode_lengths),
            f"episode_lengths={self.episode_lengths} must be integers ≥ 1.",
        )
        for name in ("action_dims", "episode_lengths"):
            given = getattr(self, name)
            check(not given or len(given) == tasks, f"{name} has {len(given)} entries for {tasks} tasks.")
        check(
            self.multitask or not self.action_dims or self.action_dims == (self.action_dim,),
            f"action_dims={self.action_dims} needs num_tasks; a single-task model uses all of action_dim.",
        )

    @property
    def multitask(self) -> bool:
        """Whether there is a task embedding; then all methods of the model need ``task``."""
        return self.num_tasks > 0 and self.task_dim > 0

    @property
    def embedding_dim(self) -> int:
        """Width of the task embedding in the networks' inputs, 0 for a single-task model."""
        return self.task_dim if self.multitask else 0

    @property
    def observations(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, in the order given; a single observation is named ``obs``."""
        if isinstance(self.obs_shape, Mapping):
            return dict(self.obs_shape)
        return {OBS: cast("tuple[int, ...]", self.obs_shape)}

    @property
    def image_keys(self) -> tuple[str, ...]:
        """Names of image observations, in the order given."""
        return tuple(name for name, shape in self.observations.items() if len(shape) == 3)

    @property
    def vector_keys(self) -> tuple[str, ...]:
        """Names of vector observations, in the order given."""
        return tuple(name for name, shape in self.observations.items() if len(shape) < 3)

    @property
    def vector_dim(self) -> int:
        """Width D of all vector observations side by side; 0 if there are none."""
        return sum(prod(self.observations[name]) for name in self.vector_keys)

    @property
    def is_image(self) -> bool:
        """Whether observations are one image and nothing else."""
        return len(self.image_keys) == 1 and not self.vector_keys

    @property
    def planner_iterations(self) -> int:
        """Iterations of a plan: ``iterations``, or 6, or 8 from 20 action dimensions on."""
        if self.iterations is not None:
            return self.iterations
        return 8 if self.action_dim >= 20 else 6

    @property
    def least_std(self) -> float:
        """Lower bound of a plan's spread: ``min_std``; of A discrete actions, each has 2 / A of it.

        Candidates are drawn with probability ∝ mean + std, so that A times a fixed bound would be mostly uniform where
        there are many actions.
        """
        return self.min_std if self.action_type == "continuous" else 2 * self.min_std / self.action_dim

    @property
    def advantage_weight(self) -> float:
        """``advantage_coef``, or 0.9 for discrete actions and 0 for continuous ones."""
        if self.advantage_coef is not None:
            return self.advantage_coef
        return 0.9 if self.action_type == "discrete" else 0.0

    @property
    def value_lambda(self) -> float:
        """``planner_lambda``, or 0.5 for discrete actions and 1 for continuous ones."""
        if self.planner_lambda is not None:
            return self.planner_lambda
        return 0.5 if self.action_type == "discrete" else 1.0

    @property
    def discounts(self) -> tuple[float, ...]:
        """γ of every task (one for a single-task model)."""
        lengths = self.episode_lengths or (self.episode_length,) * max(self.num_tasks, 1)
        return tuple(self._discount(length) for length in lengths)

    def _discount(self, episode_length: int) -> float:
        if self.discount is not None:
            return self.discount
        fraction = episode_length / self.discount_denom
        return min(max((fraction - 1) / fraction, self.discount_min), self.discount_max)

    @property
    def valid_actions(self) -> tuple[int, ...]:
        """Valid action dimensions of every task (one entry for a single-task model)."""
        return self.action_dims or (self.action_dim,) * max(self.num_tasks, 1)

    @property
    def action_masks(self) -> np.ndarray:
        """float32 [tasks, A]: 1 for dimensions that a task has, 0 for others."""
        return (np.arange(self.action_dim) < np.array(self.valid_actions)[:, None]).astype(np.float32)

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Sizes that :meth:`from_size` knows."""
        return tuple(_PRESETS)

    @classmethod
    def from_size(cls, size: str, *, obs_shape: Any, action_dim: int, **overrides: Any) -> Self:
        """A preset: ``tiny``, or one of the reference program's ``1m 5m 19m 48m 317m``.

        The published 30-task models differ in ``task_dim`` (see there), and their 19m has ``latent_dim=512``.

        Raises:
          ConfigError: no such size.
        """
        check_explore_fields(cls, overrides)
        if size not in _PRESETS:
            raise ConfigError(
                f"There is no TD-MPC2 size '{size}'.{nearest(size, _PRESETS)} Known: {', '.join(_PRESETS)}."
            )
        check(
            not isinstance(action_dim, Mapping),
            f"TD-MPC2 takes one action, not {action_dim!r}; join_actions=True in make_env and from_minari, "
            "--join-actions on the command line, makes one of several.",
        )
        return cls(**{"obs_shape": obs_shape, "action_dim": action_dim, **_PRESETS[size], **overrides})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a plain dict such as a parsed ``config.json``.

        A dict of the earlier PyTorch library is recognised by its field names: those with a counterpart are renamed,
        the others named in a ``UserWarning``. Raises as the constructor does.
        """
        given = dict(values)
        if not any(name in given for name in (*_RENAMED, *_DROPPED)):
            return cls(**given)
        renamed = {_RENAMED.get(name, name): value for name, value in given.items()}
        if renamed.get("num_tasks") == 1:
            renamed["num_tasks"] = 0  # There, one task had no embedding.
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        dropped = sorted(name for name in renamed if name not in known)
        if dropped:
            warnings.warn(f"Fields without meaning in TDMPC2Config were dropped: {', '.join(dropped)}.", stacklevel=2)
        return cls(**{name: value for name, value in renamed.items() if name in known})


def picture_convolutions(shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Kernel size and stride of each convolution for a picture of ``shape``, in order.

    As many as leave at least 3 pixels on the shorter side: from 55 to 102 pixels the reference's four, fewer for
    smaller pictures, which leave out the first ones, and further ones of stride 2 before the last for larger pictures.
    """
    side = min(picture_layout(shape)[:2])
    candidates = [(*_FIRST[start:], _LAST) for start in (3, 2, 1, 0)]
    candidates += [(*_FIRST, *[_FURTHER] * further, _LAST) for further in (1, 2, 3)]
    fitting = [layers for layers in candidates if _map_side(side, layers) >= _LEAST_MAP]
    return fitting[-1]


def picture_features(shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of the last feature map for a picture of ``shape``; it has ``PICTURE_CHANNELS`` channels."""
    layers = picture_convolutions(shape)
    height, width = (_map_side(side, layers) for side in picture_layout(shape)[:2])
    return height, width


def _map_side(side: int, layers: tuple[tuple[int, int], ...]) -> int:
    """Pixels that are left of ``side`` after convolutions without padding."""
    for kernel, stride in layers:
        side = (side - kernel) // stride + 1 if side >= kernel else 0
    return side
