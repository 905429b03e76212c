"""A family of one's own in one file: a linear world model that plans by random shooting.

    python examples/linear_family.py
    worldloom train --family-module examples/linear_family.py --model linear --env Pendulum-v1 --run runs/linear
    worldloom eval runs/linear --family-module examples/linear_family.py

Next observation = observation · A + action · B + c, reward = (w, v) · (x, x²) of the observation arrived at. A family
is a config, a world model and an `Algorithm` of pure functions; once registered, `create_world_model`, `Trainer`, run
folders, resume, pictures and the command line work with it as with the built-in ones.
"""

import os
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from worldloom import WorldModel, create_world_model, register_family
from worldloom.algorithm import Algorithm, ReplaySpec, TrainState
from worldloom.config import BaseConfig, Ge, OneOf, check, config_dataclass
from worldloom.models.base import compiled, merge
from worldloom.optim import clip_by_norm, decay_kernels, learning_rate_schedule


@config_dataclass
class LinearConfig(BaseConfig):
    """Sizes of the linear model and its planner."""

    obs_shape: tuple[int, ...]
    """Shape of one observation, a vector (D,)."""
    action_dim: Annotated[int, Ge(1)]
    """Entries A of a continuous action in [−1, 1]."""
    action_type: Annotated[str, OneOf("continuous")] = "continuous"
    """Only continuous actions."""
    horizon: Annotated[int, Ge(1)] = 12
    """Steps H of a plan."""
    candidates: Annotated[int, Ge(1)] = 128
    """Action sequences N that a plan chooses from."""
    precision: Annotated[str, OneOf("float32")] = "float32"
    """Products are too small to gain from less."""
    model_type: str = "linear"
    """Name of the family."""

    def __post_init__(self) -> None:
        check(len(self.obs_shape) == 1, f"obs_shape={self.obs_shape} must be that of a vector, (D,).")


class State(NamedTuple):
    """A state is an observation, [..., D]."""

    obs: jax.Array

    @property
    def features(self):
        return self.obs


class Trajectory(NamedTuple):
    """States [H + 1, B, D], rewards [H, B] and continues [H, B] of an imagined future."""

    states: State
    rewards: jax.Array
    continues: jax.Array


class LinearWorldModel(WorldModel):
    """A linear map from observation and action to the next observation, and a quadratic reward."""

    config_class = LinearConfig
    loss_terms = ("loss", "prediction", "reward")

    @staticmethod
    def build(config, dtype, rngs):
        (size,) = config.obs_shape
        return {
            "dynamics": nnx.Linear(size + config.action_dim, size, rngs=rngs),
            "reward": nnx.Linear(2 * size, 1, rngs=rngs),
        }

    def initial_state(self, batch_size):
        return State(jnp.zeros((batch_size, *self.config.obs_shape)))

    @compiled
    def encode(self, obs, key=None):
        return State(jnp.asarray(obs, jnp.float32))

    @compiled
    def observe(self, state, action, obs, key=None):
        return State(jnp.asarray(obs, jnp.float32))

    @compiled
    def predict(self, state, action, key=None):
        return State(self.dynamics(jnp.concatenate([state.obs, action], -1)))

    @compiled
    def imagine(self, state, actions, key=None):
        def step(state, action):
            state = self.predict(state, action)
            return state, state.obs

        _, later = jax.lax.scan(step, state, actions)
        rewards = self.decode(State(later))["reward"]
        return Trajectory(State(jnp.concatenate([state.obs[None], later])), rewards, jnp.ones_like(rewards))

    @compiled
    def decode(self, state):
        reward = self.reward(jnp.concatenate([state.obs, jnp.square(state.obs)], -1))[..., 0]
        return {"obs": state.obs, "reward": reward}

    @compiled
    def compute_loss(self, batch, key=None):
        state = self.encode(batch["obs"])
        predicted = self.predict(State(state.obs[:, :-1]), batch["actions"][:, :-1]).obs
        inside = 1.0 - batch["is_first"][:, 1:]  # a step from one episode to the next is none
        prediction = jnp.mean(inside[..., None] * jnp.square(predicted - state.obs[:, 1:]))
        error = jnp.square(self.decode(state)["reward"] - batch["rewards"])
        reward = jnp.mean((1.0 - batch["is_first"]) * error)  # no reward arrives with an episode's first row
        return {"loss": prediction + reward, "prediction": prediction, "reward": reward}

    @compiled
    def act(self, carry, obs, key=None, *, is_first=None):
        """The first action of the best of N random sequences of H actions; without a key, N fixed ones."""
        key = jax.random.key(0) if key is None else key
        size = (self.config.horizon, len(obs), self.config.candidates, self.config.action_dim)
        actions = jax.random.uniform(key, size, minval=-1.0, maxval=1.0)
        start = State(jnp.broadcast_to(obs[:, None], (*size[1:3], *obs.shape[1:])))
        best = jnp.argmax(self.imagine(start, actions).rewards.sum(0), -1)  # [B]
        return carry, jnp.take_along_axis(actions[0], best[:, None, None], 1)[:, 0]


def optimizer(training):
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
        params = optax.apply_updates(state.params, steps)
        lr = jnp.asarray(learning_rate_schedule(training)(state.step))
        metrics: dict[str, Any] = {**terms, "grad_norm": optax.tree.norm(grads), "lr": lr}
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return update


def replay_spec(config, training):
    return ReplaySpec(rows=training.sequence_length)


ALGORITHM = Algorithm(init_state, make_update, replay_spec, loss_terms=LinearWorldModel.loss_terms)
register_family("linear", LinearConfig, LinearWorldModel, ALGORITHM)


def main():
    from worldloom.envs import make_env
    from worldloom.training import Trainer, TrainingConfig, play

    fast = os.environ.get("FAST") == "1"
    env = make_env("Pendulum-v1", seed=0, time_limit=50 if fast else None)
    model = create_world_model("linear", obs_shape=env.obs_shape, action_dim=env.action_dim)
    steps = 100 if fast else 3_000
    config = TrainingConfig(env_steps=steps, prefill=60, learning_rate=1e-2, sequence_length=8, device="auto")
    Trainer(model, config, []).train(env)
    with env.another(2, seed=1) as other:
        returns = [end.episode_return for end in play(model, other, episodes=2 if fast else 10)]
    print(f"Mean return of {len(returns)} episodes: {sum(returns) / len(returns):.0f}")


if __name__ == "__main__":
    main()
