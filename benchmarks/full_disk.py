"""What does a full disk cost a run? Prints JSON; ``python benchmarks/full_disk.py``.

A run trains on a small file system in memory (tmpfs), which is filled by another file in the middle and freed later.
The run must go on, its earlier checkpoints stay whole, the warnings name file, need and free space; at the end weights,
optimizer, replay and log must be those of a run that never met a full disk. Then a run is started on a disk that stays
full: its last save fails, and once there is space ``resume="auto"`` ends like the others. Exit code 1 if anything
differs.

Mounting needs rights that an ordinary user lacks: without them nothing is measured, and the report says so.
"""

import argparse
import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path


@contextlib.contextmanager
def small_disk(megabytes):
    """A folder on a tmpfs of its own; None if it cannot be mounted."""
    folder = Path(tempfile.mkdtemp(prefix="worldloom-full-disk-"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True) if shutil.which("mount") else None
    mounted = done is not None and done.returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def fill(folder, leave):
    """Fill the disk of ``folder`` but for ``leave`` bytes."""
    with (folder / "ballast").open("ab") as file:
        free = shutil.disk_usage(folder).free
        with contextlib.suppress(OSError):
            while free > leave:
                file.write(bytes(min(free - leave, 1 << 16)))
                file.flush()
                free = shutil.disk_usage(folder).free


class Messages(logging.Handler):
    """The log's messages."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.found = []

    def emit(self, record):
        self.found.append(record.getMessage())


def run(name, folder, steps, callbacks=(), disk=None):
    """Train a small run; returns fingerprint, messages, and the error that ended it if one did."""
    from runs import fingerprint, small_run

    trainer, source = small_run(name, folder, steps=steps, save_every=10, callbacks=callbacks)
    messages, error = Messages(), None
    logging.getLogger("worldloom").addHandler(messages)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                trainer.train(source, resume="auto")
            except Exception as problem:
                error = problem
    finally:
        logging.getLogger("worldloom").removeHandler(messages)
    found = messages.found + [str(warning.message) for warning in warned]
    if disk is not None:
        (disk / "ballast").unlink(missing_ok=True)
    return None if error else fingerprint(trainer, source, folder), found, error


def different(found, expected):
    """The parts in which a run differs from the expected one."""
    return ["it ended with an error"] if found is None else [part for part in expected if found[part] != expected[part]]


def examine(name, disk, steps, leave):
    """The figures of one run."""
    from worldloom.training.checkpoint import Checkpointer
    from worldloom.training.checkpoint_files import read_record

    with tempfile.TemporaryDirectory() as other:
        expected, _, _ = run(name, Path(other), steps)
    whole_checkpoints = []

    def full_for_a_while(info):
        if info.step == steps // 4:
            fill(disk, leave)
        if info.step == steps // 2:
            checkpoints = Checkpointer(disk / "a" / "checkpoints")
            whole_checkpoints.extend(
                step for step in checkpoints.steps() if read_record(checkpoints.folder / str(step))
            )
            (disk / "ballast").unlink()

    (disk / "a").mkdir()
    found, said, error = run(name, disk / "a", steps, [(1, full_for_a_while)], disk)
    report = {"different_after_a_while": different(found, expected)}
    report |= {"ended_by": None if error is None else repr(error)[:300], "checkpoints_while_full": whole_checkpoints}
    report["failed_saves_said"] = sum("could not be written" in message for message in said)
    report["said"] = sorted({" ".join(message.split())[:260] for message in said})
    named = [message for message in said if str(disk) in message]
    report["messages_name_need_and_free"] = any("It needs up to" in message for message in named)
    shutil.rmtree(disk / "a")
    # Full until the end, then freed.
    (disk / "b").mkdir()
    _, _, error = run(
        name, disk / "b", steps, [(1, lambda info: fill(disk, 0) if info.step == steps // 2 else None)], disk
    )
    report["full_until_the_end"] = None if error is None else repr(error)[:300]
    found, _, again = run(name, disk / "b", steps, (), disk)
    report["different_after_resume"] = different(found, expected)
    shutil.rmtree(disk / "b")
    wrong = report["different_after_a_while"] or report["different_after_resume"] or report["ended_by"] or again
    return report | {"right": not wrong and bool(whole_checkpoints) and report["messages_name_need_and_free"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", default="tdmpc2-online,dreamerv3-online", help="also toy-online")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--megabytes", type=int, default=48)
    parser.add_argument("--leave", type=int, default=20_000, help="bytes that stay free on the full disk")
    options = parser.parse_args()
    logging.getLogger("worldloom").propagate = False
    report = {}
    for name in options.runs.split(","):
        with small_disk(options.megabytes) as disk:
            if disk is None:
                print(json.dumps({"skipped": "no tmpfs can be mounted here (that needs root)"}))
                return
            report[name] = examine(name, disk, options.steps, options.leave)
    report["right"] = all(entry["right"] for entry in report.values())
    print(json.dumps(report, indent=1))
    raise SystemExit(0 if report["right"] else 1)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(__file__))
    main()
