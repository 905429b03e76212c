"""What ``accelerator.py`` has measured: a JSON file per part, and ``status.json``, written after every figure."""

import datetime
import fcntl
import json
from pathlib import Path

from worldloom.files import write_atomically


class Store:
    """The folder of ``--out``. A process that is killed leaves it as it was after the last figure.

    Only one process may write to it, on one kind of device: the constructor locks it, and ``open_for`` refuses figures
    of another device or another size. Either ends the program with a sentence.
    """

    def __init__(self, folder):
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("a")  # the kernel releases it however this process ends
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            sentence = f"Another process is measuring into {self.folder}; wait for it, or choose another --out."
            raise SystemExit(sentence) from None
        self.status = {"done": [], "left": [], "failed": {}, "left out": {}, **self._read("status")}

    def close(self):
        """Let another process write."""
        self._lock.close()

    def open_for(self, about):
        """Compare device and sizes with those of the figures that are there; ``about`` is written beside them."""
        same = ("device", "platform", "smoke", "jax")
        before = self.status.get("about")
        changed = [name for name in same if before and before[name] != about[name]]
        if changed:
            raise SystemExit(
                f"{self.folder} holds figures of another "
                + " and ".join(f"{name} ({before[name]!r}, now {about[name]!r})" for name in changed)
                + "; choose another --out for these."
            )
        self.status["about"] = about

    def part(self, part):
        """Entries of a part by name: ``figure``, ``error`` or ``progress``, and ``seconds``, ``time``, ``revision``."""
        return self._read(part)

    def write(self, part, name, seconds, **entry):
        """Keep the result of one measurement."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        revision = self.status["about"]["revision"]
        stamped = entry | {"seconds": round(seconds, 1), "time": now, "revision": revision}
        self._write(part, self.part(part) | {name: stamped})

    def write_status(self, tasks, left_out):
        """Write ``status.json``: which of the planned ``tasks`` (part, name) are done, left or failed."""
        entries = {part: self.part(part) for part in {part for part, _ in tasks}}
        self.status |= {"done": [], "left": [], "failed": {}, "left out": left_out}
        for part, name in tasks:
            entry = entries[part].get(name, {})
            if "error" in entry:
                self.status["failed"][f"{part}/{name}"] = entry["error"]
            else:
                self.status["done" if "figure" in entry else "left"].append(f"{part}/{name}")
        self._write("status", self.status)

    def _read(self, name):
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def _write(self, name, value):
        # allow_nan=False: a figure that is not a number is a mistake of the measurement, not a result.
        write_atomically(
            self.folder / f"{name}.json",
            json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=_number) + "\n",
        )


def _number(value):
    """NumPy's numbers as Python's."""
    return value.item()
