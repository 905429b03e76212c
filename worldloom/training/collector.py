"""Collects experience from environments: acts with the newest weights while the device trains."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from worldloom.algorithm import Params, Policy, TrainState
from worldloom.envs import BadStep, EpisodeEnd, TimeStep, VectorEnv
from worldloom.envs.native import check_config_fits
from worldloom.errors import FileFormatError
from worldloom.ops.seed_sequence import philox_keys
from worldloom.replay import ReplayBuffer
from worldloom.replay.online import OnlineQueue
from worldloom.spaces import ACTION
from worldloom.training.config import TrainingConfig
from worldloom.training.env_identity import env_identity
from worldloom.training.rewards_seen import RewardsSeen
from worldloom.training.train_ratio import TrainRatio
from worldloom.training.writeback import strip_prefix

_log = logging.getLogger("worldloom")

_ACTING = 0xFFFFFFFF
"""Folded into the root key to derive the keys for acting; no update has this number."""

_REPLAY_SAID = 5_000
"""Steps of an episode whose replay is logged, because it may take a while."""


_PERSISTENCE = 0.9
"""Probability that correlated random actions keep the previous action: for ten decision steps on average."""


class EpisodeRecord(NamedTuple):
    """A training episode that ended.

    Attributes:
      number: it is the run's ``number``-th, counted from 0.
      env_steps: environment steps of the run at its end, those in other environments before included.
      prefill: whether it ended before the first update.
      end: return, length and what else the environments report of it.
    """

    number: int
    env_steps: int
    prefill: bool
    end: EpisodeEnd


class Collector:
    """Steps environments and adds the rows to replay. One call of :meth:`step` is one step of all environments.

    :meth:`step` starts computing the next actions on the device and returns; they are fetched by the next call. An
    update started in between therefore runs while the environments step, and the weights that chose the actions are
    those from before that update: one step older than in a strictly sequential program.

    Row t is added to replay once its action is known, so the newest observation is held here, not in replay.

    Args:
      env: the environments.
      replay: the buffer that rows are added to.
      model: the world model; its family's policy acts with the weights of the state given to :meth:`step`.
      config: the run's config.
      store_latents: whether replay stores the model's latents with the rows.
      updates_before: updates done before the first step; updates due are counted from there.
      former: the run's collector in other environments before, if there was one.

    Attributes:
      updates_before: see above.
      steps_before: environment steps taken in former environments.
      calls: how often actions were chosen for all environments.
      decisions: decision steps taken so far, summed over all environments.
      episodes: training episodes that ended so far.
      ends: those that ended since ``EpisodesCallback`` last cleared the list.
      seen: what rewards and returns there have been so far.
      queue: which rows have been replayed at least once.
      restarts: number of environment processes replaced so far.
      bad_steps: number of steps so far that returned NaN and cut their episodes.
    """

    def __init__(
        self,
        env: VectorEnv,
        replay: Any,
        model: Any,
        config: TrainingConfig,
        *,
        store_latents: bool,
        updates_before: int = 0,
        former: Collector | None = None,
    ):
        algorithm = model.algorithm
        self.updates_before = updates_before
        self.env, self.replay, self._seed, self._model_config = env, replay, config.seed, model.config
        self._policy = compiled_policy(
            algorithm.policy, model.__class__, model.config, algorithm.stored_latents if store_latents else None
        )
        self._validate_data, self._random_prefill = algorithm.validate_data, algorithm.random_prefill
        self._carry = algorithm.initial_carry(model.config, env.num_envs)
        self._prefill = config.prefill
        self.use_config(config)
        self._time_step: TimeStep | None = None
        # Actions and latents for the newest time step, possibly still being computed.
        self._pending: tuple[Any, Mapping[str, Any]] | None = None
        self.calls = self._moves = 0
        self.decisions = self.restarts = self.bad_steps = 0
        self._more_steps = 0
        # Episodes are numbered, and their environment steps counted, through all environments of a run.
        self.episodes: int = former.episodes if former else 0
        self.steps_before: int = former.steps_before + former.env_steps if former else 0
        self.ends: list[EpisodeRecord] = []
        self.seen = RewardsSeen()
        # Rows that are there before were not collected by this run.
        self.queue = OnlineQueue(_newest_row(replay))

    @property
    def env_steps(self) -> int:
        """Environment steps taken in these environments so far, see :meth:`env_steps_at`."""
        return self.env_steps_at(self.decisions)

    def env_steps_at(self, decisions: int) -> int:
        """Environment steps after ``decisions`` decision steps, some of which may have had another action repeat."""
        return decisions * self.env.action_repeat + self._more_steps

    def decisions_at(self, env_steps: int) -> int:
        """Decision steps that ``env_steps`` environment steps allow."""
        return max(0, (env_steps - self._more_steps) // self.env.action_repeat)

    @property
    def acts_randomly(self) -> bool:
        """Whether the next actions are random: in the prefill, unless the untrained policy acts there."""
        return self._prefill_policy != "initial" and self.decisions < self._prefill

    @property
    def prefill(self) -> int:
        """Decision steps of the prefill."""
        return self._prefill

    def begin(self, state: TrainState) -> None:
        """Take the first step, unless the environments go on from where training left them."""
        if self._pending is None or self._moved_outside:
            self.step(state)

    @property
    def _moved_outside(self) -> bool:
        """Whether the environments were reset or stepped by something else since."""
        return self._time_step is not None and self.env.moves != self._moves

    def updates_due(self, ratio: TrainRatio) -> int:
        """Total number of updates due by now, including those before the first step."""
        return self.updates_before + ratio.updates(self.decisions)

    def use_config(self, config: TrainingConfig) -> None:
        """Act as ``config`` says from the next step on; what is counted changes in :meth:`count_from`."""
        self._prefill_policy = config.prefill_policy
        if self._prefill_policy == "auto":
            self._prefill_policy = "random" if self._random_prefill else "initial"
        self._max_episode_steps = config.max_episode_steps

    def count_from(self, updates: int, ratio: TrainRatio) -> None:
        """Switch to a new ``ratio`` when ``updates`` updates are done."""
        self._prefill = ratio.prefill
        self.updates_before = updates - ratio.updates(self.decisions)

    def step(self, state: TrainState) -> None:
        """Execute the pending actions, add their rows to replay, and start choosing the next actions with ``state``."""
        if self._moved_outside:
            _log.warning("The environments were reset or stepped outside of training: all of them begin new episodes.")
            self._time_step = self._pending = None
        executed = None
        if self._pending is not None:
            executed, latents = jax.device_get(self._pending)
            self._execute(executed, latents)
        elif self._time_step is None:
            self._receive(self.env.reset())
        self._choose_actions(state, executed)

    def state_dict(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The state for a checkpoint: JSON-serializable values, and arrays by name."""
        counts = {
            "trained": self.updates_before,
            "decisions": self.decisions,
            "calls": self.calls,
            "restarts": self.restarts,
            "bad_steps": self.bad_steps,
            "episodes": self.episodes,
            "steps_before": self.steps_before,
            "env_steps": self.env_steps,
            "ends": [[*record[:-1], list(record.end)] for record in self.ends],
            "seen": self.seen.to_dict(),
            "drawn": self.queue.drawn,
            "env": env_identity(self.env),
        }
        if self._pending is None:
            return counts, {}
        actions, latents = jax.device_get(self._pending)
        arrays = {f"env/{name}": value for name, value in self.env.state().items()}
        arrays |= {f"carry/{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(self._carry))}
        named = actions if isinstance(actions, Mapping) else {ACTION: actions}
        arrays |= {f"actions/{name}": np.asarray(value) for name, value in named.items()}
        arrays |= {f"latents/{name}": np.asarray(value) for name, value in latents.items()}
        return counts, arrays

    def load_state_dict(self, counts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of :meth:`state_dict`; restores the environments by replaying the actions of their current episodes.

        Environments that cannot be replayed, or that arrive at other observations, begin their next episodes instead,
        with a warning.
        """
        try:
            self.updates_before = int(counts["trained"])
            self.decisions, self.calls = int(counts["decisions"]), int(counts["calls"])
            self.restarts = int(counts["restarts"])
            self.bad_steps = int(counts.get("bad_steps", 0))  # Checkpoints of earlier versions count none.
            # Checkpoints of earlier versions do not number episodes, and say nothing of rewards and of fresh rows.
            numbered = "episodes" in counts
            self.episodes = int(counts.get("episodes", len(counts["ends"])))
            self.steps_before = int(counts.get("steps_before", 0))
            # Those taken under another action repeat keep their number.
            repeat = counts.get("env", {}).get("action_repeat", self.env.action_repeat)
            taken = int(counts.get("env_steps", self.decisions * repeat))
            self._more_steps = taken - self.decisions * self.env.action_repeat
            self.ends = [
                EpisodeRecord(record[0], record[1], record[2], EpisodeEnd(*record[3]))
                if numbered
                else EpisodeRecord(number, self.env_steps, False, EpisodeEnd(*record))
                for number, record in enumerate(counts["ends"])
            ]
            self.seen = RewardsSeen(**counts.get("seen", {}))
            self.queue = OnlineQueue(int(counts.get("drawn", _newest_row(self.replay))))
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise FileFormatError(f"The saved counts of the environments make no sense: {error!r}.") from error
        if arrays:
            self.load_arrays(arrays)

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """The part of :meth:`load_state_dict` that returns to the environments, and to what was chosen for them."""
        saved = strip_prefix(arrays, "env/")
        limit, longest = self.env.episode_length or self._max_episode_steps, int(saved["lengths"].max())
        if strip_prefix(saved, "actions/") and _REPLAY_SAID < longest <= limit:
            _log.info("Replaying the episodes in progress, of up to %s steps.", f"{longest:,}")
        self._time_step = self.env.restore(saved, max_steps=limit)
        self._moves = self.env.moves
        leaves = strip_prefix(arrays, "carry/")
        structure = jax.tree.structure(self._carry)
        self._carry = jax.tree.unflatten(structure, [leaves[str(i)] for i in range(len(leaves))])
        if not np.array_equal(self.env.state()["episodes"], saved["episodes"]):
            return  # The saved actions were chosen at observations of other episodes.
        actions = strip_prefix(arrays, "actions/")
        # Checkpoints of earlier versions name a single action "".
        single = actions.get(ACTION, actions.get(""))
        self._pending = actions if isinstance(self.env.action_dim, dict) else single, strip_prefix(arrays, "latents/")

    def take_along(self, counts: Mapping[str, Any], arrays: Mapping[str, np.ndarray], replay: Any) -> list[str]:
        """Go on from :meth:`state_dict` and the buffer of a run whose environments or settings may differ.

        Returns what is different: the episodes in progress are only continued in as many environments of the same kind.

        Raises ``DataError`` or ``ConfigError`` if the rows of ``replay`` do not fit the model.
        """
        changes, capacity = [], self.replay.capacity
        if replay is not None:
            self.replay.adopt(replay)
            if capacity != self.replay.capacity:
                self._resize_replay(capacity)
        own, saved = env_identity(self.env), counts.get("env", {})
        changes += [f"environments of {k} {saved[k]!r} → {v!r}" for k, v in own.items() if saved.get(k, v) != v]
        num_envs = len(arrays["env/episodes"]) if "env/episodes" in arrays else self.env.num_envs
        if num_envs != self.env.num_envs:
            changes.append(f"{num_envs} → {self.env.num_envs} environments")
        if changes:
            # Other seeds than those of the episodes so far.
            seed = (int(arrays["env/seed"]) if "env/seed" in arrays else self.env.seed) + int(counts["decisions"]) + 1
            arrays = {}
            self._receive(self.env.reset(seed=seed % 2**63))
            changes.append("all environments begin new episodes")
        self.load_state_dict(counts, arrays)
        return changes

    def _resize_replay(self, capacity: int) -> None:
        """Give the buffer another capacity, and drop its oldest rows where it is smaller."""
        position = self.replay.state_dict()
        self.replay.capacity = capacity
        first = max(position["first_row"], position["next_row"] - capacity)
        self.replay.load_state_dict({**position, "first_row": first})

    def _execute(self, actions: Any, latents: Mapping[str, np.ndarray]) -> None:
        """Add the current time step with its ``actions`` and ``latents`` to replay, and step the environments."""
        now = self._time_step
        assert now is not None
        actions = self.env.executed(actions)
        stored = jax.tree.map(lambda action: _no_action(now.is_last, action), actions)
        self.replay.add_rows(now.obs, stored, now.reward, now.is_first, now.is_last, now.is_terminal, latents=latents)
        prefill = self.decisions < self._prefill
        self.decisions += int((~now.is_last).sum())
        following = self.env.step(actions)
        stepped = ~now.is_last
        # Where an episode was cut, the environment has paid nothing: that 0 is no reward of the task.
        stepped[[event.env for event in following.events if not isinstance(event, EpisodeEnd)]] = False
        self.seen.add_rewards(following.reward[stepped], prefill=prefill)
        self._receive(following)

    def _receive(self, time_step: TimeStep) -> None:
        """Hold a new time step; check its data and note ended episodes and replaced processes."""
        self._time_step, self._moves = time_step, self.env.moves
        if time_step.is_terminal.any():
            self._validate_data(self._model_config, has_terminals=True, online=True)
        for event in time_step.events:
            if isinstance(event, EpisodeEnd):
                prefill = self.decisions <= self._prefill
                env_steps = self.steps_before + self.env_steps
                self.ends.append(EpisodeRecord(self.episodes, env_steps, prefill, event))
                self.episodes += 1
                if event.whole:
                    self.seen.add_return(event.episode_return, event.length)
            elif isinstance(event, BadStep):
                self.bad_steps += 1
            else:
                self.restarts += 1
                _log.warning("%s It was replaced, its episode closed as truncated.", event.reason)

    def _choose_actions(self, state: TrainState, executed: Any) -> None:
        """Start choosing the actions for the current time step; ``executed`` are those that led to it, or None."""
        now = self._time_step
        assert now is not None
        self.calls += 1
        if self.acts_randomly:
            self._pending = self._random_actions(now.is_first, executed), {}
        else:
            self._carry, actions, latents = self._policy(
                state.params, state.key, self._carry, now.obs, now.is_first, self.calls
            )
            self._pending = actions, latents

    def draw_random(self, call: int) -> tuple[Any, np.ndarray]:
        """Uniform random actions of call number ``call``, and where correlated ones keep the previous, bool [N]."""
        seed = np.random.SeedSequence(self._seed, spawn_key=(_ACTING, call))
        return self._draw(np.random.Generator(np.random.Philox(seed)))

    def draw_random_calls(self, first: int, count: int) -> list[tuple[Any, np.ndarray]]:
        """:meth:`draw_random` of ``count`` calls from number ``first`` on, in less time."""
        philox = np.random.Philox(0)
        rng, state = np.random.Generator(philox), philox.state
        drawn = []
        for key in philox_keys(self._seed, _ACTING, first, count):
            state["state"]["key"] = key
            philox.state = state
            drawn.append(self._draw(rng))
        return drawn

    def _draw(self, rng: np.random.Generator) -> tuple[Any, np.ndarray]:
        actions = self.env.sample_actions(rng)
        if self._prefill_policy != "correlated":
            return actions, np.zeros(self.env.num_envs, bool)
        return actions, rng.random(self.env.num_envs) < _PERSISTENCE

    def _random_actions(self, is_first: np.ndarray, executed: Any) -> Any:
        """Random actions for all environments; correlated ones are mostly the ``executed`` ones again."""
        actions, kept = self.draw_random(self.calls)
        kept = kept & ~is_first
        if executed is None or not kept.any():
            return actions

        def keep(new: np.ndarray, old: np.ndarray) -> np.ndarray:
            if new.shape != np.shape(old):  # one-hots of a policy that acted before
                return new
            return np.where(kept.reshape(-1, *[1] * (new.ndim - 1)), old, new).astype(new.dtype)

        return jax.tree.map(keep, actions, executed)


def _newest_row(replay: Any) -> int:
    """Number of the newest row of a buffer; -1 if it is empty or does not number its rows."""
    return replay.state_dict()["next_row"] - 1 if isinstance(replay, ReplayBuffer) else -1


def compiled_policy(
    policy: Policy,
    model_class: Any,
    model_config: Any,
    stored_latents: Callable[[Any], dict[str, jax.Array]] | None = None,
) -> Callable[..., tuple[Any, Any, dict[str, jax.Array]]]:
    """A family's policy, compiled: (params, root key, carry, obs, is_first, call number) → (carry, actions, latents).

    Call n samples with the key ``fold_in(fold_in(root key, _ACTING), n)``. The latents are those to store with the
    rows, {} without ``stored_latents``.
    """

    function: Any = policy  # A Protocol is not known to be hashable.
    return _compiled_policy(function, model_class, model_config, stored_latents, model_class.version())


@functools.lru_cache(maxsize=16)
def _compiled_policy(
    policy: Any,
    model_class: Any,
    model_config: Any,
    stored_latents: Callable[[Any], dict[str, jax.Array]] | None,
    version: Any,
) -> Callable[..., tuple[Any, Any, dict[str, jax.Array]]]:
    def act(
        params: Params, key: jax.Array, carry: Any, obs: Any, is_first: jax.Array, number: jax.Array
    ) -> tuple[Any, Any, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.fold_in(key, _ACTING), number)
        model = model_class.rebuild(model_config, params)
        carry, actions = policy(model, carry, obs, key, is_first=is_first)
        return carry, actions, stored_latents(carry) if stored_latents else {}

    return jax.jit(act)


def check_env_fits(env: VectorEnv, model: Any) -> None:
    """Raise ``ConfigError`` unless observation shapes, action sizes and action types of ``env`` and model agree."""
    config = model.config
    model.algorithm.validate_data(config, has_terminals=False, online=True)
    check_config_fits(config, env.obs_shape, env.action_dim, env.action_type)


def _no_action(over: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Actions [N, ...] as replay stores them: where the episode is ``over`` [N], no action (zeros, or class −1)."""
    if np.issubdtype(actions.dtype, np.integer):
        return np.where(over, -1, actions)
    return np.where(over[:, None], np.float32(0), actions)
