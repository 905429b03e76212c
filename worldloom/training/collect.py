"""Experience from environments: acting with the newest weights while the device trains."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from worldloom.envs import EpisodeEnd, TimeStep, VectorEnv
from worldloom.errors import ConfigError, DataError
from worldloom.state import TrainState
from worldloom.training.config import TrainingConfig
from worldloom.training.feed import Chunk, Fresh, Unwritten, Windows, below, send
from worldloom.training.step import Batch, Outcome

_log = logging.getLogger("worldloom")

_ACTING = 0xFFFFFFFF
"""Folded into the root key for the keys of acting: no update has this number."""
_PLAIN = ""
"""Name under which actions without names are saved."""


class Schedule(NamedTuple):
    """Which updates are due after how many decision steps (actions taken, over all environments).

    Attributes:
      prefill: decision steps before the first update.
      burst: updates due at once then.
      ratio: rows to be replayed per decision step from there on.
      rows: rows that an update replays.
    """

    prefill: int
    burst: int
    ratio: float
    rows: int

    @classmethod
    def of(cls, config: TrainingConfig, rows: int) -> Schedule:
        """That of a run whose windows have ``rows`` rows under gradient."""
        replayed = config.batch_size * rows
        return cls(config.prefill, config.prefill_updates, config.train_ratio or replayed, replayed)

    def due(self, decisions: int) -> int:
        """Updates that should be done after ``decisions`` decision steps."""
        if decisions < self.prefill:
            return 0
        # Divided last: 49 times 1/49 is less than 1 in floating point.
        return self.burst + int((decisions - self.prefill) * self.ratio / self.rows)


class Collector:
    """Steps environments and stores what they show. One call of :meth:`step` is one step of all environments.

    The action at an observation is computed on the device while the host goes on; it is asked for at the next call
    only. An update that is started in between therefore runs while the environments step, and the weights that acted
    are those from before it: one step older than in a program that does one thing after the other.

    Row t is stored once its action is known, so the last observation of all is held here, not in replay.

    Args:
      env: the environments.
      replay: where rows go.
      model: the world model; its ``act`` is called with the weights of the state given to :meth:`step`.
      config: the run's config.
      latents: whether replay stores the model's latents beside the rows.
      trained: updates done before, elsewhere.

    Attributes:
      trained: see above; the schedule counts from there.
      decisions: decision steps taken so far.
      ends: episodes that ended since someone took them from here.
      restarts: environment processes that had to be replaced so far.
    """

    def __init__(
        self, env: VectorEnv, replay: Any, model: Any, config: TrainingConfig, latents: bool, *, trained: int = 0
    ):
        algorithm = model.algorithm
        self.trained = trained
        self.env, self.replay, self._seed = env, replay, config.seed
        self._act = acting(algorithm.act, algorithm.stored_latents if latents else None)
        self._carry = algorithm.initial_carry(model.config, env.num_envs)
        self._random_steps = config.prefill if algorithm.RANDOM_PREFILL else 0
        self._endless = getattr(model.config, "episodic", True) is False
        self._rows: TimeStep | None = None
        self._choice: tuple[Any, Mapping[str, Any]] | None = None
        self._calls = self._moves = 0
        self.decisions = self.restarts = 0
        self.ends: list[EpisodeEnd] = []

    @property
    def env_steps(self) -> int:
        """Environment steps taken so far: decision steps times action repeat."""
        return self.decisions * self.env.action_repeat

    def step(self, state: TrainState) -> None:
        """Take the actions chosen before, store the rows they were chosen at, and choose the next with ``state``."""
        if self._rows is not None and self.env.moves != self._moves:
            _log.warning("The environments were reset or stepped by somebody else: all of them begin new episodes.")
            self._rows = self._choice = None
        if self._choice is not None:
            self._take(*jax.device_get(self._choice))
        elif self._rows is None:
            self._arrive(self.env.reset())
        self._choose(state)

    def state_dict(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What a resumed run needs: JSON-serialisable values, and arrays by name."""
        counts = {
            "trained": self.trained,
            "decisions": self.decisions,
            "calls": self._calls,
            "restarts": self.restarts,
            "ends": [list(end) for end in self.ends],
            "env": kind(self.env),
        }
        if self._choice is None:
            return counts, {}
        actions, latents = jax.device_get(self._choice)
        arrays = {f"env/{name}": value for name, value in self.env.state().items()}
        arrays |= {f"carry/{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(self._carry))}
        arrays |= {f"actions/{name}": np.asarray(value) for name, value in _by_name(actions).items()}
        arrays |= {f"latents/{name}": np.asarray(value) for name, value in latents.items()}
        return counts, arrays

    def load_state_dict(self, counts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Take back :meth:`state_dict`: the environments play their current episodes up to here again.

        Environments that cannot, or that come out elsewhere, begin their next episodes instead, with a warning.
        """
        self.trained = int(counts["trained"])
        self.decisions, self._calls = int(counts["decisions"]), int(counts["calls"])
        self.restarts, self.ends = int(counts["restarts"]), [EpisodeEnd(*end) for end in counts["ends"]]
        if not arrays:
            return
        saved = below(arrays, "env/")
        self._rows = self.env.restore(saved)
        self._moves = self.env.moves
        leaves = below(arrays, "carry/")
        structure = jax.tree.structure(self._carry)
        self._carry = jax.tree.unflatten(structure, [leaves[str(i)] for i in range(len(leaves))])
        if not np.array_equal(self.env.state()["episodes"], saved["episodes"]):
            return  # Elsewhere: the action chosen there has no meaning here.
        actions = below(arrays, "actions/")
        self._choice = actions if isinstance(self.env.action_dim, dict) else actions[_PLAIN], below(arrays, "latents/")

    def _take(self, actions: Any, latents: Mapping[str, np.ndarray]) -> None:
        rows = self._rows
        assert rows is not None
        stored = jax.tree.map(lambda action: _as_taken(rows.is_last, action), actions)
        self.replay.add_rows(
            rows.obs, stored, rows.reward, rows.is_first, rows.is_last, rows.is_terminal, latents=latents
        )
        self.decisions += int((~rows.is_last).sum())
        self._arrive(self.env.step(actions))

    def _arrive(self, rows: TimeStep) -> None:
        self._rows, self._moves = rows, self.env.moves
        if self._endless and rows.is_terminal.any():
            raise ConfigError(
                "An episode ended in a terminal state, but the model has episodic=False: it would value that state as "
                "if the episode went on. Create the model with episodic=True."
            )
        for event in rows.events:
            if isinstance(event, EpisodeEnd):
                self.ends.append(event)
            else:
                self.restarts += 1
                _log.warning("%s It was replaced, its episode closed as truncated.", event.reason)

    def _choose(self, state: TrainState) -> None:
        rows = self._rows
        assert rows is not None
        self._calls += 1
        if self.decisions < self._random_steps:
            seed = np.random.SeedSequence(self._seed, spawn_key=(_ACTING, self._calls))
            self._choice = self.env.sample_actions(np.random.Generator(np.random.Philox(seed))), {}
        else:
            # The optimizer's state is left out: acting need not hand it over.
            acting_state = state.replace(opt_state=None)
            self._carry, actions, latents = self._act(acting_state, self._carry, rows.obs, rows.is_first, self._calls)
            self._choice = actions, latents


class OnlineFeed:
    """Batches from what a collector stores, collecting until the next update is due.

    Everything happens in this thread, in an order that depends on the schedule alone.

    Args:
      collector: steps the environments.
      schedule: when updates are due.
      windows: what to draw.
      config: the run's config (its seed).
      device: where the batches go.
      capacity: batches per call, K.
      plan: function (step, most) → the chunk after ``step``, of at most ``most`` updates.
      unwritten: fresh latents, which a batch drawn later may see; what remains at the end is for the next feed.
      state: function () → the newest state.
    """

    def __init__(
        self,
        collector: Collector,
        schedule: Schedule,
        windows: Windows,
        config: TrainingConfig,
        device: jax.Device,
        capacity: int,
        plan: Callable[[int, int], Chunk],
        unwritten: Unwritten,
        state: Callable[[], TrainState],
    ):
        self._collector, self._windows, self._schedule, self._seed = collector, windows, schedule, config.seed
        self._device, self._capacity, self._plan = device, capacity, plan
        self._unwritten, self._state = unwritten, state

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def take(self, step: int) -> tuple[Chunk, Batch, list[Any]] | None:
        """The chunk after ``step``, its batches [K, B, T, ...] on the device, and their row numbers.

        None after one step of the environments that made no update due. Entries from ``chunk.updates`` on are padding.
        """
        if self._due() <= step:
            self._collector.step(self._state())
        if self._due() <= step:
            return None
        due = self._unwritten.due(step)
        for fresh in due if self._windows.on_device is None else ():
            fresh.write(self._windows.buffer)
        chunk = self._plan(step, self._due() - step)
        try:
            batches, row_ids = send(self._windows, self._seed, chunk, self._capacity, self._device)
        except DataError as error:
            raise DataError(
                f"{error} So far {self._collector.decisions} decision steps were taken in "
                f"{self._collector.env.num_envs} environments; a larger prefill takes more before the first update."
            ) from None
        return chunk, self._windows.complete(batches, row_ids, self._capacity, due), row_ids

    def give_back(self, chunk: Chunk, outcome: Outcome, row_ids: list[Any]) -> None:
        """Have the fresh latents of a call written back to replay, when a batch is to see them."""
        if self._windows.latents and outcome.fresh:
            self._unwritten.append(Fresh(chunk.step, row_ids[: chunk.updates], outcome))

    def settle(self) -> None:
        """Nothing is being written behind the caller's back."""

    def _due(self) -> int:
        return self._collector.trained + self._schedule.due(self._collector.decisions)


@functools.lru_cache(maxsize=8)
def acting(act: Callable[..., Any], stored_latents: Callable[[Any], dict[str, jax.Array]] | None = None) -> Any:
    """``act`` of a family, compiled: (state, carry, obs, is_first, number of the call) → carry, actions, latents.

    The key is ``fold_in`` of the state's key. Latents are what to store beside the rows, {} without ``stored_latents``.
    """

    def call(state: TrainState, carry: Any, obs: Any, is_first: jax.Array, number: jax.Array) -> tuple[Any, Any, Any]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, _ACTING), number)
        carry, actions = act(state, carry, obs, key, is_first=is_first)
        return carry, actions, stored_latents(carry) if stored_latents else {}

    return jax.jit(call)


def check_match(env: VectorEnv, model: Any) -> None:
    """Raise ``ConfigError`` unless the model takes what ``env`` shows and gives what it wants."""
    config = model.config
    if getattr(config, "num_tasks", 0):
        raise ConfigError("A multitask model is trained from recorded episodes of its tasks, not in one environment.")
    pairs = {
        "obs_shape": (_plain(env.obs_shape), _plain(config.obs_shape)),
        "action_dim": (_plain(env.action_dim), _plain(config.action_dim)),
        "action_type": (_plain(env.action_type), _plain(config.action_type)),
    }
    for name, (wanted, given) in pairs.items():
        if isinstance(wanted, dict) and isinstance(given, str):
            given = dict.fromkeys(wanted, given)
        if wanted != given:
            raise ConfigError(
                f"The environment has {name}={wanted!r}, the model {given!r}. Create the model with obs_shape="
                "env.obs_shape, action_dim=env.action_dim, action_type=env.action_type."
            )


def kind(env: VectorEnv) -> dict[str, Any]:
    """What of ``env`` decides about episodes, as far as JSON can tell; where and how fast they run is left out."""
    plain = {name: value for name, value in env.settings.items() if isinstance(value, str | int | float | None)}
    free = ("seed", "num_envs", "parallel", "worker_timeout", "action_repeat", "time_limit")
    effective = {"action_repeat": env.action_repeat, "episode_length": env.episode_length}
    return {name: value for name, value in plain.items() if name not in free} | effective


def check_same_kind(saved: Mapping[str, Any], env: VectorEnv) -> None:
    """Raise ``ConfigError`` if a run was collected from other environments than ``env``: ``saved`` is their kind."""
    for name, value in kind(env).items():
        # What was made of a function or an object has no spec that could be compared.
        if name in saved and saved[name] != value:
            raise ConfigError(
                f"The run was collected from environments with {name}={saved[name]!r}, these have {value!r}. Resume "
                "with the saved value, or begin a new run from its weights: worldloom.training.checkpoint.load_weights."
            )


def _by_name(actions: Any) -> Mapping[str, Any]:
    return actions if isinstance(actions, Mapping) else {_PLAIN: actions}


def _plain(value: Any) -> Any:
    return {name: _plain(inner) for name, inner in value.items()} if isinstance(value, Mapping) else value


def _as_taken(over: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """``actions`` as the environments take them, within ±1; none (a zero vector, class −1) where an episode is over."""
    if np.issubdtype(actions.dtype, np.integer):
        return np.where(over, -1, actions)
    # DreamerV3's normal policy exceeds ±1; its dynamics take such entries for ±1 too, so nothing is lost.
    return np.where(over[:, None], np.float32(0), np.clip(actions, -1, 1))
