"""Environments whose rows are kept while somebody plays them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from worldloom.envs import Rows, VectorEnv
from worldloom.replay import ReplayBuffer


class Recording:
    """Plays like the :class:`VectorEnv` it is given, and stores every row in ``replay``.

    So the episodes of an evaluation, which no training has seen, can be looked into afterwards::

        replay = ReplayBuffer(10_000)
        play(model, Recording(env, replay), episodes=3)
        windows = replay.sample(16, 32)
    """

    def __init__(self, env: VectorEnv, replay: ReplayBuffer):
        self.env, self.replay = env, replay
        self._rows: Rows | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def reset(self, seed: int | None = None) -> Rows:
        """See :meth:`VectorEnv.reset`. Episodes in progress stay as they are, cut short."""
        self._rows = self.env.reset(seed)
        return self._rows

    def step(self, actions: Any) -> Rows:
        """See :meth:`VectorEnv.step`."""
        if self._rows is not None:
            self._keep(self._rows, jax.tree.map(_taken, actions), ~self._rows.is_last)
        self._rows = self.env.step(actions)
        # No action follows the last row of an episode.
        self._keep(self._rows, jax.tree.map(_nothing, actions), self._rows.is_last)
        return self._rows

    def _keep(self, rows: Rows, actions: Any, which: np.ndarray) -> None:
        streams = np.flatnonzero(which)
        if len(streams):
            values = (rows.obs, actions, rows.reward, rows.is_first, rows.is_last, rows.is_terminal)
            self.replay.add_rows(*jax.tree.map(lambda x: np.asarray(x)[streams], values), streams=streams)


def _taken(actions: Any) -> np.ndarray:
    """What the environments do: they clip, and DreamerV3's policy draws from a normal distribution."""
    actions = np.asarray(actions)
    return actions if np.issubdtype(actions.dtype, np.integer) else np.clip(actions, -1, 1)


def _nothing(actions: Any) -> np.ndarray:
    actions = np.asarray(actions)
    return np.full_like(actions, -1 if np.issubdtype(actions.dtype, np.integer) else 0)
