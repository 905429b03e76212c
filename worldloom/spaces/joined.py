"""One action in place of several, for models that choose only one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from worldloom.errors import ConfigError
from worldloom.spaces.actions import ActionSpec, assemble
from worldloom.spaces.leaves import Path, leaf_name, space_leaves

MOST_CHOICES = 4096
"""Combinations of discrete actions that become the choices of one."""


class JoinedActions:
    """All actions of a space as one: continuous ones side by side, discrete ones as one choice of a combination.

    Args:
      space: a Gymnasium action space.

    Attributes:
      space: the joined space, a ``Box`` or ``Discrete``; a space of one action stays as it is.

    Raises ``ConfigError`` for a space that has continuous and discrete actions, integers and fractions, or more than
    4,096 combinations.
    """

    def __init__(self, space: spaces.Space[Any]):
        self._given, self._leaves = space, list(space_leaves(space))
        inner = [leaf for _, leaf in self._leaves]
        kinds = {"fractions" if np.dtype(leaf.dtype).kind == "f" else "integers" for leaf in inner}
        continuous = {isinstance(leaf, spaces.Box) for leaf in inner}
        if isinstance(space, spaces.Box | spaces.Discrete):
            self.space: Any = space
        elif continuous == {True} and len(kinds) == 1:
            low, high = (
                np.concatenate([np.asarray(getattr(leaf, side)).ravel() for leaf in inner]) for side in ("low", "high")
            )
            self.space = spaces.Box(low, high, dtype=low.dtype.type)
        elif continuous == {False}:
            self._spec = ActionSpec(space)
            assert isinstance(self._spec.dim, dict)
            self._sizes = self._spec.dim
            choices = math.prod(self._sizes.values())
            if choices > MOST_CHOICES:
                raise ConfigError(
                    f"join_actions makes one choice of every combination; the actions {self._sizes} have {choices:,}, "
                    f"more than {MOST_CHOICES:,}."
                )
            self.space = spaces.Discrete(choices)
        else:
            names = ", ".join(f"{leaf_name(path, 'action')} {leaf}" for path, leaf in self._leaves)
            raise ConfigError(
                "join_actions makes one continuous or one discrete action; there is none in place of continuous and "
                f"discrete ones together, or of integers and fractions: {names or 'no action'}."
            )

    def split(self, actions: np.ndarray) -> Any:
        """Joined actions [N, ...] as actions of the given space, batched as Gymnasium batches it."""
        if self.space is self._given:
            return actions
        if isinstance(self.space, spaces.Discrete):
            indices = np.unravel_index(np.asarray(actions), tuple(self._sizes.values()))
            return self._spec.to_env(dict(zip(self._sizes, indices, strict=True)))
        values: dict[Path, np.ndarray] = {}
        start = 0
        for path, leaf in self._leaves:
            shape = leaf.shape or ()
            stop = start + math.prod(shape)
            values[path] = np.asarray(actions)[:, start:stop].reshape(-1, *shape).astype(leaf.dtype)
            start = stop
        return assemble(self._given, (), values)

    def join(self, actions: Any, count: int) -> np.ndarray:
        """Recorded actions [count, ...] of the given space as joined ones: the inverse of :meth:`split`.

        Raises ``DataError`` for actions of another shape, that are NaN, or outside of the space.
        """
        spec = ActionSpec(self._given)
        agent = spec.from_env(actions, count)
        if not isinstance(agent, Mapping):
            return agent
        if isinstance(self.space, spaces.Discrete):
            classes = tuple(agent[name] for name in self._sizes)
            return np.ravel_multi_index(classes, tuple(self._sizes.values()))
        return np.concatenate([agent[name] for name in spec.names], -1)
