"""How long does sampling one batch from host replay take? Prints JSON; ``python benchmarks/replay.py --help``.

The goal is 16 sequences of 64 rows of 64×64×3 images in under 10 ms (case ``image, one stream``).
"""

import argparse
import json
import os
import platform
import time

import numpy as np

import worldloom
from worldloom.replay import ReplayBuffer


def image_episodes(rows):
    """Episodes of 1,001 rows, added one by one."""
    rng, buffer = np.random.default_rng(0), ReplayBuffer(rows)
    obs = rng.integers(0, 256, (1001, 64, 64, 3), dtype=np.uint8)
    while len(buffer) < rows:
        buffer.add_episode(obs, rng.uniform(-1, 1, (1000, 6)), rng.normal(size=1000), terminated=True)
    return buffer


def image_environments(rows, environments=16):
    """The same number of rows from parallel environments, with stored latents."""
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(rows, latents={"deter": (512,), "stoch": (32, 4)})
    obs = rng.integers(0, 256, (environments, 64, 64, 3), dtype=np.uint8)
    none = np.zeros(environments, bool)
    for step in range(rows // environments):
        first, last = (np.full(environments, step % 1000 == n) for n in (0, 999))
        buffer.add_rows(obs, np.zeros((environments, 6)), np.zeros(environments), first, last, none)
    return buffer


def vector_episodes(rows):
    """Episodes of 501 rows of 24 numbers."""
    rng, buffer = np.random.default_rng(0), ReplayBuffer(rows)
    obs = rng.normal(size=(501, 24))
    while len(buffer) < rows:
        buffer.add_episode(obs, rng.uniform(-1, 1, (500, 6)), np.zeros(500))
    return buffer


def measure(call, repeats):
    """Milliseconds per call: median, 5th and 95th percentile."""
    times = []
    for n in range(repeats + 5):
        start = time.perf_counter()
        call(n)
        times.append(1e3 * (time.perf_counter() - start))
    low, median, high = np.percentile(times[5:], [5, 50, 95])
    return {"median_ms": round(median, 3), "p5_ms": round(low, 3), "p95_ms": round(high, 3)}


def sampling(buffer, batch_size, sequence_length, repeats, **kwargs):
    def call(update):
        return buffer.sample(batch_size, sequence_length, update=update, **kwargs)

    size = sum(array.nbytes for array in call(0).values() if isinstance(array, np.ndarray))
    facts = {"batch": [batch_size, sequence_length], "batch_mb": round(size / 1e6, 2), "rows": len(buffer)}
    return measure(call, repeats) | facts


def collecting(buffer, repeats):
    """What online training does in addition to sampling: write latents back, add one row per environment."""
    ids = buffer.draw(16, 64, cross_episodes=True)
    fresh = {"deter": np.zeros((16, 64, 512), np.float32), "stoch": np.zeros((16, 64, 32, 4), np.float32)}
    obs, actions, rewards, none = (
        np.zeros((16, 64, 64, 3), np.uint8),
        np.zeros((16, 6)),
        np.zeros(16),
        np.zeros(16, bool),
    )
    buffer.add_rows(obs, actions, rewards, ~none, none, none)
    return {
        "write 16x64 latents": measure(lambda _: buffer.write_latents(ids, fresh), repeats),
        "add a row of 16 environments": measure(
            lambda _: buffer.add_rows(obs, actions, rewards, none, none, none), repeats
        ),
    }


def images(rows, repeats):
    buffer = image_episodes(rows)
    return {
        "image, one stream": sampling(buffer, 16, 64, repeats),
        "image, one stream, crossing": sampling(buffer, 16, 65, repeats, cross_episodes=True),
    }


def environments(rows, repeats):
    buffer = image_environments(rows)
    case = sampling(buffer, 16, 65, repeats, cross_episodes=True, latents=True)
    return {"image, 16 environments, crossing, latents": case} | collecting(buffer, repeats)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows", type=int, default=20_000, help="image rows in the buffer (12 kB each); ten times as many vector rows"
    )
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    cases = images(options.rows, options.repeats) | environments(options.rows, options.repeats)
    cases["vector, 256x4"] = sampling(vector_episodes(10 * options.rows), 256, 4, options.repeats)
    report = {
        "benchmark": "replay",
        "cases": cases,
        "repeats": options.repeats,
        "versions": {
            "worldloom": worldloom.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
