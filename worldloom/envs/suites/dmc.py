"""DeepMind Control suite (extra ``envs``) as Gymnasium environments, with state or image observations."""

from __future__ import annotations

import math
import os
import sys
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from worldloom.config import as_integer, nearest
from worldloom.errors import ConfigError, EnvError

_ALIASES = {"cup": "ball_in_cup", "pointmass": "point_mass"}
"""Domain names of TD-MPC2 (its ``envs/dmcontrol.py``), and their names in the suite."""

_CAMERAS = {"quadruped": 2}
"""Number of the camera that shows the task, by domain; 0 for the others."""

USUAL: dict[str, dict[str, Any]] = {"dmc": {"camera": None}, "dmc_vision": {"image_size": 64, "camera": None}}
"""All options by suite, with their usual values; the usual camera depends on the domain."""

_CHOOSE_OPENGL = (
    "Set the environment variable MUJOCO_GL to 'egl' (GPU or Mesa), 'osmesa' or 'glfw' (with a display), whichever "
    "library is installed, before Python starts; 'disable' does for state observations without pictures."
)


class DMControl(gym.Env[np.ndarray, np.ndarray]):
    """One task of the suite.

    State observations are float32 ``[n]``: the entries of the suite's observation, flattened and concatenated in their
    order. Images are uint8 ``[size, size, 3]``. An episode terminates if and only if the suite's discount is 0; the
    time limit (1,000 environment steps for nearly all tasks) truncates.

    Args:
      task: ``domain_task`` with ``_`` or ``-``, such as ``cartpole_swingup``; the domains may also be called by
        TD-MPC2's names ``cup`` and ``pointmass``.
      action_repeat: environment steps per action, rewards summed.
      time_limit: environment steps per episode; ``None`` is the suite's limit.
      image_size: side of the images, or ``None`` for state observations.
      camera: number of the camera; ``None`` is 2 for the quadruped, else 0.
      render: whether :meth:`render` will be called in spite of state observations. For images and for ``render``, EGL
        is selected on machines without a display, unless ``MUJOCO_GL`` is set; this has no effect if ``dm_control``
        was imported before.

    Raises ``ConfigError`` for a task that the suite does not have; ``EnvError`` if OpenGL does not start.
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
        camera = None if camera is None else as_integer("camera", camera, least=-1)  # -1 is the free camera.
        if image_size is not None or render:
            _select_headless_rendering()
        suite = _import_suite()
        domain, name = _resolve(task, suite.ALL_TASKS)
        # Our limit counts steps, the suite's counts seconds: ours replaces it, so that it can also be longer.
        no_limit = {} if time_limit is None else {"time_limit": math.inf}
        self._suite = suite.load(domain, name, task_kwargs={"random": 0, **no_limit})
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
        """Start an episode; ``seed`` seeds the task."""
        super().reset(seed=seed)
        if seed is not None:
            # The public way to seed a task is to load it again, which compiles its model again.
            self._suite.task._random = np.random.RandomState(seed)
        self._steps = 0
        return self._observe(self._suite.reset()), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take ``action`` for ``action_repeat`` environment steps, or until the episode ends."""
        total = 0.0
        for _ in range(self._action_repeat):
            timestep = self._suite.step(action)
            total += timestep.reward or 0.0
            self._steps += 1
            over = timestep.last() or self._steps >= self.time_limit
            if over:
                break
        terminated = timestep.last() and timestep.discount == 0
        return self._observe(timestep), total, terminated, over and not terminated, {}

    def render(self) -> np.ndarray:
        """A frame of the scene, uint8 [240, 240, 3]."""
        return self._render(240)

    def close(self) -> None:
        """Free the simulator and its graphics context."""
        self._suite.close()

    def _observe(self, timestep: Any) -> np.ndarray:
        if self._image_size is not None:
            return self._render(self._image_size)
        return np.concatenate([np.ravel(entry) for entry in timestep.observation.values()]).astype(np.float32)

    def _render(self, size: int) -> np.ndarray:
        try:
            return self._suite.physics.render(size, size, camera_id=self._camera).copy()
        except Exception as error:  # Each OpenGL backend raises its own exceptions.
            raise EnvError(f"MuJoCo could not render ({error}). {_CHOOSE_OPENGL}") from error


def make_dmc(task: str, **options: Any) -> DMControl:
    """``dmc:task``: state observations. Options are arguments of :class:`DMControl` but ``image_size``."""
    if "image_size" in options:
        raise ConfigError("dmc: gives state observations; for images of image_size write dmc_vision:.")
    return DMControl(task, **options)


def make_dmc_vision(task: str, **options: Any) -> DMControl:
    """``dmc_vision:task``: image observations. Options are arguments of :class:`DMControl`."""
    return DMControl(task, **{**USUAL["dmc_vision"], **options})


def _import_suite() -> Any:
    """``dm_control.suite``, whose import loads OpenGL, state observations or not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GLFW warns that there is no display; state observations need none.
            from dm_control import suite
    except ModuleNotFoundError:
        raise
    except Exception as error:  # Each OpenGL backend raises its own exceptions.
        chosen = os.environ.get("MUJOCO_GL")
        what = f"MUJOCO_GL={chosen}" if chosen else "the usual OpenGL of this machine"
        raise EnvError(f"dm_control could not start with {what} ({error}). {_CHOOSE_OPENGL}") from error
    return suite


def _resolve(task: str, known: Any) -> tuple[str, str]:
    """The suite's (domain, task) for ``domain_task``; each of the two may itself contain underscores."""
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


def _select_headless_rendering() -> None:
    """Select EGL where there is no display: on import, ``dm_control`` selects an OpenGL that may need one."""
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform == "linux" and not display and not os.environ.get("MUJOCO_GL"):
        os.environ["MUJOCO_GL"] = "egl"
