"""Writing a dataset in the form that is streamed fastest: a folder of uncompressed ``.npz`` files of rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.config import check
from worldloom.data.dataset import Batch, Dataset
from worldloom.errors import ConfigError
from worldloom.files import absolute_path, fsync_folder, make_folder
from worldloom.replay.npz import Member, write_npz
from worldloom.replay.table import Column

FILE_BYTES = 64 << 20
"""Target size of a file; one file's rows are in memory while it is written."""


def convert(
    dataset: Dataset,
    folder: str | os.PathLike[str],
    *,
    file_bytes: int = FILE_BYTES,
    progress: Callable[[Any], Any] = iter,
) -> Path:
    """Write all episodes of ``dataset`` to a new folder, and return it; :func:`worldloom.data.open` maps its files.

    Rows are stored by the arrival rule, as ``obs`` (``obs/NAME`` for several), ``actions``, ``rewards``, ``is_first``,
    ``is_last``, ``is_terminal`` and, with tasks, ``task``; ``numpy.load`` reads them too.

    Args:
      dataset: the dataset.
      folder: a folder that is not there or is empty.
      file_bytes: target size of a file.
      progress: wraps the episodes' numbers, such as ``tqdm``.

    Raises:
      ConfigError: the folder holds something.
      DataError: a row cannot be trained on; files written before remain.
      OSError: the folder cannot be written to.
    """
    path = absolute_path(Path(folder))
    check(file_bytes >= 1, f"file_bytes must be at least 1, not {file_bytes!r}.")
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ConfigError(f"{path} holds something already; choose a folder that is not there or is empty.")
    make_folder(path)
    for number, episodes in enumerate(_groups(dataset, file_bytes, progress)):
        write_npz(path / f"rows-{number:05}.npz", _members(episodes, dataset))
    fsync_folder(path)
    return path


def _groups(dataset: Dataset, file_bytes: int, progress: Callable[[Any], Any]) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    held = 0
    for number in progress(range(dataset.num_episodes)):
        episode = dataset.episode(number)
        group.append(episode)
        held += sum(array.nbytes for array in _arrays(episode).values())
        if held >= file_bytes:
            yield group
            group, held = [], 0
    if group:
        yield group


def _arrays(episode: Batch) -> dict[str, np.ndarray]:
    obs = episode["obs"]
    named = {f"obs/{name}": array for name, array in obs.items()} if isinstance(obs, dict) else {"obs": obs}
    return named | {"actions": episode["actions"], "rewards": episode["rewards"]}


def _members(episodes: list[Batch], dataset: Dataset) -> list[Member]:
    columns = [_columns(episode, dataset) for episode in episodes]
    members = []
    for name, array in columns[0].items():
        pieces = [each[name] for each in columns]
        members.append(Member(name, sum(map(len, pieces)), Column(array.shape[1:], array.dtype), pieces))
    if dataset.action_type == "discrete":
        # The largest action that occurs need not be the last one.
        members.append(Member("num_actions", 1, Column((), np.dtype(np.int64)), [np.array([dataset.action_dim])]))
    return members


def _columns(episode: Batch, dataset: Dataset) -> dict[str, np.ndarray]:
    arrays = _arrays(episode)
    if dataset.action_type == "discrete":
        chosen = arrays["actions"]
        arrays["actions"] = np.where(chosen.any(-1), chosen.argmax(-1), -1).astype(np.int32)
    arrays |= {name: episode[name] for name in ("is_first", "is_last", "is_terminal")}
    if "task" in episode:
        arrays["task"] = np.full(len(arrays["rewards"]), episode["task"], np.int32)
    return arrays
