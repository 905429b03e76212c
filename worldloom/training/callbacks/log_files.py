"""Files that records are appended to: a disk that is full for a while costs warnings, never the run."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_log = logging.getLogger("worldloom")


class AppendFile:
    """A file opened for appending whose records are written whole, in order, and again after a failure.

    What cannot be written is kept and tried again with the next record; a warning names file and error when writing
    begins to fail, and another message says when it works again. A symbolic link at ``path`` is replaced, not followed.

    Args:
      path: the file, created at once.

    Raises ``OSError`` if it cannot be created.
    """

    def __init__(self, path: Path):
        self.path = path
        self._pending, self._failing = b"", False
        self._file: int | None = self._open()

    def write(self, record: bytes) -> None:
        """Append ``record``, after those that could not be written before."""
        self._pending += record
        try:
            if self._file is None:
                self._file = self._open()
            while self._pending:
                self._pending = self._pending[os.write(self._file, self._pending) :]
            os.fsync(self._file)
        except OSError as error:
            if not self._failing:
                name = errno.errorcode.get(error.errno or 0, "unknown")
                _log.warning(
                    "%s cannot be written: %s (%s). Training goes on; what is missing is written once that works.",
                    *(self.path, error.strerror or error, name),
                )
            self._failing = True
        else:
            if self._failing:
                _log.warning("%s can be written again, and misses nothing.", self.path)
            self._failing = False

    def close(self) -> None:
        """Try once more to write what is missing, say so if that fails, and close the file."""
        if self._pending:
            self.write(b"")
        if self._pending:
            _log.warning("The last %d bytes of %s could not be written.", len(self._pending), self.path)
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def _open(self) -> int:
        if self.path.is_symlink():
            self.path.unlink()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        return os.open(self.path, flags, 0o666)


class TensorBoardFile:
    """An event file of scalars, written in this thread; TensorBoardX's own writer does not survive a full disk.

    Args:
      folder: folder of the file.
      purge_step: step from which TensorBoard hides the events of earlier files; None for none.
    """

    def __init__(self, folder: Path, purge_step: int | None):
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        base = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        names = (base if number == 1 else f"{base}.{number}" for number in itertools.count(1))
        self._file = AppendFile(next(path for path in map(folder.joinpath, names) if not os.path.lexists(path)))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Append scalars by name at ``step``."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        now = time.time()
        self._write(*(Event(wall_time=now, step=step, summary=scalar(name, value)) for name, value in values.items()))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, *events: Any) -> None:
        self._file.write(b"".join(_record(event.SerializeToString()) for event in events))


def _record(data: bytes) -> bytes:
    """``data`` as a TFRecord: its length, that one's checksum, the data, its checksum."""
    from tensorboardX.record_writer import masked_crc32c

    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
