"""What the README says works."""

import re
from pathlib import Path

import worldloom

ROOT = Path(worldloom.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = re.findall(r"```python\n(.*?)```", README, flags=re.S)[0]
    namespace: dict = {}
    exec(compile(example, "README.md", "exec"), namespace)
    assert namespace["dream"].rewards.shape == (16, 4)
    assert namespace["action"].shape == (4, 2)
    assert (tmp_path / "my-model" / "config.json").is_file()
    assert "loss" in capsys.readouterr().out


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) >= 5
    for link in links:
        assert (ROOT / link).exists(), link
