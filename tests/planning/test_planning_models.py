"""Planning with world models: DreamerV3's RSSM through callables, and what TD-MPC2's planner takes."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import worldloom
from worldloom.errors import DataError
from worldloom.models.dreamer import DreamerV3Config, DreamerV3WorldModel
from worldloom.models.tdmpc2 import LatentState, TDMPC2Config, TDMPC2WorldModel, planner
from worldloom.planning import CategoricalActions, GaussianActions, Step, cem, mppi

# ---- DreamerV3 -------------------------------------------------------------------------------------------------------


@functools.cache
def dreamer(action_type):
    """A tiny model whose reward head, zero at first, depends on its input: values of some tens."""
    model = DreamerV3WorldModel(DreamerV3Config.from_size("tiny", obs_shape=(4,), action_dim=3, action_type=action_type,
                                                          precision="float32"))  # fmt: skip
    draw = np.random.default_rng(0)
    params = model.params
    params["reward"] = jax.tree.map(lambda x: x + 1e-6 * draw.normal(size=x.shape).astype(np.float32), params["reward"])
    model.load_params(params)
    return model


def callables(model):
    def transition(latent, action, key):
        after = model.predict(latent, action, key)
        return Step(after, model.predict_reward(after.features), model.predict_continue(after.features))

    return transition, lambda latent, key: model.decode(latent)["value"]


@pytest.mark.parametrize("plan_by", [mppi, cem])
@pytest.mark.parametrize("action_type", ["continuous", "discrete"])
def test_plans_in_the_rssm_are_worth_more_than_random_actions(plan_by, action_type):
    """Under the model itself: the best candidate beats 99 % of 200 random sequences, the mean of the plan 90 %."""
    model, horizon = dreamer(action_type), 4
    discrete = action_type == "discrete"
    sampler = CategoricalActions() if discrete else GaussianActions()
    state = model.encode(np.random.default_rng(1).normal(size=(1, 4)).astype(np.float32))
    latent = jax.tree.map(lambda x: x[0], state)

    @jax.jit
    def plan(params, latent):
        transition, value = callables(DreamerV3WorldModel.rebuild(model.config, params))
        mean = jnp.zeros((horizon, 3))
        return plan_by(transition, value, None, latent, mean, actions=sampler, num_samples=64, num_elites=8,
                       iterations=5, min_std=0.01)  # fmt: skip

    found = plan(model.params, latent)
    best = jax.vmap(sampler.mode)(found.mean)  # [H, A]
    draw = np.random.default_rng(2)
    shape = (horizon, 200, 3)
    drawn = np.eye(3, dtype=np.float32)[draw.integers(0, 3, shape[:2])] if discrete else draw.uniform(-1, 1, shape)
    sequences = jnp.concatenate([best[:, None], drawn.astype(np.float32)], axis=1)  # the plan first
    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (201, *x.shape)), latent)
    dream = model.imagine(states, jnp.argmax(sequences, -1) if discrete else sequences)
    before = jnp.cumprod(jnp.concatenate([jnp.ones((1, 201)), dream.continues]), axis=0)
    last = jax.tree.map(lambda x: x[-1], dream.states)
    values = np.asarray((before[:-1] * dream.rewards).sum(0) + before[-1] * model.decode(last)["value"])
    assert np.std(values) > 1e-3, "the model must distinguish between actions"
    assert found.elite_values[0] >= np.quantile(values[1:], 0.99)
    assert values[0] >= np.quantile(values[1:], 0.9)


# ---- TD-MPC2 ---------------------------------------------------------------------------------------------------------


@functools.cache
def tdmpc2():
    config = TDMPC2Config(obs_shape=(5,), action_dim=2, encoder_dim=16, hidden_dim=16, latent_dim=16, num_q=3,
                          num_samples=16, num_elites=4, num_pi_trajs=4, iterations=2, mlp_layers=1, horizon=2,
                          precision="float32")  # fmt: skip
    model = TDMPC2WorldModel(config)
    draw = np.random.default_rng(0)
    model.load_params(jax.tree.map(lambda x: x + 0.1 * draw.normal(size=x.shape).astype(np.float32), model.params))
    return model


METHODS = [name for name in vars(planner.PlannerModel) if not name.startswith("_")]


class Own:
    """A model of one's own: the planner's methods and nothing else, neither ``params`` nor a base class."""

    def __init__(self, model, without=()):
        self.config = model.config
        for name in METHODS:
            if name not in without:
                setattr(self, name, getattr(model, name))


OBS = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)


def test_plan_and_score_take_the_state_that_encode_returns():
    model, means = tdmpc2(), jnp.zeros((3, 2, 2))
    state = model.encode(OBS)
    for one, other in zip(
        planner.plan(model, state, means, None), planner.plan(model, state.z, means, None), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    first, actions = model.encode(OBS[:1]), jax.random.uniform(jax.random.key(0), (2, 7, 2))
    expected = planner.score(model, first.z[0], actions)
    assert expected.shape == (7,)
    assert np.ptp(expected) > 0
    np.testing.assert_allclose(planner.score(model, first, actions), expected, rtol=1e-5)
    np.testing.assert_allclose(planner.score(model, LatentState(first.z[0]), actions), expected, rtol=1e-5)
    np.testing.assert_allclose(planner.score(model, np.asarray(first.z[0]), actions), expected, rtol=1e-5)
    traced = jax.jit(lambda state: planner.score(model, state, actions))(first)
    np.testing.assert_allclose(traced, expected, rtol=1e-5)
    # One latent for each sequence.
    each = planner.score(model, state, actions[:, :3])
    np.testing.assert_allclose(each[1], planner.score(model, state.z[1], actions[:, 1:2])[0], rtol=1e-5)


@pytest.mark.parametrize("wrong", [None, {"z": 1}, [0.5] * 16, 3.0, "state"])
def test_anything_else_is_answered_with_a_sentence(wrong):
    model = tdmpc2()
    kind = type(wrong).__name__
    with pytest.raises(DataError, match=rf"z is a {kind}; .*LatentState that model.encode returns"):
        planner.score(model, wrong, jnp.zeros((2, 7, 2)))
    with pytest.raises(DataError, match=rf"z is a {kind}; .*LatentState that model.encode returns"):
        planner.plan(model, wrong, jnp.zeros((2, 2)), None)


def test_states_of_dreamer_and_wrong_shapes_are_answered_with_a_sentence():
    model, z = tdmpc2(), jnp.full((3, 16), 1 / 8)
    with pytest.raises(DataError, match="z is a Latent; "):
        planner.plan(model, dreamer("continuous").initial_state(1), jnp.zeros((1, 2, 2)), None)
    with pytest.raises(DataError, match=re.escape("z has shape (3, 16); score takes one latent [L] for all 7")):
        planner.score(model, z, jnp.zeros((2, 7, 2)))
    with pytest.raises(DataError, match=re.escape("actions has shape (7, 2); score takes [H, N, A] = [2, N, 2]")):
        planner.score(model, z[0], jnp.zeros((7, 2)))
    with pytest.raises(DataError, match=re.escape("previous_mean (2, 2); plan takes [L] with [2, 2]")):
        planner.plan(model, z, jnp.zeros((2, 2)), None)


@pytest.mark.parametrize("key", [None, 0])
def test_a_model_of_ones_own_plans_inside_and_outside_of_a_trace(key):
    model = tdmpc2()
    own, z, means = Own(model), model.encode(OBS).z, jnp.zeros((3, 2, 2))
    key = None if key is None else jax.random.key(key)
    expected = planner.plan(model, z, means, key)
    outside = planner.plan(own, z, means, key)
    inside = jax.jit(functools.partial(planner.plan, own))(LatentState(z), means, key)
    for a, b, c in zip(expected, outside, inside, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)
        np.testing.assert_allclose(c, a, atol=1e-5)
    actions = jax.random.uniform(jax.random.key(0), (2, 7, 2))
    np.testing.assert_allclose(planner.score(own, z[0], actions), planner.score(model, z[0], actions), rtol=1e-5)


def test_a_changed_model_of_ones_own_is_never_stale():
    model = tdmpc2()
    own, z, actions = Own(model), model.encode(OBS).z[0], jnp.ones((2, 4, 2))
    before = planner.score(own, z, actions)
    own.decode_scalar = lambda logits: model.decode_scalar(logits) + 1.0
    np.testing.assert_allclose(planner.score(own, z, actions), before + 1 + model.gamma(None), rtol=1e-4)


def test_missing_methods_are_named():
    model = tdmpc2()
    z, mean = jnp.full(16, 1 / 8), jnp.zeros((2, 2))
    with pytest.raises(TypeError, match=r"Own lacks prior, gamma\."):
        planner.plan(Own(model, without=("prior", "gamma")), z, mean, None)
    # Needed for episodic configs only.
    assert planner.plan(Own(model, without=("termination_logits",)), z, mean, None)[0].shape == (2,)


def test_a_model_without_prior_candidates_can_plan():
    model = TDMPC2WorldModel(tdmpc2().config.replace(num_pi_trajs=0))
    action, mean = planner.plan(model, jnp.full((3, 16), 1 / 8), jnp.zeros((3, 2, 2)), jax.random.key(0))
    assert action.shape == (3, 2)
    assert np.isfinite(mean).all()


# ---- The page --------------------------------------------------------------------------------------------------------


def test_the_page_runs_as_printed():
    page = (Path(worldloom.__file__).parent / "docs" / "planning.md").read_text(encoding="utf-8")
    namespace = {}
    examples = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert len(examples) >= 2
    for example in examples:
        exec(compile(example, "planning.md", "exec"), namespace)
    assert namespace["plan"].action.shape == (2,)
    assert namespace["action"].shape == (4,)
