"""Weights of the reference program: a round trip changes nothing, and arrays that do not fit are named."""

import json
import pickle

import jax
import numpy as np
import pytest
from trees import assert_same

from worldloom.errors import ConfigError, FileFormatError, WeightsError
from worldloom.interop import load_official_dreamerv3, to_official_dreamerv3
from worldloom.interop.dreamerv3 import official_name
from worldloom.models.compilation import abstract_params
from worldloom.models.dreamer import DreamerV3Config, DreamerV3WorldModel, init_state
from worldloom.models.params import flatten
from worldloom.training.config import TrainingConfig

SPACES = {
    "image-continuous": {"obs_shape": (64, 64, 3), "action_dim": 3},
    "vector-discrete": {"obs_shape": (11,), "action_dim": 5, "action_type": "discrete"},
}


@pytest.fixture(scope="module")
def recorded(golden):
    def load(variant):
        data = golden(f"dreamerv3-{variant}-s0")
        params = {k.removeprefix("params/"): v for k, v in data.items() if k.startswith("params/")}
        return params, {**SPACES[variant], "num_categories": json.loads(str(data["config"]))["classes"]}

    return load


@pytest.mark.parametrize("variant", SPACES)
def test_export_after_import_is_the_same(recorded, variant):
    params, spaces = recorded(variant)
    model = load_official_dreamerv3(params, **spaces)
    assert_same(to_official_dreamerv3(model), params)
    state = init_state(model, TrainingConfig(device="cpu"), jax.random.key(0))
    assert_same(to_official_dreamerv3(state), params)


def test_sizes_and_settings_of_the_imported_config(recorded):
    params, spaces = recorded("vector-discrete")
    config = load_official_dreamerv3(params, **spaces, kl_free=0.5).config
    assert (config.deter_dim, config.hidden_dim, config.stoch_dim, config.num_categories) == (64, 16, 16, 4)
    assert (config.blocks, config.mlp_layers, config.reward_layers, config.bins, config.kl_free) == (8, 3, 1, 255, 0.5)
    np.testing.assert_allclose(config.kl_scale * config.kl_balance, 1.0)
    np.testing.assert_allclose(config.kl_scale * (1 - config.kl_balance), 0.1)


def test_files_and_prefixes(recorded, tmp_path):
    params, spaces = recorded("vector-discrete")
    # Optimizer state is ignored, whatever it is called.
    extra = {
        "opt/state/0/mu/dyn/dyngru/kernel": np.zeros(3, np.float32),
        "input/obs": np.zeros(2),
        "config": np.array("{}"),
    }
    np.savez(tmp_path / "weights.npz", **{f"params/{k}": v for k, v in params.items()}, **extra)
    assert_same(to_official_dreamerv3(load_official_dreamerv3(tmp_path / "weights.npz", **spaces)), params)
    save = tmp_path / "ckpt" / "20250601T120000F000000"
    save.mkdir(parents=True)
    (tmp_path / "ckpt" / "latest").write_text(save.name)
    (save / "done").write_bytes(b"")
    content = {"params": {**params, "opt/step": np.zeros((), np.int32)}, "counters": {"updates": 3}}
    (save / "agent.pkl").write_bytes(pickle.dumps(content))
    assert_same(to_official_dreamerv3(load_official_dreamerv3(tmp_path / "ckpt", **spaces)), params)
    (save / "agent.pkl").write_bytes(pickle.dumps({"params": print}))
    with pytest.raises(FileFormatError):
        load_official_dreamerv3(tmp_path / "ckpt", **spaces)


def test_missing_slow_critic_and_range_take_their_initial_values(recorded):
    params, spaces = recorded("vector-discrete")
    bare = {k: v for k, v in params.items() if k.split("/")[0] not in ("slowval", "slowval_count", "retnorm")}
    again = to_official_dreamerv3(load_official_dreamerv3(bare, **spaces))
    for name in again:
        if name.startswith("slowval/"):
            np.testing.assert_array_equal(again[name], params[name.removeprefix("slow")])
    assert again["retnorm/lo/value"] == again["retnorm/hi/value"] == 0


def test_weights_that_do_not_fit_are_named(recorded):
    params, spaces = recorded("vector-discrete")
    with pytest.raises(WeightsError, match="enc/mlp0/kernel has shape"):
        load_official_dreamerv3(params, **{**spaces, "obs_shape": (12,)})
    with pytest.raises(WeightsError, match="pol/head/action/mean/bias is missing"):
        load_official_dreamerv3(params, **{**spaces, "action_type": "continuous"})
    with pytest.raises(WeightsError, match="dec/vec/state/pred"):
        load_official_dreamerv3(params, **{**spaces, "obs_shape": {"state": (11,)}})
    with pytest.raises(WeightsError, match="dyn/extra/kernel is unexpected"):
        load_official_dreamerv3({**params, "dyn/extra/kernel": np.zeros(2)}, **spaces)
    with pytest.raises(WeightsError, match="dyn/dyngru/bias is missing"):
        load_official_dreamerv3({k: v for k, v in params.items() if k != "dyn/dyngru/bias"}, **spaces)
    with pytest.raises(WeightsError, match="not the weights of a DreamerV3"):
        load_official_dreamerv3({}, **spaces)


def test_classes_must_be_given_where_the_latents_are_not_32(recorded):
    params, spaces = recorded("vector-discrete")
    del spaces["num_categories"]
    with pytest.raises(ConfigError, match="num_categories"):
        load_official_dreamerv3(params, **spaces)


def test_classes_follow_from_32_latents():
    config = DreamerV3Config.from_size("size1m", obs_shape=(4,), action_dim=2)
    shapes = flatten(abstract_params(DreamerV3WorldModel, config))
    arrays = {official_name(name): np.zeros(leaf.shape, np.float32) for name, leaf in shapes.items()}
    loaded = load_official_dreamerv3(arrays, obs_shape=(4,), action_dim=2).config
    assert loaded == config.replace(kl_scale=1.1, kl_balance=1 / 1.1, cnn_depth=48)


def test_every_weight_of_a_mixed_model_has_its_own_name():
    config = DreamerV3Config.from_size(
        "tiny",
        obs_shape={"camera": (64, 64, 3), "joints": (5,), "touch": (2,)},
        action_dim={"move": 2, "grip": 3},
        action_type={"move": "continuous", "grip": "discrete"},
    )
    names = [official_name(name) for name in flatten(abstract_params(DreamerV3WorldModel, config))]
    assert len(set(names)) == len(names)
    assert {"pol/head/move/stddev/kernel", "pol/head/grip/logits/bias", "dec/vec/joints/pred/bias"} <= set(names)
    modules = {name.split("/")[0] for name in names}
    assert modules == {"enc", "dyn", "dec", "rew", "con", "pol", "val", "slowval", "retnorm"}
