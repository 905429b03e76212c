"""How far imagination can be believed: signals against values worked out by hand, and the picture of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from worldloom import create_world_model
from worldloom.errors import DataError
from worldloom.models.trust import horizon_errors
from worldloom.replay import ReplayBuffer
from worldloom.report.trust import draw_trust

pytest.importorskip("matplotlib")

SMALL = {
    "dreamerv3": {"deter_dim": 16, "stoch_dim": 16, "num_categories": 4, "hidden_dim": 8, "blocks": 4, "mlp_layers": 1},
    "tdmpc2": {"latent_dim": 16, "hidden_dim": 16, "encoder_dim": 8},
}


def small_model(family, **changes):
    model = create_world_model(f"{family}:tiny", obs_shape=(3,), action_dim=2, **SMALL[family], **changes)
    rng = np.random.default_rng(0)
    model.load_params(jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), model.params))
    return model


@pytest.fixture(scope="module")
def replay():
    rng, replay = np.random.default_rng(0), ReplayBuffer(1000)
    for _ in range(6):
        obs, actions = rng.normal(size=(21, 3)), rng.uniform(-1, 1, (20, 2))
        replay.add_episode(obs.astype(np.float32), actions.astype(np.float32), rng.normal(size=20).astype(np.float32))
    return replay


@pytest.fixture(scope="module")
def batch(replay):
    return replay.sample(5, 8)


def test_the_kl_of_dreamer_is_what_its_loss_minimises(batch):
    model = small_model("dreamerv3", kl_free=0.0)
    trust = model.trust(batch)
    assert trust.rows["kl"].shape == (5, 8)
    assert trust.units == {"kl": "nats"}
    np.testing.assert_allclose(trust.rows["kl"].mean(), model.compute_loss(batch)["dynamics"], rtol=1e-5)


def test_the_kl_of_a_row_is_that_of_posterior_and_prior(batch):
    model = small_model("dreamerv3", unimix=0.5)
    state = model.encode(batch["obs"][:, 0])
    state = model.observe(state, batch["actions"][:, 0], batch["obs"][:, 1])
    # The posterior, whose logits `observe` keeps to itself, from the deterministic part and the observation.
    tokens = model.encoder({"obs": batch["obs"][:, 1]})
    rssm = model.rssm
    inputs = jnp.concatenate([state.deter, tokens], -1)
    posterior, prior = (
        0.5 * jax.nn.softmax(logits.reshape(5, 4, 4)) + 0.5 / 4
        for logits in (rssm.posterior_logits(rssm.posterior_hidden(inputs)), rssm.prior(state.deter))
    )
    expected = (posterior * jnp.log(posterior / prior)).sum((-2, -1))
    np.testing.assert_allclose(model.uncertainty(batch)["kl"][:, 1], expected, rtol=1e-4, atol=1e-6)


def test_the_disagreement_of_tdmpc2_is_the_spread_of_its_qs(batch):
    model = small_model("tdmpc2")
    trust = model.trust(batch)
    assert trust.units == {"q_disagreement": "return"}
    z = model.encode(batch["obs"][:, 2]).z
    values = [model.q_values(z, batch["actions"][:, 2], None, jnp.array([q]))[0] for q in range(model.config.num_q)]
    np.testing.assert_allclose(trust.rows["q_disagreement"][:, 2], np.std(values, axis=0), rtol=1e-4)
    assert (trust.rows["q_disagreement"] > 0).all()


def test_multitask_models_are_asked_about_each_rows_task(batch):
    model = small_model("tdmpc2", num_tasks=2, action_dims=(2, 2), episode_lengths=(9, 9))
    tasks = np.array([0, 1, 0, 1, 1], np.int32)
    rows = model.trust({**batch, "task": tasks}).rows["q_disagreement"]
    alone = model.trust({**{k: v[1:2] for k, v in batch.items()}, "task": tasks[1:2]}).rows["q_disagreement"]
    np.testing.assert_allclose(rows[1:2], alone, rtol=1e-4)
    with pytest.raises(DataError, match="give task="):
        model.trust(batch)


@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2"])
def test_trust_is_pictured_with_the_errors_by_horizon(family, batch, replay, tmp_path):
    model = small_model(family)
    trust, errors = model.trust(batch), horizon_errors(model, batch)
    assert trust.errors.imagined.keys() == {"reward", "value", "latent"}
    for name, error in errors.imagined.items():
        np.testing.assert_array_equal(trust.errors.imagined[name], error)
    path = draw_trust(model, replay, tmp_path, title="a model")
    assert path == tmp_path / "trust.png"
    with Image.open(path) as picture:
        picture.verify()


def test_the_worst_rows_come_first(batch):
    trust = small_model("tdmpc2").trust(batch)
    signal = trust.rows["q_disagreement"]
    worst = trust.worst(count=3)
    assert [signal[row] for row in worst] == sorted(signal.ravel(), reverse=True)[:3]
    assert len(trust.worst(count=1000)) == signal.size
    with pytest.raises(DataError, match="no signal 'kl'; this model's are q_disagreement"):
        trust.worst("kl")


def test_what_cannot_be_judged_is_refused_with_a_sentence(batch, tmp_path):
    model = small_model("tdmpc2")
    with pytest.raises(DataError, match="The batch has no rewards"):
        model.trust({name: x for name, x in batch.items() if name != "rewards"})
    spanning = batch["is_first"].copy()
    spanning[0, 3] = True
    with pytest.raises(DataError, match="spans two episodes"):
        model.trust({**batch, "is_first": spanning})
    with pytest.raises(DataError, match="no recorded episode has two rows"):
        draw_trust(model, ReplayBuffer(10), tmp_path)
