"""``make_env``: the one constructor of environments."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import gymnasium as gym

from worldloom.config import as_integer, check, is_number, nearest
from worldloom.envs.backends.base import Backend
from worldloom.envs.backends.gym_vector import GymVectorBackend
from worldloom.envs.backends.sync import SyncBackend
from worldloom.envs.hints import JAX_ENV, about_object, install_line, suggestion
from worldloom.envs.options import check_gym_options, check_options
from worldloom.envs.vector import VectorEnv
from worldloom.envs.wrappers import ActionRepeat, BoundActions, DropKeys, FrameStack, JoinActions, ResizeImages
from worldloom.errors import ConfigError, MissingDependencyError
from worldloom.spaces.narrow import check_action_bounds, check_drop_keys

EnvLike = str | Callable[..., "gym.Env[Any, Any]"] | gym.Env[Any, Any] | gym.vector.VectorEnv[Any, Any, Any]


class _Suite(NamedTuple):
    """A suite of environments with its own adapter.

    Attributes:
      adapter: ``module:function``, called with the task and options; returns a ``gymnasium.Env``.
      package: what the adapter imports.
      action_repeat: the suite's usual action repeat.
      render_option: whether the adapter must be given ``render=True`` where frames will be rendered.
    """

    adapter: str
    package: str
    action_repeat: int
    render_option: bool = False


SUITES = {
    "dmc": _Suite("worldloom.envs.suites.dmc:make_dmc", "dm_control", 2, render_option=True),
    "dmc_vision": _Suite("worldloom.envs.suites.dmc:make_dmc_vision", "dm_control", 2, render_option=True),
    "atari": _Suite("worldloom.envs.suites.atari:make_atari", "ale_py", 4),
    "atari100k": _Suite("worldloom.envs.suites.atari:make_atari100k", "ale_py", 4),
    "crafter": _Suite("worldloom.envs.suites.crafter:make_crafter", "crafter", 1),
}
"""Suites by the prefix of ``prefix:task``."""

JAX_SUITES = {
    "jax": "jax",
    "gymnax": "gymnax",
    "craftax": "craftax",
    "brax": "brax",
    "playground": "mujoco_playground",
    "navix": "navix",
    "jumanji": "jumanji",
}
"""Packages of environments in JAX by the prefix of ``prefix:name``; see :mod:`worldloom.envs.jax`."""


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
    action_bounds: tuple[float, float] | None = None,
    drop_keys: Sequence[str] | None = None,
    join_actions: bool | None = None,
    on_bad_step: Literal["stop", "restart"] | None = None,
    render: bool = False,
    worker_timeout: float = 60.0,
    **options: Any,
) -> VectorEnv:
    """Make N environments of one kind.

    Args:
      spec: a Gymnasium id (``"Pendulum-v1"``, ``"module:Id"``); a function that returns a new ``gymnasium.Env``;
        ``"dmc:cartpole_swingup"`` (state), ``"dmc_vision:walker_walk"`` (64×64 pixels), ``"atari:pong"`` (96×96 gray,
        sticky), ``"atari100k:pong"`` (64×64 colour), ``"crafter:reward"``; environments in JAX, all N of which one
        compiled call steps: ``"jax:Pendulum-v1"``, ``"gymnax:CartPole-v1"``, ``"craftax:Classic-Symbolic"``, …; or an
        object: one ``gymnasium.Env``, a ``gymnasium.vector.VectorEnv`` in any autoreset mode, which is used as it is,
        or a :class:`worldloom.envs.jax.JaxEnv`.
      num_envs: N, at least 1; must be 1 for a ``gymnasium.Env`` object.
      parallel: ``"sync"`` steps them in this process; ``"subprocess"`` steps each in its own process, which pays off
        when a step takes more than about 0.1 ms, and survives their crashes. Functions are sent by ``cloudpickle``.
      seed: root of the seeds of all episodes, in [0, 2^63).
      action_repeat: environment steps per action, rewards summed; ``None`` is the suite's usual (dmc 2, atari 4), 1
        for Gymnasium.
      time_limit: environment steps after which an episode is truncated; ``None`` keeps the environment's own limit. For
        ids and suites it replaces that limit, for functions and objects it is an additional one.
      image_size: side of the images in pixels: Gymnasium environments are resized, suites render at this size.
      frame_stack: number of last images stacked channel-first (TD-MPC2 from pixels uses 3).
      action_bounds: ``(low, high)``: continuous actions are scaled to what of their bounds lies between; needed where
        an environment declares no bounds, only one, or more than ±10⁶.
      drop_keys: names of observations to leave out, ``"robot/arm"`` or ``"robot"`` for all in it; texts, for instance.
      join_actions: whether several actions become one: continuous ones side by side, discrete ones as one choice of
        their combinations. For models that take one action, such as TD-MPC2.
      on_bad_step: what a step that returns NaN or infinity does: ``"stop"``, the default, raises ``DataError``;
        ``"restart"`` closes its episode as truncated, without that step's values, and begins the next.
      render: whether :meth:`VectorEnv.render` will be called; functions and objects must enable rendering themselves.
      worker_timeout: seconds after which a worker that does not answer is replaced.
      options: passed to the function, to ``gymnasium.make``, or to the suite.

    Raises ``ConfigError`` for arguments that are invalid, unsupported or do not fit together,
    ``MissingDependencyError`` when an extra is needed, and whatever building the environment raises.
    """
    if parallel not in ("sync", "subprocess"):
        raise ConfigError(f"parallel must be 'sync' or 'subprocess', not {parallel!r}.")
    num_envs = as_integer("num_envs", num_envs)
    action_repeat, time_limit, image_size, frame_stack = (
        None if value is None else as_integer(name, value)
        for name, value in zip(_COUNTS, (action_repeat, time_limit, image_size, frame_stack), strict=True)
    )
    check(
        is_number(worker_timeout) and worker_timeout > 0,
        f"worker_timeout must be seconds above 0, not {worker_timeout!r}.",
    )
    check(on_bad_step in (None, "stop", "restart"), f"on_bad_step must be 'stop' or 'restart', not {on_bad_step!r}.")
    bounds, dropped = check_action_bounds(action_bounds), check_drop_keys(drop_keys)
    check(join_actions in (None, True, False), f"join_actions must be True or False, not {join_actions!r}.")
    translation = {"action_bounds": bounds, "drop_keys": dropped or None, "join_actions": join_actions or None}
    if isinstance(spec, gym.vector.VectorEnv):
        _check_unchanged(spec, parallel, num_envs, action_repeat, time_limit, image_size, frame_stack, options)
        check(
            on_bad_step != "restart",
            "on_bad_step='restart' is for environments that make_env builds itself: those of a Gymnasium vector "
            "environment cannot be restarted one by one. Give make_env an id or a function.",
        )
        backend = GymVectorBackend(spec, action_bounds=bounds, drop_keys=dropped, join_actions=bool(join_actions))
        return VectorEnv(backend, seed=seed, settings={"spec": spec, "seed": seed, **translation})
    in_jax = is_jax_env(spec) or (isinstance(spec, str) and _is_of(JAX_SUITES, spec))
    if in_jax:
        _check_for_jax(parallel, image_size, frame_stack, translation, {} if isinstance(spec, str) else options)
    if isinstance(spec, gym.Env) and (num_envs != 1 or parallel != "sync" or options):
        raise ConfigError(
            "A gymnasium.Env object is one environment in this process, already configured; give make_env its id or "
            "a function that returns a new one for more environments, workers or options."
        )

    per_env = {
        "action_repeat": action_repeat,
        "time_limit": time_limit,
        "image_size": image_size,
        "frame_stack": frame_stack,
        **translation,
        "on_bad_step": None if on_bad_step == "stop" else on_bad_step,
        "worker_timeout": worker_timeout,
    }

    def make(num_envs: int, seed: int, render: bool) -> VectorEnv:
        changes = _Changes(
            action_repeat, time_limit, image_size, frame_stack, bounds, dropped, bool(join_actions), render
        )
        backend: Backend
        repeat = action_repeat or 1
        if in_jax:
            backend = _jax_backend(spec, num_envs, repeat, time_limit, render, options)
        elif parallel == "subprocess":
            # Workers import this module too; they need neither the backend nor cloudpickle.
            from worldloom.envs.backends.subproc import SubprocBackend

            build, repeat = _builder(spec, changes, options)
            backend = SubprocBackend(build, num_envs, timeout=worker_timeout)
        else:
            build, repeat = _builder(spec, changes, options)
            backend = SyncBackend(build, num_envs)
        remake = None if isinstance(spec, gym.Env) else make
        settings = {"spec": spec, "num_envs": num_envs, "parallel": parallel, "seed": seed, **per_env, **options}
        try:
            return VectorEnv(
                backend,
                seed=seed,
                action_repeat=repeat,
                restart_bad=on_bad_step == "restart",
                remake=remake,
                settings=settings,
            )
        except BaseException:
            backend.close()
            raise

    return make(num_envs, seed, render)


def usual_options(spec: Any) -> dict[str, Any]:
    """The options that a suite takes unless others are given; empty for other environments."""
    return {name: value for name, value in _suite_options(spec).items() if value is not None}


def _suite_options(spec: Any) -> dict[str, Any]:
    """All options of a suite, with the usual values of those that have one; empty if it does not say."""
    prefix = spec.partition(":")[0] if isinstance(spec, str) else ""
    if prefix not in SUITES:
        return {}
    module = importlib.import_module(SUITES[prefix].adapter.partition(":")[0])
    return dict(getattr(module, "USUAL", {}).get(prefix, {}))


def effective_defaults(env: VectorEnv) -> dict[str, Any]:
    """What the arguments of :func:`make_env` that ``env`` was made without came to, and the suite's usual options.

    Empty for environments that were not made from an id.
    """
    spec = env.settings.get("spec")
    if not isinstance(spec, str):
        return {}
    suite = spec.partition(":")[0] in {**SUITES, **JAX_SUITES}
    time_limit = env.time_limit if suite else _gym_spec(spec).max_episode_steps
    found = {"action_repeat": env.action_repeat, "time_limit": time_limit, **usual_options(spec)}
    return {name: value for name, value in found.items() if env.settings.get(name) is None and value is not None}


@functools.cache
def usual_time_limit(spec: str) -> int | None:
    """Environment steps after which an episode of ``spec`` is truncated unless another limit is given, or None."""
    if spec.partition(":")[0] not in {**SUITES, **JAX_SUITES}:
        return _gym_spec(spec).max_episode_steps
    with make_env(spec) as env:  # Suites say so once the task is made.
        return env.time_limit


def is_env(value: Any) -> bool:
    """Whether ``value`` can be given to :func:`make_env` as ``spec``, or is a :class:`VectorEnv` already."""
    return isinstance(value, str | gym.Env | gym.vector.VectorEnv | VectorEnv) or callable(value) or is_jax_env(value)


def is_jax_env(value: Any) -> bool:
    """Whether ``value`` has what :class:`worldloom.envs.jax.JaxEnv` says; no class has, only its objects."""
    return not isinstance(value, type | VectorEnv) and all(hasattr(value, name) for name in JAX_ENV)


def check_made(env: Any) -> None:
    """Raise ``ConfigError`` unless ``env`` is what :func:`make_env` returns, or describes environments as it does."""
    if not (hasattr(env, "obs_shape") and hasattr(env, "settings")):  # A JAX environment has the former.
        hint = " make_env makes them from it." if is_env(env) else ""
        raise ConfigError(f"Environments as make_env returns them are expected, not {_kind(env)}.{hint}")


def _kind(value: Any) -> str:
    """``value`` in a sentence."""
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of type {type(value).__name__}"


def module_of(spec: str) -> str:
    """The module that making the environment ``spec`` imports first, as ``module:Id`` says; empty for none."""
    return "" if _is_of({**SUITES, **JAX_SUITES}, spec) else spec.rpartition(":")[0]


def require_package(package: str) -> None:
    """Raise ``MissingDependencyError`` naming the extra ``envs`` unless ``package`` can be imported."""
    if importlib.util.find_spec(package) is None:
        raise MissingDependencyError(
            f"This environment needs the package '{package}', which is not installed; pip install 'worldloom[envs]'."
        )


def _is_of(suites: Mapping[str, Any], spec: str) -> bool:
    """Whether ``spec`` is ``prefix:task`` of one of these suites."""
    prefix, _, task = spec.partition(":")
    return prefix in suites and bool(task)


def _check_for_jax(
    parallel: str, image_size: Any, frame_stack: Any, translation: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Raise ``ConfigError`` for arguments that change environments of Gymnasium only."""
    given = {"image_size": image_size, "frame_stack": frame_stack, **translation, **options}
    refused = [name for name, value in given.items() if value is not None]
    if parallel != "sync":
        refused.append("parallel")
    check(
        not refused,
        f"{', '.join(refused)}: environments in JAX are stepped as they are, all of them in one compiled call. Put the "
        "change into the environment; options of one with a name go to its constructor.",
    )


def _jax_backend(
    spec: Any, num_envs: int, action_repeat: int, time_limit: int | None, render: bool, options: dict[str, Any]
) -> Backend:
    if isinstance(spec, str):
        package = JAX_SUITES[spec.partition(":")[0]]
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(f"{spec} needs the package '{package}', which is not installed; see its page.")
    # Imported when first used: worker processes need no JAX.
    from worldloom.envs.jax.make import make_backend

    changes: dict[str, Any] = {"action_repeat": action_repeat, "time_limit": time_limit, "render": render}
    return make_backend(spec, num_envs, **changes, options=options)


_COUNTS = ("action_repeat", "time_limit", "image_size", "frame_stack")
"""Arguments of :func:`make_env` that are integers or None."""


class _Changes(NamedTuple):
    """The arguments of ``make_env`` that change a single environment; ``None`` changes nothing."""

    action_repeat: int | None
    time_limit: int | None
    image_size: int | None
    frame_stack: int | None
    action_bounds: tuple[float, float] | None
    drop_keys: tuple[str, ...]
    join_actions: bool
    render: bool


def _builder(spec: Any, changes: _Changes, options: dict[str, Any]) -> tuple[Callable[[], gym.Env[Any, Any]], int]:
    """A function without arguments that builds one wrapped environment, and its action repeat."""
    prefix, _, task = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if prefix in SUITES and task:
        suite = SUITES[prefix]
        require_package(suite.package)
        if known := _suite_options(spec):
            check_options(prefix, {name: known[name] for name in known if name not in _COUNTS}, options)
        repeat = suite.action_repeat if changes.action_repeat is None else changes.action_repeat
        # Suites repeat actions and resize images themselves: a wrapper would render frames that nothing uses.
        size = {} if changes.image_size is None else {"image_size": changes.image_size}
        rendering = {"render": True} if suite.render_option and changes.render else {}
        arguments = {"action_repeat": repeat, "time_limit": changes.time_limit, **size, **rendering, **options}
        base = functools.partial(_call_adapter, suite.adapter, task, **arguments)
        return functools.partial(_build, base, changes._replace(image_size=None), 1, None), repeat

    repeat = 1 if changes.action_repeat is None else changes.action_repeat
    limit = changes.time_limit
    if isinstance(spec, gym.Env):
        base = functools.partial(_identity, spec)
    elif callable(spec):
        base = functools.partial(spec, **options)
    elif isinstance(spec, str):
        # The limit replaces the registered one, so that it can also be longer.
        render_mode = {"render_mode": "rgb_array"} if changes.render else {}
        registered = _gym_spec(spec)
        check_gym_options(registered, options)
        base = functools.partial(_gym_make, registered, limit, {**render_mode, **options})
        limit = None
    else:
        raise ConfigError(
            "An environment is an id, a function, an object of Gymnasium or one in JAX, not "
            f"{type(spec).__name__}.{about_object(spec)}"
        )
    return functools.partial(_build, base, changes, repeat, limit), repeat


def _build(base: Callable[[], Any], changes: _Changes, action_repeat: int, time_limit: int | None) -> gym.Env[Any, Any]:
    """The environment that ``base`` returns, in its wrappers; repeat and limit are those not in effect already."""
    env = base()
    if not isinstance(env, gym.Env):
        raise ConfigError(
            f"The function given to make_env returned a {type(env).__name__}; a gymnasium.Env is needed."
            f"{about_object(env)}"
        )
    if missing := [name for name in ("observation_space", "action_space") if getattr(env, name, None) is None]:
        raise ConfigError(f"{type(env).__name__} has no {' and no '.join(missing)}; agents need to know its spaces.")
    if changes.drop_keys:
        env = DropKeys(env, changes.drop_keys)
    if changes.action_bounds is not None:
        env = BoundActions(env, changes.action_bounds)
    if changes.join_actions:
        env = JoinActions(env)
    if time_limit is not None:
        # Inside of ActionRepeat: it counts environment steps.
        env = gym.wrappers.TimeLimit(env, time_limit)
    if action_repeat > 1:
        env = ActionRepeat(env, action_repeat)
    if changes.image_size is not None:
        env = ResizeImages(env, changes.image_size)
    if changes.frame_stack is not None:
        env = FrameStack(env, changes.frame_stack)
    return env


def _gym_spec(name: str) -> Any:
    """The ``EnvSpec`` of ``id`` or ``module:id``, which workers can use without registering the id themselves."""
    module, _, env_id = name.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            # A module that exists but fails to import something else is the user's error to see.
            if error.name != module.partition(".")[0]:
                raise
            raise ConfigError(
                f"'{name}' names neither a suite ({', '.join([*SUITES, *JAX_SUITES])}) nor a module that can be "
                "imported."
                f"{suggestion(module, SUITES) or nearest(module, {**SUITES, **JAX_SUITES})}"
            ) from None
    try:
        return gym.spec(env_id)
    except gym.error.Error as error:
        hint = suggestion(name, SUITES) or " 'module:id' imports a module first."
        about = str(error) if str(error).endswith((".", "?")) else f"{error}."
        raise ConfigError(f"{about} {name!r} was given to make_env.{hint}") from error


def _gym_make(spec: Any, time_limit: int | None, options: dict[str, Any]) -> gym.Env[Any, Any]:
    # Gymnasium's checker warns of float64 observations and the like, which are converted here.
    try:
        return gym.make(spec, max_episode_steps=time_limit, disable_env_checker=True, **options)
    except (gym.error.DependencyNotInstalled, ModuleNotFoundError) as error:
        about = " ".join(str(error).split()).rstrip(".")
        raise MissingDependencyError(
            f"{spec.id} needs a package that is not installed ({about}): {install_line(spec.id, error)}."
        ) from error
    except gym.error.Error as error:
        raise ConfigError(f"{spec.id} cannot be made: {' '.join(str(error).split())}") from error


def _call_adapter(adapter: str, task: str, **arguments: Any) -> gym.Env[Any, Any]:
    """Import the adapter only when an environment is built, because it imports its simulator."""
    module, function = adapter.split(":")
    return getattr(importlib.import_module(module), function)(task, **arguments)


def _identity(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    return env


def _check_unchanged(vector: Any, parallel: str, num_envs: int, *changes: Any) -> None:
    """Raise ``ConfigError`` if arguments ask for changes to a Gymnasium vector environment."""
    if parallel != "sync" or num_envs not in (1, vector.num_envs) or any(changes):
        raise ConfigError(
            f"A Gymnasium vector environment is used as it is, with its {vector.num_envs} environments; put action "
            "repeat, time limits and sizes into it, or give make_env an id or a function."
        )
