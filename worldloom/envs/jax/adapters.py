"""Environments of other JAX packages as :class:`JaxEnv`, recognised by their methods: none of them is imported here.

All are stepped *without* their automatic reset, so that the last observation of an episode is seen and a time limit is
no termination.

================  ========================================================================================
package           what is different about it
================  ========================================================================================
gymnax, craftax   ``step`` resets by itself: ``step_env`` and ``reset_env`` are called. Up to gymnax 0.0.9, and in
                  craftax, ``done`` includes the time limit; since 1.0, ``is_truncated`` tells it apart.
brax, playground  ``done`` knows no time limit; their wrappers reset to a cached first state and lose the last
                  observation: the environment underneath is stepped.
navix             ``step`` resets in the step after: ``_step`` is called. ``step_type`` 1 is the time limit, 2 an end.
jumanji           ``step_type`` 2 is the end of an episode, a time limit where ``discount`` is not 0. Of several
                  agents, rewards are summed, and the end is one once all discounts are 0.
================  ========================================================================================

Wrappers of one's own are kept. Those of the packages that reset, count or batch are taken off where they are on top.

Observations that are no pictures become float32 vectors; dicts and tuples of them a dict of vectors. Actions with
bounds are scaled to [−1, 1], several discrete actions become one choice of their combinations.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from worldloom.config import check, nearest
from worldloom.envs.jax.protocol import JaxEnv, takes
from worldloom.errors import ConfigError
from worldloom.spaces.actions import LARGEST_BOUND

_SMALLEST_PICTURE = 32
"""Side in pixels below which an array of three axes is a grid of numbers, not a picture."""
_UNLIMITED = 2**30
_TAKEN_OFF = (
    *("AutoResetWrapper", "BraxAutoResetWrapper", "EpisodeWrapper", "EvalWrapper", "VmapWrapper"),  # brax, playground
    "VmapAutoResetWrapper",  # jumanji, which has three of the others too
    *("LogWrapper", "FlattenObservationWrapper"),  # gymnax
)
"""Wrappers of the packages that do what is done outside of an adapted environment."""
_BATCHED = ("DomainRandomizationVmapWrapper", "BraxDomainRandomizationVmapWrapper", "MadronaWrapper")
"""Wrappers without which the environment would be another one, and which step several at a time."""


def adapt(env: Any, params: Any = None, *, time_limit: int | None = None) -> JaxEnv:
    """An environment of gymnax, craftax, brax, MuJoCo Playground, navix or jumanji as a :class:`JaxEnv`.

    Args:
      env: the environment. Of its wrappers, those of its package that reset it, count steps or step several at once
        are taken off; an ``EpisodeWrapper`` of brax leaves its ``episode_length`` as the time limit.
      params: parameters of a gymnax or craftax environment; None means its ``default_params``.
      time_limit: steps after which an episode is truncated in place of the environment's own limit, if it has one.

    Raises ``ConfigError`` for other objects, for wrappers that would be lost, and for actions that cannot be scaled.
    """
    adapter = _adapter_of(env)
    if adapter is GymnaxAdapter:
        return GymnaxAdapter(env, params, time_limit)
    if adapter is not None:
        return adapter(env, time_limit)
    raise ConfigError(
        f"A {type(env).__name__} is no environment of gymnax, craftax, brax, MuJoCo Playground, navix or jumanji. An "
        "object of your own needs the methods and attributes of worldloom.envs.jax.JaxEnv."
    )


def is_adaptable(env: Any) -> bool:
    """Whether :func:`adapt` knows the kind of object that ``env`` is."""
    return not isinstance(env, type) and _adapter_of(env) is not None


def _adapter_of(env: Any) -> Any:
    has = lambda *names: all(hasattr(env, name) for name in names)  # noqa: E731
    if has("step_env", "reset_env"):
        return GymnaxAdapter
    if has("termination_fn", "transitions_fn"):
        return NavixAdapter
    if not has("reset", "step") or not takes(env.reset, 1):
        return None  # Environments of dm_env have specs too, and reset without a key.
    if has("action_spec", "observation_spec"):
        return JumanjiAdapter
    return BraxAdapter if has("action_size") else None


# ---- wrappers ------------------------------------------------------------------------------------------------------


def _inner(env: Any) -> Any:
    """What the wrapper ``env`` wraps; None if it is none."""
    own = getattr(env, "__dict__", {})
    return next((own[n] for n in ("env", "_env") if hasattr(own.get(n), "step")), None)


def _take_off(env: Any) -> tuple[Any, list[Any]]:
    """The environment below the wrappers in ``_TAKEN_OFF`` that are on top of it, and these wrappers.

    Raises ``ConfigError`` if there are more of them under another wrapper, which would see another environment.
    """
    wrappers = []
    while type(env).__name__ in _TAKEN_OFF and _inner(env) is not None:
        wrappers.append(env)
        env = _inner(env)
    layer = env
    while layer is not None:
        kinds = [each.__name__ for each in type(layer).__mro__ if each.__name__ in (*_TAKEN_OFF, *_BATCHED)]
        where = "" if layer is env else f" under {type(env).__name__}"
        check(
            not kinds or _inner(layer) is None,
            f"{type(layer).__name__}{where} cannot be taken off, and environments are stepped one by one, without "
            "resets: give adapt the environment with wrappers of your own alone.",
        )
        layer = _inner(layer)
    return env, wrappers


def _check_changed(env: Any, replaced: str, called: str) -> None:
    """Raise ``ConfigError`` if ``env``, or a wrapper in it, changes the method ``replaced``: ``called`` is used."""
    depth = lambda layer, name: next(  # noqa: E731
        (i for i, each in enumerate(type(layer).__mro__) if name in vars(each)), math.inf
    )
    layer = env
    while layer is not None:
        check(
            depth(layer, replaced) >= depth(layer, called),
            f"{type(layer).__name__} changes {replaced}, which resets by itself, so that {called} is called in its "
            f"place: change {called}, or give adapt the environment without it.",
        )
        layer = _inner(layer) if depth(layer, called) == math.inf else None


# ---- the adapters --------------------------------------------------------------------------------------------------


class _Adapter:
    """Shapes and actions, which all adapters have."""

    obs_shape: Any
    action_dim: int
    action_type: str
    time_limit: int | None

    def __init__(self, env: Any, time_limit: int | None):
        self.env, self.time_limit = env, time_limit

    def _observe(self, obs: Any) -> Any:
        """An observation as a picture, a float32 vector, or a dict of these."""
        if hasattr(obs, "_asdict"):
            obs = obs._asdict()
        elif hasattr(obs, "__dataclass_fields__"):
            obs = {name: getattr(obs, name) for name in obs.__dataclass_fields__}
        if not isinstance(obs, Mapping):
            return _flat(obs)
        found = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(dict(obs)):
            found["/".join(_name(entry) for entry in path)] = _flat(leaf)
        return found

    def _finish(self) -> None:
        """Set ``obs_shape`` from what ``reset`` returns."""
        obs = jax.eval_shape(lambda key: self.reset(key)[1], jax.eval_shape(jax.random.key, 0))
        self.obs_shape = {k: v.shape for k, v in obs.items()} if isinstance(obs, Mapping) else obs.shape

    def _use_actions(self, shape: tuple[int, ...], low: Any, high: Any) -> None:
        """Continuous actions of ``shape`` between bounds. Raises ``ConfigError`` for bounds that are none."""
        low, high = (np.broadcast_to(np.asarray(bound, np.float64), shape) for bound in (low, high))
        if not (np.abs(low) <= LARGEST_BOUND).all() or not (np.abs(high) <= LARGEST_BOUND).all():
            raise ConfigError(f"Actions between {low.min():g} and {high.max():g} cannot be scaled to [-1, 1].")
        self.action_type, self.action_dim = "continuous", math.prod(shape)
        self._low, self._span, self._shape = low.astype(np.float32), (high - low).astype(np.float32), shape

    def _use_choices(self, counts: tuple[int, ...] | None, count: int = 0) -> None:
        """Discrete actions: one of ``count``, or the combinations of several with ``counts`` choices."""
        self._counts = counts
        self.action_type, self.action_dim = "discrete", math.prod(counts) if counts else int(count)

    def _native(self, action: jax.Array) -> Any:
        """An action in [−1, 1], or a class, as the environment takes it."""
        if self.action_type == "continuous":
            unit = jnp.clip(action, -1.0, 1.0).reshape(self._shape)
            return self._low + (unit + 1) / 2 * self._span
        if self._counts is None:
            return action
        return jnp.stack(jnp.unravel_index(action, self._counts)).astype(jnp.int32)

    def reset(self, key: jax.Array) -> tuple[Any, Any]:
        """See :class:`JaxEnv`."""
        raise NotImplementedError


class GymnaxAdapter(_Adapter):
    """gymnax of any version, and craftax."""

    def __init__(self, env: Any, params: Any = None, time_limit: int | None = None):
        env, _ = _take_off(env)
        _check_changed(env, "step", "step_env")
        _check_changed(env, "reset", "reset_env")
        super().__init__(env, time_limit)
        self.params = env.default_params if params is None else params
        names = [n for n in ("max_steps_in_episode", "max_timesteps") if hasattr(self.params, n)]
        self._limit_name = names[0] if names else None
        if self._limit_name and time_limit is not None:
            self.params = self.params.replace(**{self._limit_name: time_limit})
        elif self._limit_name:
            limit = getattr(self.params, self._limit_name)
            self.time_limit = int(limit) if limit < _UNLIMITED else None
        space = env.action_space(self.params)
        if hasattr(space, "n"):
            self._use_choices(None, space.n)
        else:
            self._use_actions(tuple(space.shape), space.low, space.high)
        self._finish()

    def reset(self, key: jax.Array) -> tuple[Any, Any]:
        """See :class:`JaxEnv`."""
        obs, state = self.env.reset_env(key, self.params)
        return _arrays(state), self._observe(obs)

    def step(self, key: jax.Array, state: Any, action: jax.Array) -> tuple[Any, ...]:
        """See :class:`JaxEnv`."""
        obs, state, reward, done, info = self.env.step_env(key, state, self._native(action), self.params)
        done = jnp.asarray(done, bool)
        if hasattr(self.env, "is_truncated"):  # gymnax 1: `done` is the termination alone
            terminated, truncated = done, jnp.asarray(self.env.is_truncated(state, self.params), bool)
        elif self._limit_name:
            # Over even without the limit: a termination. The limit itself is that of whoever steps the environment.
            unlimited = self.params.replace(**{self._limit_name: _UNLIMITED})
            terminated = done & jnp.asarray(self.env.is_terminal(state, unlimited), bool)
            truncated = done & ~terminated
        else:
            terminated, truncated = done, jnp.zeros_like(done)
        return _arrays(state), self._observe(obs), jnp.asarray(reward, jnp.float32), terminated, truncated, dict(info)


class BraxAdapter(_Adapter):
    """brax and MuJoCo Playground."""

    def __init__(self, env: Any, time_limit: int | None = None):
        env, wrappers = _take_off(env)
        for wrapper in wrappers:
            repeat = vars(wrapper).get("action_repeat", 1)
            check(
                repeat == 1,
                f"{type(wrapper).__name__} repeats each action {repeat} times: give adapt the environment without it, "
                f"and make_env action_repeat={repeat}.",
            )
            limit = vars(wrapper).get("episode_length")
            time_limit = int(limit) if time_limit is None and limit is not None else time_limit
        super().__init__(env, time_limit)
        self._use_actions((int(env.action_size),), -1.0, 1.0)
        self._finish()

    def reset(self, key: jax.Array) -> tuple[Any, Any]:
        """See :class:`JaxEnv`."""
        state = self.env.reset(key)
        return _arrays(state), self._observe(state.obs)

    def step(self, key: jax.Array, state: Any, action: jax.Array) -> tuple[Any, ...]:
        """See :class:`JaxEnv`; these environments keep their own keys."""
        after = self.env.step(state, self._native(action))
        # A step may return other dtypes than the reset did, such as int32 for a float that is 0.
        after = jax.tree.map(lambda new, old: jnp.asarray(new, jnp.asarray(old).dtype), after, state)
        over = jnp.asarray(after.done, jnp.float32) > 0.5
        reward = jnp.asarray(after.reward, jnp.float32)
        return after, self._observe(after.obs), reward, over, jnp.zeros_like(over), dict(after.metrics)


class NavixAdapter(_Adapter):
    """navix: the state is its time step."""

    def __init__(self, env: Any, time_limit: int | None = None):
        _check_changed(env, "step", "_step")
        if time_limit is not None:
            env = env.replace(max_steps=time_limit)
        super().__init__(env, int(env.max_steps))
        self._use_choices(None, len(env.action_set))
        self._finish()

    def reset(self, key: jax.Array) -> tuple[Any, Any]:
        """See :class:`JaxEnv`."""
        state = _arrays(self.env.reset(key))
        return state, self._observe(state.observation)

    def step(self, key: jax.Array, state: Any, action: jax.Array) -> tuple[Any, ...]:
        """See :class:`JaxEnv`."""
        state = state.replace(state=state.state.replace(key=key))
        after = self.env._step(state, action)
        after = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), after, state)
        terminated, truncated = after.step_type == 2, after.step_type == 1
        return (
            after,
            self._observe(after.observation),
            jnp.asarray(after.reward, jnp.float32),
            terminated,
            truncated,
            {},
        )


class JumanjiAdapter(_Adapter):
    """jumanji."""

    def __init__(self, env: Any, time_limit: int | None = None):
        env, _ = _take_off(env)
        limit = getattr(env, "time_limit", None) if time_limit is None else time_limit
        super().__init__(env, limit if isinstance(limit, int) else None)
        spec = env.action_spec() if callable(env.action_spec) else env.action_spec
        if hasattr(spec, "num_values"):
            counts = np.asarray(spec.num_values)
            self._use_choices(tuple(int(n) for n in counts.ravel()) if counts.ndim else None, int(counts.ravel()[0]))
        else:
            self._use_actions(tuple(spec.shape), spec.minimum, spec.maximum)
        self._finish()

    def reset(self, key: jax.Array) -> tuple[Any, Any]:
        """See :class:`JaxEnv`."""
        state, time_step = self.env.reset(key)
        return _arrays(state), self._observe(time_step.observation)

    def step(self, key: jax.Array, state: Any, action: jax.Array) -> tuple[Any, ...]:
        """See :class:`JaxEnv`."""
        after, time_step = self.env.step(state, self._native(action))
        after = jax.tree.map(lambda new, old: jnp.asarray(new, jnp.asarray(old).dtype), after, state)
        over, ended = time_step.step_type == 2, jnp.all(time_step.discount == 0)
        reward = jnp.asarray(time_step.reward, jnp.float32).sum()
        return after, self._observe(time_step.observation), reward, over & ended, over & ~ended, dict(time_step.extras)


# ---- by name -------------------------------------------------------------------------------------------------------


def make_gymnax(name: str, **params: Any) -> JaxEnv:
    """``gymnax:CartPole-v1``; options are fields of its ``EnvParams``."""
    package = importlib.import_module("gymnax")
    _check_name("gymnax", name, package.registered_envs)
    env, defaults = package.make(name)
    return adapt(env, _replaced(f"gymnax:{name}", defaults, params))


def make_craftax(name: str, **params: Any) -> JaxEnv:
    """``craftax:Classic-Symbolic``, ``craftax:Classic-Pixels``, ``craftax:Symbolic``, ``craftax:Pixels``."""
    _check_name("craftax", name, ("Classic-Symbolic", "Classic-Pixels", "Symbolic", "Pixels"))
    make = importlib.import_module("craftax.craftax_env").make_craftax_env_from_name
    env = make(f"Craftax-{name}-v1", auto_reset=False)
    return adapt(env, _replaced(f"craftax:{name}", env.default_params, params))


def make_brax(name: str, *, episode_length: int = 1000, **options: Any) -> JaxEnv:
    """``brax:ant``; options go to the environment. Episodes last 1,000 steps, as with brax's own wrapper."""
    envs = importlib.import_module("brax.envs")
    _check_name("brax", name, getattr(envs, "_envs", {}))
    return adapt(envs.get_environment(name, **options), time_limit=episode_length)


def make_playground(name: str, **options: Any) -> JaxEnv:
    """``playground:CartpoleBalance``; options are fields of its config. Episodes last its ``episode_length``."""
    registry = importlib.import_module("mujoco_playground").registry
    _check_name("playground", name, registry.ALL_ENVS)
    config = registry.get_default_config(name)
    unknown = [option for option in options if option not in config]
    if unknown:
        raise ConfigError(f"playground:{name} has no option {', '.join(unknown)}.{nearest(unknown[0], list(config))}")
    config.update(options)
    return adapt(registry.load(name, config), time_limit=int(config.episode_length))


def make_navix(name: str, **options: Any) -> JaxEnv:
    """``navix:Navix-Empty-8x8-v0``; options go to ``navix.make``."""
    package = importlib.import_module("navix")
    _check_name("navix", name, package.registry())
    return adapt(package.make(name, **options))


def make_jumanji(name: str, **options: Any) -> JaxEnv:
    """``jumanji:Snake-v1``; options go to the environment."""
    package = importlib.import_module("jumanji")
    _check_name("jumanji", name, package.registered_environments())
    return adapt(package.make(name, **options))


def _check_name(prefix: str, name: str, known: Any) -> None:
    """Raise ``ConfigError`` for a name that the package does not list."""
    names = [str(each) for each in known]
    if names and name not in names:
        some = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        raise ConfigError(f"'{prefix}:{name}' is no environment of {prefix}, which has {some}.{nearest(name, names)}")


def _replaced(spec: str, params: Any, changes: Mapping[str, Any]) -> Any:
    unknown = [name for name in changes if not hasattr(params, name)]
    if unknown:
        fields = list(getattr(params, "__dataclass_fields__", {}))
        raise ConfigError(f"{spec} has no option {', '.join(unknown)}.{nearest(unknown[0], fields)}")
    return params.replace(**changes) if changes else params


def _flat(value: Any) -> jax.Array:
    """A picture as uint8 [H, W, C]; anything else as a float32 vector."""
    value = jnp.asarray(value)
    picture = value.ndim == 3 and min(value.shape[:2]) >= _SMALLEST_PICTURE and value.shape[2] in (1, 3, 4)
    if not picture:
        return value.astype(jnp.float32).reshape(-1)
    return value if value.dtype == jnp.uint8 else jnp.round(255 * jnp.clip(value, 0.0, 1.0)).astype(jnp.uint8)


def _arrays(state: Any) -> Any:
    """A state in which numbers of Python are arrays, as a compiled step returns it."""
    return jax.tree.map(jnp.asarray, state)


def _name(entry: Any) -> str:
    """An entry of a path in a tree: key, index or attribute."""
    return str(next(getattr(entry, each) for each in ("key", "name", "idx") if hasattr(entry, each)))
