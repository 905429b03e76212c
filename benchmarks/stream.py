"""Batches per second from a large folder of mt30-like files that is streamed, against a buffer in memory.

    python benchmarks/stream.py --gb 3 --batches 200

The files are sparse: what is measured is everything but the disk itself. The buffer holds as many rows of the same
kind as fit in ``--buffer-gb``. Both are timed in turns, by processor time of this process, and memory is this
process's resident set. Prints JSON.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "datasets"))
from dataset_writers import write_sparse_pt

import worldloom.data
from worldloom.replay import ReplayBuffer

ROWS, OBS, ACTION = 501, 24, 6


def resident() -> int:
    """Bytes in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gb", type=float, default=3.0)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--buffer-gb", type=float, default=0.5)
    parser.add_argument("--batches", type=int, default=100, help="batches in each of ten turns")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4, help="rows of a window")
    args = parser.parse_args()
    row_bytes = 4 * (OBS + ACTION + 2)
    episodes = int(args.gb * 1e9 / args.files / row_bytes / ROWS)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:
        for number in range(args.files):
            path = write_sparse_pt(Path(folder) / f"chunk_{number}.pt", episodes, ROWS, OBS, ACTION, 30)
            with path.open("rb") as file:  # The system's cache holds it from now on, as after a first pass.
                while file.read(1 << 24):
                    pass
        buffer = ReplayBuffer()
        rng = np.random.default_rng(0)
        for _ in range(int(args.buffer_gb * 1e9 / row_bytes / ROWS)):
            buffer.add_episode(
                rng.normal(size=(ROWS, OBS)), np.tanh(rng.normal(size=(ROWS - 1, ACTION))), np.zeros(ROWS - 1), task=0
            )
        before = resident()
        dataset = worldloom.data.open(folder)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        opened, largest = resident() - before, 0
        print(
            f"{size / 1e9:.2f} GB in {args.files} files, {len(dataset):,} rows; opened with {opened / 1e6:.0f} MB more",
            file=sys.stderr,
        )
        rows = len(dataset)
        spent = {"buffer": [], "dataset": []}
        for turn in range(10):
            for name, source in (("buffer", buffer), ("dataset", dataset)):
                start = time.process_time()
                for update in range(args.batches):
                    source.sample(args.batch_size, args.rows, seed=turn, update=update)
                spent[name].append(time.process_time() - start)
                largest = max(largest, resident() - before)
    rates = {name: args.batches / float(np.median(each)) for name, each in spent.items()}
    report = {
        "benchmark": "stream",
        "gb": size / 1e9,
        "files": args.files,
        "rows": rows,
        "batch": [args.batch_size, args.rows],
        "opened_mb": opened / 1e6,
        "batches_per_cpu_second": rates,
        "streamed_over_buffer": rates["dataset"] / rates["buffer"],
        "resident_growth_mb": largest / 1e6,
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
