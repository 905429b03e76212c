"""What do saving replay to disk and resuming from it cost? Prints JSON; ``python benchmarks/replay_store.py --help``.

Adds rows of 64×64×3 images and saves the buffer every ``--every`` rows. With ``--latents N`` each row also has N
latents, all of which are overwritten before the next save, as training does. Another process then resumes.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import worldloom
from worldloom.replay import ReplayBuffer, ReplayStore

EPISODE = 1000
"""Rows of an episode."""


def memory_mib():
    """Private memory of this process now, and its peak resident memory (memory-mapped files included)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    fields = {"private_mib": "RssAnon", "peak_resident_mib": "VmHWM"}
    return {name: int(status[field].split()[0]) // 1024 for name, field in fields.items()}


def seconds(call):
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def save(folder, rows, every, latents):
    """Fill a buffer, saving it periodically; returns the times of each save."""
    rng, store = np.random.default_rng(0), ReplayStore(folder)
    buffer = ReplayBuffer(rows, latents={"latent": (latents,)} if latents else None)
    obs, actions = rng.integers(0, 256, (EPISODE, 64, 64, 3), dtype=np.uint8), rng.uniform(-1, 1, (EPISODE - 1, 6))
    saves = []
    for start in range(0, rows, EPISODE):
        obs[:, 0, 0, 0] = start // EPISODE % 256
        ids = buffer.add_episode(obs, actions, rng.normal(size=EPISODE - 1), terminated=True)
        if (start + EPISODE) % every:
            continue
        if latents:
            for first in range(0, int(ids[-1]) + 1, EPISODE):
                buffer.write_latents(np.arange(first, first + EPISODE), {"latent": rng.random((EPISODE, latents))})
        pending, stopped = seconds(lambda: store.snapshot(buffer))
        before = sum(path.stat().st_size for path in Path(folder).glob("*.chunk"))
        reference, writing = seconds(pending.write)
        written = sum(path.stat().st_size for path in Path(folder).glob("*.chunk")) - before
        store.collect([reference])
        saves.append({"snapshot_ms": 1e3 * stopped, "write_s": writing, "written_mib": written / 2**20})
    return reference, saves


def resume(folder, latents):
    """Load, then sample batches and continue adding."""
    reference, before = json.loads((folder / "reference.json").read_text()), memory_mib()
    buffer, loading = seconds(lambda: ReplayStore(folder).load(reference))
    after = memory_mib()

    def draw(update):
        batch = buffer.sample(16, 64, update=update, latents=bool(latents))
        number = (batch["row_ids"] // EPISODE % 256).astype(np.uint8)
        np.testing.assert_array_equal(batch["obs"][..., 0, 0, 0], number)

    times = np.array([seconds(lambda u=update: draw(u))[1] for update in range(300)]) * 1e3
    return {
        "load_s": loading,
        "before": before,
        "loaded": after,
        "after_300_batches": memory_mib(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "batch_median_ms": float(np.median(times[100:])),
        "batch_p95_ms": float(np.percentile(times[100:], 95)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--every", type=int, default=10_000, help="rows between saves")
    parser.add_argument("--latents", type=int, default=0, help="latents per row")
    parser.add_argument("--folder", help="folder to write to; temporary by default")
    parser.add_argument("--resume", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.resume:
        print(json.dumps(resume(Path(arguments.resume), arguments.latents)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        reference, saves = save(name, arguments.rows, arguments.every, arguments.latents)
        (Path(name) / "reference.json").write_text(json.dumps(reference))
        child = subprocess.run(
            [sys.executable, __file__, "--resume", name, "--latents", str(arguments.latents)],
            check=True,
            stdout=subprocess.PIPE,
        )
        report = {
            "rows": arguments.rows,
            "latents": arguments.latents,
            "disk_mib": sum(path.stat().st_size for path in Path(name).glob("*.chunk")) / 2**20,
            "files": len(list(Path(name).glob("*.chunk"))),
            "saves": len(saves),
            "last_save": saves[-1],
            "longest_snapshot_ms": max(entry["snapshot_ms"] for entry in saves),
            "write_mib_per_s": sum(s["written_mib"] for s in saves) / sum(s["write_s"] for s in saves),
            "saving": memory_mib(),
            "resumed": json.loads(child.stdout),
            "worldloom": worldloom.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        }
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
