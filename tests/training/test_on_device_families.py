"""The published families on both loops, row for row."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax_worlds import assert_same, content

from worldloom import create_world_model
from worldloom.envs import make_env
from worldloom.training import Trainer, TrainingConfig, recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("WORLDLOOM_TEST_OPTIMIZED") != "1",
        reason="the tests' quick code generator rounds two programs differently; run this with XLA's usual one",
    ),
]

PREFILL, UPDATES = 100, 200
"""At one update per decision step: 300 steps, of which the policy chooses 200."""


def trained(name, spec, *, seed=0, **changes):
    """A trainer after a run at one update per decision step, with the family's recommended settings otherwise."""
    env = make_env(spec, seed=seed)
    fixed = {"seed": seed, "prefill": PREFILL, "prefill_updates": 0, "total_steps": UPDATES, **changes}
    recommended = recipe(name, env, fixed)
    # train_ratio=0 is one update per decision step.
    config = TrainingConfig(**recommended.training).replace(**fixed, train_ratio=0.0, device="cpu")
    model = create_world_model(name, **recommended.model, seed=seed, device="cpu")
    trainer = Trainer(model, config, callbacks=[])
    trainer.train(env)
    return trainer


class Hover:
    """A point that is pushed in ``action_dim`` directions."""

    obs_shape, action_type, time_limit = (4,), "continuous", 50

    def __init__(self, action_dim):
        self.action_dim = action_dim

    def reset(self, key):
        position = jax.random.normal(key, (4,))
        return position, position

    def step(self, key, state, action):
        state = 0.75 * state + 0.125 * jnp.sum(action)
        return state, state, -jnp.abs(state[0]), jnp.asarray(False), jnp.asarray(False), {}


@pytest.mark.parametrize(
    "spec", ["jax:Pendulum-v1", "jax:CartPole-v1", Hover(2), Hover(6)], ids=["pendulum", "cartpole", "two", "six"]
)
@pytest.mark.parametrize("name", ["tdmpc2:tiny", "dreamerv3:tiny"])
def test_both_loops_collect_the_same_rows_and_arrive_at_the_same_weights(name, spec):
    host, device = (trained(name, spec, loop=loop) for loop in ("host", "device"))
    assert host.run.collector.decisions == device.run.collector.decisions >= PREFILL + UPDATES - 1
    assert host.step == device.step == UPDATES
    assert_same(content(host), content(device))
