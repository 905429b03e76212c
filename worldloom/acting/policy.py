"""An agent: a model's policy, compiled once, between the observations and actions of an environment."""

from __future__ import annotations

import functools
import logging
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from gymnasium import spaces

from worldloom.acting.budget import largest_plan
from worldloom.algorithm import TrainState
from worldloom.config import check, is_integer, is_number, nearest
from worldloom.devices import compute_dtype, resolve_device
from worldloom.envs.backends.base import index_nested
from worldloom.envs.native import EnvSpaces
from worldloom.errors import DataError, WeightsError
from worldloom.models.base import WorldModel, abstract_params
from worldloom.models.compilation import graphdef
from worldloom.models.live_weights import live_weights
from worldloom.spaces.actions import ActionSpec
from worldloom.spaces.observations import ObservationSpec

_log = logging.getLogger("worldloom")
_MEASURED_CALLS = 20
"""Calls that a plan is judged by under ``max_ms``."""
_JUDGED_PERCENTILE = 90


class Latency(NamedTuple):
    """Milliseconds of a policy's calls, from an observation on the host to an action on the host.

    Attributes:
      p50_ms: median.
      p99_ms: 99th percentile.
      max_ms: the slowest.
      calls: how many were timed.
    """

    p50_ms: float
    p99_ms: float
    max_ms: float
    calls: int


class Policy:
    """Acts in an environment: ``action = policy(obs)``. Made by ``model.policy(env)`` or ``worldloom.load_policy``.

    Compiled when it is made. It keeps what the model carries from step to step, takes observations as the environment
    returns them, and returns actions as the environment takes them::

        env = gymnasium.make("Pendulum-v1")
        policy = model.policy(env)
        obs, _ = env.reset()
        while ...:
            obs, reward, terminated, truncated, _ = env.step(policy(obs))
            if terminated or truncated:
                obs, _ = env.reset()
                policy.reset()

    The weights are read from the model at every call, so the policy follows ``load_params``, training and assignments
    to parts of the model.

    Args:
      model: the world model.
      env: a ``gymnasium.Env``, a Gymnasium ``VectorEnv``, what ``make_env`` returned, or ``EnvSpaces``; only its spaces
        are used. None: the environment that the model was trained in, if the model knows it; else what the config says,
        with continuous actions in [−1, 1].
      num_envs: N, environments that are acted in together; None is that of ``env``, or 1.
      mode: ``"sample"`` acts as evaluation scores are measured, which draws from the policy; ``"greedy"`` takes the
        mode of every draw: the same observations give the same actions.
      planner: fields of the config that change how much is planned, such as ``{"num_samples": 128, "iterations": 2}``.
      max_ms: milliseconds that a call may take. Plans are timed here and now, from that of the config (and ``planner``)
        downwards, until one takes no longer in 9 of 10 calls; :attr:`plan` says which.
      device: where to compute, see :func:`worldloom.devices.resolve_device`; None is where the model's weights are.
      seed: of all draws.

    Attributes:
      num_envs: N.
      spaces: :class:`~worldloom.envs.EnvSpaces` of observations and actions.
      mode: as given.
      plan: the fields of the config that say how much is planned, by name; empty for models that do not plan.

    Raises:
      ConfigError: an argument is invalid, the environment does not fit the model, the model was changed after it was
        built, or no plan is as fast as ``max_ms``.
      DeviceError: ``device`` is a numbered device that is not there.
    """

    plan: dict[str, Any]
    _act: Callable[..., tuple[Any, Any]]
    _carry: Any
    _is_first: np.ndarray
    _calls: int
    _nowhere: np.ndarray

    def __init__(
        self,
        model: Any,
        env: Any = None,
        *,
        num_envs: int | None = None,
        mode: str = "sample",
        planner: Mapping[str, Any] | None = None,
        max_ms: float | None = None,
        device: str | None = None,
        seed: int = 0,
    ):
        check(mode in ("sample", "greedy"), f"mode must be 'sample' or 'greedy', not {mode!r}.")
        check(is_integer(seed) and 0 <= seed < 2**32, f"seed must be an integer in [0, 2^32), not {seed!r}.")
        check(
            max_ms is None or (is_number(max_ms) and max_ms > 0), f"max_ms must be a positive number, not {max_ms!r}."
        )
        self._class: Any = model.__class__
        self.mode, self._config, self._algorithm = mode, model.config, model.algorithm
        check(
            bool(nnx.split(model)[0] == graphdef(self._class, model.config, model.dtype)),
            f"This {self._class.__name__} was changed after it was built; a policy would not see the change. Define a "
            "subclass that overrides build.",
        )

        # Spaces, and how many environments.
        known = env is not None or model.env_spaces is not None
        self.spaces = _spaces(model, env)
        self.spaces.check_fits(model.config)
        self.num_envs = _num_envs(env, num_envs)
        self._observations, self._actions = ObservationSpec(self.spaces.observation), ActionSpec(self.spaces.action)
        # Without an environment, nothing says whether images are bytes or floats: both are taken.
        floats = EnvSpaces.of_config(model.config, float_images=True).observation
        self._float_images = None if known or floats == self.spaces.observation else ObservationSpec(floats)

        # Where to compute, with which weights.
        self._live, arrays = live_weights(model)
        self._model: Any = model
        weights_at = next(iter(arrays[0].devices())) if isinstance(arrays[0], jax.Array) else resolve_device()
        self._device = weights_at if device is None else resolve_device(device)
        followed = compute_dtype(model.config.precision, weights_at)
        self._dtype = compute_dtype(model.config.precision, self._device) if model.dtype == followed else model.dtype
        self._seen: list[Any] = []
        self._placed: list[Any] = []
        self._key = jax.device_put(jax.random.key(seed), self._device)

        # Compilation, and the largest plan that is fast enough.
        config = model.config.replace(**_check_planner(planner, model))
        self._compile(config)
        if max_ms is not None:
            self._choose_plan(config, float(max_ms))

    def __call__(self, obs: Any, is_first: Any = None) -> Any:
        """The actions for ``obs``, and one step of the policy's memory.

        Args:
          obs: an observation as the environment returns it, of any numeric dtype: of one environment without a batch
            axis (where N is 1), or with a leading axis [N, ...]; nested dicts where its space is one.
          is_first: bool [N] (or a bool where N is 1), true where ``obs`` starts an episode, in addition to those that
            :meth:`reset` announced.

        Returns:
          The action, as ``env.step`` takes it: clipped and scaled to the bounds of its space; an ``int`` for
          ``Discrete``; batched as Gymnasium batches the space if ``obs`` was.

        Raises ``DataError`` for observations that are NaN, infinite or not of the environment's space, and for actions
        that are NaN. The policy is then as before the call.
        """
        arrays, alone = self._read(obs)
        first = self._is_first
        if is_first is not None:
            first = first | _check_flags(is_first, self.num_envs)
        inputs = self._key, self._carry, arrays, first, np.uint32(self._calls & 0xFFFFFFFF)
        # Started with the weights of the call before: the device computes while the host looks whether they changed.
        weights: list[Any] | None = self._placed
        try:
            carry, actions = self._act(weights, *inputs)
        except RuntimeError:  # The old ones may have been deleted; other reasons come again below.
            weights = None
        newest = self._weights()
        if newest is not weights:
            carry, actions = self._act(newest, *inputs)
        if isinstance(actions, Mapping):
            chosen: Any = {name: np.asarray(action) for name, action in actions.items()}
        else:
            chosen = np.asarray(actions)
        native = self._actions.to_env(self._actions.check(chosen, self._nowhere))
        self._carry, self._is_first, self._calls = carry, self._nowhere, self._calls + 1
        return _of_one(native) if alone else native

    def reset(self, index: int | Sequence[int] | np.ndarray | None = None) -> None:
        """Start new episodes: the next observations are taken as their first.

        Args:
          index: an environment, several of them, or bool [N]; None is all.

        Raises ``ConfigError`` for an environment that there is not.
        """
        if index is None:
            self._is_first = np.ones(self.num_envs, bool)
            return
        where = np.asarray(index)
        if where.dtype == bool:
            check(where.shape == (self.num_envs,), f"index has shape {where.shape}; ({self.num_envs},) is needed.")
        else:
            inside = where.size == 0 or (
                np.issubdtype(where.dtype, np.integer) and where.min() >= 0 and where.max() < self.num_envs
            )
            check(bool(inside), f"index={index!r}: there are environments 0 to {self.num_envs - 1}.")
            where = where.astype(np.int64)
        first = self._is_first.copy()
        first[where] = True
        self._is_first = first

    def update(self, source: Any) -> None:
        """Act with the weights of ``source`` from now on; memory and episodes go on.

        Args:
          source: a model of the same class and sizes, which is followed from now on as the first one was; or a
            ``TrainState`` or its ``params``, which are copied.

        Raises ``WeightsError`` if the weights do not fit, ``ConfigError`` for a model of another class.
        """
        if isinstance(source, WorldModel):
            check(
                type(source) is self._class,
                f"This policy is of a {self._class.__name__}; a {type(source).__name__} cannot take its place.",
            )
            live, arrays = live_weights(source)
            self._check_weights(live.treedef, arrays)
            self._model, self._live = source, live
            return
        params = source.params if isinstance(source, TrainState) else source
        arrays, treedef = jax.tree.flatten(params)
        self._check_weights(treedef, arrays)
        # Copies, because the next update of a run consumes its state.
        self._seen = self._placed = jax.device_put([jnp.array(x) for x in arrays], self._device)
        self._model = None

    def latency(self, calls: int = 200) -> Latency:
        """Time ``calls`` calls now, with observations of zeros; the policy is afterwards as it was before."""
        check(is_integer(calls) and calls >= 1, f"calls must be an integer ≥ 1, not {calls!r}.")
        ms = self._time(calls)
        return Latency(float(np.percentile(ms, 50)), float(np.percentile(ms, 99)), float(ms.max()), calls)

    def __repr__(self) -> str:
        plan = "".join(f", {name}={value}" for name, value in self.plan.items())
        return f"Policy({self._class.__name__}, num_envs={self.num_envs}, mode={self.mode!r}{plan})"

    def _compile(self, config: Any) -> None:
        """Compile for ``config`` and start again before the first observation."""
        self.plan = {name: getattr(config, name) for name in self._algorithm.planner_fields}
        self._act = _compiled(self._class, config, self._dtype, self._live.treedef, self.mode == "greedy")
        self._nowhere = np.zeros(self.num_envs, bool)
        self._calls = 0
        self.reset()
        with jax.default_device(self._device):
            carry = self._algorithm.initial_carry(config, self.num_envs)
        self._carry = jax.device_put(carry, self._device)
        example = self.spaces.example_observation(self.num_envs)
        arrays, _ = self._read(example)
        after, _ = self._act(self._weights(), self._key, self._carry, arrays, self._is_first, np.uint32(0))
        # A carry of another dtype than the one that comes back would be compiled for a second time.
        same = jax.tree.map(lambda first, later: jnp.asarray(first, later.dtype), self._carry, after)
        self._carry = jax.device_put(same, self._device)
        self._time(2)

    def _choose_plan(self, config: Any, max_ms: float) -> None:
        plans = [config.replace(**change) for change in self._algorithm.smaller_plans(config)]

        def measure(number: int) -> float:
            self._compile(plans[number])
            return float(np.percentile(self._time(_MEASURED_CALLS), _JUDGED_PERCENTILE))

        number, ms = largest_plan(measure, len(plans), max_ms)
        check(
            number is not None,
            f"max_ms={max_ms:g} cannot be kept: the {'least plan' if len(plans) > 1 else 'policy'} of this "
            f"{self._class.__name__} takes {ms:.3g} ms here in one of {100 // (100 - _JUDGED_PERCENTILE)} calls.",
        )
        assert number is not None
        self._compile(plans[number])
        level = logging.WARNING if number and number == len(plans) - 1 else logging.INFO
        _log.log(level, "max_ms=%g: acting takes %.3g ms here with %s.", max_ms, ms, self.plan or "no plan")

    def _time(self, calls: int) -> np.ndarray:
        """Milliseconds [calls] of calls with an example observation; nothing changes."""
        before = self._carry, self._is_first, self._calls
        example = self.spaces.example_observation(self.num_envs)
        ms = np.zeros(calls)
        try:
            for call in range(calls):
                start = time.perf_counter()
                self(example)
                ms[call] = 1e3 * (time.perf_counter() - start)
        finally:
            self._carry, self._is_first, self._calls = before
        return ms

    def _read(self, obs: Any) -> tuple[Any, bool]:
        """Observations as the model takes them, [N, ...], and whether they were of one environment without batch."""
        is_answer = isinstance(obs, tuple) and len(obs) in (2, 5) and isinstance(obs[-1], Mapping)
        if is_answer and not isinstance(self.spaces.observation, spaces.Tuple):
            raise DataError("These are an observation and more, as reset and step return them; give only the first.")
        spec = self._observations
        if self._float_images is not None and _has_float_images(obs, self._float_images):
            spec = self._float_images
        alone = not spec.is_batch(obs)
        if alone and self.num_envs != 1:
            raise DataError(
                f"The observation is of one environment; this policy acts in {self.num_envs}, and takes a leading axis "
                "of that length. Make one for each with num_envs=1."
            )
        flat = spec.flatten(obs, () if alone else (self.num_envs,), any_dtype=True)
        try:
            spec.check_finite(flat)
        except DataError as error:
            raise DataError(f"{error} Nothing was computed; the state of the policy is as before.") from None
        if alone:
            flat = {name: value[None] for name, value in flat.items()}
        return spec.unwrap(flat), alone

    def _weights(self) -> list[Any]:
        """The newest weights, on the policy's device."""
        if self._model is None:
            return self._placed
        live, arrays = live_weights(self._model)
        if len(arrays) == len(self._seen) and all(map(operator.is_, arrays, self._seen)):
            return self._placed
        if live is not self._live:
            self._check_weights(live.treedef, arrays)
            self._live = live
        here = all(isinstance(x, jax.Array) and x.devices() == {self._device} for x in arrays)
        self._placed = arrays if here else jax.device_put(arrays, self._device)
        self._seen = arrays
        return self._placed

    def _check_weights(self, treedef: Any, arrays: Sequence[Any]) -> None:
        """Raise ``WeightsError`` unless these are the weights of a model like the one that was compiled."""
        if treedef != self._live.treedef:
            raise WeightsError("These weights have other names than the policy's model had. Make a new policy.")
        shapes = jax.tree.leaves(_shapes(self._class, self._config))
        if [x.shape for x in arrays] != [x.shape for x in shapes]:
            raise WeightsError("These weights have other shapes than the policy's model had. Make a new policy.")


@functools.lru_cache(maxsize=32)
def _compiled(cls: Any, config: Any, dtype: Any, treedef: Any, greedy: bool) -> Any:
    """(weights, root key, carry, obs, is_first [N], call number) → carry, actions; shared by all equal policies."""
    graph, policy = graphdef(cls, config, dtype), cls.algorithm.evaluation_policy

    def act(arrays: list[Any], key: jax.Array, carry: Any, obs: Any, is_first: jax.Array, number: jax.Array) -> Any:
        model = nnx.merge(graph, jax.tree.unflatten(treedef, arrays))
        return policy(model, carry, obs, None if greedy else jax.random.fold_in(key, number), is_first=is_first)

    return jax.jit(act)


@functools.lru_cache(maxsize=32)
def _shapes(cls: Any, config: Any) -> Any:
    return abstract_params(cls, config)


def _spaces(model: Any, env: Any) -> EnvSpaces:
    if isinstance(env, EnvSpaces):
        return env
    if env is not None:
        return EnvSpaces.of_env(env)
    if model.env_spaces is not None:
        return EnvSpaces.from_json(model.env_spaces, "What the model knows of its environment")
    return EnvSpaces.of_config(model.config)


def _num_envs(env: Any, given: int | None) -> int:
    own = getattr(env, "num_envs", None)
    if given is None:
        return own or 1
    check(is_integer(given) and given >= 1, f"num_envs must be an integer ≥ 1, not {given!r}.")
    check(own in (None, given), f"num_envs={given}, but env has {own} environments.")
    return given


def _check_planner(planner: Mapping[str, Any] | None, model: Any) -> dict[str, Any]:
    fields = model.algorithm.planner_fields
    for name in planner or {}:
        check(bool(fields), f"A {type(model).__name__} does not plan; leave planner out.")
        check(
            name in fields,
            f"planner has no field {name!r}.{nearest(str(name), fields)} There are {', '.join(fields)}.",
        )
    return dict(planner or {})


def _check_flags(flags: Any, num_envs: int) -> np.ndarray:
    array = np.asarray(flags)
    if array.dtype != bool or array.shape not in ((num_envs,), () if num_envs == 1 else (num_envs,)):
        raise DataError(f"is_first has shape {array.shape} and dtype {array.dtype}; bool ({num_envs},) is needed.")
    return array.reshape(num_envs)


def _has_float_images(obs: Any, spec: ObservationSpec) -> bool:
    """Whether an image among the observations is of floats; False for names that are missing, which others report."""
    shapes = spec.shape if isinstance(spec.shape, dict) else {"": spec.shape}
    images = [name for name, shape in shapes.items() if len(shape) == 3]
    values = [obs.get(name) if name and isinstance(obs, Mapping) else obs for name in images]
    return any(isinstance(value, np.ndarray | jax.Array) and value.dtype.kind == "f" for value in values)


def _of_one(native: Any) -> Any:
    """The action of the only environment; Python integers for ``Discrete``."""
    if isinstance(native, dict):
        return {name: _of_one(inner) for name, inner in native.items()}
    if isinstance(native, tuple):
        return tuple(map(_of_one, native))
    action = index_nested(native, 0)
    return int(action) if np.ndim(action) == 0 and np.issubdtype(action.dtype, np.integer) else action
