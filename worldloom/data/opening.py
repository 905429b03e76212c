"""Opening a dataset by its specification: what format it has, and where its episodes are."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from worldloom.config import check, nearest
from worldloom.data.dataset import Dataset
from worldloom.data.parts import Part
from worldloom.errors import ConfigError, DataError, FileFormatError
from worldloom.files import absolute_path
from worldloom.spaces.narrow import check_action_bounds

KINDS = {
    "minari": "a Minari dataset, by its id or folder",
    "hdf5": "HDF5 files of flat arrays, as D4RL has them",
    "npz": ".npz files of flat arrays",
    "replay": "the replay of a run, or a file of ReplayBuffer.save",
    "tdmpc2": "the .pt files of TD-MPC2's reference program, such as mt30 and mt80",
    "lerobot": "a LeRobot dataset of version 2 or 3",
    "dreamerv3": "replay chunks of DreamerV3's reference program",
}
"""Formats by the name that may stand before a path, as in ``npz:episodes/``."""
_ALIASES = {"d4rl": "hdf5", "mt30": "tdmpc2", "mt80": "tdmpc2"}
_HDF5_SUFFIXES = (".hdf5", ".h5")
_MINARI_OPTIONS = ("action_bounds", "drop_keys", "join_actions")


def open(
    spec: str | os.PathLike[str],
    *,
    obs_shape: Any = None,
    action_dim: int | None = None,
    action_type: str | None = None,
    action_bounds: tuple[float, float] | None = None,
    drop_keys: Sequence[str] = (),
    join_actions: bool = False,
    download: bool = False,
    progress: bool = False,
) -> Dataset:
    """A dataset that is read as it is sampled; ``Trainer.train`` takes it as it takes a ``ReplayBuffer``.

        dataset = worldloom.data.open("minari:pointmaze/umaze-v2")
        train, held_out = dataset.split(0.1)
        Trainer(model, config).train(train)

    Names, shapes and sizes are checked, and what says where episodes end is read; the rows are read, and checked, when
    they are sampled.

    Args:
      spec: ``"minari:ID"``, or a path, whose format is recognised: a file or folder of HDF5 (``.hdf5``, ``.h5``),
        ``.npz`` or ``.pt`` files, a folder of DreamerV3's or this library's replay chunks, the folder of a run, of a
        LeRobot or of a Minari dataset. ``"npz:PATH"`` and the like say which format it is, see ``KINDS``.
      obs_shape, action_dim, action_type: as in ``ReplayBuffer``: None is inferred. Integer actions are counted by
        reading all of them; ``action_dim`` saves that.
      action_bounds: ``(low, high)`` of continuous actions, for Minari's that have no bounds of their own and for
        LeRobot's; of others, which must lie in [−1, 1], it is refused.
      drop_keys, join_actions: for Minari, see ``from_minari``.
      download: whether a Minari dataset that is missing here may be downloaded.
      progress: whether to show a progress bar where every file or episode has to be looked at.

    Raises:
      DataError: nothing is there, no episode is long enough, or it does not have the layout of its format.
      FileFormatError: a file is damaged, truncated, or holds what is unsafe to read.
      ConfigError: there is no such format, or an option is not for it.
      MissingDependencyError: a package is missing that reads the format.
    """
    text = os.fspath(spec)
    kind, place = _split(text)
    action_bounds = check_action_bounds(action_bounds)
    bar = _bar if progress else iter
    described = {"obs_shape": obs_shape, "action_dim": action_dim, "action_type": action_type}
    options = {"action_bounds": action_bounds, "drop_keys": drop_keys, "join_actions": join_actions}
    allowed = {"minari": _MINARI_OPTIONS, "lerobot": ("action_bounds",)}.get(kind, ())
    for name, value in options.items():
        check(not value or name in allowed, f"{name} is not for {KINDS[kind]}.")
    check(not download or kind == "minari", f"download is not for {KINDS[kind]}, which are read where they are.")
    if kind == "minari":
        from worldloom.data.minari_files import minari_parts, open_minari

        parts, found = minari_parts(open_minari(place, download=download), place, bar, **options)
        described = {name: found[name] if value is None else value for name, value in described.items()}
    else:
        parts = _file_parts(kind, absolute_path(place), bar, action_bounds)
    return Dataset(parts, spec=text, kind=kind, progress=bar, **described)


def _split(text: str) -> tuple[str, str]:
    """Format and path or id of ``kind:path``, or of a path alone."""
    prefix, colon, rest = text.partition(":")
    kind = _ALIASES.get(prefix, prefix)
    if colon and kind in KINDS and not Path(text).exists():
        check(bool(rest), f"'{text}' names no {'dataset' if kind == 'minari' else 'path'}.")
        return kind, rest
    path = absolute_path(text)
    if not path.exists():
        if colon and len(prefix) > 1 and "/" not in prefix:
            raise ConfigError(f"There is no format '{prefix}'.{nearest(prefix, KINDS)} Known: {', '.join(KINDS)}.")
        raise DataError(f"{path} does not exist. Formats by name: {', '.join(f'{name}:' for name in KINDS)}.")
    return recognise(path), text


def recognise(path: Path) -> str:
    """The format of a file or folder. Raises ``DataError`` if it is none that is known."""
    from worldloom.data.dreamer_chunks import CHUNK_NAME
    from worldloom.data.replay_files import replay_folder

    if path.is_file():
        if path.suffix == ".npz":
            return "replay" if _is_saved_buffer(path) else "npz"
        by_suffix = {**dict.fromkeys(_HDF5_SUFFIXES, "hdf5"), ".pt": "tdmpc2"}
        if path.suffix in by_suffix:
            return by_suffix[path.suffix]
        raise DataError(f"{path} is of no format that is read: .npz, .hdf5, .h5 or .pt.")
    if (path / "meta" / "info.json").is_file():
        return "lerobot"
    if (path / "data" / "metadata.json").is_file():
        return "minari"
    if replay_folder(path):
        return "replay"
    names = sorted(each.name for each in path.iterdir() if each.is_file())
    if any(name.endswith(".pt") for name in names):
        return "tdmpc2"
    npz = [name for name in names if name.endswith(".npz")]
    if npz:
        return "dreamerv3" if all(CHUNK_NAME.fullmatch(name) for name in npz) else "npz"
    if any(name.endswith(_HDF5_SUFFIXES) for name in names):
        return "hdf5"
    held = ", ".join(names[:5]) or "nothing"
    raise DataError(f"{path} is not a dataset of a known format; it holds {held}. Formats: {', '.join(KINDS)}.")


def _is_saved_buffer(path: Path) -> bool:
    from worldloom.interop.archive import open_archive

    try:
        with open_archive(path) as archive:
            return {"meta.npy", "flags.npy"} <= set(archive.names)
    except FileFormatError:
        return False  # The reader of arrays says what is wrong with it.


def _file_parts(
    kind: str, path: Path, bar: Callable[[Any], Any], action_bounds: tuple[float, float] | None
) -> list[Part]:
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    if kind == "lerobot":
        from worldloom.data.lerobot import lerobot_parts

        return lerobot_parts(path, action_bounds=action_bounds)
    if kind == "replay":
        from worldloom.data.replay_files import chunk_parts, replay_folder, saved_parts

        folder = None if path.is_file() else replay_folder(path)
        if folder is None and not path.is_file():
            raise DataError(f"{path} holds no replay: no chunk files (rows-….chunk).")
        return saved_parts(path) if folder is None else chunk_parts(folder)
    if kind == "dreamerv3":
        from worldloom.data.dreamer_chunks import dreamer_parts

        check(path.is_dir(), f"{path} is a file; the replay of DreamerV3 is a folder of chunks.")
        return dreamer_parts(path)
    suffixes = {"hdf5": _HDF5_SUFFIXES, "npz": (".npz",), "tdmpc2": (".pt",)}[kind]
    paths = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.suffix in suffixes)
    if not paths:
        raise DataError(f"{path} holds no {' or '.join(suffixes)} files.")
    return [_read_file(kind, each) for each in bar(paths)]


def _read_file(kind: str, path: Path) -> Part:
    if kind == "tdmpc2":
        from worldloom.data.tdmpc2_files import tdmpc2_part

        return tdmpc2_part(path)
    from worldloom.data.arrays import flat_part, open_hdf5, open_npz

    return flat_part(str(path), open_npz(path) if kind == "npz" else open_hdf5(path))


def _bar(items: Any) -> Any:
    from tqdm.auto import tqdm

    return tqdm(items, desc="Reading the dataset", leave=False)
