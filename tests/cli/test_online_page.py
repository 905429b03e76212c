"""The page about online training says what is so."""

import re
from pathlib import Path

import pytest

import worldloom
from worldloom.cli import COMMANDS
from worldloom.cli.train import _flags
from worldloom.families import get_family

PAGE = Path(worldloom.__file__).parent / "docs" / "online.md"
TEXT = PAGE.read_text(encoding="utf-8")
TYPED = re.findall(r"^\$ worldloom (.*)$", TEXT, flags=re.M)


@pytest.mark.parametrize("words", [line.split() for line in TYPED if line.startswith("train") and "siz " not in line])
def test_training_commands_are_understood(words):
    assert _flags(get_family("tdmpc2")).parse(words[1:])


def test_every_command_is_shown():
    assert {line.split()[0] for line in TYPED} | {"list"} == set(COMMANDS)


def test_every_flag_in_the_text_exists():
    parsers = [_flags(get_family(name))._parser for name in ("tdmpc2", "dreamerv3")]
    known = {option for parser in parsers for option in parser._option_string_actions}
    known |= {
        "--episodes",
        "--checkpoint",
        "--video",
        "--exact",
        "--batchsiz",
        "--obs-shape",
        "--action-dim",
        "--logdir",
    }
    assert set(re.findall(r"--[a-z][a-z-]+", TEXT)) <= known


def test_modules_on_the_command_line_exist():
    files = re.findall(r"--family-module (\S+\.py)", TEXT)
    assert files
    assert all((PAGE.parents[2] / file).is_file() for file in files)


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)", TEXT)
    assert links
    for link in links:
        assert (PAGE.parent / link).exists(), link


def test_the_program_runs_as_printed(tmp_path, monkeypatch):
    """Up to training itself, which is the examples' affair."""
    monkeypatch.chdir(tmp_path)
    program = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)[0]
    namespace: dict = {}
    exec(compile(program.partition("trainer.train(")[0], str(PAGE), "exec"), namespace)
    assert namespace["trainer"].config.env_steps == 10_000
