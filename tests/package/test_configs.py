"""Configs hold what the reference says of them, name by name, and refuse the rest with a sentence."""

import dataclasses
import inspect
import json
import math
import re
import types
import typing
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import pytest

import worldloom
from worldloom import ConfigError, DreamerV3Config, TDMPC2Config, UnknownFieldError
from worldloom.config import BaseConfig, Between, Ge, Gt, Lt, OneOf, config_dataclass, freeze
from worldloom.envs import make_env
from worldloom.families import get_family
from worldloom.training import TrainingConfig
from worldloom.training.callbacks import CheckpointCallback, EarlyStoppingCallback, LoggingCallback

DATA = Path(__file__).resolve().parents[1] / "data"
# The users' own specification, as it was given, and the project's own page that grew from it.
GIVEN = DATA / "config-reference.md"
OWN = Path(worldloom.__file__).parent / "docs" / "configuration.md"
DOCUMENTS = [pytest.param(GIVEN, id="given"), pytest.param(OWN, id="own")]
CLASSES = {
    "DreamerV3Config": DreamerV3Config,
    "TDMPC2Config": TDMPC2Config,
    "TrainingConfig": TrainingConfig,
    "CheckpointCallback": CheckpointCallback,
    "LoggingCallback": LoggingCallback,
    "EarlyStoppingCallback": EarlyStoppingCallback,
}
# Where the given table says "varies", the plain constructor takes the values of the example beside it.
VARIES = {
    ("DreamerV3Config", "deter_dim"): 2048,
    ("DreamerV3Config", "stoch_dim"): 1024,
    ("DreamerV3Config", "hidden_dim"): 640,
    ("TDMPC2Config", "latent_dim"): 512,
    ("TDMPC2Config", "hidden_dim"): 512,
}
DREAMER = {"obs_shape": (4,), "action_dim": 2}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def tables(path: Path) -> dict[str, list[list[str]]]:
    """Rows of cells by the heading above the table."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ").strip()
        elif line.startswith("| `"):
            found.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def parameters(cls: type) -> dict[str, tuple[object, object]]:
    """Constructor parameters of a class: name → (annotation, default)."""
    if dataclasses.is_dataclass(cls):
        hints = typing.get_type_hints(cls)
        return {f.name: (hints[f.name], f.default) for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls.__init__)
    signature = inspect.signature(cls.__init__).parameters.values()
    return {p.name: (hints.get(p.name), p.default) for p in signature if p.name != "self"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_snippet_runs_as_printed(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config_dict = json.loads(blocks(document, "json")[0])
    (tmp_path / "config.json").write_text(json.dumps(config_dict))
    namespace = {"config_dict": config_dict}
    snippets = blocks(document, "python")
    assert len(snippets) >= 8
    for snippet in snippets:
        exec(compile(snippet, str(document), "exec"), namespace)
    model = namespace["model"]
    assert model.config == DreamerV3Config(**config_dict)
    assert model.num_parameters() > 30_000_000


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_row_names_a_field_its_type_and_its_default(document):
    checked = set()
    for heading, rows in tables(document).items():
        name = heading.partition(":")[0]
        if name not in CLASSES:
            continue
        checked.add(name)
        fields = parameters(CLASSES[name])
        for field, kind, default, *_ in rows:
            field, kinds = field.strip("`"), kind.strip("`").split(" or ")
            assert field in fields, f"{name}.{field}"
            annotation, actual = fields[field]
            assert set(kinds) <= describe(annotation), f"{name}.{field} is annotated {annotation}"
            if default == "required":
                assert actual in (dataclasses.MISSING, inspect.Parameter.empty), f"{name}.{field}"
            elif default == "varies":
                assert actual == VARIES[name, field]
            else:
                assert actual == parse(default), f"{name}.{field}"
                assert type(actual) is type(freeze(parse(default))), f"{name}.{field}"
    assert checked == set(CLASSES)


def describe(annotation: object) -> set[str]:
    """Names of the types an annotation admits: ``int | None`` is {"int", "None"}, ``tuple[int, ...]`` {"tuple"}."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if is_union else (annotation,)
    return {"None" if member is type(None) else getattr(member, "__name__", str(member)) for member in members}


def parse(text: str) -> object:
    return eval(text.strip("`"), {})


def test_own_page_lists_every_field_of_every_config():
    rows = tables(OWN)
    for name, cls in CLASSES.items():
        listed = [row[0].strip("`") for heading in rows if heading.partition(":")[0] == name for row in rows[heading]]
        fields = [field for field in parameters(cls) if field != "model_type"]
        assert sorted(listed) == sorted(fields), name


@pytest.mark.parametrize(
    "config",
    [
        DreamerV3Config(**DREAMER),
        DreamerV3Config(obs_shape={"image": (64, 64, 3), "speed": (2,)}, action_dim=3, action_type="discrete"),
        TDMPC2Config(obs_shape=(3,), action_dim=1),
        TrainingConfig(total_steps=7),
    ],
)
def test_json_round_trip_and_hash(config, tmp_path):
    config.to_json(tmp_path / "config.json")
    again = type(config).from_json(tmp_path / "config.json")
    assert again == config
    assert hash(again) == hash(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        again.seed = 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DreamerV3Config(obs_shape=(4,), action_dim=2, deter_dims=3), "Did you mean 'deter_dim'"),
        (lambda: TDMPC2Config(obs_shape=(4,), action_dim=2, latent=3), "Did you mean 'latent_dim'"),
        (lambda: TrainingConfig(learning_rat=3), "Did you mean 'learning_rate'"),
        (lambda: TrainingConfig().replace(batchsize=3), "Did you mean 'batch_size'"),
        (lambda: DreamerV3Config(action_dim=2), "needs obs_shape"),
    ],
)
def test_unknown_and_missing_fields_are_answered(build, message):
    with pytest.raises(UnknownFieldError, match=message) as caught:
        build()
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "change",
    [
        {"obs_shape": ()},
        {"obs_shape": (0,)},
        {"obs_shape": (2, 3, 4, 5)},
        {"obs_shape": "abc"},
        {"action_dim": 0},
        {"action_dim": 1.5},
        {"deter_dim": 100},
        {"stoch_dim": 33},
        {"kl_balance": 1.5},
        {"kl_free": -1.0},
        {"mlp_layers": 0},
        {"precision": "float12"},
        {"action_type": "fuzzy"},
        {"model_type": "tdmpc2"},
    ],
)
def test_dreamer_values_out_of_range_are_refused(change):
    with pytest.raises(ConfigError):
        DreamerV3Config(**{**DREAMER, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"obs_shape": ()},
        {"action_dim": 0},
        {"latent_dim": 100},
        {"num_q": 1},
        {"hidden_dim": 0},
        {"mlp_layers": 0},
        {"precision": "float12"},
        {"action_type": "fuzzy"},
        {"model_type": "dreamerv3"},
    ],
)
def test_tdmpc2_values_out_of_range_are_refused(change):
    with pytest.raises(ConfigError):
        TDMPC2Config(**{"obs_shape": (3,), "action_dim": 1, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"total_steps": 0},
        {"total_steps": 1.5},
        {"batch_size": True},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"grad_clip": -1.0},
        {"warmup_steps": -1},
        {"log_interval": 0},
        {"device": "gpu1"},
        {"seed": -1},
    ],
)
def test_training_values_out_of_range_are_refused(change):
    with pytest.raises(ConfigError):
        TrainingConfig(**change)


def test_configs_of_the_earlier_library_load():
    old = {
        "model_type": "dreamer",
        "obs_shape": [3, 64, 64],
        "action_dim": 6,
        "deter_dim": 512,
        "stoch_discrete": 16,
        "stoch_classes": 8,
        "num_hidden_layers": 2,
        "use_cudnn_rnn": True,
    }
    with pytest.warns(UserWarning, match="use_cudnn_rnn"):
        config = DreamerV3Config.from_dict(old)
    assert (config.stoch_dim, config.num_categories, config.mlp_layers) == (128, 8, 2)
    with pytest.warns(UserWarning, match="gate_type"):
        config = TDMPC2Config.from_dict(
            {"model_type": "tdmpc2", "obs_shape": [4], "action_dim": 2, "num_q_networks": 3, "gate_type": "x"}
        )
    assert config.num_q == 3


@config_dataclass
class EveryLimit(BaseConfig):
    count: Annotated[int, Ge(1)] = 1
    below: Annotated[int, Ge(0), Lt(8)] = 0
    positive: Annotated[float, Gt(0)] = 1.0
    share: Annotated[float, Between(0, 1)] = 0.5
    weight: Annotated[float, Between(0, math.inf)] = 1.0
    maybe: Annotated[int | None, Ge(1)] = None
    kind: Annotated[str, OneOf("a", "b", "c")] = "a"
    plain: float = 0.0
    name: str = ""
    switch: bool = False
    shape: tuple[int, ...] = ()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"count": 0}, "count must be an integer ≥ 1, not 0."),
        ({"count": 1.0}, "count must be an integer ≥ 1, not 1.0."),
        ({"count": True}, "count must be an integer ≥ 1, not True."),
        ({"count": None}, "count must be an integer ≥ 1, not None."),
        ({"below": 8}, "below must be an integer ≥ 0 and below 8, not 8."),
        ({"positive": 0}, "positive must be a number above 0, not 0."),
        ({"positive": math.inf}, "positive must be a number above 0, not inf."),
        ({"positive": 10**400}, "positive must be a number above 0"),
        ({"share": math.nan}, "share must be a number from 0 to 1, not nan."),
        ({"weight": -math.inf}, "weight must be a number from 0 to inf, not -inf."),
        ({"maybe": 0}, "maybe must be an integer ≥ 1 or None, not 0."),
        ({"kind": "d"}, "kind must be 'a', 'b' or 'c', not 'd'."),
        ({"kind": ["a"]}, "kind must be 'a', 'b' or 'c', not ('a',)."),
        ({"plain": math.inf}, "plain must be a number, not inf."),
        ({"plain": False}, "plain must be a number, not False."),
        ({"name": 3}, "name must be a string, not 3."),
        ({"switch": 1}, "switch must be True or False, not 1."),
    ],
)
def test_a_value_outside_its_annotation_is_refused_with_a_sentence(values, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        EveryLimit(**values)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        EveryLimit().replace(**values)


def test_values_within_their_annotations_are_kept():
    values = {"count": 3, "below": 7, "positive": 2, "share": 1, "weight": math.inf, "maybe": 2, "kind": "c"}
    config = EveryLimit(**values, plain=-1, name="x", switch=True, shape=[1, 2])
    assert config.to_dict() == values | {"plain": -1, "name": "x", "switch": True, "shape": [1, 2]}
    assert EveryLimit(1, 7, 2).positive == 2
    with pytest.raises(ConfigError, match="below must be"):
        EveryLimit(1, 8)


TWO = [np.int64(2), np.uint8(2), np.int32(2), np.array(2), jnp.int32(2)]
HALF = [np.float32(0.5), np.float16(0.5), np.longdouble(0.5), np.array(0.5), jnp.float32(0.5), Fraction(1, 2)]
FOUR = [np.array([4]), [np.int64(4)], (np.int32(4),), jnp.array([4]), np.array([4], np.uint8)]


@pytest.mark.parametrize("cls", [DreamerV3Config, TDMPC2Config])
def test_numbers_of_numpy_are_numbers(cls):
    """``env.action_space.n`` is an np.int64, and shapes come as arrays. All are stored as Python's numbers."""
    field = "kl_balance" if cls is DreamerV3Config else "rho"
    plain = cls(obs_shape=(4,), action_dim=2, **{field: 0.5})
    given = [{"action_dim": n} for n in TWO] + [{field: x} for x in HALF] + [{"obs_shape": s} for s in FOUR]
    for change in given:
        config = cls(**{"obs_shape": (4,), "action_dim": 2, field: 0.5} | change)
        assert config == plain, change
        assert hash(config) == hash(plain)
        assert config.to_json() == plain.to_json(), change
    assert cls(obs_shape={"a": np.array([4])}, action_dim=2) == cls(obs_shape={"a": (4,)}, action_dim=2)
    for wrong in (np.int64(0), np.float64(2.5), np.bool_(True), True, Fraction(2), "2", np.array([2]), None):
        with pytest.raises(ConfigError, match="action_dim"):
            cls(obs_shape=(4,), action_dim=wrong)


def test_an_integer_for_a_float_is_stored_as_a_float():
    one, other = (DreamerV3Config(obs_shape=(4,), action_dim=2, kl_free=x) for x in (1.0, np.int64(1)))
    assert one.to_json() == other.to_json()
    assert one.replace(kl_free=1).to_json() == one.to_json()
    config = TrainingConfig(batch_size=np.int32(4), learning_rate=np.float64(1e-3), weight_decay=0, seed=np.uint32(3))
    assert config == TrainingConfig(batch_size=4, learning_rate=1e-3, weight_decay=0.0, seed=3)
    assert config.to_json() == TrainingConfig(batch_size=4, learning_rate=1e-3, weight_decay=0.0, seed=3).to_json()


@pytest.mark.parametrize("huge", [10**30, 10**400, 10**5000, 2**63, 1e30, -(10**400)], ids=range(6))
def test_no_number_is_too_large_to_be_refused(huge):
    for build in (
        lambda: DreamerV3Config(obs_shape=(4,), action_dim=2, units=huge),
        lambda: DreamerV3Config(obs_shape=(huge,), action_dim=2),
        lambda: DreamerV3Config(obs_shape=(4,), action_dim={"a": huge}),
        lambda: TDMPC2Config(obs_shape={"a": (huge,)}, action_dim=2),
        lambda: TDMPC2Config(obs_shape=(4,), action_dim=huge),
        lambda: TDMPC2Config(obs_shape=(4,), action_dim=2, rho=huge),
        lambda: TrainingConfig(batch_size=huge),
    ):
        with pytest.raises(ConfigError):
            build()


@pytest.mark.parametrize(
    ("cls", "sizes"),
    [
        (DreamerV3Config, {"units": 2**40}),
        (DreamerV3Config, {"obs_shape": (2**62,)}),
        (DreamerV3Config, {"bins": 2**40 + 1}),
        (TDMPC2Config, {"hidden_dim": 2**62}),
        (TDMPC2Config, {"latent_dim": 2**40}),
        (TDMPC2Config, {"hidden_dim": 2**20}),
    ],
)
def test_a_model_that_no_memory_holds_is_refused(cls, sizes):
    config = cls(**{"obs_shape": (4,), "action_dim": 2} | sizes)
    with pytest.raises(ConfigError, match=r"WorldModel of this config is too large: .*Choose smaller sizes"):
        get_family(config.model_type).model_class(config)
    with pytest.raises(ConfigError, match="rows are too many for one batch"):
        TrainingConfig(batch_size=2**40)


def test_arguments_that_count_take_numbers_of_numpy(tmp_path):
    assert CheckpointCallback(str(tmp_path), save_every=np.int64(5)).save_every == 5
    assert EarlyStoppingCallback(patience=np.int32(5)).patience == 5
    with make_env("CartPole-v1", num_envs=np.int64(2), time_limit=np.int64(9)) as env:
        assert (env.num_envs, type(env.num_envs)) == (2, int)
    for wrong in (True, 0, 2.0, np.float64(2), 10**400):
        with pytest.raises(ConfigError, match="save_every must be an integer ≥ 1, not"):
            CheckpointCallback(str(tmp_path), save_every=wrong)
        with pytest.raises(ConfigError, match="num_envs must be an integer ≥ 1, not"):
            make_env("CartPole-v1", num_envs=wrong)
