"""A user's own model class is what trains, is saved and resumes; what would not be trained is refused."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import own_models
import pytest
import toy_family
from flax import nnx
from own_models import BASE, CONFIG, MINE, TRAINING, data
from toy_family import ToyConfig, ToyWorldModel
from trees import assert_same, changed, leaves

import worldloom
from worldloom import (
    CheckpointError,
    ConfigError,
    DreamerV3Config,
    DreamerV3WorldModel,
    NonFiniteError,
    TDMPC2WorldModel,
    WeightsError,
    WorldModel,
    create_world_model,
)
from worldloom.config import BaseConfig, OneOf, config_dataclass
from worldloom.envs import make_env
from worldloom.models import dreamer, tdmpc2
from worldloom.models.base import compiled
from worldloom.training import RunFolder, Trainer, TrainState, play
from worldloom.training.callbacks import Callback, CheckpointCallback
from worldloom.training.checkpoint import load_weights

FAMILIES = ["dreamerv3", "tdmpc2"]
MODULES = {"dreamerv3": dreamer, "tdmpc2": tdmpc2}
REFUSED = (ConfigError, TypeError)
ROOT = Path(worldloom.__file__).parents[1]


class Record(Callback):
    """Keeps the metrics of every step."""

    every = 1

    def __init__(self):
        self.rows, self.info = [], None

    def on_step(self, info):
        self.rows.append(dict(info.metrics))
        self.info = info


def train(family, source, training=TRAINING, callbacks=(), **options):
    """A model of the user's class trained from its initial weights: the trainer and the record."""
    record = Record()
    trainer = Trainer(MINE[family](CONFIG[family], seed=1), training, [record, *callbacks])
    trainer.train(source, **options)
    return trainer, record


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def run(family, tmp_path_factory):
    """Three updates of the user's class: (trainer, record, folder of its checkpoints)."""
    folder = tmp_path_factory.mktemp(family)
    return (*train(family, data(), callbacks=[CheckpointCallback(str(folder))]), folder)


# --- What trains ---------------------------------------------------------------------------------------------------


def test_encoder_and_head_of_the_class_train(family, run):
    trainer, record, _ = run
    moved = changed(MINE[family](CONFIG[family], seed=1).params, trainer.state.params)
    assert {"['encoder']['gain']", "['guess']['kernel']", "['guess']['bias']"} <= moved
    assert type(trainer.model) is MINE[family]
    assert_same(trainer.model.params, trainer.state.params)
    assert trainer.model.num_parameters() > BASE[family](CONFIG[family]).num_parameters()
    assert len(record.rows) == 3
    assert record.info.model_class is MINE[family]
    assert "guess" in record.info.loss_terms


def test_a_constant_of_a_part_stays(family, run):
    """Flax trains ``nnx.Param``; a variable of another type is a table or a mask that its owner wants kept."""
    np.testing.assert_array_equal(run[0].state.params["encoder"]["unit"], 1.0)


def test_term_of_the_class_is_in_metrics_and_evaluation(family, run):
    trainer, record, _ = run
    guesses = [row["guess"] for row in record.rows]
    assert all(np.isfinite(guesses))
    config, model = CONFIG[family], MINE[family](CONFIG[family], seed=1)
    batch = data().sample(4, 5, seed=3)
    terms, plain = model.compute_loss(batch), BASE[family](config, seed=1).compute_loss(batch)
    assert terms.keys() == {*plain, "guess"}
    assert terms["guess"] > 0
    measured = trainer.evaluate(data(seed=1), batches=1)
    assert measured["guess"] > 0


def test_two_updates_at_one_rate_and_one_at_another_are_those_of_make_update(family, run):
    """The third update by hand from ``make_update`` with the class, jitted and donated; its rate is that in the log."""
    config, faster = CONFIG[family], TRAINING.replace(learning_rate=3e-2)
    if family == "dreamerv3":
        # The values of a critic that has just begun are rounding times its outermost bins, ±4.9e8: what follows from
        # them cannot be compared between two programs.
        config = config.replace(actor_scale=0.0, critic_scale=0.0, replay_critic_scale=0.0)
    module, buffer, record = MODULES[family], data(), Record()
    trainer = Trainer(MINE[family](config, seed=1), TRAINING, [record])
    trainer.train(buffer, total_steps=2)
    before = jax.tree.map(jnp.copy, trainer.state)
    crossing = module.replay_spec(config, TRAINING).cross_episodes
    batch = buffer.sample(4, TRAINING.sequence_length, seed=TRAINING.seed, update=2, cross_episodes=crossing)
    batch.pop("row_ids")
    update = jax.jit(module.make_update(config, faster, model_class=MINE[family]), donate_argnums=0)
    expected, metrics = update(before, batch, jax.random.fold_in(trainer.state.key, 2))

    trainer.config = trainer.config.replace(learning_rate=3e-2)
    trainer.train(buffer, total_steps=3)
    assert int(expected.step) == int(trainer.state.step) == 3
    got, want = leaves(trainer.state.params), leaves(expected.params)
    assert got.keys() == want.keys()
    for path, leaf in want.items():
        if "return_range" not in path:
            np.testing.assert_allclose(got[path], leaf, rtol=1e-4, atol=2e-5, err_msg=path)
    assert [round(row["lr"], 6) for row in record.rows] == [0.01, 0.01, 0.03]
    assert float(metrics["lr"]) == pytest.approx(0.03)
    assert float(metrics["guess"]) == pytest.approx(record.rows[-1]["guess"], rel=1e-4)
    other = leaves(run[0].state.params)  # three updates at the first rate
    assert any(not np.allclose(got[path], other[path], atol=1e-3) for path in got)


def test_state_holds_arrays_only(family):
    model = MINE[family](CONFIG[family])
    state = MODULES[family].init_state(model, TRAINING, jax.random.key(0))
    assert [field.name for field in dataclasses.fields(TrainState)] == ["step", "params", "opt_state", "key"]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert {"step", "params", "opt_state", "key"} == vars(state).keys()
    held = {id(leaf) for leaf in jax.tree.leaves(model.params)}
    assert not held & {id(leaf) for leaf in jax.tree.leaves(state)}  # copies: updates may donate them


def test_a_term_of_the_class_that_is_nan_stops_training(family, run):
    trainer = Trainer(MINE[family](CONFIG[family], seed=1), TRAINING.replace(total_steps=40, log_interval=20), [])
    with pytest.raises(NonFiniteError, match="guess"):
        trainer.train(data(poison=5))
    assert all(np.isfinite(leaf).all() for leaf in leaves(trainer.model.params).values())
    assert_same(trainer.model.params, trainer.state.params)


def test_the_class_trains_in_microbatches_several_updates_a_call_and_with_remat(family):
    training = TRAINING.replace(total_steps=6, microbatches=2, updates_per_call=4, remat=True)
    trainer, record = train(family, data(), training)
    moved = changed(MINE[family](CONFIG[family], seed=1).params, trainer.state.params)
    assert {"['encoder']['gain']", "['guess']['kernel']", "['guess']['bias']"} <= moved
    assert len(record.rows) == 6
    assert all(np.isfinite(row["guess"]) for row in record.rows)


def test_the_class_trains_online_and_resumes_bit_for_bit(family, tmp_path):
    training = TRAINING.replace(env_steps=24, prefill=16, save_interval=3, log_interval=3)

    def go(folder, **changes):
        with make_env("Pendulum-v1", seed=3, time_limit=8) as env:
            callbacks = [CheckpointCallback(str(tmp_path / folder))]
            return train(family, env, training.replace(**changes), callbacks, resume="auto")

    whole, record = go("whole")
    assert whole.step > 3
    moved = changed(MINE[family](CONFIG[family], seed=1).params, whole.state.params)
    assert {"['encoder']['gain']", "['guess']['kernel']", "['guess']['bias']"} <= moved
    assert np.isfinite(record.rows[-1]["guess"])
    go("cut", env_steps=20)
    again, _ = go("cut")
    assert_same(again.state, whole.state)


class PolicyTerm(TDMPC2WorldModel):
    """A term of the policy's loss that draws its mean actions to ``goal``, and a head that only this loss uses."""

    loss_terms = (*TDMPC2WorldModel.loss_terms, "draw")

    @staticmethod
    def build(config, dtype, rngs):
        parts = TDMPC2WorldModel.build(config, dtype, rngs)
        parts["goal"] = nnx.Linear(config.latent_dim, config.action_dim, rngs=rngs)
        return parts

    def policy_loss(self, rollouts, task, key=None, **options):
        out = super().policy_loss(rollouts, task, key, **options)
        zs = jax.lax.stop_gradient(rollouts.zs)
        elements = jnp.square(self.prior(zs, task).action - self.goal(zs) - 1.0)
        return self.with_term(out, elements)

    @staticmethod
    def with_term(out, elements):
        term = jnp.mean(elements)
        return out._replace(loss=out.loss + 10.0 * term, metrics={**out.metrics, "draw": term})


class PolicyAddTerm(PolicyTerm):
    @staticmethod
    def with_term(out, elements):
        return out.add_term("draw", elements, 10.0)


def test_a_term_of_the_policy_loss_trains_the_policy_and_its_head():
    record = Record()
    trainer = Trainer(PolicyTerm(CONFIG["tdmpc2"], seed=1), TRAINING, [record])
    start = trainer.state.params
    start = jax.tree.map(np.asarray, start)
    trainer.train(data())
    assert record.rows[0]["draw"] > record.rows[-1]["draw"] > 0
    moved = changed(start, trainer.state.params)
    assert any("policy" in path for path in moved)
    assert {"['goal']['kernel']", "['goal']['bias']"} <= moved


def test_the_policy_loss_takes_a_term_like_the_others():
    terms = PolicyAddTerm(CONFIG["tdmpc2"]).compute_loss(data().sample(4, 4))
    assert np.isfinite(terms["draw"])


# --- Saved, loaded, resumed ----------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_as_its_class(family, tmp_path):
    mine, base = MINE[family], BASE[family]
    model = mine(CONFIG[family], seed=5)
    folder = model.save_pretrained(tmp_path / "mine")
    for again in (
        mine.from_pretrained(folder),
        base.from_pretrained(folder),
        worldloom.from_pretrained(folder),
        create_world_model(folder),
    ):
        assert type(again) is mine
        assert again.config == model.config
        assert_same(again.params, model.params)
        Trainer(again, TRAINING, [])  # and can be trained


def test_a_model_of_another_class_is_refused(family, tmp_path):
    mine, base = MINE[family], BASE[family]
    sibling = type("Sibling", (base,), {"losses" if family == "dreamerv3" else "model_loss": plain_loss(family)})
    saved_mine = mine(CONFIG[family]).save_pretrained(tmp_path / "mine")
    saved_base = base(CONFIG[family]).save_pretrained(tmp_path / "base")
    saved_sibling = sibling(CONFIG[family]).save_pretrained(tmp_path / "sibling")
    with pytest.raises((ConfigError, WeightsError)):
        mine.from_pretrained(saved_base)
    with pytest.raises(ConfigError, match="My"):
        sibling.from_pretrained(saved_mine)
    with pytest.raises(ConfigError, match="Sibling"):
        mine.from_pretrained(saved_sibling)
    other = "tdmpc2" if family == "dreamerv3" else "dreamerv3"
    with pytest.raises(ConfigError):
        BASE[other].from_pretrained(saved_mine)
    assert type(base.from_pretrained(saved_base)) is base
    # The same weights, and only the loss differs.
    assert type(sibling.from_pretrained(saved_base)) is sibling


def plain_loss(family):
    """A method that doubles the total of the base class's loss."""
    base = BASE[family]

    def losses(self, batch, key=None, **options):
        out = (base.losses if family == "dreamerv3" else base.model_loss)(self, batch, key, **options)
        return out._replace(total=2 * out.total)

    return losses


def test_a_fresh_process_refuses_a_class_it_does_not_have_and_imports_nothing(tmp_path):
    """Without the module a sentence; once the user has imported it, the model."""
    folders = {name: str(MINE[name](CONFIG[name]).save_pretrained(tmp_path / name)) for name in FAMILIES}
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(own_models.__file__).parent)!r})
        import worldloom
        from worldloom import ConfigError, DreamerV3WorldModel, TDMPC2WorldModel
        folders = {folders!r}
        for name, base in (("dreamerv3", DreamerV3WorldModel), ("tdmpc2", TDMPC2WorldModel)):
            for load in (worldloom.from_pretrained, worldloom.create_world_model, base.from_pretrained):
                try:
                    load(folders[name])
                except ConfigError as error:
                    print("REFUSED", error)
                else:
                    print("LOADED")
        assert "own_models" not in sys.modules
        import own_models
        for name, folder in folders.items():
            print(type(worldloom.from_pretrained(folder)).__name__)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["MyDreamer", "MyTDMPC2"]
    assert len(lines) == 8
    assert all(line.startswith("REFUSED") and "own_models" in line for line in lines[:6]), lines
    assert all("My" in line for line in lines[:6])


def test_a_run_of_the_class_resumes_bit_for_bit(family, run, tmp_path):
    whole = run[0]
    first, _ = train(family, data(), callbacks=[CheckpointCallback(str(tmp_path))], total_steps=1)
    assert first.step == 1
    again, _ = train(family, data(), callbacks=[CheckpointCallback(str(tmp_path))], resume="auto")
    assert again.step == 3
    assert_same(again.state, whole.state)


def test_a_checkpoint_of_the_class_is_refused_by_the_base_class(family, run):
    folder = run[2]
    trainer = Trainer(BASE[family](CONFIG[family], seed=1), TRAINING, [])
    with pytest.raises((ConfigError, CheckpointError), match="My"):
        trainer.train(data(), resume=folder)
    own, base = MINE[family].__name__, BASE[family].__name__
    with pytest.raises(ConfigError, match=rf"weights of a \S*{own}, which do not fit a \S*{base}\b"):
        load_weights(BASE[family](CONFIG[family]), folder)
    model = MINE[family](CONFIG[family])
    assert load_weights(model, folder) == 3
    assert_same(model.params, run[0].state.params)


# --- Toy family: classes that have the same weights ------------------------------------------------------------------


class Pulled(ToyWorldModel):
    """Another loss, the same weights."""

    factor = 1.0

    @compiled
    def compute_loss(self, batch, key=None):
        terms = super().compute_loss(batch, key)
        return {**terms, "loss": terms["loss"] + self.factor * pull(self)}


def pull(model):
    """Draws the weights to others; Adam would not notice a loss that is only multiplied."""
    return sum(jnp.sum(jnp.square(leaf - 2.0)) for leaf in jax.tree.leaves(nnx.state(model)))


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Runs of the base class and of one with another loss, with checkpoints."""
    runs = {}
    for kind in (ToyWorldModel, Pulled):
        folder = tmp_path_factory.mktemp(kind.__name__)
        trainer = Trainer(kind(ToyConfig()), TRAINING, [CheckpointCallback(str(folder))])
        trainer.train(toy_data())
        runs[kind] = (trainer, folder)
    return runs


def toy_data():
    return toy_family.fill(worldloom.training.ReplayBuffer(1000))


def test_another_loss_on_the_same_weights_trains(toys):
    assert changed(toys[ToyWorldModel][0].state.params, toys[Pulled][0].state.params)


@pytest.mark.parametrize(("saved", "other"), [(ToyWorldModel, Pulled), (Pulled, ToyWorldModel)])
def test_a_checkpoint_is_refused_for_a_class_with_another_loss(toys, saved, other):
    _, folder = toys[saved]
    with pytest.raises((ConfigError, CheckpointError), match=r"Pulled"):
        Trainer(other(ToyConfig()), TRAINING.replace(total_steps=5), []).train(toy_data(), resume=folder)
    again = Trainer(saved(ToyConfig()), TRAINING.replace(total_steps=5), [])
    again.train(toy_data(), resume=folder)
    assert again.step == 5


def test_an_attribute_of_the_class_that_changes_between_runs_takes_effect(toys, monkeypatch):
    """What the loss reads of its class is compiled in; changed in a notebook, the next run trains by the new value."""
    old = toys[Pulled][0].state.params
    monkeypatch.setattr(Pulled, "factor", -1.0)
    trainer = Trainer(Pulled(ToyConfig()), TRAINING, [])
    trainer.train(toy_data())
    assert changed(old, trainer.state.params)


def test_a_method_of_the_class_that_is_replaced_between_runs_takes_effect(toys, monkeypatch):
    old = toys[Pulled][0].state.params

    def compute_loss(self, batch, key=None):
        terms = ToyWorldModel.compute_loss(self, batch, key)
        return {**terms, "loss": terms["loss"] + 100 * pull(self)}

    monkeypatch.setattr(Pulled, "compute_loss", compute_loss)
    trainer = Trainer(Pulled(ToyConfig()), TRAINING, [])
    trainer.train(toy_data())
    assert changed(old, trainer.state.params)


def test_a_class_defined_again_trains_as_it_is_now():
    """A notebook cell run twice: two classes of one name."""

    def define(factor):
        class Cell(ToyWorldModel):
            @compiled
            def compute_loss(self, batch, key=None):
                terms = super().compute_loss(batch, key)
                return {**terms, "loss": terms["loss"] + factor * pull(self)}

        return Cell

    states = []
    for factor in (1.0, -1.0):
        trainer = Trainer(define(factor)(ToyConfig()), TRAINING, [])
        trainer.train(toy_data())
        states.append(trainer.state.params)
    assert changed(*states)


# --- Refused ---------------------------------------------------------------------------------------------------------


def refused(model, match):
    """``Trainer`` refuses with a sentence that names what is wrong, and nothing that is private."""
    with pytest.raises(REFUSED, match=match) as caught:
        Trainer(model, TRAINING, [])
    message = str(caught.value)
    assert len(message.split()) > 6, message
    return message


@pytest.fixture(scope="module")
def fresh(family):
    """A function that gives a model of the base class."""
    return lambda **options: BASE[family](CONFIG[family], **options)


def test_a_part_replaced_on_the_object_is_refused(fresh):
    model = fresh()
    model.encoder = own_models.Gained(model.encoder, 16)
    refused(model, "encoder")


def test_a_part_replaced_by_one_of_another_kind_but_the_same_weights_is_refused(fresh):
    model = fresh()
    reward = model.reward

    class Louder(type(reward)):
        def __call__(self, *args, **options):
            return jax.tree.map(lambda leaf: 2 * leaf, super().__call__(*args, **options))

    object.__setattr__(reward, "__class__", Louder)
    refused(model, "reward")


def inner_modules(part, path=""):
    """(owner, name, module) of the modules inside a part, however they are kept."""
    for name, value in vars(part).items():
        if isinstance(value, nnx.Module):
            yield part, name, value
            yield from inner_modules(value)


def test_a_layer_replaced_inside_a_part_is_refused(fresh, family):
    model = fresh()
    part_name, owner, name, layer = next(
        (part_name, *found)
        for part_name, part in vars(model).items()
        if isinstance(part, nnx.Module)
        for found in inner_modules(part)
    )

    class Silent(type(layer)):
        def __call__(self, *args, **options):
            return jax.tree.map(jnp.zeros_like, super().__call__(*args, **options))

    object.__setattr__(layer, "__class__", Silent)
    assert getattr(owner, name) is layer
    refused(model, part_name)


def test_a_plain_attribute_changed_inside_a_part_is_refused(fresh, family):
    """An activation, a switch or a number that a part keeps beside its weights."""
    model = fresh()
    plain = []
    for part_name, part in vars(model).items():
        if isinstance(part, nnx.Module):
            for owner in (part, *(module for *_, module in inner_modules(part))):
                plain += [
                    (part_name, owner, name)
                    for name, value in vars(owner).items()
                    if isinstance(value, float | int) and not name.startswith("_")
                ]
    assert plain, "no part keeps a number"
    part_name, owner, name = plain[0]
    setattr(owner, name, type(getattr(owner, name))(not getattr(owner, name)))
    refused(model, part_name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight", 0.5),
        ("note", "mine"),
        ("table", jnp.ones(3)),
        ("head", nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
        ("extra", nnx.Param(jnp.ones(3))),
    ],
)
def test_an_attribute_added_to_the_object_is_refused(fresh, name, value):
    model = fresh()
    setattr(model, name, nnx.data(value) if isinstance(value, jax.Array) else value)
    refused(model, name)


@pytest.mark.parametrize("name", ["losses", "model_loss", "compute_loss", "encode", "predict", "imagine", "observe"])
def test_a_method_replaced_on_the_object_is_refused(fresh, name):
    model = fresh()
    if not hasattr(model, name):
        pytest.skip("the other family's")
    old = getattr(model, name)
    setattr(model, name, lambda *args, **options: old(*args, **options))
    refused(model, name)


@pytest.mark.parametrize("name", ["rebuild", "build", "loss_terms", "algorithm", "config_class"])
def test_what_the_class_says_is_not_changed_on_the_object(fresh, name):
    model = fresh()
    old = getattr(model, name)
    setattr(model, name, nnx.static((*old, "mine")) if name == "loss_terms" else old)
    if name == "loss_terms":
        refused(model, name)
    else:
        with pytest.raises(REFUSED):
            Trainer(model, TRAINING, [])


def test_a_config_replaced_on_the_object_is_refused_or_trained(fresh, family):
    model = fresh()
    other = model.config.replace(**({"kl_free": 0.1} if family == "dreamerv3" else {"rho": 0.1}))
    model.config = other
    trainer = None
    try:
        trainer = Trainer(model, TRAINING, [])
    except REFUSED:
        refused(model, "config")
    assert trainer is None or trainer.model.config == other


@pytest.mark.parametrize("name", ["compute_loss", "encode", "predict", "imagine", "observe"])
def test_a_class_that_overrides_only_what_no_update_calls_is_refused(family, name):
    base = BASE[family]

    def method(self, *args, **options):
        return getattr(base, name)(self, *args, **options)

    kind = type("Mine", (base,), {name: method})
    message = refused(kind(CONFIG[family]), name)
    assert ("losses" if family == "dreamerv3" else "model_loss") in message
    below = type("Below", (kind,), {})  # inherited from a class between
    refused(below(CONFIG[family]), name)


def test_a_mixin_that_overrides_what_no_update_calls_is_refused(family):
    base = BASE[family]

    class Mixin:
        def compute_loss(self, batch, key=None):
            return super().compute_loss(batch, key)

    refused(type("Mixed", (Mixin, base), {})(CONFIG[family]), "compute_loss")


def test_a_dtype_that_the_config_does_not_say_is_refused(fresh, family):
    refused(fresh(dtype=jnp.bfloat16), "dtype|precision|bfloat16")
    Trainer(fresh(dtype=jnp.float32), TRAINING, [])
    half = BASE[family](CONFIG[family].replace(precision="bfloat16"))
    Trainer(half, TRAINING, [])


def test_required_arguments_of_a_constructor_are_refused(family):
    base = BASE[family]

    class Mine(base):
        def __init__(self, config, width, **options):
            super().__init__(config, **options)

    with pytest.raises(REFUSED, match=r"__init__|width|constructor"):
        Trainer(Mine(CONFIG[family], 3), TRAINING, [])


def test_optional_arguments_of_a_constructor_are_refused_where_they_differ(family):
    base = BASE[family]

    class Mine(base):
        def __init__(self, config, *, weight=1.0, **options):
            super().__init__(config, **options)
            self.weight = weight

    Trainer(Mine(CONFIG[family]), TRAINING, [])
    refused(Mine(CONFIG[family], weight=5.0), "weight")


def test_weights_edited_in_place_are_the_first_of_the_run(fresh):
    """Values are not structure: what ``load_params`` or an assignment to a variable wrote is trained from."""
    model = fresh()
    model.load_params(jax.tree.map(lambda leaf: leaf + 1, model.params))
    trainer = Trainer(model, TRAINING, [])
    assert_same(trainer.state.params, model.params)


class Orphan(WorldModel):
    """A model of a family that nobody registered."""

    config_class = ToyConfig

    @staticmethod
    def build(config, dtype, rngs):
        return {"dynamics": nnx.Linear(2, 2, rngs=rngs)}


def test_a_model_of_no_family_is_refused():
    with pytest.raises(REFUSED, match=r"register_family|famil"):
        Trainer(Orphan(ToyConfig()), TRAINING, [])


@pytest.mark.parametrize("model", [None, 3, nnx.Linear(2, 2, rngs=nnx.Rngs(0)), DreamerV3WorldModel, "tdmpc2:tiny"])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(REFUSED, match="model"):
        Trainer(model, TRAINING, [])


def test_a_config_class_of_ones_own_trains_or_is_refused(tmp_path):
    """A field more, read by the loss: the model is trained with it and saved with it, or a sentence says what to do."""

    @config_dataclass
    class WiderConfig(DreamerV3Config):
        emphasis: float = 1.0

    class Wider(DreamerV3WorldModel):
        config_class = WiderConfig

        def losses(self, batch, key=None, **options):
            out = super().losses(batch, key, **options)
            return out._replace(total=self.config.emphasis * out.total)

    try:
        config = WiderConfig(**CONFIG["dreamerv3"].to_dict(), emphasis=3.0)
        model = Wider(config)
        trainer = Trainer(model, TRAINING, [])
        again = Wider.from_pretrained(model.save_pretrained(tmp_path / "wider"))
    except ConfigError:
        pass
    else:
        assert trainer.model.config.emphasis == 3.0
        assert again.config == config
        assert type(again) is Wider


@pytest.mark.parametrize("terms", [("loss", "reward", "missing")])
def test_loss_terms_that_no_update_gives_are_refused_with_a_sentence(terms):
    kind = type("Named", (ToyWorldModel,), {"loss_terms": terms})
    with pytest.raises(REFUSED, match=r"loss_terms|missing|'loss'"):
        Trainer(kind(ToyConfig()), TRAINING, []).train(toy_data())


def test_a_term_that_the_class_does_not_list_is_no_crash():
    """It is in the metrics, as any other measurement."""

    class Unlisted(ToyWorldModel):
        @compiled
        def compute_loss(self, batch, key=None):
            terms = super().compute_loss(batch, key)
            return {**terms, "more": terms["reward"] + 1.0}

    record = Record()
    Trainer(Unlisted(ToyConfig()), TRAINING, [record]).train(toy_data())
    assert record.rows[0]["more"] == pytest.approx(record.rows[0]["reward"] + 1.0)


# --- A family of one's own -------------------------------------------------------------------------------------------

LINEAR = ROOT / "examples" / "linear_family.py"
LINEAR_TRAINING = TRAINING.replace(env_steps=30, prefill=16, save_interval=5, log_interval=5, total_steps=8)


@pytest.fixture(scope="module")
def linear():
    """The example's module, imported as a user would."""
    spec = importlib.util.spec_from_file_location("linear_family", LINEAR)
    module = importlib.util.module_from_spec(spec)
    sys.modules["linear_family"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["linear_family"]


def linear_model(**fields):
    return create_world_model("linear", obs_shape=(3,), action_dim=1, candidates=8, horizon=3, **fields)


def test_a_family_of_ones_own_is_made_listed_saved_and_loaded(linear, tmp_path):
    assert "linear" in worldloom.list_models()
    config = worldloom.get_config("linear", obs_shape=(3,), action_dim=1, horizon=3)
    assert type(config) is linear.LinearConfig
    assert config.horizon == 3
    model = linear_model(seed=4)
    assert type(model) is linear.LinearWorldModel
    folder = model.save_pretrained(tmp_path / "linear")
    for again in (
        worldloom.from_pretrained(folder),
        create_world_model(folder),
        linear.LinearWorldModel.from_pretrained(folder),
    ):
        assert type(again) is linear.LinearWorldModel
        assert again.config == model.config
        assert_same(again.params, model.params)
    with pytest.raises(ConfigError, match="linear"):
        DreamerV3WorldModel.from_pretrained(folder)


def test_a_family_of_ones_own_resumes_offline_bit_for_bit(linear, tmp_path):
    def start():
        record = Record()
        return Trainer(linear_model(seed=1), LINEAR_TRAINING, [CheckpointCallback(str(tmp_path)), record]), record

    whole = Trainer(linear_model(seed=1), LINEAR_TRAINING, [])
    whole.train(data())
    start()[0].train(data(), total_steps=3)
    again, record = start()
    again.train(data(), resume="auto")
    assert_same(again.state, whole.state)
    assert record.rows[-1].keys() >= {"loss", "prediction", "reward", "grad_norm", "lr"}
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(whole.state))


def test_a_family_of_ones_own_resumes_online_bit_for_bit(linear, tmp_path):
    def go(folder, **changes):
        with make_env("Pendulum-v1", seed=3, time_limit=8) as env:
            callbacks = [CheckpointCallback(str(tmp_path / folder))]
            trainer = Trainer(linear_model(seed=1), LINEAR_TRAINING.replace(**changes), callbacks)
            trainer.train(env, resume="auto")
        return trainer

    whole = go("whole")
    assert whole.step > 5
    go("cut", env_steps=22)
    assert_same(go("cut").state, whole.state)


def test_a_family_of_ones_own_fills_a_run_folder(linear, tmp_path):
    pytest.importorskip("PIL")
    run = RunFolder(tmp_path / "run")
    with make_env("Pendulum-v1", seed=3, time_limit=8) as env:
        callbacks = run.callbacks(env, episodes=2, progress=False)
        Trainer(linear_model(), LINEAR_TRAINING.replace(eval_interval=5), callbacks).train(env)
    found = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "model", "learning_curve.png", "open_loop.png"} <= found
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["model_type"] == "linear"
    assert type(create_world_model(tmp_path / "run" / "model")) is linear.LinearWorldModel


def test_the_command_line_knows_a_family_of_ones_own(tmp_path):
    """In a fresh process that has not imported it; each command once."""
    pytest.importorskip("PIL")
    code = f"""
        import contextlib, io
        from worldloom.cli import main
        module, run = ["--family-module", {str(LINEAR)!r}], {str(tmp_path / "run")!r}
        sizes = ["--horizon", "3", "--candidates", "8", "--batch-size", "4", "--sequence-length", "4"]
        sizes += ["--prefill", "16", "--time-limit", "8", "--eval-interval", "10", "--device", "cpu"]
        def command(*words):
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                code = main([str(word) for word in words])
            print(">", words[0], code, out.getvalue().replace(chr(10), " "))
        command("eval", run)
        command("info", "linear", "--env", "Pendulum-v1")
        train = ["train", "--model", "linear", "--env", "Pendulum-v1", "--run", run]
        command(*train, "--steps", "30", *sizes)
        command(*train, "--steps", "30", *sizes, *module)
        command("train", "--run", run, "--resume", "--steps", "40", *module)
        command("eval", run, "--episodes", "2", *module)
        command("play", run, *module)
        command("info", "linear", "--env", "Pendulum-v1", *module)
        command("list", *module)
    """
    program = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, timeout=1_200)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("> ")]
    codes = [tuple(line.split()[1:3]) for line in said]
    assert codes == [
        ("eval", "2"),
        ("info", "2"),
        ("train", "2"),
        ("train", "0"),
        ("train", "0"),
        ("eval", "0"),
        ("play", "0"),
        ("info", "0"),
        ("list", "0"),
    ], said
    assert "linear" in said[-1]
    assert "2 episodes" in said[5]
    assert (tmp_path / "run" / "play.gif").is_file()


def family_parts(name="mine", **changes):
    """A correct registration: (name, config class, model class, algorithm)."""

    @config_dataclass
    class MineConfig(BaseConfig):
        obs_shape: Any = (2,)
        action_dim: Any = 1
        action_type: Any = "continuous"
        precision: str = "float32"
        model_type: str = name

    class Mine(ToyWorldModel):
        config_class = MineConfig

    parts = {"name": name, "config_class": MineConfig, "model_class": Mine, "algorithm": toy_family.ALGORITHM}
    return {**parts, **changes}


def without(field):
    """A config class that lacks ``field``."""
    fields = {"obs_shape": (2,), "action_dim": 1, "action_type": "continuous", "precision": "float32"}
    fields["model_type"] = "mine"
    del fields[field]
    body = {"__annotations__": dict.fromkeys(fields, Any), **fields}
    return config_dataclass(type("Lacking", (BaseConfig,), body))


def with_config(config_class):
    return {
        "config_class": config_class,
        "model_class": type("Mine", (ToyWorldModel,), {"config_class": config_class}),
    }


class NotAFrozenDataclass:
    obs_shape, action_dim, action_type, precision, model_type = (2,), 1, "continuous", "float32", "mine"


WRONG = {
    **{
        f"name {name!r}": (lambda name=name: family_parts(name), "name|lower|letters")
        for name in ("", "Mine", "my family", "mine:tiny", "../mine", "mine/x", "é")
    },
    "name 3": (lambda: family_parts(name="mine") | {"name": 3}, "name"),
    "name None": (lambda: family_parts() | {"name": None}, "name"),
    **{
        f"without {field}": (lambda field=field: family_parts() | with_config(without(field)), field)
        for field in ("obs_shape", "action_dim", "action_type", "precision", "model_type")
    },
    "another model_type": (lambda: family_parts("other") | {"name": "mine"}, "model_type"),
    "another config class": (lambda: family_parts(config_class=family_parts()["config_class"]), "config_class|Config"),
    "a plain class as config": (
        lambda: family_parts() | with_config(NotAFrozenDataclass),
        "config_class",
    ),
    "an instance as config": (lambda: family_parts(config_class=ToyConfig()), "class"),
    "a built-in name": (lambda: family_parts("dreamerv3"), "dreamerv3"),
    "the other built-in name": (lambda: family_parts("tdmpc2"), "tdmpc2"),
    "a name taken": (lambda: family_parts("toy"), "toy"),
    "no algorithm": (lambda: family_parts(algorithm=None), "Algorithm"),
    "a class as algorithm": (lambda: family_parts(algorithm=type(toy_family.ALGORITHM)), "Algorithm"),
    "functions as algorithm": (lambda: family_parts(algorithm=(toy_family.init_state,)), "Algorithm"),
    "no world model": (lambda: family_parts(model_class=nnx.Linear), "WorldModel|Linear"),
    "an instance as model": (lambda: family_parts(model_class=ToyWorldModel(ToyConfig())), "class"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_registration_is_refused_and_leaves_nothing(case):
    before = worldloom.list_models()
    make, match = WRONG[case]
    with pytest.raises(REFUSED, match=match) as caught:
        worldloom.register_family(**make())
    assert len(str(caught.value).split()) > 5
    assert worldloom.list_models() == before
    assert type(create_world_model("tdmpc2:tiny", obs_shape=(3,), action_dim=1)) is TDMPC2WorldModel


def test_a_family_derived_from_a_built_in_one_has_its_own_name(tmp_path):
    """DreamerV3 with a config field and a loss of one's own, registered; the base family is left as it was."""

    @config_dataclass
    class OwnConfig(DreamerV3Config):
        emphasis: float = 2.0
        model_type: Annotated[str, OneOf("blinddreamer")] = "blinddreamer"

    class Own(DreamerV3WorldModel):
        config_class = OwnConfig

        def losses(self, batch, key=None, **options):
            out = super().losses(batch, key, **options)
            return out._replace(total=self.config.emphasis * out.total)

    worldloom.register_family("blinddreamer", OwnConfig, Own, DreamerV3WorldModel.algorithm)
    fields = {**CONFIG["dreamerv3"].to_dict(), "emphasis": 3.0}
    del fields["model_type"]
    model = create_world_model("blinddreamer", **fields)
    assert type(model) is Own
    Trainer(model, TRAINING, [])
    again = worldloom.from_pretrained(model.save_pretrained(tmp_path / "own"))
    assert type(again) is Own
    assert again.config.emphasis == 3.0
    plain = BASE["dreamerv3"](CONFIG["dreamerv3"])
    assert type(worldloom.from_pretrained(plain.save_pretrained(tmp_path / "plain"))) is DreamerV3WorldModel


# --- Found on the way ------------------------------------------------------------------------------------------------


def test_the_refusal_names_no_private_attribute(fresh):
    model = fresh()
    model.weight = 0.5
    assert "_pytree" not in refused(model, "weight")


def test_a_class_of_its_base_classs_name_comes_back_as_itself(family, tmp_path):
    """Names shadow each other in scripts; the loss must not become the base class's in silence."""
    base = BASE[family]
    kind = type(base.__name__, (base,), {"losses" if family == "dreamerv3" else "model_loss": plain_loss(family)})
    folder = kind(CONFIG[family]).save_pretrained(tmp_path / "saved")
    assert type(kind.from_pretrained(folder)) is kind
    try:
        again = worldloom.from_pretrained(folder)
    except ConfigError:
        return
    assert type(again) is kind


def test_a_class_below_ones_own_that_overrides_only_what_no_update_calls_is_refused(family):
    """That a class between them has a loss of its own does not make the update call ``encode``."""
    mine = MINE[family]

    class Below(mine):
        def encode(self, obs, key=None, **options):
            return super().encode(0 * obs, key, **options)

    refused(Below(CONFIG[family]), "encode")


@pytest.mark.parametrize("family_name", FAMILIES)
def test_a_policy_of_ones_own_is_played(family_name):
    """``act`` is what the agent does, in evaluation too."""
    base = BASE[family_name]

    class Steady(base):
        def act(self, carry, obs, key=None, **options):
            carry = self.algorithm.initial_carry(self.config, len(obs)) if carry is None else carry
            return carry, jnp.full((len(obs), 1), 0.25)

    seen = []

    class Watched(gym.Env):
        observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
        action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(3, np.float32), {}

        def step(self, action):
            seen.append(float(action[0]))
            return np.zeros(3, np.float32), 0.0, False, False, {}

    model = Steady(CONFIG[family_name])
    with make_env(Watched, time_limit=3) as env:
        for explore in (True, False):
            play(model, env, episodes=1, explore=explore)
    assert seen
    assert set(seen) == {0.25}


@pytest.mark.parametrize("name", ["reward", "loss"])
def test_a_term_does_not_take_the_name_of_another(family, name):
    base, method = BASE[family], "losses" if family == "dreamerv3" else "model_loss"

    def losses(self, *args, **options):
        return getattr(base, method)(self, *args, **options).add_term(name, jnp.full(3, 7.0))

    kind = type("Clash", (base,), {method: losses})
    with pytest.raises(REFUSED, match=name):
        kind(CONFIG[family]).compute_loss(data().sample(4, 4))
