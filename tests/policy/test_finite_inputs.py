"""NaN and infinity on the host are refused where a method of a model is called, before anything is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import DREAMER, TDMPC2

from worldloom import DataError, create_world_model
from worldloom.models.tdmpc2 import planner

SHAPES = {"obs_shape": {"pos": (3,), "cam": (5, 5, 1)}, "action_dim": 2}
PRESETS = {"dreamerv3:tiny": DREAMER | {"cnn_depth": 2}, "tdmpc2:tiny": TDMPC2}


@pytest.fixture(scope="module", params=PRESETS)
def model(request):
    return create_world_model(request.param, **SHAPES, **PRESETS[request.param])


def observations(value=0.0, dtype=np.float32):
    pos = np.zeros((2, 3), dtype)
    pos[1, 2] = value
    return {"pos": pos, "cam": np.zeros((2, 5, 5, 1), np.uint8)}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_observations_that_are_not_finite_are_refused(model, value, dtype):
    obs, cls = observations(value, dtype), type(model).__name__
    calls = {
        "act": lambda: model.act(None, obs),
        "encode": lambda: model.encode(obs=obs),
        "observe": lambda: model.observe(model.initial_state(2), np.zeros((2, 2)), obs),
    }
    for name, call in calls.items():
        message = rf"obs\['pos'\] given to {cls}\.{name} is NaN or infinite, first at \(1, 2\); nothing was computed"
        with pytest.raises(DataError, match=message):
            call()


def test_images_of_floats_actions_and_batches_are_looked_at_too(model):
    obs = observations() | {"cam": np.full((2, 5, 5, 1), np.nan, np.float32)}
    with pytest.raises(DataError, match=r"obs\['cam'\] given to"):
        model.encode(obs)
    with pytest.raises(DataError, match=r"action given to .* first at \(0, 1\)"):
        model.predict(model.initial_state(2), np.array([[0, np.nan], [0, 0]]))
    batch = {"obs": jax.tree.map(lambda x: np.stack([x] * 6, 1), observations()), "actions": np.zeros((2, 6, 2))}
    batch |= {"rewards": np.full((2, 6), np.inf), "is_terminal": np.zeros((2, 6), bool)}
    with pytest.raises(DataError, match=r"batch\['rewards'\] given to .*compute_loss"):
        model.compute_loss(batch)


def test_the_planner_refuses_latents_and_actions():
    model = create_world_model("tdmpc2:tiny", obs_shape=(3,), action_dim=2, **TDMPC2)
    nan = np.full(8, np.nan, np.float32)
    with pytest.raises(DataError, match=r"z given to TDMPC2WorldModel\.plan is NaN"):
        planner.plan(model, nan, np.zeros((3, 2)), None)
    with pytest.raises(DataError, match=r"actions given to TDMPC2WorldModel\.score is NaN"):
        planner.score(model, np.zeros(8, np.float32), np.full((3, 4, 2), np.nan))


def test_traced_observations_pass():
    """Inside of a compiled function nothing is on the host; what is finite there is up to the caller."""
    model = create_world_model("tdmpc2:tiny", obs_shape=(3,), action_dim=2, **TDMPC2)
    latent = jax.jit(lambda obs: model.encode(obs).z)(jnp.full((1, 3), jnp.nan))
    assert np.isnan(latent).all()
