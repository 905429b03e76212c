"""What ``accelerator.py`` has measured: a JSON file per part, and ``status.json``, written after every figure."""

import contextlib
import datetime
import fcntl
import json
import sys
from pathlib import Path

from worldloom.files import write_atomically

SAME = ("device", "platform", "smoke", "jax", "xla_flags", "products")
"""What the figures of one folder must have in common."""
FILES = ("status", "exact", "speed", "flags", "peers", "learn")


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
        """Compare device and sizes with those of the figures that are there; ``about`` is written beside each.

        Returns the names of figures and runs of other commits, which are kept.
        """
        others = []
        for file in FILES:
            entries = {"about": self.status.get("about") or {}} if file == "status" else self.part(file)
            for name, entry in entries.items():
                changed = [key for key in SAME if key in entry and entry[key] != about.get(key)]
                if changed:
                    raise SystemExit(
                        f"{self.folder} holds figures of another "
                        + " and ".join(f"{key} ({entry[key]!r}, now {about.get(key)!r})" for key in changed)
                        + "; choose another --out for these."
                    )
                if entry.get("revision") != about["revision"] and {"figure", "progress"} & set(entry):
                    others.append(f"{file}/{name}")
        self.status["about"] = about
        return others

    def part(self, part):
        """Entries of a part by name: ``figure``, ``error`` or ``progress``, and ``seconds``, ``time``, ``revision``."""
        return self._read(part)

    def begin(self, part, name):
        """Note that a measurement is started; returns how often it was before, without having come to an end."""
        entry = self.part(part).get(name, {})
        starts = entry.get("starts", 0)
        # Of what failed before, and is tried again, no start is counted.
        kept = {} if "error" in entry else entry
        self._write(part, self.part(part) | {name: {**kept, "starts": 1 if "error" in entry else starts + 1}})
        return 0 if "error" in entry else starts

    def forget(self, part, name):
        """Drop the entry of a measurement that cannot be made here."""
        self._write(part, {key: entry for key, entry in self.part(part).items() if key != name})

    def write(self, part, name, seconds, **entry):
        """Keep the result of one measurement; ``begun at`` is the commit of a run that another one has begun."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        about, before = self.status["about"], self.part(part).get(name, {})
        stamped = entry | {"seconds": round(seconds, 1), "time": now, "revision": about["revision"]}
        stamped |= {key: about[key] for key in SAME if key in about}
        begun = before.get("begun at", before["revision"]) if "progress" in before else about["revision"]
        if begun != about["revision"]:
            stamped["begun at"] = begun
        self._write(part, self.part(part) | {name: stamped})

    def write_status(self, tasks, left_out):
        """Write ``status.json``: which of the planned ``tasks`` (part, name) are done, left, failed or wrong."""
        entries = {part: self.part(part) for part in {part for part, _ in tasks}}
        self.status |= {"done": [], "left": [], "failed": {}, "wrong": {}, "left out": left_out}
        for part, name in tasks:
            entry = entries[part].get(name, {})
            if "error" in entry:
                self.status["failed"][f"{part}/{name}"] = entry["error"]
            else:
                if fault := wrong(entry.get("figure")):
                    self.status["wrong"][f"{part}/{name}"] = fault
                self.status["done" if "figure" in entry else "left"].append(f"{part}/{name}")
        self._write("status", self.status)

    def _read(self, name):
        path = self.folder / f"{name}.json"
        if not path.exists():
            return {}
        with contextlib.suppress(ValueError):
            found = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(found, dict) and all(isinstance(each, dict) for each in found.values() if name != "status"):
                return found
        aside = path.with_suffix(".damaged")
        path.replace(aside)
        print(f"{path} is damaged, and now {aside.name}: what it held will be measured again.", file=sys.stderr)
        return {}

    def _write(self, name, value):
        # allow_nan=False: a figure that is not a number is a mistake of the measurement, not a result.
        write_atomically(
            self.folder / f"{name}.json",
            json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=_number) + "\n",
        )


def wrong(figure):
    """What a figure says that should not be, in a sentence; None if nothing."""
    if not isinstance(figure, dict):
        return None
    if figure.get("wrong"):
        count = figure["passed"] + len(figure["wrong"])
        return f"{len(figure['wrong'])} of {count} tests have other values: {', '.join(figure['wrong'])}"
    if figure.get("equal") is False or figure.get("equal_within_a_process") is False:
        return "what should be equal bit for bit is not"
    if figure.get("in_band") is False:
        reached = figure["reached_at_env_steps"]
        when = "never" if reached is None else f"at {reached:,} steps"
        return f"the goal was reached {when}, on CPUs at {figure['reached_on_cpu']}"
    return None


def _number(value):
    """NumPy's numbers as Python's."""
    return value.item()
