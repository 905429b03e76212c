"""Shared by the tests of the loop on the device: a small environment in JAX, and variants of the toy family."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from toy_family import ALGORITHM, MATRIX, ToyConfig, ToyWorldModel

from worldloom.algorithm import ReplaySpec
from worldloom.envs import make_env
from worldloom.training import Trainer, TrainingConfig


class DriftState(NamedTuple):
    position: jax.Array
    length: jax.Array
    steps: jax.Array


class Drift:
    """A rotation with noise, pushed by the action; an episode has a random length of 1 to 9 steps and may terminate."""

    obs_shape, action_dim, action_type, time_limit = (2,), 1, "continuous", 8

    def __init__(self, discrete=False, terminates=True, bad_after=None):
        self.terminates, self.bad_after = terminates, bad_after
        if discrete:
            self.action_dim, self.action_type = 3, "discrete"

    def reset(self, key):
        keys = jax.random.split(key)
        length = jax.random.randint(keys[1], (), 1, 12)
        state = DriftState(jax.random.normal(keys[0], (2,)), length, jnp.zeros((), jnp.int32))
        return state, state.position

    def step(self, key, state, action):
        push = action[0] if self.action_type == "continuous" else action.astype(jnp.float32) - 1.0
        position = state.position @ MATRIX + 0.1 * push + 0.01 * jax.random.normal(key, (2,))
        after = DriftState(position, state.length, state.steps + 1)
        over = after.steps >= state.length
        if self.bad_after is not None:
            position = jnp.where(after.steps >= self.bad_after, jnp.nan, position)
        ended, cut = (over, jnp.zeros_like(over)) if self.terminates else (jnp.zeros_like(over), over)
        return after, position, position[0], ended, cut, {"steps": after.steps, "name": "ignored"}


DRIFT, CHOICES = Drift(), Drift(discrete=True)


def variant(name, *, latents=False, rows=0, random_prefill=False, **spec):
    """A toy family with another ``ReplaySpec``."""

    def replay_spec(config, training):
        extra = {"memory": (1,)} if config.latents else {}
        return ReplaySpec(training.sequence_length + config.latents + rows, latents=extra, **spec)

    algorithm = dataclasses.replace(ALGORITHM, replay_spec=replay_spec, random_prefill=random_prefill)
    return type(name, (ToyWorldModel,), {"algorithm": algorithm})


LikeDreamer = variant("LikeDreamer", cross_episodes=True, fresh_first=True)
LikeTDMPC2 = variant("LikeTDMPC2", open_episodes=False, random_prefill=True)
Episodic = variant("Episodic", cross_episodes=True, open_episodes=False, random_prefill=True)
Plain = variant("Plain")

CONFIG = TrainingConfig(
    batch_size=4,
    sequence_length=3,
    learning_rate=1e-2,
    log_interval=10,
    device="cpu",
    prefill=40,
    total_steps=40,
    seed=5,
)


def trainer_in(env, kind, config, *, latents=False, callbacks=()):
    """A trainer of the toy family ``kind`` for the environments ``env``."""
    shapes = {"obs_shape": env.obs_shape, "action_dim": env.action_dim, "action_type": env.action_type}
    model = kind(ToyConfig(**shapes, latents=latents), seed=0)
    return Trainer(model, config, callbacks=[*callbacks])


def trained(kind, loop, env=DRIFT, *, num_envs=2, latents=False, callbacks=(), resume=False, **changes):
    """A trainer after its run on the host or the device."""
    world = make_env(env, num_envs, seed=3)
    trainer = trainer_in(world, kind, CONFIG.replace(loop=loop, **changes), latents=latents, callbacks=callbacks)
    trainer.train(world, resume=resume)
    return trainer


def content(trainer):
    """Everything that a run leaves behind, as arrays and values by name."""
    replay, collector = trainer.replay, trainer.run.collector
    first, end = replay.state_dict().values()
    rows = replay.take(np.arange(first, end))
    if replay.latents:
        rows |= replay.take(np.arange(first, end)[:, None], latents=True)["context"]
    counts, arrays = collector.state_dict()
    # As they will be executed: what is chosen at an episode's last row is ignored.
    arrays["actions/action"] = collector.env.executed(arrays["actions/action"])
    queue = waiting(trainer.run.writeback)
    state = {f"state{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(trainer.state.params))}
    opt = {f"opt{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(trainer.state.opt_state))}
    return rows | counts | arrays | {f"queue/{k}": v for k, v in queue.items()} | state | opt


def waiting(writeback):
    """Latents that are still to be written back: rows and values by update. Padding is left out."""
    found = {}
    for step, row_ids, output in writeback.waiting:
        for i, ids in enumerate(row_ids):
            values = {name: np.asarray(value[i]) for name, value in output.latents.items()}
            rows = ids[:, -len(next(iter(values.values()))[0]) :]
            if np.asarray(output.applied)[i]:
                found |= {f"{step + i}/{name}": value for name, value in {"ids": rows, **values}.items()}
    return found


def assert_same(one, other):
    """Raise ``AssertionError`` naming what differs."""
    assert one.keys() == other.keys()
    same = lambda a, b: a == b if isinstance(a, list | dict) else np.array_equal(a, b)  # noqa: E731
    different = [name for name in one if not same(one[name], other[name])]
    assert not different, {name: (one[name], other[name]) for name in different[:3]}


class KeyedState(NamedTuple):
    position: jax.Array
    key: jax.Array
    other: jax.Array
    half: jax.Array


class Keyed:
    """A walk whose draws come from the key in its state, beside a key of another implementation and a bfloat16.

    Its observation is a matrix, which models take as a vector.
    """

    obs_shape, action_dim, action_type, time_limit = (2, 1), 1, "continuous", 5

    def reset(self, key):
        position = jax.random.normal(key, (2,))
        other = jax.random.key(jax.random.key_data(key)[0], impl="rbg")
        return KeyedState(position, key, other, position.astype(jnp.bfloat16)), position[:, None]

    def step(self, key, state, action):
        kept, drawn = jax.random.split(state.key)
        other = jax.random.split(state.other)[0]
        push = (jax.random.key_data(other)[0] % 7).astype(jnp.float32)
        half = (state.half * 0.9 + push).astype(jnp.bfloat16)
        position = state.position @ MATRIX + 0.1 * action[0] + 0.01 * jax.random.normal(drawn, (2,)) + 0.01 * push
        after = KeyedState(position, kept, other, half)
        return after, position[:, None], half[0], position[0] > 1.5, jnp.asarray(False), {}


KEYED = Keyed()
