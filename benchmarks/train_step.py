"""What does the training loop cost in addition to the updates? Prints JSON; ``python benchmarks/train_step.py --help``.

Times alternately an update on a fixed batch on the device, updates by ``Trainer`` from a host buffer without
callbacks, and the same with a progress bar, JSON lines and TensorBoard events. These are written every 1,000 updates by
default, and here once in a round if that is shorter, so that no round is without them. The goals are 0.95 of the bare
speed from the buffer, and at most 1 % of the time in callbacks.
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
from work import kept_or_returned, update_call

import worldloom
from worldloom import create_world_model
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


def timed(callback, spent):
    """Make the hooks of a callback append their CPU seconds in this thread, without waiting for values, to the list."""
    inside = []

    def watch(hook):
        def call(*args):
            if inside:  # ``on_train_end`` may call ``on_step``, whose time is part of its own
                return hook(*args)
            inside.append(hook)
            start = time.thread_time()
            try:
                return hook(*args)
            finally:
                spent.append(time.thread_time() - start)
                inside.pop()

        return call

    for name in ("on_train_begin", "on_step", "on_eval", "on_train_end"):
        setattr(callback, name, watch(getattr(callback, name)))
    return callback


def sides(name, obs_shape, batch_size, length, folder, spent, log_interval):
    """Functions by name that do a number of updates, and the number of parameters."""
    shapes = {"obs_shape": obs_shape, "action_dim": ACTIONS}
    overrides = {"replay_context": False} if name.startswith("dreamer") else {}
    if name.startswith("tdmpc2") and len(obs_shape) == 3:
        overrides["latent_dim"] = 512  # the output size of its image encoder
    one, model, _ = update_call(name, **shapes, batch_size=batch_size, length=length, **overrides)
    buffer = episodes(obs_shape, ACTIONS)
    config = TrainingConfig(
        total_steps=10**9, batch_size=batch_size, sequence_length=length, device="auto", log_interval=log_interval
    )

    def bare(updates):
        for _ in range(updates):
            one()

    def trained(callbacks):
        trainer = Trainer(create_world_model(name, **shapes, **overrides), config, callbacks)
        return lambda updates: trainer.train(buffer, total_steps=trainer.step + updates)

    defaults = [ProgressCallback(), LoggingCallback(folder, log_to_tensorboard=True)]
    watched = [timed(callback, spent) for callback in defaults]
    return dict(zip(SIDES, (bare, trained([]), trained(watched)), strict=True)), model.num_parameters()


def compare(name, obs_shape, batch_size, length, updates, rounds):
    """Milliseconds per update of the three, each the median over rounds, and the ratios of paired rounds.

    They take turns in one process, and so in the same temporary memory: where it lies moves a program by some percent,
    more than what is looked for.
    """
    times, work = {side: [] for side in SIDES}, {side: [] for side in SIDES}
    spent = []  # seconds of each callback call
    log_interval = min(updates, TrainingConfig().log_interval)
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as null,
        contextlib.redirect_stdout(null),
        contextlib.redirect_stderr(null),
    ):
        calls, parameters = sides(name, obs_shape, batch_size, length, folder, spent, log_interval)
        for call in calls.values():
            call(updates)  # compiles; as many, so that the last update of every round is one that is logged
        spent.clear()
        for _ in range(rounds):
            for side, call in calls.items():
                start = time.perf_counter(), time.process_time()
                call(updates)
                times[side].append((time.perf_counter() - start[0]) / updates)
                work[side].append((time.process_time() - start[1]) / updates)

    def paired(of, a, b):
        ratios = [x / y for x, y in zip(of[a], of[b], strict=True)]
        return dict(zip(("median", "min", "max"), (statistics.median(ratios), min(ratios), max(ratios)), strict=True))

    return {
        "batch": [batch_size, length],
        "parameters": parameters,
        "log interval": log_interval,
        "ms per update": {side: round(1e3 * statistics.median(values), 3) for side, values in times.items()},
        "spread": {side: round(max(values) / min(values), 2) for side, values in times.items()},
        "speed from the buffer": paired(times, "update", "trainer"),
        "time with callbacks": paired(times, "trainer, callbacks", "trainer"),
        "share of the time in callbacks": sum(spent) / (updates * sum(times["trainer, callbacks"])),
        # CPU time of all threads: less affected by other processes than wall time.
        "ms of cores per update": {side: round(1e3 * statistics.median(values), 3) for side, values in work.items()},
        "work of an update over work from the buffer": paired(work, "update", "trainer"),
        "work with callbacks": paired(work, "trainer, callbacks", "trainer"),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=200, help="updates per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=["tdmpc2:tiny", "dreamerv3:tiny"], help="presets")
    parser.add_argument("--images", action="store_true", help="64×64×3 observations instead of 24-dimensional vectors")
    kept_or_returned(parser)
    options = parser.parse_args()
    cases = {}
    for name in options.models:
        batch_size, length = (32, 16) if name.startswith("tdmpc2") else (16, 32)
        obs_shape = (64, 64, 3) if options.images else (24,)
        work = obs_shape, batch_size, length, options.updates, options.rounds
        cases[name] = compare(name, *work)
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
