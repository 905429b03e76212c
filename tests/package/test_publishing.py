"""Cards of runs, and the way to and from a hub that is a folder here."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import worldloom
from worldloom.cli import main
from worldloom.errors import ConfigError, FileFormatError, UnknownModelError
from worldloom.export import push_to_hub, save_with_card
from worldloom.models import pretrained
from worldloom.models.card import Card, Result

TINY = {"latent_dim": 16, "simnorm_dim": 4, "hidden_dim": 8, "encoder_dim": 8, "num_bins": 11, "device": "cpu"}


class Hub:
    """What ``huggingface_hub`` offers, on a folder: repositories with revisions, and a cache."""

    def __init__(self, root: Path):
        self.root, self.calls = root, []

    def create_repo(self, repo_id, *, token, private, exist_ok):
        self.calls.append(("create", repo_id, token, private))
        (self.root / repo_id / "main").mkdir(parents=True, exist_ok=exist_ok)
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, token):
        shutil.copytree(folder_path, self.root / repo_id / "main", dirs_exist_ok=True)

    def snapshot_download(self, repo_id, *, revision, cache_dir, token, local_files_only, allow_patterns):
        self.calls.append(("download", repo_id, revision, local_files_only))
        cached = Path(cache_dir) / repo_id / (revision or "main")
        source = self.root / repo_id / (revision or "main")
        if local_files_only and not cached.is_dir():
            raise LocalEntryNotFoundError("outgoing traffic has been disabled")
        if not local_files_only:
            if not source.is_dir():
                raise RepositoryNotFoundError("404 Client Error")
            shutil.copytree(source, cached, dirs_exist_ok=True)
        return str(cached)


class RepositoryNotFoundError(Exception):
    __module__ = "huggingface_hub.errors"


class LocalEntryNotFoundError(Exception):
    __module__ = "huggingface_hub.errors"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = Hub(tmp_path / "hub")
    monkeypatch.setattr(pretrained, "hub", lambda: fake)
    find_spec = pretrained.importlib.util.find_spec
    monkeypatch.setattr(
        pretrained.importlib.util, "find_spec", lambda name: fake if name == "huggingface_hub" else find_spec(name)
    )
    monkeypatch.setenv("WORLDLOOM_CACHE_DIR", str(tmp_path / "cache"))
    return fake


@pytest.fixture
def model():
    return worldloom.create_world_model("tdmpc2:tiny", obs_shape=(3,), action_dim=1, seed=4, **TINY)


@pytest.fixture
def run(tmp_path, model):
    """The folder of a run as training leaves it."""
    folder = tmp_path / "runs" / "pendulum"
    model.save_pretrained(folder / "model")
    settings = {
        "format": 1,
        "run_id": "x",
        "model_class": None,
        "model": model.config.to_dict(),
        "training": {"seed": 3, "eval_episodes": 5},
        "env": {"spec": "Pendulum-v1", "num_envs": 1},
        "spaces": {
            "observation": {"type": "Box", "shape": [3], "dtype": "float32", "low": -8.0, "high": 8.0},
            "action": {"type": "Box", "shape": [1], "dtype": "float32", "low": -2.0, "high": 2.0},
        },
        "data": {"data": "/home/somebody/secret/rows"},
        "protocol": {"name": "tdmpc2/gym", "changed": {"batch_size": [256, 64]}},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    records = [
        {"step": 10, "env_steps": 100, "eval/return": -900.0, "eval/return_std": 7.0},
        {"step": 20, "env_steps": 200, "eval/return": -150.5, "eval/return_std": 12.25},
        {"step": 30},
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    starts = [{"packages": {"jax": "0.10"}, "device": "cpu", "command": ["/home/somebody/bin/worldloom"]}]
    (folder / "versions.json").write_text(json.dumps(starts))
    (folder / "learning_curve.png").write_bytes(b"png")
    (folder / "eval.gif").write_bytes(b"gif")
    return folder


def front_matter(text):
    """The metadata of a card, whose values are JSON."""
    _, front, body = text.split("---\n", 2)
    return {key: json.loads(value) for key, _, value in (line.partition(": ") for line in front.splitlines())}, body


def test_a_card_has_results_settings_and_pictures(run, tmp_path, model):
    folder = save_with_card(run, tmp_path / "out", name="me/pendulum", licence="mit")
    metadata, body = front_matter((folder / "README.md").read_text())
    assert (metadata["library_name"], metadata["license"]) == ("worldloom", "mit")
    assert {"tdmpc2", "Pendulum-v1", "reinforcement-learning"} <= set(metadata["tags"])
    (entry,) = metadata["model-index"]
    (result,) = entry["results"]
    assert (entry["name"], result["dataset"]["name"]) == ("pendulum", "Pendulum-v1")
    assert result["metrics"][0] == {
        "type": "mean_reward",
        "name": "mean_reward",
        "value": "-150.50 +/- 12.25",
        "verified": False,
    }
    for part in (
        "-150.5 ± 12.2",
        "| 5 | 200 |",
        "(learning_curve.png)",
        "(eval.gif)",
        "tdmpc2/gym",
        "256 → 64",
        "0.10",
    ):
        assert part in body
    assert "somebody" not in body
    assert {path.name for path in folder.iterdir()} >= {"learning_curve.png", "eval.gif", "model.safetensors"}
    loaded = worldloom.from_pretrained(folder)
    np.testing.assert_array_equal(loaded.params["reward"]["head"]["bias"], model.params["reward"]["head"]["bias"])


def test_names_cannot_write_markup_into_a_card():
    name = "a/b\n# <script>`x`|"
    card = Card(name, {"model_type": "tdmpc2"}, 1, env="`|\n<b>", results=[Result("x|y\n", 1.0, 0.0, 1)])
    metadata, body = front_matter(card.text())
    assert "\n# <script>" not in body.replace("\\", "")
    assert "| `x¦y " in body
    assert metadata["tags"][-1] == "`|\n<b>"


def test_a_run_goes_to_a_hub_and_comes_back(run, hub, tmp_path, capsys):
    address = push_to_hub(run, "me/pendulum", token="t", private=True)
    assert address == "https://hub.example/me/pendulum"
    assert hub.calls == [("create", "me/pendulum", "t", True)]
    assert main(["pull", "me/pendulum"]) == 0
    assert "tdmpc2 of me/pendulum" in capsys.readouterr().out
    assert main(["pull", "me/pendulum", "--local-files-only", "--to", str(tmp_path / "copy")]) == 0
    assert (tmp_path / "copy" / "README.md").is_file()
    assert worldloom.from_pretrained("me/pendulum", local_files_only=True).config.model_type == "tdmpc2"
    assert hub.calls[1:] == [("download", "me/pendulum", None, False)] + [("download", "me/pendulum", None, True)] * 2


def test_a_pinned_revision_stays_what_it_was(run, hub, model):
    model.push_to_hub("me/model")
    shutil.copytree(hub.root / "me/model/main", hub.root / "me/model/v1")
    model.load_params({**model.params, "scale": {"value": np.float32(7)}})
    model.push_to_hub("me/model")
    assert float(worldloom.from_pretrained("me/model", revision="v1").params["scale"]["value"]) == 1
    assert float(worldloom.from_pretrained("me/model").params["scale"]["value"]) == 7
    assert float(worldloom.from_pretrained("me/model", revision="v1", local_files_only=True).scale.value[...]) == 1
    metadata, _ = front_matter((hub.root / "me/model/main/README.md").read_text())
    assert metadata["library_name"] == "worldloom"


def test_what_is_not_there_is_one_sentence(run, hub, tmp_path, capsys):
    with pytest.raises(UnknownModelError, match=r"nobody/nothing cannot be used: RepositoryNotFoundError: 404"):
        worldloom.from_pretrained("nobody/nothing")
    with pytest.raises(UnknownModelError, match="not among the downloaded files"):
        worldloom.from_pretrained("me/pendulum", local_files_only=True)
    with pytest.raises(UnknownModelError, match="at revision v9"):
        worldloom.from_pretrained("me/pendulum", revision="v9")
    with pytest.raises(ConfigError, match="owner/name"):
        push_to_hub(run, "pendulum")
    with pytest.raises(FileFormatError, match="not the folder of a run"):
        save_with_card(tmp_path, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for words, message in (
        (["pull", "pendulum"], "owner/name"),
        (["pull", "nobody/nothing"], "cannot be used"),
        (["pull", "me/x", "--to", str(tmp_path / "full")], "holds something already"),
        (["push", str(run)], "either --repo OWNER/NAME or --to FOLDER"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_without_the_package_the_extra_is_named(monkeypatch):
    find_spec = pretrained.importlib.util.find_spec
    monkeypatch.setattr(
        pretrained.importlib.util, "find_spec", lambda name: None if name == "huggingface_hub" else find_spec(name)
    )
    with pytest.raises(UnknownModelError, match=r"worldloom\[hub\]"):
        worldloom.from_pretrained("me/pendulum")
