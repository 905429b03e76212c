"""Sizes and settings of DreamerV3."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from math import inf
from typing import Annotated, Any, ClassVar, NamedTuple, Self, cast

from worldloom.config import BaseConfig, Between, Ge, Lt, OneOf, check, config_dataclass, is_integer, nearest
from worldloom.errors import ConfigError
from worldloom.models.disagreement import check_explore_fields
from worldloom.models.pictures import PictureLayout, check_sides, picture_layout
from worldloom.spaces import ACTION, OBS, attribute_name

CHANNELS = (2, 3, 4, 4)
"""Channels of each level of the image networks as multiples of ``cnn_depth`` (``mults`` of the reference)."""
_LEAST_MAP = 3
"""The shorter side of the smallest feature map has at least so many pixels."""


def _reference_size(deter: int) -> dict[str, int]:
    # The rule behind the size overlays of the reference's configs.yaml: hidden = units = deter / 8,
    # depth = classes = units / 16, always 32 latents. Every field that depends on size is set.
    hidden = deter // 8
    classes = hidden // 16
    return {
        "deter_dim": deter,
        "stoch_dim": 32 * classes,
        "num_categories": classes,
        "hidden_dim": hidden,
        "cnn_depth": classes,
        "mlp_layers": 3,
    }


_PRESETS: dict[str, dict[str, int]] = {
    # This library's own, for tests and laptops: imagining from 8 states a window, not from all, makes an update
    # several times cheaper on a CPU.
    "tiny": _reference_size(512)
    | {"deter_dim": 256, "stoch_dim": 256, "num_categories": 16, "mlp_layers": 2, "imagination_starts": 8},
    "size1m": _reference_size(512),
    "size12m": _reference_size(2048),
    "size25m": _reference_size(3072),
    "size50m": _reference_size(4096),
    "size100m": _reference_size(6144),
    "size200m": _reference_size(8192),
    "size400m": _reference_size(12288),
}
# Field names of the earlier PyTorch library, which from_dict translates.
_EARLIER_NAMES = ("stoch_discrete", "stoch_classes", "num_hidden_layers")


class ActionSpace(NamedTuple):
    """One action: ``dim`` continuous entries in [−1, 1], or one of ``dim`` choices."""

    dim: int
    discrete: bool


@config_dataclass
class DreamerV3Config(BaseConfig):
    """Sizes, loss weights and optimizer constants of DreamerV3 (Hafner et al. 2025).

    Defaults are those of ``danijar/dreamerv3`` except where the product's reference sets its own (sizes,
    ``kl_balance``). The learning rate, its warm-up and global clipping belong to ``TrainingConfig``.

    Raises:
      ConfigError: a value is out of range; ``UnknownFieldError`` for a field that does not exist.
    """

    example_shapes: ClassVar[Mapping[str, Any]] = {"obs_shape": (64, 64, 3), "action_dim": 6}
    preset_parameters: ClassVar[Mapping[str, int]] = {
        "tiny": 480_766, "size1m": 686_846, "size12m": 10_494_158, "size25m": 23_489_326, "size50m": 41_650_062,
        "size100m": 93_468_238, "size200m": 165_948_686, "size400m": 372_896_398,
    }  # fmt: skip

    obs_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]]
    """Shape of one observation, or a mapping of names to shapes. Three axes are an image (channels first or last,
    the shorter end; sides from 5 to 256), fewer a vector."""
    action_dim: int | Mapping[str, int]
    """Entries of a continuous action, number of choices of a discrete one, or a mapping of names to either."""
    action_type: str | Mapping[str, str] = "continuous"
    """``continuous`` or ``discrete``; a mapping of names where ``action_dim`` is one and they differ."""

    deter_dim: Annotated[int, Ge(1)] = 2048
    """Width of the deterministic state h (``deter``), a multiple of ``blocks``."""
    stoch_dim: Annotated[int, Ge(1)] = 1024
    """Flat width of the stochastic state z: latents × ``num_categories``."""
    num_categories: Annotated[int, Ge(1)] = 32
    """Classes of each latent (``classes``)."""
    hidden_dim: Annotated[int, Ge(1)] = 640
    """Width of the hidden layers inside the RSSM (``hidden``)."""
    units: Annotated[int | None, Ge(1)] = None
    """Width of the MLPs of encoder, decoder, actor, critic and heads; None is ``hidden_dim``."""
    cnn_depth: Annotated[int, Ge(1)] = 48
    """Channel unit of the image networks (``depth``): levels have 2, 3, 4 and 4 times as many; images with a side below
    48 have the last levels only."""
    mlp_layers: Annotated[int, Ge(1), Lt(1000)] = 5
    """Hidden layers of encoder and decoder MLP, actor and critic (3 in the reference program and all presets)."""
    reward_layers: Annotated[int, Ge(1), Lt(1000)] = 1
    """Hidden layers of the reward head."""
    continue_layers: Annotated[int, Ge(1), Lt(1000)] = 1
    """Hidden layers of the continue head."""
    blocks: Annotated[int, Ge(1)] = 8
    """Diagonal blocks of the recurrent layer and of the image decoder's first layer."""
    unimix: Annotated[float, Ge(0), Lt(1)] = 0.01
    """Uniform part of every latent distribution, in [0, 1)."""
    bins: Annotated[int, Ge(3)] = 255
    """Classes of the reward and value distributions, odd."""

    kl_scale: Annotated[float, Ge(0)] = 1.0
    """Weight of both KL terms together; the reference program's (1.0, 0.1) are ``1.1`` with balance ``1/1.1``."""
    kl_balance: Annotated[float, Between(0, 1)] = 0.8
    """Share of the dynamics loss in the KL terms; the representation loss has the rest."""
    kl_free: Annotated[float, Ge(0)] = 1.0
    """Free nats: each KL, summed over latents, counts as at least this."""
    reconstruction_scale: Annotated[float, Ge(0)] = 1.0
    """Weight of the decoder's loss."""
    reward_scale: Annotated[float, Ge(0)] = 1.0
    """Weight of the reward loss."""
    continue_scale: Annotated[float, Ge(0)] = 1.0
    """Weight of the continue loss."""
    actor_scale: Annotated[float, Ge(0)] = 1.0
    """Weight of the actor's loss."""
    critic_scale: Annotated[float, Ge(0)] = 1.0
    """Weight of the critic's loss on imagined states."""
    replay_critic_scale: Annotated[float, Ge(0)] = 0.3
    """Weight of the critic's loss on replayed states."""

    imagination_horizon: Annotated[int, Ge(1)] = 15
    """Steps imagined from every replayed state (``imag_length``)."""
    imagination_starts: Annotated[int, Ge(0)] = 0
    """States K of a window, its last ones, from which imagination starts and on whose rows the critic learns from
    replay (``imag_last``); at least 2, or 0 for all, as published."""
    return_horizon: Annotated[float, Between(1, inf)] = 333.0
    """Discount horizon in steps: γ = 1 − 1 / horizon, learned into the continue head."""
    return_lambda: Annotated[float, Between(0, 1)] = 0.95
    """λ of imagined and replayed returns."""
    entropy_scale: Annotated[float, Ge(0)] = 3e-4
    """Weight η of the policy's entropy (``actent``)."""
    min_std: Annotated[float, Ge(0)] = 0.1
    """Smallest standard deviation of a continuous action."""
    max_std: Annotated[float, Ge(0)] = 1.0
    """Largest standard deviation of a continuous action."""
    slow_critic_scale: Annotated[float, Ge(0)] = 1.0
    """Weight of the critic's regression to its slow copy (``slowreg``)."""
    slow_critic_rate: Annotated[float, Between(0, 1)] = 0.02
    """Part of the new critic mixed into its slow copy after every update."""
    return_range_rate: Annotated[float, Between(0, 1)] = 0.01
    """Rate of the moving 5th and 95th percentiles that scale the advantages."""

    explore: Annotated[str, OneOf("none", "disagreement")] = "none"
    """``disagreement`` adds an intrinsic reward to what the agent maximises: how differently several networks predict
    the next latent (Plan2Explore). For tasks whose reward random actions never find."""
    explore_weight: Annotated[float, Ge(0)] = 1.0
    """Weight of the intrinsic reward at the start; a transition of twice the average spread is worth that much."""
    explore_updates: Annotated[int, Ge(1)] = 20_000
    """Updates until that weight has fallen to 0, linearly."""
    explore_heads: Annotated[int, Ge(2)] = 5
    """Networks that predict the next latent."""

    agc: Annotated[float, Between(0, inf)] = 0.3
    """Adaptive gradient clipping: largest ‖gradient‖ / ‖parameter‖ of a tensor; 0 is off."""
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """LaProp's decay of the first moment."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    """LaProp's decay of the second moment."""
    eps: Annotated[float, Between(1e-30, 1)] = 1e-20
    """LaProp's ε; not 0, as heads that start at 0 have gradients of exactly 0 at first."""
    replay_context: bool = True
    """Windows start from the latent stored with the row before them, and fresh latents are written back;
    False starts every window from zeros."""
    precision: Annotated[str, OneOf("auto", "float32", "bfloat16")] = "auto"
    """``auto`` (bfloat16 on GPU and TPU), ``float32`` or ``bfloat16`` activations; weights are float32."""
    model_type: Annotated[str, OneOf("dreamerv3")] = "dreamerv3"
    """Family name in ``config.json``."""

    def __post_init__(self) -> None:
        check(
            self.obs_shape not in ((), {}),
            "obs_shape is empty; give a shape like (24,) or a mapping of names to shapes.",
        )
        for name, shape in self.observations.items():
            _check_name(name)
            _check_shape(f"obs_shape['{name}']" if isinstance(self.obs_shape, Mapping) else "obs_shape", shape)
        sides = {self.image_layout(name)[:2] for name in self.image_keys}
        check(
            len(sides) <= 1,
            f"All images must have the same sides, not {sorted(sides)}; resize them to one size: make_env(…, "
            "image_size=64), on the command line --image-size 64.",
        )
        self._check_actions()
        check(self.imagination_starts != 1, "imagination_starts=1 leaves no replayed transition; use 0 (all) or ≥ 2.")
        check(
            self.deter_dim % self.blocks == 0,
            f"deter_dim={self.deter_dim} must be a multiple of blocks={self.blocks}.",
        )
        check(
            self.stoch_dim % self.num_categories == 0,
            f"stoch_dim={self.stoch_dim} is the flat size latents × num_categories and must be a multiple of "
            f"num_categories={self.num_categories}.",
        )
        check(
            not self.image_keys or (4 * self.cnn_depth) % self.blocks == 0,
            f"4 · cnn_depth={4 * self.cnn_depth} must be a multiple of blocks={self.blocks} to decode images.",
        )
        check(self.bins % 2 == 1, f"bins={self.bins} must be odd, so that one bin is 0.")
        check(
            0 < self.min_std <= self.max_std,
            f"min_std={self.min_std} and max_std={self.max_std} must satisfy 0 < min_std ≤ max_std.",
        )
        check(self.return_horizon > 1, f"return_horizon={self.return_horizon} must be more than 1 step.")

    @property
    def observations(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, in the order given; a single observation is named ``obs``."""
        if isinstance(self.obs_shape, Mapping):
            return dict(self.obs_shape)
        return {OBS: cast("tuple[int, ...]", self.obs_shape)}

    def weight_name(self, name: str) -> str:
        """The name of an observation in the names of weights (``decoder.vectors.vector.kernel``).

        It is the observation's own, in the form of ``attribute_name``, except for a single array: its weights are
        called ``vector`` or ``image``, the keys of the reference program's environments (``dec/vec/vector/pred``), in
        saved models as well.
        """
        if isinstance(self.obs_shape, Mapping):
            return attribute_name(name)
        return "image" if len(self.obs_shape) == 3 else "vector"

    @property
    def actions(self) -> dict[str, ActionSpace]:
        """Actions by name, in the order given; a single action is named ``action``."""
        dims = self.action_dim if isinstance(self.action_dim, Mapping) else {ACTION: self.action_dim}
        kind = lambda name: self.action_type[name] if isinstance(self.action_type, Mapping) else self.action_type  # noqa: E731
        return {name: ActionSpace(dim, kind(name) == "discrete") for name, dim in dims.items()}

    @property
    def image_keys(self) -> tuple[str, ...]:
        """Names of image observations, in the order given (the decoder's)."""
        return tuple(name for name, shape in self.observations.items() if len(shape) == 3)

    @property
    def vector_keys(self) -> tuple[str, ...]:
        """Names of vector observations, in the order given."""
        return tuple(name for name, shape in self.observations.items() if len(shape) < 3)

    @property
    def action_width(self) -> int:
        """Width A of all actions side by side; a discrete one counts its choices."""
        return sum(space.dim for space in self.actions.values())

    @property
    def num_latents(self) -> int:
        """Number S of categorical variables in the stochastic state."""
        return self.stoch_dim // self.num_categories

    @property
    def feature_dim(self) -> int:
        """Width F of ``state.features``: deterministic and flat stochastic state."""
        return self.deter_dim + self.stoch_dim

    @property
    def width(self) -> int:
        """``units``, or ``hidden_dim`` where it is None."""
        return self.units or self.hidden_dim

    def image_layout(self, name: str) -> PictureLayout:
        """(height, width, channels, channels_first) of an image observation, see :func:`picture_layout`."""
        return picture_layout(self.observations[name])

    @property
    def image_channels(self) -> tuple[int, ...]:
        """Channels of each level of the image networks, at full size first; each level halves height and width.

        Four levels where the shorter side has 48 pixels or more, as in the reference; below, as many as leave 3 (one
        for 5 pixels), the last of the four.
        """
        side = min(self.image_layout(self.image_keys[0])[:2])
        levels = sum(side >= _LEAST_MAP * 2**level for level in range(2, len(CHANNELS) + 1)) + 1
        return tuple(self.cnn_depth * multiple for multiple in CHANNELS[-levels:])

    @property
    def padded_sides(self) -> tuple[int, int]:
        """Height and width of images as the networks see them: the next multiples of 2 to the number of levels."""
        unit = 2 ** len(self.image_channels)
        height, width = (-(-side // unit) * unit for side in self.image_layout(self.image_keys[0])[:2])
        return height, width

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Sizes that :meth:`from_size` accepts."""
        return tuple(_PRESETS)

    @classmethod
    def from_size(cls, size: str, *, obs_shape: Any, action_dim: Any, **overrides: Any) -> Self:
        """The reference program's size ``size1m … size400m``, or ``tiny`` for CPUs; ``overrides`` win.

        Raises ``ConfigError`` for a size that does not exist.
        """
        check_explore_fields(cls, overrides)
        if size not in _PRESETS:
            raise ConfigError(
                f"There is no DreamerV3 size '{size}'.{nearest(str(size), _PRESETS)} Known: {', '.join(_PRESETS)}."
            )
        return cls(obs_shape=obs_shape, action_dim=action_dim, **{**_PRESETS[size], **overrides})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a plain dict; one of the earlier PyTorch library is translated.

        Its ``stoch_discrete × stoch_classes`` becomes ``stoch_dim`` and ``num_categories``, ``num_hidden_layers``
        becomes ``mlp_layers``; what has no meaning here is named in a ``UserWarning``.
        """
        values = dict(values)
        if values.get("model_type") != "dreamer" and not any(name in values for name in _EARLIER_NAMES):
            return cls(**values)
        values["model_type"] = "dreamerv3"
        if "num_hidden_layers" in values:
            values["mlp_layers"] = values.pop("num_hidden_layers")
        if "stoch_discrete" in values or "stoch_classes" in values:
            latents, classes = values.pop("stoch_discrete", 32), values.pop("stoch_classes", 32)
            values |= {"stoch_dim": latents * classes, "num_categories": classes}
        unknown = [name for name in values if name not in cls.__dataclass_fields__]  # type: ignore[attr-defined]
        if unknown:
            warnings.warn(f"These fields have no meaning here and are ignored: {', '.join(unknown)}.", stacklevel=2)
        return cls(**{name: value for name, value in values.items() if name not in unknown})

    def _check_actions(self) -> None:
        keys = list(self.action_dim) if isinstance(self.action_dim, Mapping) else [ACTION]
        check(bool(keys), "action_dim names no action.")
        for name in keys:
            _check_name(name)
        if isinstance(self.action_type, Mapping):
            check(
                isinstance(self.action_dim, Mapping) and set(self.action_type) == set(keys),
                f"action_type names {list(self.action_type)}; as a mapping it must name the actions {keys}.",
            )
        kinds = self.action_type.values() if isinstance(self.action_type, Mapping) else [self.action_type]
        for kind in kinds:
            check(
                kind in ("continuous", "discrete"),
                f"action_type={kind!r} must be 'continuous' or 'discrete'.",
            )
        for name, space in self.actions.items():
            _check_integer("action_dim" if name == ACTION else f"action_dim['{name}']", space.dim, 1)


def _check_shape(field: str, shape: Any) -> None:
    whole = isinstance(shape, tuple) and all(is_integer(side) and side >= 1 for side in shape)
    check(
        whole and len(shape) <= 3,
        f"{field}={shape!r} is not a shape; give a vector like (24,) or an image like (3, 64, 64).",
    )
    if len(shape) == 3:
        check_sides(field, shape)


def _check_name(name: str) -> None:
    check(bool(name), "A name of an observation or action is the empty text; any other text is a name.")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"The name {name!r} of an observation or action cannot be written to a file.") from error


def _check_integer(name: str, value: Any, least: int) -> None:
    check(is_integer(value) and value >= least, f"{name}={value!r} must be an integer ≥ {least}.")
