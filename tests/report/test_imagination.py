"""Plots of imagination depend on what a model can do, not on its family: a counter whose predictions are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct

from worldloom.config import BaseConfig, config_dataclass
from worldloom.errors import DataError
from worldloom.models.base import WorldModel, compiled
from worldloom.replay import ReplayBuffer
from worldloom.report.imagination import draw_imagination, horizon_errors
from worldloom.report.openloop import open_loop

pytest.importorskip("matplotlib")


@config_dataclass
class CounterConfig(BaseConfig):
    obs_shape: tuple[int, ...] = (1,)
    action_dim: int = 1
    precision: str = "float32"


@struct.dataclass
class CounterState:
    place: jax.Array
    """[..., 1] what was seen last, or is imagined."""
    steps: jax.Array
    """[..., 1] rows since the episode began: a memory that a single observation does not give."""

    @property
    def features(self):
        return jnp.concatenate([self.place, self.steps], -1)


class Trajectory(struct.PyTreeNode):
    states: CounterState
    rewards: jax.Array


class Counter(WorldModel):
    """Predicts that an action adds itself to the observation, which is true, and 1 as every reward."""

    config_class = CounterConfig

    @staticmethod
    def build(config, dtype, rngs):
        return {"unused": nnx.Linear(1, 1, rngs=rngs)}

    @compiled
    def encode(self, obs, key=None):
        return CounterState(obs, jnp.zeros_like(obs))

    @compiled
    def observe(self, state, action, obs, key=None):
        return CounterState(obs, state.steps + 1)

    @compiled
    def imagine(self, state, actions, key=None):
        def step(state, action):
            state = CounterState(state.place + action, state.steps + 1)
            return state, state

        _, later = jax.lax.scan(step, state, actions)
        states = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), state, later)
        return Trajectory(states, jnp.ones(actions.shape[:2]))

    @compiled
    def decode(self, state):
        return {"value": state.steps[..., 0]}


class CounterWithDecoder(Counter):
    @compiled
    def decode(self, state):
        return {"obs": state.place}


class CounterWithTasks(CounterWithDecoder):
    """What it decodes is shifted by the task."""

    @compiled
    def encode(self, obs, key=None, *, task):
        return CounterState(obs, jnp.zeros_like(obs))

    @compiled
    def observe(self, state, action, obs, key=None, *, task):
        return CounterState(obs, state.steps + 1)

    @compiled
    def imagine(self, state, actions, key=None, *, task):
        return Counter.imagine(self, state, actions)

    @compiled
    def decode(self, state, *, task):
        return {"obs": state.place + task[:, None]}


class CounterWithoutImagination(Counter):
    imagine = property()


@pytest.fixture
def batch():
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 5, 1)).astype(np.float32)
    obs = np.concatenate([np.zeros((3, 1, 1), np.float32), np.cumsum(actions, 1)[:, :-1]], 1)
    return {"obs": obs, "actions": actions, "rewards": np.zeros((3, 5), np.float32)}


@pytest.fixture
def replay(batch):
    replay = ReplayBuffer(100)
    for obs, actions in zip(batch["obs"], batch["actions"], strict=True):
        replay.add_episode(obs, actions[:-1], np.zeros(4, np.float32))
    return replay


def test_a_model_without_observations_gets_its_errors_by_horizon(tmp_path, replay):
    assert draw_imagination(Counter(CounterConfig()), replay, tmp_path) == [tmp_path / "horizon.png"]


def test_a_model_with_observations_gets_an_open_loop_prediction(tmp_path, replay):
    assert draw_imagination(CounterWithDecoder(CounterConfig()), replay, tmp_path) == [tmp_path / "open_loop.png"]


def test_errors_by_horizon_are_against_states_that_remember_the_episode(batch):
    errors = horizon_errors(Counter(CounterConfig()), batch)
    np.testing.assert_array_equal(errors.imagined["reward"], np.ones(4))
    np.testing.assert_array_equal(errors.imagined["value"], np.zeros(4))
    np.testing.assert_allclose(errors.imagined["latent"], np.zeros(4), atol=1e-6)
    np.testing.assert_array_equal(errors.still["value"], [1, 2, 3, 4])


def test_quantities_that_a_model_lacks_are_left_out(batch):
    assert horizon_errors(CounterWithDecoder(CounterConfig()), batch).imagined.keys() == {"reward", "latent"}


def test_the_task_of_a_batch_reaches_a_model_that_takes_tasks(batch):
    model = CounterWithTasks(CounterConfig())
    task = np.array([0, 10, 20], np.int32)
    prediction = open_loop(model, {**batch, "task": task}, observed=2).prediction["obs"]
    np.testing.assert_allclose(prediction, batch["obs"] + task[:, None, None], atol=1e-5)
    without = open_loop(CounterWithDecoder(CounterConfig()), {**batch, "task": task}, observed=2).prediction["obs"]
    np.testing.assert_allclose(without, batch["obs"], atol=1e-6)


def test_what_cannot_be_plotted_is_refused_with_one_sentence(tmp_path, replay):
    with pytest.raises(TypeError, match="CounterWithoutImagination has no method imagine"):
        draw_imagination(CounterWithoutImagination(CounterConfig()), replay, tmp_path)
    with pytest.raises(DataError, match="no recorded episode has two rows"):
        draw_imagination(Counter(CounterConfig()), ReplayBuffer(10), tmp_path)
    assert not list(tmp_path.iterdir())
