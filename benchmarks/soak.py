"""Does the memory of a long run grow? Prints JSON; ``python benchmarks/soak.py --updates 100000``.

Trains a tiny model online with all callbacks: log, TensorBoard, evaluation, early stopping, checkpoints with replay.
Resident memory and file handles are sampled at every hundredth of the run. After the first tenth, memory must not
grow by 1 % until the end (least squares), and handles not at all; otherwise the exit code is 1.
"""

import argparse
import gc
import json
import os
import platform
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np


def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Watch:
    """Samples memory, file handles, threads and disk usage during the run."""

    def __init__(self, folder):
        self.folder, self.notes = folder, []

    def __call__(self, info):
        gc.collect()
        self.notes.append(
            {
                "step": info.step,
                "resident_mib": resident_mib(),
                "handles": len(os.listdir("/proc/self/fd")),
                "threads": threading.active_count(),
                "replay_files": len(list((self.folder / "checkpoints" / "replay").glob("*.chunk"))),
            }
        )


def grown(notes):
    """Growth of memory over the samples relative to its level, by least squares."""
    steps = np.array([note["step"] for note in notes], float)
    memory = np.array([note["resident_mib"] for note in notes])
    slope, level = np.polyfit((steps - steps[0]) / (steps[-1] - steps[0]), memory, 1)
    return slope / level


def main():
    from runs import RUNS, small_run

    from worldloom.training.callbacks import LoggingCallback

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=100_000)
    parser.add_argument("--run", default="toy-online", help=f"toy-online, {', '.join(RUNS)}")
    parser.add_argument("--save-every", type=int, help="default: a hundredth of the run")
    options = parser.parse_args()
    every = max(1, options.updates // 100)
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(Path(folder))
        events = LoggingCallback(f"{folder}/events", log_to_console=False, log_to_tensorboard=True)
        trainer, source = small_run(
            options.run,
            Path(folder),
            steps=options.updates,
            save_every=options.save_every or every,
            callbacks=[(every, watch), events],
        )
        start = time.perf_counter()
        trainer.train(source)
        seconds = time.perf_counter() - start
    warm = [note for note in watch.notes if note["step"] >= options.updates // 10]
    growth = grown(warm)
    handles = [note["handles"] for note in warm]
    # Background threads start and end between samples; a leak shows in every sample of the second half.
    half = len(handles) // 2
    leaks = min(handles[half:]) > max(handles[:half])
    print(
        json.dumps(
            {
                "run": options.run,
                "updates": trainer.step,
                "seconds": round(seconds, 1),
                "memory_growth_percent": round(100 * growth, 3),
                "resident_mib": [round(warm[0]["resident_mib"], 1), round(warm[-1]["resident_mib"], 1)],
                "handles": [min(handles), max(handles)],
                "threads": [min(note["threads"] for note in warm), max(note["threads"] for note in warm)],
                "replay_files": [min(n["replay_files"] for n in warm), max(n["replay_files"] for n in warm)],
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            },
            indent=1,
        )
    )
    sys.exit(1 if growth > 0.01 or leaks else 0)


if __name__ == "__main__":
    main()
