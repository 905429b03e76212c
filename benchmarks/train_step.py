"""What does the training loop cost beside the updates? Prints JSON; ``python benchmarks/train_step.py --help``.

Times, by turns, an update on a batch that lies on the device, the same within ``Trainer`` from a host buffer without
callbacks, and with a progress bar, JSON lines and TensorBoard events at their default intervals. The aims are 0.95 of
the bare speed from the buffer, and at most 1 % for the callbacks.
"""

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time

import jax
import numpy as np
from work import kept_or_returned, update_call

import worldloom
from worldloom import create_world_model
from worldloom.devices import keep_freed_memory
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer, TrainingConfig
from worldloom.training.callbacks import LoggingCallback, ProgressCallback

SIDES = ("update", "trainer", "trainer, callbacks")
ACTIONS = 6


def episodes(obs_shape, action_dim, rows=2_000, length=200):
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(rows + length)
    while len(buffer) < rows:
        shape = (length + 1, *obs_shape)
        obs = rng.integers(0, 256, shape, np.uint8) if len(obs_shape) == 3 else rng.normal(size=shape)
        buffer.add_episode(obs, rng.uniform(-1, 1, (length, action_dim)), rng.normal(size=length))
    return buffer


def serve(pipe, side, name, obs_shape, batch_size, length, kept):
    """One of the three in a process of its own: answers a number of updates with seconds."""
    if kept:
        keep_freed_memory()
    shapes = {"obs_shape": obs_shape, "action_dim": ACTIONS}
    overrides = {"replay_context": False} if name.startswith("dreamer") else {}
    if side == "update":
        one, model, _ = update_call(name, **shapes, batch_size=batch_size, length=length, **overrides)

        def call(updates):
            for _ in range(updates):
                one()
    else:
        config = TrainingConfig(total_steps=10**9, batch_size=batch_size, sequence_length=length, device="auto")
        folder = tempfile.TemporaryDirectory()
        watched = [ProgressCallback(), LoggingCallback(folder.name, log_to_tensorboard=True)]
        model = create_world_model(name, **shapes, **overrides)
        trainer = Trainer(model, config, watched if side == "trainer, callbacks" else [])
        buffer = episodes(obs_shape, ACTIONS)

        def call(updates):
            trainer.train(buffer, total_steps=trainer.step + updates)

    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        call(2)  # Compiles.
        pipe.send(model.num_parameters())
        while updates := pipe.recv():
            start = time.perf_counter(), time.process_time()
            call(updates)
            pipe.send(((time.perf_counter() - start[0]) / updates, (time.process_time() - start[1]) / updates))


def compare(name, obs_shape, batch_size, length, updates, rounds, kept):
    """Milliseconds per update of the three, each the median over rounds, and the ratios of paired rounds.

    They take turns, each in its own process: where a program's memory lies moves its time by some percent.
    """
    context, pipes = multiprocessing.get_context("spawn"), {}
    times, work = {side: [] for side in SIDES}, {side: [] for side in SIDES}
    for side in SIDES:
        pipes[side], theirs = context.Pipe()
        arguments = theirs, side, name, obs_shape, batch_size, length, kept
        context.Process(target=serve, args=arguments, daemon=True).start()
        parameters = pipes[side].recv()
    for _ in range(rounds):
        for side, pipe in pipes.items():
            pipe.send(updates)
            seconds, of_cores = pipe.recv()
            times[side].append(seconds)
            work[side].append(of_cores)
    for pipe in pipes.values():
        pipe.send(0)
    paired = lambda of, a, b: statistics.median(x / y for x, y in zip(of[a], of[b], strict=True))  # noqa: E731
    return {
        "batch": [batch_size, length],
        "parameters": parameters,
        "ms per update": {side: round(1e3 * statistics.median(values), 3) for side, values in times.items()},
        "spread": {side: round(max(values) / min(values), 2) for side, values in times.items()},
        "speed from the buffer": round(paired(times, "update", "trainer"), 3),
        "cost of callbacks": round(paired(times, "trainer, callbacks", "trainer") - 1, 4),
        # What the cores did, all threads together: other processes disturb it less than the time.
        "ms of cores per update": {side: round(1e3 * statistics.median(values), 3) for side, values in work.items()},
        "work of an update over work from the buffer": round(paired(work, "update", "trainer"), 3),
        "work for callbacks": round(paired(work, "trainer, callbacks", "trainer") - 1, 4),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=200, help="updates per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=["tdmpc2:tiny", "dreamerv3:tiny"], help="presets")
    parser.add_argument("--images", action="store_true", help="64×64×3 observations instead of 24 numbers")
    kept_or_returned(parser)
    options = parser.parse_args()
    cases = {}
    for name in options.models:
        batch_size, length = (32, 16) if name.startswith("tdmpc2") else (16, 32)
        obs_shape = (64, 64, 3) if options.images else (24,)
        work = obs_shape, batch_size, length, options.updates, options.rounds
        cases[name] = compare(name, *work, kept=not options.returned)
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
