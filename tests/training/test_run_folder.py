"""A run folder holds all of a run, and the run goes on from it."""

import json
import logging

import gymnasium as gym
import numpy as np
import pytest
from toy_family import ToyConfig, ToyWorldModel, fill

from worldloom import create_world_model
from worldloom.envs import make_env
from worldloom.errors import CheckpointError, ConfigError, FileFormatError
from worldloom.replay import ReplayBuffer
from worldloom.report.recording import Recording
from worldloom.training import Trainer, TrainingConfig
from worldloom.training.callbacks.reports import FrameRecorder
from worldloom.training.run_folder import RunFolder

Image = pytest.importorskip("PIL.Image")

SMALL = {"latent_dim": 8, "hidden_dim": 8, "encoder_dim": 8, "num_bins": 11, "num_samples": 8, "num_elites": 2}
SMALL |= {"num_pi_trajs": 2, "iterations": 1, "episode_length": 6, "precision": "float32"}
STEPS = {"prefill": 12, "batch_size": 4, "sequence_length": 4, "device": "cpu"}
STEPS |= {"env_steps": 30, "log_interval": 4, "eval_interval": 8, "save_interval": 8}


class Slide(gym.Env):
    """``x ← x + a`` for six steps; draws itself as a bar."""

    observation_space = gym.spaces.Box(-9, 9, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.steps = self.np_random.uniform(-1, 1, 1).astype(np.float32), 0
        return self.x, {}

    def step(self, action):
        self.x, self.steps = self.x + action, self.steps + 1
        return self.x, float(-abs(self.x[0])), False, self.steps >= 6, {}

    def render(self):
        picture = np.zeros((16, 16, 3), np.uint8)
        picture[:, : int(np.clip(8 + self.x[0], 0, 16))] = 200
        return picture


@pytest.fixture(scope="module", autouse=True)
def registered():
    gym.register("Slide-v0", Slide)
    yield
    del gym.registry["Slide-v0"]


def trainer(env, run, **changes):
    shapes = {"obs_shape": env.obs_shape, "action_dim": env.action_dim}
    model = create_world_model("tdmpc2:tiny", **shapes, **SMALL, device="cpu")
    config = TrainingConfig(**{**STEPS, **changes})
    return Trainer(model, config, run.callbacks(env, episodes=3, progress=False))


@pytest.fixture(scope="module")
def finished(registered, tmp_path_factory):
    """A run that ended at 22 of 30 steps and went on."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "slide")
    for end in (22, 30):
        with make_env("Slide-v0", seed=3) as env:
            trainer(env, run, env_steps=end).train(env, resume="auto")
    return run


def records(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def test_everything_is_there(finished):
    names = {path.name for path in finished.path.iterdir() if not path.name.startswith("events.")}
    assert names == {
        "config.json", "versions.json", "metrics.jsonl", "checkpoints", "model", "learning_curve.png", "eval.gif",
        "horizon.png", "trust.png",
    }  # fmt: skip
    assert any(path.name.startswith("events.") for path in finished.path.iterdir())
    with Image.open(finished.path / "eval.gif") as gif:
        assert 1 < gif.n_frames <= 7  # Six steps show seven observations; equal pictures become one.
    for name in ("learning_curve.png", "horizon.png", "trust.png"):
        with Image.open(finished.path / name) as picture:
            picture.verify()
    assert not list(finished.path.rglob("*.tmp"))


def test_settings_make_the_run_again(finished):
    settings = finished.settings()
    with finished.make_env() as env, make_env("Slide-v0", seed=3) as original:
        np.testing.assert_array_equal(env.reset().obs, original.reset().obs)
    assert finished.training_config() == TrainingConfig(**STEPS)
    model = create_world_model(finished.path / "model")
    assert model.config.to_dict() == settings["model"]
    assert finished.title() == "tdmpc2 on Slide-v0"


def test_records_know_their_environment_steps(finished):
    lines = records(finished)
    assert all({"step", "env_steps", "time"} <= line.keys() for line in lines)
    # An update per step after 12 random ones; the second part of the run went on where the first had ended.
    evaluated = {line["step"]: line["env_steps"] for line in lines if "eval/return" in line}
    assert list(evaluated) == [8, 10, 16, 18]
    assert all(env_steps - step in (11, 12) for step, env_steps in evaluated.items())
    assert [line["step"] for line in lines if "train/loss" in line] == [4, 8, 10, 12, 16, 18]
    collected = [line for line in lines if "collect/return" in line]
    assert {line["collect/length"] for line in collected} == {6.0}


def test_every_start_is_written_down(finished):
    first, second = json.loads((finished.path / "versions.json").read_text())
    assert (first["step"], second["step"]) == (0, 10)
    assert {"jax", "worldloom", "gymnasium"} <= first["packages"].keys()
    assert first["seed"] == 42
    assert "cpu" in first["device"]


def test_another_run_does_not_mix_in(finished):
    before = {path: path.read_bytes() for path in finished.path.rglob("*") if path.is_file()}
    with make_env("Slide-v0", seed=3) as env, pytest.raises(CheckpointError, match="holds another run"):
        trainer(env, finished).train(env)
    assert {path: path.read_bytes() for path in finished.path.rglob("*") if path.is_file()} == before


def test_offline_runs_show_losses(tmp_path, monkeypatch):
    buffer, held_out = fill(ReplayBuffer(10_000)), fill(ReplayBuffer(10_000), seed=1)
    run = RunFolder(tmp_path / "toy")
    config = TrainingConfig(
        total_steps=8, batch_size=4, sequence_length=5, log_interval=2, eval_interval=4, device="cpu"
    )
    drawn = []
    monkeypatch.setattr(
        "worldloom.training.callbacks.reports.draw_imagination", lambda *args, title: drawn.append((args[1], title))
    )
    Trainer(ToyWorldModel(ToyConfig()), config, run.callbacks(held_out, progress=False)).train(buffer)
    assert {line["step"] for line in records(run) if "eval/loss" in line} == {4, 8}
    assert (run.path / "learning_curve.png").stat().st_size > 5_000
    assert drawn[-1] == (held_out, "toy on recorded episodes, 8 updates")
    assert run.settings()["env"] is None
    with pytest.raises(ConfigError, match="recorded episodes"):
        run.make_env()


def test_functions_and_objects_are_described(tmp_path, caplog):
    run = RunFolder(tmp_path / "run")
    with make_env(Slide, seed=1) as env:
        callbacks = run.callbacks(env, progress=False)
        assert callbacks[0].env == {
            "spec": None,
            "made_of": f"{__name__}.Slide",
            "num_envs": 1,
            "parallel": "sync",
            "seed": 1,
            "worker_timeout": 60.0,
        }
    with make_env(Slide()) as env, caplog.at_level(logging.WARNING, "worldloom"):
        callbacks = run.callbacks(env, progress=False)
        assert callbacks[0].env["made_of"] == "Slide"
        assert "no evaluation" in caplog.text
    (tmp_path / "run").mkdir()
    settings = {"format": 1, "run_id": "x", "model": {}, "training": {}, "env": callbacks[0].env}
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="made of Slide"):
        run.make_env()
    with run.make_env(spec="Slide-v0") as env:
        assert env.obs_shape == (1,)


@pytest.mark.parametrize("content", [None, "[]", "{", '{"format": 7}', '{"format": 1, "model": {}}'])
def test_what_is_no_run_folder_is_said(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(FileFormatError):
        RunFolder(tmp_path).settings()


def test_recorded_rows_are_those_that_were_played():
    replay = ReplayBuffer(1_000)
    with make_env(Slide, 2, seed=5) as env, make_env(Slide, 2, seed=5) as other:
        recording = Recording(env, replay)
        rng = np.random.default_rng(0)
        seen, played = [recording.reset()], [other.reset()]
        for _ in range(13):
            actions = 1.5 * env.sample_actions(rng)
            seen.append(recording.step(actions))
            played.append(other.step(actions))
        assert recording.num_envs == 2
    for a, b in zip(seen, played, strict=True):
        np.testing.assert_array_equal(a.obs, b.obs)
    episodes = list(replay.episodes())
    assert sorted(len(episode["rewards"]) for episode in episodes) == [7, 7, 7, 7]
    np.testing.assert_array_equal(episodes[0]["obs"], np.stack([rows.obs[0] for rows in seen[:7]]))
    np.testing.assert_array_equal(episodes[0]["rewards"], np.stack([rows.reward[0] for rows in seen[:7]]))
    assert episodes[0]["is_last"].tolist() == [False] * 6 + [True]
    assert (episodes[0]["actions"][-1] == 0).all()
    assert np.abs(episodes[0]["actions"]).max() == 1  # Environments clip.


def test_films_do_not_fill_the_memory():
    film = FrameRecorder()
    for _ in range(2_000):
        film.append(np.zeros(1))
    assert len(film) == 1_500
