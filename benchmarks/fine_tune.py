"""A Pendulum of another mass and length: learned from scratch, and from the weights of the usual one, by seed.

    python benchmarks/fine_tune.py --seeds 0 1 2 --out runs/fine_tune.json

Prints JSON, which ``--out`` has after every seed: mean returns by environment steps.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np

from worldloom import create_world_model
from worldloom.envs import make_env
from worldloom.training import Trainer, TrainingConfig, play, recipe

MODEL = "tdmpc2:tiny"


def usual():
    return gymnasium.make("Pendulum-v1")


def changed():
    env = gymnasium.make("Pendulum-v1")
    env.unwrapped.m, env.unwrapped.l = 1.3, 1.15
    return env


def train(env_fn, seed: int, env_steps: list[int], episodes: int, **model_fields) -> tuple[Trainer, list[float]]:
    measured = []
    with make_env(env_fn, seed=seed) as env:
        fields, training, _ = recipe(MODEL, env)
        fields = {**fields, "episodic": False, **model_fields}
        settings = {
            **training,
            "prefill": 400,
            "prefill_updates": 400,
            "eval_interval": 0,
            "device": "cpu",
            "seed": seed,
        }
        if "init_from" in model_fields:
            settings |= {"prefill_policy": "initial"}
        model = create_world_model(MODEL, seed=seed, device="cpu", **fields)
        trainer = Trainer(model, TrainingConfig(**settings, env_steps=env_steps[0]), [])
        for steps in env_steps:
            trainer.config = trainer.config.replace(env_steps=steps)
            trainer.train(env)
            with make_env(env_fn, episodes, seed=77) as other:
                ends = play(trainer.model, other, episodes=episodes, seed=77)
            measured.append(float(np.mean([end.episode_return for end in ends])))
            mean = round(measured[-1], 1)
            print(time.strftime("%H:%M:%S"), seed, env_fn.__name__, steps, mean, flush=True, file=sys.stderr)
    return trainer, measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--first-steps", type=int, default=4000)
    parser.add_argument("--env-steps", type=int, nargs="+", default=[800, 1500])
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/fine_tune.json"))
    args = parser.parse_args()
    found = []
    for seed in args.seeds:
        first, before = train(usual, 500 + seed, [args.first_steps], args.episodes)
        _, scratch = train(changed, seed, args.env_steps, args.episodes)
        _, tuned = train(changed, seed, args.env_steps, args.episodes, init_from=first.model)
        found.append({"seed": seed, "first": before, "env_steps": args.env_steps, "scratch": scratch, "tuned": tuned})
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1))
    for number, steps in enumerate(args.env_steps):
        for kind in ("scratch", "tuned"):
            means = [each[kind][number] for each in found]
            by_seed = np.round(means, 1).tolist()
            print(f"{kind:8} {steps:6} steps: {np.mean(means):8.1f}  by seed {by_seed}", file=sys.stderr)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
