"""A world model as pure ``reset`` and ``step`` functions of one environment, to be jitted and vmapped."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from worldloom.algorithm import Params
from worldloom.config import as_integer
from worldloom.errors import ConfigError, DataError
from worldloom.models.base import WorldModel, merge
from worldloom.models.rollout import observe_sequence
from worldloom.replay import ReplayBuffer
from worldloom.spaces import ACTION, OBS, named, unnamed

Observation = Literal["auto", "decoded", "latent"]
_LARGEST = float(np.finfo(np.float32).max)


class ImaginedParams(NamedTuple):
    """The arrays that :attr:`ImaginedWorld.reset` and :attr:`ImaginedWorld.step` read.

    Attributes:
      weights: those of the model.
      starts: the states [K, ...] that episodes start from, a state of the model.
    """

    weights: Params
    starts: Any


class ImaginedState(NamedTuple):
    """One environment between two steps.

    Attributes:
      latent: state of the model without batch axes, [...].
      steps: actions taken in this episode, int32 [].
      key: root key of the episode, []; the draws of step n use ``fold_in(key, n)``.
    """

    latent: Any
    steps: jax.Array
    key: jax.Array


class ImaginedStep(NamedTuple):
    """What a step of one environment returns; everything belongs to *arriving at* ``obs``.

    Attributes:
      obs: decoded observation (a dict if the config has several), or features of the latent: float32.
      reward: predicted mean, float32 [].
      terminated: whether the episode ended there, bool [].
      truncated: whether it has lasted ``horizon`` steps, bool [].
      continues: predicted probability that the episode does not terminate there, float32 [].
    """

    obs: Any
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    continues: jax.Array


class _Settings(NamedTuple):
    """What the functions close over; hashable."""

    horizon: int
    decodes: bool
    sample: bool
    task: int | None


class ImaginedWorld:
    """An environment whose dynamics are a world model's, as pure functions::

        world = ImaginedWorld(model, replay)
        reset, step = (jax.jit(jax.vmap(f, (None, 0))) for f in (world.reset, world.step))  # N environments
        state, obs = world.reset(world.params, key)
        state, out = world.step(world.params, state, action)

    Actions are those of the model: continuous ones float [A], clipped to [−1, 1]; discrete ones integers [] or one-hot
    [n]; a dict of these if ``config.action_dim`` is one. Rewards follow the arrival rule as in Gymnasium: ``step``
    returns what arriving at the new observation earns. Nothing resets an environment by itself, and a step after the
    end of an episode imagines on.

    With ``sample``, latents and terminations are drawn: an episode terminates with the probability 1 − ``continues``.
    Without, both take their mode, so rewards are those of ``model.imagine`` without a key, and an episode terminates
    where ``continues`` is below ½. Models that predict no end never terminate.

    Args:
      model: a world model of any family with ``encode``, ``observe``, ``imagine`` and ``decode``.
      start: where episodes start, uniformly at random: a ``ReplayBuffer``, of which ``num_starts`` windows of
        ``context`` rows are observed; first observations of episodes [K, ...]; or states of the model [K, ...].
      horizon: steps after which an episode is truncated.
      observation: ``"decoded"`` for observations as the model decodes them: vectors in their own units, images as
        floats from 0 to 1 (clipped). ``"latent"`` for the flat features of the model's state. ``"auto"`` decodes if the
        model can.
      sample: see above.
      task: task of a multitask model; of a ``ReplayBuffer`` with tasks, only windows of this one are starts.
      context: rows of a window before the start, itself included; at most those of the longest episode are used. Models
        with memory need them.
      num_starts: windows drawn from a ``ReplayBuffer``. Those that end in a terminal row are left out.
      seed: of the windows drawn.

    Attributes:
      reset: ``(params, key, index=None) -> (state, obs)``; start ``index`` of ``params.starts``, drawn if None.
      step: ``(params, state, action) -> (state, ImaginedStep)``.
      num_starts: K.
      observation_space, action_space: Gymnasium spaces of one environment.

    Raises:
      ConfigError: an argument is out of its range, or the model decodes no observations and ``"decoded"`` is asked for.
      DataError: the starts do not fit the model, or there are none.
      TypeError: the model lacks a method.
    """

    def __init__(
        self,
        model: Any,
        start: Any,
        *,
        horizon: int = 15,
        observation: Observation = "auto",
        sample: bool = True,
        task: int | None = None,
        context: int = 8,
        num_starts: int = 256,
        seed: int = 0,
    ):
        _check_arguments(model, horizon, observation, context, num_starts, task)
        self.model = model
        model_class: Any = type(model)
        self._observe_windows = _observe_windows(model_class, model.config, model.dtype)
        self._task = task
        self._windows, self._starts = _read_start(model, start, context, num_starts, seed, task)
        self._params: ImaginedParams | None = None
        self.num_starts = len(jax.tree.leaves(self.params.starts)[0])

        decodes = _decodes_observations(model, self.params.starts, task)
        if observation == "decoded" and not decodes:
            raise ConfigError(f"{type(model).__name__} decodes no observations; use observation='latent'.")
        if (not decodes or observation == "latent") and not hasattr(self.params.starts, "features"):
            instead = "use observation='decoded'" if decodes else "and the model decodes no observations"
            raise ConfigError(f"The states of {type(model).__name__} have no features to observe; {instead}.")
        settings = _Settings(horizon, decodes and observation != "latent", bool(sample), task)
        self.reset, self.step = _functions(model_class, model.config, model.dtype, settings)
        self.horizon = horizon
        self.observation_space = self._observation_space(settings.decodes)
        self.action_space = _action_space(model.config)

    @property
    def params(self) -> ImaginedParams:
        """Weights of the model as they are now, and the start states that they give.

        Recomputed when the model's weights were replaced (``load_params``, training) since the last time.
        """
        weights = self.model.params
        if self._params is None or not _same_arrays(self._params.weights, weights):
            self._params = ImaginedParams(weights, self._start_states())
        return self._params

    def _start_states(self) -> Any:
        if self._windows is None:
            return self._starts
        count = len(jax.tree.leaves(self._windows)[0])
        task = _task(self._task, count)
        return self._observe_windows(self.model.params, *self._windows, task)

    def _observation_space(self, decodes: bool) -> spaces.Space[Any]:
        shapes = jax.eval_shape(self.reset, self.params, jax.random.key(0))[1]
        # Bounds of the largest float32 mean none: infinite ones are what Gymnasium's checker warns of.
        boxes: dict[str, spaces.Space[Any]] = {
            name: spaces.Box(0.0, 1.0, x.shape, np.float32)
            if decodes and len(x.shape) == 3
            else spaces.Box(-_LARGEST, _LARGEST, x.shape, np.float32)
            for name, x in named(shapes, OBS).items()
        }
        return spaces.Dict(boxes) if isinstance(shapes, Mapping) else boxes[OBS]


# ---- the functions -------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _functions(
    model_class: Any, config: Any, dtype: Any, settings: _Settings
) -> tuple[Callable[..., tuple[ImaginedState, Any]], Callable[..., tuple[ImaginedState, ImaginedStep]]]:
    """``reset`` and ``step`` of :class:`ImaginedWorld`; equal settings share them, and so their compilations."""
    task = _task(settings.task, 1)

    def observation(model: Any, latent: Any) -> Any:
        batch = jax.tree.map(lambda x: x[None], latent)
        if not settings.decodes:
            return batch.features[0].astype(jnp.float32)
        decoded = named(model.decode(batch, **task)["obs"], OBS)
        images = {name: jnp.clip(x, 0, 1) if x.ndim == 4 else x for name, x in decoded.items()}
        obs = {name: x[0].astype(jnp.float32) for name, x in images.items()}
        return unnamed(obs, isinstance(config.obs_shape, Mapping))

    def reset(params: ImaginedParams, key: jax.Array, index: jax.Array | None = None) -> tuple[ImaginedState, Any]:
        index_key, key = jax.random.split(key)
        if index is None:
            index = jax.random.randint(index_key, (), 0, len(jax.tree.leaves(params.starts)[0]))
        latent = jax.tree.map(lambda x: x[index], params.starts)
        obs = observation(merge(model_class, config, params.weights, dtype), latent)
        return ImaginedState(latent, jnp.zeros((), jnp.int32), key), obs

    def step(params: ImaginedParams, state: ImaginedState, action: Any) -> tuple[ImaginedState, ImaginedStep]:
        model = merge(model_class, config, params.weights, dtype)
        latent_key, end_key = jax.random.split(jax.random.fold_in(state.key, state.steps))
        # Imagination of one step in a batch of one: axes [H, B, ...].
        actions = jax.tree.map(lambda x: x[None, None], _clip(config, action))
        start = jax.tree.map(lambda x: x[None], state.latent)
        trajectory = model.imagine(start, actions, latent_key if settings.sample else None, **task)
        latent = jax.tree.map(lambda x, old: x[1, 0].astype(old.dtype), trajectory.states, state.latent)
        # The family's continues may contain its discount; rounding may then exceed 1.
        continues = jnp.minimum(trajectory.continues[0, 0].astype(jnp.float32) / model.continue_discount, 1.0)
        lasts = jax.random.uniform(end_key) < continues if settings.sample else continues >= 0.5
        steps = state.steps + 1
        out = ImaginedStep(
            observation(model, latent),
            trajectory.rewards[0, 0].astype(jnp.float32),
            ~lasts,
            steps >= settings.horizon,
            continues,
        )
        return ImaginedState(latent, steps, state.key), out

    return reset, step


@functools.lru_cache(maxsize=64)
def _observe_windows(model_class: Any, config: Any, dtype: Any) -> Callable[..., Any]:
    """(weights, obs [K, T, ...], actions [K, T − 1, ...], task) → states [K, ...] of the last rows, compiled."""

    def last_states(weights: Params, obs: Any, actions: Any, task: Mapping[str, Any]) -> Any:
        model = merge(model_class, config, weights, dtype)
        obs, actions = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (obs, actions))
        return jax.tree.map(lambda x: x[-1], observe_sequence(model, obs, actions, task=task))

    return jax.jit(last_states)


def _clip(config: Any, action: Any) -> Any:
    """Continuous actions clipped to [−1, 1], as environments clip them; the discrete ones as they are."""
    kinds = config.action_type
    clipped = {}
    for name, value in named(action, ACTION).items():
        kind = kinds[name] if isinstance(kinds, Mapping) else kinds
        clipped[name] = jnp.clip(value, -1, 1) if kind == "continuous" else jnp.asarray(value)
    return unnamed(clipped, isinstance(action, Mapping))


def _task(task: int | None, count: int) -> dict[str, jax.Array]:
    return {} if task is None else {"task": jnp.full(count, task, jnp.int32)}


# ---- starts --------------------------------------------------------------------------------------------------------


def _read_start(model: Any, start: Any, context: int, num_starts: int, seed: int, task: int | None) -> tuple[Any, Any]:
    """Windows to observe, (obs [K, T, ...], actions [K, T − 1, ...]) or None, and states [K, ...] or None."""
    if isinstance(start, ReplayBuffer):
        return _sample_windows(start, context, num_starts, seed, task), None
    leaves = jax.tree.leaves(start)
    if not leaves or any(not np.shape(leaf) or not len(leaf) for leaf in leaves):
        raise DataError("There is nowhere to start: give a ReplayBuffer, observations [K, ...] or states [K, ...].")
    count = len(leaves[0])
    expected: Any = jax.eval_shape(lambda: model.initial_state(count)) if hasattr(model, "initial_state") else None
    structure: Any = jax.tree.structure(expected)
    if jax.tree.structure(start) == structure:
        shapes = [(np.shape(given), own.shape) for given, own in zip(leaves, jax.tree.leaves(expected), strict=True)]
        if any(given != own for given, own in shapes):
            raise DataError(
                f"The states to start from have shapes {[given for given, _ in shapes]}; {count} states of this model "
                f"have {[own for _, own in shapes]}."
            )
        return None, jax.tree.map(lambda x, own: jnp.asarray(x, own.dtype), start, expected)
    # First observations: windows of a single row, which no action follows.
    obs = jax.tree.map(lambda x: np.asarray(x)[:, None], start)
    actions = {
        name: np.zeros((count, 0), np.int32) if kind == "discrete" else np.zeros((count, 0, size), np.float32)
        for name, (size, kind) in _actions(model.config).items()
    }
    return (obs, unnamed(actions, isinstance(model.config.action_dim, Mapping))), None


def _sample_windows(
    replay: ReplayBuffer, context: int, num_starts: int, seed: int, task: int | None
) -> tuple[Any, Any]:
    longest = int(max(replay.episode_lengths, default=0))
    if longest == 0:
        raise DataError("There is nowhere to start: the replay buffer is empty.")
    windows = replay.sample(num_starts, min(context, longest), seed=seed)
    # Nothing follows a terminal row.
    lasts = ~np.asarray(windows["is_terminal"], bool)[:, -1]
    if not lasts.any():
        raise DataError(
            f"There is nowhere to start: all windows of {min(context, longest)} rows end in a terminal row. Give a "
            "smaller context."
        )
    if task is not None and "task" in windows:
        lasts &= np.asarray(windows["task"]) == task
        if not lasts.any():
            raise DataError(f"There is nowhere to start: of {num_starts} windows none is of task {task}. Draw more.")
    actions = jax.tree.map(lambda x: x[lasts, :-1], windows["actions"])
    return jax.tree.map(lambda x: x[lasts], windows["obs"]), actions


def _decodes_observations(model: Any, states: Any, task: int | None) -> bool:
    """Whether ``decode`` returns ``"obs"``, found by abstract evaluation: nothing is computed."""
    count = len(jax.tree.leaves(states)[0])
    return "obs" in jax.eval_shape(lambda states: model.decode(states, **_task(task, count)), states)


# ---- spaces and checks ---------------------------------------------------------------------------------------------


def _actions(config: Any) -> dict[str, tuple[int, str]]:
    """Size and type of each action by name."""
    kinds = config.action_type
    return {
        name: (int(size), kinds[name] if isinstance(kinds, Mapping) else kinds)
        for name, size in named(config.action_dim, ACTION).items()
    }


def _action_space(config: Any) -> spaces.Space[Any]:
    """Actions in the units of the model: [−1, 1] or classes."""
    leaves: dict[str, spaces.Space[Any]] = {
        name: spaces.Discrete(size) if kind == "discrete" else spaces.Box(-1.0, 1.0, (size,), np.float32)
        for name, (size, kind) in _actions(config).items()
    }
    return spaces.Dict(leaves) if isinstance(config.action_dim, Mapping) else leaves[ACTION]


def _same_arrays(one: Params, other: Params) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a is b for a, b in pairs)


def _check_arguments(
    model: Any, horizon: int, observation: str, context: int, num_starts: int, task: int | None
) -> None:
    if not isinstance(model, WorldModel):
        raise TypeError(f"An imagined environment needs a WorldModel, not a {type(model).__name__}.")
    missing = [name for name in ("encode", "observe", "imagine", "decode") if not hasattr(model, name)]
    if missing:
        raise TypeError(f"{type(model).__name__} is no environment: it has no method {' or '.join(missing)}.")
    for name, value in {"horizon": horizon, "context": context, "num_starts": num_starts}.items():
        as_integer(name, value)
    tasks = getattr(model.config, "num_tasks", 0)
    if task is not None and tasks and not 0 <= as_integer("task", task, least=0) < tasks:
        raise ConfigError(f"There is no task {task}; the model has the tasks 0 … {tasks - 1}.")
    if observation not in ("auto", "decoded", "latent"):
        raise ConfigError(f"observation must be 'auto', 'decoded' or 'latent', not {observation!r}.")
