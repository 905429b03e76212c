"""Minari datasets, episode by episode, from Minari's local store or from a folder."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.data.parts import CACHE, Columns, Part
from worldloom.errors import ConfigError, DataError, FileFormatError, MissingDependencyError
from worldloom.replay.datasets import MinariTranslation, import_extra


def open_minari(name: str, *, download: bool) -> Any:
    """The ``MinariDataset`` of an id such as ``"pointmaze/umaze-v2"``, or in a folder with ``data/metadata.json``.

    Raises:
      MissingDependencyError: Minari is not installed.
      DataError: there is no such dataset, locally or, with ``download``, at Minari's server.
      FileFormatError: its files are damaged.
    """
    minari = import_extra("minari")
    folder = Path(name).expanduser()
    try:
        if (folder / "data" / "metadata.json").is_file():
            return minari.MinariDataset(folder / "data")
        return minari.load_dataset(name, download=download)
    except MissingDependencyError:
        raise
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, FileNotFoundError):
            hint = "" if download else " It is not downloaded here; minari download fetches it."
            raise DataError(f"There is no Minari dataset '{name}' on this machine.{hint}") from error
        raise FileFormatError(f"The Minari dataset '{name}' is damaged: {error!r:.200}.") from error
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise DataError(f"The Minari dataset '{name}' cannot be opened: {str(error)[:300]}.") from error


def minari_parts(
    dataset: Any, name: str, progress: Callable[[Any], Any], **options: Any
) -> tuple[list[Part], dict[str, Any]]:
    """The episodes of a ``MinariDataset``, one part each, and the shapes of their arrays.

    Args:
      dataset: the dataset.
      name: its name, for messages.
      progress: wraps the numbers of the episodes, each of which is looked at.
      **options: ``action_bounds``, ``drop_keys`` and ``join_actions``, see ``from_minari``.

    Raises:
      ConfigError: a space is not supported.
      DataError: an episode does not have Minari's layout.
      FileFormatError: a file is damaged.
    """
    translation = MinariTranslation.of(dataset, **options)
    described = translation.described
    if isinstance(described["action_dim"], dict):
        raise ConfigError(f"'{name}' has several actions; --join-actions (join_actions=True) makes one of them.")
    storage, identity = dataset.storage, (name, str(dataset.storage.data_path))
    numbers = [int(number) for number in dataset.episode_indices]

    def load(number: int) -> tuple[Columns, bool]:
        try:
            (raw,) = storage.get_episodes([number])
        except (OSError, KeyError, RuntimeError, ValueError, AssertionError) as error:
            raise FileFormatError(f"Episode {number} of {name} is damaged: {error!r:.200}.") from error
        episode = translation.episode(_Episode(raw), number)
        obs = episode["obs"] if isinstance(episode["obs"], dict) else {"": episode["obs"]}
        terminated = np.asarray(episode["terminated"]).reshape(-1)
        columns = Columns(obs, np.asarray(episode["actions"]), np.asarray(episode["rewards"]))
        lengths = {len(array) for array in obs.values()}
        if lengths != {len(columns.rewards) + 1} or len(columns.actions) != len(columns.rewards):
            raise DataError(f"Episode {number} of {name} has {lengths} observations and {len(columns.rewards)} steps.")
        return columns, bool(terminated[-1]) if len(terminated) else False

    def cached(number: int) -> tuple[Columns, bool]:
        found: tuple[Columns, bool] = CACHE.get((*identity, number), functools.partial(load, number))
        return found

    def columns_of(number: int) -> Columns:
        return cached(number)[0]

    parts = []
    with _ends(storage, name) as ends:
        for number in progress(numbers):
            known = None if ends is None else ends(number)
            if known is None:
                columns, terminal = cached(number)
                known = len(columns.rewards), terminal
            steps, terminal = known
            if steps:
                length, begin = np.array([steps + 1]), np.zeros(1, np.int64)
                read = functools.partial(columns_of, number)
                parts.append(Part(f"{name}, episode {number}", begin, length, np.array([terminal]), read))
    return parts, described


@contextlib.contextmanager
def _ends(storage: Any, name: str) -> Iterator[Callable[[int], tuple[int, bool]] | None]:
    """Function (episode) → its steps, and whether it ended terminal, without reading the episode; None if not known.

    Minari has no call for this. Its HDF5 files hold the flags as arrays of their own.
    """
    path = Path(storage.data_path) / "main_data.hdf5"
    if not path.is_file():
        yield None
        return
    h5py = import_extra("h5py")
    try:
        with h5py.File(path, "r") as file:

            def ends(number: int) -> tuple[int, bool]:
                flags = file[f"episode_{number}"]["terminations"]
                return len(flags), bool(len(flags) and flags[-1])

            yield ends
    except (OSError, KeyError, RuntimeError, TypeError) as error:
        raise FileFormatError(f"The Minari dataset '{name}' is damaged: {str(error)[:200]}.") from error


class _Episode:
    """The fields of an episode by attribute, as ``EpisodeData`` has them."""

    def __init__(self, fields: dict[str, Any]):
        vars(self).update(fields)
