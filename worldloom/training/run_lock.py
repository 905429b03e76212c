"""The lock of a run folder: one process trains into it at a time."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worldloom.config import read_json_object
from worldloom.errors import CheckpointError, FileFormatError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

FILE_NAME = "run.lock"


class RunLock:
    """An advisory lock: the file ``run.lock``, with host and process number of the process that trains.

    The system releases it when that process ends, however it does, so on the same host the file of a killed process
    does not count, nor that of a folder which was copied. Whether a process on another host still runs cannot be known:
    then the message says what to delete.

    Args:
      folder: the run folder, which must exist when the lock is taken.
    """

    def __init__(self, folder: Path):
        self.path = folder / FILE_NAME
        self._file: int | None = None

    def check(self) -> None:
        """Raise ``CheckpointError``, naming host and process, if another process holds the lock."""
        if os.path.lexists(self.path):
            self.acquire()
            self.release()

    def acquire(self) -> None:
        """Take the lock. Raises ``CheckpointError`` if another process holds it or if the file cannot be written."""
        while self._file is None:
            # Not through a link, whose target would be written to.
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
            try:
                file = os.open(self.path, flags, 0o644)
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be written: {error.strerror}.") from error
            try:
                if self._may_take(file):
                    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                    about = {"host": socket.gethostname(), "pid": os.getpid(), "since": now}
                    os.ftruncate(file, 0)
                    os.write(file, json.dumps(about).encode())
                    self._file = file
            finally:
                if self._file is None:
                    os.close(file)

    def _may_take(self, file: int) -> bool:
        """Whether the open ``file`` is now locked; False if it was replaced meanwhile and must be opened again.

        Raises ``CheckpointError`` if another process holds the lock.
        """
        locked, owner = _try_lock(file), _read_owner(self.path)
        if locked is False and not owner:
            time.sleep(0.1)  # Its owner is just writing it.
            owner = _read_owner(self.path)
        if not _is_same_file(file, self.path):
            return False
        if owner and owner.get("host") != socket.gethostname():
            raise CheckpointError(self._refusal(owner, f"If that process is gone, delete {self.path}"))
        if locked:
            return True
        if locked is None and not owner:
            return True
        if _is_gone(owner.get("pid")):
            # A process that it had forked still has the file open.
            self.path.unlink(missing_ok=True)
            return False
        raise CheckpointError(self._refusal(owner, "Stop that process first"))

    def _refusal(self, owner: Mapping[str, Any], advice: str) -> str:
        by = f"process {owner.get('pid', 'unknown')} on host {owner.get('host', 'unknown')}"
        since = f" since {owner['since']}" if "since" in owner else ""
        return f"{self.path.parent} is being trained by {by}{since}. {advice}, or choose another folder."

    def release(self) -> None:
        """Release the lock if this object holds it, and delete the file."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                if _is_same_file(file, self.path):
                    self.path.unlink()
            os.close(file)


def _try_lock(file: int) -> bool | None:
    """Lock ``file`` for as long as it is open. False if another process has it; None if locks are not supported."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_gone(pid: Any) -> bool:
    """Whether the process ``pid`` of this host has ended; False if that cannot be told."""
    if not isinstance(pid, int) or pid <= 0 or os.name != "posix":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _read_owner(path: Path) -> dict[str, Any]:
    """The content of a lock file; empty if there is none."""
    try:
        return read_json_object(path)
    except (FileFormatError, OSError):
        return {}


def _is_same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except FileNotFoundError:
        return False
