"""One Gymnasium environment behind flat observations and step results."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym

from worldloom.envs.backends.base import StepResult, index_nested
from worldloom.envs.observations import ObservationSpec
from worldloom.envs.time_step import scalars


class SingleEnv:
    """Steps one environment, in this process or in a worker.

    Attributes:
      env: the Gymnasium environment, with its wrappers.
      time_limit: environment steps after which it truncates an episode, or ``None`` if it does not say.
    """

    def __init__(self, env: gym.Env[Any, Any]):
        self.env = env
        self.time_limit = _time_limit(env)
        self._observations = ObservationSpec(env.observation_space)

    def reset(self, seed: int | None) -> StepResult:
        """Start an episode. The action space is seeded too."""
        self.env.action_space.seed(seed)
        obs, _ = self.env.reset(seed=seed)
        return StepResult(self._observations.flatten(obs), 0.0, is_last=False, is_terminal=False)

    def step(self, action: Any) -> StepResult:
        """Take one action, in the units of the environment's action space.

        Only ``terminated`` makes the last row terminal; it takes precedence when ``truncated`` is set too.
        """
        obs, reward, terminated, truncated, info = self.env.step(action)
        flat, over = self._observations.flatten(obs), bool(terminated or truncated)
        return StepResult(flat, float(reward), over, bool(terminated), scalars(info) if over else {})

    def replay_actions(self, seed: int, actions: Any, length: int) -> StepResult:
        """Start an episode and take the ``length`` actions on the leading axis of ``actions``."""
        result = self.reset(seed)
        for step in range(length):
            result = self.step(index_nested(actions, step))
        return result


def _time_limit(env: gym.Env[Any, Any]) -> int | None:
    """Set by Gymnasium's ``TimeLimit`` wrapper, or the environment's own ``time_limit`` attribute."""
    for name in ("_max_episode_steps", "time_limit"):
        if env.has_wrapper_attr(name):
            limit = env.get_wrapper_attr(name)
            if isinstance(limit, int | float) and math.isfinite(limit):
                return math.ceil(limit)
    return None
