"""Buffers from data in other forms: iterables of episodes, flat arrays of many episodes, ``.npz`` files of these."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from worldloom.config import nearest
from worldloom.errors import DataError, FileFormatError
from worldloom.replay.npz import read_arrays
from worldloom.replay.validation import ARRIVAL, DEPARTURE, check_layout
from worldloom.spaces import mapping_keys

_log = logging.getLogger("worldloom")

FLAT_NAMES = {
    "obs": ("obs", "observations"),
    "actions": ("actions",),
    "rewards": ("rewards",),
    "terminals": ("terminals", "terminations", "terminated"),
    "timeouts": ("timeouts", "truncations", "truncated"),
    "dones": ("dones",),
    "next_obs": ("next_obs", "next_observations"),
}
"""Arguments of ``from_arrays``, and the names that files have for them; the first that is there counts."""


class EpisodeSources:
    """The constructors of :class:`worldloom.replay.ReplayBuffer` from whole collections of episodes."""

    capacity: int
    _said_what_is_lost = False

    def __init__(self, capacity: int = 1_000_000, **described: Any):
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def add_episode(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """See :meth:`worldloom.replay.ReplayBuffer.add_episode`."""
        raise NotImplementedError

    def _say_what_is_lost(self) -> None:
        """Log once what episodes of layout "departure" lose."""
        if not self._said_what_is_lost:
            self._said_what_is_lost = True
            _log.warning(
                "layout='departure': the observation after the last action is missing, so the last action of each "
                "episode, its reward and whether it terminated are left out. Give that observation too to keep them."
            )

    @classmethod
    def from_episodes(
        cls, episodes: Iterable[Mapping[str, Any]], capacity: int | None = None, **described: Any
    ) -> Self:
        """A buffer of ``episodes``, each a mapping with the arguments of :meth:`add_episode`.

        Args:
          episodes: any iterable of such mappings.
          capacity: largest number of rows; None is as many as the episodes have.
          **described: ``obs_shape``, ``action_dim``, ``action_type``, ``latents`` as in the constructor.
        """
        buffer = cls(2**62 if capacity is None else capacity, **described)
        for episode in episodes:
            buffer.add_episode(**episode)
        if capacity is None:
            buffer.capacity = max(1, len(buffer))
        return buffer

    @classmethod
    def from_arrays(
        cls,
        obs: Any,
        actions: Any,
        rewards: Any,
        terminals: Any = None,
        timeouts: Any = None,
        *,
        dones: Any = None,
        next_obs: Any = None,
        layout: str = DEPARTURE,
        capacity: int | None = None,
        **described: Any,
    ) -> Self:
        """A buffer of flat arrays: the N steps of many episodes, one after the other (the layout of D4RL).

        Where ``terminals``, ``timeouts`` or ``dones`` is True, an episode ends; only the first of them, or ``dones``
        if it is given alone, makes it terminal. Steps after the last end are an episode that was cut off.

        Args:
          obs: [N, ...], or a dict of such arrays: the observations that the actions were chosen at.
          actions: [N, A], or integers [N], as in :meth:`add_episode`.
          rewards: [N].
          terminals: bool [N], the environment itself ended the episode with this step.
          timeouts: bool [N], a time limit did.
          dones: bool [N], either of them did.
          next_obs: [N, ...], the observations after the actions. Without it the last step of every episode is left
            out, because the next observation in ``obs`` is of the next episode.
          layout: ``"departure"``: a row's reward is that of its action. ``"arrival"``: of arriving at its observation;
            then nothing is left out, and ``next_obs`` must not be given.
          capacity: largest number of rows; None is as many as there are.
          **described: ``obs_shape``, ``action_dim``, ``action_type``, ``latents`` as in the constructor.

        Raises:
          DataError: lengths differ, nothing says where episodes end, or an episode holds what :meth:`add_episode`
            refuses.
          ConfigError: ``layout`` is another one.
        """
        flat = {"obs": obs, "actions": actions, "rewards": rewards, "terminals": terminals, "timeouts": timeouts}
        flat |= {"dones": dones, "next_obs": next_obs}
        given = {name: value for name, value in flat.items() if value is not None}
        return cls.from_episodes(split_episodes(given, layout), capacity, **described)

    @classmethod
    def from_npz(
        cls, path: str | Path, *, layout: str = DEPARTURE, capacity: int | None = None, **described: Any
    ) -> Self:
        """A buffer of the flat arrays in an ``.npz`` file, see :meth:`from_arrays` for their meaning and arguments.

        Arrays are found by the names that D4RL, Gymnasium and Minari use (``observations`` or ``obs``, ``actions``,
        ``rewards``, ``terminals`` or ``terminations``, ``timeouts`` or ``truncations``, ``next_observations``), and by
        those of the earlier PyTorch library (``obs``, ``actions``, ``rewards``, ``dones``, beside ``obs_shape``,
        ``action_dim`` and ``capacity``, which are not needed). ``obs/image`` is an entry of a dict. Other arrays are
        ignored, with a message. A file of :meth:`save` is read by :meth:`load`.

        Raises:
          FileFormatError: the file is damaged, holds pickled objects, or lacks an array.
          DataError, ConfigError: as :meth:`from_arrays`.
        """
        path = Path(path).expanduser()
        found = _flat_arrays(read_arrays(path), str(path))
        return cls.from_episodes(split_episodes(found, layout, str(path)), capacity, **described)


def split_episodes(flat: Mapping[str, Any], layout: str = DEPARTURE, place: str = "") -> Iterator[dict[str, Any]]:
    """Split flat arrays into the arguments of ``ReplayBuffer.add_episode``.

    Args:
      flat: the arguments of :meth:`EpisodeSources.from_arrays` that were given; anything that can be sliced.
      layout: see there.
      place: where the arrays are from, for messages.
    """
    check_layout(layout)
    where = f" of {place}" if place else ""
    entries = {f"{k}/{n}": x for k, v in flat.items() if isinstance(v, Mapping) for n, x in v.items()}
    lengths = {k: np.shape(v)[:1] for k, v in {**flat, **entries}.items() if not isinstance(v, Mapping)}
    if len(set(lengths.values())) != 1 or () in lengths.values():
        found = ", ".join(f"{name} {length[0] if length else 'none'}" for name, length in lengths.items())
        raise DataError(f"The arrays{where} have different lengths: {found}.")
    ends = {name: np.asarray(flat[name]).ravel() for name in ("terminals", "timeouts", "dones") if name in flat}
    if not ends:
        raise DataError(f"Nothing says where the episodes{where} end; give terminals, timeouts or dones.")
    for name, values in ends.items():
        if values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
            raise DataError(f"{name}{where} must hold booleans (or 0 and 1).")
    if layout == ARRIVAL and "next_obs" in flat:
        raise DataError("Rows of layout='arrival' hold every observation; leave next_obs out, or say 'departure'.")
    forms = [sorted(mapping_keys(flat[name]) or [""]) for name in ("obs", "next_obs") if name in flat]
    if forms[0] != forms[-1]:
        raise DataError(f"next_obs{where} must have the form of obs: one array, or a dict of the same arrays.")
    (length,), ended = next(iter(lengths.values())), np.logical_or.reduce(list(ends.values())).astype(bool)
    # Older Gym: one flag for both kinds of ends; a time limit, if reported at all, has a flag beside it.
    terminal = ends.get("terminals", ended & ~ends["timeouts"].astype(bool) if "timeouts" in ends else ended)
    stops = (np.flatnonzero(ended) + 1).tolist()
    if not stops:
        _log.warning("No row%s ends an episode: all %d are taken as one.", where, length)
    too_short = 0
    for start, stop in zip([0, *stops], [*stops, length], strict=True):
        if stop - start < (1 if "next_obs" in flat else 2):
            too_short += stop > start
            continue
        rows = {name: _cut(flat[name], start, stop) for name in ("obs", "actions", "rewards")}
        if "next_obs" in flat:
            rows["obs"] = _append(rows["obs"], _cut(flat["next_obs"], stop - 1, stop))
        yield {**rows, "terminated": bool(terminal[stop - 1]), "layout": layout}
    if too_short:
        _log.warning("%d episodes%s of a single row are left out: nothing says what followed it.", too_short, where)


def _cut(value: Any, start: int, stop: int) -> Any:
    if isinstance(value, Mapping):
        return {name: _cut(entry, start, stop) for name, entry in value.items()}
    return value[start:stop]


def _append(rows: Any, last: Any) -> Any:
    if isinstance(rows, Mapping):
        return {name: np.concatenate([rows[name], last[name]]) for name in rows}
    return np.concatenate([rows, last])


def _flat_arrays(arrays: Mapping[str, np.ndarray], place: str) -> dict[str, Any]:
    """The arguments of ``from_arrays`` among the arrays of a file."""
    if "meta" in arrays and "flags" in arrays:
        raise FileFormatError(f"{place} was written by ReplayBuffer.save; read it by ReplayBuffer.load.")
    found: dict[str, Any] = {}
    used: set[str] = set()
    for argument, names in FLAT_NAMES.items():
        for name in names:
            entries = [key for key in arrays if key == name or key.startswith(f"{name}/")]
            if not entries:
                continue
            used |= set(entries)
            single = arrays.get(name)
            found[argument] = {k.partition("/")[2]: arrays[k] for k in entries} if single is None else single
            break
    missing = [name for name in ("obs", "actions", "rewards") if name not in found]
    if missing:
        hint = nearest(missing[0], arrays)
        raise FileFormatError(f"{place} has no {', '.join(missing)}; it holds {', '.join(arrays) or 'no array'}.{hint}")
    others = sorted(set(arrays) - used - {"obs_shape", "action_dim", "capacity"})
    if others:
        _log.warning("These arrays of %s are not read: %s.", place, ", ".join(others))
    return found
