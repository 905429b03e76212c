"""A wrapper that stores what a vector environment returns in a replay buffer."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from worldloom.envs import TimeStep, VectorEnv
from worldloom.replay import ReplayBuffer


class Recording:
    """Wraps a :class:`VectorEnv` and stores every row in ``replay``, one stream per environment.

    So episodes of an evaluation, on which no model was trained, can be examined afterwards::

        replay = ReplayBuffer(10_000)
        play(model, Recording(env, replay), episodes=3)
        windows = replay.sample(16, 32)

    A row is stored once its action is known, the last row of an episode at once. All attributes but ``reset`` and
    ``step`` are those of ``env``.
    """

    def __init__(self, env: VectorEnv, replay: ReplayBuffer):
        self.env, self.replay = env, replay
        self._time_step: TimeStep | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def reset(self, seed: int | None = None) -> TimeStep:
        """See :meth:`VectorEnv.reset`. Episodes in progress stay stored without their last rows."""
        self._time_step = self.env.reset(seed)
        return self._time_step

    def step(self, actions: Any) -> TimeStep:
        """See :meth:`VectorEnv.step`."""
        if self._time_step is not None:
            self._store(self._time_step, jax.tree.map(_applied, actions), mask=~self._time_step.is_last)
        self._time_step = self.env.step(actions)
        # No action follows the last row of an episode.
        self._store(self._time_step, jax.tree.map(_no_action, actions), mask=self._time_step.is_last)
        return self._time_step

    def _store(self, time_step: TimeStep, actions: Any, mask: np.ndarray) -> None:
        """Store the rows of environments where ``mask`` (bool [N]) is true."""
        streams = np.flatnonzero(mask)
        if len(streams):
            obs, *reward_and_flags, _events = time_step
            values = (obs, actions, *reward_and_flags)
            self.replay.add_rows(*jax.tree.map(lambda x: np.asarray(x)[streams], values), streams=streams)


def _applied(actions: Any) -> np.ndarray:
    """``actions`` as the environments apply them: clipped, since DreamerV3's policy samples from a normal."""
    actions = np.asarray(actions)
    return actions if np.issubdtype(actions.dtype, np.integer) else np.clip(actions, -1, 1)


def _no_action(actions: Any) -> np.ndarray:
    """Stands for no action in replay: zeros, or class −1."""
    actions = np.asarray(actions)
    return np.full_like(actions, -1 if np.issubdtype(actions.dtype, np.integer) else 0)
