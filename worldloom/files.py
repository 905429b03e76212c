"""Atomic file writes: a reader, or a crash, never meets half a file."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a new binary file that becomes ``path`` when the ``with`` block ends without an exception.

    The data goes to a temporary file in the same folder, which must exist, is flushed to disk with ``fsync``, and is
    renamed to ``path``. If anything fails, including ``KeyboardInterrupt``, ``path`` keeps its previous content (or
    stays absent) and the temporary file is removed. A symbolic link is replaced, not followed. Raises ``OSError`` when
    the file cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        # Pipes and devices (/dev/stdout) must not be replaced by a file; a folder raises IsADirectoryError here.
        with path.open("wb") as file:
            yield file
        return
    # The token keeps writers in other threads and processes apart. The name is cut because file systems allow at most
    # 255 bytes, and a character may take 4.
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Write ``data`` to ``path`` as :func:`atomic_file` does; text is encoded as UTF-8, line endings unchanged."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def fsync_folder(folder: str | Path) -> None:
    """Sync the directory entries of new files to disk, where the system supports it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
