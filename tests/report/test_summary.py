"""The page about a run holds what the folder holds, needs nothing else, and takes no code from it."""

import html
import json
import re
from html.parser import HTMLParser

import pytest

from worldloom.report.summary import write_summary
from worldloom.report.video import save_gif

Image = pytest.importorskip("PIL.Image")


class Page(HTMLParser):
    """Tags, texts and addresses of a page; every tag that is opened must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.addresses = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "pendulum <b>"
    folder.mkdir()
    settings = {
        "model": {"model_type": "tdmpc2", "latent_dim": 64},
        "training": {"batch_size": 16, "device": "auto"},
        "env": {"spec": "Pendulum-v1<script>alert(1)</script>", "num_envs": 1},
        "env_defaults": {"action_repeat": 1},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    start = {"time": "t", "device": "cpu (cpu)", "command": ["worldloom", "train"], "packages": {"jax": "0.10.2"}}
    (folder / "versions.json").write_text(json.dumps([start]))
    records = [
        {"step": 10, "env_steps": 1000, "eval/return": -900.0, "eval/return_std": 3.0},
        {"step": 20, "env_steps": 2000, "eval/return": -100.0, "eval/return_std": 2.0},
        {"step": 30, "env_steps": 3000, "eval/return": -150.0, "eval/return_std": 1.5},
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    for name in ("learning_curve.png", "open_loop_a.png", "open_loop_b.png"):
        Image.new("RGB", (30, 20), (200, 30, 30)).save(folder / name)
    import numpy as np

    save_gif([np.full((8, 8, 3), shade, np.uint8) for shade in (0, 200)], folder / "eval.gif")
    return folder


def test_the_page_holds_numbers_pictures_settings_and_versions(run):
    page = Page(write_summary(run).read_text(encoding="utf-8"))
    text = "\n".join(page.texts)
    for expected in (
        "3,000",
        "30",
        "-150 ± 1.5",
        "-100",
        "batch_size",
        "latent_dim",
        "action_repeat",
        "worldloom train",
    ):
        assert expected in page.texts or expected in text, expected
    assert page.tags.count("img") == 4
    assert page.tags.count("details") == 4
    assert "cpu" in page.texts


def test_the_page_needs_no_network_and_runs_nothing(run):
    text = write_summary(run).read_text(encoding="utf-8")
    page = Page(text)
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert "script" not in page.tags
    assert html.escape("<script>alert(1)</script>") in text
    assert not re.search(r"https?://|url\(|@import", text)


def test_what_is_missing_or_damaged_is_left_out(tmp_path):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "versions.json").write_text("7")
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "eval/return": null}\n{"step"')
    page = Page(write_summary(tmp_path).read_text(encoding="utf-8"))
    assert "img" not in page.tags
    assert "a world model on recorded episodes" in page.texts


def test_a_run_on_recorded_episodes_shows_its_loss(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "env_steps": 0, "eval/loss": 0.25}')
    page = Page(write_summary(tmp_path).read_text(encoding="utf-8"))
    assert page.texts[page.texts.index("loss on held-out episodes") - 1] == "0.25"
    assert "environment steps" not in page.texts
