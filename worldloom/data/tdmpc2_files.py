"""The datasets of TD-MPC2's reference program, such as mt30 and mt80: ``.pt`` files, mapped, without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.data.arrays import MAX_MAPPED_BYTES
from worldloom.data.file_rows import FileRows, forget_open_file
from worldloom.data.parts import Columns, Part
from worldloom.errors import DataError, FileFormatError
from worldloom.interop.mapped_file import MappedFile
from worldloom.interop.torch_file import read_torch

_KEYS = ("obs", "action", "reward")


def tdmpc2_part(path: Path) -> Part:
    """The episodes of a file of ``torch.save(TensorDict)``: ``obs, action, reward`` and ``task`` of [E, T, …].

    Row t holds the action and the reward that led to its observation, both NaN in row 0. All episodes end by a time
    limit. Only the pickle is read here; the tensors stay in the file.

    Raises:
      FileFormatError: the file is damaged, or holds something else than such tensors.
      DataError: their shapes do not belong together.
    """
    mapped = MappedFile(path)
    tensors = _tensors(read_torch(path, max_bytes=MAX_MAPPED_BYTES, stub_unknown=True, mapped=mapped))
    if tensors is None:
        raise FileFormatError(f"{path} holds no {', '.join(_KEYS)}: it is not a dataset of TD-MPC2.")
    shapes = {name: array.shape for name, array in tensors.items()}
    obs = tensors["obs"]
    if obs.ndim < 3 or tensors["action"].ndim != 3 or tensors["reward"].ndim not in (2, 3):
        raise DataError(f"{path} holds tensors of shapes {shapes}; episodes [E, T, …] are expected.")
    episodes, rows = obs.shape[:2]
    if any(shape[:2] != (episodes, rows) for shape in shapes.values()) or rows < 2:
        raise DataError(f"{path} holds tensors of shapes {shapes}, which are not of the same episodes [E, T].")
    forget_open_file(path)
    flat = {
        name: FileRows(path, array.dtype, (episodes * rows, *array.shape[2:]), mapped.offset(array), name)
        for name, array in tensors.items()
    }
    columns = Columns({"": flat["obs"]}, flat["action"], flat["reward"], task=flat.get("task"))
    return Part(
        str(path),
        np.arange(episodes) * rows,
        np.full(episodes, rows),
        np.zeros(episodes, bool),
        lambda: columns,
        action_offset=1,
        reward_offset=0,
        in_files=True,
    )


def _tensors(value: Any, depth: int = 0) -> dict[str, np.ndarray] | None:
    """The arrays by name in a dict that has all of ``_KEYS``, at whatever depth a ``TensorDict`` put it."""
    if not isinstance(value, Mapping) or depth > 3:
        return None
    if all(isinstance(value.get(name), np.ndarray) for name in _KEYS):
        return {name: value[name] for name in (*_KEYS, "task") if isinstance(value.get(name), np.ndarray)}
    return next((found for each in value.values() if (found := _tensors(each, depth + 1))), None)
