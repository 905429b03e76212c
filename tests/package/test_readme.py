"""What the README says works."""

import re
from pathlib import Path

import worldloom
from worldloom.cli.train import _flags
from worldloom.envs import EnvSpaces
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


def test_a_trained_policy_acts_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"latent_dim": 16, "hidden_dim": 16, "num_samples": 8, "num_elites": 4, "num_pi_trajs": 2}
    model = worldloom.create_world_model("tdmpc2:tiny", obs_shape=(3,), action_dim=1, device="cpu", **small)
    with worldloom.make_env("Pendulum-v1") as env:
        model.remember_env_spaces(EnvSpaces.underneath(env).to_json())
    model.save_pretrained("runs/pendulum")
    namespace: dict = {}
    exec(compile(next(text for text in EXAMPLES if "load_policy" in text), "README.md", "exec"), namespace)
    assert namespace["env"].action_space.contains(namespace["policy"](namespace["obs"]))


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
    assert _flags(get_family("tdmpc2")).parse(typed[0].split()[1:])["env_steps"] == 5_000
