"""TD-MPC2 swings a pendulum up: 10,000 environment steps, minutes on a laptop.

    python examples/train_tdmpc2.py
    python examples/train_tdmpc2.py --env CartPole-v1 --steps 20000
    FAST=1 python examples/train_tdmpc2.py        # smoke test

The command line does the same: worldloom train --model tdmpc2:tiny --env Pendulum-v1 --steps 10000
"""

import argparse
import os
import time

import numpy as np

from worldloom import create_world_model
from worldloom.envs import make_env
from worldloom.training import RunFolder, Trainer, TrainingConfig, play, recipe

FAST = os.environ.get("FAST") == "1"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Pendulum-v1")
    parser.add_argument("--steps", type=int, default=120 if FAST else 5_000, help="environment steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", default=f"runs/train_tdmpc2-{time.strftime('%Y%m%d-%H%M%S')}")
    args = parser.parse_args()

    env = make_env(args.env, seed=args.seed, time_limit=50 if FAST else None)
    # Settings that are known to work: batch size, learning rate, initial random steps, and whether episodes can
    # terminate, which TD-MPC2 must know. They are plain dicts; change what you like.
    model_fields, training_fields, _ = recipe("tdmpc2:tiny", env)
    training_fields |= {"env_steps": args.steps, "seed": args.seed}
    if FAST:
        training_fields |= {"prefill": 100, "prefill_updates": 20, "eval_interval": 30}
        training_fields |= {"batch_size": 8, "train_ratio": 32}

    model = create_world_model("tdmpc2:tiny", **model_fields, seed=args.seed)
    print(f"{model.num_parameters():,} parameters; the run folder is {args.run}")

    run = RunFolder(args.run)
    trainer = Trainer(model, TrainingConfig(**training_fields), run.callbacks(env, episodes=2 if FAST else 10))
    trainer.train(env, resume="auto")  # resumes an interrupted run that is started again with the same --run

    with env.another(2 if FAST else 10, seed=args.seed + 100) as other:
        returns = [end.episode_return for end in play(model, other, episodes=other.num_envs)]
    print(f"Return of {len(returns)} further episodes: {np.mean(returns):.1f} ± {np.std(returns):.1f}")
    env.close()


if __name__ == "__main__":
    main()
