"""What do the checks of environments' answers cost? Prints JSON; ``python benchmarks/env_checks.py --help``.

One turn steps the same environments with the checks and without them, in CPU time of this process; the ratio is of the
medians over all turns. Without them, observations are converted and numbers cast as if all answers were as declared.
"""

import argparse
import json
import os
import platform
import time

import numpy as np

from worldloom.envs import make_env
from worldloom.envs.backends import single as checked
from worldloom.envs.backends.base import StepResult


def unchecked_step(self, action):
    """``SingleEnv.step`` without the checks."""
    obs, reward, terminated, truncated, _ = self.env.step(action)
    flat = {
        leaf.name: np.array(obs, leaf.dtype).reshape(leaf.shape)  # one leaf: the whole observation
        for leaf in self._observations._leaves
    }
    return StepResult(flat, float(reward), bool(terminated or truncated), bool(terminated))


def cpu_seconds(env, actions):
    """CPU time of a step of all environments, mean over ``actions``."""
    start = time.process_time()
    for action in actions:
        env.step(action)
    return (time.process_time() - start) / len(actions)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="CartPole-v1", help="an environment whose observation is one vector or image")
    parser.add_argument("--num-envs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200, help="steps of all environments in a turn")
    parser.add_argument("--turns", type=int, default=200)
    args = parser.parse_args()
    env = make_env(args.env, args.num_envs)
    env.reset()
    rng = np.random.default_rng(0)
    steps = {"with": checked.SingleEnv.step, "without": unchecked_step}
    times = {name: [] for name in steps}
    for turn in range(args.turns + 1):
        actions = [env.sample_actions(rng) for _ in range(args.steps)]
        for name in list(steps) if turn % 2 else reversed(list(steps)):
            checked.SingleEnv.step = steps[name]
            spent = cpu_seconds(env, actions)
            if turn:  # The first turn warms up.
                times[name].append(spent)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    ratios = np.array(times["with"]) / np.array(times["without"])
    result = {
        "env": args.env,
        "num_envs": args.num_envs,
        "us_per_step_with": 1e6 * medians["with"],
        "us_per_step_without": 1e6 * medians["without"],
        "ratio": medians["with"] / medians["without"],
        "ratio_of_turns": {f"p{p}": float(np.percentile(ratios, p)) for p in (5, 50, 95)},
        "turns": args.turns,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
