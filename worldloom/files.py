"""Paths and files: what is written survives a crash, and a folder may have any name."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

TEMPORARY = re.compile(r"\..*\.[0-9a-f]{8}\.tmp", re.DOTALL)
"""Names of the temporary files of :func:`atomic_file`; a killed process may leave one."""


def absolute_path(path: str | Path) -> Path:
    """``path`` with ``~`` expanded and made absolute, so that it stays the same when the working directory changes.

    Symbolic links are kept. A ``~name`` without such a user stays as it is, as in a shell.
    """
    path = Path(path)
    with contextlib.suppress(RuntimeError):
        path = path.expanduser()
    return path.absolute()


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a new binary file that becomes ``path`` when the ``with`` block ends without an exception.

    The data goes to a temporary file in the same folder, which must exist, is flushed to disk with ``fsync``, and is
    renamed to ``path``; :func:`fsync_folder` makes the new name last too. If anything fails, including
    ``KeyboardInterrupt``, ``path`` keeps its previous content (or stays absent) and the temporary file is removed. A
    symbolic link is replaced, not followed. Raises ``OSError``, which names the file, when it cannot be written.
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
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # Writes to an open file name no path.
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Write ``data`` to ``path`` as :func:`atomic_file` does; text is encoded as UTF-8, line endings unchanged.

    Bytes of file names that are no text, which Python holds as lone surrogates, are written as ``\\udc80``.
    """
    with atomic_file(path) as file:
        file.write(data.encode(errors="backslashreplace") if isinstance(data, str) else data)


def fsync_folder(folder: str | Path) -> None:
    """Sync the directory entries of new files to disk, where the system supports it."""
    if os.name == "posix":
        fsync(folder)


def fsync_tree(folder: str | Path) -> None:
    """Sync all files and directory entries below ``folder`` to disk: files first, then what names them."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            fsync(os.path.join(parent, name))
        fsync_folder(parent)


def fsync(path: str | Path) -> None:
    """Sync the content of a file to disk."""
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: str | Path) -> Path:
    """Create a folder and its parents, where they are missing, and sync their entries to disk."""
    path = Path(path)
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in missing:
        fsync_folder(each.parent)
    return path


@contextlib.contextmanager
def plain_path(folder: str | Path) -> Iterator[Path]:
    """A path of ``folder``, which must exist, in plain ASCII letters, digits and ``._-``: itself, or a link to it.

    For libraries that take a path for a pattern, an address or a format string: in ``runs/a[1]`` or ``b\\c`` they find
    nothing. The link lies in the folder for temporary files and exists within the ``with`` block only.
    """
    folder = Path(folder).absolute()
    if os.name != "posix" or _PLAIN.fullmatch(str(folder)):
        yield folder
        return
    candidates = [place for place in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm") if _PLAIN.fullmatch(place)]
    writable = next((place for place in candidates if os.access(place, os.W_OK)), None)
    if writable is None:
        raise OSError(
            f"No folder for temporary files with a plain name can be written to, of {candidates}; set TMPDIR."
        )
    with tempfile.TemporaryDirectory(prefix="worldloom-", dir=writable) as temporary:
        link = Path(temporary) / "link"
        link.symlink_to(folder, target_is_directory=True)
        yield link


_PLAIN = re.compile(r"[A-Za-z0-9._/-]+")
