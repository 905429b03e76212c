"""Translates an agent's actions, in [−1, 1] or class indices, to those of a Gymnasium action space."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from worldloom.envs.time_step import Arrays
from worldloom.errors import ConfigError, DataError
from worldloom.spaces import ACTION

_UNBOUNDED = float(np.finfo(np.float32).max)
"""Bounds of this size or more are none: environments write "unbounded" as the largest float32 too."""


class _ActionLeaf(NamedTuple):
    """A leaf of the action space.

    Attributes:
      path: its keys in nested dict spaces.
      names: the agent's actions that make it up: one per dimension of a ``MultiDiscrete``, else one.
      space: its Gymnasium space.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    space: spaces.Space[Any]


class ActionSpec:
    """The agent's actions for a Gymnasium action space, and how they are translated to it.

    ===================  ==============================================================  ==================
    space                agent's action for N environments                               type
    ===================  ==============================================================  ==================
    ``Box``              float ``[N, A]`` in [−1, 1], clipped, scaled to the bounds;     ``"continuous"``
                         a dimension without two finite bounds is passed through
    ``Discrete``         integers ``[N]`` in [0, n), or one-hots ``[N, n]``              ``"discrete"``
    ``MultiDiscrete``    dict of the above, one per dimension: ``action0``, ``action1``  dict
    ``MultiBinary``      likewise, with two classes each                                 dict
    ``Dict``             dict of the above; nested names joined with ``/``; the          dict
                         dimensions of a ``MultiDiscrete`` ``k`` are ``k0``, ``k1``, …
    ===================  ==============================================================  ==================

    Raises ``ConfigError`` for other spaces, an empty one, and one that gives two actions the same name.

    Attributes:
      dim: size A or number of classes n, or a dict of them: the ``action_dim`` of configs.
      type: ``"continuous"`` or ``"discrete"``, or a dict of them: the ``action_type`` of configs.
      is_dict: whether the agent's action is a dict.
    """

    def __init__(self, space: spaces.Space[Any]):
        self._leaves = list(_leaves(space, ()))
        dims: dict[str, int] = {}
        types: dict[str, str] = {}
        for leaf in self._leaves:
            for name, size in zip(leaf.names, _sizes(leaf.space), strict=True):
                if name in dims:
                    raise ConfigError(f"Two actions of the space would be called '{name}'; rename one in a wrapper.")
                dims[name] = size
                types[name] = "continuous" if isinstance(leaf.space, spaces.Box) else "discrete"
        if not dims:
            raise ConfigError("The action space is empty; an agent needs at least one action.")
        self._dims, self._types = dims, types
        self._scales = {
            leaf.names[0]: _Scale.of(leaf.space) for leaf in self._leaves if isinstance(leaf.space, spaces.Box)
        }
        self.is_dict = not isinstance(space, spaces.Box | spaces.Discrete)
        self.dim: int | dict[str, int] = dims if self.is_dict else dims[ACTION]
        self.type: str | dict[str, str] = types if self.is_dict else types[ACTION]

    def check(self, actions: Any, ignore: np.ndarray) -> dict[str, np.ndarray]:
        """An agent's actions by name: finite float32 ``[N, A]``, or int64 classes ``[N]``.

        Args:
          actions: as in the table above.
          ignore: bool [N], 1 for environments whose action may be anything; it becomes 0.

        Raises ``DataError`` for wrong names or shapes, NaN or infinity, a class out of range, or a vector that is not
        one-hot.
        """
        if not self.is_dict:
            actions = {ACTION: actions}
        elif not isinstance(actions, Mapping) or set(actions) != set(self._dims):
            given = sorted(actions) if isinstance(actions, Mapping) else type(actions).__name__
            raise DataError(f"Actions must be a dict with the keys {list(self._dims)}; given was {given}.")
        return {
            name: (_check_continuous if self._types[name] == "continuous" else _check_discrete)(
                name, np.asarray(actions[name]), size, ignore
            )
            for name, size in self._dims.items()
        }

    def to_env(self, actions: Mapping[str, np.ndarray]) -> Any:
        """Checked actions ``[N, ...]`` in the environment's units, batched as Gymnasium batches the space."""
        native: Any = {}
        for leaf in self._leaves:
            values = [actions[name] for name in leaf.names]
            scale = self._scales.get(leaf.names[0])
            value = (
                _to_native(leaf.space, values)
                if scale is None
                else scale(values[0]).reshape(-1, *(leaf.space.shape or ()))
            )
            native = _set_at_path(native, leaf.path, value)
        return native

    @staticmethod
    def scale_of(space: spaces.Box) -> _Scale:
        """How an action in [−1, 1] becomes one of ``space``."""
        return _Scale.of(space)

    def zeros(self, *lead: int) -> dict[str, np.ndarray]:
        """Actions by name that are all 0, with leading axes ``lead``: float32 ``[*lead, A]`` or int64 ``[*lead]``."""
        return {
            name: np.zeros((*lead, size), np.float32) if self._types[name] == "continuous" else np.zeros(lead, np.int64)
            for name, size in self._dims.items()
        }

    def sample(self, rng: np.random.Generator, num_envs: int) -> Arrays:
        """Uniform random actions: float32 ``[N, A]`` in [−1, 1] and int32 classes ``[N]``."""
        actions: dict[str, np.ndarray] = {}
        for name, size in self._dims.items():
            if self._types[name] == "continuous":
                actions[name] = rng.uniform(-1, 1, (num_envs, size)).astype(np.float32)
            else:
                actions[name] = rng.integers(size, size=num_envs, dtype=np.int32)
        return actions if self.is_dict else actions[ACTION]


def _leaves(space: spaces.Space[Any], path: tuple[str, ...]) -> Iterator[_ActionLeaf]:
    name = "/".join(path) or ACTION
    if isinstance(space, spaces.Dict):
        for key, inner in space.spaces.items():
            yield from _leaves(inner, (*path, str(key)))
    elif isinstance(space, spaces.Discrete):
        yield _ActionLeaf(path, (name,), space)
    elif isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
        yield _ActionLeaf(path, tuple(f"{name}{i}" for i in range(int(np.prod(space.shape)))), space)
    elif isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        yield _ActionLeaf(path, (name,), space)
    else:
        raise ConfigError(
            f"Action space {space} is not supported; use a float Box, Discrete, MultiDiscrete, MultiBinary or a Dict "
            "of these (an ActionWrapper can turn a Tuple into a Dict)."
        )


def _sizes(space: spaces.Space[Any]) -> list[int]:
    """Sizes of a leaf's actions: the dimensions of a Box, or the number of classes of each discrete action."""
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        return [int(n) for n in space.nvec.ravel()]
    width = int(np.prod(space.shape or ()))
    return [width] if isinstance(space, spaces.Box) else [2] * width


def _check_continuous(name: str, value: np.ndarray, size: int, ignore: np.ndarray) -> np.ndarray:
    """Float32 [N, size]; values outside [−1, 1] stay, they are clipped when scaled."""
    expected = (len(ignore), size)
    if value.shape != expected:
        raise DataError(f"'{name}' has shape {value.shape}; expected {expected} for {len(ignore)} environments.")
    value = np.where(ignore[:, None], 0, value).astype(np.float32)
    if not np.isfinite(value).all():
        envs = np.flatnonzero(~np.isfinite(value).all(-1)).tolist()
        raise DataError(f"'{name}' is NaN or infinite for environments {envs}.")
    return value


def _check_discrete(name: str, value: np.ndarray, size: int, ignore: np.ndarray) -> np.ndarray:
    """Classes int64 [N] from classes [N] or one-hots [N, size]."""
    count = len(ignore)
    if value.shape == (count, size):
        # One-hots. Ignored rows become class 0 before the check.
        value = np.where(ignore[:, None], np.eye(1, size), value)
        if not ((value == 1).sum(-1) == 1).all() or not ((value == 0).sum(-1) == size - 1).all():
            raise DataError(f"'{name}' must hold one-hot rows (a single 1, else 0) or integers ({count},).")
        return value.argmax(-1)
    if value.shape != (count,) or not np.issubdtype(value.dtype, np.integer):
        raise DataError(
            f"'{name}' has shape {value.shape} and dtype {value.dtype}; expected integers ({count},) or one-hots "
            f"{(count, size)} for {count} environments."
        )
    value = np.where(ignore, 0, value).astype(np.int64)
    if (value < 0).any() or (value >= size).any():
        raise DataError(f"'{name}' holds class {value[(value < 0) | (value >= size)][0]}; there are 0 to {size - 1}.")
    return value


def _to_native(space: spaces.Space[Any], values: list[np.ndarray]) -> np.ndarray:
    """Checked classes ``[N]`` of the actions of a discrete leaf, as the leaf counts and shapes them."""
    if isinstance(space, spaces.Discrete):
        return (values[0] + space.start).astype(np.int64)
    classes = np.stack(values, -1).reshape(-1, *(space.shape or ()))
    if isinstance(space, spaces.MultiDiscrete):
        classes = classes + space.start
    return classes.astype(space.dtype)


class _Scale(NamedTuple):
    """From [−1, 1] to the bounds of a Box: ``low + (a + 1)/2 · (high − low)`` of a [N, A] clipped to [−1, 1].

    A dimension without two finite bounds is passed through; the one bound that it may have still holds.

    Attributes:
      low, high: float64 [A], the bounds.
      offset, span: float64 [A], ``low`` and ``high − low``; 0 where there are no two finite bounds.
      free: bool [A], dimensions that are passed through; None if there are none.
      dtype: of the space.
    """

    low: np.ndarray
    high: np.ndarray
    offset: np.ndarray
    span: np.ndarray
    free: np.ndarray | None
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, space: spaces.Box) -> _Scale:
        low, high = space.low.ravel().astype(np.float64), space.high.ravel().astype(np.float64)
        bounded = (np.abs(low) < _UNBOUNDED) & (np.abs(high) < _UNBOUNDED)
        # 0 in place of infinite bounds, which would give NaN.
        offset = np.where(bounded, low, 0)
        span = np.where(bounded, high - offset, 0)
        return cls(low, high, offset, span, None if bounded.all() else ~bounded, np.dtype(space.dtype))

    def __call__(self, action: np.ndarray) -> np.ndarray:
        scaled = self.offset + (np.minimum(np.maximum(action, -1), 1) + 1) / 2 * self.span
        if self.free is not None:
            scaled = np.where(self.free, action, scaled)
        # Clipped again: rounding may leave the bounds.
        return np.minimum(np.maximum(scaled, self.low), self.high).astype(self.dtype)


def _set_at_path(tree: Any, path: tuple[str, ...], value: np.ndarray) -> Any:
    """Set ``value`` at ``path`` in nested dicts and return them; an empty path returns ``value`` itself."""
    if not path:
        return value
    tree[path[0]] = _set_at_path(tree.get(path[0], {}), path[1:], value)
    return tree
