"""The one shape of environments: N of them, stepped together, as rows under the arrival rule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np

from worldloom.envs.actions import ActionSpec
from worldloom.envs.history import History
from worldloom.envs.observations import ObservationSpec
from worldloom.envs.rows import Arrays, Arrivals, Backend, EpisodeEnd, Rows, episode_seed
from worldloom.errors import ConfigError, DataError, EnvError


class VectorEnv:
    """N environments of one kind. Made by :func:`worldloom.envs.make_env`.

    ``reset`` starts an episode everywhere. ``step`` takes one action per environment and returns one row per
    environment; where the previous row was ``is_last`` the action is ignored and the row is the next episode's
    first. So an episode of n actions gives n+1 rows, and every environment gives exactly one row a call::

        rows = env.reset()
        while ...:
            rows = env.step(policy(rows.obs, rows.is_first))

    Episode k of environment i is seeded with ``episode_seed(seed, i, k)``, its action space too, so it can be
    played again; :meth:`state` and :meth:`restore` resume a run in the middle of its episodes that way.

    Attributes:
      num_envs: N.
      obs_shape: shape of an observation, or dict of shapes; ``obs_dtype`` likewise (uint8 images, else float32).
      action_dim: number of action dimensions or classes, or a dict of them.
      action_type: ``"continuous"`` or ``"discrete"``, or a dict of them.
      action_repeat: environment steps per decision step.
      episode_length: decision steps after which an episode is truncated, or ``None`` if that is not known.
      seed: root of the episodes' seeds.
      moves: how often the environments were reset, stepped or restored, by whomever.
      settings: what :func:`worldloom.envs.make_env` was given, by name: ``make_env(**env.settings)`` makes such
        environments again, unless ``spec`` is an object.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        seed: int = 0,
        action_repeat: int = 1,
        remake: Callable[[int, int, bool], VectorEnv] | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        observations, actions = ObservationSpec(backend.observation_space), ActionSpec(backend.action_space)
        self._backend, self._observations, self._actions, self._remake = backend, observations, actions, remake
        self.num_envs, self._all = backend.num_envs, range(backend.num_envs)
        self.obs_shape, self.obs_dtype = observations.shape, observations.dtype
        self.action_dim, self.action_type = actions.dim, actions.type
        self.action_repeat, self.settings = action_repeat, dict(settings or {})
        self.episode_length = None if backend.time_limit is None else -(-backend.time_limit // action_repeat)
        self.seed = _checked_seed(seed)
        self._closed = False
        self.moves = 0
        self._rewind()

    def reset(self, seed: int | None = None) -> Rows:
        """Start an episode in every environment and return its first row.

        Args:
          seed: new root of the seeds; numbering of episodes starts again. Without it the next episodes follow.
        """
        self._check_open()
        if seed is not None:
            self.seed = _checked_seed(seed)
            self._rewind()
        return self._advance(None, np.ones(self.num_envs, bool))

    def step(self, actions: Any) -> Rows:
        """Act in every environment whose episode goes on; start the next one in those where it was over.

        Args:
          actions: ``[N, A]`` floats in [−1, 1] (clipped), ``[N]`` classes or ``[N, n]`` one-hots, or the dict of
            them that ``action_dim`` shows.

        Raises ``DataError`` for actions that do not fit, before anything moves. The environments are closed by what
        comes later: ``DataError`` for NaN from an environment, ``EnvError`` when a worker keeps crashing, whatever an
        environment in this process raises, Ctrl-C; :meth:`state` then still tells where they were before.
        """
        self._check_open()
        checked = self._actions.check(actions, ignore=self._over)
        return self._advance(checked, self._over)

    def sample_actions(self, rng: np.random.Generator) -> Arrays:
        """Uniform random actions for all environments: float32 in [−1, 1], or int32 classes."""
        return self._actions.sample(rng, self.num_envs)

    def render(self) -> np.ndarray:
        """A picture of environment 0, uint8 [H, W, 3]. Raises ``ConfigError`` if it draws none."""
        self._check_open()
        try:
            frame = self._backend.render()
        except NotImplementedError:
            frame = None
        if not isinstance(frame, np.ndarray) or frame.ndim != 3:
            raise ConfigError(
                "The environment renders no picture; make it with render=True (a function of yours: with "
                "render_mode='rgb_array' inside)."
            )
        return frame

    def another(self, num_envs: int, seed: int, *, render: bool = False) -> VectorEnv:
        """A new vector environment made by the same recipe, for instance for evaluation beside training.

        Raises ``ConfigError`` when this one was made from an environment object, which cannot be made again.
        """
        if self._remake is None:
            raise ConfigError(
                "This environment was given as an object, so no second one can be made; give make_env an id or a "
                "function that returns a new environment."
            )
        return self._remake(num_envs, seed, render)

    def state(self) -> dict[str, np.ndarray]:
        """Where the environments are, as arrays: seeds, actions and returns of the current episodes, last rows."""
        if self._last is None:
            raise EnvError("The environments have no state before the first reset.")
        return {
            "seed": np.array(self.seed, np.int64),
            "episodes": self._episodes.copy(),
            "returns": self._returns.copy(),
            "lengths": self._history.lengths.copy(),
            "reward": self._last.reward.copy(),
            "is_last": self._last.last.copy(),
            "is_terminal": self._last.terminal.copy(),
            **{f"obs/{name}": value.copy() for name, value in self._last.obs.items()},
            **{f"actions/{name}": value for name, value in self._history.padded().items()},
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> Rows:
        """Go to where :meth:`state` was taken: seed the episodes again, take their actions again, return their rows.

        Exact for environments that are functions of seed and actions. Where observations come out different, or the
        environments cannot be played again (Gymnasium vector environments), a warning says so and the next episodes
        begin everywhere: all rows are ``is_first``. Raises ``DataError`` for a state of other environments.
        """
        self._check_open()
        if len(state["episodes"]) != self.num_envs:
            raise DataError(f"The state is of {len(state['episodes'])} environments; there are {self.num_envs} here.")
        self.seed = int(state["seed"])
        self._episodes = np.array(state["episodes"], np.int64)
        self._returns = np.array(state["returns"], np.float64)
        self._history = History(state["lengths"], _below(state, "actions/"))
        obs = _below(state, "obs/")
        actions = [self._actions.to_env(self._history.of(env)) for env in self._all]
        seeds = [episode_seed(self.seed, env, int(self._episodes[env])) for env in self._all]
        played = self._backend.replay(seeds, actions, self._history.lengths)
        if played is None or any(not np.array_equal(played.obs[name], value) for name, value in obs.items()):
            why = "cannot be played again" if played is None else "did not come back to the saved observations"
            warnings.warn(f"The environments {why}; their next episodes begin instead.", RuntimeWarning, stacklevel=2)
            return self.reset()
        # Flags are the saved ones: an episode that a crash had cut is still over, though its replay is not.
        return self._rows(
            Arrivals(obs, np.array(state["reward"]), np.array(state["is_last"]), np.array(state["is_terminal"])),
            first=self._history.lengths == 0,
        )

    def close(self) -> None:
        """Release environments and worker processes; safe to call twice. Also done on leaving a ``with`` block."""
        self._closed = True
        self._backend.close()

    @property
    def closed(self) -> bool:
        """Whether they were closed, by :meth:`close` or by an error in them."""
        return self._closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _rewind(self) -> None:
        """Before episode 0 everywhere."""
        self._episodes = np.full(self.num_envs, -1, np.int64)
        self._returns = np.zeros(self.num_envs, np.float64)
        self._over = np.ones(self.num_envs, bool)
        self._history = History(np.zeros(self.num_envs), self._actions.zeros(self.num_envs, 0))
        self._last: Arrivals | None = None

    def _advance(self, actions: dict[str, np.ndarray] | None, starting: np.ndarray) -> Rows:
        native = None if actions is None else self._actions.to_env(actions)
        episodes = self._episodes + starting
        seeds = [episode_seed(self.seed, env, int(episodes[env])) if starting[env] else None for env in self._all]
        try:
            arrivals = self._backend.advance(native, starting, seeds)
            _refuse_nan(arrivals)
        except BaseException:
            # Some environments have moved and some have not. What `state` says still holds.
            self.close()
            raise
        self._episodes = episodes
        self._history.clear(starting)
        if actions is not None:
            self._history.append(actions, ~starting)
        self._returns = np.where(starting, 0, self._returns) + arrivals.reward
        crashed = {restart.env for restart in arrivals.restarts}
        ends = [
            EpisodeEnd(
                env=int(env),
                episode_return=float(self._returns[env]),
                length=int(self._history.lengths[env]),
                terminated=bool(arrivals.terminal[env]),
                crashed=int(env) in crashed,
            )
            for env in np.flatnonzero(arrivals.last)
        ]
        return self._rows(arrivals, first=starting)._replace(events=(*arrivals.restarts, *ends))

    def _rows(self, arrivals: Arrivals, first: np.ndarray) -> Rows:
        self.moves += 1
        self._last = arrivals
        self._over = arrivals.last.copy()
        obs = self._observations.structure(arrivals.obs)
        return Rows(obs, arrivals.reward, first, arrivals.last, arrivals.terminal)

    def _check_open(self) -> None:
        if self._closed:
            raise EnvError("This environment was closed; make a new one.")


def _below(state: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): np.array(value) for name, value in state.items() if name.startswith(prefix)}


def _checked_seed(seed: int) -> int:
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ConfigError(f"seed must be an integer in [0, 2^63), not {seed!r}.")
    return int(seed)


def _refuse_nan(arrivals: Arrivals) -> None:
    """Stop before a broken simulator's numbers reach a policy or replay."""
    broken = {name: ~np.isfinite(value) for name, value in arrivals.obs.items() if value.dtype != np.uint8}
    broken["reward"] = ~np.isfinite(arrivals.reward)
    for name, where in broken.items():
        if where.any():
            envs = np.flatnonzero(where.reshape(len(where), -1).any(-1)).tolist()
            raise DataError(f"'{name}' came back NaN or infinite from environments {envs}; check the simulator.")
