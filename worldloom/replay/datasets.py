"""Readers of recorded datasets. The packages they need are extras, imported only when a reader is called."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from worldloom.errors import DataError, FileFormatError, MissingDependencyError
from worldloom.replay.buffer import ReplayBuffer
from worldloom.replay.sources import split_episodes
from worldloom.spaces.actions import ActionSpec
from worldloom.spaces.joined import JoinedActions
from worldloom.spaces.narrow import bound_actions, check_action_bounds, check_drop_keys, drop_observations
from worldloom.spaces.observations import ObservationSpec

HDF5_KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")


def from_minari(
    dataset: Any,
    *,
    capacity: int | None = None,
    download: bool = True,
    action_bounds: tuple[float, float] | None = None,
    drop_keys: Sequence[str] = (),
    join_actions: bool = False,
) -> ReplayBuffer:
    """A buffer with all episodes of a Minari dataset (https://minari.farama.org).

    Observations and actions are translated as those of an environment with the dataset's spaces are, see
    :class:`~worldloom.spaces.observations.ObservationSpec` and :class:`~worldloom.spaces.actions.ActionSpec`: what is
    trained on the buffer fits that environment.

    Args:
      dataset: its name, such as ``"mujoco/pusher/expert-v0"``, or a loaded (and perhaps filtered) ``MinariDataset``.
      capacity: rows of the buffer; None is as many as the dataset has.
      download: whether a missing dataset may be downloaded.
      action_bounds: as in ``make_env``: ``(low, high)`` of continuous actions that have no bounds of their own; must
        hold all actions of the dataset.
      drop_keys: as in ``make_env``: names of observations to leave out.
      join_actions: as in ``make_env``: whether several actions become one.

    Raises:
      MissingDependencyError: Minari is not installed.
      ConfigError: a space is not supported, or an argument does not fit it.
      DataError: an episode does not have the layout of Minari (one observation more than actions), or holds values that
        its spaces exclude.
    """
    if isinstance(dataset, str):
        dataset = import_extra("minari").load_dataset(dataset, download=download)
    translation = MinariTranslation.of(
        dataset, action_bounds=action_bounds, drop_keys=drop_keys, join_actions=join_actions
    )
    episodes = (translation.episode(episode, number) for number, episode in enumerate(dataset.iterate_episodes()))
    return ReplayBuffer.from_episodes(episodes, capacity, **translation.described)


class MinariTranslation(NamedTuple):
    """How the observations and actions of a Minari dataset are translated, see :func:`from_minari`.

    Attributes:
      observations: the translation of observations.
      actions: that of actions, (values, number of them) → array or dict of arrays.
      described: ``obs_shape``, ``action_dim`` and ``action_type`` of the buffer.
    """

    observations: ObservationSpec
    actions: Callable[[Any, int], Any]
    described: dict[str, Any]

    @classmethod
    def of(
        cls,
        dataset: Any,
        *,
        action_bounds: tuple[float, float] | None = None,
        drop_keys: Sequence[str] = (),
        join_actions: bool = False,
    ) -> MinariTranslation:
        """For a loaded dataset; arguments and errors as of :func:`from_minari`."""
        observations = ObservationSpec(drop_observations(dataset.observation_space, check_drop_keys(drop_keys)))
        action_space = bound_actions(dataset.action_space, check_action_bounds(action_bounds))
        joined = JoinedActions(action_space) if join_actions else None
        actions = ActionSpec(joined.space if joined else action_space)
        described = {"obs_shape": observations.shape, "action_dim": actions.dim, "action_type": actions.type}
        return cls(observations, joined.join if joined else actions.from_env, described)

    def episode(self, episode: Any, number: int) -> dict[str, Any]:
        """The arguments of ``ReplayBuffer.add_episode`` for an ``EpisodeData``."""
        return _minari_episode(episode, number, self.observations, self.actions)


def _minari_episode(
    episode: Any, number: int, observations: ObservationSpec, translate_actions: Callable[[Any, int], Any]
) -> dict[str, Any]:
    """The arguments of ``ReplayBuffer.add_episode`` for an ``EpisodeData``."""
    steps = len(episode.rewards)
    try:
        if observations.count(episode.observations) == steps:
            raise DataError(
                f"It has {steps} observations and as many rewards; Minari records one observation more, the last. "
                "Which reward belongs to which is not known."
            )
        return {
            "obs": observations.unwrap(observations.flatten(episode.observations, (steps + 1,))),
            "actions": translate_actions(episode.actions, steps),
            "rewards": episode.rewards,
            "terminated": episode.terminations,
            "truncated": episode.truncations,
        }
    except DataError as error:
        raise DataError(f"Episode {getattr(episode, 'id', number)} of the dataset cannot be read. {error}") from error


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
    h5py = import_extra("h5py")
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


def import_extra(module: str, extra: str = "minari") -> ModuleType:
    """An optional package. Raises ``MissingDependencyError`` naming the ``extra`` that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{module} is not installed; pip install 'worldloom[{extra}]' brings it."
        ) from error
