"""The spaces of an environment as a value: taken from an environment or a model's config, written to JSON and read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from worldloom.envs.vector import VectorEnv
from worldloom.errors import ConfigError, FileFormatError
from worldloom.spaces.actions import ActionSpec
from worldloom.spaces.narrow import bound_actions, check_action_bounds, check_drop_keys, drop_observations
from worldloom.spaces.observations import ObservationSpec

_MOST_ELEMENTS = 1 << 24
"""Elements of a space that are read from a file: 16 million numbers are more than any observation has."""
_DEEPEST = 16
"""Nested dicts that are read from a file."""


class EnvSpaces(NamedTuple):
    """The spaces of one environment.

    Attributes:
      observation: Gymnasium space of what ``env.reset`` and ``env.step`` return.
      action: Gymnasium space of what ``env.step`` takes.
    """

    observation: spaces.Space[Any]
    action: spaces.Space[Any]

    @classmethod
    def of_env(
        cls, env: Any, *, action_bounds: tuple[float, float] | None = None, drop_keys: Sequence[str] = ()
    ) -> Self:
        """The spaces of a ``gymnasium.Env``, of one environment of a Gymnasium ``VectorEnv``, or of a ``VectorEnv``.

        What the library's own ``VectorEnv`` returns and takes is translated already: its observations are the arrays
        that models take, its continuous actions lie in [−1, 1]. :meth:`underneath` gives those of its environments.

        Args:
          env: see above.
          action_bounds: as in ``make_env``: the part of the bounds of continuous actions that is used.
          drop_keys: as in ``make_env``: names of observations to leave out.

        Raises ``ConfigError`` for anything else.
        """
        if isinstance(env, VectorEnv):
            found = _observation_space(env.obs_shape, env.obs_dtype), _action_space(env.action_dim, env.action_type)
        elif isinstance(env, gym.vector.VectorEnv):
            found = env.single_observation_space, env.single_action_space
        elif isinstance(env, gym.Env):
            found = env.observation_space, env.action_space
        else:
            found = None
        if found is not None:
            observation = drop_observations(found[0], check_drop_keys(drop_keys))
            return cls(observation, bound_actions(found[1], check_action_bounds(action_bounds)))
        raise ConfigError(
            f"env must be a gymnasium.Env, a gymnasium.vector.VectorEnv, what make_env returns, or EnvSpaces, not a "
            f"{type(env).__name__}."
        )

    @classmethod
    def underneath(cls, env: VectorEnv) -> Self:
        """The spaces of the environments of ``env`` in their own units, wrappers of ``make_env`` included."""
        return cls(env.observation_space, env.action_space)

    @classmethod
    def of_config(cls, config: Any, *, float_images: bool = False) -> Self:
        """The spaces that a model's config describes: unbounded vectors, images, actions in [−1, 1] or classes.

        Args:
          config: has ``obs_shape``, ``action_dim`` and ``action_type``.
          float_images: whether images are floats in [0, 1], not uint8.
        """
        shapes = config.obs_shape
        image = np.dtype(np.float32 if float_images else np.uint8)
        kind = lambda shape: image if len(shape) == 3 else np.dtype(np.float32)  # noqa: E731
        dtypes = {n: kind(s) for n, s in shapes.items()} if isinstance(shapes, Mapping) else kind(shapes)
        return cls(_observation_space(shapes, dtypes), _action_space(config.action_dim, config.action_type))

    def to_json(self) -> dict[str, Any]:
        """JSON values from which :meth:`from_json` makes equal spaces. Raises ``ConfigError`` for other kinds."""
        return {"observation": _to_json(self.observation), "action": _to_json(self.action)}

    @classmethod
    def from_json(cls, value: Any, place: str) -> Self:
        """Inverse of :meth:`to_json`; ``place`` is where the values were read, for messages.

        Raises ``FileFormatError`` for values that describe no space.
        """
        try:
            return cls(_from_json(value["observation"]), _from_json(value["action"]))
        except (KeyError, TypeError, ValueError, AssertionError, OverflowError, AttributeError) as error:
            raise FileFormatError(f"{place} describes no observation and action space: {error!r}.") from error

    def example_observation(self, num_envs: int) -> Any:
        """An observation of ``num_envs`` environments, zeros (or the first classes), as a Gymnasium vector gives it."""
        return _example(self.observation, num_envs)

    def check_fits(self, config: Any) -> None:
        """Raise ``ConfigError`` unless a model of ``config`` takes these observations and gives these actions."""
        actions = ActionSpec(self.action)
        check_config_fits(config, ObservationSpec(self.observation).shape, actions.dim, actions.type)


def check_config_fits(config: Any, obs_shape: Any, action_dim: Any, action_type: Any) -> None:
    """Raise ``ConfigError`` unless ``config`` has these shapes; all as ``VectorEnv`` has them."""
    pairs = {
        "obs_shape": (_as_dicts(obs_shape), _as_dicts(config.obs_shape)),
        "action_dim": (_as_dicts(action_dim), _as_dicts(config.action_dim)),
        "action_type": (_as_dicts(action_type), _as_dicts(config.action_type)),
    }
    for name, (wanted, given) in pairs.items():
        if isinstance(wanted, dict) and isinstance(given, str):
            given = dict.fromkeys(wanted, given)
        if wanted != given:
            raise ConfigError(
                f"The environment has {name}={wanted!r}, the model {given!r}. Create the model with obs_shape="
                "env.obs_shape, action_dim=env.action_dim, action_type=env.action_type."
            )


def _as_dicts(value: Any) -> Any:
    """Frozen mappings as plain dicts, which compare without regard to order."""
    return {name: _as_dicts(inner) for name, inner in value.items()} if isinstance(value, Mapping) else value


def _observation_space(shape: Any, dtype: Any) -> spaces.Space[Any]:
    if isinstance(shape, Mapping):
        return _dict_space({name: _observation_space(shape[name], dtype[name]) for name in shape})
    if dtype == np.uint8:
        return spaces.Box(0, 255, shape, np.uint8)
    return spaces.Box(0, 1, shape, np.float32) if len(shape) == 3 else spaces.Box(-np.inf, np.inf, shape, np.float32)


def _action_space(dim: Any, kind: Any) -> spaces.Space[Any]:
    if isinstance(dim, Mapping):
        kinds = kind if isinstance(kind, Mapping) else dict.fromkeys(dim, kind)
        return _dict_space({name: _action_space(dim[name], kinds[name]) for name in dim})
    return spaces.Discrete(dim) if kind == "discrete" else spaces.Box(-1, 1, (dim,), np.float32)


def _dict_space(inner: dict[str, spaces.Space[Any]]) -> spaces.Dict:
    # From pairs: Gymnasium sorts the keys of a mapping, and the order of names counts in a config.
    return spaces.Dict(list(inner.items()))


def _example(space: spaces.Space[Any], count: int) -> Any:
    if isinstance(space, spaces.Dict):
        return {name: _example(inner, count) for name, inner in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_example(inner, count) for inner in space.spaces)
    if isinstance(space, spaces.Box):
        nearest_to_zero = np.clip(0, space.low, space.high).astype(space.dtype)
        return np.broadcast_to(nearest_to_zero, (count, *space.shape)).copy()
    zeros = np.zeros((count, *(space.shape or ())), space.dtype)
    return zeros + space.start if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) else zeros


# ---- JSON ----------------------------------------------------------------------------------------------------------


def _to_json(space: spaces.Space[Any]) -> dict[str, Any]:
    if isinstance(space, spaces.Dict):
        # Pairs, because the order of names counts and JSON objects promise none.
        return {"type": "Dict", "spaces": [[str(name), _to_json(inner)] for name, inner in space.spaces.items()]}
    if isinstance(space, spaces.Tuple):
        return {"type": "Tuple", "spaces": [_to_json(inner) for inner in space.spaces]}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        numbers = {"nvec": np.asarray(space.nvec).tolist(), "start": np.asarray(space.start).tolist()}
        return {"type": "MultiDiscrete", **numbers, "dtype": np.dtype(space.dtype).name}
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "shape": [int(n) for n in space.shape or ()]}
    if isinstance(space, spaces.Box):
        bounds = {"low": _bounds_to_json(space.low), "high": _bounds_to_json(space.high)}
        return {"type": "Box", "shape": list(space.shape), "dtype": np.dtype(space.dtype).name, **bounds}
    raise ConfigError(f"A {type(space).__name__} space cannot be written to a file.")


def _from_json(value: Any, depth: int = 0) -> spaces.Space[Any]:
    kind = value["type"]
    if depth > _DEEPEST:
        raise ValueError(f"spaces are nested more than {_DEEPEST} deep")
    if kind == "Tuple":
        return spaces.Tuple([_from_json(inner, depth + 1) for inner in value["spaces"]])
    if kind == "Dict":
        return _dict_space({_string(name): _from_json(inner, depth + 1) for name, inner in value["spaces"]})
    if kind == "Discrete":
        return spaces.Discrete(_integer(value["n"]), start=_integer(value["start"]))
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(np.array(value["nvec"]), dtype=_dtype(value, "iu"), start=np.array(value["start"]))
    if kind == "MultiBinary":
        return spaces.MultiBinary(_shape(value))
    if kind == "Box":
        shape, dtype = _shape(value), _dtype(value, "fiub")
        low, high = (_bounds_from_json(value[side], shape, dtype) for side in ("low", "high"))
        return spaces.Box(low, high, shape, dtype.type)
    raise ValueError(f"a space of type {str(kind)[:40]!r} is not known")


def _bounds_to_json(bounds: np.ndarray) -> Any:
    """One number where all are equal, else a list of them all; infinities as text, which JSON has no numbers for."""
    values = np.asarray(bounds).ravel()
    if len(values) and (values == values[0]).all():
        return _number(values[0])
    return [_number(each) for each in values]


def _bounds_from_json(value: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    numbers = value if isinstance(value, list) else [value]
    # Through Python's numbers: integers of 64 bits would not survive as floats.
    array = np.array([float(each) if isinstance(each, str) else each for each in numbers], dtype)
    return np.full(shape, array[0], dtype) if not isinstance(value, list) else array.reshape(shape)


def _number(value: Any) -> Any:
    plain = value.item()
    return plain if not isinstance(plain, float) or math.isfinite(plain) else str(plain)


def _shape(value: Mapping[str, Any]) -> tuple[int, ...]:
    shape = tuple(_integer(n) for n in value["shape"])
    if any(n < 0 for n in shape) or math.prod(shape) > _MOST_ELEMENTS:
        raise ValueError(f"a space of shape {shape[:8]} is not read")
    return shape


def _dtype(value: Mapping[str, Any], kinds: str) -> np.dtype[Any]:
    dtype = np.dtype(_string(value["dtype"]))
    if dtype.kind not in kinds:
        raise ValueError(f"a space of dtype {dtype} is not known")
    return dtype


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{str(value)[:40]!r} is not an integer")
    return value


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]!r} is not text")
    return value
