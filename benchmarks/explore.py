"""Does the intrinsic reward find what random actions do not? Prints JSON; ``python benchmarks/explore.py``.

The world is a combination lock: in each of ``--cells`` places one of two actions leads on, at a small cost, and the
other back to the first. Only the end pays. Random actions open it once in 2^cells attempts, so an agent without
intrinsic reward learns to save the cost. Each seed is trained with and without ``explore="disagreement"``; reported
are the steps at which the lock was first opened, how often that was while collecting, and the greedy return at the end.
"""

import argparse
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from worldloom import create_world_model
from worldloom.envs import make_env
from worldloom.training import Callback, Trainer, TrainingConfig, play, recipe


class Lock:
    """A combination lock of ``cells`` places; the combination is a function of ``seed``."""

    action_dim, action_type = 2, "discrete"

    def __init__(self, cells: int, seed: int):
        self.cells, self.obs_shape, self.time_limit = cells, (cells + 1,), 2 * cells
        self.combination = jnp.asarray(np.random.default_rng(seed).integers(0, 2, cells))

    def reset(self, key):
        return jnp.zeros((), jnp.int32), jax.nn.one_hot(0, self.cells + 1)

    def step(self, key, state, action):
        right = action == self.combination[jnp.minimum(state, self.cells - 1)]
        state = jnp.where(right, state + 1, 0)
        opened = state == self.cells
        reward = jnp.where(opened, 1.0, jnp.where(right, -0.01, 0.0))
        info = {"opened": opened}
        return state, jax.nn.one_hot(state, self.cells + 1), reward, opened, jnp.asarray(False), info


class Openings(Callback):
    """Notes the environment steps at which the lock was opened."""

    order = -2  # before the list of episodes is cleared

    def __init__(self):
        self.steps = []

    def on_step(self, info):
        self.steps += [record.env_steps for record in info.episodes() if record.end.terminated]

    def on_train_end(self, info):
        self.on_step(info)


def train(options, seed, explore):
    """One run; what it found."""
    start = time.perf_counter()
    env = make_env(Lock(options.cells, seed), num_envs=4, seed=seed)
    changes = {"explore": "disagreement", "explore_updates": options.updates} if explore else {}
    model_fields, training, _ = recipe(options.model, env)
    training |= {"eval_interval": 0, "env_steps": options.steps, "seed": seed, "device": "cpu", "loop": options.loop}
    model = create_world_model(options.model, seed=seed, device="cpu", **model_fields | changes)
    openings = Openings()
    Trainer(model, TrainingConfig(**training), [openings]).train(env)
    with make_env(Lock(options.cells, seed), num_envs=1, seed=99) as one:
        (end,) = play(model, one, episodes=1, seed=99, greedy=True)
    env.close()
    late = [step for step in openings.steps if step > options.steps / 2]
    found = {
        "seed": seed,
        "explore": explore,
        "first_opened": next(iter(openings.steps), None),
        "openings": len(openings.steps),
        "in_the_second_half": len(late),
        "greedy_return": round(end.episode_return, 2),
        "seconds": round(time.perf_counter() - start),
    }
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="dreamerv3:tiny")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", type=int, default=14)
    parser.add_argument("--steps", type=int, default=12_000, help="environment steps")
    parser.add_argument("--updates", type=int, default=2_000, help="after which the intrinsic reward has fallen to 0")
    parser.add_argument("--loop", default="auto", help="see TrainingConfig.loop")
    options = parser.parse_args()
    runs = [train(options, seed, explore) for seed in options.seeds for explore in (False, True)]
    best = 1 - 0.01 * (options.cells - 1)
    print(json.dumps({**vars(options), "best_return": round(best, 2), "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
