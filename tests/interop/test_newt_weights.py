"""Weights in the layout of Newt's program, against its networks written down in NumPy from its code."""

import itertools

import numpy as np
import pytest

from worldloom.errors import WeightsError
from worldloom.interop import load_official_newt

OBS, ACTIONS, TASKS, EMBEDDING, LATENT, HIDDEN, BINS, MEMBERS = 5, 3, 4, 6, 16, 8, 11, 3


def mlp(rng, name, sizes, normed_head):
    """``layers.mlp``: NormedLinear (weight, bias, ln) up to the last layer, which has a norm only with ``act``."""
    arrays = {}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        arrays[f"{name}.{i}.weight"] = rng.normal(size=(outputs, inputs)) / np.sqrt(inputs)
        arrays[f"{name}.{i}.bias"] = rng.normal(size=outputs)
        if i < len(sizes) - 2 or normed_head:
            arrays[f"{name}.{i}.ln.weight"] = rng.normal(size=outputs)
            arrays[f"{name}.{i}.ln.bias"] = rng.normal(size=outputs)
    return arrays


@pytest.fixture(scope="module")
def state_dict():
    rng = np.random.default_rng(0)
    z, za = LATENT + EMBEDDING, LATENT + EMBEDDING + ACTIONS
    arrays = mlp(rng, "_encoder.state", [OBS + EMBEDDING, 12, LATENT], True)
    arrays |= mlp(rng, "_dynamics", [za, HIDDEN, HIDDEN, LATENT], True)
    arrays |= mlp(rng, "_reward", [za, HIDDEN, HIDDEN, BINS], False)
    arrays |= mlp(rng, "_pi", [z, HIDDEN, HIDDEN, 2 * ACTIONS], False)
    for which in ("online", "target"):
        for number in range(MEMBERS):
            arrays |= mlp(rng, f"_Qs.{which}._Qs.{number}", [za, HIDDEN, HIDDEN, BINS], False)
    # As long as the text embeddings of the released tasks.
    arrays["_task_emb.weight"] = rng.normal(size=(TASKS, EMBEDDING)) * 6
    arrays["_action_masks"] = (np.arange(ACTIONS) < np.array([[3], [2], [1], [3]])).astype(float)
    arrays |= {"log_std_min": np.array(-10), "log_std_dif": np.array(12)}
    return {name: np.asarray(value, np.float32) for name, value in arrays.items()}


def forward(arrays, name, x, head):
    layers = sum(key.startswith(f"{name}.") and key.endswith(".weight") and ".ln." not in key for key in arrays)
    for i in range(layers):
        x = x @ arrays[f"{name}.{i}.weight"].T + arrays[f"{name}.{i}.bias"]
        if f"{name}.{i}.ln.weight" in arrays:
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
            x = x * arrays[f"{name}.{i}.ln.weight"] + arrays[f"{name}.{i}.ln.bias"]
            x = simnorm(x) if head == "simnorm" and i == layers - 1 else x * np.tanh(np.log1p(np.exp(x)))
    return x


def simnorm(x):
    groups = x.reshape(*x.shape[:-1], -1, 8)
    exp = np.exp(groups - groups.max(-1, keepdims=True))
    return (exp / exp.sum(-1, keepdims=True)).reshape(x.shape)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_outputs_are_those_of_newts_networks(state_dict, prefix):
    given = {"model": {prefix + name: array for name, array in state_dict.items()}, "optim": {}}
    model = load_official_newt(given, obs_dim=OBS, simnorm_dim=8, precision="float32")
    arrays = {name: value.astype(np.float64) for name, value in state_dict.items()}
    rng = np.random.default_rng(1)
    obs, action, task = rng.normal(size=(4, OBS)), rng.uniform(-1, 1, (4, ACTIONS)), np.arange(4)
    embedding = arrays["_task_emb.weight"][task]
    z = forward(arrays, "_encoder.state", np.concatenate([obs, embedding], -1), "simnorm")
    state = model.encode(obs.astype(np.float32), task=task)
    np.testing.assert_allclose(state.features, z, atol=1e-5)
    inputs = np.concatenate([z, embedding, action], -1)
    following = model.predict(state, action.astype(np.float32), task=task)
    np.testing.assert_allclose(following.features, forward(arrays, "_dynamics", inputs, "simnorm"), atol=1e-5)
    embedded = np.concatenate([state.features, np.asarray(model.task_embedding(task)), action], -1)
    for number in range(MEMBERS):
        expected = forward(arrays, f"_Qs.online._Qs.{number}", inputs, None)
        np.testing.assert_allclose(np.asarray(model.q(embedded.astype(np.float32)))[number], expected, atol=2e-4)
    expected = forward(arrays, "_reward", inputs, None)
    np.testing.assert_allclose(np.asarray(model.reward(embedded.astype(np.float32))), expected, atol=2e-4)
    assert model.config.valid_actions == (3, 2, 1, 3)


def test_embeddings_may_be_given_as_an_array(state_dict):
    without = {name: array for name, array in state_dict.items() if name != "_task_emb.weight"}
    with pytest.raises(WeightsError, match="give task_embeddings"):
        load_official_newt(without, obs_dim=OBS, simnorm_dim=8)
    one = load_official_newt(without, obs_dim=OBS, simnorm_dim=8, task_embeddings=state_dict["_task_emb.weight"])
    other = load_official_newt(state_dict, obs_dim=OBS, simnorm_dim=8)
    np.testing.assert_array_equal(one.task_embedding.table[...], other.task_embedding.table[...])


def test_what_is_no_newt_is_refused(state_dict):
    with pytest.raises(WeightsError, match="obs_dim=4 and 6 of the task"):
        load_official_newt(state_dict, obs_dim=4, simnorm_dim=8)
    with pytest.raises(WeightsError, match="not weights of Newt"):
        load_official_newt({n: a for n, a in state_dict.items() if not n.startswith("_Qs")}, obs_dim=OBS)
    with pytest.raises(WeightsError, match="do not belong together"):
        load_official_newt({n: a for n, a in state_dict.items() if "_Qs.1." not in n}, obs_dim=OBS)
    with pytest.raises(WeightsError, match=r"_reward\.0\.weight is missing"):
        load_official_newt({n: a for n, a in state_dict.items() if not n.startswith("_reward")}, obs_dim=OBS)
