"""Open-loop predictions of a DreamerV3 model, and of an oracle with a known error."""

import jax
import numpy as np
import pytest

from worldloom.errors import DataError
from worldloom.models.dreamer import DreamerV3Config, DreamerV3WorldModel
from worldloom.report.openloop import OpenLoop, open_loop

SMALL = {
    "deter_dim": 32,
    "stoch_dim": 12,
    "num_categories": 4,
    "hidden_dim": 8,
    "cnn_depth": 2,
    "mlp_layers": 1,
    "precision": "float32",
}
B, T = 2, 6


@pytest.fixture(scope="module")
def model():
    return DreamerV3WorldModel(
        DreamerV3Config(obs_shape={"camera": (1, 48, 48), "joints": (3,)}, action_dim=2, **SMALL)
    )


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {
        "obs": {
            "camera": rng.integers(0, 256, (B, T, 1, 48, 48)).astype(np.uint8),
            "joints": rng.normal(size=(B, T, 3)).astype(np.float32),
        },
        "actions": rng.uniform(-1, 1, (B, T, 2)).astype(np.float32),
        "is_first": np.arange(T)[None].repeat(B, 0) == 0,
    }


def test_observed_rows_are_reconstructed_and_the_rest_imagined(model, batch):
    report = open_loop(model, batch, observed=2)
    row = lambda t: jax.tree.map(lambda x: x[:, t], batch["obs"])  # noqa: E731
    state = model.encode(row(0))
    states = [state, model.observe(state, batch["actions"][:, 0], row(1))]
    for t in range(1, T - 1):
        states.append(model.predict(states[-1], batch["actions"][:, t]))
    for t, state in enumerate(states):
        expected = model.decode(state)["obs"]
        for name in ("camera", "joints"):
            np.testing.assert_allclose(report.prediction[name][:, t], expected[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(report.truth["camera"], batch["obs"]["camera"] / np.float32(255))
    np.testing.assert_array_equal(report.error["joints"], report.prediction["joints"] - batch["obs"]["joints"])
    assert report.rmse()["camera"].shape == (T,)


def test_rows_that_are_not_observed_do_not_change_the_prediction(model, batch):
    """The second half is imagined: changing the recorded rows there changes the truth, not the prediction."""
    before = open_loop(model, batch)
    assert before.observed == T // 2
    batch["obs"]["joints"][:, T // 2 :] += 3.0
    after = open_loop(model, batch)
    np.testing.assert_array_equal(before.prediction["joints"], after.prediction["joints"])
    np.testing.assert_allclose(after.truth["joints"][:, T // 2 :], before.truth["joints"][:, T // 2 :] + 3.0)
    sampled = open_loop(model, batch, key=jax.random.key(1))
    assert np.any(sampled.prediction["joints"] != after.prediction["joints"])


def test_strip_shows_truth_prediction_and_error(model, batch):
    picture = open_loop(model, batch).strip(sequences=1)
    assert picture.dtype == np.uint8
    assert picture.shape == (3 + 3 * 48, T * 48, 3)
    np.testing.assert_array_equal(picture[3 : 3 + 48, :48, 0], batch["obs"]["camera"][0, 0, 0])
    assert picture[0, 0, 1] > picture[0, 0, 0]  # observed is green
    assert picture[0, -1, 0] > picture[0, -1, 1]  # imagined is red


def test_strip_of_a_known_error():
    truth = np.zeros((1, 2, 4), np.float32)
    truth[0, 1] = [1.0, 2.0, 0.0, -1.0]
    exact = OpenLoop({"obs": truth}, {"obs": truth}, 1)
    error_band = exact.strip()[3 + 2 * 32 :]
    assert np.all(error_band == 128)
    assert not np.any(exact.rmse()["obs"])
    off = OpenLoop({"obs": truth + np.float32([3.0, 0, 0, 4.0])}, {"obs": truth}, 1)
    np.testing.assert_allclose(off.rmse()["obs"], 2.5)


def test_sequences_that_cannot_be_evaluated_are_refused(model, batch):
    with pytest.raises(DataError, match="give 1 to 5"):
        open_loop(model, batch, observed=T)
    batch["is_first"][1, 3] = True
    with pytest.raises(DataError, match="inside one"):
        open_loop(model, batch)
