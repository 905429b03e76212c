"""Flags come from config fields: one for each field, no name twice, and texts are parsed as the fields' types."""

from collections.abc import Mapping

import pytest

from worldloom import DreamerV3Config, TDMPC2Config
from worldloom.cli.flags import Flag, FlagParser, config_flags, field_notes, parse_value, peek_option
from worldloom.cli.train import ENV_FLAGS, PROCESS_FLAGS, RUN_FLAGS, SHAPES
from worldloom.config import freeze
from worldloom.envs import make_env
from worldloom.errors import ConfigError, UnknownFieldError
from worldloom.training import TrainingConfig


@pytest.mark.parametrize("config", [DreamerV3Config, TDMPC2Config, TrainingConfig])
def test_every_field_has_a_note_and_a_flag_that_accepts_its_default(config):
    notes = field_notes(config)
    for flag in config_flags(config):
        assert notes[flag.name] == flag.note != ""
        if flag.default is not None:
            text = str(flag.default) if not isinstance(flag.default, tuple) else "[]"
            assert parse_value(flag, text) == flag.default
            assert type(freeze(parse_value(flag, text))) is type(flag.default)


@pytest.mark.parametrize("config", [DreamerV3Config, TDMPC2Config])
def test_no_name_is_used_twice(config):
    names = [
        flag.name
        for flag in (
            *RUN_FLAGS,
            *PROCESS_FLAGS,
            *ENV_FLAGS,
            *config_flags(TrainingConfig),
            *config_flags(config, exclude=SHAPES),
        )
    ]
    assert len(set(names)) == len(names)
    flags = FlagParser("x", "")
    flags.group("a", [Flag("seed", int, "")])
    with pytest.raises(ValueError, match="called seed"):
        flags.group("b", [Flag("seed", int, "")])


def test_environment_flags_are_arguments_of_make_env():
    with make_env("CartPole-v1") as env:
        assert {flag.name for flag in ENV_FLAGS} == env.settings.keys() - {"spec", "seed"}


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "1e6", 1_000_000),
        (int, "10_000", 10_000),
        (float, "3e-4", 3e-4),
        (int | None, "none", None),
        (int | None, "4", 4),
        (float | None, "4", 4.0),
        (bool, "False", False),
        (bool, "on", True),
        (str, "12", "12"),
        (tuple[int, ...], "3,64,64", (3, 64, 64)),
        (tuple[int, ...], "(4,)", (4,)),
        (tuple[int, ...], "[1, 2]", (1, 2)),
        (tuple[int, ...] | Mapping[str, tuple[int, ...]], '{"a": [2]}', {"a": [2]}),
        (Mapping[str, int], "data=2,fsdp=-1", {"data": 2, "fsdp": -1}),
        (int | Mapping[str, int], "2", 2),
        (int | Mapping[str, int], '{"a": 2}', {"a": 2}),
        (str | Mapping[str, str], "discrete", "discrete"),
        (str | Mapping[str, str], '{"a": "discrete"}', {"a": "discrete"}),
    ],
)
def test_texts_become_values(kind, text, value):
    parsed = parse_value(Flag("field", kind, ""), text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (int, "1.5"), (int, "x"), (int, "inf"), (int, "nan"), (int, "none"), (float, "x"), (bool, "2"),
        (tuple[int, ...], "x"),
    ],
)  # fmt: skip
def test_texts_of_another_type_are_refused(kind, text):
    with pytest.raises(ConfigError, match=f"--a-field takes .*, not '{text}'"):
        parse_value(Flag("a_field", kind, ""), text)


def test_given_flags_are_parsed():
    flags = FlagParser("x", "", argument="folder")
    flags.group("a", [*config_flags(TrainingConfig), Flag("mpc", bool, "", True)])
    words = ["there", "--batch_size=8", "--no-mpc", "--skip-nonfinite", "--learning-rate", "1e-3"]
    expected = {"folder": "there", "batch_size": 8, "mpc": False, "skip_nonfinite": True, "learning_rate": 1e-3}
    assert flags.parse(words) == expected
    assert flags.parse(["there", "--mpc", "false"]) == {"folder": "there", "mpc": False}


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["there", "--batchsiz", "8"], UnknownFieldError, "Did you mean '--batch-size'"),
        (["there", "--batch", "8"], UnknownFieldError, "has no flag '--batch'"),
        (["there", "--bach_size=8"], UnknownFieldError, "no flag '--bach-size'. Did you mean '--batch-size'"),
        (["there", "here"], ConfigError, "'here' is not expected"),
        (["there", "--batch-size"], ConfigError, "expected one argument"),
        ([], ConfigError, "required: folder"),
    ],
)
def test_mistakes_raise_errors_with_advice(words, error, message):
    flags = FlagParser("x", "", argument="folder")
    flags.group("a", config_flags(TrainingConfig))
    with pytest.raises(error, match=message):
        flags.parse(words)


def test_peek_option_reads_both_spellings():
    assert peek_option(["--model", "a"], "--model") == "a"
    assert peek_option(["--x", "--model=a"], "--model") == "a"
    assert peek_option(["--model"], "--model") is None
    assert peek_option(["--x", "1"], "--model") is None


def test_a_flag_may_take_several_words():
    flags = FlagParser("train", "")
    flags.group("environment", ENV_FLAGS)
    given = flags.parse(["--action-bounds", "-2", "3.5", "--drop-keys", "mission", "robot/text", "--join-actions"])
    assert given == {"action_bounds": (-2.0, 3.5), "drop_keys": ("mission", "robot/text"), "join_actions": True}
    for words, message in [
        (["--action-bounds", "-2"], "expected 2 arguments"),
        (["--action-bounds", "low", "2"], "takes FLOAT, not 'low'"),
        (["--drop-keys"], "expected at least one"),
    ]:
        with pytest.raises(ConfigError, match=message):
            flags.parse(words)


def test_the_last_of_two_values_counts_in_both_parsers():
    words = ["--batch-size", "8", "--batch_size=9"]
    flags = FlagParser("x", "")
    flags.group("a", config_flags(TrainingConfig))
    assert flags.parse(words)["batch_size"] == int(peek_option(words, "--batch-size")) == 9
    words = ["--remat", "--no-remat"]
    assert flags.parse(words)["remat"] is False
    assert peek_option(words, "--remat") == "false"


def test_a_flag_may_stand_alone_or_take_a_word():
    flags = FlagParser("x", "")
    flags.group("a", [Flag("resume", bool | str, "…"), Flag("run", str, "…")])
    assert flags.parse(["--resume", "--run", "r"]) == {"resume": True, "run": "r"}
    assert flags.parse(["--resume", "continue"]) == {"resume": "continue"}
    assert flags.parse(["--no-resume"]) == {"resume": False}
