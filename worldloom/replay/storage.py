"""Rows, their latents and the index of episodes, changed together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from worldloom.errors import DataError
from worldloom.replay.conversion import as_numbers
from worldloom.replay.index import FIRST, GIVEN_FLAGS, INTERRUPTED, LAST, TERMINAL, EpisodeIndex
from worldloom.replay.schema import Schema, latent_columns, latent_name, latent_shapes
from worldloom.replay.table import RowTable
from worldloom.replay.validation import check_episode_order, convert_latents

Batch = dict[str, Any]


class RowStorage:
    """The rows of a buffer in memory, with the same row numbers in both tables and in the index.

    Args:
      latents: shapes per row of the latents stored beside the rows.
      first: number of the first row to be added.

    Attributes:
      schema: what a row consists of; None without rows.
      latent_shapes: shapes per row of the latents.
      rows: the rows; only their ``flags`` ever change.
      latents: the latents, in a table of their own because training changes them all the time.
      index: which rows follow each other.
    """

    def __init__(self, latents: Mapping[str, tuple[int, ...]], *, first: int = 0):
        self.schema: Schema | None = None
        self.latent_shapes = dict(latents)
        self.rows, self.latents = RowTable({}, first=first), RowTable({}, first=first)
        self.index = EpisodeIndex()

    def load(self, schema: Schema, rows: RowTable, latents: RowTable, dropped: Mapping[int, int]) -> None:
        """Take over tables read from a file, and index their rows; ``dropped`` counts the rows before, by stream.

        Raises:
          DataError: an episode goes on after its last row.
        """
        ids = np.arange(rows.first, rows.end)
        columns = rows.take(["stream", "flags"], ids)
        streams, flags = columns["stream"], columns["flags"] & GIVEN_FLAGS
        check_episode_order(streams, flags)
        rows.put("flags", ids, flags)
        self.schema, self.rows, self.latents = schema, rows, latents
        self.index.dropped = dropped
        self._add_to_index(ids, streams, flags)

    # ---- adding and dropping rows ---------------------------------------------------------------------------------

    def append(
        self, schema: Schema, columns: Mapping[str, np.ndarray], latents: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """Store validated columns [N, ...], all or (if memory runs out) none; returns their numbers, int64 [N].

        ``latents`` are {name: [N, ...]}; missing ones are zero.
        """
        count = len(columns["flags"])
        given = {latent_name(key): values for key, values in latents.items()}
        latent_values = {
            name: given.get(name, np.zeros((count, *column.shape), column.dtype))
            for name, column in latent_columns(self.latent_shapes).items()
        }
        rows, latent_rows = self.rows, self.latents
        if self.schema is None:
            rows = RowTable(schema.columns, first=self.rows.end)
            latent_rows = RowTable(latent_columns(self.latent_shapes), first=self.rows.end)
        # All memory is allocated before either table grows.
        rows.reserve(count)
        latent_rows.append(latent_values, count)
        ids = rows.append(columns, count)
        self.schema, self.rows, self.latents = schema, rows, latent_rows
        self._add_to_index(ids, columns["stream"], columns["flags"])
        return ids

    def _add_to_index(self, ids: np.ndarray, streams: np.ndarray, flags: np.ndarray) -> None:
        """Index new rows [N], and flag the rows whose episodes they interrupt."""
        interrupted = self.index.add(ids, streams, flags)
        if len(interrupted):
            before = self.rows.take(["flags"], interrupted)["flags"]
            self.rows.put("flags", interrupted, before | np.uint8(INTERRUPTED))

    def drop_before(self, first: int) -> None:
        """Drop all rows numbered below ``first``."""
        if first > self.rows.first:
            self.rows.drop_before(first)
            self.latents.drop_before(first)
            self.index.drop_before(first)

    def truncate(self, end: int) -> None:
        """Drop all rows numbered ``end`` and above; an episode they interrupted is in progress again."""
        self.rows.truncate(end)
        self.latents.truncate(end)
        newest = self.index.truncate(end)
        if len(newest) == 0:
            self.schema, self.rows, self.latents = None, RowTable({}, first=end), RowTable({}, first=end)
            return
        flags = self.rows.take(["flags"], newest)["flags"] & GIVEN_FLAGS
        self.rows.put("flags", newest, flags)
        self.index.reopen(flags)

    # ---- reading rows ---------------------------------------------------------------------------------------------

    def take(self, row_ids: np.ndarray, *, latents: bool, observations: bool) -> Batch:
        """The rows ``row_ids`` [..., T] as a batch; see ``ReplayBuffer.take``."""
        ids = as_numbers(row_ids, "row_ids", "iu").astype(np.int64)
        schema, rows = self.schema, self.rows
        if schema is None:
            raise DataError("The buffer is empty; add episodes first.")
        if ids.ndim == 0 or ids.size == 0 or ids.min() < rows.first or ids.max() >= rows.end:
            raise DataError(f"row_ids must be an array [..., T] of rows held, {rows.first} … {rows.end - 1}.")
        if latents and not self.latent_shapes:
            raise DataError(
                "No latents are stored; create the buffer with latents={'deter': …} or call ensure_latents."
            )
        left_out = {"stream", "task"} | (set() if observations else set(schema.obs_columns.values()))
        names = [name for name in schema.columns if name not in left_out]
        found = {k: v.reshape(*ids.shape, *v.shape[1:]) for k, v in rows.take(names, ids.ravel()).items()}
        flags = found["flags"]
        batch: Batch = {
            "actions": schema.unpack_actions(found),
            "rewards": found["rewards"],
            "is_first": flags & FIRST != 0,
            "is_last": flags & (LAST | INTERRUPTED) != 0,
            "is_terminal": flags & TERMINAL != 0,
            "row_ids": ids,
        }
        if observations:
            batch["obs"] = schema.unpack_obs(found)
        head = ids[..., 0]
        if schema.has_task:
            batch["task"] = rows.take(["task"], head.ravel())["task"].reshape(head.shape)
        if latents:
            stored = self.latents.take([latent_name(key) for key in self.latent_shapes], head.ravel())
            batch["context"] = {
                key: stored[latent_name(key)].reshape(*head.shape, *shape) for key, shape in self.latent_shapes.items()
            }
        return batch

    # ---- latents --------------------------------------------------------------------------------------------------

    def ensure_latents(self, latents: Mapping[str, tuple[int, ...]]) -> None:
        """See ``ReplayBuffer.ensure_latents``."""
        wanted = latent_shapes(latents)
        for key, size in wanted.items():
            if self.latent_shapes.get(key, size) != size:
                raise DataError(
                    f"latents '{key}' are stored with shape {self.latent_shapes[key]}; {size} was asked for."
                )
        if wanted.keys() <= self.latent_shapes.keys():
            return
        self.latent_shapes = self.latent_shapes | wanted
        if self.schema is not None:
            self.latents = self.latents.with_columns(latent_columns(self.latent_shapes))

    def write_latents(self, row_ids: np.ndarray, latents: Mapping[str, np.ndarray]) -> None:
        """See ``ReplayBuffer.write_latents``."""
        ids = as_numbers(row_ids, "row_ids", "iu").astype(np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.rows.end):
            raise DataError(f"row_ids must lie in 0 … {self.rows.end - 1}; got {ids.min()} … {ids.max()}.")
        values = convert_latents(latents, self.latent_shapes, ids.shape)
        held = ids.ravel() >= self.rows.first
        for key, value in values.items():
            flat = value.reshape(ids.size, *self.latent_shapes[key])
            self.latents.put(latent_name(key), ids.ravel()[held], flat[held])
