"""A world model as an environment: its rewards are those of imagination, its ends those that the model predicts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from worldloom import DreamerV3WorldModel, create_world_model
from worldloom.envs import ImaginedEnv, ImaginedVectorEnv, ImaginedWorld, make_env
from worldloom.errors import ConfigError, DataError, EnvError
from worldloom.replay import ReplayBuffer

HORIZON = 5
TINY_DREAMER = {"deter_dim": 16, "stoch_dim": 16, "num_categories": 4, "hidden_dim": 8, "blocks": 4, "mlp_layers": 1}
TINY_TDMPC2 = {"latent_dim": 16, "hidden_dim": 16, "encoder_dim": 8}


def disturbed(model):
    """Heads start at zero and would predict nothing: noise on all weights, and rewards of the order of one."""
    rng = np.random.default_rng(0)

    def disturb(x):
        # Biases of DreamerV3's bins, which reach from −e²⁰ to e²⁰: favour those in the middle.
        bins = -0.5 * ((np.arange(255) - 127) / 8) ** 2 if x.shape == (255,) else 0
        return x + (bins + 0.1 * rng.normal(size=x.shape)).astype(x.dtype)

    model.load_params(jax.tree.map(disturb, model.params))
    return model


@pytest.fixture(scope="module")
def dreamer():
    return disturbed(
        create_world_model("dreamerv3:tiny", obs_shape=(3,), action_dim=2, action_type="discrete", **TINY_DREAMER)
    )


@pytest.fixture(scope="module")
def tdmpc2():
    return disturbed(create_world_model("tdmpc2:tiny", obs_shape=(3,), action_dim=2, episodic=True, **TINY_TDMPC2))


@pytest.fixture(params=["dreamer", "tdmpc2"])
def model(request):
    return request.getfixturevalue(request.param)


def replay_for(model, *, terminated=False, episodes=4, steps=12):
    rng = np.random.default_rng(1)
    replay = ReplayBuffer(1000, action_dim=2, action_type=model.config.action_type)
    for _ in range(episodes):
        actions = (
            rng.integers(2, size=steps) if model.config.action_type == "discrete" else rng.uniform(-1, 1, (steps, 2))
        )
        obs = rng.normal(size=(steps + 1, 3)).astype(np.float32)
        replay.add_episode(obs, actions, np.ones(steps, np.float32), terminated=terminated)
    return replay


def some_actions(model, *lead):
    rng = np.random.default_rng(2)
    if model.config.action_type == "discrete":
        return rng.integers(2, size=lead).astype(np.int32)
    return rng.uniform(-1, 1, (*lead, 2)).astype(np.float32)


# ---- Gymnasium -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [True, False])
def test_gymnasiums_checker_has_nothing_to_say(model, sample):
    check_env(ImaginedEnv(model, replay_for(model), horizon=HORIZON, sample=sample))


def test_the_rewards_of_an_episode_are_those_of_imagine(model):
    env = ImaginedEnv(model, replay_for(model), horizon=HORIZON, sample=False)
    actions = some_actions(model, HORIZON)
    env.reset(seed=0, options={"start": 3})
    steps = [env.step(action) for action in actions]
    start = jax.tree.map(lambda x: x[3:4], env.world.params.starts)
    imagined = model.imagine(start, actions[:, None])
    np.testing.assert_allclose([step[1] for step in steps], imagined.rewards[:, 0], rtol=1e-6, atol=1e-6)
    probability = np.minimum(imagined.continues[:, 0] / model.continue_discount, 1)
    np.testing.assert_allclose([step[4]["continue"] for step in steps], probability, rtol=1e-6, atol=1e-6)
    assert np.abs(imagined.rewards).min() > 1e-4
    assert [step[2] for step in steps] == list(probability < 0.5)
    assert [step[3] for step in steps] == [False] * (HORIZON - 1) + [True]
    seen = imagined.states if "obs" not in model.decode(start) else None
    expected = model.decode(imagined.states)["obs"] if seen is None else seen.features
    np.testing.assert_allclose([step[0] for step in steps], np.asarray(expected[1:, 0]), rtol=1e-5, atol=1e-6)


def test_sampled_steps_are_those_of_imagine_with_the_keys_of_the_episode(dreamer):
    world = ImaginedWorld(dreamer, replay_for(dreamer), horizon=HORIZON)
    state, _ = world.reset(world.params, jax.random.key(5))
    action = jnp.int32(1)
    for step in range(3):
        key = jax.random.split(jax.random.fold_in(state.key, step))[0]
        expected = dreamer.imagine(jax.tree.map(lambda x: x[None], state.latent), action[None, None], key)
        state, out = world.step(world.params, state, action)
        np.testing.assert_allclose(out.reward, expected.rewards[0, 0], rtol=1e-6, atol=1e-6)


def test_an_episode_is_a_function_of_its_seed(model):
    def episode(seed):
        env = ImaginedEnv(model, replay_for(model), horizon=HORIZON)
        first, _ = env.reset(seed=seed)
        return first, [env.step(action)[1] for action in some_actions(model, HORIZON)]

    for one, other in zip(episode(3), episode(3), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(episode(3)[0], episode(4)[0])


def test_observations_are_decoded_where_the_model_can(dreamer, tdmpc2):
    assert ImaginedEnv(dreamer, np.zeros((1, 3), np.float32)).observation_space.shape == (3,)
    latent = ImaginedEnv(dreamer, np.zeros((1, 3), np.float32), observation="latent")
    assert latent.observation_space.shape == (32,)
    assert latent.reset()[0].shape == (32,)
    assert ImaginedEnv(tdmpc2, np.zeros((1, 3), np.float32)).observation_space.shape == (16,)
    with pytest.raises(ConfigError, match="decodes no observations"):
        ImaginedEnv(tdmpc2, np.zeros((1, 3), np.float32), observation="decoded")


def test_dicts_of_images_and_actions(getkey):
    model = create_world_model(
        "dreamerv3:tiny",
        obs_shape={"camera": (48, 48, 3), "joints": (2,)},
        action_dim={"arm": 2, "hand": 3},
        action_type={"arm": "continuous", "hand": "discrete"},
        cnn_depth=2,
        **TINY_DREAMER,
    )
    start = {"camera": np.zeros((2, 48, 48, 3), np.uint8), "joints": np.zeros((2, 2), np.float32)}
    env = ImaginedEnv(model, start, horizon=2)
    check_env(env)
    assert env.observation_space["camera"].high.max() == 1.0
    vector = make_env(ImaginedVectorEnv(model, start, 3, horizon=2))
    assert vector.obs_shape == {"camera": (48, 48, 3), "joints": (2,)}
    assert vector.action_dim == {"arm": 2, "hand": 3}
    vector.reset()
    vector.step({"arm": np.zeros((3, 2), np.float32), "hand": np.zeros(3, np.int32)})


# ---- ends of episodes ----------------------------------------------------------------------------------------------


def test_episodes_terminate_as_often_as_the_model_predicts(dreamer):
    world = ImaginedWorld(dreamer, replay_for(dreamer), horizon=1)
    keys = jax.random.split(jax.random.key(0), 4000)
    state, _ = jax.vmap(world.reset, (None, 0))(world.params, keys)
    _, out = jax.jit(jax.vmap(world.step, (None, 0, 0)))(world.params, state, jnp.zeros(4000, jnp.int32))
    assert 0.2 < float(out.continues.mean()) < 0.8
    assert abs(float(out.terminated.mean() - (1 - out.continues).mean())) < 0.03
    assert out.truncated.all()


def test_continues_do_not_contain_the_discount():
    """Of a model that is sure to continue, episodes never terminate."""
    model = create_world_model("dreamerv3:tiny", obs_shape=(3,), action_dim=2, return_horizon=3, **TINY_DREAMER)
    params = model.params
    params["continuation"] = jax.tree.map(jnp.zeros_like, params["continuation"])
    assert model.continue_discount == pytest.approx(2 / 3)
    bias = [path for path, _ in jax.tree_util.tree_leaves_with_path(params["continuation"]) if "bias" in str(path)][-1]
    target = params["continuation"]
    for entry in bias[:-1]:
        target = target[entry.key]
    target[bias[-1].key] = jnp.full_like(target[bias[-1].key], np.log(2.0))  # sigmoid(log 2) = 2/3
    model.load_params(params)
    env = ImaginedEnv(model, np.zeros((1, 3), np.float32), horizon=20)
    env.reset(seed=0)
    steps = [env.step(np.zeros(2, np.float32)) for _ in range(20)]
    np.testing.assert_allclose([step[4]["continue"] for step in steps], 1.0, atol=1e-6)
    assert not any(step[2] for step in steps)


# ---- many at once --------------------------------------------------------------------------------------------------


def test_environments_of_a_vector_are_each_the_single_one(model):
    replay = replay_for(model)
    world = ImaginedWorld(model, replay, horizon=HORIZON, sample=False)
    vector = ImaginedVectorEnv(model, replay, 3, horizon=HORIZON, sample=False)
    vector.reset(seed=0)
    state, actions = vector._state, some_actions(model, 3)
    _, rewards, *_ = vector.step(actions)
    for env in range(3):
        alone = jax.tree.map(lambda x, env=env: x[env], state)
        _, out = jax.jit(world.step)(world.params, alone, actions[env])
        np.testing.assert_allclose(rewards[env], out.reward, rtol=1e-6, atol=1e-6)


def test_a_vector_by_make_env_gives_whole_episodes(model):
    with make_env(ImaginedVectorEnv(model, replay_for(model), 3, horizon=4, sample=False), seed=1) as env:
        row = env.reset()
        lengths, returns = [], np.zeros(3)
        for _ in range(20):
            row = env.step(env.sample_actions(np.random.default_rng(0)))
            assert (row.reward[row.is_first] == 0).all()
            returns = np.where(row.is_first, 0, returns) + row.reward
            for end in row.events:
                lengths.append(end.length)
                assert end.episode_return == pytest.approx(returns[end.env], abs=1e-5)
                assert end.terminated or end.length == 4
        assert lengths


def test_an_imagined_environment_by_make_env_has_the_shapes_of_the_real_one(dreamer):
    with make_env(ImaginedEnv(dreamer, replay_for(dreamer))) as env:
        assert (env.obs_shape, env.action_dim, env.action_type) == ((3,), 2, "discrete")
        assert env.reset().obs.shape == (1, 3)


def test_a_whole_rollout_is_one_compiled_scan(model):
    world = ImaginedWorld(model, replay_for(model), horizon=HORIZON, sample=False)
    actions = some_actions(model, HORIZON, 7)

    @jax.jit
    def returns(params, keys, actions):
        state, _ = jax.vmap(world.reset, (None, 0))(params, keys)

        def step(state, actions):
            state, out = jax.vmap(world.step, (None, 0, 0))(params, state, actions)
            return state, out.reward

        return state.latent, jax.lax.scan(step, state, actions)[1].sum(0)

    start, found = returns(world.params, jax.random.split(jax.random.key(0), 7), actions)
    expected = np.asarray(model.imagine(start, actions).rewards).sum(0)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


# ---- starts and weights --------------------------------------------------------------------------------------------


def test_starts_are_states_observed_in_windows_that_do_not_end_an_episode(dreamer):
    replay = replay_for(dreamer, terminated=True, episodes=1, steps=3)
    env = ImaginedEnv(dreamer, replay, context=2, num_starts=50)
    windows = replay.sample(50, 2)
    kept = ~windows["is_terminal"][:, -1].astype(bool)
    assert 0 < env.world.num_starts == kept.sum() < 50
    state = dreamer.encode(windows["obs"][kept][:, 0])
    state = dreamer.observe(state, windows["actions"][kept][:, 0], windows["obs"][kept][:, 1])
    np.testing.assert_allclose(env.world.params.starts.deter, state.deter, atol=1e-6)
    with pytest.raises(DataError, match="windows of 4 rows end in a terminal row"):
        ImaginedEnv(dreamer, replay, context=9)


def test_starts_may_be_observations_or_states(model):
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    states = model.encode(obs)
    for start in (obs, states):
        given = ImaginedWorld(model, start).params.starts
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), given, states)


def test_new_weights_count_from_the_next_episode(dreamer):
    replay = replay_for(dreamer)
    model = DreamerV3WorldModel(dreamer.config)
    env = ImaginedEnv(model, replay, sample=False)
    params = env.world.params
    assert env.world.params is params
    model.load_params(dreamer.params)
    env.reset(seed=0, options={"start": 0})
    expected = ImaginedEnv(dreamer, replay, sample=False)
    expected.reset(seed=0, options={"start": 0})
    assert env.step(1)[1] == pytest.approx(expected.step(1)[1], abs=1e-6)
    assert env.step(1)[1] != 0


def test_multitask_models_imagine_one_task():
    model = disturbed(
        create_world_model(
            "tdmpc2:tiny", obs_shape=(3,), action_dim=2, num_tasks=2, action_dims=(2, 2), episode_lengths=(9, 9),
            **TINY_TDMPC2,
        )
    )  # fmt: skip
    obs, actions = np.ones((1, 3), np.float32), some_actions(model, 1, 1)
    rewards = []
    for task in (0, 1):
        env = ImaginedEnv(model, obs, task=task)
        env.reset(seed=0)
        rewards.append(env.step(actions[0, 0])[1])
        tasks = jnp.array([task])
        expected = model.imagine(model.encode(obs, task=tasks), actions, task=tasks).rewards
        np.testing.assert_allclose(rewards[-1], expected[0, 0], rtol=1e-6, atol=1e-6)
    assert rewards[0] != rewards[1]
    with pytest.raises(DataError, match="give task="):
        ImaginedEnv(model, obs)
    with pytest.raises(ConfigError, match="There is no task 2; the model has the tasks 0 … 1"):
        ImaginedEnv(model, obs, task=2)
    with pytest.raises(ConfigError, match=r"task must be an integer ≥ 0, not 0\.5"):
        ImaginedEnv(model, obs, task=0.5)


def test_episodes_of_a_task_start_where_that_task_was_recorded():
    shapes = {"obs_shape": (3,), "action_dim": 2, "num_tasks": 3, "device": "cpu"}
    model = create_world_model("tdmpc2:tiny", **shapes, **TINY_TDMPC2)
    replay = ReplayBuffer(1000)
    for task in (0, 1):
        replay.add_episode(np.full((9, 3), task), np.zeros((8, 2)), np.zeros(8), truncated=True, task=task)
    world = ImaginedWorld(model, replay, task=1, num_starts=32)
    expected = model.encode(np.ones((1, 3), np.float32), task=jnp.array([1]))
    assert 4 < world.num_starts < 28
    for start, own in zip(*map(jax.tree.leaves, (world.params.starts, expected)), strict=True):
        np.testing.assert_allclose(start, np.broadcast_to(own, start.shape), atol=1e-5)
    with pytest.raises(DataError, match="of 32 windows none is of task 2"):
        ImaginedWorld(model, replay, task=2, num_starts=32)


# ---- mistakes ------------------------------------------------------------------------------------------------------


def test_mistakes_are_answered_with_a_sentence(dreamer):
    obs = np.zeros((2, 3), np.float32)
    for arguments, message in [
        ({"horizon": 0}, "horizon must be an integer ≥ 1, not 0"),
        ({"num_starts": True}, "num_starts must be"),
        ({"observation": "pixels"}, "observation must be 'auto'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            ImaginedEnv(dreamer, obs, **arguments)
    with pytest.raises(ConfigError, match="num_envs must be an integer ≥ 1"):
        ImaginedVectorEnv(dreamer, obs, 0)
    with pytest.raises(TypeError, match="needs a WorldModel, not a str"):
        ImaginedEnv("dreamerv3:tiny", obs)
    with pytest.raises(DataError, match="obs has shape"):
        ImaginedEnv(dreamer, np.zeros((2, 4), np.float32))
    with pytest.raises(DataError, match="replay buffer is empty"):
        ImaginedEnv(dreamer, ReplayBuffer(10))
    with pytest.raises(DataError, match="nowhere to start"):
        ImaginedEnv(dreamer, np.zeros((0, 3), np.float32))
    states = dreamer.initial_state(2)
    with pytest.raises(DataError, match="states to start from have shapes"):
        ImaginedEnv(dreamer, jax.tree.map(lambda x: x[..., :2], states))


def test_mistakes_in_steps_are_answered_with_a_sentence(tdmpc2):
    env = ImaginedEnv(tdmpc2, np.zeros((2, 3), np.float32))
    with pytest.raises(EnvError, match="Call reset before step"):
        env.step(np.zeros(2, np.float32))
    with pytest.raises(ConfigError, match="there are the starts 0 to 1"):
        env.reset(options={"start": 2})
    env.reset(seed=0)
    with pytest.raises(DataError, match="shape"):
        env.step(np.zeros(3, np.float32))
    with pytest.raises(DataError, match="NaN"):
        env.step(np.full(2, np.nan, np.float32))
    vector = ImaginedVectorEnv(tdmpc2, np.zeros((2, 3), np.float32), 2)
    with pytest.raises(ConfigError, match="reset together"):
        vector.reset(seed=[0, 1])
    with pytest.raises(EnvError, match="Call reset before step"):
        vector.step(np.zeros((2, 2), np.float32))


def test_actions_beyond_their_bounds_act_like_the_bounds(tdmpc2):
    rewards = []
    for size in (1.0, 7.0):
        env = ImaginedEnv(tdmpc2, np.zeros((1, 3), np.float32))
        env.reset(seed=0)
        rewards.append(env.step(np.full(2, size, np.float32))[1])
    assert rewards[0] == rewards[1]
