"""A world model learns the same from recorded files as from a buffer in memory."""

import numpy as np
import pytest
from dataset_writers import Recorded, write_hdf5, write_minari

import worldloom.data
from worldloom import create_world_model
from worldloom.envs import make_env
from worldloom.replay import ReplayBuffer
from worldloom.report.openloop import open_loop
from worldloom.training import Trainer, TrainingConfig, collect, recipe

EPISODES, UPDATES = 200, 300


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_open_loop_errors_are_those_of_the_buffer(tmp_path, monkeypatch):
    pytest.importorskip("minari")
    pytest.importorskip("h5py")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with make_env("Pendulum-v1", 10, seed=3) as env:
        settings = recipe("dreamerv3:tiny", env)
        model = create_world_model("dreamerv3:tiny", **settings.model, seed=5)
        played = collect(model, env, 200 * (EPISODES + 10)).episodes()
        with env.another(4, 99) as others:
            held_out = collect(model, others, 200 * 8)
    episodes = [Recorded(e["obs"], e["actions"][:-1], e["rewards"][1:], False) for e in played if e["is_last"][-1]]
    assert len(episodes) >= EPISODES
    buffer = ReplayBuffer()
    for episode in episodes:
        buffer.add_episode(episode.obs, episode.actions, episode.rewards, terminated=False)
    write_minari(tmp_path, episodes)
    sources = {
        "buffer": buffer,
        "minari": worldloom.data.open("minari:test/made-v0"),
        "hdf5": worldloom.data.open(write_hdf5(tmp_path / "pendulum.hdf5", episodes)),
    }
    config = TrainingConfig(**{**settings.training, "total_steps": UPDATES, "seed": 5, "device": "cpu"})
    windows = held_out.sample(32, 32, seed=0)
    errors = {}
    for name, source in sources.items():
        trainer = Trainer(create_world_model("dreamerv3:tiny", **settings.model, seed=5), config, callbacks=[])
        trainer.train(source)
        errors[name] = open_loop(trainer.model, windows, observed=8).rmse()["obs"]
    print({name: np.round(error[8:].mean(), 6).item() for name, error in errors.items()})
    np.testing.assert_array_equal(errors["minari"], errors["buffer"])
    np.testing.assert_array_equal(errors["hdf5"], errors["buffer"])
    # It has learned something: below the error of predicting the mean.
    assert errors["buffer"][8:].mean() < np.std(windows["obs"], (0, 1)).mean()
