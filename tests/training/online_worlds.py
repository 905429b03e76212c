"""Shared by the tests of online training: environments, small models, and a check of rows without worldloom's code."""

import numpy as np
from gymnasium import spaces
from tiny_envs import Walk, WalkPicture
from toy_family import ToyConfig, ToyWorldModel, fill

from worldloom.envs import episode_seed
from worldloom.models.dreamer import DreamerV3Config, DreamerV3WorldModel
from worldloom.models.tdmpc2 import TDMPC2Config, TDMPC2WorldModel
from worldloom.replay import ReplayBuffer
from worldloom.training import TrainingConfig
from worldloom.training.callbacks import Callback

ONLINE_CONFIG = TrainingConfig(
    batch_size=4, sequence_length=3, learning_rate=1e-2, log_interval=4, device="cpu", prefill=20
)
"""Updates begin after 20 decision steps, with one update per decision step from then on."""


class Glide(Walk):
    """:class:`Walk` with a continuous action in [−2, 4]."""

    action_space = spaces.Box(-2, 4, (1,), np.float32)

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step(0.5 + 0.4 * float(action[0]))


class Unseeded(Walk):
    """:class:`Walk` with initial positions that do not depend on the seed."""

    rng = np.random.default_rng(0)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = float(self.rng.normal())
        return self._obs(), {}


class OneStepEpisodes(Unseeded):
    """:class:`Unseeded` with episodes of one step: half of all rows are the first of an episode."""

    def step(self, action):
        obs, reward, *_ = super().step(action)
        return obs, reward, False, True, {}


def rescaled(action):
    """An action in [−1, 1], mapped to [−2, 4]."""
    return (-2 + (action + 1) / 2 * np.float64(6)).astype(np.float32)


NATIVE = {
    Walk: lambda action: int(np.argmax(action)),
    Glide: rescaled,
    WalkPicture: lambda action: {
        "way": int(np.argmax(action["way"])),
        "push": rescaled(action["push"]),
        "keys": np.array([np.argmax(action["keys0"]), np.argmax(action["keys1"])]),
    },
}
"""For each environment, the function from a stored action to the environment's own action."""


def leaves(tree):
    """Arrays of a (dict of) arrays by name."""
    return tree if isinstance(tree, dict) else {"": tree}


def at_index(tree, index):
    """Element ``index`` of each array."""
    return {k: v[index] for k, v in tree.items()} if isinstance(tree, dict) else tree[index]


def every_row(buffer):
    """All rows of ``buffer`` in order of arrival: a batch [rows, ...], with latents if the buffer stores them."""
    ids = np.arange(buffer.state_dict()["first_row"], buffer.state_dict()["next_row"])
    batch = buffer.take(ids)
    if buffer.latents:
        batch["latents"] = buffer.take(ids[:, None], latents=True)["context"]
    return batch


def flat(tree, prefix=""):
    """Arrays of nested dicts by path."""
    if not isinstance(tree, dict):
        return {prefix: np.asarray(tree)}
    return {path: leaf for key, value in tree.items() for path, leaf in flat(value, f"{prefix}/{key}").items()}


def assert_equal(one, other):
    """Assert that two nested dicts of arrays are equal bit for bit."""
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def rows_of_env(batch, env, num_envs):
    """The rows of one environment, in order."""
    if isinstance(batch, dict):
        return {key: rows_of_env(value, env, num_envs) for key, value in batch.items()}
    return batch[env::num_envs]


def assert_rows_match_env(kind, rows, seed, env):
    """Assert that a new environment ``kind``, given the actions in ``rows``, produces these rows.

    ``rows`` are those of environment number ``env`` of a vector with ``seed``. Returns a list of (return, length) of
    the finished episodes.
    """
    world, episode, over, ended = kind(), -1, True, []
    for t in range(len(rows["rewards"])):
        if over:
            episode += 1
            obs, _ = world.reset(seed=episode_seed(seed, env, episode))
            reward, first, terminated, truncated = 0.0, True, False, False
            total, length = 0.0, 0
        else:
            action = at_index(rows["actions"], t - 1)
            assert all(np.abs(part).any() for name, part in leaves(action).items() if name != "push")
            obs, reward, terminated, truncated, _ = world.step(NATIVE[kind](action))
            first, total, length = False, total + float(np.float32(reward)), length + 1
        over = terminated or truncated
        expected = flat(flat_obs(obs))
        stored = flat(at_index(rows["obs"], t) if isinstance(rows["obs"], dict) else rows["obs"][t])
        for name, value in expected.items():
            np.testing.assert_array_equal(stored[name], value.astype(stored[name].dtype), err_msg=f"row {t} {name}")
        assert stored.keys() == expected.keys()
        assert rows["rewards"][t] == np.float32(reward)
        assert rows["is_first"][t] == first
        assert rows["is_terminal"][t] == terminated
        if t + 1 < len(rows["rewards"]):
            assert rows["is_last"][t] == over
        if over:
            ended.append((total, length))
            for part in leaves(at_index(rows["actions"], t)).values():
                assert not part.any(), "the row of an episode's end has an action"
    return ended


def flat_obs(obs):
    """An observation of these environments, under the names and in the shapes that worldloom stores."""
    if not isinstance(obs, dict):
        return obs
    parity = np.eye(2, dtype=np.float32)[obs["body"]["parity"]]
    return {"camera": obs["camera"], "body/position": obs["body"]["position"], "body/parity": parity}


def shapes(env):
    """The fields of a model's config that ``env`` determines."""
    return {"obs_shape": env.obs_shape, "action_dim": env.action_dim, "action_type": env.action_type}


def toy(env, kind=ToyWorldModel, **fields):
    """A toy model for ``env``."""
    return kind(ToyConfig(**shapes(env), **fields))


class MeasurementRecorder(Callback):
    """Records (updates, environment steps, measurements) of everything published."""

    every = 0

    def __init__(self):
        self.records = []

    def on_eval(self, info, measurements):
        self.records.append((info.step, info.env_steps, dict(measurements)))


def buffer_with_latents():
    """A buffer of recorded episodes that stores the toy model's latents."""
    return fill(ReplayBuffer(10_000, latents={"memory": (1,)}), episodes=3, steps=6)


def small_dreamer(env):
    sizes = {"deter_dim": 32, "stoch_dim": 16, "num_categories": 4, "hidden_dim": 16, "mlp_layers": 1, "bins": 5}
    dreams = {"imagination_starts": 2, "imagination_horizon": 3, "blocks": 4}
    return DreamerV3WorldModel(DreamerV3Config(**shapes(env), **sizes, **dreams))


def small_tdmpc2(env):
    sizes = {"latent_dim": 16, "hidden_dim": 16, "encoder_dim": 16, "num_q": 2, "num_bins": 5, "episodic": True}
    plans = {"num_samples": 8, "num_elites": 3, "num_pi_trajs": 2, "iterations": 2}
    return TDMPC2WorldModel(TDMPC2Config(**shapes(env), **sizes, **plans))
