"""How checkpoints use Orbax: without its own meetings of processes, and taking its warnings seriously."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax


def checkpointer() -> Any:
    """Orbax's checkpointer of this process alone; of several, each reads by itself what it needs."""
    import orbax.checkpoint as ocp

    number = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=number, active_processes={number}, barrier_sync_key_prefix=f"worldloom{number}"
    )
    options = options if jax.process_count() > 1 else ocp.options.MultiprocessingOptions()
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


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
