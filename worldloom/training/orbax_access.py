"""How checkpoints use Orbax: without its own meetings of processes, and taking its warnings seriously."""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax


def checkpointer() -> Any:
    """Orbax's checkpointer of this process alone; of several, each reads by itself what it needs."""
    import orbax.checkpoint as ocp

    describe_folders_once()
    number = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=number, active_processes={number}, barrier_sync_key_prefix=f"worldloom{number}"
    )
    options = options if jax.process_count() > 1 else ocp.options.MultiprocessingOptions()
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


@functools.cache
def describe_folders_once() -> None:
    """Keeps a process that makes many checkpoints from growing by 300 bytes for each of their arrays.

    TensorStore 0.1.72 to 0.1.86 keeps four strings for ever at each ``KvStore.Spec.to_json``. Orbax, 0.11.40 to 0.12.8,
    calls it in ``build_kvstore_tspec`` for each array that it saves or reads, though all arrays of a checkpoint differ
    in their names only. From here on it is called once for each folder. Remove this when ``tensorstore_bytes`` of
    ``benchmarks/leaks.py`` is 0. Nothing is done where Orbax has no such
    function.
    """
    try:
        from orbax.checkpoint._src.serialization import tensorstore_utils

        build = tensorstore_utils.build_kvstore_tspec
    except (ImportError, AttributeError):
        return

    @functools.lru_cache(maxsize=8)
    def describe_folder(directory: str, **options: Any) -> Any:
        return build(directory, **options)

    @functools.wraps(build)
    def describe(directory: str, name: str | None = None, *, use_ocdbt: bool = True, **options: Any) -> Any:
        if not use_ocdbt:
            return build(directory, name, use_ocdbt=False, **options)
        folder = copy.deepcopy(describe_folder(directory, use_ocdbt=True, **options))
        return folder if name is None else folder | {"path": name}

    tensorstore_utils.build_kvstore_tspec = describe


@contextlib.contextmanager
def full_disk_errors(path: Path) -> Iterator[None]:
    """Turns what TensorStore says in a thousand characters of a full disk into an ``OSError`` that names ``path``."""
    try:
        yield
    except ValueError as error:
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


@contextlib.contextmanager
def orbax_warnings() -> Iterator[list[str]]:
    """Collects what Orbax logs as a warning or an error; it does so even where what it wrote cannot be read."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, handler = logging.getLogger("absl"), Collector(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
