"""How checkpoints use Orbax: by one process alone, and taking its warnings seriously."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import jax


def checkpointer() -> Any:
    """Orbax's checkpointer of this process alone: of several, the first writes, and each reads all by itself."""
    import orbax.checkpoint as ocp

    number = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=number, active_processes={number}, barrier_sync_key_prefix=f"worldloom{number}"
    )
    options = options if jax.process_count() > 1 else ocp.options.MultiprocessingOptions()
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


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
