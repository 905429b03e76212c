"""A run folder holds all files of a run, and the run can be resumed from it."""

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
    """``x ← x + a`` for six steps; renders x as a bar."""

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
        image = np.zeros((16, 16, 3), np.uint8)
        image[:, : int(np.clip(8 + self.x[0], 0, 16))] = 200
        return image


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
    """A run that was stopped after 22 of 30 environment steps and resumed."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "slide")
    for end in (22, 30):
        with make_env("Slide-v0", seed=3) as env:
            trainer(env, run, env_steps=end).train(env, resume="auto")
    return run


def records(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def test_a_finished_run_has_all_files(finished):
    names = {path.name for path in finished.path.iterdir() if not path.name.startswith("events.")}
    assert names == {
        "config.json", "versions.json", "metrics.jsonl", "episodes.jsonl", "checkpoints", "model", "learning_curve.png",
        "eval.gif", "horizon.png", "trust.png", "summary.html",
    }  # fmt: skip
    assert any(path.name.startswith("events.") for path in finished.path.iterdir())
    with Image.open(finished.path / "eval.gif") as gif:
        assert 1 < gif.n_frames <= 7  # Six steps have seven observations; equal images are merged.
    for name in ("learning_curve.png", "horizon.png", "trust.png"):
        with Image.open(finished.path / name) as plot:
            plot.verify()
    assert not list(finished.path.rglob("*.tmp"))


def test_a_run_can_be_recreated_from_its_settings(finished):
    settings = finished.settings()
    with finished.make_env() as env, make_env("Slide-v0", seed=3) as original:
        np.testing.assert_array_equal(env.reset().obs, original.reset().obs)
    assert finished.training_config() == TrainingConfig(**STEPS)
    model = create_world_model(finished.path / "model")
    assert model.config.to_dict() == settings["model"]
    assert finished.title() == "tdmpc2 on Slide-v0"


def test_log_records_have_environment_steps(finished):
    lines = records(finished)
    assert all({"step", "env_steps", "time"} <= line.keys() for line in lines)
    # One update per step after 12 random steps; the second part of the run continues where the first one ended.
    evaluated = {line["step"]: line["env_steps"] for line in lines if "eval/return" in line}
    assert list(evaluated) == [8, 10, 16, 18]
    assert all(env_steps - step in (11, 12) for step, env_steps in evaluated.items())
    assert [line["step"] for line in lines if "train/loss" in line] == [4, 8, 10, 12, 16, 18]
    collected = [line for line in lines if "collect/return" in line]
    assert {line["collect/length"] for line in collected} == {6.0}


def test_every_start_of_a_run_is_recorded(finished):
    first, second = json.loads((finished.path / "versions.json").read_text())
    assert (first["step"], second["step"]) == (0, 10)
    assert {"jax", "worldloom", "gymnasium"} <= first["packages"].keys()
    assert first["seed"] == 42
    assert "cpu" in first["device"]


def test_another_run_in_the_folder_is_refused_and_changes_no_file(finished):
    before = {path: path.read_bytes() for path in finished.path.rglob("*") if path.is_file()}
    with make_env("Slide-v0", seed=3) as env, pytest.raises(CheckpointError, match="holds another run"):
        trainer(env, finished).train(env)
    assert {path: path.read_bytes() for path in finished.path.rglob("*") if path.is_file()} == before


def test_an_offline_run_plots_losses(tmp_path, monkeypatch):
    buffer, held_out = fill(ReplayBuffer(10_000)), fill(ReplayBuffer(10_000), seed=1)
    run = RunFolder(tmp_path / "toy")
    config = TrainingConfig(
        total_steps=8, batch_size=4, sequence_length=5, log_interval=2, eval_interval=4, device="cpu"
    )
    drawn = []
    monkeypatch.setattr(
        "worldloom.training.callbacks.reports.draw_imagination",
        lambda *args, title, **names: drawn.append((args[1], title)),
    )
    Trainer(ToyWorldModel(ToyConfig()), config, run.callbacks(held_out, progress=False)).train(buffer)
    assert {line["step"] for line in records(run) if "eval/loss" in line} == {4, 8}
    assert (run.path / "learning_curve.png").stat().st_size > 5_000
    assert drawn[-1] == (held_out, "toy on recorded episodes, 8 updates")
    assert run.settings()["env"] is None
    with pytest.raises(ConfigError, match="recorded episodes"):
        run.make_env()


def test_environments_made_from_functions_and_objects_are_described(tmp_path, caplog):
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
    with pytest.raises(ConfigError, match="made from Slide"):
        run.make_env()
    with run.make_env(spec="Slide-v0") as env:
        assert env.obs_shape == (1,)


@pytest.mark.parametrize("content", [None, "[]", "{", '{"format": 7}', '{"format": 1, "model": {}}'])
def test_a_folder_without_a_valid_config_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(FileFormatError):
        RunFolder(tmp_path).settings()


def test_a_recording_holds_the_rows_that_were_played():
    replay = ReplayBuffer(1_000)
    with make_env(Slide, 2, seed=5) as env, make_env(Slide, 2, seed=5) as other:
        recording = Recording(env, replay)
        rng = np.random.default_rng(0)
        recorded, expected = [recording.reset()], [other.reset()]
        for _ in range(13):
            actions = 1.5 * env.sample_actions(rng)
            recorded.append(recording.step(actions))
            expected.append(other.step(actions))
        assert recording.num_envs == 2
    for a, b in zip(recorded, expected, strict=True):
        np.testing.assert_array_equal(a.obs, b.obs)
    episodes = list(replay.episodes())
    assert sorted(len(episode["rewards"]) for episode in episodes) == [7, 7, 7, 7]
    np.testing.assert_array_equal(episodes[0]["obs"], np.stack([rows.obs[0] for rows in recorded[:7]]))
    np.testing.assert_array_equal(episodes[0]["rewards"], np.stack([rows.reward[0] for rows in recorded[:7]]))
    assert episodes[0]["is_last"].tolist() == [False] * 6 + [True]
    assert (episodes[0]["actions"][-1] == 0).all()
    assert np.abs(episodes[0]["actions"]).max() == 1  # Environments clip actions.


def test_the_number_of_recorded_frames_is_bounded():
    frames = FrameRecorder()
    for _ in range(2_000):
        frames.append(np.zeros(1))
    assert len(frames) == 1_500
