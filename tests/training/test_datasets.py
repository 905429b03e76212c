"""A dataset on disk trains a model as a buffer of the same episodes does, bit for bit."""

import sys
from pathlib import Path

import numpy as np
import pytest
from online_worlds import assert_equal
from toy_family import ToyConfig, ToyWorldModel, fill

import worldloom.data
from worldloom.errors import DataError
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer, TrainingConfig, evaluate
from worldloom.training.checkpoint_files import flatten_state
from worldloom.training.run_info import on_host

sys.path.append(str(Path(__file__).parents[1] / "datasets"))
from dataset_writers import Recorded, write_hdf5, write_minari

CONFIG = TrainingConfig(batch_size=4, sequence_length=3, learning_rate=1e-2, device="cpu", total_steps=12)


@pytest.fixture(scope="module")
def buffer():
    return fill(ReplayBuffer())


@pytest.fixture(scope="module")
def episodes(buffer):
    return [
        Recorded(e["obs"], e["actions"][:-1], e["rewards"][1:], bool(e["is_terminal"][-1])) for e in buffer.episodes()
    ]


def trained(source):
    trainer = Trainer(ToyWorldModel(ToyConfig(), seed=2), CONFIG, [])
    trainer.train(source)
    return trainer


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
@pytest.mark.parametrize("kind", ["hdf5", "minari"])
def test_training_and_held_out_losses_are_the_same(tmp_path, monkeypatch, buffer, episodes, kind):
    pytest.importorskip("h5py" if kind == "hdf5" else "minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    write = {
        "hdf5": lambda: write_hdf5(tmp_path / "x.hdf5", episodes),
        "minari": lambda: write_minari(tmp_path, episodes),
    }
    dataset = worldloom.data.open(write[kind]())
    one, other = trained(buffer), trained(dataset)
    assert_equal(flatten_state(on_host(one.state)), flatten_state(on_host(other.state)))
    parts = buffer.split(0.3)[1], dataset.split(0.3)[1]
    losses = [evaluate(one.model, part, CONFIG) for part in parts]
    assert losses[0] == losses[1]


def test_a_bad_row_stops_training_with_its_place(tmp_path, episodes):
    pytest.importorskip("h5py")
    poisoned = [*episodes[:-1], episodes[-1]._replace(rewards=np.full(12, np.nan, np.float32))]
    dataset = worldloom.data.open(write_hdf5(tmp_path / "x.hdf5", poisoned))
    with pytest.raises(DataError, match=r"Row \d+ of episode 5 of .*x\.hdf5: rewards holds NaN"):
        trained(dataset)


def test_a_model_of_other_shapes_is_refused(tmp_path):
    pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    other = [Recorded(rng.normal(size=(6, 5)).astype(np.float32), np.zeros((5, 1), np.float32), np.zeros(5), False)]
    with pytest.raises(DataError, match="have shape"):
        trained(worldloom.data.open(write_hdf5(tmp_path / "x.hdf5", other)))
