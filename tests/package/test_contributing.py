"""The page for contributors is right: its programs run, its files exist, its layers are those that are tested."""

import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_layers import LAYERS

import worldloom
from worldloom import ConfigError, TDMPC2WorldModel, families, from_pretrained
from worldloom.cli import main
from worldloom.envs import SUITES, make_env
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer, TrainingConfig
from worldloom.training.callbacks import Callback
from worldloom.training.callbacks.base import check_events

ROOT = Path(worldloom.__file__).parents[1]
PAGE = ROOT / "worldloom" / "docs" / "contributing.md"
TEXT = PAGE.read_text(encoding="utf-8")


def blocks(language):
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", TEXT, flags=re.S | re.M)
    return [textwrap.dedent(body) for _, body in found]


PROGRAMS = blocks("python")


def program(mark):
    """The only block that contains ``mark``."""
    (found,) = [text for text in PROGRAMS if mark in text]
    return found


@pytest.fixture
def page_module(tmp_path, monkeypatch):
    """Makes a module of a block, in an otherwise empty current folder; what it registers is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(name, text):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        importlib.invalidate_caches()
        made.append(name)
        return importlib.import_module(name)

    yield make
    families._registered.pop("residual", None)
    for name in made:
        sys.modules.pop(name, None)


@pytest.fixture
def buffer():
    """Ten episodes of a point that moves by its actions."""
    buffer, rng = ReplayBuffer(10_000), np.random.default_rng(0)
    for _ in range(10):
        actions = rng.uniform(-1, 1, (30, 2)).astype(np.float32)
        obs = np.cumsum(np.concatenate([np.zeros((1, 2)), 0.1 * actions]), axis=0, dtype=np.float32)
        buffer.add_episode(obs, actions, rewards=np.zeros(30), truncated=True)
    return buffer


def test_every_program_has_its_test():
    marks = ("register_family(", 'create_world_model("residual"', "NextObservation", "make_walk", "LossBelow")
    assert [program(mark) for mark in marks] == PROGRAMS


def test_the_family_is_trained_saved_and_loaded(page_module):
    page_module("residual", program("register_family("))
    used = page_module("residual_used", program('create_world_model("residual"'))
    batch = used.buffer.sample(4, 8)
    untrained = used.create_world_model("residual", obs_shape=(2,), action_dim=2)
    assert used.model.compute_loss(batch)["loss"] < 0.2 * untrained.compute_loss(batch)["loss"]
    assert used.again.compute_loss(batch)["loss"] == used.model.compute_loss(batch)["loss"]


def test_the_family_works_on_the_command_line(page_module, tmp_path, capsys, monkeypatch):
    (tmp_path / "residual.py").write_text(program("register_family("), encoding="utf-8")
    monkeypatch.setattr(families, "imported_modules", [])
    monkeypatch.delitem(sys.modules, "residual", raising=False)
    typed = re.findall(r"\$ worldloom (.*)", TEXT)
    assert [line.split()[0] for line in typed] == ["train", "eval"]
    small = ["--prefill=20", "--time-limit=10", "--sequence-length=4", "--eval-interval=0", "--device=cpu"]
    train = typed[0].replace("--steps 2000", "--steps 30").split()
    try:
        assert main([*train, *small]) == 0
        assert main([*typed[1].split(), "--episodes", "1"]) == 0
    finally:
        sys.modules.pop("residual", None)
    assert "0 of 1 episodes terminated" in capsys.readouterr().out


def test_the_subclass_is_trained_saved_and_loaded(page_module, buffer):
    page = page_module("next_observation", program("NextObservation"))
    before = page.model.params["decoder"]["kernel"].copy()
    losses = []
    config = TrainingConfig(total_steps=30, sequence_length=4, learning_rate=1e-2, device="auto")
    Trainer(page.model, config, [(10, lambda info: losses.append(info.means["decoded"]))]).train(buffer)
    assert losses[-1] < losses[0]
    assert not jnp.array_equal(page.model.params["decoder"]["kernel"], before)
    folder = page.model.save_pretrained("saved")
    for again in (page.NextObservation.from_pretrained(folder), from_pretrained(folder)):
        assert type(again) is page.NextObservation
        assert jnp.array_equal(again.params["decoder"]["kernel"], page.model.params["decoder"]["kernel"])


def test_what_the_page_says_is_refused_is_refused(page_module):
    page = page_module("next_observation", program("NextObservation"))

    class OnlyShown(TDMPC2WorldModel):
        def imagine(self, state, actions, key=None):
            return None

    class MoreArguments(TDMPC2WorldModel):
        def __init__(self, config, width, **options):
            super().__init__(config, **options)

    changed = page.NextObservation(page.model.config)
    changed.decoder = page.nnx.Linear(2, 2, rngs=page.nnx.Rngs(0))
    for model in (
        changed,
        OnlyShown(page.model.config),
        MoreArguments(page.model.config, 3),
        TDMPC2WorldModel(page.model.config, dtype=jnp.bfloat16),
    ):
        with pytest.raises(ConfigError):
            Trainer(model, TrainingConfig(device="cpu"))
    # The methods that no update calls are those listed.
    listed = re.search(r"which no update calls \((.*?)\)", TEXT).group(1)
    assert set(re.findall(r"`(\w+)`", listed)) == set(TDMPC2WorldModel.views)


def test_the_suite_makes_environments(page_module, monkeypatch):
    page_module("walk", program("make_walk"))
    row = SUITES["crafter"]._replace(adapter="walk:make_walk", package="gymnasium", action_repeat=2)
    monkeypatch.setitem(SUITES, "walk", row)
    with make_env("walk:left", 2, time_limit=10) as env:
        step = env.reset()
        for _ in range(5):
            step = env.step(-np.ones((2, 1), np.float32))
        np.testing.assert_allclose(step.obs, -1.0, rtol=1e-6)
        np.testing.assert_allclose(step.reward, 0.0, atol=1e-6)
        assert step.is_last.all()
        assert not step.is_terminal.any()
    with pytest.raises(ConfigError, match="not 'up'"):
        make_env("walk:up")


def test_the_callback_has_every_method_and_stops_training(page_module, buffer):
    page = page_module("loss_below", program("LossBelow"))
    methods = [name for name, value in vars(Callback).items() if inspect.isfunction(value) and name != "interval"]
    assert [name for name in vars(page.LossBelow) if name in methods] == methods
    callback = page.LossBelow(target=float("inf"))
    check_events(callback)
    page_module("residual", program("register_family("))
    model = worldloom.create_world_model("residual", obs_shape=(2,), action_dim=2)
    trainer = Trainer(model, TrainingConfig(total_steps=100, sequence_length=8, device="auto"), [callback])
    trainer.train(buffer)
    assert (callback.started_at, callback.ended_at, callback.calls) == (0, 20, 1)
    assert "mean loss below" in trainer.stop_reason


def test_files_and_links_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)", TEXT)
    assert len(links) >= 5
    for link in links:
        assert (PAGE.parent / link).exists(), link
    paths = re.findall(r"`([\w/.]+/[\w.]*)`", TEXT)
    assert "training/fit.py" in paths
    for path in paths:
        places = [ROOT / path, ROOT / "worldloom" / path]
        assert any(place.exists() for place in places) or path == ".cache/jax", path


def test_every_file_of_the_loop_holds_what_the_table_says():
    rows = re.findall(r"^\| `(training/[\w/]+\.py)` \| `(\w+)`[:,]", TEXT, flags=re.M)
    assert len(rows) >= 10
    for path, name in rows:
        module = importlib.import_module(f"worldloom.{path.removesuffix('.py').replace('/', '.')}")
        assert getattr(module, name).__module__ == module.__name__, path


def test_the_layers_are_those_that_are_tested():
    (text,) = [block for block in blocks("text") if "algorithm" in block]
    first = [re.split(r"\s{2,}", line)[0] for line in text.splitlines()]
    assert [tuple(line.split(", ")) for line in first] == LAYERS


def test_the_commit_subject_has_at_most_72_characters():
    (text,) = [block for block in blocks("text") if block.startswith("replay:")]
    assert len(text.splitlines()[0]) <= 72
