"""N environments stepped together: the one interface that training, evaluation and recording use."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from worldloom.envs.action_log import ActionLog
from worldloom.envs.backends.base import Backend, BatchedStepResult, StatefulBackend
from worldloom.envs.time_step import BadStep, EpisodeEnd, TimeStep, episode_seed
from worldloom.errors import ConfigError, DataError, EnvError
from worldloom.spaces.actions import ActionSpec
from worldloom.spaces.leaves import Arrays
from worldloom.spaces.observations import ObservationSpec

_log = logging.getLogger("worldloom")


class VectorEnv:
    """N environments of one kind. Made by :func:`worldloom.envs.make_env`.

    ``reset`` starts an episode in every environment. ``step`` takes one action per environment and returns one row
    per environment. Where the previous row was ``is_last``, the action is ignored and the row is the first of the next
    episode. So an episode of n actions gives n+1 rows, and every call gives exactly one row per environment::

        time_step = env.reset()
        while ...:
            time_step = env.step(policy(time_step.obs, time_step.is_first))

    Episode k of environment i, and its action space, are seeded with ``episode_seed(seed, i, k)``, so the episode can
    be replayed from its actions: that is how :meth:`state` and :meth:`restore` resume a run in the middle of episodes.

    Attributes:
      num_envs: N.
      obs_shape: shape of one observation, or a dict of shapes.
      obs_dtype: its ``numpy.dtype`` (uint8 for images, else float32), or a dict of them.
      observation_space, action_space: the Gymnasium spaces of one environment underneath, in its own units.
      action_dim: number of action dimensions or classes, or a dict of them.
      action_type: ``"continuous"`` or ``"discrete"``, or a dict of them.
      action_repeat: environment steps per decision step.
      time_limit: environment steps after which an episode is truncated, or ``None`` if that is not known.
      episode_length: decision steps after which an episode is truncated, or ``None`` if that is not known.
      seed: root of the episodes' seeds.
      moves: how often the environments were reset, stepped or restored; a caller that compares it with the value after
        its own last call knows whether other code used them.
      settings: the arguments of :func:`worldloom.envs.make_env` by name: ``make_env(**env.settings)`` makes the same
        environments again, unless ``spec`` is an environment object.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        seed: int = 0,
        action_repeat: int = 1,
        restart_bad: bool = False,
        remake: Callable[[int, int, bool], VectorEnv] | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        observations, actions = ObservationSpec(backend.observation_space), ActionSpec(backend.action_space)
        self._backend: Any = backend
        self._observations, self._actions, self._remake = observations, actions, remake
        self.observation_space, self.action_space = backend.observation_space, backend.action_space
        self.num_envs = backend.num_envs
        self.obs_shape, self.obs_dtype = observations.shape, observations.dtype
        self.action_dim, self.action_type = actions.dim, actions.type
        self.action_repeat, self.settings = action_repeat, dict(settings or {})
        self._restart_bad = restart_bad
        # Environments in JAX take the agent's actions, and save their states in place of the actions that led there.
        self._on_device = isinstance(backend, StatefulBackend)
        self.time_limit = backend.time_limit
        # Rounded up: an episode is truncated within its last decision step.
        self.episode_length = None if backend.time_limit is None else -(-backend.time_limit // action_repeat)
        self.seed = _check_seed(seed)
        self._closed = False
        self.moves = 0
        self._clear_episodes()

    def reset(self, seed: int | None = None) -> TimeStep:
        """Start an episode in every environment and return its first rows.

        Args:
          seed: new root of the seeds; episodes are numbered from 0 again. ``None`` continues with the next episodes.

        Raises ``EnvError`` when closed, ``ConfigError`` for a seed outside [0, 2^63), and what :meth:`step` raises
        once the environments are stepped.
        """
        self._check_open()
        if seed is not None:
            self.seed = _check_seed(seed)
            self._clear_episodes()
        return self._step_backend(None, np.ones(self.num_envs, bool))

    def step(self, actions: Any) -> TimeStep:
        """Act in every environment whose episode is in progress; start the next episode in the others.

        Args:
          actions: ``[N, A]`` floats in [−1, 1] (clipped), ``[N]`` classes or ``[N, n]`` one-hots, or a dict of
            these with the keys of ``action_dim``.

        Raises ``DataError`` for invalid actions, before any environment is stepped, and ``EnvError`` when closed.
        Later errors close the environments: ``EnvContractError`` for values that an environment's spaces exclude,
        ``DataError`` for NaN from it (unless made with ``on_bad_step="restart"``), ``EnvError`` when a worker keeps
        crashing, any exception of an environment in this process, Ctrl-C. :meth:`state` then still returns the state
        before the failed call.
        """
        self._check_open()
        checked = self._actions.check(actions, ignore=self._episode_over)
        return self._step_backend(checked, self._episode_over)

    def executed(self, actions: Any) -> Arrays:
        """What :meth:`step` would execute of ``actions``, in the same units: what replay must hold.

        Continuous actions are clipped to [−1, 1], and rounded where the environment takes integers; one-hots become
        classes. Actions that are ignored, after the end of an episode, become 0. Raises ``DataError`` as :meth:`step`.
        """
        return self._actions.unwrap(self._actions.check(actions, ignore=self._episode_over))

    def sample_actions(self, rng: np.random.Generator) -> Arrays:
        """Uniform random actions for all environments: float32 in [−1, 1], or int32 classes."""
        return self._actions.sample(rng, self.num_envs)

    def render(self) -> np.ndarray:
        """A frame of environment 0, uint8 [H, W, 3].

        Raises ``ConfigError`` if it renders none, ``EnvError`` when closed or when its worker crashes.
        """
        self._check_open()
        try:
            frame = self._backend.render()
        except NotImplementedError:
            frame = None
        if not isinstance(frame, np.ndarray) or frame.ndim != 3:
            raise ConfigError(
                "The environment renders no frames; make it with render=True (your own function must set "
                "render_mode='rgb_array' itself)."
            )
        return frame

    def another(self, num_envs: int, seed: int, *, render: bool = False) -> VectorEnv:
        """A new vector environment with the same settings, for instance for evaluation during training.

        Args:
          num_envs: its number of environments.
          seed: its root of seeds.
          render: whether its :meth:`render` will be called.

        Raises ``ConfigError`` when this one was made from an environment object, which cannot be made again.
        """
        if self._remake is None:
            raise ConfigError(
                "This environment was given as an object, so no second one can be made; give make_env an id or a "
                "function that returns a new environment."
            )
        return self._remake(num_envs, seed, render)

    def state(self) -> dict[str, np.ndarray]:
        """The episodes in progress, as arrays that :meth:`restore` takes.

        ``seed`` int64 [], ``episodes`` int64 [N] (episode numbers), ``returns`` float64 [N] so far, ``lengths``
        int64 [N] (actions so far), the last row as ``reward``, ``is_last``, ``is_terminal`` [N] and ``obs/<name>``
        ``[N, ...]``, ``cut`` bool [N] (it ends an episode because of a crash or of NaN), and the episodes' actions
        ``actions/<name>`` ``[N, longest, ...]``, zero-padded; of environments in JAX, ``state/<i>`` in their place.

        Raises ``EnvError`` before the first reset. Still works after the environments were closed.
        """
        if self._last_result is None:
            raise EnvError("The environments have no state before the first reset.")
        return {
            "seed": np.array(self.seed, np.int64),
            "episodes": self._episodes.copy(),
            "returns": self._returns.copy(),
            "lengths": self._action_log.lengths.copy(),
            "reward": self._last_result.reward.copy(),
            "is_last": self._last_result.is_last.copy(),
            "is_terminal": self._last_result.is_terminal.copy(),
            "cut": self._cut.copy(),
            **{f"obs/{name}": value.copy() for name, value in self._last_result.obs.items()},
            **{f"actions/{name}": value for name, value in self._action_log.padded().items()},
            **{f"state/{i}": value for i, value in (self._backend.save_state() if self._on_device else {}).items()},
        }

    def restore(self, state: Mapping[str, np.ndarray], *, max_steps: int | None = None) -> TimeStep:
        """Return to a saved :meth:`state` by replaying its episodes from their seeds and actions; returns its rows.

        Exact for environments that are functions of seed and actions. If the observations differ, or if the
        environments cannot be replayed (Gymnasium vector environments, episodes of more than ``max_steps`` decision
        steps), a ``RuntimeWarning`` says so and the next episode starts in every environment: all rows are
        ``is_first``.

        Raises ``DataError`` for a state of another number of environments, ``EnvError`` when closed.
        """
        self._check_open()
        if len(state["episodes"]) != self.num_envs:
            raise DataError(f"The state is of {len(state['episodes'])} environments; there are {self.num_envs} here.")
        self.seed = int(state["seed"])
        self._episodes = np.array(state["episodes"], np.int64)
        self._returns = np.array(state["returns"], np.float64)
        self._action_log = ActionLog(state["lengths"], _with_prefix(state, "actions/"))
        obs = _with_prefix(state, "obs/")
        self._cut = np.array(state.get("cut", np.zeros(self.num_envs)), bool)
        saved = BatchedStepResult(
            obs, np.array(state["reward"]), np.array(state["is_last"]), np.array(state["is_terminal"])
        )
        if self._on_device:
            return self._restore_states(_with_prefix(state, "state/"), saved)

        # Replay, and compare with the saved observations.
        actions = [self._actions.to_env(self._action_log.of(env)) for env in range(self.num_envs)]
        seeds = [episode_seed(self.seed, env, int(self._episodes[env])) for env in range(self.num_envs)]
        longest = int(self._action_log.lengths.max())
        too_long = max_steps is not None and longest > max_steps
        replayed = None if too_long else self._backend.replay_actions(seeds, actions, self._action_log.lengths)
        # An episode that was cut by a crash or by NaN is over, with the observation before; its replay is not.
        if replayed is None or any(
            not np.array_equal(replayed.obs[name][~self._cut], value[~self._cut]) for name, value in obs.items()
        ):
            why = "did not return to the saved observations" if replayed is not None else "cannot be replayed"
            if too_long:
                why = f"were in episodes of up to {longest:,} steps; at most {max_steps:,} are replayed"
            warnings.warn(f"The environments {why}; their next episodes begin instead.", RuntimeWarning, stacklevel=2)
            return self.reset()

        # Reward and flags are the saved ones: an episode cut by a worker's crash is over, though its replay is not.
        return self._to_time_step(saved, is_first=self._action_log.lengths == 0)

    def _restore_states(self, states: Mapping[str, np.ndarray], saved: BatchedStepResult) -> TimeStep:
        """Return to the saved states of environments in JAX, which are exact."""
        if not self._backend.load_state(states, saved.obs):
            message = "The saved states are not those of these environments; their next episodes begin instead."
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            return self.reset()
        return self._to_time_step(saved, is_first=self._action_log.lengths == 0)

    def close(self) -> None:
        """Release environments and worker processes; safe to call twice. A ``with`` block calls it at its end."""
        self._closed = True
        self._backend.close()

    @property
    def closed(self) -> bool:
        """Whether the environments were closed, by :meth:`close` or by an error in one of them."""
        return self._closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _clear_episodes(self) -> None:
        """Set everything to before episode 0 of every environment."""
        self._episodes = np.full(self.num_envs, -1, np.int64)
        self._returns = np.zeros(self.num_envs, np.float64)
        self._episode_over = np.ones(self.num_envs, bool)
        self._cut = np.zeros(self.num_envs, bool)
        logged = {} if self._on_device else self._actions.zeros(self.num_envs, 0)
        self._action_log = ActionLog(np.zeros(self.num_envs), logged)
        self._last_result: BatchedStepResult | None = None

    def _step_backend(self, actions: dict[str, np.ndarray] | None, reset_mask: np.ndarray) -> TimeStep:
        """Reset environments where ``reset_mask`` (bool [N]), step the others with checked ``actions``."""
        native = None if actions is None else actions if self._on_device else self._actions.to_env(actions)
        episodes = self._episodes + reset_mask
        seeds = [
            episode_seed(self.seed, env, int(episodes[env])) if reset_mask[env] else None
            for env in range(self.num_envs)
        ]
        try:
            result = self._backend.step(native, reset_mask, seeds)
            bad = _not_finite(result)
            if bad:
                result = self._without(result, bad, reset_mask)
        except BaseException:
            # Some environments were stepped and some were not. Nothing below ran, so `state` is the one before.
            self.close()
            raise

        # Count episodes, actions and returns.
        self._episodes = episodes
        self._action_log.clear(reset_mask)
        if actions is not None:
            self._action_log.append(actions, ~reset_mask)
        self._returns = np.where(reset_mask, 0, self._returns) + result.reward

        # Report episodes that ended.
        crashed, not_finite = {restart.env for restart in result.restarts}, {step.env for step in bad}
        self._cut = result.is_last & np.isin(np.arange(self.num_envs), [*crashed, *not_finite])
        ends = [
            EpisodeEnd(
                env=int(env),
                episode_return=float(self._returns[env]),
                length=int(self._action_log.lengths[env]),
                terminated=bool(result.is_terminal[env]),
                crashed=int(env) in crashed,
                info=result.infos.get(int(env), {}),
                bad_step=int(env) in not_finite,
            )
            for env in np.flatnonzero(result.is_last)
        ]
        return self._to_time_step(result, is_first=reset_mask)._replace(events=(*result.restarts, *bad, *ends))

    def _without(self, result: BatchedStepResult, bad: Sequence[BadStep], reset_mask: np.ndarray) -> BatchedStepResult:
        """``result`` with the episodes of ``bad`` steps truncated at their last observations, with reward 0.

        Raises ``DataError`` if they are to stop the run, or if an episode began with one.
        """
        envs = [step.env for step in bad]
        if not self._restart_bad or reset_mask[envs].any() or self._last_result is None:
            begun = [step for step in bad if reset_mask[step.env]]
            name = (begun or bad)[0].name
            same = [step.env for step in begun or bad if step.name == name]
            raise DataError(
                f"{name} came back NaN or infinite from environments {same}"
                + (
                    ", at the beginning of an episode; check the simulator."
                    if begun
                    else "; check the simulator. With on_bad_step='restart' in make_env (--on-bad-step restart), such "
                    "episodes are cut there, and the next begin."
                )
            )
        for step in bad:
            _log.warning(
                "Environment %d returned %s NaN or infinite: its episode is closed as truncated.", step.env, step.name
            )
        obs = {name: value.copy() for name, value in result.obs.items()}
        for name, value in obs.items():
            value[envs] = self._last_result.obs[name][envs]
        reward, is_last, is_terminal = result.reward.copy(), result.is_last.copy(), result.is_terminal.copy()
        reward[envs], is_last[envs], is_terminal[envs] = 0, True, False
        return result._replace(obs=obs, reward=reward, is_last=is_last, is_terminal=is_terminal)

    def _to_time_step(self, result: BatchedStepResult, is_first: np.ndarray) -> TimeStep:
        self.moves += 1
        self._last_result = result
        self._episode_over = result.is_last.copy()
        obs = self._observations.unwrap(result.obs)
        return TimeStep(obs, result.reward, is_first, result.is_last, result.is_terminal)

    def _check_open(self) -> None:
        if self._closed:
            raise EnvError("This environment was closed; make a new one.")


def _with_prefix(state: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Copies of the arrays whose names start with ``prefix``, under the rest of their names."""
    return {name.removeprefix(prefix): np.array(value) for name, value in state.items() if name.startswith(prefix)}


def _check_seed(seed: int) -> int:
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ConfigError(f"seed must be an integer in [0, 2^63), not {seed!r}.")
    return int(seed)


def _not_finite(result: BatchedStepResult) -> list[BadStep]:
    """A record of each environment that returned NaN or infinity, with the name of the first array that holds it."""
    values = {f"'{name}'": value for name, value in result.obs.items() if value.dtype != np.uint8}
    found: dict[int, str] = {}
    for name, value in {**values, "'reward'": result.reward}.items():
        finite = np.isfinite(value)
        if not finite.all():
            for env in np.flatnonzero(~finite.reshape(len(value), -1).all(-1)):
                found.setdefault(int(env), name)
    return [BadStep(env, name) for env, name in sorted(found.items())]
