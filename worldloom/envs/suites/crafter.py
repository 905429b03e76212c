"""Crafter (Hafner 2022; extra ``envs``) as a Gymnasium environment, without preprocessing."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from worldloom.errors import ConfigError

_LENGTH = 10_000
"""Default time limit of the game, in environment steps."""

USUAL: dict[str, dict[str, Any]] = {"crafter": {"image_size": 64}}
"""All options by suite, with their usual values."""


class Crafter(gym.Env[np.ndarray, Any]):
    """The game with 17 actions and images uint8 ``[size, size, 3]``. Death terminates, the time limit truncates.

    A seed determines the world, but not all creatures in it: the game iterates over sets of objects, whose order
    differs between processes.

    Args:
      reward: whether achievements and health are rewarded; ``False`` is for unsupervised agents.
      image_size: side of the images.
      action_repeat: environment steps per action, rewards summed.
      time_limit: environment steps per episode; ``None`` is the game's default of 10,000.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (Gymnasium's own form)
    render_mode = "rgb_array"

    def __init__(
        self, *, reward: bool = True, image_size: int = 64, action_repeat: int = 1, time_limit: int | None = None
    ):
        import crafter

        self.time_limit = _LENGTH if time_limit is None else time_limit
        self._game = crafter.Env(size=(image_size, image_size), reward=reward, length=self.time_limit, seed=0)
        self._action_repeat = action_repeat
        self.observation_space = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.action_space = spaces.Discrete(len(self._game.action_names))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode, in the world of ``seed`` if one is given, else in the next world of the game."""
        super().reset(seed=seed)
        if seed is not None:
            # The game generates its world from (seed, episode number).
            self._game._seed, self._game._episode = seed, 0
        return self._game.reset(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take a step; ``info["achievements"]`` counts the episode's achievements by name."""
        total = 0.0
        for _ in range(self._action_repeat):
            image, reward, over, info = self._game.step(int(action))
            total += float(reward)
            if over:
                break
        dead = info["discount"] == 0
        return image, total, dead, over and not dead, {"achievements": info["achievements"]}

    def render(self) -> np.ndarray:
        """The local view, uint8 ``[256, 256, 3]``."""
        return self._game.render((256, 256))


def make_crafter(task: str, **options: Any) -> Crafter:
    """``crafter:reward`` or ``crafter:noreward``. Options are arguments of :class:`Crafter`."""
    if task not in ("reward", "noreward"):
        raise ConfigError(f"Crafter has the tasks 'reward' and 'noreward', not '{task}'.")
    return Crafter(reward=task == "reward", **{**USUAL["crafter"], **options})
