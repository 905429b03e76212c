"""Imagination of DreamerV3: its predictions, how accurate they are, and what it predicts for other actions.

python examples/imagine.py                      # trains a model first
python examples/imagine.py runs/my-run/model    # uses your model of --env
"""

import argparse
import os
from pathlib import Path

import numpy as np

from worldloom import create_world_model
from worldloom.envs import make_env
from worldloom.report.imagination import draw_open_loop
from worldloom.report.openloop import open_loop
from worldloom.report.recording import Recording
from worldloom.training import ReplayBuffer, Trainer, TrainingConfig, play, recipe

FAST = os.environ.get("FAST") == "1"


def learn(env):
    """Train a model for 5,000 environment steps, enough to see poles fall and poles stay up."""
    model_fields, training_fields, _ = recipe("dreamerv3:tiny", env)
    training_fields |= {"env_steps": 5_000}
    if FAST:
        training_fields |= {
            "env_steps": 120,
            "prefill": 100,
            "batch_size": 4,
            "sequence_length": 8,
            "train_ratio": 32.0,
        }
    model = create_world_model("dreamerv3:tiny", **model_fields)
    Trainer(model, TrainingConfig(**training_fields)).train(env)
    return model


def futures(model, obs, steps=15):
    """Two futures from the same state: the cart is always pushed left, or always right."""
    state = model.encode(np.stack([obs, obs]))  # a batch of two equal states
    actions = np.tile([0, 1], (steps, 1))  # [H, B], time-major
    dream = model.imagine(state, actions)
    # The continue head learns 1 − 1 / return_horizon where an episode goes on.
    alive = np.cumprod(np.asarray(dream.continues) / (1 - 1 / model.config.return_horizon), axis=0)
    angles = np.asarray(model.decode(dream.states)["obs"])[1:, :, 2]
    for name, column in (("left", 0), ("right", 1)):
        shown = [f"{angles[t, column]:+.2f} rad ({min(alive[t, column], 1):.0%} alive)" for t in (0, 4, 9, 14)]
        print(f"  always {name:5}: " + ", ".join(shown))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of a saved model")
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--out", type=Path, default=Path("runs/imagine"))
    args = parser.parse_args()

    env = make_env(args.env, seed=1)
    model = create_world_model(args.model) if args.model else learn(env)

    # Episodes that it was not trained on, collected by its own policy with exploration.
    episodes = ReplayBuffer(10_000)
    with env.another(2, seed=2) as other:
        ends = play(model, Recording(other, episodes), episodes=4, seed=3, explore=True)
    print(f"Played {len(ends)} episodes of {[end.length for end in ends]} steps")

    # Observe the first rows of some sequences, imagine the rest with the recorded actions, and compare.
    rows = min(24, int(max(episodes.episode_lengths)))
    report = open_loop(model, episodes.sample(64, rows), observed=rows // 3)
    for name, error in report.rmse().items():
        print(f"{name}: error {error[report.observed - 1]:.3f} where observed, {error[report.observed]:.3f} after one "
              f"imagined step, {error[-1]:.3f} after {rows - report.observed}")  # fmt: skip
    print(f"The picture is {draw_open_loop(report, args.out / 'open_loop.png', title=args.env)}.")

    if args.env == "CartPole-v1":
        print("Angle of the pole, and whether the episode goes on, after 1, 5, 10 and 15 imagined steps:")
        futures(model, env.reset(seed=5).obs[0])
    env.close()


if __name__ == "__main__":
    main()
