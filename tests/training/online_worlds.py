"""Environments for the tests of online training, and what happened in them, told once more without worldloom."""

import numpy as np
from gymnasium import spaces
from tiny_envs import Walk, WalkPicture

from worldloom.envs import episode_seed


class Glide(Walk):
    """:class:`Walk` with a continuous action in [−2, 4]."""

    action_space = spaces.Box(-2, 4, (1,), np.float32)

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step(0.5 + 0.4 * float(action[0]))


class Endless(Walk):
    """:class:`Walk` that only ever ends by truncation."""

    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        return np.clip(obs, -10, 10), float(np.clip(reward, -10, 10)), False, truncated, info


class Moody(Walk):
    """:class:`Walk` with randomness that no seed reaches."""

    rng = np.random.default_rng(0)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = float(self.rng.normal())
        return self._obs(), {}


class Once(Moody):
    """:class:`Moody` with episodes of one step: half of all rows are a first one."""

    def step(self, action):
        obs, reward, *_ = super().step(action)
        return obs, reward, False, True, {}


def stretched(action):
    """[−1, 1] as [−2, 4]."""
    return (-2 + (action + 1) / 2 * np.float64(6)).astype(np.float32)


NATIVE = {
    Walk: lambda action: int(np.argmax(action)),
    Endless: lambda action: int(np.argmax(action)),
    Glide: lambda action: stretched(action),
    WalkPicture: lambda action: {
        "way": int(np.argmax(action["way"])),
        "push": stretched(action["push"]),
        "keys": np.array([np.argmax(action["keys0"]), np.argmax(action["keys1"])]),
    },
}
"""How an action as replay holds it becomes the environment's own."""


def leaves(tree):
    """Arrays of a (dict of) arrays by name."""
    return tree if isinstance(tree, dict) else {"": tree}


def pick(tree, index):
    """Element ``index`` of each array."""
    return {k: v[index] for k, v in tree.items()} if isinstance(tree, dict) else tree[index]


def every_row(buffer):
    """All rows held, in order of arrival: a batch [rows, ...], with latents where they are stored."""
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
    """Nested dicts of arrays, bit for bit."""
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def stream(batch, env, num_envs):
    """The rows of one environment, in order."""
    if isinstance(batch, dict):
        return {key: stream(value, env, num_envs) for key, value in batch.items()}
    return batch[env::num_envs]


def assert_happened(kind, rows, seed, env):
    """The rows of environment ``env`` are what a fresh ``kind`` shows for their actions. Returns (returns, lengths)."""
    world, episode, over, ended = kind(), -1, True, []
    for t in range(len(rows["rewards"])):
        if over:
            episode += 1
            obs, _ = world.reset(seed=episode_seed(seed, env, episode))
            reward, first, terminated, truncated = 0.0, True, False, False
            total, length = 0.0, 0
        else:
            action = pick(rows["actions"], t - 1)
            assert all(np.abs(part).any() for name, part in leaves(action).items() if name != "push")
            obs, reward, terminated, truncated, _ = world.step(NATIVE[kind](action))
            first, total, length = False, total + float(np.float32(reward)), length + 1
        over = terminated or truncated
        told = flat(flat_obs(obs))
        held = flat(pick(rows["obs"], t) if isinstance(rows["obs"], dict) else rows["obs"][t])
        for name, value in told.items():
            np.testing.assert_array_equal(held[name], value.astype(held[name].dtype), err_msg=f"row {t} {name}")
        assert held.keys() == told.keys()
        assert rows["rewards"][t] == np.float32(reward)
        assert rows["is_first"][t] == first
        assert rows["is_terminal"][t] == terminated
        if t + 1 < len(rows["rewards"]):
            assert rows["is_last"][t] == over
        if over:
            ended.append((total, length))
            for part in leaves(pick(rows["actions"], t)).values():
                assert not part.any(), "An action was stored where none was taken."
    return ended


def flat_obs(obs):
    """An observation of these environments as worldloom names and shapes it."""
    if not isinstance(obs, dict):
        return obs
    parity = np.eye(2, dtype=np.float32)[obs["body"]["parity"]]
    return {"camera": obs["camera"], "body/position": obs["body"]["position"], "body/parity": parity}
