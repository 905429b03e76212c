"""The page about online training agrees with the command line."""

import re
from pathlib import Path

import pytest

import worldloom
from worldloom.cli import COMMANDS, export, hub, runs
from worldloom.cli.train import _flags
from worldloom.families import get_family

PAGE = Path(worldloom.__file__).parent / "docs" / "online.md"
TEXT = PAGE.read_text(encoding="utf-8")
SHOWN = re.findall(r"^\$ worldloom (.*)$", TEXT, flags=re.M)
"""The commands on the page."""


@pytest.mark.parametrize("words", [line.split() for line in SHOWN if line.startswith("train") and "siz " not in line])
def test_the_flags_of_training_commands_are_valid(words):
    assert _flags(get_family("tdmpc2")).parse(words[1:])


def test_every_command_is_shown():
    assert {line.split()[0] for line in SHOWN} | {"list"} == set(COMMANDS)


def test_every_flag_in_the_text_exists():
    families = [get_family(name) for name in ("tdmpc2", "dreamerv3")]
    known = {option for family in families for option in _flags(family)._parser._option_string_actions}
    known |= {option for flag in [*runs._FLAGS, *export._FLAGS, *hub._PUSH, *hub._PULL] for option in flag.options}
    known |= {"--video", "--exact", "--batchsiz", "--obs-shape", "--action-dim", "--logdir"}
    assert set(re.findall(r"--[a-z][a-z-]+", TEXT)) <= known


def test_family_modules_in_commands_exist():
    files = re.findall(r"--family-module (\S+\.py)", TEXT)
    assert files
    assert all((PAGE.parents[2] / file).is_file() for file in files)


def test_linked_files_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)", TEXT)
    assert links
    for link in links:
        assert (PAGE.parent / link).exists(), link


def test_the_program_runs_up_to_training(tmp_path, monkeypatch):
    """Training itself is covered by the tests of the examples."""
    monkeypatch.chdir(tmp_path)
    program = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)[0]
    namespace: dict = {}
    exec(compile(program.partition("trainer.train(")[0], str(PAGE), "exec"), namespace)
    assert namespace["trainer"].config.env_steps == 10_000
