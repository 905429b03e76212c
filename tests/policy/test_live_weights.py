"""Compiled methods cost little and always use the newest weights, however these were changed."""

import copy
import gc
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from worldloom import create_world_model
from worldloom.models import base
from worldloom.models.live_weights import live_weights
from worldloom.models.tdmpc2 import TDMPC2Config, TDMPC2WorldModel

SMALL = {"latent_dim": 8, "hidden_dim": 8, "encoder_dim": 8, "num_bins": 11, "num_samples": 8, "num_elites": 2}
SMALL |= {"num_pi_trajs": 2, "iterations": 1, "episode_length": 6, "precision": "float32"}
OBS = np.ones((1, 3), np.float32)


def small(seed=0, cls=TDMPC2WorldModel):
    return cls(TDMPC2Config(obs_shape=(3,), action_dim=2, **SMALL), seed=seed, device="cpu")


def latent(model):
    return np.asarray(model.encode(OBS).z)


def expected(model):
    """The same from the weights as they are now, computed without the compiled method."""
    rebuilt = base.merge(type(model), model.config, model.params, model.dtype)
    return np.asarray(jax.jit(lambda obs: rebuilt.latent(obs, None))(OBS))


def load(model, other):
    model.load_params(other.params)


def update(model, other):
    nnx.update(model, nnx.state(other))


def update_part(model, other):
    nnx.update(model.encoder, nnx.state(other.encoder))


def replace_part(model, other):
    model.encoder = other.encoder


def replace_inner_module(model, other):
    model.encoder.mlp = other.encoder.mlp


def variables(model):
    return [v for _, v in nnx.iter_graph(model.encoder) if isinstance(v, nnx.Variable)]


def assign_arrays(model, other):
    for mine, theirs in zip(variables(model), variables(other), strict=True):
        mine[...] = theirs[...]


def set_values(model, other):
    for mine, theirs in zip(variables(model), variables(other), strict=True):
        mine.set_value(theirs.get_value())


def replace_variables(model, other):
    for (_, mine), (_, theirs) in zip(nnx.iter_graph(model.encoder), nnx.iter_graph(other.encoder), strict=True):
        if isinstance(mine, nnx.Pytree):
            for name, value in vars(theirs).items():
                if isinstance(value, nnx.Variable):
                    setattr(mine, name, type(value)(value[...] + 0))


def replace_dict(model, other):
    vars(model)["encoder"] = other.encoder


WAYS = [
    load, update, update_part, replace_part, replace_inner_module, assign_arrays, set_values, replace_variables,
    replace_dict,
]  # fmt: skip


@pytest.mark.parametrize("change", WAYS, ids=lambda way: way.__name__)
def test_weights_changed_in_any_way_are_used_at_once(change):
    model, other = small(0), small(1)
    before = latent(model)
    np.testing.assert_array_equal(latent(model), before)
    change(model, other)
    np.testing.assert_array_equal(latent(model), latent(other))
    assert not np.array_equal(latent(model), before)
    change(model, small(0))
    np.testing.assert_array_equal(latent(model), before)


def test_optimizing_a_model_in_place_is_seen():
    model = small()
    before = latent(model)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model.encoder))
    for _ in range(2):
        stepped = jax.tree.map(lambda w, g: w - 0.1 * g, nnx.state(model.encoder), grads)
        nnx.update(model.encoder, stepped)
        now = latent(model)
        np.testing.assert_allclose(now, expected(model), rtol=1e-6)
        assert not np.array_equal(now, before)
        before = now


def test_a_model_with_weights_in_containers_is_never_stale():
    model, other = small(0), small(1)
    for holder in ([], [small(2).encoder], {}, (small(2).encoder,)):
        model.extra = nnx.data(holder)
        weights, arrays = live_weights(model)
        assert not weights.known
        assert len(arrays) == len(jax.tree.leaves(model.params))
        del model.extra
    weights, _ = live_weights(model)
    assert weights.known
    model.load_params(other.params)
    np.testing.assert_array_equal(latent(model), latent(other))


def test_traced_weights_run_inline_and_are_not_kept():
    model = small()
    eager = latent(model)

    @jax.jit
    def encode(params):
        return base.merge(TDMPC2WorldModel, model.config, params, model.dtype).encode(OBS).z

    np.testing.assert_allclose(encode(model.params), eager, rtol=1e-6)
    grads = nnx.grad(lambda m: m.encode(OBS).z[0, 0])(model)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    np.testing.assert_array_equal(latent(model), eager)


def test_weights_that_were_replaced_are_not_kept_alive():
    model = small()
    latent(model)
    kernel = weakref.ref(variables(model)[0].get_raw_value())
    assert kernel() is not None
    model.load_params(small(1).params)
    gc.collect()
    assert kernel() is None


def test_a_model_that_is_no_longer_used_is_freed():
    model = small()
    latent(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_copies_and_clones_have_weights_of_their_own():
    model = small()
    before = latent(model)
    for twin in (copy.deepcopy(model), nnx.clone(model)):
        np.testing.assert_array_equal(latent(twin), before)
        twin.load_params(small(1).params)
        np.testing.assert_array_equal(latent(twin), latent(small(1)))
        np.testing.assert_array_equal(latent(model), before)


def test_a_call_from_python_costs_little_beside_the_computation():
    model = create_world_model("dreamerv3:tiny", obs_shape=(4,), action_dim=2, device="cpu", seed=0)
    live_weights(model)
    seconds = []
    for _ in range(300):
        start = time.perf_counter()
        live_weights(model)
        seconds.append(time.perf_counter() - start)
    # About 0.04 ms; walking the graph takes ten.
    assert min(seconds) < 1e-3
