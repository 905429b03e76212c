import sys
from pathlib import Path

import pytest
from toy_family import ToyConfig, ToyWorldModel, fill

from worldloom.replay import ReplayBuffer
from worldloom.training import TrainingConfig

sys.path.append(str(Path(__file__).parents[1] / "envs"))  # for tiny_envs


@pytest.fixture
def buffer():
    return fill(ReplayBuffer(10_000))


@pytest.fixture
def held_out():
    return fill(ReplayBuffer(10_000), seed=1)


@pytest.fixture
def model():
    return ToyWorldModel(ToyConfig())


@pytest.fixture
def config():
    """A short run with log records at steps 4, 8, 12, …"""
    return TrainingConfig(
        total_steps=20, batch_size=4, sequence_length=5, learning_rate=1e-2, log_interval=4, device="cpu"
    )
