"""Actions of agents, in [−1, 1] or as class indices, as the actions that Gymnasium spaces want."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from worldloom.envs.rows import Arrays
from worldloom.errors import ConfigError, DataError

PLAIN = "action"
"""Stem of the names of actions whose space has none."""

_UNBOUNDED = float(np.finfo(np.float32).max)


class _Part(NamedTuple):
    """A leaf of the action space: its place there, and the names of the agent's actions that make it up."""

    path: tuple[str, ...]
    names: tuple[str, ...]
    space: spaces.Space[Any]


class ActionSpec:
    """What an agent's action looks like, and how it becomes the environment's.

    ===================  ==============================================================  ==================
    space                agent's action for N environments                               type
    ===================  ==============================================================  ==================
    ``Box``              float ``[N, A]`` in [−1, 1], clipped, scaled to the bounds;     ``"continuous"``
                         a dimension without two finite bounds is passed through
    ``Discrete``         integers ``[N]`` in [0, n), or one-hots ``[N, n]``              ``"discrete"``
    ``MultiDiscrete``    dict of the above, one per dimension: ``action0``, ``action1``  dict
    ``MultiBinary``      likewise, with two classes each
    ``Dict``             dict of the above; nested names joined with ``/``; the          dict
                         dimensions of a ``MultiDiscrete`` ``k`` are ``k0``, ``k1``, …
    ===================  ==============================================================  ==================

    Attributes:
      dim: size A or number of classes n, or a dict of them: what configs take as ``action_dim``.
      type: ``"continuous"`` or ``"discrete"``, or a dict of them: what configs take as ``action_type``.
    """

    def __init__(self, space: spaces.Space[Any]):
        self._parts = list(_parts(space, ()))
        dims: dict[str, int] = {}
        types: dict[str, str] = {}
        for part in self._parts:
            sizes = _sizes(part.space)
            for name, size in zip(part.names, sizes, strict=True):
                if name in dims:
                    raise ConfigError(f"Two actions of the space would be called '{name}'; rename one in a wrapper.")
                dims[name] = size
                types[name] = "continuous" if isinstance(part.space, spaces.Box) else "discrete"
        if not dims:
            raise ConfigError("The action space is empty; an agent needs at least one action.")
        self._dims, self._types = dims, types
        self.is_dict = not isinstance(space, spaces.Box | spaces.Discrete)
        self.dim: int | dict[str, int] = dims if self.is_dict else dims[PLAIN]
        self.type: str | dict[str, str] = types if self.is_dict else types[PLAIN]

    def check(self, actions: Any, ignore: np.ndarray) -> dict[str, np.ndarray]:
        """An agent's actions by name: finite float32 ``[N, A]``, or int64 classes ``[N]``.

        ``ignore`` (bool [N]) marks environments whose action may hold anything; it becomes 0.
        Raises ``DataError`` for wrong names or shapes, NaN or infinity, a class that is not there, or a vector that
        is not one-hot.
        """
        if not self.is_dict:
            actions = {PLAIN: actions}
        elif not isinstance(actions, Mapping) or set(actions) != set(self._dims):
            given = sorted(actions) if isinstance(actions, Mapping) else type(actions).__name__
            raise DataError(f"Actions must be a dict with the keys {list(self._dims)}; given was {given}.")
        return {
            name: (_checked_floats if self._types[name] == "continuous" else _checked_classes)(
                name, np.asarray(actions[name]), size, ignore
            )
            for name, size in self._dims.items()
        }

    def to_env(self, actions: Mapping[str, np.ndarray]) -> Any:
        """Checked actions in the environment's units, batched as Gymnasium batches the space."""
        native: Any = {}
        for part in self._parts:
            native = _placed(native, part.path, _native(part.space, [actions[name] for name in part.names]))
        return native

    def zeros(self, *lead: int) -> dict[str, np.ndarray]:
        """Checked actions by name that are all 0, with leading axes ``lead``."""
        return {
            name: np.zeros((*lead, size), np.float32) if self._types[name] == "continuous" else np.zeros(lead, np.int64)
            for name, size in self._dims.items()
        }

    def sample(self, rng: np.random.Generator, num_envs: int) -> Arrays:
        """Uniform random actions: float32 in [−1, 1] and int32 classes."""
        drawn: dict[str, np.ndarray] = {}
        for name, size in self._dims.items():
            if self._types[name] == "continuous":
                drawn[name] = rng.uniform(-1, 1, (num_envs, size)).astype(np.float32)
            else:
                drawn[name] = rng.integers(size, size=num_envs, dtype=np.int32)
        return drawn if self.is_dict else drawn[PLAIN]


def _parts(space: spaces.Space[Any], path: tuple[str, ...]) -> Iterator[_Part]:
    name = "/".join(path) or PLAIN
    if isinstance(space, spaces.Dict):
        for key, inner in space.spaces.items():
            yield from _parts(inner, (*path, str(key)))
    elif isinstance(space, spaces.Discrete):
        yield _Part(path, (name,), space)
    elif isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
        yield _Part(path, tuple(f"{name}{i}" for i in range(int(np.prod(space.shape)))), space)
    elif isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        yield _Part(path, (name,), space)
    else:
        raise ConfigError(
            f"Action space {space} is not supported; use a float Box, Discrete, MultiDiscrete, MultiBinary or a Dict "
            "of these (an ActionWrapper can turn a Tuple into a Dict)."
        )


def _sizes(space: spaces.Space[Any]) -> list[int]:
    """Per agent's action of a leaf: dimensions of a Box, classes of the others."""
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        return [int(n) for n in space.nvec.ravel()]
    width = int(np.prod(space.shape or ()))
    return [width] if isinstance(space, spaces.Box) else [2] * width


def _checked_floats(name: str, value: np.ndarray, size: int, ignore: np.ndarray) -> np.ndarray:
    expected = (len(ignore), size)
    if value.shape != expected:
        raise DataError(f"'{name}' has shape {value.shape}; {len(ignore)} environments take {expected}.")
    value = np.where(ignore[:, None], 0, value).astype(np.float32)
    if not np.isfinite(value).all():
        where = np.flatnonzero(~np.isfinite(value).all(-1)).tolist()
        raise DataError(f"'{name}' is NaN or infinite for environments {where}.")
    return value


def _checked_classes(name: str, value: np.ndarray, size: int, ignore: np.ndarray) -> np.ndarray:
    count = len(ignore)
    if value.shape == (count, size):
        value = np.where(ignore[:, None], np.eye(1, size), value)
        if not ((value == 1).sum(-1) == 1).all() or not ((value == 0).sum(-1) == size - 1).all():
            raise DataError(f"'{name}' must hold one-hot rows (a single 1, else 0) or integers ({count},).")
        return value.argmax(-1)
    if value.shape != (count,) or not np.issubdtype(value.dtype, np.integer):
        raise DataError(
            f"'{name}' has shape {value.shape} and dtype {value.dtype}; {count} environments take integers "
            f"({count},) or one-hots {(count, size)}."
        )
    value = np.where(ignore, 0, value).astype(np.int64)
    if (value < 0).any() or (value >= size).any():
        raise DataError(f"'{name}' holds class {value[(value < 0) | (value >= size)][0]}; there are 0 to {size - 1}.")
    return value


def _native(space: spaces.Space[Any], values: list[np.ndarray]) -> np.ndarray:
    """Checked actions ``[N, ...]`` in the units of a leaf of the space."""
    if isinstance(space, spaces.Box):
        return _scaled(space, values[0]).reshape(-1, *space.shape)
    if isinstance(space, spaces.Discrete):
        return (values[0] + space.start).astype(np.int64)
    digits = np.stack(values, -1).reshape(-1, *(space.shape or ()))
    if isinstance(space, spaces.MultiDiscrete):
        digits = digits + space.start
    return digits.astype(space.dtype)


def _scaled(space: spaces.Box, action: np.ndarray) -> np.ndarray:
    """``low + (a + 1)/2 · (high − low)`` with a clipped to [−1, 1], where both bounds are finite; else a itself."""
    low, high = space.low.ravel().astype(np.float64), space.high.ravel().astype(np.float64)
    bounded = (np.abs(low) < _UNBOUNDED) & (np.abs(high) < _UNBOUNDED)
    span = np.where(bounded, high - np.where(bounded, low, 0), 0)
    scaled = np.where(bounded, low, 0) + (np.clip(action, -1, 1) + 1) / 2 * span
    # Rounding must not leave the bounds; a single finite bound still holds.
    return np.clip(np.where(bounded, scaled, action), low, high).astype(space.dtype)


def _placed(tree: Any, path: tuple[str, ...], value: np.ndarray) -> Any:
    """``tree`` with ``value`` at ``path``; an empty path replaces the tree."""
    if not path:
        return value
    tree[path[0]] = _placed(tree.get(path[0], {}), path[1:], value)
    return tree
