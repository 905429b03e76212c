"""What models and updates refuse at their doors, with a sentence, and what a subclass's parts learn in microbatches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from worldloom import create_world_model
from worldloom.errors import ConfigError, DataError
from worldloom.models.dreamer import DreamerV3Config, DreamerV3WorldModel
from worldloom.models.tdmpc2 import TDMPC2Config
from worldloom.ops.symexp_twohot import symexp_twohot_loss
from worldloom.training import TrainingConfig
from worldloom.training.update_loop import CompiledUpdate, Learner, NonFiniteGuard

SHAPES = {"obs_shape": (3,), "action_dim": 2}
SMALL = {
    "dreamerv3": {"deter_dim": 16, "stoch_dim": 16, "num_categories": 4, "units": 16, "hidden_dim": 16,
                  "blocks": 4},
    "tdmpc2": {"latent_dim": 16, "hidden_dim": 16, "encoder_dim": 16, "num_samples": 8, "num_elites": 4,
               "num_pi_trajs": 2},
}  # fmt: skip
WINDOWS, ROWS = 4, 5


def small(family, **fields):
    return create_world_model(f"{family}:tiny", **SHAPES, **SMALL[family], device="cpu", **fields)


@pytest.fixture(scope="module", params=SMALL)
def model(request):
    return small(request.param)


def batch(**changes):
    rng = np.random.default_rng(0)
    rows = {
        "obs": rng.normal(size=(WINDOWS, ROWS, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (WINDOWS, ROWS, 2)).astype(np.float32),
        "rewards": rng.normal(size=(WINDOWS, ROWS)).astype(np.float32),
        "is_first": np.zeros((WINDOWS, ROWS), bool),
        "is_terminal": np.zeros((WINDOWS, ROWS), bool),
    }
    return rows | changes


@pytest.mark.parametrize("shape", [(1, ROWS), (WINDOWS, ROWS - 1), (WINDOWS,), (WINDOWS, ROWS, 1), (ROWS, WINDOWS)])
def test_is_first_of_another_shape_is_refused(model, shape):
    with pytest.raises(DataError, match="is_first has shape"):
        model.compute_loss(batch(is_first=np.zeros(shape, bool)))


@pytest.mark.parametrize("name", ["deter", "stoch"])
def test_a_stored_latent_of_another_shape_is_refused(name):
    model = small("dreamerv3")
    context = {"deter": np.zeros((WINDOWS, 16), np.float32), "stoch": np.zeros((WINDOWS, 4, 4), np.float32)}
    model.compute_loss(batch(context=context))
    for wrong in (context[name][:2], context[name].reshape(WINDOWS, -1)[:, :5]):
        with pytest.raises(DataError, match=rf"context\['{name}'\] has shape"):
            model.compute_loss(batch(context=context | {name: wrong}))


def test_states_and_actions_of_different_batches_are_refused(model):
    state = model.encode(np.zeros((3, 3), np.float32))
    with pytest.raises(DataError, match="batch shapes differ"):
        model.predict(state, np.zeros((2, 2), np.float32))


def test_a_list_says_where_episodes_start(model):
    obs = np.zeros((2, 3), np.float32)
    _, actions = model.act(None, obs, jax.random.key(0), is_first=[True, False])
    assert actions.shape == (2, 2)


def test_what_acts_is_refused_for_other_environments():
    model = small("tdmpc2")
    obs = np.zeros((2, 3), np.float32)
    with pytest.raises(DataError, match="explore has shape"):
        model.act(None, obs, jax.random.key(0), explore=np.array([True, False]))
    with pytest.raises(DataError, match="batch has no actions"):
        model.uncertainty({"obs": obs[None]})
    many = small("tdmpc2", num_tasks=3, task_dim=4)
    for task in (np.array(1), np.array([1, 2, 0])):
        with pytest.raises(DataError, match="task has shape"):
            many.act(None, obs, jax.random.key(0), task=task)
    with pytest.raises(DataError, match="task has shape"):
        many.encode(obs, task=np.array([0, 1, 2]))


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (DreamerV3Config, {"beta1": 1.0}),
        (DreamerV3Config, {"beta2": 1.0}),
        (DreamerV3Config, {"eps": 0.0}),
        (DreamerV3Config, {"kl_scale": np.inf}),
        (DreamerV3Config, {"max_std": np.inf}),
        (DreamerV3Config, {"explore_weight": np.inf}),
        (TDMPC2Config, {"explore_weight": np.inf}),
        (TDMPC2Config, {"pi_adam_eps": 0.0}),
        (TDMPC2Config, {"pi_adam_eps": 1e-50}),
        (TDMPC2Config, {"simnorm_dim": 1}),
    ],
    ids=str,
)
def test_settings_that_can_only_give_nan_or_nothing_are_refused(config, fields):
    (name,) = fields
    with pytest.raises(ConfigError, match=name):
        config(**SHAPES, **fields)


def test_dreamer_learns_from_two_rows_at_least():
    model = small("dreamerv3")
    with pytest.raises(ConfigError, match="sequence_length=1"):
        model.algorithm.replay_spec(model.config, TrainingConfig(sequence_length=1))


def test_the_least_spread_of_plans_keeps_the_same_share_of_actions_uniform():
    for count in (2, 18, 43):
        config = TDMPC2Config(obs_shape=(3,), action_dim=count, action_type="discrete")
        share = count * config.least_std / (1 + count * config.least_std)
        assert share == pytest.approx(0.1 / 1.1)
    assert TDMPC2Config(**SHAPES).least_std == 0.05


def test_a_reward_of_nan_gives_a_loss_of_nan():
    losses = symexp_twohot_loss(jnp.zeros((3, 255)), jnp.array([jnp.nan, jnp.inf, 0.0]))
    assert jnp.isnan(losses).tolist() == [True, False, False]


class Gained(DreamerV3WorldModel):
    """A part of its own in the actor's term."""

    @staticmethod
    def build(config, dtype, rngs):
        return DreamerV3WorldModel.build(config, dtype, rngs) | {"gain": nnx.Linear(1, 1, rngs=rngs)}

    def losses(self, batch, key=None, **options):
        out = super().losses(batch, key, **options)
        return out.add_term("gained", out.elements["actor"] * self.gain.kernel[0, 0])


def test_a_part_in_the_actors_term_has_the_whole_batchs_gradient_in_microbatches():
    model = Gained(DreamerV3Config.from_size("tiny", **SHAPES, **SMALL["dreamerv3"]), seed=0)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), model.params)
    model.load_params({**params, "return_range": {"lo": jnp.float32(-20.0), "hi": jnp.float32(30.0)}})
    context = {"deter": np.zeros((WINDOWS, 16), np.float32), "stoch": np.zeros((WINDOWS, 4, 4), np.float32)}
    rows, metrics = batch(rewards=50 * batch()["rewards"], context=context), {}
    for parts in (1, 2):
        training = TrainingConfig(batch_size=WINDOWS, sequence_length=ROWS - 1, microbatches=parts, grad_clip=0.0)
        state = model.algorithm.init_state(model, training, jax.random.key(0))
        update = jax.jit(model.algorithm.make_update(model.config, training, model_class=Gained))
        metrics[parts] = update(state, rows, None)[1]
    assert metrics[1]["gained"] != 0
    for name in ("gained", "actor", "grad_norm"):
        np.testing.assert_allclose(metrics[2][name], metrics[1][name], rtol=1e-3, err_msg=name)


class Overwritten(DreamerV3WorldModel):
    """A term with the name of a metric."""

    def losses(self, batch, key=None, **options):
        out = super().losses(batch, key, **options)
        return out.add_term("return_scale", out.elements["actor"])


def test_a_term_with_the_name_of_a_metric_is_refused():
    model = Overwritten(DreamerV3Config.from_size("tiny", **SHAPES, **SMALL["dreamerv3"], replay_context=False))
    training = TrainingConfig(batch_size=WINDOWS, sequence_length=ROWS)
    update = model.algorithm.make_update(model.config, training, model_class=Overwritten)
    with pytest.raises(ConfigError, match="metrics 'return_scale' of its own"):
        jax.eval_shape(update, model.algorithm.init_state(model, training, jax.random.key(0)), batch(), None)


def test_the_learning_rate_in_the_log_is_that_of_the_step_after_a_skipped_update():
    model = small("tdmpc2")
    training = TrainingConfig(batch_size=WINDOWS, sequence_length=ROWS, lr_schedule="linear", total_steps=4,
                              learning_rate=0.1, skip_nonfinite=True)  # fmt: skip
    state = model.algorithm.init_state(model, training, jax.random.key(0))
    update = CompiledUpdate(
        model.algorithm.make_update(model.config, training), model.loss_terms, True, False, unrolled=True
    )
    learner, rows = Learner(state, NonFiniteGuard.create()), {}
    for step, rewards in enumerate((np.nan, 1.0)):
        stacked = jax.tree.map(lambda x: jnp.asarray(x)[None], batch(rewards=np.full((WINDOWS, ROWS), rewards, "f4")))
        names = update.metric_names(learner.state, stacked)
        learner, output = update(learner, stacked, 1)
        rows[step] = dict(zip(names, np.asarray(output.metrics)[0], strict=True))
    assert rows[1]["skipped"] == 1
    assert rows[1]["lr"] == pytest.approx(0.075)
    counts = [x.count for x in jax.tree.leaves(learner.state.opt_state, is_leaf=_is_schedule) if _is_schedule(x)]
    assert {int(count) for count in counts} == {2}


def _is_schedule(part):
    return type(part).__name__ == "ScaleByScheduleState"


@pytest.mark.parametrize("method", ["predict", "imagine", "observe", "decode"])
@pytest.mark.parametrize("state", [np.zeros((2, 16), np.float32), None, "latent"], ids=["array", "none", "text"])
def test_a_state_that_is_none_is_refused_by_name(model, method, state):
    further = {"predict": (np.zeros((2, 2)),), "imagine": (np.zeros((3, 2, 2)),), "decode": ()}
    further["observe"] = (np.zeros((2, 2)), np.zeros((2, 3)))
    with pytest.raises(DataError, match=f"{method} must be a {model.state_class.__name__}"):
        getattr(model, method)(state, *further[method])


@pytest.mark.parametrize(
    ("obs", "said"),
    [("text", "is of type str"), (np.array([["a", "b", "c"]]), "dtype <U1"), (np.zeros((1, 3), complex), "complex128")],
)
def test_what_is_no_real_number_is_refused_by_name(model, obs, said):
    with pytest.raises(DataError, match=f"obs given to .*{said}"):
        model.encode(obs)
