"""A linear world model whose optimal weights are known: next observation = observation · matrix + offset.

It implements :class:`~worldloom.algorithm.Algorithm`, so the tests of training need no real family.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from worldloom.algorithm import Algorithm, ReplaySpec, TrainState
from worldloom.config import BaseConfig, config_dataclass
from worldloom.families import register_family
from worldloom.models.base import WorldModel, compiled, merge
from worldloom.optim import clip_by_norm, decay_kernels, learning_rate_schedule

LOSS_TERMS = ("loss", "prediction", "reward")
MATRIX = np.array([[0.9, 0.2], [-0.2, 0.9]], np.float32)


@config_dataclass
class ToyConfig(BaseConfig):
    obs_shape: Any = (2,)
    action_dim: Any = 1
    action_type: Any = "continuous"
    noise: float = 0.1
    latents: bool = False
    precision: str = "float32"
    model_type: str = "toy"


class ToyWorldModel(WorldModel):
    config_class = ToyConfig

    @staticmethod
    def build(config: Any, dtype: jnp.dtype, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        return {
            "dynamics": nnx.Linear(2, 2, rngs=rngs, dtype=dtype),
            "reward": nnx.Linear(2, 1, rngs=rngs, dtype=dtype),
        }

    @compiled
    def compute_loss(self, batch, key=None):
        """Mean squared errors; not finite if a reward is not."""
        obs = position = features(batch["obs"])
        if key is not None:
            obs = obs + self.config.noise * jax.random.normal(key, obs.shape)
        prediction = jnp.mean((self.dynamics(obs[:, :-1]) - position[:, 1:]) ** 2)
        # The first row of an episode has no reward.
        error = jnp.where(batch["is_first"], 0.0, self.reward(position)[..., 0] - batch["rewards"])
        reward = jnp.mean(error**2)
        return {"loss": prediction + reward, "prediction": prediction, "reward": reward}


def features(obs):
    """The part of an observation that is modelled, [..., 2]."""
    return obs["body/position"] if isinstance(obs, Mapping) else obs


def optimizer(training: Any) -> optax.GradientTransformation:
    return optax.chain(
        clip_by_norm(training.grad_clip),
        optax.scale_by_adam(),
        decay_kernels(training.weight_decay),
        optax.scale_by_learning_rate(learning_rate_schedule(training)),
    )


def init_state(model, training, key):
    params = jax.tree.map(jnp.copy, model.params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer(training).init(params), key)


def make_update(config, training, *, model_class):
    def update(state, batch, key):
        def objective(params):
            terms = merge(model_class, config, params).compute_loss(batch, key)
            return terms["loss"], terms

        grads, terms = jax.grad(objective, has_aux=True)(state.params)
        steps, opt_state = optimizer(training).update(grads, state.opt_state, state.params)
        metrics = {
            **terms,
            "grad_norm": optax.tree.norm(grads),
            "lr": jnp.asarray(learning_rate_schedule(training)(state.step)),
            "update_norm": optax.tree.norm(steps),
            "first_row": features(batch["obs"])[0, 0, 0],
        }
        if config.latents:
            metrics["replay"] = {"memory": features(batch["obs"])[..., :1] + batch["context"]["memory"][:, None]}
        params = optax.apply_updates(state.params, steps)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return update


def replay_spec(config, training):
    latents = {"memory": (1,)} if config.latents else {}
    return ReplaySpec(training.sequence_length + config.latents, False, latents)


def policy(model, carry, obs, key, *, is_first=None):
    """Noisy actions around the reward's weights; the carry [N, 1] is the sum of the first feature over the episode.

    The actions depend on everything that a resumed run must restore: weights, carry, key and observation.
    """
    config = model.config
    dims = config.action_dim if isinstance(config.action_dim, Mapping) else {"": config.action_dim}
    kinds = config.action_type if isinstance(config.action_type, Mapping) else dict.fromkeys(dims, config.action_type)
    position = features(obs)
    carry = jnp.where(is_first[:, None], 0.0, carry) + position[:, :1]
    mean = position @ model.reward.kernel[...] + 0.1 * carry
    actions = {}
    for number, (name, dim) in enumerate(dims.items()):
        noise = 0.0 if key is None else jax.random.normal(jax.random.fold_in(key, number), (len(position), dim))
        scores = mean * jnp.linspace(-1.0, 1.0, dim) + noise
        actions[name] = jnp.argmax(scores, -1) if kinds[name] == "discrete" else jnp.tanh(scores)
    return carry, actions if isinstance(config.action_dim, Mapping) else actions[""]


def eval_policy(model, carry, obs, key, *, is_first=None):
    return policy(model, carry, obs, None, is_first=is_first)


def initial_carry(config, batch_size):
    return jnp.zeros((batch_size, 1), jnp.float32)


def stored_latents(carry):
    return {"memory": carry}


ALGORITHM = Algorithm(
    init_state=init_state,
    make_update=make_update,
    replay_spec=replay_spec,
    loss_terms=LOSS_TERMS,
    policy=policy,
    eval_policy=eval_policy,
    initial_carry=initial_carry,
    stored_latents=stored_latents,
    random_prefill=False,
)
register_family("toy", ToyConfig, ToyWorldModel, ALGORITHM)


class PrefillingToy(ToyWorldModel):
    """The toy model with a prefill of random actions, as in TD-MPC2."""

    algorithm = dataclasses.replace(ALGORITHM, random_prefill=True)


def fill(buffer, episodes=6, steps=12, seed=0, poison=None):
    """Rotations with the rewards ``obs[0]``; the reward of row ``poison`` of the first episode is 1e30."""
    rng = np.random.default_rng(seed)
    for number in range(episodes):
        obs = [rng.normal(size=2).astype(np.float32)]
        for _ in range(steps):
            obs.append(obs[-1] @ MATRIX)
        obs = np.stack(obs)
        rewards = obs[1:, 0].copy()
        if poison is not None and number == 0:
            rewards[poison] = 1e30
        buffer.add_episode(obs, np.zeros((steps, 1), np.float32), rewards, np.arange(steps) == steps - 1)
    return buffer
