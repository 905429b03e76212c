"""N environments stepped one after another in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from worldloom.envs.backends.base import BatchedStepResult, check_same_spaces, index_nested
from worldloom.envs.backends.single import SingleEnv


class SyncBackend:
    """N environments in this process. What an environment raises reaches the caller unchanged.

    Raises ``ConfigError`` if their spaces differ, and whatever ``build`` raises.
    """

    def __init__(self, build: Callable[[], gym.Env[Any, Any]], num_envs: int):
        self._envs: list[SingleEnv] = []
        try:
            for _ in range(num_envs):
                self._envs.append(SingleEnv(build()))
            check_same_spaces([(single.env.observation_space, single.env.action_space) for single in self._envs])
        except BaseException:
            self.close()
            raise
        first = self._envs[0]
        self.num_envs, self.time_limit = num_envs, first.time_limit
        self.observation_space, self.action_space = first.env.observation_space, first.env.action_space

    def step(self, actions: Any, reset_mask: np.ndarray, seeds: Sequence[int | None]) -> BatchedStepResult:
        """See :meth:`worldloom.envs.backends.base.Backend.step`."""
        return BatchedStepResult.stack(
            [
                single.reset(seeds[i]) if reset_mask[i] else single.step(index_nested(actions, i))
                for i, single in enumerate(self._envs)
            ]
        )

    def replay_actions(self, seeds: Sequence[int], actions: Sequence[Any], lengths: np.ndarray) -> BatchedStepResult:
        """See :meth:`worldloom.envs.backends.base.Backend.replay_actions`; always possible here."""
        return BatchedStepResult.stack(
            [single.replay_actions(seeds[i], actions[i], int(lengths[i])) for i, single in enumerate(self._envs)]
        )

    def render(self) -> Any:
        """See :meth:`worldloom.envs.backends.base.Backend.render`."""
        return self._envs[0].env.render()

    def close(self) -> None:
        """See :meth:`worldloom.envs.backends.base.Backend.close`."""
        for single in self._envs:
            single.env.close()
        self._envs = []
