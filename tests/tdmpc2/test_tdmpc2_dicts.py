"""Pictures and vectors together, from the environment to the agent: collected, replayed, trained on, acted on."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from tdmpc2_variants import SMALL

from worldloom import create_world_model, from_pretrained
from worldloom.envs import ImaginedEnv, make_env
from worldloom.training import Trainer, TrainingConfig


class Grid(gym.Env):
    """A 5×5 grid whose marked cell and a vector both tell the place; an episode has 6 steps."""

    def __init__(self):
        self.observation_space = spaces.Dict(
            {"grid": spaces.Box(0, 255, (5, 5, 1), np.uint8), "place": spaces.Box(-1, 1, (2,), np.float32)}
        )
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)

    def observe(self):
        grid = np.zeros((5, 5, 1), np.uint8)
        row, column = np.round(2 + 2 * self.place).astype(int)
        grid[row, column] = 255
        return {"grid": grid, "place": self.place.copy()}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = np.zeros(2, np.float32), 0
        return self.observe(), {}

    def step(self, action):
        self.place = np.clip(self.place + 0.5 * action, -1, 1).astype(np.float32)
        self.steps += 1
        return self.observe(), float(self.place.sum()), False, self.steps >= 6, {}


def test_a_model_of_pictures_and_vectors_goes_all_the_way(tmp_path):
    training = TrainingConfig(
        total_steps=2, batch_size=4, sequence_length=4, prefill=30, device="cpu", log_interval=1, updates_per_call=1
    )
    with make_env(Grid, num_envs=2) as env:
        model = create_world_model("tdmpc2:tiny", obs_shape=env.obs_shape, action_dim=env.action_dim, **SMALL)
        before = np.asarray(model.params["encoder"]["images"][0]["convs"][0]["kernel"])
        trainer = Trainer(model, training, [])
        trainer.train(env)
        assert set(trainer.replay.obs_shape) == {"grid", "place"}
    after = np.asarray(model.params["encoder"]["images"][0]["convs"][0]["kernel"])
    assert not np.array_equal(after, before)

    batch = trainer.replay.sample(2, 5)
    assert model.trust(batch).rows["q_disagreement"].shape == (2, 5)
    imagined = ImaginedEnv(model, trainer.replay, horizon=2)
    imagined.reset(seed=0)
    assert np.isfinite(imagined.step(np.zeros(2, np.float32))[1])

    loaded = from_pretrained(model.save_pretrained(tmp_path))
    world = Grid()
    obs, _ = world.reset(seed=0)
    action = model.policy(world, mode="greedy")(obs)
    assert world.action_space.contains(action)
    np.testing.assert_array_equal(loaded.policy(mode="greedy")(obs), action)
