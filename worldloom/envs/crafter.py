"""Crafter (extra ``envs``) as a Gymnasium environment, without preprocessing."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from worldloom.errors import ConfigError

_LENGTH = 10_000
"""Steps after which the game ends by itself."""


class Crafter(gym.Env[np.ndarray, Any]):
    """Crafter's 17 actions and images uint8 ``[size, size, 3]``. Death terminates, the length of the game truncates.

    A seed fixes the world, but not every creature in it: the game iterates over sets of objects, in an order that
    differs between processes.

    Args:
      reward: whether achievements and health are rewarded; ``False`` is for unsupervised agents.
      image_size: side of the images.
      action_repeat: steps per action, rewards summed.
      time_limit: steps per episode in place of the game's 10,000.
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
        """Begin an episode, in the world of ``seed`` if one is given."""
        super().reset(seed=seed)
        if seed is not None:
            # The game draws its world from (seed, number of the episode).
            self._game._seed, self._game._episode = seed, 0
        return self._game.reset(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Act; ``info["achievements"]`` counts what was achieved in the episode."""
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
    """``crafter:reward`` or ``crafter:noreward``. Arguments of :class:`Crafter`."""
    if task not in ("reward", "noreward"):
        raise ConfigError(f"Crafter has the tasks 'reward' and 'noreward', not '{task}'.")
    return Crafter(reward=task == "reward", **options)
