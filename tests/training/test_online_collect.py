"""Collecting experience: replay holds exactly what the environments produced and the policy chose."""

import gymnasium as gym
import jax
import numpy as np
import pytest
from online_worlds import (
    ONLINE_CONFIG,
    Glide,
    assert_equal,
    assert_rows_match_env,
    every_row,
    leaves,
    rows_of_env,
    small_dreamer,
    toy,
)
from tiny_envs import Walk, WalkPicture
from toy_family import PrefillingToy, ToyWorldModel, fill

from worldloom.envs import episode_seed, make_env
from worldloom.errors import DataError
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer


@pytest.fixture
def config():
    return ONLINE_CONFIG


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("kind", [Walk, Glide, WalkPicture])
@pytest.mark.parametrize("family", [ToyWorldModel, PrefillingToy])
def test_replay_holds_the_rows_that_the_environments_produced(config, kind, num_envs, family):
    env = make_env(kind, num_envs, seed=3)
    trainer = Trainer(toy(env, family), config, [])
    trainer.train(env, total_steps=100)
    rows = every_row(trainer.replay)
    assert len(rows["rewards"]) % num_envs == 0
    assert trainer.replay.action_dim == env.action_dim
    assert (~rows["is_last"]).sum() >= 120 - num_envs
    ended = [assert_rows_match_env(kind, rows_of_env(rows, i, num_envs), 3, i) for i in range(num_envs)]
    assert min(map(len, ended)) >= 5
    assert rows["is_terminal"].any()
    assert (rows["is_last"] & ~rows["is_terminal"]).any()


def test_a_random_prefill_is_uniform_unlike_the_policy(config):
    env = make_env(Glide, 2, seed=3)
    trainer = Trainer(toy(env, PrefillingToy), config.replace(prefill=400), [])
    trainer.train(env, total_steps=400)
    rows = every_row(trainer.replay)
    taken = rows["actions"][~rows["is_last"], 0]
    first, later = taken[:400], taken[404:]
    # Kolmogorov's distance of 400 samples from the uniform distribution on [−1, 1] is below 0.08 in 99 of 100 cases.
    distance = lambda x: np.abs(np.sort(x) - np.linspace(-1, 1, len(x))).max() / 2  # noqa: E731
    assert distance(first) < 0.08 < distance(later)
    assert len(np.unique(first)) == 400


@pytest.mark.parametrize("num_envs", [1, 3])
def test_stored_latents_are_those_of_the_policy_that_acted(config, num_envs):
    """Compared before the first update, so weights are constant and no latent has been written back."""
    env = make_env(Glide, num_envs, seed=3)
    model = toy(env, latents=True)
    trainer = Trainer(model, config.replace(prefill=60, env_steps=62), [])
    state = jax.device_get(trainer.state.params)
    trainer.train(env)
    rows = every_row(trainer.replay)
    assert_rows_follow_the_policy(model, state, config.seed, rows, num_envs)


def test_dreamer_stores_the_latents_it_acted_from(config):
    env = make_env(Glide, 2, seed=3)
    model = small_dreamer(env)
    params = model.params
    trainer = Trainer(model, config.replace(prefill=60, env_steps=62), [])
    trainer.train(env)
    assert_rows_follow_the_policy(model, params, config.seed, every_row(trainer.replay), 2)


def assert_rows_follow_the_policy(model, params, seed, rows, num_envs):
    """Run the policy over the stored observations and compare its actions and latents with the stored ones."""
    algorithm = model.algorithm
    act = jax.jit(
        lambda params, *args, **options: algorithm.policy(model.rebuild(model.config, params), *args, **options)
    )
    root = jax.random.fold_in(jax.random.key(seed), 0xFFFFFFFF)
    carry = algorithm.initial_carry(model.config, num_envs)
    for call in range(len(rows["rewards"]) // num_envs):
        now = slice(call * num_envs, (call + 1) * num_envs)
        obs = jax.tree.map(lambda x: x[now], rows["obs"])  # noqa: B023
        key = jax.random.fold_in(root, call + 1)
        carry, actions = act(params, carry, obs, key, is_first=rows["is_first"][now])
        taken = ~rows["is_last"][now]
        for name, stored in leaves(rows["actions"]).items():
            chosen = np.asarray(leaves(actions)[name])
            if chosen.ndim == 1:
                chosen = np.eye(stored.shape[-1], dtype=np.float32)[chosen]
            # Rounding differs a little between this program and the trainer's.
            np.testing.assert_allclose(stored[now][taken], np.clip(chosen[taken], -1, 1), atol=1e-5)
        for name, value in algorithm.stored_latents(carry).items():
            np.testing.assert_allclose(rows["latents"][name][now], value, atol=1e-5)


def test_collecting_appends_to_the_episodes_of_a_given_buffer(config):
    given = fill(ReplayBuffer(10_000))
    before = every_row(given)
    env = make_env(Glide, 2, seed=3)
    trainer = Trainer(toy(env, latents=True), config, [])
    trainer.train(env, total_steps=10, replay=given)
    assert trainer.replay is given
    assert given.latents == {"memory": (1,)}
    rows = every_row(given)
    assert_equal(before, {k: v[: len(before["obs"])] for k, v in rows.items() if k != "latents"})
    new = {k: v[len(before["obs"]) :] for k, v in rows.items() if k != "latents"}
    for i in range(2):
        assert_rows_match_env(Glide, rows_of_env(new, i, 2), 3, i)
    wide = ReplayBuffer(100)
    wide.add_episode(np.zeros((9, 3), np.float32), np.zeros((8, 1), np.float32), np.zeros(8), np.zeros(8, bool))
    with pytest.raises(DataError, match="observations"):
        Trainer(toy(env), config, []).train(env, replay=wide)


def test_a_full_buffer_drops_its_oldest_rows(config):
    env = make_env(Glide, 2, seed=3)
    trainer = Trainer(toy(env, latents=True), config.replace(replay_capacity=30), [])
    trainer.train(env, total_steps=60)
    assert len(trainer.replay) == 30
    assert trainer.replay.state_dict()["next_row"] > 80


def test_ids_functions_and_objects_are_accepted_as_environments(config):
    gym.register("worldloom-tests/Glide-v0", Glide)
    try:
        rows = []
        for source in ("worldloom-tests/Glide-v0", Glide, make_env(Glide, seed=config.seed), Glide()):
            trainer = Trainer(toy(make_env(Glide)), config, [])
            trainer.train(source, total_steps=4)
            # An equal id means the same environment, in which training continues.
            trainer.train("".join(source) if isinstance(source, str) else source, total_steps=8)
            assert trainer.step == 8
            rows.append(every_row(trainer.replay))
        for other in rows[1:]:
            assert_equal(rows[0], other)
    finally:
        gym.registry.pop("worldloom-tests/Glide-v0")


def test_closed_environments_of_the_trainer_are_recreated(config):
    trainer = Trainer(toy(make_env(Walk)), config, [])
    trainer.train(Walk, total_steps=2)
    trainer._env(Walk).close()
    trainer.train(Walk, total_steps=4)
    assert trainer.step == 4


@pytest.mark.parametrize("num_envs", [1, 2])
def test_environments_stepped_outside_of_training_begin_new_episodes(config, caplog, num_envs):
    env = make_env(Walk, num_envs, seed=3)
    trainer = Trainer(toy(env), config, [])
    trainer.train(env, total_steps=5)
    trainer.train(env, total_steps=6)
    assert "outside of training" not in caplog.text
    middle = len(trainer.replay)
    env.reset(seed=5)
    for _ in range(3):
        env.step(env.sample_actions(np.random.default_rng(0)))
    trainer.train(env, total_steps=20)
    assert "reset or stepped outside of training" in caplog.text
    rows = every_row(trainer.replay)
    assert not rows["is_first"][middle - num_envs : middle].all()
    assert rows["is_first"][middle : middle + num_envs].all()
    for number in range(num_envs):
        # Up to there the rows are of episodes 0, 1, … of seed 3; from there on, of episodes 1, 2, … of seed 5.
        env_rows = rows_of_env(rows, number, num_envs)
        assert_rows_match_env(Walk, {k: v[: middle // num_envs] for k, v in env_rows.items()}, 3, number)
        later = {k: v[middle // num_envs :] for k, v in env_rows.items()}
        np.testing.assert_array_equal(later["obs"][0], first_observation(Walk, episode_seed(5, number, 1)))


def first_observation(kind, seed):
    return kind().reset(seed=seed)[0].astype(np.float32)
