"""One Gymnasium environment behind flat observations and step results."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym

from worldloom.config import is_number
from worldloom.envs.backends.base import StepResult, index_nested
from worldloom.envs.contract import excluded, explain, read_reset, read_step
from worldloom.envs.time_step import scalars
from worldloom.errors import DataError
from worldloom.spaces.observations import ObservationSpec


class SingleEnv:
    """Steps one environment, in this process or in a worker, and checks what it returns.

    Its methods raise what the environment raises, and ``EnvContractError`` for what its spaces or Gymnasium's interface
    exclude. NaN and infinity pass.

    Attributes:
      env: the Gymnasium environment, with its wrappers.
      time_limit: environment steps after which it truncates an episode, or ``None`` if it does not say.
    """

    def __init__(self, env: gym.Env[Any, Any]):
        self.env = env
        self.time_limit = _time_limit(env)
        self._observations = ObservationSpec(env.observation_space)
        # Undeclared keys are looked for in the first observations of reset and of step: they cost as much as the rest.
        self._keys_seen = {"reset": False, "step": False}

    def reset(self, seed: int | None) -> StepResult:
        """Start an episode. The action space is seeded too."""
        self.env.action_space.seed(seed)
        try:
            answer = self.env.reset(seed=seed)
        except (TypeError, ValueError) as error:
            explain(error)
            raise
        obs = read_reset(answer)
        return StepResult(self._flatten(obs, "reset"), 0.0, is_last=False, is_terminal=False)

    def step(self, action: Any) -> StepResult:
        """Take one action, in the units of the environment's action space.

        Only ``terminated`` makes the last row terminal; it takes precedence when ``truncated`` is set too.
        """
        try:
            answer = self.env.step(action)
        except (TypeError, ValueError) as error:
            explain(error)
            raise
        obs, reward, terminated, truncated, info = read_step(answer)
        over = terminated or truncated
        return StepResult(self._flatten(obs, "step"), reward, over, terminated, scalars(info) if over else {})

    def replay_actions(self, seed: int, actions: Any, length: int) -> StepResult:
        """Start an episode and take the ``length`` actions on the leading axis of ``actions``."""
        result = self.reset(seed)
        for step in range(length):
            result = self.step(index_nested(actions, step))
        return result

    def _flatten(self, obs: Any, source: str) -> dict[str, Any]:
        try:
            if not self._keys_seen[source]:
                self._observations.check_keys(obs)
                self._keys_seen[source] = True
            return self._observations.flatten(obs)
        except DataError as error:
            raise excluded(error, source) from error


def _time_limit(env: gym.Env[Any, Any]) -> int | None:
    """Set by Gymnasium's ``TimeLimit`` wrapper, or the environment's own ``time_limit`` attribute."""
    for name in ("_max_episode_steps", "time_limit"):
        if env.has_wrapper_attr(name):
            limit = env.get_wrapper_attr(name)
            if is_number(limit) and math.isfinite(limit):
                return math.ceil(limit)
    return None
