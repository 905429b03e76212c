"""One door to all environments."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import gymnasium as gym

from worldloom.config import nearest
from worldloom.envs.gym_vector import GymVector
from worldloom.envs.player import InProcess
from worldloom.envs.rows import Backend
from worldloom.envs.vector import VectorEnv
from worldloom.envs.wrappers import ActionRepeat, FrameStack, ResizeImages
from worldloom.errors import ConfigError, MissingDependencyError

EnvLike = str | Callable[..., "gym.Env[Any, Any]"] | gym.Env[Any, Any] | gym.vector.VectorEnv[Any, Any, Any]


class _Suite(NamedTuple):
    """A family of environments with an adapter of its own, ``module:function``, and the package it needs."""

    adapter: str
    package: str
    action_repeat: int
    graphics: bool = False
    """Whether the adapter must be told (``render=True``) when pictures will be asked for."""


SUITES = {
    "dmc": _Suite("worldloom.envs.dmc:make_dmc", "dm_control", 2, graphics=True),
    "dmc_vision": _Suite("worldloom.envs.dmc:make_dmc_vision", "dm_control", 2, graphics=True),
    "atari": _Suite("worldloom.envs.atari:make_atari", "ale_py", 4),
    "atari100k": _Suite("worldloom.envs.atari:make_atari100k", "ale_py", 4),
    "crafter": _Suite("worldloom.envs.crafter:make_crafter", "crafter", 1),
}
"""Prefix of ``prefix:task`` to adapter and usual action repeat."""


def make_env(
    spec: EnvLike,
    num_envs: int = 1,
    *,
    parallel: Literal["sync", "subprocess"] = "sync",
    seed: int = 0,
    action_repeat: int | None = None,
    time_limit: int | None = None,
    image_size: int | None = None,
    frame_stack: int | None = None,
    render: bool = False,
    worker_timeout: float = 60.0,
    **options: Any,
) -> VectorEnv:
    """Make N environments of one kind.

    Args:
      spec: a Gymnasium id (``"Pendulum-v1"``, ``"module:Id"``); a function that returns a new ``gymnasium.Env``;
        ``"dmc:cartpole_swingup"`` (state), ``"dmc_vision:walker_walk"`` (64×64 pixels), ``"atari:pong"`` (96×96 gray,
        sticky), ``"atari100k:pong"`` (64×64 colour), ``"crafter:reward"``; or an object: one ``gymnasium.Env``, or a
        ``gymnasium.vector.VectorEnv`` in any autoreset mode, which is used as it is.
      num_envs: how many; must be 1 for an object.
      parallel: ``"sync"`` steps them in this process; ``"subprocess"`` in one process each, which is worth it when a
        step costs more than about 0.1 ms, and survives their crashes. Functions go there by ``cloudpickle``.
      seed: root of the seeds of all episodes, in [0, 2^63).
      action_repeat: environment steps per action, rewards summed; ``None`` is the suite's usual (dmc 2, atari 4), 1
        for Gymnasium.
      time_limit: environment steps after which an episode is truncated; ``None`` leaves the environment's own. For
        ids and suites it replaces the registered limit, for functions and objects it is added.
      image_size: side to which images are resized, or at which a suite draws them.
      frame_stack: last images stacked channel-first (TD-MPC2 from pixels takes 3).
      render: whether :meth:`VectorEnv.render` will be asked for pictures; functions and objects decide themselves.
      worker_timeout: seconds after which a worker that gives no answer is replaced.
      options: for the function, for ``gymnasium.make``, or for the suite.

    Raises ``ConfigError`` for what does not fit together or is not supported, ``MissingDependencyError`` when an
    extra is needed, and whatever building the environment raises.
    """
    _check(num_envs, parallel, action_repeat, time_limit, image_size, frame_stack)
    if isinstance(spec, gym.vector.VectorEnv):
        _refuse_changes(spec, parallel, num_envs, action_repeat, time_limit, image_size, frame_stack, options)
        return VectorEnv(GymVector(spec), seed=seed, settings={"spec": spec, "seed": seed})
    if isinstance(spec, gym.Env) and (num_envs != 1 or parallel != "sync" or options):
        raise ConfigError(
            "A gymnasium.Env object is one environment in this process, already configured; give make_env its id or "
            "a function that returns a new one for more environments, workers or options."
        )

    limits = {
        "action_repeat": action_repeat,
        "time_limit": time_limit,
        "image_size": image_size,
        "frame_stack": frame_stack,
        "worker_timeout": worker_timeout,
    }

    def make(count: int, root: int, pictures: bool) -> VectorEnv:
        shape = _Shape(action_repeat, time_limit, image_size, frame_stack, pictures)
        build, repeat = _builder(spec, shape, options)
        backend: Backend
        if parallel == "subprocess":
            from worldloom.envs.workers import Workers  # What only the parent needs stays out of the workers.

            backend = Workers(build, count, timeout=worker_timeout)
        else:
            backend = InProcess(build, count)
        remake = None if isinstance(spec, gym.Env) else make
        settings = {"spec": spec, "num_envs": count, "parallel": parallel, "seed": root, **limits, **options}
        try:
            return VectorEnv(backend, seed=root, action_repeat=repeat, remake=remake, settings=settings)
        except BaseException:
            backend.close()
            raise

    return make(num_envs, seed, render)


def is_env(value: Any) -> bool:
    """Whether ``value`` is something to make an environment of, or a :class:`VectorEnv`."""
    return isinstance(value, str | gym.Env | gym.vector.VectorEnv | VectorEnv) or callable(value)


class _Shape(NamedTuple):
    """The arguments of ``make_env`` that shape one environment; ``None`` leaves things as they are."""

    action_repeat: int | None
    time_limit: int | None
    image_size: int | None
    frame_stack: int | None
    render: bool


def _builder(spec: Any, shape: _Shape, options: dict[str, Any]) -> tuple[Callable[[], gym.Env[Any, Any]], int]:
    """A function without arguments that builds one wrapped environment, and its action repeat."""
    prefix, _, task = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if prefix in SUITES and task:
        suite = SUITES[prefix]
        require(suite.package)
        repeat = suite.action_repeat if shape.action_repeat is None else shape.action_repeat
        # Suites repeat and draw themselves: pictures between two decisions would be drawn for nothing.
        size = {} if shape.image_size is None else {"image_size": shape.image_size}
        graphics = {"render": True} if suite.graphics and shape.render else {}
        arguments = {"action_repeat": repeat, "time_limit": shape.time_limit, **size, **graphics, **options}
        base = functools.partial(_call, suite.adapter, task, **arguments)
        return functools.partial(_wrapped, base, 1, None, None, shape.frame_stack), repeat
    repeat = 1 if shape.action_repeat is None else shape.action_repeat
    limit = shape.time_limit
    if isinstance(spec, gym.Env):
        base = functools.partial(_itself, spec)
    elif callable(spec):
        base = functools.partial(spec, **options)
    elif isinstance(spec, str):
        # The limit replaces the registered one, so that it can be longer too.
        pictures = {"render_mode": "rgb_array"} if shape.render else {}
        base = functools.partial(_gym_make, _registered(spec), limit, {**pictures, **options})
        limit = None
    else:
        raise ConfigError(f"An environment is an id, a function or a Gymnasium object, not {type(spec).__name__}.")
    return functools.partial(_wrapped, base, repeat, limit, shape.image_size, shape.frame_stack), repeat


def _wrapped(
    base: Callable[[], Any], repeat: int, time_limit: int | None, image_size: int | None, frame_stack: int | None
) -> gym.Env[Any, Any]:
    env = base()
    if not isinstance(env, gym.Env):
        raise ConfigError(f"The function given to make_env returned a {type(env).__name__}; a gymnasium.Env is needed.")
    if time_limit is not None:
        env = gym.wrappers.TimeLimit(env, time_limit)
    if repeat > 1:
        env = ActionRepeat(env, repeat)
    if image_size is not None:
        env = ResizeImages(env, image_size)
    if frame_stack is not None:
        env = FrameStack(env, frame_stack)
    return env


def _registered(name: str) -> Any:
    """The ``EnvSpec`` of an id, so that workers need not know what was registered here."""
    module, _, plain = name.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module.partition(".")[0]:
                raise
            raise ConfigError(
                f"'{name}' names neither a suite ({', '.join(SUITES)}) nor a module that can be imported."
                f"{nearest(module, SUITES)}"
            ) from None
    try:
        return gym.spec(plain)
    except gym.error.Error as error:
        raise ConfigError(f"{error} ({name!r} was given to make_env; 'module:id' imports a module first.)") from error


def _gym_make(spec: Any, time_limit: int | None, options: dict[str, Any]) -> gym.Env[Any, Any]:
    # Gymnasium's checker warns of float64 observations and the like, which are converted here.
    return gym.make(spec, max_episode_steps=time_limit, disable_env_checker=True, **options)


def _call(adapter: str, task: str, **arguments: Any) -> gym.Env[Any, Any]:
    """Import late: adapters pull in simulators, in a worker only there."""
    module, function = adapter.split(":")
    return getattr(importlib.import_module(module), function)(task, **arguments)


def _itself(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    return env


def require(package: str) -> None:
    """Raise ``MissingDependencyError`` naming the extra ``envs`` unless ``package`` can be imported."""
    if importlib.util.find_spec(package) is None:
        raise MissingDependencyError(
            f"This environment needs the package '{package}', which is not installed; pip install 'worldloom[envs]'."
        )


def _check(num_envs: int, parallel: str, *limits: int | None) -> None:
    if not isinstance(num_envs, int) or num_envs < 1:
        raise ConfigError(f"num_envs must be an integer ≥ 1, not {num_envs!r}.")
    if parallel not in ("sync", "subprocess"):
        raise ConfigError(f"parallel must be 'sync' or 'subprocess', not {parallel!r}.")
    for name, value in zip(("action_repeat", "time_limit", "image_size", "frame_stack"), limits, strict=True):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name} must be an integer ≥ 1 or None, not {value!r}.")


def _refuse_changes(spec: Any, parallel: str, num_envs: int, *changes: Any) -> None:
    if parallel != "sync" or num_envs not in (1, spec.num_envs) or any(changes):
        raise ConfigError(
            f"A Gymnasium vector environment is used as it is, with its {spec.num_envs} environments; put action "
            "repeat, time limits and sizes into it, or give make_env an id or a function."
        )
