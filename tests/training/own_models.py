"""Models and data that a user of the library would write: both families with an encoder and a loss of one's own."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from worldloom import DreamerV3Config, DreamerV3WorldModel, TDMPC2Config, TDMPC2WorldModel
from worldloom.replay import ReplayBuffer
from worldloom.training import TrainingConfig

SHAPES = {"obs_shape": (3,), "action_dim": 1, "precision": "float32"}
DREAMER = DreamerV3Config(
    deter_dim=32,
    stoch_dim=16,
    num_categories=4,
    hidden_dim=16,
    blocks=4,
    mlp_layers=1,
    bins=11,
    imagination_horizon=3,
    **SHAPES,
)
TDMPC2 = TDMPC2Config(
    latent_dim=16,
    hidden_dim=16,
    encoder_dim=16,
    num_q=2,
    num_bins=11,
    num_samples=8,
    num_elites=2,
    num_pi_trajs=2,
    iterations=1,
    horizon=2,
    mlp_layers=1,
    episode_length=20,
    **SHAPES,
)
TRAINING = TrainingConfig(
    total_steps=3, batch_size=4, sequence_length=4, learning_rate=1e-2, log_interval=1, device="cpu", seed=7
)
POISON = 1e6
"""A reward that makes the term ``guess`` of the classes below NaN."""


class Constant(nnx.Variable):
    """An array that is no parameter."""


class Gained(nnx.Module):
    """An encoder whose output is multiplied by trained gains [width] and by a constant."""

    def __init__(self, inner, width):
        self.inner = inner
        self.gain = nnx.Param(jnp.ones(width))
        self.unit = Constant(jnp.ones(width))

    def __call__(self, *args, **options):
        return self.inner(*args, **options) * self.gain[...] * self.unit[...]


class MyDreamer(DreamerV3WorldModel):
    """Another encoder, a head that guesses rewards from features, and its term of the loss."""

    loss_terms = (*DreamerV3WorldModel.loss_terms, "guess")

    @staticmethod
    def build(config, dtype, rngs):
        parts = DreamerV3WorldModel.build(config, dtype, rngs)
        obs = jnp.zeros((1, *config.obs_shape))
        parts["encoder"] = Gained(parts["encoder"], parts["encoder"]({"obs": obs}).shape[-1])
        parts["guess"] = nnx.Linear(config.feature_dim, 1, rngs=rngs)
        return parts

    def losses(self, batch, key=None, **options):
        out = super().losses(batch, key, **options)
        features = out.latents.features  # [B, T, F] of the last T rows
        rewards = batch["rewards"][:, -features.shape[1] :]
        error = jnp.square(self.guess(features).astype(jnp.float32)[..., 0] - rewards)
        return out.add_term("guess", jnp.where(rewards == POISON, jnp.nan, error), scale=0.5)


class MyTDMPC2(TDMPC2WorldModel):
    """Another encoder, a head that guesses rewards from latents, and its term of the loss."""

    loss_terms = (*TDMPC2WorldModel.loss_terms, "guess")

    @staticmethod
    def build(config, dtype, rngs):
        parts = TDMPC2WorldModel.build(config, dtype, rngs)
        parts["encoder"] = Gained(parts["encoder"], config.latent_dim)
        parts["guess"] = nnx.Linear(config.latent_dim, 1, rngs=rngs)
        return parts

    def model_loss(self, batch, key=None, **options):
        out = super().model_loss(batch, key, **options)
        zs = out.rollouts.zs  # [H + 1, B, S, L]: row t + s of the window at [t, :, s]
        horizon, starts = zs.shape[0] - 1, zs.shape[2]
        rewards = jnp.stack([batch.rewards[:, t : t + starts] for t in range(horizon + 1)])
        error = jnp.square(self.guess(zs).astype(jnp.float32)[..., 0] - rewards)
        return out.add_term("guess", jnp.where(rewards == POISON, jnp.nan, error), scale=0.5)


BASE = {"dreamerv3": DreamerV3WorldModel, "tdmpc2": TDMPC2WorldModel}
MINE = {"dreamerv3": MyDreamer, "tdmpc2": MyTDMPC2}
CONFIG = {"dreamerv3": DREAMER, "tdmpc2": TDMPC2}


def data(poison=None, episodes=4, steps=12, seed=0):
    """Episodes of a random walk with rewards in [−1, 1]; reward ``poison`` of the first is :data:`POISON`."""
    rng = np.random.default_rng(seed)
    buffer = ReplayBuffer(10_000)
    for number in range(episodes):
        obs = np.cumsum(rng.normal(size=(steps + 1, 3)), 0).astype(np.float32) / 4
        actions = rng.uniform(-1, 1, (steps, 1)).astype(np.float32)
        rewards = np.tanh(obs[1:, 0])
        if poison is not None and number == 0:
            rewards[poison] = POISON
        buffer.add_episode(obs, actions, rewards, truncated=True)
    return buffer
