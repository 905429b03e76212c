"""Three kinds of callbacks that observe a training run, and one way to stop it.

    python examples/custom_callback.py

A callback receives an immutable record of a step (``StepInfo``) and may return measurements, which are logged and can
be monitored like any other, or a request to stop. It never modifies the loop.
"""

import os

import jax
import numpy as np

from worldloom import create_world_model
from worldloom.envs import make_env
from worldloom.training import Trainer, TrainingConfig, recipe
from worldloom.training.callbacks import Callback, EvalCallback, LoggingCallback, StopTraining, every

FAST = os.environ.get("FAST") == "1"


def report(info):
    """A plain function of the record is a callback. Metrics are copied from the device when they are read."""
    print(f"update {info.step:,} after {info.env_steps:,} steps of the environment: loss {info.means['loss']:.3f}")


class WeightNorms(Callback):
    """Publishes the weight norm of every part of the model, in TensorBoard under ``weights/``."""

    measures = True  # it publishes measurements, which other callbacks may wait for
    order = -1  # run before the callbacks that log and save

    def on_step(self, info):
        return {
            f"weights/{part}": float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(weights))))
            for part, weights in info.params().items()
        }


class Solved(Callback):
    """Stops training after ``patience`` evaluations in a row have reached a return; its count survives a resume."""

    every = 0  # not called at steps, only at evaluations

    def __init__(self, target, patience=2):
        self.target, self.patience, self.reached = target, patience, 0

    def on_eval(self, info, measurements):
        if "eval/return" in measurements:
            self.reached = self.reached + 1 if measurements["eval/return"] >= self.target else 0
            if self.reached >= self.patience:
                return StopTraining(f"{self.reached} evaluations in a row reached {self.target}")
        return None

    def state_dict(self):
        return {"reached": self.reached}

    def load_state_dict(self, state):
        self.reached = state["reached"]


def main():
    env = make_env("Pendulum-v1", seed=0, time_limit=50 if FAST else None)
    model_fields, training_fields, _ = recipe("tdmpc2:tiny", env)
    training_fields |= {"env_steps": 5_000}
    if FAST:
        training_fields |= {"env_steps": 140, "prefill": 100, "prefill_updates": 20, "batch_size": 8, "train_ratio": 32}
        training_fields |= {"log_interval": 20}
    episodes = 2 if FAST else 10
    evaluation = EvalCallback(env.another(episodes, seed=1), every=30 if FAST else 2_000, episodes=episodes)
    trainer = Trainer(
        create_world_model("tdmpc2:tiny", **model_fields),
        TrainingConfig(**training_fields),
        [
            every(20 if FAST else 500, report),
            WeightNorms(),  # as often as the log
            evaluation,
            Solved(target=-2_000 if FAST else -200),
            LoggingCallback("runs/custom_callback", log_to_console=False, log_to_tensorboard=True),
        ],
    )
    trainer.train(env)
    print(f"Ended after {trainer.step:,} updates. {trainer.stop_reason or 'All steps are done'}.")
    env.close()


if __name__ == "__main__":
    main()
