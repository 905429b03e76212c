"""A model with an extra head and a loss term of its own, trained, saved and loaded like any other.

    python examples/custom_model.py

The head guesses the action between two successive states (inverse dynamics, Pathak et al. 2017), which teaches the
states what the agent can change. Training takes exactly this class: its parts from `build`, its loss from `losses`.
"""

import os

import jax
import jax.numpy as jnp
from flax import nnx

from worldloom.envs import make_env
from worldloom.models.dreamer import DreamerV3Config, DreamerV3WorldModel
from worldloom.training import Trainer, TrainingConfig, recipe
from worldloom.training.callbacks import LoggingCallback

FAST = os.environ.get("FAST") == "1"


class InverseDynamics(DreamerV3WorldModel):
    """DreamerV3 with a head that predicts the action from the states before and after it."""

    loss_terms = (*DreamerV3WorldModel.loss_terms, "inverse")

    @staticmethod
    def build(config, dtype, rngs):
        parts = DreamerV3WorldModel.build(config, dtype, rngs)
        parts["inverse"] = nnx.Linear(2 * config.feature_dim, config.action_width, dtype=dtype, rngs=rngs)
        return parts

    def losses(self, batch, key=None, **options):
        out = super().losses(batch, key, **options)
        features = out.latents.features  # [B, T, F] of the batch's last T rows
        rows = features.shape[1]
        guess = self.inverse(jnp.concatenate([features[:, :-1], features[:, 1:]], -1)).astype(jnp.float32)
        error = jnp.sum(jnp.square(guess - batch["actions"][:, -rows:-1]), -1)  # [B, T - 1]
        one_episode = 1 - batch["is_first"][:, -rows + 1 :]  # no action leads from one episode to the next
        return out.add_term("inverse", one_episode * error, scale=0.1)


def main():
    env = make_env("Pendulum-v1", seed=0, time_limit=30 if FAST else None)
    model_fields, training_fields, _ = recipe("dreamerv3:tiny", env)
    training_fields |= {"env_steps": 120 if FAST else 3_000, "prefill": 100, "log_interval": 5 if FAST else 50}
    if FAST:
        training_fields |= {"batch_size": 4, "sequence_length": 8}
    model = InverseDynamics(DreamerV3Config.from_size("tiny", **model_fields))
    trainer = Trainer(model, TrainingConfig(**training_fields), [LoggingCallback()])
    trainer.train(env)
    again = InverseDynamics.from_pretrained(model.save_pretrained("runs/custom_model/model"))
    same = jax.tree.map(jnp.array_equal, again.params, model.params)
    print(f"Trained {model.num_parameters():,} parameters; all read back: {all(jax.tree.leaves(same))}.")


if __name__ == "__main__":
    main()
