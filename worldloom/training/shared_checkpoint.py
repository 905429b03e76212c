"""A checkpoint that several processes write together, each its part of the arrays, in one folder that all of them see.

The format is that of :mod:`worldloom.training.checkpoint_files`. Orbax writes what each process holds, but does not let
the processes meet: it would do so through XLA's collectives, which belong to the updates that are under way meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from worldloom.distributed import Meeting, is_primary
from worldloom.errors import CheckpointError, NonFiniteError
from worldloom.files import fsync, fsync_tree, plain_path
from worldloom.training.checkpoint_files import (
    PARTIAL,
    Snapshot,
    arrays_to_save,
    checksums,
    complete_checkpoint,
    remove_tree,
)
from worldloom.training.orbax_access import describe_folders_once, full_disk_errors, orbax_warnings


class SharedWrite:
    """The writing of one checkpoint. All processes construct it after the same update, and finish it.

    The constructor copies what this process holds to the host, and begins to write it; afterwards, updates may change
    the arrays. :meth:`finish` may be called in another thread. What fails in one process fails in all: the new files
    are removed, and a checkpoint that was at ``target`` before stays.

    Args:
      target: folder of the checkpoint.
      snapshot: what to save; only process 0 needs all of it, the others the state.
      meeting: of the processes.

    Raises:
      NonFiniteError: in all processes, if a weight is not finite in any.
    """

    def __init__(self, target: Path, snapshot: Snapshot, meeting: Meeting):
        import orbax.checkpoint as ocp

        self._target, self._partial = target, target.with_name(f"{target.name}{PARTIAL}")
        self._snapshot, self._meeting = snapshot, meeting
        self._arrays = arrays_to_save(snapshot)
        describe_folders_once()
        self._handler = ocp.PyTreeCheckpointHandler()
        self._open = contextlib.ExitStack()
        self._warned = self._open.enter_context(orbax_warnings())
        self._folder: Any = None
        self._writing: list[Any] = []
        self._error: Exception | None = None
        try:
            not_finite = [name for names in meeting(self._begin) for name in names]
            if not not_finite:
                self._begin_writing()
        except Exception as error:
            # The other processes may know nothing of it yet: it is raised where they look for it.
            self._error = error
        else:
            if not_finite:
                self._give_up()
                raise NonFiniteError(
                    f"Step {snapshot.step}: the weights {not_finite[0]} are not finite and are not saved."
                )

    def finish(self, values: Callable[[], Mapping[str, Any]]) -> None:
        """Wait until all processes have written their part; process 0 then gives the folder its name.

        ``values`` returns further JSON values for the record; only process 0 calls it. Raises what failed, in all
        processes.
        """
        try:
            known = {name: each for files in self._meeting(self._write) for name, each in files.items()}
            self._meeting(lambda: self._complete(known, values()) if is_primary() else None)
        except BaseException:
            self._give_up()
            raise
        self._open.close()

    def _begin(self) -> list[str]:
        """Make the folder; returns names of weights that are not finite in this process."""
        if is_primary():
            remove_tree(self._partial)
            (self._partial / "state").mkdir(parents=True)
        weights = {name: array for name, array in self._arrays.items() if name.startswith("params/")}
        return [name for name, array in weights.items() if not _own_part_is_finite(array)]

    def _begin_writing(self) -> None:
        import orbax.checkpoint as ocp
        from etils import epath  # Orbax's class of paths.

        self._folder = epath.Path(self._open.enter_context(plain_path(self._partial))) / "state"
        with full_disk_errors(self._partial):
            writing = self._handler.async_save(self._folder, args=ocp.args.PyTreeSave(self._arrays))
            self._writing = asyncio.run(writing) or []

    def _write(self) -> dict[str, list[Any]]:
        """Wait for this process's files to be on disk; returns their checksums. Process 0 reads its own later."""
        if self._error is not None:
            raise self._error
        with full_disk_errors(self._partial):
            for part in self._writing:
                part.result()
        if is_primary():
            return {}
        number, state = jax.process_index(), self._partial / "state"
        arrays, described = state / f"ocdbt.process_{number}", state / "array_metadatas" / f"process_{number}"
        if arrays.is_dir():  # A process that holds nothing but copies of what others write has none.
            fsync_tree(arrays)
        if described.is_file():
            fsync(described)
        self._check_warnings()
        return {f"state/{arrays.name}/{name}": each for name, each in checksums(arrays)}

    def _complete(self, known: Mapping[str, list[Any]], values: Mapping[str, Any]) -> int:
        """Join the parts of all processes; returns the size of the checkpoint in bytes."""
        with full_disk_errors(self._partial):
            self._handler.finalize(self._folder)
        self._check_warnings()
        return complete_checkpoint(self._partial, self._target, self._snapshot, self._arrays, values, known)

    def _check_warnings(self) -> None:
        if self._warned:
            raise CheckpointError(f"Orbax warned: {self._warned[0]}")

    def _give_up(self) -> None:
        if is_primary():
            remove_tree(self._partial)
        self._open.close()


def _own_part_is_finite(array: Any) -> bool:
    parts = [shard.data for shard in array.addressable_shards] if isinstance(array, jax.Array) else [array]
    return all(np.isfinite(np.asarray(part)).all() for part in parts)
