"""What the README says works."""

import re
from pathlib import Path

import worldloom

ROOT = Path(worldloom.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_the_online_example_runs_on_a_smaller_scale(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = next(text for text in EXAMPLES if "RunFolder" in text)
    small = example.replace("**training_fields, env_steps=10_000", "**training_fields | SMALL")
    assert small != example
    changes = {"env_steps": 60, "prefill": 40, "batch_size": 2, "sequence_length": 8, "eval_interval": 0}
    exec(compile(small, "README.md", "exec"), {"SMALL": changes})
    assert (tmp_path / "runs" / "cartpole" / "metrics.jsonl").is_file()


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
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) >= 5
    for link in links:
        assert (ROOT / link).exists(), link
