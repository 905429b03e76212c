"""Names of the earlier library are met with the new one, and names are found where users look for them."""

import copy
import pkgutil
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from worldloom import (
    ConfigError,
    DreamerV3Config,
    ReplayBuffer,
    TDMPC2Config,
    Trainer,
    TrainingConfig,
    UnknownFieldError,
    UnknownModelError,
    create_world_model,
    get_model_info,
    list_models,
)
from worldloom.config import nearest
from worldloom.families import get_family
from worldloom.migration import MODELS, PUBLIC_NAMES
from worldloom.models.compilation import trained_parameters

SHAPES = {"obs_shape": (3,), "action_dim": 1}


@pytest.fixture(scope="module")
def model():
    return create_world_model("tdmpc2:tiny", **SHAPES)


@pytest.fixture
def buffer():
    buffer = ReplayBuffer(100)
    buffer.add_episode(np.zeros((11, 3)), np.zeros((10, 1)), np.zeros(10), terminated=True)
    return buffer


@pytest.mark.parametrize("place", ["worldloom", "worldloom.training", "worldloom.models"])
def test_an_earlier_name_says_what_replaces_it_however_it_is_imported(place):
    module = __import__(place, fromlist=["_"])
    for name, sentence in PUBLIC_NAMES.items():
        assert not hasattr(module, name)
        with pytest.raises(AttributeError, match=re.escape(sentence)):
            getattr(module, name)
        with pytest.raises(ImportError, match=re.escape(sentence)):
            exec(f"from {place} import {name}")


def test_the_module_of_random_buffers_says_what_replaces_it():
    with pytest.raises(ImportError, match=r"collect\(model, env, env_steps\)"):
        exec("from worldloom.training.data import create_random_buffer")
    with pytest.raises(ImportError, match=r"worldloom\.training"):
        exec("from worldloom.training.data import ReplayBuffer")
    with pytest.raises(ImportError, match="cannot import name"):
        exec("from worldloom.training.data import anything_else")


def test_what_replaces_an_earlier_name_exists():
    for sentence in PUBLIC_NAMES.values():
        for name in re.findall(r"worldloom(?:\.\w+)+", sentence):
            assert pkgutil.resolve_name(name), name
    assert {*MODELS.values()} <= {*list_models()}


@pytest.mark.parametrize(("name", "preset"), MODELS.items())
def test_an_earlier_alias_names_the_preset_that_it_was(name, preset):
    for use in (lambda: create_world_model(name, **SHAPES), lambda: get_model_info(name)):
        with pytest.raises(UnknownModelError, match=f"Did you mean '{preset}'"):
            use()


@pytest.mark.parametrize("name", ["dreamerv3:size12M", "DreamerV3:size12m", "dreamerv3:Size12M"])
def test_upper_and_lower_case_are_told_apart_and_explained(name):
    with pytest.raises(UnknownModelError, match="Did you mean 'dreamerv3:size12m'"):
        create_world_model(name, **SHAPES)
    with pytest.raises(ConfigError, match="Did you mean 'size12m'"):
        DreamerV3Config.from_size("size12M", **SHAPES)
    with pytest.raises(ConfigError, match="Did you mean '5m'"):
        TDMPC2Config.from_size("5M", **SHAPES)


@pytest.mark.parametrize(
    ("make", "field", "expected"),
    [
        (lambda **fields: TDMPC2Config(**SHAPES, **fields), "num_q_networks", "'num_q'"),
        (lambda **fields: TDMPC2Config(**SHAPES, **fields), "num_hidden_layers", "'mlp_layers'"),
        (lambda **fields: DreamerV3Config(**SHAPES, **fields), "stoch_classes", "'num_categories'"),
        (lambda **fields: DreamerV3Config(**SHAPES, **fields), "free_nats", "'kl_free'"),
        (lambda **fields: DreamerV3Config(**SHAPES, **fields), "lr", "TrainingConfig(learning_rate=…)"),
        (lambda **fields: TDMPC2Config(**SHAPES, **fields), "grad_clip", "TrainingConfig(grad_clip=…)"),
        (TrainingConfig, "lr", "'learning_rate'"),
        (TrainingConfig, "seq_len", "'sequence_length'"),
        (TrainingConfig, "max_steps", "'total_steps'"),
        (ReplayBuffer, "max_size", "It takes capacity"),
    ],
)
def test_an_earlier_field_names_the_new_one(make, field, expected):
    with pytest.raises(UnknownFieldError, match=re.escape(expected)):
        make(**{field: 1})


def test_flags_of_the_command_line_follow_the_same_rule():
    assert nearest("--lr", ["--log-interval", "--learning-rate"]) == " Did you mean '--learning-rate'?"
    assert nearest("--Batch_Size", ["--batch-length", "--batch-size"]) == " Did you mean '--batch-size'?"


def test_arguments_of_sample_are_explained(buffer):
    with pytest.raises(UnknownFieldError, match="Did you mean 'sequence_length'"):
        buffer.sample(2, seq_len=5)
    with pytest.raises(TypeError, match=r"TrainingConfig\.device"):
        buffer.sample(2, 5, device="cuda")
    with pytest.raises(TypeError, match="It takes model, config, callbacks"):
        Trainer(None, optimizer="adam")


def test_a_batch_has_continues_beside_terminations(buffer):
    batch = buffer.sample(2, 11)
    np.testing.assert_array_equal(batch["continues"], 1 - batch["is_terminal"].astype(np.float32))
    assert batch["continues"].dtype == np.float32
    assert batch["continues"][:, -1].tolist() == [0, 0]


def test_fields_of_states_are_explained(model):
    state = model.encode(np.zeros((2, 3), np.float32))
    for name in ("deterministic", "stochastic"):
        with pytest.raises(AttributeError, match="It is called 'z' here"):
            getattr(state, name)
    with pytest.raises(AttributeError, match="device_put"):
        state.to("cpu")
    states = model.imagine(state, np.zeros((4, 2, 1), np.float32)).states
    with pytest.raises(TypeError, match=re.escape("jax.tree.map(lambda x: x[-1], states)")):
        states[-1]
    with pytest.raises(TypeError, match="not a list"):
        list(states)


def test_fields_of_a_state_with_two_parts_are_explained():
    from worldloom.models.dreamer.rssm import Latent

    latent = Latent(np.zeros((2, 8)), np.zeros((2, 4, 4)))
    with pytest.raises(AttributeError, match="'deter'"):
        _ = latent.deterministic
    with pytest.raises(AttributeError, match="'stoch'"):
        _ = latent.stochastic
    assert repr(copy.deepcopy(latent)) == "Latent(deter=float64[2, 8], stoch=float64[2, 4, 4])"


def test_methods_of_trainer_and_buffer_are_explained(model, buffer):
    trainer = Trainer(model, TrainingConfig(device="cpu"), [])
    with pytest.raises(AttributeError, match=r"callbacks=\[…\]"):
        trainer.add_callback(print)
    with pytest.raises(AttributeError, match=r"len\(buffer\)"):
        _ = buffer.num_transitions


def test_texts_of_objects_are_short(model):
    state = model.encode(np.zeros((2, 3), np.float32))
    future = model.imagine(state, np.zeros((4, 2, 1), np.float32))
    trainer = Trainer(model, TrainingConfig(device="cpu"), [])
    assert repr(future) == (
        "Trajectory(states=LatentState(z=float32[5, 2, 64]), rewards=float32[4, 2], continues=float32[4, 2])"
    )
    assert str(model) == repr(model)
    assert repr(model).startswith("TDMPC2WorldModel(tdmpc2: observations (3,), 1 continuous actions, 71,921 parameters")
    assert re.fullmatch(r"TrainState\(step=0, params=[\d,]+ numbers in \d+ arrays, opt_state=.*\)", repr(trainer.state))


def test_the_text_of_a_donated_state_says_nothing_of_its_step(model):
    state = Trainer(model, TrainingConfig(device="cpu"), []).state
    step = jax.device_put(np.int32(3))
    step.delete()
    assert "step=?" in repr(state.replace(step=step))


def test_names_are_importable_from_where_users_look():
    for module, names in {
        "worldloom": "Trainer TrainingConfig ReplayBuffer make_env recipe train",
        "worldloom.training": "Callback CheckpointCallback EarlyStoppingCallback EvalCallback LoggingCallback "
        "ProgressCallback StepInfo StopTraining",
        "worldloom.models": "DreamerV3Config DreamerV3WorldModel TDMPC2Config TDMPC2WorldModel WorldModel",
    }.items():
        package = __import__(module, fromlist=["_"])
        assert {*names.split()} <= {*dir(package)}
        assert all(getattr(package, name) is not None for name in package.__all__)


@pytest.mark.parametrize("name", ["dreamerv3:tiny", "tdmpc2:tiny", "tdmpc2:5m", "dreamerv3:size12m"])
def test_parameters_of_presets_are_those_of_their_models(name):
    check_parameters(name)


@pytest.mark.slow
def test_parameters_of_all_presets_are_those_of_their_models():
    for name in list_models():
        check_parameters(name)


def check_parameters(name):
    info = get_model_info(name)
    family = get_family(info["family"])
    config = family.config_class.from_size(info["size"], obs_shape=info["obs_shape"], action_dim=info["action_dim"])
    assert info["parameters"] == trained_parameters(family.model_class, config)


def test_all_models_are_listed_with_what_is_known_of_them(tmp_path, monkeypatch, model, caplog):
    monkeypatch.setenv("WORLDLOOM_CACHE_DIR", str(tmp_path))
    saved = model.save_pretrained(name="mine")
    damaged = tmp_path / "models" / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text("{", encoding="utf-8")
    found = list_models(verbose=True)
    assert list(found) == [name for name in list_models() if name != "damaged"]
    assert "damaged is left out" in caplog.text
    assert found["mine"] == {
        "name": "mine",
        "family": "tdmpc2",
        "size": "",
        "about": "TD-MPC2 (Hansen, Su, Wang 2024)",
        "parameters": model.num_parameters(),
        "obs_shape": (3,),
        "action_dim": 1,
        "path": str(saved),
    }
    assert get_model_info(str(saved))["parameters"] == model.num_parameters()
    assert Path(found["mine"]["path"]).is_dir()


def test_every_preset_of_the_built_in_families_has_its_parameters_written_down():
    for name in ("dreamerv3", "tdmpc2"):
        config_class = get_family(name).config_class
        assert tuple(config_class.preset_parameters) == config_class.presets()
