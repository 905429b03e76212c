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
jumanji           ``step_type`` 2 is the end of an episode. Most say at their ``time_limit`` that it is a termination:
                  it is moved, and whoever steps the environment truncates. Where there is none, an end with a
                  ``discount`` that is not 0 is a time limit. Of several agents, rewards are summed, and the end is one
                  once all discounts are 0.
================  ========================================================================================

Wrappers of one's own are kept. Those of the packages that reset, count or batch are taken off where they are on top.

Observations that are no pictures become float32 vectors; dicts and tuples of them a dict of vectors. Actions with
bounds are scaled to [−1, 1] (to the nearest integer where they are integers), several discrete actions become one
choice of their combinations. What a reset returns as an integer and a step as a float is a float from the beginning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from worldloom.config import check, is_integer
from worldloom.envs.jax.protocol import JaxEnv, check_arrays, example_action, takes
from worldloom.envs.jax.wrappers import check_changed, ending_after, take_off
from worldloom.errors import ConfigError, EnvContractError
from worldloom.spaces.actions import LARGEST_BOUND

_SMALLEST_PICTURE = 32
"""Side in pixels below which an array of three axes is a grid of numbers, not a picture."""
_UNLIMITED = 2**30
_MOST_CHOICES = 1_000_000
"""Combinations of discrete actions; a model reads each as a vector of that length."""


def adapt(env: Any, params: Any = None, *, time_limit: int | None = None) -> JaxEnv:
    """An environment of gymnax, craftax, brax, MuJoCo Playground, navix or jumanji as a :class:`JaxEnv`.

    Args:
      env: the environment. Of its wrappers, those of its package that reset it, count steps or step several at once
        are taken off; an ``EpisodeWrapper`` of brax leaves its ``episode_length`` as the time limit.
      params: parameters of a gymnax or craftax environment; None means its ``default_params``.
      time_limit: steps after which an episode is truncated in place of the environment's own limit, if it has one.

    Raises ``ConfigError`` for other objects, for wrappers that would be lost, and for actions that cannot be scaled.
    """
    check(not isinstance(env, type), f"adapt takes an environment, not the class {getattr(env, '__name__', env)}.")
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
        if not isinstance(obs, Mapping | tuple | list):
            return _flat(obs)
        found = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(dict(obs) if isinstance(obs, Mapping) else obs):
            found["/".join(_name(entry) for entry in path)] = _flat(leaf)
        return found

    def _finish(self) -> None:
        """Set ``obs_shape`` from what ``reset`` returns, and the dtypes of states where ``step`` returns others."""
        self._settle()
        obs = jax.eval_shape(lambda key: self.reset(key)[1], jax.eval_shape(jax.random.key, 0))
        self.obs_shape = {k: v.shape for k, v in obs.items()} if isinstance(obs, Mapping) else obs.shape

    def _begin(self, key: jax.Array) -> Any:
        """What the environment returns of a new episode."""
        raise NotImplementedError

    def _go_on(self, key: jax.Array, state: Any, action: jax.Array) -> Any:
        """What the environment returns after ``action``."""
        raise NotImplementedError

    def _state_of(self, returned: Any) -> Any:
        """The state in what the environment returns."""
        return returned

    def _settle(self) -> None:
        """Find dtypes that hold a state of ``reset`` and of any ``step``: a 0 may be the first of what are floats.

        Raises ``EnvContractError`` if a step returns a state of another structure.
        """
        key = jax.eval_shape(jax.random.key, 0)
        name, own = type(self.env).__name__, cast(JaxEnv, self)
        begin = lambda key: _arrays(self._state_of(self._begin(key)), f"{name}.reset")  # noqa: E731
        go_on = lambda *given: _arrays(self._state_of(self._go_on(*given)), f"{name}.step")  # noqa: E731
        state, settled = jax.eval_shape(begin, key), False
        while not settled:  # Dtypes only become wider, and one that does may widen others in the next step.
            after = jax.eval_shape(go_on, key, state, example_action(own))
            _check_structure(name, state, after)
            wider = jax.tree.map(_holding, state, after)
            # By leaf: classes of states need not compare by value.
            state, settled = wider, jax.tree.leaves(wider) == jax.tree.leaves(state)
        self._state = state

    def _settled(self, returned: Any) -> Any:
        """The state in what the environment returns, in the dtypes that hold all states."""
        return jax.tree.map(
            lambda new, held: jnp.asarray(new, None if _is_key(held) else held.dtype),
            self._state_of(returned),
            self._state,
        )

    def _use_actions(self, shape: tuple[int, ...], low: Any, high: Any, dtype: Any = np.float32) -> None:
        """Continuous actions of ``shape`` between bounds; integers are rounded to.

        Raises ``ConfigError`` for bounds that are none.
        """
        self._rounded = np.dtype(dtype) if np.issubdtype(dtype, np.integer) else None
        low, high = (np.broadcast_to(np.asarray(bound, np.float64), shape) for bound in (low, high))
        if not (np.abs(low) <= LARGEST_BOUND).all() or not (np.abs(high) <= LARGEST_BOUND).all():
            raise ConfigError(f"Actions between {low.min():g} and {high.max():g} cannot be scaled to [-1, 1].")
        self.action_type, self.action_dim = "continuous", math.prod(shape)
        self._low, self._span, self._shape = low.astype(np.float32), (high - low).astype(np.float32), shape

    def _use_choices(self, counts: tuple[int, ...] | None, count: int = 0) -> None:
        """Discrete actions: one of ``count``, or the combinations of several with ``counts`` choices."""
        self._counts = counts
        if counts and math.prod(counts) > _MOST_CHOICES:
            raise ConfigError(
                f"{type(self.env).__name__} has {len(counts)} discrete actions with {math.prod(counts):,} combinations "
                f"({' × '.join(map(str, counts[:8]))}{' × …' if len(counts) > 8 else ''}), of which a choice cannot be "
                f"learned; up to {_MOST_CHOICES:,} can be one action."
            )
        self.action_type, self.action_dim = "discrete", math.prod(counts) if counts else int(count)

    def _native(self, action: jax.Array) -> Any:
        """An action in [−1, 1], or a class, as the environment takes it."""
        if self.action_type == "continuous":
            unit = jnp.clip(action, -1.0, 1.0).reshape(self._shape)
            scaled = self._low + (unit + 1) / 2 * self._span
            return scaled if self._rounded is None else jnp.round(scaled).astype(self._rounded)
        if self._counts is None:
            return action
        return jnp.stack(jnp.unravel_index(action, self._counts)).astype(jnp.int32)

    def reset(self, key: jax.Array) -> tuple[Any, Any]:
        """See :class:`JaxEnv`."""
        raise NotImplementedError


class GymnaxAdapter(_Adapter):
    """gymnax of any version, and craftax."""

    def __init__(self, env: Any, params: Any = None, time_limit: int | None = None):
        env, _ = take_off(env)
        check_changed(env, "step", "step_env")
        check_changed(env, "reset", "reset_env")
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
            check(
                all(hasattr(space, each) for each in ("shape", "low", "high")),
                f"{type(env).__name__} has actions of the space {type(space).__name__}; Box and Discrete can be used.",
            )
            self._use_actions(tuple(space.shape), space.low, space.high, getattr(space, "dtype", np.float32))
        self._finish()

    def _settle(self) -> None:
        """These environments keep their dtypes, which is checked where they are made."""

    def reset(self, key: jax.Array) -> tuple[Any, Any]:
        """See :class:`JaxEnv`."""
        obs, state = self.env.reset_env(key, self.params)
        return _arrays(state, f"{type(self.env).__name__}.reset_env"), self._observe(obs)

    def step(self, key: jax.Array, state: Any, action: jax.Array) -> tuple[Any, ...]:
        """See :class:`JaxEnv`."""
        obs, state, reward, *ends, info = self.env.step_env(key, state, self._native(action), self.params)
        done = jnp.asarray(ends[0], bool)
        if len(ends) == 2:
            terminated, truncated = done, jnp.asarray(ends[1], bool)
        elif hasattr(self.env, "is_truncated"):  # gymnax 1: `done` is the termination alone
            terminated, truncated = done, jnp.asarray(self.env.is_truncated(state, self.params), bool)
        elif self._limit_name:
            # Over even without the limit: a termination. The limit itself is that of whoever steps the environment.
            unlimited = self.params.replace(**{self._limit_name: _UNLIMITED})
            terminated = done & jnp.asarray(self.env.is_terminal(state, unlimited), bool)
            truncated = done & ~terminated
        else:
            terminated, truncated = done, jnp.zeros_like(done)
        state, reward = _arrays(state, f"{type(self.env).__name__}.step_env"), jnp.asarray(reward, jnp.float32)
        return state, self._observe(obs), reward, terminated, truncated, dict(info or {})


class BraxAdapter(_Adapter):
    """brax and MuJoCo Playground."""

    def __init__(self, env: Any, time_limit: int | None = None):
        env, wrappers = take_off(env)
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

    def _begin(self, key: jax.Array) -> Any:
        return self.env.reset(key)

    def _go_on(self, key: jax.Array, state: Any, action: jax.Array) -> Any:
        return self.env.step(state, self._native(action))

    def reset(self, key: jax.Array) -> tuple[Any, Any]:
        """See :class:`JaxEnv`."""
        state = self._begin(key)
        return self._settled(state), self._observe(state.obs)

    def step(self, key: jax.Array, state: Any, action: jax.Array) -> tuple[Any, ...]:
        """See :class:`JaxEnv`; these environments keep their own keys."""
        after = self._go_on(key, state, action)
        over = jnp.asarray(after.done, jnp.float32) > 0.5
        reward = jnp.asarray(after.reward, jnp.float32)
        return self._settled(after), self._observe(after.obs), reward, over, jnp.zeros_like(over), dict(after.metrics)


class NavixAdapter(_Adapter):
    """navix: the state is its time step."""

    def __init__(self, env: Any, time_limit: int | None = None):
        check_changed(env, "step", "_step")
        if time_limit is not None:
            env = env.replace(max_steps=time_limit)
        super().__init__(env, int(env.max_steps))
        self._use_choices(None, len(env.action_set))
        self._finish()

    def _begin(self, key: jax.Array) -> Any:
        return self.env.reset(key)

    def _go_on(self, key: jax.Array, state: Any, action: jax.Array) -> Any:
        return self.env._step(state.replace(state=state.state.replace(key=key)), action)

    def reset(self, key: jax.Array) -> tuple[Any, Any]:
        """See :class:`JaxEnv`."""
        state = self._begin(key)
        return self._settled(state), self._observe(state.observation)

    def step(self, key: jax.Array, state: Any, action: jax.Array) -> tuple[Any, ...]:
        """See :class:`JaxEnv`."""
        after = self._go_on(key, state, action)
        terminated, truncated = after.step_type == 2, after.step_type == 1
        reward = jnp.asarray(after.reward, jnp.float32)
        return self._settled(after), self._observe(after.observation), reward, terminated, truncated, {}


class JumanjiAdapter(_Adapter):
    """jumanji."""

    def __init__(self, env: Any, time_limit: int | None = None):
        env, _ = take_off(env)
        limit = getattr(env, "time_limit", None) if time_limit is None else time_limit
        limit = int(limit) if limit is not None and is_integer(limit) else None
        super().__init__(env if limit is None else ending_after(env, limit), limit)
        spec = env.action_spec() if callable(env.action_spec) else env.action_spec
        if hasattr(spec, "num_values"):
            counts = np.asarray(spec.num_values)
            self._use_choices(tuple(int(n) for n in counts.ravel()) if counts.ndim else None, int(counts.ravel()[0]))
        else:
            self._use_actions(tuple(spec.shape), spec.minimum, spec.maximum, getattr(spec, "dtype", np.float32))
        self._finish()

    def _begin(self, key: jax.Array) -> Any:
        return self.env.reset(key)

    def _go_on(self, key: jax.Array, state: Any, action: jax.Array) -> Any:
        return self.env.step(state, self._native(action))

    def _state_of(self, returned: Any) -> Any:
        return returned[0]

    def reset(self, key: jax.Array) -> tuple[Any, Any]:
        """See :class:`JaxEnv`."""
        begun = self._begin(key)
        return self._settled(begun), self._observe(begun[1].observation)

    def step(self, key: jax.Array, state: Any, action: jax.Array) -> tuple[Any, ...]:
        """See :class:`JaxEnv`."""
        after = self._go_on(key, state, action)
        time_step = after[1]
        over, ended = time_step.step_type == 2, jnp.all(time_step.discount == 0)
        reward, obs = jnp.asarray(time_step.reward, jnp.float32).sum(), self._observe(time_step.observation)
        return self._settled(after), obs, reward, over & ended, over & ~ended, dict(time_step.extras)


def _flat(value: Any) -> jax.Array:
    """A picture as uint8 [H, W, C]; anything else as a float32 vector."""
    value = jnp.asarray(value)
    picture = value.ndim == 3 and min(value.shape[:2]) >= _SMALLEST_PICTURE and value.shape[2] in (1, 3, 4)
    if not picture:
        return value.astype(jnp.float32).reshape(-1)
    return value if value.dtype == jnp.uint8 else jnp.round(255 * jnp.clip(value, 0.0, 1.0)).astype(jnp.uint8)


def _arrays(state: Any, source: str) -> Any:
    """A state in which numbers of Python are arrays, as a compiled step returns it.

    Raises ``EnvContractError`` naming ``source`` for what cannot be one.
    """
    check_arrays(source, state=state)
    return jax.tree.map(jnp.asarray, state)


def _check_structure(name: str, before: Any, after: Any) -> None:
    """Raise ``EnvContractError`` unless a state of ``step`` has the structure of one of ``reset``."""
    structures: list[Any] = [jax.tree.structure(state) for state in (before, after)]
    if structures[0] != structures[1]:
        one, other = (
            {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(x)} for x in (before, after)
        )
        only = f" Only in one of them: {', '.join(sorted(one ^ other)[:6])}." if one != other else ""
        raise EnvContractError(f"{name}.reset and {name}.step return states of another structure.{only}")


def _holding(before: Any, after: Any) -> Any:
    """The shape of ``before``, in a dtype that holds the values of both; keys, which promote to nothing, as before."""
    same = before.dtype == after.dtype or _is_key(before)
    return jax.ShapeDtypeStruct(before.shape, before.dtype if same else jnp.promote_types(before.dtype, after.dtype))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _name(entry: Any) -> str:
    """An entry of a path in a tree: key, index or attribute."""
    return str(next(getattr(entry, each) for each in ("key", "name", "idx") if hasattr(entry, each)))
