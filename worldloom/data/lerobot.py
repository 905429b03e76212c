"""LeRobot datasets, versions 2.0 to 3.0 of the format: Parquet files of frames, with ``meta/info.json``."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.config import read_json_object
from worldloom.data.arrays import MAX_PIECE_BYTES, Blocks
from worldloom.data.parts import CACHE, Columns, Part
from worldloom.errors import DataError, FileFormatError
from worldloom.replay.datasets import import_extra

_log = logging.getLogger("worldloom")

_STATE, _ACTION, _REWARD = "observation.state", "action", "next.reward"
_PREFIXES = ("observation.", "observations.")
_PICTURES = ("video", "image")


def lerobot_parts(folder: Path, *, action_bounds: tuple[float, float] | None = None) -> list[Part]:
    """The episodes of a LeRobot dataset, one part for each Parquet file, read by row groups.

    A frame holds an observation, the action chosen at it, and ``next.reward`` of that action; what the last action of
    an episode led to is not recorded, so it is left out. Actions are scaled to [−1, 1] from ``action_bounds``, or from
    the minimum and maximum of each in the dataset's statistics. Videos and images are not read.

    Raises:
      MissingDependencyError: pyarrow is not installed.
      FileFormatError: a file is damaged, or the format is another version.
      DataError: the features are not those of a dataset to learn from.
    """
    parquet = import_extra("pyarrow.parquet", "lerobot")
    info = read_json_object(folder / "meta" / "info.json")
    version = str(info.get("codebase_version", ""))
    features = info.get("features")
    if not version.startswith(("v2.", "v3.")) or not isinstance(features, dict):
        raise FileFormatError(f"{folder} has format version {version or 'unknown'!r}; v2.0 to v3.0 are read.")
    names = _observations(features, folder)
    if _ACTION not in features:
        raise DataError(f"{folder} has no feature 'action'; it has {', '.join(features)}.")
    if _REWARD not in features:
        _log.warning("%s records no rewards (next.reward): all are 0. A world model can be learned, no policy.", folder)
    low, high = _bounds(folder, _width(features, _ACTION), action_bounds)
    paths = sorted((folder / "data").glob("*/*.parquet"))
    if not paths:
        raise DataError(f"{folder} holds no Parquet files (data/chunk-000/….parquet).")
    return [part for path in paths for part in _file_parts(parquet, path, features, names, (low, high))]


def _observations(features: dict[str, Any], folder: Path) -> dict[str, str]:
    """Feature → name of the observation; a single one has the name ``""``."""
    found = [name for name in features if name.startswith(_PREFIXES)]
    pictures = [name for name in found if _kind(features, name) in _PICTURES]
    if pictures:
        _log.warning("These features of %s are not read, videos and images: %s.", folder, ", ".join(pictures))
    kept = [name for name in found if name not in pictures and _kind(features, name).startswith(("float", "int"))]
    if not kept:
        raise DataError(f"{folder} has no observation of numbers; its features are {', '.join(features)}.")
    return {name: "" if len(kept) == 1 else name.partition(".")[2] for name in kept}


def _kind(features: dict[str, Any], name: str) -> str:
    feature = features[name]
    return str(feature.get("dtype", "")) if isinstance(feature, dict) else ""


def _width(features: dict[str, Any], name: str) -> int:
    try:
        shape = [int(size) for size in features[name]["shape"]]
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"The feature {name} has no shape: {features[name]!r:.100}.") from error
    if len(shape) > 1 or not all(0 < size < 1 << 20 for size in shape):
        raise DataError(f"The feature {name} has shape {shape}; vectors are read.")
    return shape[0] if shape else 1


def _bounds(folder: Path, width: int, given: tuple[float, float] | None) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest action, [A] each."""
    if given is not None:
        low, high = np.full(width, given[0], np.float64), np.full(width, given[1], np.float64)
    else:
        stats = _action_stats(folder)
        low = np.min([np.asarray(each["min"], np.float64).reshape(-1) for each in stats], axis=0)
        high = np.max([np.asarray(each["max"], np.float64).reshape(-1) for each in stats], axis=0)
        _log.info("Actions of %s are scaled to [-1, 1] from their minimum and maximum in its statistics.", folder)
    if low.shape != (width,) or not np.isfinite([low, high]).all() or (low > high).any():
        raise DataError(f"The bounds of the actions of {folder} make no sense: {low.tolist()} … {high.tolist()}.")
    return low, high


def _action_stats(folder: Path) -> list[dict[str, Any]]:
    """Statistics of the actions: of the dataset, or of each episode."""
    whole, single = folder / "meta" / "stats.json", folder / "meta" / "episodes_stats.jsonl"
    try:
        if whole.is_file():
            found = [read_json_object(whole, max_bytes=1 << 26)[_ACTION]]
        elif single.is_file():
            with single.open(encoding="utf-8") as lines:
                found = [json.loads(line)["stats"][_ACTION] for line in lines if line.strip()]
        else:
            found = []
        if found and all({"min", "max"} <= each.keys() for each in found):
            return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"The statistics of {folder} are damaged: {error!r:.200}.") from error
    raise DataError(f"{folder} has no statistics of its actions (meta/stats.json); say action_bounds=(low, high).")


def _file_parts(
    parquet: Any, path: Path, features: dict[str, Any], names: dict[str, str], bounds: tuple[np.ndarray, np.ndarray]
) -> list[Part]:
    file = _opened(parquet, path)
    metadata = file.metadata
    wanted = [*names, _ACTION, "episode_index", *([_REWARD] if _REWARD in features else [])]
    held = set(file.schema_arrow.names)
    missing = [name for name in wanted if name not in held]
    if missing:
        raise DataError(f"{path} has no column {', '.join(missing)}; it has {', '.join(sorted(held))[:300]}.")
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    if any(group.total_byte_size > MAX_PIECE_BYTES for group in groups):
        raise FileFormatError(f"{path} has row groups of more than {MAX_PIECE_BYTES} bytes.")
    sizes, identity = [group.num_rows for group in groups], (str(path), path.stat().st_mtime_ns)

    def column(name: str, width: int | None) -> Blocks:
        def read(number: int) -> np.ndarray:
            return CACHE.get((*identity, name, number), lambda: _column(file, path, name, number, width))

        shape = (sum(sizes),) if width is None else (sum(sizes), width)
        return Blocks(sizes, read, shape, np.dtype(np.float32))

    if not sizes or not sum(sizes):
        return []
    episode = column("episode_index", None).whole().astype(np.int64)
    obs = {own: column(name, _width(features, name)) for name, own in names.items()}
    actions = _Scaled(column(_ACTION, _width(features, _ACTION)), *bounds)
    rewards = column(_REWARD, None) if _REWARD in features else _Zeros(len(episode))
    columns = Columns(obs, actions, rewards)
    starts = np.flatnonzero(np.diff(episode, prepend=episode[0] - 1) != 0)
    lengths = np.diff(starts, append=len(episode))
    whole = lengths >= 2
    if not whole.all():
        _log.warning("%d episodes of %s of a single frame are left out.", int((~whole).sum()), path)
    return [Part(str(path), starts[whole], lengths[whole], np.zeros(int(whole.sum()), bool), lambda: columns)]


def _opened(parquet: Any, path: Path) -> Any:
    try:
        return parquet.ParquetFile(path, memory_map=True)
    except (OSError, ValueError) as error:  # pyarrow's own exceptions derive from these
        raise FileFormatError(f"{path} is not a Parquet file, or it is damaged: {str(error)[:200]}.") from error


def _column(file: Any, path: Path, name: str, group: int, width: int | None) -> np.ndarray:
    """A column of a row group: float32 [N] or [N, width], integers as int64."""
    try:
        chunked = file.read_row_group(group, columns=[name]).column(0)
        array = chunked.combine_chunks()
        if chunked.null_count:
            raise DataError(f"{path}: {name} has {chunked.null_count} missing values.")
        flat = array.flatten() if hasattr(array, "flatten") and width is not None else array
        values = np.asarray(flat.to_numpy(zero_copy_only=False))
    except (OSError, ValueError, TypeError, NotImplementedError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise FileFormatError(f"{path}: the column {name} is damaged: {str(error)[:200]}.") from error
    if values.dtype.kind not in "biuf":
        raise DataError(f"{path}: the column {name} has type {values.dtype}; numbers are needed.")
    count = len(chunked)
    if values.size != count * (width or 1):
        raise DataError(f"{path}: {name} has {values.size} numbers in {count} rows, {width or 1} a row are needed.")
    values = values if width is None else values.reshape(count, width)
    return values.astype(np.int64 if name == "episode_index" else np.float32)


class _Scaled:
    """Actions scaled from [low, high] to [−1, 1]; those that never move become 0."""

    def __init__(self, column: Blocks, low: np.ndarray, high: np.ndarray):
        self._column, self._middle = column, (low + high) / 2
        self._half = np.where(high > low, (high - low) / 2, np.inf)

    def take_rows(self, index: np.ndarray) -> np.ndarray:
        """Rows ``index`` [N]."""
        return ((self._column.take_rows(index) - self._middle) / self._half).astype(np.float32)


class _Zeros:
    """Rewards of a dataset that has none."""

    def __init__(self, length: int):
        self._length = length

    def take_rows(self, index: np.ndarray) -> np.ndarray:
        """Zeros [N]."""
        return np.zeros(len(index), np.float32)
