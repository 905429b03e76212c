"""Models go to disk and come back the same; what does not fit is named."""

import json

import jax
import numpy as np
import pytest

import worldloom
from worldloom import (
    ConfigError,
    DeviceError,
    DreamerV3WorldModel,
    FileFormatError,
    TDMPC2Config,
    TDMPC2WorldModel,
    UnknownModelError,
    WeightsError,
    create_world_model,
    from_pretrained,
    get_config,
    list_models,
)
from worldloom.devices import compute_dtype, resolve_device
from worldloom.models.params import flatten

SIZES = {"encoder_dim": 16, "hidden_dim": 16, "latent_dim": 16, "num_q": 2}


@pytest.fixture(scope="module")
def model():
    return TDMPC2WorldModel(TDMPC2Config(obs_shape=(3,), action_dim=1, **SIZES), seed=3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLDLOOM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def same_weights(one, other):
    a, b = flatten(jax.device_get(one.params)), flatten(jax.device_get(other.params))
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and np.array_equal(a[k], b[k]) for k in a
    )


def test_a_folder_brings_back_config_and_weights(model, tmp_path):
    folder = model.save_pretrained(tmp_path / "deep" / "model")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    for again in (
        create_world_model(folder),
        create_world_model(str(folder), obs_shape=(3,), action_dim=1),
        from_pretrained(folder),
        TDMPC2WorldModel.from_pretrained(folder),
    ):
        assert again.config == model.config
        assert same_weights(again, model)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "tdmpc2"


def test_a_name_goes_to_the_cache_and_comes_from_it(model, cache):
    folder = model.save_pretrained(name="my.model-1")
    assert folder == cache / "models" / "my.model-1"
    assert "my.model-1" in list_models()
    assert same_weights(create_world_model("my.model-1"), model)
    for bad in ("../out", "a/b", "", "/abs"):
        with pytest.raises(ConfigError, match="plain name"):
            model.save_pretrained(name=bad)
    with pytest.raises(TypeError, match="either a path or name"):
        model.save_pretrained()


def test_overrides_change_what_does_not_touch_shapes(model, tmp_path):
    folder = model.save_pretrained(tmp_path / "model")
    assert create_world_model(folder, num_samples=64, num_elites=8).config.num_samples == 64
    with pytest.raises(WeightsError, match="has shape"):
        create_world_model(folder, hidden_dim=24)


def test_shapes_are_checked_against_a_saved_model(model, tmp_path):
    folder = model.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"obs_shape=\(3,\), not \(4,\)"):
        create_world_model(folder, obs_shape=(4,))


def test_the_other_family_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="TDMPC2WorldModel"):
        DreamerV3WorldModel.from_pretrained(model.save_pretrained(tmp_path / "model"))
    with pytest.raises(TypeError, match="takes a DreamerV3Config"):
        DreamerV3WorldModel(model.config)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda f: (f / "config.json").write_text('{"model_type": "muzero"}'), ConfigError, "muzero"),
        (lambda f: (f / "config.json").write_text("{"), FileFormatError, "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), FileFormatError, "JSON object"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), FileFormatError, "not valid JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), FileFormatError, "not valid JSON"),
        (lambda f: (f / "config.json").write_text(" " * (2 << 20)), FileFormatError, "bytes"),
        (lambda f: (f / "config.json").unlink(), UnknownModelError, "config.json is missing"),
        (lambda f: (f / "model.safetensors").unlink(), UnknownModelError, "model.safetensors is missing"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04K\x01."), FileFormatError, "safetensors"),
        (lambda f: cut(f / "model.safetensors", -100), FileFormatError, "safetensors"),
        (lambda f: cut(f / "model.safetensors", 40), FileFormatError, "safetensors"),
    ],
)
def test_damaged_folders_are_named(model, tmp_path, change, error, message):
    folder = model.save_pretrained(tmp_path / "model")
    change(folder)
    with pytest.raises(error, match=message):
        create_world_model(folder)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def test_missing_and_unexpected_weights_are_named(model):
    params = model.params
    params["novel"] = {"kernel": np.zeros(2)}
    del params["reward"]
    with pytest.raises(WeightsError, match=r"reward.* is missing.*") as caught:
        model.load_params(params)
    assert "and" in str(caught.value)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UnknownModelError, match="Did you mean 'dreamerv3:size12m'"):
        create_world_model("dreamerv3:size12", obs_shape=(3,), action_dim=1)
    with pytest.raises(UnknownModelError, match="Known: dreamerv3:tiny"):
        create_world_model("no-such-model")
    with pytest.raises(UnknownModelError, match="not a folder"):
        create_world_model("some/where/deep")
    with pytest.raises(ConfigError, match="give the shapes too"):
        create_world_model("tdmpc2:5m")


def test_presets_by_name():
    assert {"dreamerv3:size1m", "dreamerv3:size400m", "tdmpc2:1m", "tdmpc2:317m", "tdmpc2:tiny"} <= set(list_models())
    config = get_config("dreamerv3:size12m", obs_shape=(64, 64, 3), action_dim=4, action_type="discrete")
    assert (config.deter_dim, config.action_type) == (2048, "discrete")
    assert get_config("tdmpc2", obs_shape=(3,), action_dim=1) == TDMPC2Config(obs_shape=(3,), action_dim=1)


def test_an_unwritable_place_is_an_error_and_leaves_nothing(model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        model.save_pretrained(tmp_path / "file" / "model")
    assert (tmp_path / "file").read_text() == "in the way"


def test_devices():
    assert resolve_device("cpu").platform == "cpu"
    assert resolve_device("cpu:0") == jax.devices("cpu")[0]
    with pytest.raises(ConfigError, match="gpu1"):
        resolve_device("gpu1")
    with pytest.raises(DeviceError, match="JAX sees: cpu:0"):
        resolve_device("tpu:7")
    assert compute_dtype("auto", jax.devices("cpu")[0]) == np.float32
    assert compute_dtype("bfloat16").name == "bfloat16"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="speaks of a machine without a GPU")
def test_cuda_without_a_gpu_says_so_once(caplog):
    from worldloom.devices import _warn_once

    _warn_once.cache_clear()
    for _ in range(3):
        assert resolve_device("cuda").platform == "cpu"
    assert [record.getMessage() for record in caplog.records] == [
        "device='cuda' is not available here; training on cpu (cpu)."
    ]


def test_seeds_make_models():
    config = TDMPC2Config(obs_shape=(3,), action_dim=1, **SIZES)
    assert same_weights(TDMPC2WorldModel(config, seed=5), TDMPC2WorldModel(config, seed=5))
    assert not same_weights(TDMPC2WorldModel(config, seed=5), TDMPC2WorldModel(config, seed=6))
    assert worldloom.__version__
