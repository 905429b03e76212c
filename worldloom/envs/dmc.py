"""DeepMind Control suite (extra ``envs``) as Gymnasium environments: state or pixels."""

from __future__ import annotations

import math
import os
import sys
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from worldloom.config import nearest
from worldloom.errors import ConfigError, EnvError

_ALIASES = {"cup": "ball_in_cup", "pointmass": "point_mass"}
"""Domain names of TD-MPC2's task list that the suite calls otherwise."""

_CAMERAS = {"quadruped": 2}
"""Cameras that see the task; 0 does for the other domains."""


class DMControl(gym.Env[np.ndarray, np.ndarray]):
    """One task of the suite.

    State observations are the float32 concatenation of the suite's entries, each flattened, in its order. Images are
    uint8 ``[size, size, 3]``. An episode terminates if and only if the suite's discount is 0; its time limit (1,000
    environment steps for nearly all tasks) truncates.

    Args:
      task: ``domain_task`` with ``_`` or ``-``, such as ``cartpole_swingup``; TD-MPC2's ``cup`` and ``pointmass`` are
        understood.
      action_repeat: environment steps per action, rewards summed.
      time_limit: environment steps per episode in place of the suite's limit.
      image_size: side of the images, or ``None`` for state observations.
      camera: which camera draws; ``None`` is 0, and 2 for the quadruped.
      render: whether pictures will be asked for beside state observations: then OpenGL without a display (EGL) is
        chosen where there is none, unless ``MUJOCO_GL`` says otherwise or ``dm_control`` was imported before.

    Raises ``ConfigError`` for a task that the suite does not have.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012 (Gymnasium's own form)
    render_mode = "rgb_array"

    def __init__(
        self,
        task: str,
        *,
        action_repeat: int = 2,
        time_limit: int | None = None,
        image_size: int | None = None,
        camera: int | None = None,
        render: bool = False,
    ):
        if image_size is not None or render:
            _draw_without_display()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GLFW's complaint about the missing display; state needs none.
            from dm_control import suite

        domain, name = _resolve(task, suite.ALL_TASKS)
        own_limit = {} if time_limit is None else {"time_limit": math.inf}
        self._suite = suite.load(domain, name, task_kwargs={"random": 0, **own_limit})
        self.time_limit = self._suite._step_limit if time_limit is None else time_limit
        self._action_repeat, self._image_size = action_repeat, image_size
        self._camera = _CAMERAS.get(domain, 0) if camera is None else camera
        self._steps = 0
        action = self._suite.action_spec()
        self.action_space = spaces.Box(
            np.broadcast_to(action.minimum, action.shape).astype(np.float32),
            np.broadcast_to(action.maximum, action.shape).astype(np.float32),
        )
        if image_size is None:
            width = sum(math.prod(entry.shape) for entry in self._suite.observation_spec().values())
            self.observation_space: spaces.Box = spaces.Box(-np.inf, np.inf, (width,), np.float32)
        else:
            self.observation_space = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode, from ``seed`` if one is given."""
        super().reset(seed=seed)
        if seed is not None:
            # Loading the task again would be the public way to seed it, at the price of compiling its model.
            self._suite.task._random = np.random.RandomState(seed)
        self._steps = 0
        return self._observe(self._suite.reset()), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Act for ``action_repeat`` environment steps or until the episode ends."""
        total = 0.0
        for _ in range(self._action_repeat):
            moment = self._suite.step(action)
            total += moment.reward or 0.0
            self._steps += 1
            over = moment.last() or self._steps >= self.time_limit
            if over:
                break
        terminated = moment.last() and moment.discount == 0
        return self._observe(moment), total, terminated, over and not terminated, {}

    def render(self) -> np.ndarray:
        """The scene, uint8 [240, 240, 3]."""
        return self._draw(240)

    def close(self) -> None:
        """Free the simulator and its graphics context."""
        self._suite.close()

    def _observe(self, moment: Any) -> np.ndarray:
        if self._image_size is not None:
            return self._draw(self._image_size)
        return np.concatenate([np.ravel(entry) for entry in moment.observation.values()]).astype(np.float32)

    def _draw(self, size: int) -> np.ndarray:
        try:
            return self._suite.physics.render(size, size, camera_id=self._camera).copy()
        except Exception as error:  # Each OpenGL backend has its own.
            raise EnvError(
                f"MuJoCo could not draw ({error}). Set the environment variable MUJOCO_GL to 'egl' (GPU or Mesa) or "
                "'osmesa' before Python starts."
            ) from error


def make_dmc(task: str, **options: Any) -> DMControl:
    """``dmc:task``: state observations; pictures come from ``render`` alone. Arguments of :class:`DMControl`."""
    if "image_size" in options:
        raise ConfigError("dmc: gives state observations; for images of image_size write dmc_vision:.")
    return DMControl(task, **options)


def make_dmc_vision(task: str, *, image_size: int = 64, **options: Any) -> DMControl:
    """``dmc_vision:task``: images. Arguments of :class:`DMControl`."""
    return DMControl(task, image_size=image_size, **options)


def _resolve(task: str, known: Any) -> tuple[str, str]:
    """(domain, task) of the suite for ``domain_task``; both halves may hold underscores themselves."""
    names = {f"{domain}_{name}": (domain, name) for domain, name in known}
    wanted = task.replace("-", "_")
    for alias, domain in _ALIASES.items():
        if wanted.startswith(alias + "_"):
            wanted = domain + wanted.removeprefix(alias)
    if wanted not in names:
        raise ConfigError(
            f"The control suite has no task '{task}'.{nearest(wanted, names)} It has: {', '.join(names)}."
        )
    return names[wanted]


def _draw_without_display() -> None:
    """``dm_control`` picks its OpenGL when it is imported, and by default one that needs a display."""
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform == "linux" and not display and not os.environ.get("MUJOCO_GL"):
        os.environ["MUJOCO_GL"] = "egl"
