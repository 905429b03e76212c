"""Translates an agent's actions, in [−1, 1] or class indices, to those of a Gymnasium action space, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from worldloom.errors import ConfigError, DataError
from worldloom.spaces import ACTION
from worldloom.spaces.leaves import Arrays, Path, as_numbers, check_names, leaf_name, members, space_leaves, value_at

LARGEST_BOUND = 1e6
"""Bounds beyond ±this are none: environments write "unbounded" as 1e30 or the largest float32 too."""

_ROUNDING = 1e-5
"""How far, in [−1, 1], rounding may take a recorded action beyond its bounds."""


class _ActionLeaf(NamedTuple):
    """A leaf of the action space.

    Attributes:
      path: its keys and indices in nested spaces.
      names: the agent's actions that make it up: one per dimension of a ``MultiDiscrete``, else one.
      space: its Gymnasium space.
      scale: from [−1, 1] to the bounds of a ``Box``; None for other spaces.
    """

    path: Path
    names: tuple[str, ...]
    space: Any
    scale: _Scale | None


class ActionSpec:
    """The agent's actions for a Gymnasium action space, and how they are translated to it.

    ===================  ==============================================================  ==================
    space                agent's action for N environments                               type
    ===================  ==============================================================  ==================
    ``Box`` of floats    float ``[N, A]`` in [−1, 1], clipped, scaled to the bounds      ``"continuous"``
    ``Box`` of integers  likewise, then rounded to the nearest integer                   ``"continuous"``
    ``Discrete``         integers ``[N]`` in [0, n), or one-hots ``[N, n]``              ``"discrete"``
    ``MultiDiscrete``    dict of the above, one per dimension: ``action0``, ``action1``  dict
    ``MultiBinary``      likewise, with two classes each                                 dict
    ``Dict``             dict of the above; nested names joined with ``/``; the          dict
                         dimensions of a ``MultiDiscrete`` ``k`` are ``k0``, ``k1``, …
    ``Tuple``            dict of the above with the names ``0``, ``1``, …; the           dict
                         dimensions of a ``MultiDiscrete`` ``1`` are ``1/0``, ``1/1``, …
    ===================  ==============================================================  ==================

    A dimension of a ``Box`` whose two bounds are equal is always 0 in the agent's units.

    Raises ``ConfigError`` for other spaces, an empty one, one that gives two actions the same name, and for a ``Box``
    without two bounds of at most 10⁶, of which ``action_bounds`` names the part to use.

    Attributes:
      dim: size A or number of classes n, or a dict of them: the ``action_dim`` of configs.
      type: ``"continuous"`` or ``"discrete"``, or a dict of them: the ``action_type`` of configs.
      is_dict: whether the agent's action is a dict.
    """

    def __init__(self, space: spaces.Space[Any]):
        self._space = space
        self._leaves = list(_leaves(space))
        sizes = [
            (name, leaf, n) for leaf in self._leaves for name, n in zip(leaf.names, _sizes(leaf.space), strict=True)
        ]
        check_names([name for name, _, _ in sizes], "actions")
        if not sizes:
            raise ConfigError("The action space is empty; an agent needs at least one action.")
        dims = {name: size for name, _, size in sizes}
        types = {name: "continuous" if leaf.scale else "discrete" for name, leaf, _ in sizes}
        self._dims, self._types = dims, types
        self._scales = {leaf.names[0]: leaf.scale for leaf in self._leaves if leaf.scale}
        self.is_dict = not isinstance(space, spaces.Box | spaces.Discrete)
        self.dim: int | dict[str, int] = dims if self.is_dict else dims[ACTION]
        self.type: str | dict[str, str] = types if self.is_dict else types[ACTION]

    @property
    def leaves(self) -> list[_ActionLeaf]:
        """The single arrays of the space, in its order."""
        return list(self._leaves)

    @property
    def names(self) -> list[str]:
        """Names of the agent's actions, in the order of the space."""
        return list(self._dims)

    def check(self, actions: Any, ignore: np.ndarray) -> dict[str, np.ndarray]:
        """An agent's actions by name, as they will be executed: float32 ``[N, A]``, or int64 classes ``[N]``.

        Continuous ones are clipped to [−1, 1]; those of integers are the values of the integers that they are rounded
        to. What this returns is unchanged by another call, and is what replay must hold.

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
        checked = {}
        for name, size in self._dims.items():
            value, scale = np.asarray(actions[name]), self._scales.get(name)
            if scale is None:
                checked[name] = _check_discrete(name, value, size, ignore)
            else:
                checked[name] = scale.executed(_check_continuous(name, value, size, ignore))
        return checked

    def to_env(self, actions: Mapping[str, np.ndarray]) -> Any:
        """Checked actions ``[N, ...]`` in the environment's units, batched as Gymnasium batches the space."""
        native = {
            leaf.path: _to_native(leaf.space, [actions[name] for name in leaf.names])
            if leaf.scale is None
            else leaf.scale(actions[leaf.names[0]]).reshape(-1, *(leaf.space.shape or ()))
            for leaf in self._leaves
        }
        return assemble(self._space, (), native)

    def from_env(self, actions: Any, count: int) -> Arrays:
        """Recorded actions ``[count, ...]`` of the space in the agent's units: the inverse of :meth:`to_env`.

        Raises ``DataError`` for actions of another shape, that are NaN, or outside of the space.
        """
        agent: dict[str, np.ndarray] = {}
        for leaf in self._leaves:
            name = leaf_name(leaf.path, ACTION)
            native = as_numbers(value_at(actions, leaf.path, "action"), name, "action")
            expected = (count, *(leaf.space.shape or ()))
            if native.shape != expected:
                raise DataError(f"The action '{name}' has shape {native.shape}; its space says {expected}.")
            if leaf.scale is not None:
                agent[name] = leaf.scale.inverse(native.reshape(count, -1), name, leaf.space)
                continue
            classes = (native - getattr(leaf.space, "start", 0)).reshape(count, -1)
            wrong = (classes < 0) | (classes >= np.array(_sizes(leaf.space))) | (classes != np.floor(classes))
            if wrong.any():
                raise DataError(
                    f"The action '{name}' holds {native.reshape(count, -1)[wrong][0]:g}, which is not in {leaf.space}."
                )
            agent |= {each: classes[:, i].astype(np.int64) for i, each in enumerate(leaf.names)}
        return self.unwrap(agent)

    def unwrap(self, actions: dict[str, np.ndarray]) -> Arrays:
        """What the public interface shows: the dict itself if :attr:`is_dict`, else its only array."""
        return actions if self.is_dict else actions[ACTION]

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
        return self.unwrap(actions)


def _leaves(space: spaces.Space[Any]) -> Iterator[_ActionLeaf]:
    for path, inner in space_leaves(space):
        name = leaf_name(path, ACTION)
        if isinstance(inner, spaces.Discrete):
            yield _ActionLeaf(path, (name,), inner, None)
        elif isinstance(inner, spaces.MultiDiscrete | spaces.MultiBinary):
            # `k0` for the first dimension of `k`; in a tuple, whose names are digits, `1/0`.
            stem = f"{name}/" if path and isinstance(path[-1], int) else name
            yield _ActionLeaf(path, tuple(f"{stem}{i}" for i in range(math.prod(inner.shape))), inner, None)
        elif isinstance(inner, spaces.Box):
            yield _ActionLeaf(path, (name,), inner, _Scale.of(inner, name))
        else:
            raise ConfigError(
                f"Action space {inner} is not supported; use Box, Discrete, MultiDiscrete, MultiBinary, or a Dict or "
                "Tuple of these (an ActionWrapper can translate it)."
            )


def _sizes(space: spaces.Space[Any]) -> list[int]:
    """Sizes of a leaf's actions: the dimensions of a Box, or the number of classes of each discrete action."""
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        return [int(n) for n in space.nvec.ravel()]
    width = math.prod(space.shape or ())
    return [width] if isinstance(space, spaces.Box) else [2] * width


def _check_continuous(name: str, value: np.ndarray, size: int, ignore: np.ndarray) -> np.ndarray:
    """Finite float32 [N, size]."""
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

    Attributes:
      low, high: float64 [A], the bounds.
      span: float64 [A], ``high − low``.
      moves: float64 [A], 1 where the bounds differ, 0 where the action is always the same.
      fixed: whether there is such a dimension.
      whole: whether actions are integers.
      dtype: of the space.
    """

    low: np.ndarray
    high: np.ndarray
    span: np.ndarray
    moves: np.ndarray
    fixed: bool
    whole: bool
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, space: spaces.Box, name: str) -> _Scale:
        dtype = np.dtype(space.dtype)
        low, high = space.low.ravel().astype(np.float64), space.high.ravel().astype(np.float64)
        if not len(low):
            raise ConfigError(f"The action '{name}' has shape {space.shape}: it holds no number.")
        usable = (np.abs(low) <= LARGEST_BOUND) & (np.abs(high) <= LARGEST_BOUND)
        if not usable.all():
            first = int(np.argmin(usable))
            raise ConfigError(
                f"Entry {first} of the action '{name}' lies in [{low[first]:g}, {high[first]:g}], to which actions "
                "from -1 to 1 cannot be scaled. Say which part of it to use by action_bounds=(low, high), for example "
                "make_env(…, action_bounds=(-2, 2)); on the command line --action-bounds -2 2. Bounds beyond "
                f"±{LARGEST_BOUND:g} count as none."
            )
        span = high - low
        return cls(low, high, span, (span > 0).astype(np.float64), bool((span == 0).any()), dtype.kind in "iub", dtype)

    def executed(self, action: np.ndarray) -> np.ndarray:
        """What of an action [N, A] is executed, in the same units, float32 [N, A] in [−1, 1]."""
        clipped = np.minimum(np.maximum(action, np.float32(-1)), np.float32(1))
        if self.whole:
            return self._to_unit(self(clipped).astype(np.float64))
        return (clipped * self.moves).astype(np.float32) if self.fixed else clipped

    def __call__(self, action: np.ndarray) -> np.ndarray:
        scaled = self.low + (np.minimum(np.maximum(action, -1), 1) + 1) / 2 * self.span
        # Clipped again: rounding may leave the bounds.
        return np.minimum(np.maximum(np.rint(scaled) if self.whole else scaled, self.low), self.high).astype(self.dtype)

    def inverse(self, native: np.ndarray, name: str, space: spaces.Box) -> np.ndarray:
        """Recorded actions [N, A] in [−1, 1], float32; raises ``DataError`` outside of the bounds."""
        unit = self._to_unit(native.astype(np.float64))
        beyond = np.where(self.moves > 0, np.abs(unit) > 1 + _ROUNDING, native != self.low.astype(native.dtype))
        wrong = ~np.isfinite(native) | beyond
        if wrong.any():
            step, entry = np.argwhere(wrong)[0]
            raise DataError(
                f"The action '{name}'[{step}, {entry}] is {native[step, entry]:g}; its space says "
                f"[{self.low[entry]:g}, {self.high[entry]:g}]. Actions beyond their bounds are not read; "
                "action_bounds, if given, must hold all of them."
            )
        return np.clip(unit, -1, 1)

    def _to_unit(self, native: np.ndarray) -> np.ndarray:
        span = np.where(self.moves > 0, self.span, 1)
        return (self.moves * (2 * (native - self.low) / span - 1)).astype(np.float32)


def assemble(space: spaces.Space[Any], path: Path, values: Mapping[Path, np.ndarray]) -> Any:
    """Values by path of the leaves as the nested dicts and tuples of ``space``."""
    if isinstance(space, spaces.Dict):
        return {key: assemble(inner, (*path, key), values) for key, inner in members(space)}
    if isinstance(space, spaces.Tuple):
        return tuple(assemble(inner, (*path, key), values) for key, inner in members(space))
    return values[path]
