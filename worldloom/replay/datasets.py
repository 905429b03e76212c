"""Readers of recorded datasets. The packages they need are extras, imported only when a reader is called."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from worldloom.errors import DataError, FileFormatError, MissingDependencyError
from worldloom.replay.buffer import ReplayBuffer
from worldloom.replay.sources import split_episodes

HDF5_KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")


def from_minari(dataset: Any, *, capacity: int | None = None, download: bool = True) -> ReplayBuffer:
    """A buffer with all episodes of a Minari dataset (https://minari.farama.org).

    Actions of a bounded ``Box`` are scaled to [−1, 1] by its bounds; ``Discrete`` ones become indices from 0.

    Args:
      dataset: its name, such as ``"mujoco/pusher/expert-v0"``, or a loaded (and perhaps filtered) ``MinariDataset``.
      capacity: rows of the buffer; None is as many as the dataset has.
      download: whether a missing dataset may be downloaded.

    Raises:
      MissingDependencyError: Minari is not installed.
      DataError: the episodes hold something that a buffer refuses, such as unbounded actions beyond [−1, 1].
    """
    if isinstance(dataset, str):
        dataset = _import_extra("minari").load_dataset(dataset, download=download)
    described, convert = _convert_actions(dataset.action_space)
    episodes = (
        {
            "obs": episode.observations,
            "actions": convert(episode.actions),
            "rewards": episode.rewards,
            "terminated": episode.terminations,
            "truncated": episode.truncations,
        }
        for episode in dataset.iterate_episodes()
    )
    return ReplayBuffer.from_episodes(episodes, capacity, **described)


def _convert_actions(space: Any) -> tuple[dict[str, Any], Callable[[Any], np.ndarray]]:
    """The buffer's arguments for actions of a Gymnasium space, and the function that converts such actions."""
    if hasattr(space, "n"):
        start = int(getattr(space, "start", 0))
        return {"action_type": "discrete", "action_dim": int(space.n)}, lambda actions: np.asarray(actions) - start
    if not hasattr(space, "low") or len(space.shape) != 1:
        raise DataError(f"Actions of the space {space} are not read; a one-dimensional Box or a Discrete one is.")
    low, high = np.asarray(space.low, np.float64), np.asarray(space.high, np.float64)
    described = {"action_type": "continuous", "action_dim": len(low)}
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        return described, np.asarray
    return described, lambda actions: 2 * (np.asarray(actions) - low) / (high - low) - 1


def from_hdf5(path: str | Path, *, capacity: int | None = None) -> ReplayBuffer:
    """A buffer with the episodes of a D4RL file: flat ``observations, actions, rewards, terminals, timeouts``.

    Each terminal or timeout ends an episode. The observation after an episode's last action is read from
    ``next_observations``. If the file has none, that observation is unknown: the step is left out, and the episode ends
    one row earlier, not terminal. Actions must lie in [−1, 1].

    Args:
      path: the file.
      capacity: rows of the buffer; None is as many as the file has.

    Raises:
      MissingDependencyError: h5py is not installed.
      FileFormatError: this is not an HDF5 file, or its layout is another.
      DataError: the episodes hold something that a buffer refuses.
    """
    h5py = _import_extra("h5py")
    # Raises the usual OSError for a missing file, which h5py would not tell from a damaged one.
    Path(path).open("rb").close()
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise FileFormatError(f"{path} is not an HDF5 file, or it is damaged: {error}.") from error
    with file:
        return ReplayBuffer.from_episodes(flat_episodes(file, str(path)), capacity)


def flat_episodes(file: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Split flat D4RL arrays into the arguments of ``ReplayBuffer.add_episode``; see :func:`from_hdf5`."""
    missing = [key for key in HDF5_KEYS if key not in file]
    if missing:
        raise FileFormatError(f"{name} has no {', '.join(missing)}; a D4RL file has {', '.join(HDF5_KEYS)}.")
    lengths = {key: len(file[key]) for key in HDF5_KEYS}
    if len(set(lengths.values())) != 1:
        raise FileFormatError(f"The arrays of {name} have different lengths: {lengths}.")
    keys = {"obs": "observations", "next_obs": "next_observations"} | {key: key for key in HDF5_KEYS[1:]}
    return split_episodes({argument: file[key] for argument, key in keys.items() if key in file}, place=name)


def _import_extra(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{module} is not installed; pip install 'worldloom[minari]' brings it."
        ) from error
