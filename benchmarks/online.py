"""Does the environment step while the device trains? Prints JSON; ``python benchmarks/online.py --help``.

Trains online, one update per decision step, in an environment whose step waits some milliseconds without computing,
like an environment in another process. A decision step is timed with and without the wait. ``exposed`` is the added
time as a fraction of the wait: 0 if the wait overlaps the update entirely, 1 if nothing overlaps. A wait longer than
the update cannot overlap entirely: ``possible`` is the smallest possible value of ``exposed``.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import time

import gymnasium as gym
import jax
import numpy as np

import worldloom
from worldloom import create_world_model
from worldloom.envs import make_env
from worldloom.training import Trainer, TrainingConfig

DIMENSIONS, ACTIONS = 24, 6


class Waiting(gym.Env):
    """Random observations; each step waits ``seconds``."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (DIMENSIONS,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (ACTIONS,), np.float32)

    def __init__(self, seconds):
        self.seconds = seconds

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._look(), {}

    def step(self, action):
        time.sleep(self.seconds)
        return self._look(), 0.0, False, False, {}

    def _look(self):
        return self.np_random.normal(size=DIMENSIONS).astype(np.float32)


def decision_seconds(name, waits, steps, rounds, batch_size, length):
    """Seconds of a decision step with its update: a list over rounds for each wait, timed alternately."""
    trainers = {}
    for wait in waits:
        env = make_env(functools.partial(Waiting, wait))
        shapes = {"obs_shape": env.obs_shape, "action_dim": env.action_dim}
        prefill = 2 * batch_size + length
        config = TrainingConfig(batch_size=batch_size, sequence_length=length, prefill=prefill, device="auto")
        trainers[wait] = Trainer(create_world_model(name, **shapes), config, []), env
    times = {wait: [] for wait in waits}
    for number in range(rounds + 1):
        for wait, (trainer, env) in trainers.items():
            start = time.perf_counter()
            trainer.train(env, total_steps=trainer.step + steps)
            if number:  # the first round fills replay and compiles
                times[wait].append((time.perf_counter() - start) / steps)
    return times


def measure(name, wait, steps, rounds, batch_size, length):
    times = decision_seconds(name, (0.0, wait), steps, rounds, batch_size, length)
    without, waited = (statistics.median(times[key]) for key in (0.0, wait))
    exposed = [(b - a) / wait for a, b in zip(times[0.0], times[wait], strict=True)]
    return {
        "batch": [batch_size, length],
        "ms per decision step without wait": round(1e3 * without, 2),
        "ms with wait": round(1e3 * waited, 2),
        "wait, ms": 1e3 * wait,
        "exposed": round(statistics.median(exposed), 3),
        "exposed, range": [round(min(exposed), 3), round(max(exposed), 3)],
        "possible": round(max(0.0, wait - without) / wait, 3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tdmpc2:tiny", "dreamerv3:tiny"], help="presets")
    parser.add_argument("--wait", type=float, default=5.0, help="milliseconds that each environment step waits")
    parser.add_argument("--steps", type=int, default=50, help="decision steps per round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    cases = {}
    for name in options.models:
        shape = (256, 4) if name.startswith("tdmpc2") else (16, 32)
        cases[name] = measure(name, options.wait / 1e3, options.steps, options.rounds, *shape)
    report = {
        "benchmark": "online",
        "cases": cases,
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
        "versions": {"worldloom": worldloom.__version__, "jax": jax.__version__, "python": platform.python_version()},
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
