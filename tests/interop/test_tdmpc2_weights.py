"""Weights of the TD-MPC2 reference program: three layouts are read, the current one is written."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_same

from worldloom.errors import ConfigError, WeightsError
from worldloom.interop import load_official_tdmpc2, to_official_tdmpc2
from worldloom.interop.tdmpc2 import _read
from worldloom.models.params import flatten
from worldloom.models.tdmpc2 import TDMPC2Config, TDMPC2WorldModel, init_state
from worldloom.training.config import TrainingConfig

DATA = Path(__file__).resolve().parents[1] / "data"
VARIANTS = ("single", "episodic")


def weights_of(recorded):
    return {name.removeprefix("params/"): value for name, value in recorded.items() if name.startswith("params/")}


def assert_same_model(one, other):
    assert one.config == other.config
    assert_same(one.params, other.params)


@pytest.mark.parametrize("variant", [*VARIANTS, "multitask", "image"])
def test_export_after_import_gives_the_same_arrays(variant, golden):
    official = weights_of(golden(f"tdmpc2-{variant}-s0"))
    exported = to_official_tdmpc2(load_official_tdmpc2(official))
    assert set(exported) == set(official)
    for name, value in official.items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name)
        assert exported[name].dtype == value.dtype, name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["current", "2023"])
def test_pt_files_hold_the_recorded_weights(variant, layout):
    npz = load_official_tdmpc2(DATA / f"tdmpc2-{variant}-s0.npz")
    assert_same_model(load_official_tdmpc2(DATA / f"tdmpc2-{variant}-s0-{layout}.pt"), npz)


def before_release(official):
    """The same weights in the layout from before the release."""
    old = {}
    for name, value in official.items():
        found = re.fullmatch(r"(_encoder\.state|_dynamics|_reward|_pi)\.(\d)\.(ln\.)?(weight|bias)", name)
        if found:
            module, index = found[1], 3 * int(found[2]) + (found[3] is not None)
            if module == "_encoder.state":
                index += 1
            if module == "_dynamics":
                module = "_dynamics" if index == 7 else "_dynamics.0"
                index = 1 if index == 7 else index
            old[f"{module}.{index}.{found[4]}"] = value
        elif "Qs" in name:
            part = ("weight", "bias", "ln.weight", "ln.bias").index(re.sub(r".*\.\d\.", "", name))
            layer = int(re.search(r"\.(\d)\.", name)[1])
            old[f"{'_target_Qs' if 'target' in name else '_Qs'}.params.{4 * layer + part}"] = value
    return old


def test_oldest_layout_turns_symlog_observations_on(golden):
    official = weights_of(golden("tdmpc2-single-s0"))
    old = before_release(official)
    names = {"_encoder.state.1.weight", "_encoder.state.5.bias", "_dynamics.0.6.weight", "_dynamics.1.bias",
             "_reward.6.weight", "_pi.4.bias", "_Qs.params.9", "_target_Qs.params.0"}  # fmt: skip
    assert names <= set(old)
    assert len(old) == 60
    model = load_official_tdmpc2({"model": old})
    assert model.config.symlog_obs
    assert_same_model(model, load_official_tdmpc2(official, symlog_obs=True))


def test_sizes_are_inferred(golden):
    config = load_official_tdmpc2(golden("tdmpc2-episodic-s0")).config
    sizes = (config.obs_shape, config.action_dim, config.latent_dim, config.hidden_dim, config.encoder_dim)
    assert sizes == ((7,), 2, 24, 40, 24)
    assert (config.encoder_layers, config.num_q, config.episodic, config.multitask) == (3, 5, True, False)
    config = load_official_tdmpc2(golden("tdmpc2-multitask-s0")).config
    assert (config.obs_shape, config.num_tasks, config.task_dim, config.num_q) == ((9,), 4, 12, 8)
    assert config.action_dims == (3, 1, 2, 3)
    assert load_official_tdmpc2(golden("tdmpc2-image-s0")).config.obs_shape == (9, 64, 64)


def test_bookkeeping_and_copies_are_ignored_and_missing_targets_are_copied(golden):
    official = weights_of(golden("tdmpc2-single-s0"))
    extra = {
        "_Qs.params.__batch_size": np.zeros(1),
        "_Qs.module.0.weight": np.zeros(1),
        "_detach_Qs_params.0.weight": np.zeros(1),
    }
    assert_same_model(load_official_tdmpc2(official | extra), load_official_tdmpc2(official))
    online = load_official_tdmpc2({name: value for name, value in official.items() if "target" not in name})
    jax.tree.map(np.testing.assert_array_equal, online.params["q"], online.params["target_q"])


def test_tasks_determine_episode_lengths_and_action_dimensions(golden):
    official = weights_of(golden("tdmpc2-single-s0"))
    gamma = lambda task: load_official_tdmpc2(official, task=task).config.discounts[0]  # noqa: E731
    assert gamma("walker-run") == pytest.approx(0.99)
    assert [gamma(task) for task in ("mw-assembly", "myo-hand-reach", "pick-cube")] == pytest.approx([0.95] * 3)
    with pytest.raises(ConfigError, match="mt70"):
        load_official_tdmpc2(official, task="mt70")
    with pytest.raises(ConfigError, match="walker-run"):
        load_official_tdmpc2(official, task="walkerrun")


@pytest.mark.parametrize(("task", "num_tasks"), [("mt30", 30), ("mt80", 80)])
def test_published_task_sets(task, num_tasks):
    config = TDMPC2Config.from_size(
        "tiny", obs_shape=(24,), action_dim=6, num_tasks=num_tasks, task_dim=8, action_dims=[6] * num_tasks
    )
    without_masks = to_official_tdmpc2(TDMPC2WorldModel(config))
    del without_masks["_action_masks"]
    with pytest.warns(UserWarning, match="action_dims"):
        load_official_tdmpc2(without_masks)
    loaded = load_official_tdmpc2(without_masks, task=task).config
    assert loaded.action_dims[:8] == (6, 6, 6, 6, 2, 2, 1, 1)
    assert loaded.action_dims[26:30] == (3, 3, 2, 1)
    assert loaded.episode_lengths == (500,) * 30 + (100,) * (num_tasks - 30)
    assert set(loaded.action_dims[30:]) <= {4}


def test_weights_that_do_not_match_are_named(golden):
    official = weights_of(golden("tdmpc2-single-s0"))
    without = {name: value for name, value in official.items() if name != "_reward.1.ln.bias"}
    with pytest.raises(WeightsError, match=r"_reward\.1\.ln\.bias is missing"):
        load_official_tdmpc2(without)
    with pytest.raises(WeightsError, match=r"_extra is unexpected"):
        load_official_tdmpc2(official | {"_extra": np.zeros(1)})
    with pytest.raises(WeightsError, match=r"_pi\.0\.bias has shape \(3,\), \(48,\) is expected"):
        load_official_tdmpc2(official | {"_pi.0.bias": np.zeros(3)})
    with pytest.raises(WeightsError, match="not the weights of a TD-MPC2"):
        load_official_tdmpc2({"enc/mlp0/kernel": np.zeros((2, 2))})


WRAPPERS = {
    "compiled": lambda weights: prefixed(weights, "_orig_mod."),
    "parallel": lambda weights: prefixed(weights, "module."),
    "both": lambda weights: prefixed(weights, "module._orig_mod.module."),
    "agent": lambda weights: prefixed(weights, "model."),
    "params": lambda weights: prefixed(weights, "params/"),
    "state_dict": lambda weights: {"state_dict": weights, "step": 3},
    "model": lambda weights: {"model": prefixed(weights, "module.")},
    "nested": lambda weights: {"state_dict": {"model": {"state_dict": prefixed(weights, "_orig_mod.")}}},
    "parts": lambda weights: {re.sub(r"^(\w+)\.", r"\1._orig_mod.", name): x for name, x in weights.items()},
}


def prefixed(weights, prefix):
    return {prefix + name: value for name, value in weights.items()}


def published(layout):
    """Names and arrays of a recorded file in one of the three layouts."""
    if layout == "before the release":
        return before_release(weights_of(np.load(DATA / "tdmpc2-single-s0.npz")))
    return _read(DATA / f"tdmpc2-single-s0-{layout}.pt")[0]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_and_nesting_of_wrappers_are_read(wrapper, golden):
    official = weights_of(golden("tdmpc2-single-s0"))
    assert_same_model(load_official_tdmpc2(WRAPPERS[wrapper](official)), load_official_tdmpc2(official))


@pytest.mark.parametrize("layout", ["current", "2023", "before the release"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_what_is_missing_is_named_as_the_file_names_it(layout, prefix):
    weights = published(layout)
    names = [name for name in weights if not name.startswith(("log_std", "_action_masks", "_detach"))]
    for name in names[::5]:
        rest = prefixed({other: value for other, value in weights.items() if other != name}, prefix)
        with pytest.raises(WeightsError, match=rf"(^|\s){re.escape(prefix + name)} is missing"):
            load_official_tdmpc2(rest)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "the names here: none"),
        ({"module.a": np.zeros(1)}, r"^module\._reward\.0\.weight is missing: .* the names here: module\.a\.$"),
        ({"state_dict": 3}, "the names here: state_dict"),
        ({"_reward.0.weight": np.zeros(3)}, r"_reward\.0\.weight has shape \(3,\); 2 axes"),
        ({"a": np.zeros(1), "module.a": np.zeros(1)}, "there twice"),
    ],
)
def test_files_of_other_programs_are_told_apart(weights, message):
    with pytest.raises(WeightsError, match=message):
        load_official_tdmpc2(weights)


def test_vectors_by_name_are_one_state_encoder(golden):
    official = weights_of(golden("tdmpc2-single-s0"))
    plain = load_official_tdmpc2(official)
    (width,) = plain.config.obs_shape
    named = load_official_tdmpc2(official, obs_shape={"b": (width - 1,), "a": (1,)})
    exported = to_official_tdmpc2(named)
    assert set(exported) == set(official)
    np.testing.assert_array_equal(exported["_encoder.state.0.weight"], official["_encoder.state.0.weight"])


@pytest.mark.parametrize("shape", [(84, 84, 3), (7, 7, 3), {"cam": (3, 64, 64), "pos": (2,)}])
def test_encoders_that_the_reference_lacks_are_not_exported(shape):
    config = TDMPC2Config.from_size("tiny", obs_shape=shape, action_dim=2)
    with pytest.raises(ConfigError, match=r"has no such encoder: .*save_pretrained"):
        to_official_tdmpc2(TDMPC2WorldModel(config))


def test_a_train_state_exports_its_trained_weights(golden):
    model = load_official_tdmpc2(golden("tdmpc2-single-s0"))
    state = init_state(model, TrainingConfig(), jax.random.key(0))
    state = state.replace(params=jax.tree.map(lambda x: x + jnp.ones_like(x), state.params))
    before, after = to_official_tdmpc2(model), to_official_tdmpc2(state)
    np.testing.assert_allclose(after["_pi.0.weight"], before["_pi.0.weight"] + 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pytorch_loads_the_export(variant, golden, tmp_path):
    torch = pytest.importorskip("torch")
    exported = to_official_tdmpc2(load_official_tdmpc2(golden(f"tdmpc2-{variant}-s0")))
    torch.save({"model": {name: torch.from_numpy(value) for name, value in exported.items()}}, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)["model"]
    np.testing.assert_array_equal(loaded["_pi.0.weight"].numpy(), exported["_pi.0.weight"])
    assert_same_model(load_official_tdmpc2(loaded), load_official_tdmpc2(tmp_path / "model.pt"))


def test_a_state_of_many_tasks_needs_the_config_for_their_actions(golden, caplog):
    model = load_official_tdmpc2(golden("tdmpc2-multitask-s0"))
    state, whole = init_state(model, TrainingConfig(), jax.random.key(0)), to_official_tdmpc2(model)
    with_config = to_official_tdmpc2(state, config=model.config)
    assert with_config.keys() == whole.keys()
    assert not caplog.messages
    assert to_official_tdmpc2(state).keys() == whole.keys() - {"_action_masks"}
    assert "config=model.config" in caplog.text
    for name, value in whole.items():
        np.testing.assert_array_equal(with_config[name], value)


def test_explorers_start_anew_and_are_not_exported(golden):
    official = weights_of(golden("tdmpc2-single-s0"))
    model = load_official_tdmpc2(official, explore="disagreement")
    assert any(name.startswith("explorer.") for name in flatten(model.params))
    exported = to_official_tdmpc2(model)
    assert set(exported) == set(official)
    for name, value in official.items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name)
