"""New models that begin with the weights of others: what is taken, what begins anew, and what is said of it."""

import logging

import numpy as np
import pytest

from worldloom import create_world_model
from worldloom.errors import ConfigError
from worldloom.models.params import flatten

DREAMER = {
    "deter_dim": 32,
    "stoch_dim": 16,
    "num_categories": 4,
    "hidden_dim": 8,
    "mlp_layers": 1,
    "precision": "float32",
    "device": "cpu",
}
TDMPC2 = {
    "latent_dim": 16,
    "simnorm_dim": 4,
    "hidden_dim": 8,
    "encoder_dim": 8,
    "num_bins": 11,
    "precision": "float32",
    "device": "cpu",
}


def tdmpc2(obs=5, action=2, seed=0, **fields):
    return create_world_model("tdmpc2:tiny", obs_shape=(obs,), action_dim=action, seed=seed, **{**TDMPC2, **fields})


@pytest.fixture(scope="module")
def trained():
    """A model whose arrays are all different from new ones."""
    model = tdmpc2(seed=3)
    model.load_params(_changed(model.params))
    return model


def _changed(params):
    return {k: _changed(v) if isinstance(v, dict) else np.asarray(v) + np.float32(1.5) for k, v in params.items()}


def arrays(model):
    return {name: np.asarray(array) for name, array in flatten(model.params).items()}


def test_a_model_of_the_same_shapes_takes_everything(trained, tmp_path, caplog):
    trained.save_pretrained(tmp_path / "saved")
    with caplog.at_level(logging.INFO, "worldloom"):
        model = tdmpc2(init_from=tmp_path / "saved")
    for name, array in arrays(trained).items():
        np.testing.assert_array_equal(arrays(model)[name], array)
    report = model.init_report
    assert (report.reset, report.refused) == ({}, {})
    assert f"{len(report.taken)} arrays taken, 0 begin anew, 0 not used" in caplog.text
    assert "optimizer begins anew" in caplog.text
    assert trained.init_report is None


def test_arrays_of_another_shape_begin_anew_and_are_named(trained):
    model, fresh = tdmpc2(obs=7, action=3, seed=9, init_from=trained), tdmpc2(obs=7, action=3, seed=9)
    report = model.init_report
    expected = {"encoder.mlp.hidden.0.affine.kernel", "policy.mlp.head.kernel", "policy.mlp.head.bias"}
    expected |= {f"{part}.hidden.0.affine.kernel" for part in ("dynamics", "reward", "q.members", "target_q.members")}
    assert set(report.reset) == expected
    assert "(5, 8) → (7, 8)" in report.reset["encoder.mlp.hidden.0.affine.kernel"]
    for name, array in arrays(model).items():
        source = arrays(fresh) if name in report.reset else arrays(trained)
        np.testing.assert_array_equal(array, source[name])


def test_what_is_reset_takes_its_slow_copy_and_statistics_along(trained):
    report = tdmpc2(init_from=trained, reset=["q"]).init_report
    assert {name.partition(".")[0] for name in report.reset} == {"q", "target_q", "scale"}
    report = tdmpc2(init_from=trained, reset=["reward"]).init_report
    assert {name.partition(".")[0] for name in report.reset} == {"reward", "scale"}
    report = tdmpc2(init_from=trained, reset=["policy", "encoder.mlp.head"]).init_report
    assert "encoder.mlp.hidden.0.affine.kernel" in report.taken
    assert "encoder.mlp.head.affine.kernel" in report.reset


def test_what_the_new_model_has_no_place_for_is_named(trained):
    model = tdmpc2(seed=1, episodic=True, init_from=trained)
    assert {name.partition(".")[0] for name in model.init_report.reset} == {"termination"}
    report = tdmpc2(init_from=model).init_report
    assert {name.partition(".")[0] for name in report.refused} == {"termination"}
    assert "episodic True → False" in str(report)


def test_dreamer_begins_with_the_weights_of_another(tmp_path):
    source = create_world_model("dreamerv3:tiny", obs_shape=(4,), action_dim=2, seed=5, **DREAMER)
    model = create_world_model(
        "dreamerv3:tiny", obs_shape=(4,), action_dim=2, init_from=source, reset=["critic"], **DREAMER
    )
    parts = {name.partition(".")[0] for name in model.init_report.reset}
    assert parts == {"critic", "slow_critic", "return_range"}
    np.testing.assert_array_equal(arrays(model)["rssm.core.gates.kernel"], arrays(source)["rssm.core.gates.kernel"])


def test_a_single_task_begins_with_a_task_of_a_multitask_model():
    source = tdmpc2(obs=7, action=4, num_tasks=3, task_dim=5, action_dims=(2, 4, 1), seed=2)
    model = tdmpc2(obs=5, action=2, init_from=source, task_like=0)
    assert model.init_report.reset == {}
    single = source.single_task(0, obs_dim=5)
    for name, array in arrays(single).items():
        np.testing.assert_array_equal(arrays(model)[name], array)


def test_the_folder_of_a_run_is_taken_for_its_model(trained, tmp_path):
    trained.save_pretrained(tmp_path / "run" / "model")
    assert tdmpc2(init_from=tmp_path / "run").init_report.reset == {}


def test_what_makes_no_sense_is_refused(trained, tmp_path):
    multitask = tdmpc2(num_tasks=2, task_dim=3)
    dreamer = create_world_model("dreamerv3:tiny", obs_shape=(5,), action_dim=2, **DREAMER)
    cases = [
        ({"init_from": dreamer}, "is a dreamerv3 model; a tdmpc2 model cannot"),
        ({"init_from": trained, "reset": ["rewards"]}, "Did you mean 'reward'"),
        ({"init_from": trained, "reset": "reward"}, "must be a list"),
        ({"init_from": trained, "task_like": 0}, "single task already"),
        ({"init_from": multitask}, "say which one it is like"),
        ({"init_from": multitask, "task_like": 5}, "There is no task 5"),
        ({"task_like": 0}, "give init_from too"),
        ({"reset": ["q"]}, "give init_from too"),
    ]
    for fields, message in cases:
        with pytest.raises(ConfigError, match=message):
            tdmpc2(**fields)
    trained.save_pretrained(tmp_path / "x")
    with pytest.raises(ConfigError, match="is a saved model"):
        create_world_model(tmp_path / "x", init_from=trained)
