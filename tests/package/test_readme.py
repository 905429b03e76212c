"""What the README says works."""

import re
from pathlib import Path

import worldloom
from worldloom.cli.train import _flags
from worldloom.families import get_family

ROOT = Path(worldloom.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_it_is_short():
    assert len(README.splitlines()) <= 120


def test_the_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = next(text for text in EXAMPLES if "my-model" in text)
    namespace: dict = {}
    exec(compile(example, "README.md", "exec"), namespace)
    assert namespace["dream"].rewards.shape == (16, 4)
    assert namespace["action"].shape == (4, 2)
    assert (tmp_path / "my-model" / "config.json").is_file()
    assert "loss" in capsys.readouterr().out


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert len(links) >= 5
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_film_is_small():
    (film,) = re.findall(r"\]\((\S+\.gif)\)", README)
    assert 50_000 < (ROOT / film).stat().st_size < 1_500_000


def test_the_commands_are_valid():
    typed = re.findall(r"^\.venv/bin/worldloom (.*)$", README, flags=re.M)
    assert [line.split()[0] for line in typed] == ["train", "play"]
    assert _flags(get_family("tdmpc2")).parse(typed[0].split()[1:])["env_steps"] == 10_000
