"""One run between host and device: its objects become arrays before the loop, and arrays become them after every call.

On the host a run is what it always is (collector, replay, latents to be written back), so callbacks, checkpoints and a
later call of ``train`` on the host know nothing of the loop on the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from worldloom.algorithm import LATENTS
from worldloom.envs import EpisodeEnd
from worldloom.envs.jax.backend import JaxBackend, as_backend
from worldloom.envs.jax.batch import Arrival, flatten_state
from worldloom.errors import ConfigError, DataError
from worldloom.ops.seed_sequence import entropy_words
from worldloom.replay.device import supports_device_storage
from worldloom.replay.index import FIRST, LAST, TERMINAL
from worldloom.replay.online import add_steps, is_interleaved
from worldloom.replay.ring import COLUMNS, Episodes, Ring, RingSpec, empty_ring, take
from worldloom.spaces import ACTION, OBS, named
from worldloom.training.collector import EpisodeRecord
from worldloom.training.on_device.episodes import episodes_so_far
from worldloom.training.on_device.program import BAD_ACTION, FINE, NO_WINDOW, Actor, LoopState, WaitingLatents
from worldloom.training.run_state import Run
from worldloom.training.update_loop import CompiledUpdate
from worldloom.training.writeback import strip_prefix

_PIECE_BYTES = 1 << 25
"""About how many bytes of rows are copied at a time."""
_FEWEST_STEPS, _MOST_STEPS = 16, 1024
"""Limits of ``Transfer.most_steps``."""
_MOST_ROWS = 2**31 - 2**24
"""Numbers of rows are int32 on the device."""


def why_on_host(run: Run) -> str | None:
    """Why the loop of an online run must be the host's, as the end of a sentence; None if it may be the device's."""
    collector = run.collector
    assert collector is not None
    env = collector.env
    if not isinstance(getattr(env, "_backend", None), JaxBackend):
        return "the environments are not in JAX"
    if run.placement.mesh is not None:
        return "it runs on one device, and a mesh divides updates over several"
    if run.data is not None:
        return "batches have a share of recorded data"
    if env.settings.get("on_bad_step") == "restart":
        return "on_bad_step='restart' needs the host at every step"
    if not supports_device_storage(collector.replay):
        return f"a {type(collector.replay).__name__} samples in its own way"
    if not is_interleaved(collector.replay, env.num_envs):
        return "replay holds rows that these environments have not collected"
    return None


class Transfer:
    """Moves one run to the device and back.

    Args:
      run: an online run for which :func:`why_on_host` is None, and whose collector is ``ready``.
      update: its compiled update.
      decisions: decision steps at which it will end.

    Attributes:
      spec: what replay is on the device.
      most_steps: steps of all environments in one call at most.
      room: rows that one call may collect; each step adds one of every environment.
      names: names of the update's metrics.
      guarded: positions among them of those that must be finite.

    Raises ``ConfigError`` if rows can no longer be numbered on the device.
    """

    def __init__(self, run: Run, update: CompiledUpdate, decisions: int):
        assert run.collector is not None
        assert run.sampler is not None
        assert run.learner is not None
        self.run, self.collector, self.env = run, run.collector, run.collector.env
        self.backend = as_backend(self.env)
        replay, num_envs = self.collector.replay, self.env.num_envs
        spec = run.model.algorithm.replay_spec(run.model.config, run.config)
        held, end = len(replay), replay.state_dict()["next_row"]
        # An episode of n steps has n + 1 rows: twice the decision steps are enough rows.
        coming = 2 * max(0, decisions - self.collector.decisions) + 4 * num_envs
        if end + coming > _MOST_ROWS:
            raise ConfigError(f"Rows after number {_MOST_ROWS:,} cannot be collected on the device; use loop='host'.")
        self.keeps_latents = run.sampler.uses_latents
        self._row = self._row_shapes()
        row_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._row))
        self._piece = max(1, _PIECE_BYTES // row_bytes)
        self.most_steps = int(np.clip(self._piece // num_envs, _FEWEST_STEPS, _MOST_STEPS))
        self.room = 2 * self.most_steps * num_envs
        # As many as from the beginning on: with fewer, a run that is continued would be compiled anew.
        slots = 1 << (max(held + coming, 2 * decisions + 4 * num_envs) - 1).bit_length()
        self.spec = RingSpec(
            # Rows of a call are copied to the host afterwards: there is room for them beside those that are held.
            slots=min(slots, replay.capacity + self.room),
            capacity=min(replay.capacity, _MOST_ROWS),
            num_envs=num_envs,
            batch_size=run.config.batch_size,
            rows=run.sampler.rows,
            cross_episodes=spec.cross_episodes,
            open_episodes=spec.open_episodes,
            fresh_first=spec.fresh_first,
        )
        # Shapes of a batch and of what an update returns.
        ids = jax.ShapeDtypeStruct((self.spec.batch_size, self.spec.rows), jnp.int32)
        batch = jax.eval_shape(lambda ids: take(self.spec, empty_ring(self.spec, self._row), ids), ids)
        batches = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), batch)
        self.names = update.metric_names(run.learner.state, batches)
        self.guarded = update.guarded(self.names)
        output = update.abstract_metrics(run.learner.state, batches)
        self._fresh = output.get(LATENTS, {}) if self.keeps_latents else {}
        self._synced = end
        self._returns: np.ndarray | None = None
        self._dirty = np.zeros(0, bool)
        self._ring_now: Callable[[], Ring] | None = None

    def _row_shapes(self) -> dict[str, Any]:
        """Shapes and dtypes of a row."""
        obs = {n: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for n, v in self._obs_now().items()}
        single = not isinstance(self.env.obs_shape, Mapping)
        latent_dtype = jnp.dtype(self.run.config.latent_dtype)
        latents = self.collector.replay.latents if self.keeps_latents else {}
        return {
            "obs": obs[OBS] if single else obs,
            "actions": jax.ShapeDtypeStruct((self.env.action_dim,), jnp.float32),
            "rewards": jax.ShapeDtypeStruct((), jnp.float32),
            "flags": jax.ShapeDtypeStruct((), jnp.uint8),
            "info": self.backend.spec.info,
            "latents": {n: jax.ShapeDtypeStruct(tuple(s), latent_dtype) for n, s in latents.items()},
        }

    # ---- to the device ----------------------------------------------------------------------------------------------

    def upload(self, device: jax.Device) -> LoopState:
        """The arrays of the run as it is on the host, on ``device``."""
        state = LoopState(self._actor(), self._ring(), self._waiting_on_device())
        self._synced = self.collector.replay.state_dict()["next_row"]
        self._only_waiting_is_dirty()
        return jax.device_put(state, device)

    def _obs_now(self) -> dict[str, np.ndarray]:
        return strip_prefix(self.env.state(), "obs/")

    def _actor(self) -> Actor:
        counts, arrays = self.collector.state_dict()
        env = strip_prefix(arrays, "env/")
        obs = strip_prefix(env, "obs/")
        zeros = {name: np.zeros(self.env.num_envs, np.float32) for name in self.backend.spec.info}
        obs_now = obs if isinstance(self.env.obs_shape, Mapping) else obs[OBS]
        now = Arrival(obs_now, env["reward"], env["is_last"], env["is_terminal"], zeros)
        carry = self.run.model.algorithm.initial_carry(self.run.model.config, self.env.num_envs)
        leaves = strip_prefix(arrays, "carry/")
        latents = strip_prefix(arrays, "latents/")
        executed: Any = self.env.executed(strip_prefix(arrays, "actions/")[ACTION])
        discrete = self.env.action_type == "discrete"
        return Actor(
            entropy=entropy_words(self.env.seed),
            envs=jax.tree.map(jnp.copy, self.backend.batch),
            now=now,
            is_first=env["lengths"] == 0,
            episodes=env["episodes"].astype(np.int32),
            carry=jax.tree.unflatten(jax.tree.structure(carry), [leaves[str(i)] for i in range(len(leaves))]),
            actions=executed.astype(np.int32 if discrete else np.float32),
            latents={
                name: latents.get(name, np.zeros((self.env.num_envs, *leaf.shape), np.float32))
                for name, leaf in self._row["latents"].items()
            },
            calls=np.int32(counts["calls"]),
            decisions=np.int32(self.collector.decisions),
            trouble=np.int32(FINE),
        )

    def _ring(self) -> Ring:
        replay, spec = self.collector.replay, self.spec
        first, end = replay.state_dict().values()
        columns = jax.tree.map(lambda leaf: np.zeros((spec.slots, *leaf.shape), leaf.dtype), self._row)
        for begin in range(first, end, self._piece):
            ids = np.arange(begin, min(begin + self._piece, end))
            found = replay.take(ids[:, None], latents=self.keeps_latents)
            found = {name: jax.tree.map(lambda x: x[:, 0], found[name]) for name in found if name != "context"} | {
                "latents": found.get("context", {})
            }
            found["flags"] = found["is_first"] * FIRST | found["is_last"] * LAST | found["is_terminal"] * TERMINAL
            for name in ("obs", "actions", "rewards", "flags", "latents"):
                jax.tree.map(functools.partial(_put, ids % spec.slots), columns[name], found[name])
        drawn = np.int32(self.collector.queue.drawn)
        return Ring(**columns, episodes=self._episodes(first), end=np.int32(end), oldest=np.int32(first), drawn=drawn)

    def _episodes(self, first: int) -> Episodes:
        spec, index = self.spec, self.collector.replay._storage.index
        streams = np.arange(spec.num_envs)
        oldest = (first + (streams - first) % spec.num_envs) // spec.num_envs
        current = np.zeros(spec.num_envs, np.int32)
        listed = np.zeros((2, spec.num_envs, spec.listed), np.int32)
        tail = np.zeros(spec.num_envs, np.int32)
        segments, finished = index.episodes(), index.finished_episodes()
        np.maximum.at(current, segments.stream, (oldest[segments.stream] + segments.begin).astype(np.int32))
        if not spec.cross_episodes:
            for stream, begin, length in zip(*finished, strict=True):
                if length >= spec.rows:
                    listed[:, stream, tail[stream]] = oldest[stream] + begin, length
                    tail[stream] += 1
        is_open = np.array([index.in_progress(int(stream)) for stream in streams])
        return Episodes(current, is_open, listed[0], listed[1], np.zeros_like(tail), tail)

    def _waiting_on_device(self) -> WaitingLatents:
        places = 2 * self.run.writeback.group
        length = next((leaf.shape[1] for leaf in self._fresh.values()), 1)
        ids = np.zeros((places, self.spec.batch_size, length), np.int32)
        latents = {name: np.zeros((places, *leaf.shape), leaf.dtype) for name, leaf in self._fresh.items()}
        applied = np.zeros(places, bool)
        arrays, number = self.run.writeback.state_arrays(), 0
        while entry := strip_prefix(arrays, f"{number}/"):
            for i, rows in enumerate(entry["row_ids"]):
                place = (int(entry["step"]) + i) % places
                ids[place], applied[place] = rows[:, -length:], entry["good"][i]
                for name, value in strip_prefix(entry, "latents/").items():
                    latents[name][place] = value[i]
            number += 1
        return WaitingLatents(ids, latents, applied)

    # ---- to the host ------------------------------------------------------------------------------------------------

    def note_updated(self, row_ids: np.ndarray) -> None:
        """Note that the latents of these rows are, or will be, rewritten on the device."""
        self._dirty[row_ids.ravel() % self.spec.slots] = True

    def _only_waiting_is_dirty(self) -> None:
        """The buffer has all latents but those that wait for their turn, which the device will write later."""
        self._dirty = np.zeros(self.spec.slots, bool)  # by slot
        for pending in self.run.writeback.waiting:
            for ids in pending.row_ids:
                self.note_updated(ids)

    def download(self, state: LoopState) -> None:
        """Bring the objects of the host up to date.

        Raises ``DataError`` or ``ConfigError`` for what the host would have raised while it stepped the environments.
        """
        actor: Actor = jax.device_get(state.actor._replace(envs=()))
        ring = state.ring
        rows = self._new_rows(ring, int(jax.device_get(ring.end)))
        self._note_arrivals(rows, actor)
        self.collector.queue.drawn = int(jax.device_get(ring.drawn))
        if int(actor.trouble) != FINE:
            self._raise_trouble(int(actor.trouble), actor)
        self.collector.calls = int(actor.calls)
        self.collector.load_arrays(self._collector_arrays(state, actor))
        self.run.writeback.load_state_arrays(self._waiting_latents(state.waiting))

    def write_back_from(self, ring: Callable[[], Ring] | None) -> None:
        """Where :meth:`write_back` finds the rows; the run's sampler calls it before the buffer is saved or read."""
        self._ring_now = ring
        assert self.run.sampler is not None
        self.run.sampler.on_device = None if ring is None else self

    def write_back(self) -> None:
        """Copy the latents that were rewritten on the device to the buffer."""
        if not self._dirty.any() or not self.keeps_latents or self._ring_now is None:
            return
        replay, ring = self.collector.replay, self._ring_now()
        # The newest row in each of these slots.
        newest = self._synced - 1
        ids = np.sort(newest - (newest - np.flatnonzero(self._dirty)) % self.spec.slots)
        ids = ids[ids >= replay.state_dict()["first_row"]]
        for begin in range(0, len(ids), self._piece):
            part = ids[begin : begin + self._piece]
            fetched = _fetch(ring._asdict(), ("latents",), part % self.spec.slots)["latents"]
            replay.write_latents(part, _as_on_host(fetched))
        self._only_waiting_is_dirty()

    @property
    def synced(self) -> int:
        """Number of the first row that is not on the host yet."""
        return self._synced

    def _new_rows(self, ring: Ring, end: int) -> dict[str, Any]:
        """The rows since the last call, of which as many as are held are added to the buffer."""
        replay, slots = self.collector.replay, self.spec.slots
        assert end - self._synced <= slots
        pieces = []
        for begin in range(self._synced, end, self._piece):
            ids = np.arange(begin, min(begin + self._piece, end))
            found = _fetch(ring._asdict(), COLUMNS, ids % slots)
            flags = found["flags"]
            actions, is_last = found["actions"], flags & LAST > 0
            if self.env.action_type == "discrete":
                actions = np.where(is_last, -1, actions.argmax(-1))
            add_steps(
                replay,
                found["obs"],
                actions,
                found["rewards"],
                flags & FIRST > 0,
                is_last,
                flags & TERMINAL > 0,
                self.spec.num_envs,
                latents=_as_on_host(found["latents"]),
            )
            pieces.append({name: found[name] for name in ("rewards", "flags", "info")})
        self._synced = end
        if not pieces:
            return {}
        joined = jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)
        return jax.tree.map(lambda x: x.reshape(-1, self.spec.num_envs), joined)

    def _note_arrivals(self, rows: dict[str, Any], actor: Actor) -> None:
        """Count steps, episodes and rewards, as ``Collector`` and ``VectorEnv`` do while they step."""
        collector, env = self.collector, self.env
        if not rows:
            return
        # Rows that were acted at, and those that were arrived at: the first of them is known from the last call.
        over = rows["flags"] & LAST > 0  # [S, N]
        now_flags = actor.is_first * FIRST | actor.now.is_last * LAST | actor.now.is_terminal * TERMINAL
        flags = np.concatenate([rows["flags"][1:], now_flags[None].astype(np.uint8)])
        rewards = np.concatenate([rows["rewards"][1:], actor.now.reward[None]])
        info = {n: np.concatenate([v[1:], actor.now.info[n][None]]) for n, v in rows["info"].items()}
        if (flags & TERMINAL).any():
            self.run.model.algorithm.validate_data(self.run.model.config, has_terminals=True, online=True)
        taken = (~over).sum(1)
        before = collector.decisions + np.concatenate([[0], np.cumsum(taken)])
        in_prefill = before[:-1] < collector.prefill
        for prefill in (True, False):
            chosen = in_prefill == prefill
            collector.seen.add_rewards(rewards[chosen][~over[chosen]], prefill=prefill)
        saved = env.state()
        totals, lengths = episodes_so_far(flags & FIRST > 0, rewards, saved["returns"], saved["lengths"])
        steps, streams = np.nonzero(flags & LAST)
        ends = zip(
            steps.tolist(),
            streams.tolist(),
            totals[steps, streams].tolist(),
            lengths[steps, streams].tolist(),
            (flags[steps, streams] & TERMINAL > 0).tolist(),
            strict=True,
        )
        info = {name: values[steps, streams].tolist() for name, values in info.items()}
        decisions = before.tolist()
        for i, (step, stream, total, length, terminated) in enumerate(ends):
            numbers = {name: values[i] for name, values in info.items() if math.isfinite(values[i])}
            end = EpisodeEnd(stream, total, length, terminated, crashed=False, info=numbers)
            env_steps = collector.steps_before + collector.env_steps_at(decisions[step + 1])
            prefill = decisions[step + 1] <= collector.prefill
            collector.ends.append(EpisodeRecord(collector.episodes, env_steps, prefill, end))
            collector.episodes += 1
            collector.seen.add_return(total, length)
        self._returns = totals[-1]
        collector.decisions = decisions[-1]

    def _collector_arrays(self, state: LoopState, actor: Actor) -> dict[str, np.ndarray]:
        """What ``Collector.load_arrays`` takes."""
        saved = self.env.state()
        steps = np.asarray(state.actor.envs.steps).astype(np.int64)
        env = {
            "seed": saved["seed"],
            "episodes": actor.episodes.astype(np.int64),
            "returns": saved["returns"] if self._returns is None else self._returns,
            "lengths": steps,
            "reward": actor.now.reward,
            "is_last": actor.now.is_last,
            "is_terminal": actor.now.is_terminal,
            "cut": np.zeros(self.env.num_envs, bool),
            **{f"obs/{name}": value for name, value in named(actor.now.obs, OBS).items()},
            **{f"state/{i}": value for i, value in flatten_state(state.actor.envs).items()},
        }
        arrays: dict[str, Any] = {f"env/{name}": np.array(value) for name, value in env.items()}
        arrays |= {f"carry/{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(actor.carry))}
        arrays |= {f"latents/{name}": value for name, value in actor.latents.items()}
        return arrays | {f"actions/{ACTION}": actor.actions}

    def _waiting_latents(self, waiting: WaitingLatents) -> dict[str, np.ndarray]:
        """What ``LatentWriteback.load_state_arrays`` takes: the latents of updates whose turn has not come."""
        if not self.keeps_latents:
            return {}
        group, step = self.run.writeback.group, self.run.step
        arrays: dict[str, np.ndarray] = {}
        applied = np.asarray(waiting.applied)
        oldest = max(0, ((step - 1) // group - 1) * group)
        numbers = [n for n in range(oldest, step) if applied[n % (2 * group)]]
        fetched = jax.device_get(waiting) if numbers else waiting
        for i, number in enumerate(numbers):
            place = slice(number % (2 * group), number % (2 * group) + 1)
            arrays |= {f"{i}/step": np.array(number), f"{i}/row_ids": fetched.ids[place].astype(np.int64)}
            arrays[f"{i}/good"] = fetched.applied[place]
            arrays |= {f"{i}/latents/{name}": value[place] for name, value in fetched.latents.items()}
        return arrays

    def _raise_trouble(self, trouble: int, actor: Actor) -> None:
        """Raise what the host would have raised where the loop stopped."""
        if trouble == NO_WINDOW:
            run = self.run
            assert run.sampler is not None
            run.sampler.buffer.draw(self.spec.batch_size, self.spec.rows, cross_episodes=self.spec.cross_episodes)
            raise DataError(f"No episode that is over has the {self.spec.rows} rows of a window any more.")
        self.env.close()
        if trouble == BAD_ACTION:
            raise DataError("The policy's actions are NaN or infinite.")
        values = {f"'{name}'": value for name, value in named(actor.now.obs, OBS).items()}
        for name, value in {**values, "'reward'": actor.now.reward}.items():
            bad = np.flatnonzero(~np.isfinite(value.reshape(len(value), -1)).all(-1)).tolist()
            if bad:
                raise DataError(
                    f"{name} came back NaN or infinite from environments {bad}; check the simulator. With "
                    "on_bad_step='restart' in make_env (--on-bad-step restart), such episodes are cut there, and the "
                    "next begin."
                )


def _put(slots: np.ndarray, column: np.ndarray, values: np.ndarray) -> None:
    column[slots] = values


def _as_on_host(latents: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Latents as the buffer has them, float32."""
    return {name: value.astype(np.float32, copy=False) for name, value in latents.items()}


def _fetch(columns: Mapping[str, Any], names: tuple[str, ...], slots: np.ndarray) -> dict[str, Any]:
    """Rows in ``slots`` [R] of ``columns``, on the host; padded to a power of two: few programs are compiled."""
    padded = np.resize(slots, 1 << (len(slots) - 1).bit_length()).astype(np.int32)
    found = jax.device_get(_gather({name: columns[name] for name in names}, padded))
    return jax.tree.map(lambda x: x[: len(slots)], found)


@jax.jit
def _gather(columns: Any, slots: jax.Array) -> Any:
    return jax.tree.map(lambda column: column[slots], columns)
