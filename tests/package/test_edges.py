"""Values at the edges of what functions take: each works, or is refused by a sentence."""

import dataclasses

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import worldloom.data
from worldloom import DataError, create_world_model
from worldloom.envs import EnvSpaces, make_env
from worldloom.envs.jax import make as jax_make
from worldloom.envs.time_step import scalars
from worldloom.errors import ConfigError, WeightsError
from worldloom.interop import load_official_dreamerv3, to_official_dreamerv3
from worldloom.interop.dreamerv3 import official_name
from worldloom.models.tdmpc2 import TDMPC2Config
from worldloom.replay import ReplayBuffer
from worldloom.report.curves import points
from worldloom.training import Trainer, TrainingConfig

TDMPC2 = {"latent_dim": 16, "hidden_dim": 16, "encoder_dim": 16, "num_samples": 8, "num_elites": 4, "num_pi_trajs": 2}
DREAMER = {"deter_dim": 16, "stoch_dim": 64, "num_categories": 2, "hidden_dim": 16, "mlp_layers": 1, "blocks": 2}


def test_a_single_task_of_a_multitask_model_has_no_terminations_either():
    with pytest.raises(ConfigError, match="A multitask model has no terminations"):
        TDMPC2Config(obs_shape=(4,), action_dim=2, num_tasks=1, episodic=True)


def test_tasks_that_a_model_does_not_have_are_refused():
    buffer = ReplayBuffer(100)
    for task in (0, 3):
        buffer.add_episode(np.zeros((9, 3)), np.zeros((8, 2)), np.zeros(8), truncated=True, task=task)
    model = create_world_model("tdmpc2:tiny", obs_shape=(3,), action_dim=2, num_tasks=2, device="cpu", **TDMPC2)
    config = TrainingConfig(total_steps=1, batch_size=32, sequence_length=4, device="cpu")
    with pytest.raises(DataError, match="The data hold task 3; the model has the tasks 0 … 1"):
        Trainer(model, config, []).train(buffer)


def test_an_intrinsic_reward_begins_anew_in_a_new_run():
    shapes = {"obs_shape": (3,), "action_dim": 2, "device": "cpu", "explore": "disagreement"}
    source = create_world_model("tdmpc2:tiny", **shapes, **TDMPC2)
    source.explorer.weight[...] = jnp.zeros(())
    model = create_world_model("tdmpc2:tiny", **shapes, **TDMPC2, explore_weight=0.5, init_from=source)
    assert float(model.explorer.weight[...]) == 0.5


def test_weights_of_the_reference_are_exchanged_beside_an_intrinsic_reward():
    shapes = {"obs_shape": (3,), "action_dim": 2, "explore": "disagreement"}
    model = create_world_model("dreamerv3:tiny", **shapes, device="cpu", **DREAMER)
    official = to_official_dreamerv3(model)
    assert not any("explorer" in name for name in official)
    del official["slowval_count/value"]
    loaded = load_official_dreamerv3(official, **shapes, num_categories=2)
    for part in ("rssm", "actor", "critic"):
        jax.tree.map(np.testing.assert_array_equal, model.params[part], loaded.params[part])
    with pytest.raises(WeightsError, match=r"no part like my_head\.kernel"):
        official_name("my_head.kernel")


def test_the_axis_of_a_curve_is_one_for_the_whole_run():
    records = [
        {"step": 2000, "env_steps": 0, "eval/return": 1.0},
        {"step": 6000, "env_steps": 2000, "eval/return": 2.0},
        {"step": 7000, "env_steps": 3000, "eval/return": 3.0},
    ]
    x, y = points(records, "eval/return")
    assert (x.tolist(), y.tolist()) == ([0, 2000, 3000], [1, 2, 3])


@pytest.mark.parametrize(
    ("value", "kept"),
    [(2**64, 2.0**64), (10**400, None), (True, 1.0), (np.bool_(False), 0.0), (np.float32(2), 2.0), (np.nan, None)],
)
def test_numbers_of_any_size_may_be_in_an_info(value, kept):
    assert scalars({"x": value}) == ({} if kept is None else {"x": kept})


def test_a_policy_takes_integer_spaces_that_do_not_hold_zero():
    small, negative = gym.spaces.Box(1, 10, (3,), np.int64), gym.spaces.Box(-5, -2, (2,), np.int8)
    spaces = EnvSpaces(gym.spaces.Dict({"small": small, "negative": negative}), gym.spaces.Discrete(2))
    shapes = {"obs_shape": {"small": (3,), "negative": (2,)}, "action_dim": 2, "action_type": "discrete"}
    policy = create_world_model("dreamerv3:tiny", **shapes, device="cpu", **DREAMER).policy(spaces)
    assert policy(spaces.observation.sample()) in (0, 1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_episode_steps": 50}, "time_limit"),
        ({"disable_env_checker": True}, "leave it out"),
        ({"worker_timeout": 0}, "worker_timeout must be seconds above 0, not 0"),
        ({"worker_timeout": None}, "worker_timeout must be seconds above 0"),
    ],
)
def test_arguments_of_environments_are_refused_by_a_sentence(options, text):
    with pytest.raises(ConfigError, match=text):
        make_env("Pendulum-v1", **options)


def test_download_is_refused_where_there_is_nothing_to_download(tmp_path):
    np.savez(tmp_path / "x.npz", observations=np.zeros((4, 2)), actions=np.zeros((4, 1)), rewards=np.zeros(4))
    with pytest.raises(ConfigError, match="download is not for"):
        worldloom.data.open(tmp_path / "x.npz", download=True)


@dataclasses.dataclass(frozen=True)
class Line:
    """Without a hash: its field is an array."""

    start: jax.Array
    obs_shape = (1,)
    action_dim = 1
    action_type = "continuous"
    time_limit = 6

    def reset(self, key):
        return self.start, self.start

    def step(self, key, state, action):
        after = state + action
        return after, after, action[0], jnp.asarray(False), jnp.asarray(False), {}


@pytest.mark.parametrize("repeat", [1, 2])
def test_environments_in_jax_need_no_hash(repeat):
    with make_env(Line(jnp.zeros(1)), 2, action_repeat=repeat) as env:
        env.reset()
        step = env.step(np.ones((2, 1), np.float32))
    np.testing.assert_array_equal(step.obs, np.full((2, 1), repeat))
    np.testing.assert_array_equal(step.reward, np.full(2, repeat))


def test_a_suite_that_cuts_its_own_episodes_refuses_a_longer_limit(monkeypatch):
    monkeypatch.setattr(jax_make, "make_jax_env", lambda spec, **options: Line(jnp.zeros(1)))
    options = {"action_repeat": 1, "render": False, "options": {}}
    assert jax_make.make_backend("gymnax:Line", 1, time_limit=3, **options).time_limit == 3
    with pytest.raises(ConfigError, match="after 6 steps itself, so time_limit=9 cannot lengthen them"):
        jax_make.make_backend("gymnax:Line", 1, time_limit=9, **options)
