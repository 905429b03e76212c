"""A recorded dataset that is read as it is sampled."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from worldloom.data.file_rows import keep_smallest
from worldloom.data.parts import Columns, Part, files_of
from worldloom.errors import ConfigError, DataError, FileFormatError
from worldloom.replay import ReplayBuffer
from worldloom.replay.conversion import (
    as_finite_floats,
    as_numbers,
    convert_actions,
    convert_obs,
    infer_action,
    infer_obs_column,
)
from worldloom.replay.index import Segments
from worldloom.replay.sampling import WindowTable, draw_held_out, too_short
from worldloom.replay.schema import CONTINUOUS, DISCRETE, Action, Declared, Schema, one_hot
from worldloom.replay.validation import match_schema
from worldloom.spaces import ACTION, OBS, named

Batch = dict[str, Any]

_SCAN_ROWS = 65_536


class Dataset:
    """Recorded episodes, read from their files as they are sampled; :func:`worldloom.data.open` makes one.

    It is sampled as a :class:`~worldloom.replay.ReplayBuffer` of the same episodes is: the same seed and update give
    the same batch, in the same layout. Nothing can be added to it, and it holds no latents. What is read is checked as
    a buffer checks what is added to it, when it is read.

    Args:
      parts: where the episodes are.
      spec: what was opened, for messages.
      kind: the format, such as ``"hdf5"``.
      obs_shape, action_dim, action_type: as in ``ReplayBuffer``; None is inferred from the data. To count discrete
        actions, all of them are read.
      progress: wraps an iterable of parts that are read one by one, such as ``tqdm``.

    Raises:
      DataError: there is no episode, or the first rows cannot be trained on.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        spec: str,
        kind: str = "",
        obs_shape: Any = None,
        action_dim: int | None = None,
        action_type: str | None = None,
        progress: Callable[[Any], Any] = iter,
    ):
        self.spec, self.kind = spec, kind
        self.parts = [part for part in parts if len(part.length)]
        if not self.parts:
            raise DataError(f"{spec} holds no episode of at least two observations.")
        declared = Declared.check(obs_shape, action_dim, action_type)
        self._index()
        keep_smallest(each for part in self.parts if part.in_files for each in files_of(part.columns()))
        self._schema = self._infer_schema(declared, progress)

    def _index(self, kept: np.ndarray | None = None) -> None:
        """Number the episodes and their rows; ``kept`` are the episodes of a part of a dataset."""
        part = np.repeat(np.arange(len(self.parts), dtype=np.int32), [len(p.length) for p in self.parts])
        begin = np.concatenate([p.begin for p in self.parts]).astype(np.int64)
        length = np.concatenate([p.length for p in self.parts]).astype(np.int64)
        terminal = np.concatenate([p.terminal for p in self.parts]).astype(bool)
        if kept is not None:
            part, begin, length, terminal = part[kept], begin[kept], length[kept], terminal[kept]
        self._part, self._begin, self._terminal = part, begin, terminal
        self._starts = np.concatenate([[0], np.cumsum(length)])
        self._windows: dict[tuple[int, bool], WindowTable] = {}

    # ---- content --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Rows."""
        return int(self._starts[-1])

    @property
    def num_episodes(self) -> int:
        """Number of episodes."""
        return len(self._begin)

    @property
    def episode_lengths(self) -> np.ndarray:
        """Rows of each episode, int64 [E]."""
        return np.diff(self._starts)

    @property
    def first_rows(self) -> np.ndarray:
        """Number of each episode's first row, and of all rows: int64 [E + 1]."""
        return self._starts

    @property
    def has_terminals(self) -> bool:
        """Whether any episode ended in a terminal state."""
        return bool(self._terminal.any())

    @property
    def obs_shape(self) -> Any:
        """Shape of one observation, or a dict of shapes."""
        return self._schema.obs_shape

    @property
    def action_dim(self) -> int:
        """Size of an action or number of discrete ones."""
        dim: int = self._schema.action_dim
        return dim

    @property
    def action_type(self) -> str:
        """``"continuous"`` or ``"discrete"``."""
        kind: str = self._schema.action_type
        return kind

    @property
    def has_task(self) -> bool:
        """Whether every row has the number of a task."""
        return self._schema.has_task

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """None: windows begin with the initial latent."""
        return {}

    def __repr__(self) -> str:
        lengths = self.episode_lengths
        return (
            f"Dataset({self.spec}; {len(self):,} rows; {len(lengths):,} episodes of {lengths.min():,}–"
            f"{lengths.max():,} rows; {self._schema})"
        )

    def match(self, *, obs_shape: Any, action_dim: Any, action_type: Any = None) -> None:
        """See ``ReplayBuffer.match``."""
        self._schema = match_schema(self._schema, obs_shape=obs_shape, action_dim=action_dim, action_type=action_type)

    def episode(self, number: int) -> Batch:
        """Episode ``number``, as a dict of arrays [n, ...] with the keys of a batch."""
        return self.take(np.arange(self._starts[number], self._starts[number + 1]))

    def episodes(self) -> Iterator[Batch]:
        """Each episode, as a dict of arrays [n, ...] with the keys of a batch."""
        return map(self.episode, range(self.num_episodes))

    def place(self, number: int) -> str:
        """Where episode ``number`` is from, for messages."""
        owner = int(self._part[number])
        own = int(self._own_numbers[number]) - sum(len(part.length) for part in self.parts[:owner])
        part = self.parts[owner]
        return f"episode {own} of {part.place}" if len(part.length) > 1 else part.place

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
        """A batch of windows [B, T, ...]; see ``ReplayBuffer.sample``. ``latents`` must be False."""
        ids = self.draw(batch_size, sequence_length, seed=seed, update=update, cross_episodes=cross_episodes)
        batch = self.take(ids, latents=latents)
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
        """Row numbers of random windows, int64 [B, T]; see ``ReplayBuffer.draw``. All episodes are finished."""
        key = (sequence_length, cross_episodes)
        if key not in self._windows:
            self._windows[key] = WindowTable(self._segments(cross_episodes), sequence_length, cross_episodes)
        windows = self._windows[key]
        if len(windows) == 0:
            raise DataError(too_short(sequence_length, cross_episodes, int(self.episode_lengths.max())))
        segment, start = windows.draw(batch_size, seed=seed, update=update)
        first = start if cross_episodes else self._starts[segment] + start
        return first[:, None] + np.arange(sequence_length)

    def _segments(self, cross_episodes: bool) -> Segments:
        """All episodes in a row count as one stream, as those that are added to a buffer do."""
        lengths = np.array([len(self)]) if cross_episodes else self.episode_lengths
        return Segments(np.zeros_like(lengths), np.zeros_like(lengths), lengths)

    def take(self, row_ids: np.ndarray, *, latents: bool = False, observations: bool = True) -> Batch:
        """The rows ``row_ids`` [..., T] as a dict of arrays [..., T, ...]; see ``ReplayBuffer.take``.

        Raises ``DataError`` for rows that a buffer would not have taken, naming the episode and what is wrong.
        """
        ids = as_numbers(row_ids, "row_ids", "iu").astype(np.int64)
        if ids.ndim == 0 or ids.size == 0 or ids.min() < 0 or ids.max() >= len(self):
            raise DataError(f"row_ids must be an array [..., T] of rows, 0 … {len(self) - 1}.")
        if latents:
            raise DataError("A dataset stores no latents.")
        flat = ids.ravel()
        episode = np.searchsorted(self._starts, flat, side="right") - 1
        step = flat - self._starts[episode]
        first, last = step == 0, flat + 1 == self._starts[episode + 1]
        try:
            columns = self._read(episode, step, first, last, observations)
        except (DataError, FileFormatError, OSError) as error:
            raise self._located(error, episode, step, first, last) from error
        schema = self._schema
        batch: Batch = {
            "actions": columns["actions"],
            "rewards": columns["rewards"],
            "is_first": first,
            "is_last": last,
            "is_terminal": last & self._terminal[episode],
        }
        batch = {key: value.reshape(*ids.shape, *value.shape[1:]) for key, value in batch.items()}
        batch["row_ids"] = ids
        if observations:
            found = {key: columns[f"obs/{key}"] for key in schema.obs}
            arrays = {key: value.reshape(*ids.shape, *value.shape[1:]) for key, value in found.items()}
            batch["obs"] = arrays if schema.obs_is_mapping else arrays[OBS]
        if schema.has_task:
            batch["task"] = columns["task"].reshape(ids.shape)[..., 0]
        return batch

    def _read(
        self, episode: np.ndarray, step: np.ndarray, first: np.ndarray, last: np.ndarray, observations: bool
    ) -> dict[str, np.ndarray]:
        """Columns [N, ...] of the rows ``step`` of ``episode``, as a batch holds them."""
        parts, index = self._part[episode], self._begin[episode] + step
        if (parts == parts[0]).all():
            raw = self.parts[parts[0]].read(index, first, last, observations=observations)
            return self._convert(raw, last, observations)
        order, found = [], []
        for number in np.flatnonzero(np.bincount(parts, minlength=0)).tolist():
            mine = np.flatnonzero(parts == number)
            order.append(mine)
            found.append(self.parts[number].read(index[mine], first[mine], last[mine], observations=observations))
        return self._convert(_joined(found, np.argsort(np.concatenate(order))), last, observations)

    def _convert(self, raw: Columns, last: np.ndarray, observations: bool) -> dict[str, np.ndarray]:
        """Rows as they are stored in files, as a batch holds them. Raises ``DataError``."""
        schema = self._schema
        action = schema.actions[ACTION]
        given = np.asarray(raw.actions)
        if given.ndim == 2 and given.shape[1] == 1 and action.kind == DISCRETE and given.dtype.kind in "iu":
            given = given[:, 0]
        if action.kind == DISCRETE and given.ndim == 1:
            given = np.where(last, -1, given.astype(np.int64)) if given.dtype.kind in "iu" else given
        values, _ = convert_actions(given, action, last, "actions")
        out = {
            "actions": values if action.kind == CONTINUOUS else one_hot(values, action.dim),
            "rewards": as_finite_floats(_vector(raw.rewards, "rewards"), "rewards"),
        }
        if observations:
            obs = self._named(raw.obs)
            out |= {f"obs/{key}": convert_obs(obs[key], column, f"obs {key}") for key, column in schema.obs.items()}
        if schema.has_task:
            out["task"] = _tasks(raw.task)
        return out

    def _named(self, obs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Observations by the schema's keys; single numbers [N] become [N, 1]."""
        keys = {OBS: ""} if list(obs) == [""] else {key: key for key in obs}
        found = {key: as_numbers(obs[name], f"obs {name}") for key, name in keys.items()}
        return {key: array[:, None] if array.ndim == 1 else array for key, array in found.items()}

    def _located(
        self, error: Exception, episode: np.ndarray, step: np.ndarray, first: np.ndarray, last: np.ndarray
    ) -> DataError:
        """``error`` with the first row that it is about."""
        for row in range(len(episode)):
            one = slice(row, row + 1)
            try:
                self._read(episode[one], step[one], first[one], last[one], True)
            except (DataError, FileFormatError, OSError) as found:
                text = str(found).replace(" Nothing was stored.", "").replace(", first at step 0", "")
                return DataError(f"Row {step[row]} of {self.place(int(episode[row]))}: {text}")
        return DataError(f"{self.spec}: {error}")

    # ---- shapes ---------------------------------------------------------------------------------------------------

    def _infer_schema(self, declared: Declared, progress: Callable[[Any], Any]) -> Schema:
        """What a row consists of, from the first rows and from what was ``declared``."""
        part = self.parts[0]
        rows = part.begin[0] + np.arange(min(2, part.length[0]))
        try:
            raw = part.read(rows, np.array([True, False]), np.array([False, part.length[0] == 2]))
            obs = self._named(raw.obs)
            columns = {key: infer_obs_column(array, f"obs {key}") for key, array in obs.items()}
            kind, dim = declared.action_type, declared.action_dim or part.num_actions
            actions = np.asarray(raw.actions)
            if actions.ndim == 2 and actions.shape[1] == 1 and actions.dtype.kind in "iu":
                actions = actions[:, 0]
            action = infer_action(actions, kind, dim, "actions")  # type: ignore[arg-type]
        except (DataError, FileFormatError) as error:
            raise DataError(f"The first rows of {part.place} cannot be read. {error}") from error
        single = list(obs) == [OBS] and list(raw.obs) == [""]
        schema = Schema(columns, {ACTION: action}, raw.task is not None, not single, False)
        if declared.obs_shape is not None and _tuples(declared.obs_shape) != _tuples(schema.obs_shape):
            raise DataError(
                f"The observations of {part.place} have shape {schema.obs_shape}, not {declared.obs_shape}."
            )
        if not action.fixed:
            dim = max(self._largest_action(p) for p in progress(self.parts)) + 1
            schema = dataclasses.replace(schema, actions={ACTION: Action(DISCRETE, max(dim, 1), fixed=False)})
        return schema

    def _largest_action(self, part: Part) -> int:
        largest = 0
        for begin, length in zip(part.begin.tolist(), part.length.tolist(), strict=True):
            for start in range(0, length, _SCAN_ROWS):
                step = np.arange(start, min(start + _SCAN_ROWS, length))
                rows = part.read(begin + step, step == 0, step == length - 1, observations=False)
                largest = max(largest, int(np.asarray(rows.actions).max(initial=0)))
        return largest

    # ---- other datasets -------------------------------------------------------------------------------------------

    def subset(self, episodes: Any) -> Dataset:
        """The dataset of the given ``episodes``: integers [E'], or bool [E]."""
        kept = np.asarray(episodes)
        kept = np.flatnonzero(kept) if kept.dtype == bool else kept.astype(np.int64)
        if kept.size == 0 or kept.min() < 0 or kept.max() >= self.num_episodes:
            raise DataError(f"episodes must name some of 0 … {self.num_episodes - 1}.")
        own = self._own_numbers[kept]
        other = copy.copy(self)
        other._index(own)
        other._own_numbers = own
        return other

    @functools.cached_property
    def _own_numbers(self) -> np.ndarray:
        """Which of the parts' episodes these are."""
        return np.arange(self.num_episodes)

    def split(self, fraction: float = 0.1, *, seed: int = 0) -> tuple[Dataset, Dataset]:
        """Two datasets: one to train on, and one with ``fraction`` of the episodes held out; see ``ReplayBuffer``."""
        held_out = draw_held_out(self.num_episodes, fraction, seed=seed)
        out = np.isin(np.arange(self.num_episodes), list(held_out))
        return self.subset(~out), self.subset(out)

    def to_buffer(self, capacity: int | None = None) -> ReplayBuffer:
        """A :class:`~worldloom.replay.ReplayBuffer` with all episodes, in memory."""
        described = {"obs_shape": self.obs_shape, "action_dim": self.action_dim, "action_type": self.action_type}
        return ReplayBuffer.from_episodes(map(episode_arguments, self.episodes()), capacity, **described)


def episode_arguments(episode: Batch) -> dict[str, Any]:
    """The arguments of ``ReplayBuffer.add_episode`` for an episode in the keys of a batch."""
    arguments = {key: episode[key] for key in ("obs", "actions", "rewards")}
    if "task" in episode:
        arguments["task"] = int(episode["task"])
    return {**arguments, "terminated": bool(episode["is_terminal"][-1]), "layout": "arrival"}


def check_declared(values: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for dicts of actions, which datasets do not have."""
    for name in ("action_dim", "action_type"):
        if isinstance(values.get(name), Mapping):
            raise ConfigError(f"{name} must be a single value: a recorded dataset has one array of actions.")


def _joined(parts: list[Columns], order: np.ndarray) -> Columns:
    """Rows that were read from several parts, in the given order. Raises ``DataError`` if they do not fit together."""
    if any(part.obs.keys() != parts[0].obs.keys() for part in parts) or len({part.task is None for part in parts}) > 1:
        raise DataError("The files of this dataset do not hold the same arrays.")

    def join(*arrays: Any) -> Any:
        if len({np.shape(array)[1:] for array in arrays}) > 1:
            raise DataError(f"The files of this dataset hold arrays of shapes {[np.shape(a)[1:] for a in arrays][:5]}.")
        return np.concatenate(arrays)[order]

    obs = {name: join(*(part.obs[name] for part in parts)) for name in parts[0].obs}
    actions, rewards = join(*(part.actions for part in parts)), join(*(part.rewards for part in parts))
    task = None if parts[0].task is None else join(*(part.task for part in parts))
    return Columns(obs, actions, rewards, task=task)


def _vector(values: Any, what: str) -> np.ndarray:
    """[N], also of [N, 1]."""
    array = as_numbers(values, what)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise DataError(f"{what} has shape {array.shape}; one number per row is needed.")
    return array


def _tasks(values: Any) -> np.ndarray:
    array = _vector(values, "task")
    if (array != np.round(array)).any() or array.min(initial=0) < 0 or array.max(initial=0) > np.iinfo(np.int32).max:
        raise DataError(f"task holds {array.min()} … {array.max()}; integers from 0 are needed.")
    return array.astype(np.int32)


def _tuples(shape: Any) -> dict[str, tuple[int, ...]]:
    return {key: tuple(size) for key, size in named(shape, OBS).items()}
