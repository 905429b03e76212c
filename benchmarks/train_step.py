"""What does the training loop cost beside the updates? Prints JSON; ``python benchmarks/train_step.py --help``.

Times, by turns, an update on a batch that lies on the device, the same within ``Trainer`` from a host buffer without
callbacks, and with a progress bar, JSON lines and TensorBoard events at their default intervals. The aims are 0.95 of
the bare speed from the buffer, and at most 1 % for the callbacks.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time

import jax
import numpy as np
from work import update_call

import worldloom
from worldloom import create_world_model
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer, TrainingConfig
from worldloom.training.callbacks import LoggingCallback, ProgressCallback


def episodes(obs_shape, action_dim, rows=2_000, length=200):
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(rows + length)
    while len(buffer) < rows:
        shape = (length + 1, *obs_shape)
        obs = rng.integers(0, 256, shape, np.uint8) if len(obs_shape) == 3 else rng.normal(size=shape)
        buffer.add_episode(obs, rng.uniform(-1, 1, (length, action_dim)), rng.normal(size=length))
    return buffer


def going_on(trainer, buffer):
    """``call(n)`` trains ``n`` updates more."""
    return lambda updates: trainer.train(buffer, total_steps=trainer.step + updates)


def bare(one):
    def call(updates):
        for _ in range(updates):
            one()

    return call


def compare(name, obs_shape, action_dim, batch_size, length, updates, rounds, folder):
    """Milliseconds per update of the three, each the median over rounds, and the ratios of paired rounds."""
    shapes = {"obs_shape": obs_shape, "action_dim": action_dim}
    overrides = {"replay_context": False} if name.startswith("dreamer") else {}
    one, model, _ = update_call(name, **shapes, batch_size=batch_size, length=length, **overrides)
    config = TrainingConfig(total_steps=10**9, batch_size=batch_size, sequence_length=length, device="auto")
    buffer = episodes(obs_shape, action_dim)
    watched = [ProgressCallback(), LoggingCallback(folder, log_to_tensorboard=True)]
    calls = {"update": bare(one)}
    for label, callbacks in {"trainer": [], "trainer, callbacks": watched}.items():
        calls[label] = going_on(Trainer(create_world_model(name, **shapes, **overrides), config, callbacks), buffer)
    times = {label: [] for label in calls}
    for number in range(rounds + 1):
        for label, call in calls.items():
            start = time.perf_counter()
            call(updates if number else 5)
            if number:  # The first round compiles.
                times[label].append((time.perf_counter() - start) / updates)
    paired = lambda a, b: statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))  # noqa: E731
    return {
        "batch": [batch_size, length],
        "parameters": model.num_parameters(),
        "ms per update": {label: round(1e3 * statistics.median(values), 3) for label, values in times.items()},
        "spread": {label: round(max(values) / min(values), 2) for label, values in times.items()},
        "speed from the buffer": round(paired("update", "trainer"), 3),
        "cost of callbacks": round(paired("trainer, callbacks", "trainer") - 1, 4),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=200, help="updates per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=["tdmpc2:tiny", "dreamerv3:tiny"], help="presets")
    parser.add_argument("--images", action="store_true", help="64×64×3 observations instead of 24 numbers")
    options = parser.parse_args()
    cases = {}
    for name in options.models:
        batch_size, length = (32, 16) if name.startswith("tdmpc2") else (16, 32)
        obs_shape = (64, 64, 3) if options.images else (24,)
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            cases[name] = compare(name, obs_shape, 6, batch_size, length, options.updates, options.rounds, folder)
    report = {
        "benchmark": "train_step",
        "cases": cases,
        "updates": options.updates,
        "rounds": options.rounds,
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
        "versions": {"worldloom": worldloom.__version__, "jax": jax.__version__, "python": platform.python_version()}
        | {"orbax-checkpoint": importlib.metadata.version("orbax-checkpoint")},
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
