"""Replay on the host: episodes or single rows in, windows of rows out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from worldloom.errors import ConfigError, DataError, FileFormatError
from worldloom.replay import door
from worldloom.replay.files import Member, NpzFile, open_npz, write_npz
from worldloom.replay.rows import Column, Rows
from worldloom.replay.schema import (
    DISCRETE,
    FLOAT32,
    UINT8,
    Declared,
    Schema,
    bare,
    by_key,
    column_name,
    integer,
    latent_name,
    one_hot,
    shape,
)
from worldloom.replay.streams import CLOSED, FIRST, LAST, TERMINAL, Index

Batch = dict[str, Any]

OFFLINE = -1
"""Stream of the episodes that :meth:`ReplayBuffer.add_episode` adds, one after the other."""

FORMAT, VERSION = "worldloom.replay", 1

GIVEN = np.uint8(FIRST | LAST | TERMINAL)
"""The flags that were given with a row; ``CLOSED`` follows from the rows after it."""


class ReplayBuffer:
    """The newest ``capacity`` rows of experience, from which batches of windows are drawn.

    Rows follow the arrival rule: row ``t`` holds ``obs[t]``, the action chosen *at* ``obs[t]``, and the reward and end
    flags received on *arriving at* ``obs[t]``. An episode of ``n`` steps has ``n + 1`` rows.

    Rows are numbered in the order they arrive and leave in that order, one by one, once there are more than
    ``capacity``; an episode that has lost its oldest rows is sampled from the rest. Rows of one *stream* (one
    environment) follow each other in time; :meth:`add_episode` appends to one stream of its own, :meth:`add_rows`
    takes one row each from several. Memory is taken in blocks as rows arrive, never for ``capacity`` at once.

    Every argument that describes the data may be left out and then follows from the first episode. The number of
    discrete actions cannot be known from integers alone: if not given, it is the largest index seen so far, plus 1.

    Args:
      capacity: largest number of rows held.
      obs_shape: shape of one observation, or a dict of shapes. Images (three axes) are uint8 0–255 or floats 0–1, and
        stay uint8; everything else becomes float32.
      action_dim: size of a continuous action or number of discrete ones; a dict for dicts of actions.
      action_type: ``"continuous"`` or ``"discrete"``; a dict for dicts of actions.
      latents: shapes per row of latents that training stores beside the rows, such as ``{"deter": (512,)}``; zero
        until :meth:`write_latents`.

    Raises:
      ConfigError: an argument is out of its range.

    Not thread-safe: whoever samples in another thread keeps writers out meanwhile. A reproducible run fixes the order
    of sampling and adding anyway, since batches are a function of the content.
    """

    def __init__(
        self,
        capacity: int = 1_000_000,
        *,
        obs_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None,
        action_dim: int | Mapping[str, int] | None = None,
        action_type: str | Mapping[str, str] | None = None,
        latents: Mapping[str, tuple[int, ...]] | None = None,
    ):
        self.capacity = integer(capacity, "capacity", 1)
        self._declared = Declared.check(obs_shape, action_dim, action_type)
        self._latents = {key: shape(size, f"latents[{key!r}]") for key, size in (latents or {}).items()}
        self._schema: Schema | None = None
        self._rows = Rows({})
        # Beside the rows and not among them: rows never change once they are there, latents do all the time.
        self._latent_rows = Rows({})
        self._index = Index()

    # ---- what it holds --------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Rows held."""
        return len(self._rows)

    @property
    def num_episodes(self) -> int:
        """Episodes held, those in progress and those cut by eviction included."""
        return len(self._index.episodes().length)

    @property
    def episode_lengths(self) -> np.ndarray:
        """Rows held of each episode, int64 [E], stream by stream in order of arrival."""
        return self._index.episodes().length.copy()

    @property
    def has_terminals(self) -> bool:
        """Whether any row held is terminal. Looks at all of them."""
        return any(bool((flags & TERMINAL).any()) for flags in self._rows.pieces("flags")) if len(self) else False

    @property
    def obs_shape(self) -> Any:
        """Shape of one observation, a dict of shapes, or None while unknown."""
        if self._schema is None:
            return None if self._declared.obs_shape is None else bare(self._declared.obs_shape)
        return bare({key: column.shape for key, column in self._schema.obs.items()})

    @property
    def action_dim(self) -> Any:
        """Size of an action or number of discrete ones, a dict of these, or None while unknown."""
        if self._schema is None:
            return None if self._declared.action_dim is None else bare(self._declared.action_dim)
        return bare({key: action.dim for key, action in self._schema.actions.items()})

    @property
    def action_type(self) -> Any:
        """``"continuous"`` or ``"discrete"``, a dict of these, or None while unknown."""
        if self._schema is None:
            kinds = self._declared.action_type
            return bare(kinds) if isinstance(kinds, dict) else kinds
        return bare({key: action.kind for key, action in self._schema.actions.items()})

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Shapes per row of the latents stored beside the rows."""
        return dict(self._latents)

    def summary(self, sequence_length: int = 1) -> dict[str, Any]:
        """Counts for a log: rows, episodes and their lengths, bytes, and what windows of ``sequence_length`` leave out.

        Episodes with fewer rows than a window (``episodes_too_short``, ``rows_too_short``) are kept but never sampled
        unless windows may cross episodes.
        """
        lengths = self.episode_lengths
        short = lengths[lengths < sequence_length]
        return {
            "rows": len(self),
            "capacity": self.capacity,
            "episodes": len(lengths),
            "streams": len(self._index.streams().stream),
            "shortest_episode": int(lengths.min(initial=lengths[0])) if len(lengths) else 0,
            "longest_episode": int(lengths.max(initial=0)),
            "episodes_too_short": len(short),
            "rows_too_short": int(short.sum()),
            "rows_evicted": self._rows.first,
            "bytes": self._rows.nbytes + self._latent_rows.nbytes,
        }

    def __repr__(self) -> str:
        held = f"{len(self):,} of {self.capacity:,} rows"
        if self._schema is None:
            return f"ReplayBuffer({held})"
        facts = self.summary()
        obs = ", ".join(f"{key} {c.shape} {c.dtype}".strip() for key, c in self._schema.obs.items())
        actions = ", ".join(f"{key} {a.dim} {a.kind}".strip() for key, a in self._schema.actions.items())
        return (
            f"ReplayBuffer({held}; {facts['episodes']:,} episodes of {facts['shortest_episode']}–"
            f"{facts['longest_episode']} rows; obs {obs}; actions {actions}; {facts['bytes'] / 1e6:.1f} MB)"
        )

    def episodes(self) -> Iterator[Batch]:
        """Each episode held as a dict of arrays [n, ...] with a batch's keys; stream by stream in order of arrival."""
        for ids in self._episode_rows():
            yield self.take(ids)

    def _episode_rows(self) -> list[np.ndarray]:
        """Row numbers of each episode."""
        return [
            self._index.rows(stream[None], begin[None], int(length))[0]
            for stream, begin, length in zip(*self._index.episodes(), strict=True)
        ]

    # ---- adding ---------------------------------------------------------------------------------------------------

    def add_episode(
        self,
        obs: Any,
        actions: Any,
        rewards: Any,
        dones: Any = None,
        *,
        terminated: Any = None,
        truncated: Any = None,
        task: int | None = None,
    ) -> np.ndarray:
        """Add one whole episode, in either of two layouts told apart by length.

        * ``n + 1`` observations, ``n`` actions, ``n`` rewards (Gymnasium, Minari): ``actions[t]`` was chosen at
          ``obs[t]`` and brought ``rewards[t]`` with ``obs[t + 1]``. Becomes ``n + 1`` rows; the first has reward 0, the
          last a zero action.
        * equal lengths: rows by the arrival rule, stored as given.

        The last row is always an episode's end. It is *terminal* (nothing to bootstrap from) if ``terminated`` says so,
        or, when only ``dones`` is given, if ``dones`` does; time limits belong in ``truncated``, and an episode given
        without any of the three counts as cut off by one. Each of them is one boolean for the last step, or one per
        action (``n`` of them), True at most at the last. ``dones`` beside the others must be their "or".

        Args:
          obs: [n + 1, ...] or [n, ...], or a dict of such arrays.
          actions: continuous [n, A] in [−1, 1]; discrete integers [n] or one-hots [n, A]; or a dict of these.
          rewards: [n].
          dones: see above.
          terminated: see above.
          truncated: see above.
          task: number of the task, for multitask training: for all episodes or for none.

        Returns:
          Numbers of the new rows, int64 [rows].

        Raises:
          DataError: anything about the arrays is wrong; then nothing is stored.
        """
        ends = (dones, terminated, truncated)
        return self._append(
            *door.episode(self._schema, self._declared, obs, actions, rewards, ends, task, stream=OFFLINE)
        )

    def add_rows(
        self,
        obs: Any,
        actions: Any,
        rewards: Any,
        is_first: Any,
        is_last: Any,
        is_terminal: Any,
        *,
        streams: Any = None,
        task: Any = None,
        latents: Mapping[str, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Add one row from each of N environments, by the arrival rule; one call per environment step.

        ``is_first`` begins a new episode in its stream. If the one before it was not marked last (a crashed
        environment), its last row counts as last, not as terminal. Episodes may be sampled while in progress.

        Args:
          obs: [N, ...] or a dict of such arrays.
          actions: chosen at ``obs``: as in :meth:`add_episode`, [N, A] or integers [N]; at rows with ``is_last`` no
            action is chosen: a zero vector, or −1.
          rewards: [N], received on arriving at ``obs``; 0 where ``is_first``.
          is_first: bool [N].
          is_last: bool [N], the episode ends here for whatever reason.
          is_terminal: bool [N], it ends in a terminal state.
          streams: integers ≥ 0 [N], all different, naming the environments; 0 … N − 1 by default.
          task: integers [N] or one integer, or None.
          latents: {name: [N, ...]} stored with the rows; missing ones are zero.

        Returns:
          Numbers of the new rows, int64 [N].

        Raises:
          DataError: anything about the arrays is wrong; then nothing is stored.
        """
        flags = (is_first, is_last, is_terminal)
        schema, columns = door.step(self._schema, self._declared, obs, actions, rewards, flags, task, streams)
        for number in columns["stream"][columns["flags"] & FIRST == 0].tolist():
            if not self._index.in_progress(number):
                raise DataError(f"Stream {number} has no episode in progress: its next row must have is_first.")
        return self._append(schema, columns, self._convert_latents(latents or {}, (len(columns["flags"]),)))

    def _append(
        self, schema: Schema, columns: door.Arrays, latents: Mapping[str, np.ndarray] | None = None
    ) -> np.ndarray:
        """Store checked columns, all or (out of memory) nothing, and let the oldest rows go."""
        count = len(columns["flags"])
        given = {latent_name(key): values for key, values in (latents or {}).items()}
        stored = {
            name: given.get(name, np.zeros((count, *column.shape), column.dtype))
            for name, column in self._latent_columns().items()
        }
        if self._schema is None:
            rows, latent_rows = self._tables(schema, self._rows.end)
        else:
            rows, latent_rows = self._rows, self._latent_rows
        rows.reserve(count)
        latent_rows.append(stored, count)
        ids = rows.append(columns, count)
        self._schema, self._rows, self._latent_rows = schema, rows, latent_rows
        self._enter(ids, columns["stream"], columns["flags"])
        self._drop_before(rows.end - self.capacity)
        return ids

    def _enter(self, ids: np.ndarray, streams: np.ndarray, flags: np.ndarray) -> None:
        """Index new rows, and mark those whose episode a new one ends."""
        closed = self._index.add(ids, streams, flags)
        if len(closed):
            self._rows.put("flags", closed, self._rows.take(["flags"], closed)["flags"] | np.uint8(CLOSED))

    def _drop_before(self, first: int) -> None:
        if first > self._rows.first:
            self._rows.drop_before(first)
            self._latent_rows.drop_before(first)
            self._index.drop_before(first)

    # ---- sampling -------------------------------------------------------------------------------------------------

    def sample(
        self,
        batch_size: int,
        sequence_length: int,
        *,
        seed: int = 0,
        update: int = 0,
        cross_episodes: bool = False,
        latents: bool = False,
    ) -> Batch:
        """A batch of ``batch_size`` windows of ``sequence_length`` rows: ``take(draw(...))``.

        Args:
          batch_size: windows, B.
          sequence_length: rows per window, T.
          seed: seed of the run.
          update: number of the update the batch is for.
          cross_episodes: see :meth:`draw`.
          latents: add the stored latents of row 0 as ``context``.

        Returns:
          See :meth:`take`; arrays [B, T, ...].

        Raises:
          DataError: nothing held is long enough for such a window.
        """
        ids = self.draw(batch_size, sequence_length, seed=seed, update=update, cross_episodes=cross_episodes)
        return self.take(ids, latents=latents)

    def draw(
        self, batch_size: int, sequence_length: int, *, seed: int = 0, update: int = 0, cross_episodes: bool = False
    ) -> np.ndarray:
        """Row numbers of random windows, int64 [B, T]: a pure function of ``seed``, ``update`` and the content.

        Without ``cross_episodes`` an episode is drawn uniformly among those with at least T rows, then a start
        uniformly in it (TD-MPC2); no window spans two episodes. With it, every window of T successive rows of a stream
        is equally likely, whatever episodes it spans (DreamerV3); ``is_first`` marks the seams.

        Raises:
          DataError: nothing held is long enough for such a window.
        """
        size, rows = integer(batch_size, "batch_size", 1), integer(sequence_length, "sequence_length", 1)
        runs = self._index.streams() if cross_episodes else self._index.episodes()
        fitting = np.flatnonzero(runs.length >= rows)
        if len(fitting) == 0:
            raise DataError(self._too_short(rows, cross_episodes, int(runs.length.max(initial=0))))
        starts = runs.length[fitting] - rows + 1
        which, where = uniform(integer(seed, "seed", 0), integer(update, "update", 0), (2, size))
        if cross_episodes:
            total = np.cumsum(starts)
            window = np.floor(which * total[-1]).astype(np.int64)
            run = np.searchsorted(total, window, side="right")
            start = window - (total - starts)[run]
        else:
            run = np.floor(which * len(fitting)).astype(np.int64)
            start = np.floor(where * starts[run]).astype(np.int64)
        chosen = fitting[run]
        return self._index.rows(runs.stream[chosen], runs.begin[chosen] + start, rows)

    def take(self, row_ids: np.ndarray, *, latents: bool = False, observations: bool = True) -> Batch:
        """The rows ``row_ids`` [..., T] as a dict of new arrays [..., T, ...].

        ``obs`` (array or dict of arrays), ``actions`` (float32; discrete ones as one-hots, the zero vector where none
        was chosen), ``rewards`` float32, ``row_ids`` int64, and three booleans: ``is_first`` True at the first row of
        an episode only, so False at a window's beginning in the middle of one; ``is_last`` True at the row an episode
        ended with for whatever reason; ``is_terminal`` True where it ended in a terminal state. With tasks, ``task``
        int32 [...], that of row 0. With ``latents``, ``context`` {name: float32 [..., ...]}, the stored latents of
        row 0. ``observations=False`` leaves out ``obs``.

        Raises:
          DataError: a row is not held (any more), or no latents are stored.
        """
        ids = door.numbers(row_ids, "row_ids", "iu").astype(np.int64)
        if len(self) == 0:
            raise DataError("The buffer is empty; add episodes first.")
        if ids.ndim == 0 or ids.size == 0 or ids.min() < self._rows.first or ids.max() >= self._rows.end:
            raise DataError(
                f"row_ids must be an array [..., T] of rows held, {self._rows.first} … {self._rows.end - 1}."
            )
        if latents and not self._latents:
            raise DataError(
                "No latents are stored; create the buffer with latents={'deter': …} or call ensure_latents."
            )
        assert self._schema is not None
        obs = {key: column_name("obs", key) for key in self._schema.obs}
        left_out = {"stream", "task"} if observations else {"stream", "task", *obs.values()}
        names = [name for name in self._schema.columns if name not in left_out]
        found = {k: v.reshape(*ids.shape, *v.shape[1:]) for k, v in self._rows.take(names, ids.ravel()).items()}
        flags = found["flags"]
        batch: Batch = {
            "actions": bare(
                {
                    key: one_hot(found[column_name("actions", key)], action.dim)
                    if action.kind == DISCRETE
                    else found[column_name("actions", key)]
                    for key, action in self._schema.actions.items()
                }
            ),
            "rewards": found["rewards"],
            "is_first": flags & FIRST != 0,
            "is_last": flags & (LAST | CLOSED) != 0,
            "is_terminal": flags & TERMINAL != 0,
            "row_ids": ids,
        }
        if observations:
            batch["obs"] = bare({key: found[name] for key, name in obs.items()})
        head = ids[..., 0]
        if self._schema.has_task:
            batch["task"] = self._rows.take(["task"], head.ravel())["task"].reshape(head.shape)
        if latents:
            stored = self._latent_rows.take(list(self._latent_columns()), head.ravel())
            batch["context"] = {k: stored[latent_name(k)].reshape(*head.shape, *s) for k, s in self._latents.items()}
        return batch

    def _too_short(self, rows: int, cross_episodes: bool, longest: int) -> str:
        if len(self) == 0:
            return "The buffer is empty; add episodes before sampling."
        what = "stream" if cross_episodes else "episode"
        hint = "" if cross_episodes else ", or let windows cross episodes if the algorithm does (cross_episodes=True)"
        return (
            f"A window needs {rows} rows; the longest {what} held has {longest}. Use sequence_length ≤ {longest}, add "
            f"longer episodes{hint}."
        )

    # ---- latents --------------------------------------------------------------------------------------------------

    def ensure_latents(self, latents: Mapping[str, tuple[int, ...]]) -> None:
        """Store latents of these shapes beside the rows, zero where they have not been written.

        Raises:
          DataError: latents of the same name but another shape are there already.
        """
        wanted = {key: shape(size, f"latents[{key!r}]") for key, size in latents.items()}
        for key, size in wanted.items():
            if self._latents.get(key, size) != size:
                raise DataError(f"latents '{key}' are stored with shape {self._latents[key]}; {size} was asked for.")
        if wanted.keys() <= self._latents.keys():
            return
        before, self._latents = self._latent_rows, self._latents | wanted
        if self._schema is not None:
            grown = Rows(self._latent_columns(), first=self._rows.first)
            ids = grown.extend(len(self))
            for name in before.columns:
                grown.put(name, ids, before.take([name], ids)[name])
            self._latent_rows = grown

    def write_latents(self, row_ids: np.ndarray, latents: Mapping[str, np.ndarray]) -> None:
        """Replace stored latents: ``row_ids`` int [...], ``{name: [..., *shape]}``. Rows evicted meanwhile are skipped.

        Of rows that occur more than once, as in overlapping windows, the last occurrence counts.

        Raises:
          DataError: unknown names, wrong shapes, NaN, or row numbers that were never given; then nothing is written.
        """
        ids = door.numbers(row_ids, "row_ids", "iu").astype(np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self._rows.end):
            raise DataError(f"row_ids must lie in 0 … {self._rows.end - 1}; got {ids.min()} … {ids.max()}.")
        values = self._convert_latents(latents, ids.shape)
        held = ids.ravel() >= self._rows.first
        for key, value in values.items():
            flat = value.reshape(ids.size, *self._latents[key])
            self._latent_rows.put(latent_name(key), ids.ravel()[held], flat[held])

    def _convert_latents(self, latents: Mapping[str, np.ndarray], lead: tuple[int, ...]) -> dict[str, np.ndarray]:
        converted = {}
        for key, value in latents.items():
            if key not in self._latents:
                raise DataError(f"There are no latents '{key}' here, only {sorted(self._latents) or 'none at all'}.")
            array, expected = np.asarray(value), (*lead, *self._latents[key])
            if array.shape != expected:
                raise DataError(f"latents '{key}' have shape {array.shape}; {expected} is needed.")
            converted[key] = door.floats(array, f"latents '{key}'")
        return converted

    def _latent_columns(self) -> dict[str, Column]:
        return {latent_name(key): Column(size, FLOAT32) for key, size in self._latents.items()}

    def _tables(self, schema: Schema, first: int) -> tuple[Rows, Rows]:
        return Rows(schema.columns, first=first), Rows(self._latent_columns(), first=first)

    # ---- meeting a model ------------------------------------------------------------------------------------------

    def match(self, *, obs_shape: Any, action_dim: Any, action_type: Any = None) -> None:
        """Check that a model of these shapes can train on what is held, and fix an action size that was only inferred.

        Raises:
          DataError: they do not go together; the message names both sides.
        """
        if self._schema is None:
            raise DataError("The buffer is empty; add episodes before training.")
        shapes = {key: tuple(size) for key, size in by_key(obs_shape).items()}
        held = {key: column.shape for key, column in self._schema.obs.items()}
        if shapes != held:
            raise DataError(f"The observations held have shape {bare(held)}; the model takes {bare(shapes)}.")
        dims, kinds = by_key(action_dim), by_key(action_type)
        actions = dict(self._schema.actions)
        door.same_keys(actions, dims, "The held actions")
        for key, action in actions.items():
            kind = kinds.get(key, kinds.get("")) or action.kind
            if kind != action.kind or (dims[key] != action.dim and (action.fixed or dims[key] < action.dim)):
                raise DataError(f"The actions held are {action.dim} {action.kind}; the model takes {dims[key]} {kind}.")
            actions[key] = action._replace(dim=dims[key], fixed=True)
        self._schema = Schema(self._schema.obs, actions, self._schema.has_task)

    # ---- other buffers --------------------------------------------------------------------------------------------

    @classmethod
    def from_episodes(
        cls, episodes: Iterable[Mapping[str, Any]], capacity: int | None = None, **described: Any
    ) -> Self:
        """A buffer of ``episodes``, each a mapping with the arguments of :meth:`add_episode`.

        Args:
          episodes: such mappings, in any iterable.
          capacity: rows; None is as many as the episodes have.
          **described: ``obs_shape``, ``action_dim``, ``action_type``, ``latents`` as in the constructor.
        """
        buffer = cls(2**62 if capacity is None else capacity, **described)
        for episode in episodes:
            buffer.add_episode(**episode)
        if capacity is None:
            buffer.capacity = max(1, len(buffer))
        return buffer

    def split(self, fraction: float = 0.1, *, seed: int = 0) -> tuple[Self, Self]:
        """Two new buffers, without latents: one to train on, and one with ``fraction`` of the episodes held out.

        Whole episodes go to one side, at least one to each, and keep their order.

        Raises:
          DataError: there are fewer than two episodes.
        """
        if not 0 < fraction < 1:
            raise ConfigError(f"fraction must lie between 0 and 1, not {fraction!r}.")
        episodes = self._episode_rows()
        if self._schema is None or len(episodes) < 2:
            raise DataError(f"{len(episodes)} episode(s) cannot be split; two at least are needed.")
        count = min(max(round(fraction * len(episodes)), 1), len(episodes) - 1)
        shuffled = np.argsort(uniform(integer(seed, "seed", 0), 0, (len(episodes),)), kind="stable")
        held_out = set(shuffled[:count].tolist())
        parts = type(self)(self.capacity), type(self)(self.capacity)
        for number, ids in enumerate(episodes):
            columns = self._rows.take(list(self._schema.columns), ids)
            columns["flags"] &= GIVEN
            parts[number in held_out]._append(self._schema, columns)
        return parts

    def adopt(self, other: ReplayBuffer) -> None:
        """Hold exactly what ``other`` holds, under the same numbers, instead of what was here; ``other`` is used up."""
        vars(self).update(vars(other))

    # ---- saving ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """The replay position for a checkpoint: the numbers of the oldest row held and of the next to come."""
        return {"first_row": self._rows.first, "next_row": self._rows.end}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go back to the rows held at :meth:`state_dict`, forgetting those that came later. Latents stay as they are.

        Raises:
          DataError: rows held then are not held any more, or have not been read back; then nothing changes.
        """
        first = integer(state.get("first_row"), "first_row", 0)
        end = integer(state.get("next_row"), "next_row", first)
        if first < self._rows.first or end > self._rows.end:
            raise DataError(
                f"The checkpoint has rows {first} … {end - 1}; {self._rows.first} … {self._rows.end - 1} are held."
            )
        self._drop_before(first)
        self._rows.truncate(end)
        self._latent_rows.truncate(end)
        newest = self._index.truncate(end)
        if len(newest) == 0:
            self._schema, self._rows, self._latent_rows = None, Rows({}, first=end), Rows({}, first=end)
            return
        flags = self._rows.take(["flags"], newest)["flags"] & GIVEN
        self._rows.put("flags", newest, flags)
        self._index.reopen(flags)

    def save(self, path: str | Path) -> Path:
        """Write everything held, latents included, to the ``.npz`` file ``path`` and return it.

        The file appears under its name only when complete. Raises ``OSError`` if it cannot be written.
        """
        target = Path(path)
        meta = np.frombuffer(json.dumps(self._meta()).encode(), np.uint8)
        members = [Member("meta", len(meta), Column((), UINT8), [meta])]
        for table in (self._rows, self._latent_rows):
            members += [Member(n, len(self), column, table.pieces(n)) for n, column in table.columns.items()]
        write_npz(target, members)
        return target

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote: the same rows under the same numbers, hence the same batches.

        Raises:
          FileFormatError: the file is truncated, damaged, pickled, something else, or its content breaks the rules that
            :meth:`add_episode` enforces. Sizes are checked against the file before memory is taken.
        """
        with open_npz(Path(path), "replay file") as file:
            return cls._from_npz(file)

    def _meta(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **self._description()}

    @classmethod
    def _from_npz(cls, file: NpzFile) -> Self:
        meta = json.loads(file.small("meta", 1 << 20))
        if not isinstance(meta, dict) or meta.get("format") != FORMAT or meta.get("version") != VERSION:
            raise FileFormatError(f"it is not in the format {FORMAT}, version {VERSION}")
        buffer, schema, first, count = cls._described(meta)
        tables = buffer._tables(schema, first) if schema else (Rows({}, first=first), Rows({}, first=first))
        columns = {name: column for table in tables for name, column in table.columns.items()}
        if file.names != {"meta", *columns}:
            raise FileFormatError("its members are not those its description names")
        for name, column in columns.items():
            file.check(name, count, column)
        # Only now is memory taken: as much as the file really holds.
        for table in tables:
            ids = table.extend(count)
            for name, column in table.columns.items():
                start = 0
                for piece in file.pieces(name, count, column, table.block_rows):
                    assert schema is not None
                    door.check_stored(schema, name, piece)
                    table.put(name, ids[start : start + len(piece)], piece)
                    start += len(piece)
        buffer._take_over(schema, *tables)
        return buffer

    def _description(self) -> dict[str, Any]:
        """All but the rows themselves, as JSON values."""
        return {
            "capacity": self.capacity,
            **self.state_dict(),
            "declared": self._declared.to_json(),
            "schema": self._schema and self._schema.to_json(),
            "latents": dict(self._latents),
        }

    @classmethod
    def _described(cls, description: Mapping[str, Any]) -> tuple[Self, Schema | None, int, int]:
        """An empty buffer for the rows of a :meth:`_description`: it, their schema, the first number, how many."""
        buffer = cls(description["capacity"], latents=description["latents"], **description["declared"])
        first = integer(description["first_row"], "first_row", 0)
        count = integer(description["next_row"], "next_row", first) - first
        if count > buffer.capacity:
            raise DataError(f"{count} rows are more than the capacity of {buffer.capacity}.")
        return buffer, Schema.from_json(description["schema"]) if count else None, first, count

    def _take_over(self, schema: Schema | None, rows: Rows, latent_rows: Rows) -> None:
        """Hold these rows, read from a file; their order is checked and indexed."""
        self._schema, self._rows, self._latent_rows = schema, rows, latent_rows
        if schema is None:
            return
        ids = np.arange(rows.first, rows.end)
        held = rows.take(["stream", "flags"], ids)
        held["flags"] &= GIVEN
        door.check_order(held["stream"], held["flags"])
        rows.put("flags", ids, held["flags"])
        self._enter(ids, held["stream"], held["flags"])


def uniform(seed: int, update: int, size: tuple[int, ...]) -> np.ndarray:
    """Numbers in [0, 1), float64 of shape ``size``, the same for the same ``seed`` and ``update`` on every machine.

    Made from raw Philox bits: NumPy keeps those the same between its versions, unlike its distributions.
    """
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(update,))).random_raw(int(np.prod(size)))
    return (bits >> np.uint64(11)).reshape(size) * 2.0**-53
