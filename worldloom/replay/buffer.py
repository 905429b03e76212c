"""Replay on the host: episodes or single rows in, windows of rows out."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from worldloom.errors import DataError
from worldloom.explain import explain_arguments, explain_attributes
from worldloom.files import absolute_path
from worldloom.replay import sampling, validation
from worldloom.replay.index import FIRST, GIVEN_FLAGS, TERMINAL
from worldloom.replay.npz import open_npz
from worldloom.replay.schema import Declared, Schema, integer, latent_shapes
from worldloom.replay.serialization import BufferContent, BufferDescription, read_content, write_content
from worldloom.replay.sources import EpisodeSources
from worldloom.replay.storage import Batch, RowStorage

OFFLINE_STREAM = -1
"""Number of the stream to which :meth:`ReplayBuffer.add_episode` adds episodes, one after the other."""


@explain_attributes({"num_transitions": "len(buffer) is the number of rows held."})
class ReplayBuffer(EpisodeSources):
    """The newest ``capacity`` rows of experience, from which batches of windows are drawn.

    Rows follow the arrival rule: row ``t`` holds ``obs[t]``, the action chosen *at* ``obs[t]``, and the reward and end
    flags received on *arriving at* ``obs[t]``. An episode of ``n`` steps has ``n + 1`` rows.

    Rows are numbered in order of arrival. Beyond ``capacity`` the oldest are evicted, row by row; the rest of an
    episode that has lost its oldest rows is still sampled. Rows of one *stream* (one environment) follow each other in
    time: :meth:`add_rows` adds one row each to several streams, :meth:`add_episode` adds whole episodes to a stream of
    its own. Memory is allocated in blocks as rows arrive, never for ``capacity`` at once.

    Arguments that describe the data may be left out and are then inferred from the first episode. Integers alone do
    not tell the number of discrete actions: if not given, it is the largest index seen so far plus 1.

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

    Not thread-safe: a caller that samples in another thread must keep writers out meanwhile. A reproducible run fixes
    the order of sampling and adding anyway, because batches are a function of the content.
    """

    @explain_arguments()
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
        self._storage = RowStorage(latent_shapes(latents or {}))

    @property
    def _schema(self) -> Schema | None:
        """What a row consists of; None while the buffer is empty."""
        return self._storage.schema

    # ---- content --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Rows held."""
        return len(self._storage.rows)

    @property
    def num_episodes(self) -> int:
        """Episodes held, including those in progress and those that have lost their oldest rows."""
        return len(self._storage.index.episodes().length)

    @property
    def episode_lengths(self) -> np.ndarray:
        """Rows held of each episode, int64 [E], stream by stream in order of arrival."""
        return self._storage.index.episodes().length.copy()

    @property
    def has_terminals(self) -> bool:
        """Whether any row held is terminal; reads the flags of all of them."""
        if len(self) == 0:
            return False
        return any(bool((flags & TERMINAL).any()) for flags in self._storage.rows.iter_column("flags"))

    @property
    def obs_shape(self) -> Any:
        """Shape of one observation, a dict of shapes, or None while unknown."""
        return self._schema.obs_shape if self._schema else copy.copy(self._declared.obs_shape)

    @property
    def action_dim(self) -> Any:
        """Size of an action or number of discrete ones, a dict of these, or None while unknown."""
        return self._schema.action_dim if self._schema else copy.copy(self._declared.action_dim)

    @property
    def action_type(self) -> Any:
        """``"continuous"`` or ``"discrete"``, a dict of these, or None while unknown."""
        return self._schema.action_type if self._schema else copy.copy(self._declared.action_type)

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Shapes per row of the latents stored beside the rows."""
        return dict(self._storage.latent_shapes)

    def summary(self, sequence_length: int = 1) -> dict[str, Any]:
        """Counts for logging: rows, episodes and their lengths, bytes, and episodes shorter than ``sequence_length``.

        Episodes with fewer rows than a window (``episodes_too_short``, ``rows_too_short``) are kept, but never sampled
        unless windows may cross episodes.
        """
        lengths = self.episode_lengths
        short = lengths[lengths < sequence_length]
        return {
            "rows": len(self),
            "capacity": self.capacity,
            "episodes": len(lengths),
            "streams": len(self._storage.index.streams().stream),
            "shortest_episode": int(lengths.min(initial=lengths[0])) if len(lengths) else 0,
            "longest_episode": int(lengths.max(initial=0)),
            "episodes_too_short": len(short),
            "rows_too_short": int(short.sum()),
            "rows_evicted": self._storage.rows.first,
            "bytes": self._storage.rows.nbytes + self._storage.latents.nbytes,
        }

    def __repr__(self) -> str:
        held = f"{len(self):,} of {self.capacity:,} rows"
        if self._schema is None:
            return f"ReplayBuffer({held})"
        facts = self.summary()
        return (
            f"ReplayBuffer({held}; {facts['episodes']:,} episodes of {facts['shortest_episode']}–"
            f"{facts['longest_episode']} rows; {self._schema}; {facts['bytes'] / 1e6:.1f} MB)"
        )

    def episodes(self) -> Iterator[Batch]:
        """Each episode held, as a dict of arrays [n, ...] with the keys of a batch, in the order of episode_lengths."""
        for ids in self._storage.index.episode_rows():
            yield self.take(ids)

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
        layout: str | None = None,
    ) -> np.ndarray:
        """Add one whole episode, in one of three layouts.

        * ``n + 1`` observations, ``n`` actions, ``n`` rewards (Gymnasium, Minari): ``actions[t]`` was chosen at
          ``obs[t]`` and led to ``rewards[t]`` and ``obs[t + 1]``. Becomes ``n + 1`` rows; the first has reward 0, the
          last a zero action.
        * ``n`` of each, ``layout="arrival"``: rows by the arrival rule, stored as given. If the first reward is 0, this
          is meant without a ``layout`` too.
        * ``n`` of each, ``layout="departure"``: ``rewards[t]`` is that of ``actions[t]``. The observation after the
          last action is missing, so that action, its reward and whether it terminated are left out, and a message says
          so once: ``n`` rows, of which the last is not terminal.

        The last row always ends the episode. It is *terminal* (nothing to bootstrap from) if ``terminated`` is True, or
        if only ``dones`` is given and is True. Time limits belong in ``truncated``; an episode given without any of the
        three counts as truncated. Each of them is one boolean for the last step, or one per action (``n`` of them), of
        which only the last may be True. ``dones``, if given with the others, must be their logical or.

        Args:
          obs: [n + 1, ...] or [n, ...], or a dict of such arrays.
          actions: continuous [n, A] in [−1, 1]; discrete integers [n] or one-hots [n, A]; or a dict of these.
          rewards: [n].
          dones: see above.
          terminated: see above.
          truncated: see above.
          task: number of the task, for multitask training: for all episodes or for none.
          layout: see above; needed for equal lengths with a first reward other than 0.

        Returns:
          Numbers of the new rows, int64 [rows].

        Raises:
          DataError: anything about the arrays is wrong; then nothing is stored.
          ConfigError: ``layout`` is another one.
        """
        ends = (dones, terminated, truncated)
        schema, columns = validation.validate_episode(
            self._schema, self._declared, obs, actions, rewards, ends, task, layout, stream=OFFLINE_STREAM
        )
        ids = self._append(schema, columns, {})
        if layout == validation.DEPARTURE and len(ids) == np.size(rewards):
            self._say_what_is_lost()
        return ids

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

        ``is_first`` begins a new episode in its stream. If the episode before it was not marked last (a crashed
        environment), its newest row counts as last, not as terminal. Episodes can be sampled while in progress.

        Args:
          obs: [N, ...] or a dict of such arrays.
          actions: chosen at ``obs``: as in :meth:`add_episode`, [N, A] or integers [N]. At rows with ``is_last`` no
            action is chosen: give a zero vector, or −1.
          rewards: [N], received on arriving at ``obs``; 0 where ``is_first``.
          is_first: bool [N].
          is_last: bool [N], the episode ends here, for whatever reason.
          is_terminal: bool [N], it ends in a terminal state.
          streams: integers ≥ 0 [N], all different, one for each environment; 0 … N − 1 by default.
          task: integers [N] or one integer, or None.
          latents: {name: [N, ...]} stored with the rows; missing ones are zero.

        Returns:
          Numbers of the new rows, int64 [N].

        Raises:
          DataError: anything about the arrays is wrong; then nothing is stored.
        """
        flags = (is_first, is_last, is_terminal)
        schema, columns = validation.validate_step(
            self._schema, self._declared, obs, actions, rewards, flags, task, streams
        )
        for number in columns["stream"][columns["flags"] & FIRST == 0].tolist():
            if not self._storage.index.in_progress(number):
                raise DataError(f"Stream {number} has no episode in progress: its next row must have is_first.")
        given = validation.convert_latents(latents or {}, self.latents, (len(columns["flags"]),))
        return self._append(schema, columns, given)

    def _append(
        self, schema: Schema, columns: Mapping[str, np.ndarray], latents: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """Store validated rows, and evict the oldest ones beyond the capacity."""
        ids = self._storage.append(schema, columns, latents)
        self._storage.drop_before(self._storage.rows.end - self.capacity)
        return ids

    # ---- sampling -------------------------------------------------------------------------------------------------

    @explain_arguments({"device": "Batches are NumPy arrays; training moves them to TrainingConfig.device."})
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
        """A batch of windows, ``take(draw(...))`` and ``continues`` = 1 − is_terminal: a dict of arrays [B, T, ...].

        ``seed``, ``update`` and ``cross_episodes`` choose them as in :meth:`draw`.

        Args:
          batch_size: windows, B.
          sequence_length: rows per window, T.
          latents: add the stored latents of row 0 as ``context``.

        Raises:
          DataError: nothing held is long enough for such a window.
        """
        options: Any = {"seed": seed, "update": update, "cross_episodes": cross_episodes}
        batch = self.take(self.draw(batch_size, sequence_length, **options), latents=latents)
        return batch | {"continues": np.float32(1) - batch["is_terminal"]}

    def draw(
        self,
        batch_size: int,
        sequence_length: int,
        *,
        seed: int = 0,
        update: int = 0,
        cross_episodes: bool = False,
        finished: bool = False,
    ) -> np.ndarray:
        """Row numbers of random windows, int64 [B, T]: a pure function of ``seed``, ``update`` and the content.

        Without ``cross_episodes``, an episode is drawn uniformly among those with at least T rows, then a start
        uniformly in it (TD-MPC2); no window spans two episodes. With it, every window of T successive rows of a stream
        is equally likely, whatever it spans (DreamerV3); ``is_first`` marks where the next episode begins. ``finished``
        leaves out the episodes in progress, unless nothing else is long enough.

        Raises:
          DataError: nothing held is long enough for such a window.
        """
        options: Any = {"seed": seed, "update": update, "cross_episodes": cross_episodes, "finished": finished}
        return sampling.draw_windows(self._storage.index, batch_size, sequence_length, **options)

    def take(self, row_ids: np.ndarray, *, latents: bool = False, observations: bool = True) -> Batch:
        """The rows ``row_ids`` [..., T] as a dict of new arrays [..., T, ...].

        * ``obs``: array or dict of arrays; left out with ``observations=False``.
        * ``actions``: float32; discrete ones as one-hots, the zero vector where no action was chosen.
        * ``rewards``: float32.
        * ``is_first``: bool, True only at the first row of an episode, so False where a window begins inside one.
        * ``is_last``: bool, True at the row an episode ended with, for whatever reason.
        * ``is_terminal``: bool, True where it ended in a terminal state.
        * ``row_ids``: int64.
        * ``task``: int32 [...], that of row 0; only if rows have tasks.
        * ``context``: {name: float32 [..., ...]}, the stored latents of row 0; only with ``latents``.

        Raises:
          DataError: a row is not held (any more), or no latents are stored.
        """
        return self._storage.take(row_ids, latents=latents, observations=observations)

    # ---- training -------------------------------------------------------------------------------------------------

    def ensure_latents(self, latents: Mapping[str, tuple[int, ...]]) -> None:
        """Store latents of these shapes per row beside the rows, zero until :meth:`write_latents`.

        Raises:
          DataError: latents of the same name are already stored with another shape.
        """
        self._storage.ensure_latents(latents)

    def write_latents(self, row_ids: np.ndarray, latents: Mapping[str, np.ndarray]) -> None:
        """Replace stored latents: ``row_ids`` int [...], ``{name: [..., *shape]}``. Rows evicted meanwhile are skipped.

        If a row occurs more than once, as in overlapping windows, its last occurrence counts.

        Raises:
          DataError: unknown names, wrong shapes, NaN, or row numbers never assigned; then nothing is written.
        """
        self._storage.write_latents(row_ids, latents)

    def match(self, *, obs_shape: Any, action_dim: Any, action_type: Any = None) -> None:
        """Check that a model of these shapes can train on the rows held, and fix an action size that was only inferred.

        Raises:
          DataError: they do not match; the message names both sides.
        """
        self._storage.schema = validation.match_schema(
            self._schema, obs_shape=obs_shape, action_dim=action_dim, action_type=action_type
        )

    # ---- other buffers --------------------------------------------------------------------------------------------

    def split(self, fraction: float = 0.1, *, seed: int = 0) -> tuple[Self, Self]:
        """Two new buffers, without latents: one to train on, and one with ``fraction`` of the episodes held out.

        Episodes stay whole and in order; each side gets at least one.

        Raises:
          ConfigError: ``fraction`` is not between 0 and 1.
          DataError: there are fewer than two episodes.
        """
        episodes = self._storage.index.episode_rows()
        held_out = sampling.draw_held_out(len(episodes), fraction, seed=seed)
        assert self._schema is not None
        parts = type(self)(self.capacity), type(self)(self.capacity)
        for number, ids in enumerate(episodes):
            columns = self._storage.rows.take(list(self._schema.columns), ids)
            columns["flags"] &= GIVEN_FLAGS
            parts[number in held_out]._append(self._schema, columns, {})
        return parts

    def adopt(self, other: ReplayBuffer) -> None:
        """Replace the content by that of ``other``, row numbers included; ``other`` must not be used afterwards."""
        vars(self).update(vars(other))

    # ---- saving ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """The replay position for a checkpoint: numbers of the oldest row held and of the next row to be added."""
        return {"first_row": self._storage.rows.first, "next_row": self._storage.rows.end}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the rows held at :meth:`state_dict` by dropping those that came later. Latents stay as they are.

        Raises:
          DataError: rows held then have been evicted, or are not in this buffer; then nothing changes.
        """
        first = integer(state.get("first_row"), "first_row", 0)
        end = integer(state.get("next_row"), "next_row", first)
        held = self._storage.rows
        if first < held.first or end > held.end:
            raise DataError(f"The checkpoint has rows {first} … {end - 1}; {held.first} … {held.end - 1} are held.")
        self._storage.drop_before(first)
        self._storage.truncate(end)

    def content(self) -> BufferContent:
        """Everything the buffer holds. The tables are its own, not copies: do not change them."""
        storage = self._storage
        rows, dropped = storage.rows, storage.index.dropped
        about = self.capacity, rows.first, rows.end, self._declared, storage.schema, self.latents, dropped
        return BufferContent(BufferDescription(*about), rows, storage.latents)

    @classmethod
    def from_content(cls, content: BufferContent) -> Self:
        """A buffer that holds ``content``, whose tables it takes over: do not use them afterwards.

        Raises:
          DataError: an episode goes on after its last row.
        """
        description = content.description
        buffer = cls(description.capacity, latents=description.latents, **description.declared.to_json())
        buffer._storage = RowStorage(buffer.latents, first=description.first_row)
        if description.schema is not None:
            buffer._storage.load(description.schema, content.rows, content.latents, description.dropped)
        return buffer

    def save(self, path: str | Path) -> Path:
        """Write everything held, latents included, to the ``.npz`` file ``path``, and return the path.

        The file appears under its name only when complete. Raises ``OSError`` if it cannot be written.
        """
        write_content(self.content(), absolute_path(path))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote: the same rows with the same numbers, hence the same batches.

        Raises:
          FileFormatError: the file is truncated, damaged, pickled or of another kind, or its content breaks the rules
            that :meth:`add_episode` enforces. Sizes are checked against the file before memory is allocated.
        """
        with open_npz(absolute_path(path), "replay file") as file:
            return cls.from_content(read_content(file))
