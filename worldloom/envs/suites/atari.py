"""Atari 2600 games of the Arcade Learning Environment (extra ``envs``), preprocessed as in DreamerV3.

The reference is ``embodied/envs/atari.py`` of ``dreamerv3``.
"""

from __future__ import annotations

import collections
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from worldloom.config import as_integer, nearest
from worldloom.envs.wrappers import resize
from worldloom.errors import ConfigError

_STICKINESS = 0.25
"""Probability per frame of repeating the previous action (Machado et al. 2018)."""

USUAL: dict[str, dict[str, Any]] = {
    "atari": {"image_size": 96, "gray": True, "sticky": True, "noops": 0, "all_actions": True},
    "atari100k": {"image_size": 64, "gray": False, "sticky": False, "noops": 30, "all_actions": False},
}
"""All options by suite, with their usual values."""


class Atari(gym.Env[np.ndarray, Any]):
    """One game: actions are repeated, the last two frames max-pooled against flicker, and the result is resized.

    The first observation of an episode is the single frame after its no-ops; it is not pooled with older frames. The
    end of the game terminates, the loss of a life does not; the time limit truncates.

    Args:
      game: such as ``pong`` or ``ms_pacman``.
      image_size: side of the images, uint8 ``[size, size, 1 or 3]``.
      gray: one channel instead of three.
      sticky: whether the console repeats the previous action with probability 0.25 in each frame.
      noops: an episode starts with 0 to this many frames without action, drawn uniformly.
      all_actions: all 18 actions instead of the minimal set of the game.
      action_repeat: frames per action, rewards summed.
      time_limit: frames per episode; ``None`` is 108,000, half an hour at 60 frames per second.

    Raises ``ConfigError`` for an unknown game.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012 (Gymnasium's own form)
    render_mode = "rgb_array"

    def __init__(
        self,
        game: str,
        *,
        image_size: int,
        gray: bool,
        sticky: bool,
        noops: int,
        all_actions: bool,
        action_repeat: int = 4,
        time_limit: int | None = None,
    ):
        import ale_py
        from ale_py import roms

        noops = as_integer("noops", noops, least=0)
        if game not in roms.get_all_rom_ids():
            raise ConfigError(f"There is no Atari game '{game}'.{nearest(game, roms.get_all_rom_ids())}")
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self._rom = str(roms.get_rom_path(game))
        self._console = ale_py.ALEInterface()
        self._console.setFloat("repeat_action_probability", _STICKINESS if sticky else 0.0)
        self._console.setInt("random_seed", 0)
        self._console.loadROM(self._rom)
        self._actions = self._console.getLegalActionSet() if all_actions else self._console.getMinimalActionSet()
        self.time_limit = 108_000 if time_limit is None else time_limit
        self._size, self._gray, self._sticky, self._noops = image_size, gray, sticky, noops
        self._action_repeat = action_repeat
        self._screens: collections.deque[np.ndarray] = collections.deque(maxlen=2)
        self._frames = 0
        self.observation_space = spaces.Box(0, 255, (image_size, image_size, 1 if gray else 3), np.uint8)
        self.action_space = spaces.Discrete(len(self._actions))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; ``seed`` seeds its no-ops and the console's sticky actions."""
        super().reset(seed=seed)
        if seed is not None and self._sticky:
            self._console.setInt("random_seed", seed)  # The console reads it only when it loads a game.
            self._console.loadROM(self._rom)
        self._console.reset_game()
        for _ in range(int(self.np_random.integers(self._noops + 1))):
            self._console.act(0)
            if self._console.game_over():
                self._console.reset_game()
        self._frames = 0
        self._screens.clear()
        self._screens.append(self._screen())
        return self._observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take ``action`` for ``action_repeat`` frames, or until the episode ends."""
        total = 0.0
        for _ in range(self._action_repeat):
            total += self._console.act(self._actions[int(action)])
            self._frames += 1
            self._screens.append(self._screen())
            over = self._console.game_over()
            if over or self._frames >= self.time_limit:
                break
        return self._observe(), total, over, not over and self._frames >= self.time_limit, {}

    def render(self) -> np.ndarray:
        """The screen in colour, uint8 ``[210, 160, 3]`` for most games."""
        return self._console.getScreenRGB()

    def _screen(self) -> np.ndarray:
        return self._console.getScreenGrayscale()[..., None] if self._gray else self._console.getScreenRGB()

    def _observe(self) -> np.ndarray:
        return resize(np.max(self._screens, axis=0), self._size)


def make_atari(game: str, **options: Any) -> Atari:
    """``atari:game``: 96×96 gray, sticky actions, all 18 actions. Options are arguments of :class:`Atari`."""
    return Atari(game, **{**USUAL["atari"], **options})


def make_atari100k(game: str, **options: Any) -> Atari:
    """``atari100k:game``: 64×64 colour, no sticky actions, the minimal action set, up to 30 no-ops.

    Options are arguments of :class:`Atari`.
    """
    return Atari(game, **{**USUAL["atari100k"], **options})
