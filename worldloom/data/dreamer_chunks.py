"""Replay chunks of DreamerV3's reference program: ``<time>-<id>-<id of the next>-<rows>.npz``."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.data.arrays import episodes_of_rows, open_npz
from worldloom.data.parts import Columns, Joined, Part, whole
from worldloom.errors import DataError, FileFormatError

_log = logging.getLogger("worldloom")

CHUNK_NAME = re.compile(r"(?P<time>\w+)-(?P<id>\w+)-(?P<next>\w+)-(?P<rows>\d+)\.npz")
_FLAGS = ("is_first", "is_last", "is_terminal")
_ACTION, _REWARD = "action", "reward"
_BOOKKEEPING = {"stepid", "consec", "reset"}


def dreamer_parts(folder: Path) -> list[Part]:
    """The episodes of a folder of chunks: one part for each chain of chunks, that is for each environment.

    Rows follow the arrival rule there too. Latents that the reference stores beside them are not read.

    Raises:
      FileFormatError: a file is damaged, or lacks ``action``, ``reward`` or ``is_first``.
      DataError: the chunks of a chain do not hold the same arrays.
    """
    chunks = {}
    for path in sorted(folder.glob("*.npz")):
        found = CHUNK_NAME.fullmatch(path.name)
        if found is None:
            raise FileFormatError(
                f"{path} is not a replay chunk: its name must be <time>-<id>-<id of the next>-<rows>."
            )
        if found["id"] in chunks:
            raise DataError(f"{folder} has two chunks of the id {found['id']}.")
        chunks[found["id"]] = path, found["next"]
    followers = {following for _, following in chunks.values()}
    parts, seen = [], 0
    for start in (name for name in chunks if name not in followers):
        chain: list[Path] = []
        name = start
        while name in chunks and len(chain) <= len(chunks):
            path, name = chunks[name]
            chain.append(path)
        seen += len(chain)
        parts.append(_chain(chain))
    if seen != len(chunks):
        raise DataError(f"{folder}: the chunks name each other as the next one in a circle.")
    return parts


def _chain(paths: Sequence[Path]) -> Part:
    opened = [open_npz(path) for path in paths]
    for path, arrays in zip(paths, opened, strict=True):
        missing = [name for name in (_ACTION, _REWARD, "is_first") if name not in arrays]
        if missing:
            held = ", ".join(list(arrays)[:12]) or "no array"
            raise FileFormatError(f"{path} has no {', '.join(missing)}; it holds {held}.")
    first = opened[0]
    names = [name for name, array in first.items() if _is_obs(name, array)]
    left_out = sorted(set(first) - {*names, *_FLAGS, _ACTION, _REWARD})
    if left_out:
        _log.info("Of %s these arrays are not read: %s.", paths[0].parent, ", ".join(left_out))
    if not names:
        raise DataError(f"{paths[0]} holds no observation; it holds {', '.join(first)}.")
    for path, arrays in zip(paths, opened, strict=True):
        _check_lengths(path, arrays)
    join = {name: _joined(name, paths, opened) for name in (*names, _ACTION, _REWARD)}
    flags = {
        name: np.concatenate([whole(arrays[name]).reshape(-1) for arrays in opened]).astype(bool)
        for name in _FLAGS
        if all(name in arrays for arrays in opened)
    }
    place = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and the {len(paths) - 1} chunks after it"
    begin, length, terminal = episodes_of_rows(flags["is_first"], flags.get("is_terminal"), place)
    columns = Columns(
        {"": join[names[0]]} if len(names) == 1 else {name: join[name] for name in names}, join[_ACTION], join[_REWARD]
    )
    return Part(place, begin, length, terminal, lambda: columns, reward_offset=0, in_files=True)


def _is_obs(name: str, array: Any) -> bool:
    """Not flags, actions, rewards and bookkeeping, nor latents, which have a ``/`` in their names."""
    known = {*_FLAGS, _ACTION, _REWARD, *_BOOKKEEPING}
    return name not in known and "/" not in name and array.dtype.kind in "biuf"


def _check_lengths(path: Path, arrays: Any) -> None:
    lengths = {name: array.shape[:1] for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or () in lengths.values():
        raise DataError(f"The arrays of {path} have different lengths: {lengths}.")


def _joined(name: str, paths: Sequence[Path], opened: Any) -> Joined:
    """The array ``name`` of all chunks, one after the other."""
    arrays = [each.get(name) for each in opened]
    like = arrays[0]
    for path, array in zip(paths, arrays, strict=True):
        if array is None or array.shape[1:] != like.shape[1:] or array.dtype != like.dtype:
            held = None if array is None else (array.dtype, array.shape)
            raise DataError(f"{path}: {name} is {held}, where {like.dtype} [N, …{like.shape[1:]}] is expected.")
    return Joined(arrays)
