"""The content of a buffer as a plain record, and its ``.npz`` file format.

``ReplayBuffer.content()`` returns the record and ``ReplayBuffer.from_content`` makes a buffer of it. The ``.npz``
functions here and the chunk files of :mod:`worldloom.replay.store` write and read this record only.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from worldloom.errors import DataError, FileFormatError
from worldloom.replay.npz import FLAT_HINT, Member, NpzFile, write_npz
from worldloom.replay.schema import UINT8, Declared, Schema, integer, latent_columns, latent_shapes
from worldloom.replay.table import Column, RowTable
from worldloom.replay.validation import check_stored_column

FORMAT, VERSION = "worldloom.replay", 1

META_BYTES = 1 << 20
"""Largest description that is read."""


@dataclasses.dataclass(frozen=True)
class BufferDescription:
    """Everything about a buffer but its rows.

    Attributes:
      capacity: largest number of rows held.
      first_row: number of the oldest row held.
      next_row: number of the next row to be added.
      declared: what the user declared about the data.
      schema: what a row consists of; None without rows.
      latents: shapes per row of the latents stored beside the rows.
      dropped: rows that were dropped, by stream: windows of fresh rows are cut from a stream's first row on.
    """

    capacity: int
    first_row: int
    next_row: int
    declared: Declared
    schema: Schema | None
    latents: dict[str, tuple[int, ...]]
    dropped: Mapping[int, int] = dataclasses.field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows held."""
        return self.next_row - self.first_row

    @property
    def row_columns(self) -> dict[str, Column]:
        """Columns of the rows, none while they are unknown."""
        return self.schema.columns if self.schema else {}

    @property
    def latent_columns(self) -> dict[str, Column]:
        """Columns of the latents, none while there are no rows."""
        return latent_columns(self.latents) if self.schema else {}

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        dropped = {str(stream): count for stream, count in self.dropped.items()}
        return {
            "capacity": self.capacity,
            "first_row": self.first_row,
            "next_row": self.next_row,
            "declared": self.declared.to_json(),
            "schema": self.schema and self.schema.to_json(),
            "latents": dict(self.latents),
            **({"dropped": dropped} if dropped else {}),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_json`.

        Raises ``LookupError``, ``TypeError``, ``ValueError`` or ``AttributeError`` on anything that it does not write.
        """
        capacity = integer(values["capacity"], "capacity", 1)
        declared = Declared.check(**values["declared"])
        latents = latent_shapes(values["latents"])
        first = integer(values["first_row"], "first_row", 0)
        end = integer(values["next_row"], "next_row", first)
        if end - first > capacity:
            raise DataError(f"{end - first} rows are more than the capacity of {capacity}.")
        schema = Schema.from_json(values["schema"]) if end > first else None
        # Files of earlier versions do not say.
        dropped = {int(k): integer(n, "dropped", 0) for k, n in values.get("dropped", {}).items()}
        if sum(dropped.values()) > first:
            raise DataError(f"{sum(dropped.values())} dropped rows are more than the {first} before the oldest.")
        return cls(capacity, first, end, declared, schema, latents, dropped)


@dataclasses.dataclass(frozen=True)
class BufferContent:
    """Everything that a buffer holds.

    Attributes:
      description: everything but the rows.
      rows: rows ``first_row … next_row - 1``; their ``flags`` may have derived bits beside those given.
      latents: the latents of the same rows.
    """

    description: BufferDescription
    rows: RowTable
    latents: RowTable

    @classmethod
    def empty(cls, description: BufferDescription) -> Self:
        """The tables that ``description`` asks for, without their rows."""
        rows = RowTable(description.row_columns, first=description.first_row)
        return cls(description, rows, RowTable(description.latent_columns, first=description.first_row))


def write_content(content: BufferContent, path: Path) -> None:
    """Write ``content`` to the ``.npz`` file ``path``: the JSON description ``meta``, and one member per column.

    The file appears under its name only when complete. Raises ``OSError`` if it cannot be written.
    """
    description = {"format": FORMAT, "version": VERSION, **content.description.to_json()}
    meta = np.frombuffer(json.dumps(description).encode(), np.uint8)
    members = [Member("meta", len(meta), Column((), UINT8), [meta])]
    for table in (content.rows, content.latents):
        members += [Member(n, len(table), column, table.iter_column(n)) for n, column in table.columns.items()]
    write_npz(path, members)


def read_content(file: NpzFile) -> BufferContent:
    """Read what :func:`write_content` wrote; each column must hold only what a buffer accepts.

    Use it within :func:`~worldloom.replay.npz.open_npz`, which turns what is raised here into ``FileFormatError``.
    """
    if "meta" not in file.names:
        raise FileFormatError(f"it has no member 'meta'{FLAT_HINT}")
    meta = json.loads(file.read_bytes("meta", META_BYTES))
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or meta.get("version") != VERSION:
        raise FileFormatError(f"it is not in the format {FORMAT}, version {VERSION}")
    description = BufferDescription.from_json(meta)
    content, count = BufferContent.empty(description), description.num_rows
    # All members are checked before memory is allocated, which is then as much as the file really holds.
    columns = {**content.rows.columns, **content.latents.columns}
    if file.names != {"meta", *columns}:
        raise FileFormatError("its members are not those its description names")
    for name, column in columns.items():
        file.check(name, count, column)
    for table in (content.rows, content.latents):
        ids = table.extend(count)
        for name, column in table.columns.items():
            start = 0
            for piece in file.pieces(name, count, column, table.block_rows):
                assert description.schema is not None
                check_stored_column(description.schema, name, piece)
                table.put(name, ids[start : start + len(piece)], piece)
                start += len(piece)
    return content
