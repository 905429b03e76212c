"""Recipes fit their environment, and given fields take precedence."""

import gymnasium as gym
import numpy as np
import pytest

from worldloom import create_world_model, list_models
from worldloom.envs import make_env
from worldloom.envs.jax.classic import Pendulum
from worldloom.envs.make import JAX_SUITES
from worldloom.errors import ConfigError, UnknownFieldError
from worldloom.models.tdmpc2 import recipes as tdmpc2_recipes
from worldloom.models.tdmpc2.recipes import never_terminates
from worldloom.training import TrainingConfig, play
from worldloom.training.recipes import recipe


class Camera(gym.Env):
    observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)


@pytest.mark.parametrize("spec", ["Pendulum-v1", "CartPole-v1"])
@pytest.mark.parametrize("name", [name for name in list_models() if name.endswith((":tiny", ":5m", ":size12m"))])
def test_a_recipe_gives_valid_model_and_training_configs(name, spec):
    with make_env(spec) as env:
        model, training, reasons = recipe(name, env)
        config = TrainingConfig(**training)
        assert config.device == "auto"
        assert {*reasons} <= {*model, *training}
        if name.endswith(":tiny"):
            assert create_world_model(name, **model).config.action_type == env.action_type


@pytest.mark.parametrize(
    ("spec", "only_time_limits"),
    [("Pendulum-v1", True), ("CartPole-v1", False), ("MountainCarContinuous-v0", False), (Camera, False)],
)
def test_tdmpc2_is_episodic_wherever_episodes_may_terminate(spec, only_time_limits):
    with make_env(spec) as env:
        assert never_terminates(env) is only_time_limits
        assert recipe("tdmpc2:tiny", env).model["episodic"] is not only_time_limits


def test_the_tiny_size_looks_for_ends_of_episodes_with_actions_that_last():
    for spec, size, policy in (
        ("MountainCarContinuous-v0", "tiny", "correlated"),
        ("Acrobot-v1", "tiny", "correlated"),
        ("Pendulum-v1", "tiny", None),
        ("Acrobot-v1", "5m", None),
    ):
        with make_env(spec) as env:
            assert recipe(f"tdmpc2:{size}", env).training.get("prefill_policy") == policy


def test_given_fields_take_precedence_and_others_are_derived_from_them():
    with make_env("Pendulum-v1") as env:
        model, training, reasons = recipe("tdmpc2:tiny", env, {"prefill": 7, "episodic": True, "batch_size": 3})
        assert (training["prefill"], training["prefill_updates"], training["batch_size"]) == (7, 14, 3)
        assert model["episodic"] is True
        assert not {"prefill", "episodic"} & reasons.keys()
        training = recipe("tdmpc2:tiny", env).training
        assert (training["prefill"], training["prefill_updates"]) == (2_000, 4_000)
        # Two updates a step.
        assert training["train_ratio"] == 2 * training["batch_size"] * training["sequence_length"]
        given = {"batch_size": 8, "sequence_length": 5, "horizon": 6}
        assert recipe("tdmpc2:tiny", env, given).training["train_ratio"] == 2 * 8 * 7
        assert recipe("tdmpc2:tiny", env, {"episode_length": 500}).training["prefill"] == 2_500
        larger = recipe("tdmpc2:5m", env).training
        assert "train_ratio" not in larger
        assert larger["prefill"] == larger["prefill_updates"] == 1_000


@pytest.mark.parametrize("name", ["tdmpc2:tiny", "dreamerv3:tiny"])
@pytest.mark.parametrize("spec", ["Pendulum-v1", None])
def test_given_fields_that_no_recipe_chooses_are_in_the_config_that_has_them(name, spec):
    env = None if spec is None else make_env(spec)
    of_model = {"tdmpc2:tiny": {"horizon": 5}, "dreamerv3:tiny": {"imagination_horizon": 5}}[name]
    of_training = {"seed": 7, "lr_schedule": "cosine", "total_steps": 300, "batch_size": 7}
    model, training, reasons = recipe(name, env, {**of_model, **of_training})
    assert {**model, **of_model} == model
    assert {**training, **of_training} == training
    assert not {*of_model} & {*training}
    assert not {*of_training} & {*model}
    assert not {*of_model, *of_training} & {*reasons}
    TrainingConfig(**training)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nonsense": 1}, "Neither TDMPC2Config nor TrainingConfig has a field 'nonsense'"),
        ({"batch_sise": 1}, "Did you mean 'batch_size'"),
        ({"horizons": 1}, "Did you mean 'horizon'"),
        ({3: 1}, "has a field '3'"),
    ],
)
def test_a_given_field_of_neither_config_is_refused_with_the_nearest_name(given, message):
    with pytest.raises(UnknownFieldError, match=message):
        recipe("tdmpc2:tiny", None, given)


def test_tdmpc2_has_its_own_settings_for_discrete_actions():
    with make_env("CartPole-v1") as env:
        model, training, reasons = recipe("tdmpc2:tiny", env, {"tau": 0.5})
        assert (model["tau"], model["value_coef"], training["train_ratio"]) == (0.5, 1.0, 128.0)
        assert reasons["value_coef"] == "discrete actions"
        assert training["prefill"] == training["prefill_updates"] == 1_000
        assert "value_coef" not in recipe("dreamerv3:tiny", env).model
    with make_env("Pendulum-v1") as env:
        assert "value_coef" not in recipe("tdmpc2:tiny", env).model


def test_tdmpc2_has_the_latent_size_of_its_image_encoder():
    with make_env(Camera) as env:
        assert recipe("tdmpc2:tiny", env).model["latent_dim"] == 512


def test_each_of_many_environments_collects_a_window_before_the_first_update():
    with make_env("CartPole-v1", 64) as env:
        assert recipe("dreamerv3:tiny", env).training["prefill"] == 64 * 34
        assert recipe("dreamerv3:tiny", env, {"prefill": 5}).training["prefill"] == 5
        assert recipe("dreamerv3:tiny", env, {"sequence_length": 4}).training["prefill"] == 1_000
        many = recipe("tdmpc2:tiny", env, {"sequence_length": 20}).training
        assert many["prefill"] == many["prefill_updates"] == 64 * 22
    with make_env("CartPole-v1", 4) as env:
        assert recipe("dreamerv3:tiny", env).training["prefill"] == 1_000


class Shapes:
    """The attributes of environments that recipes read."""

    num_envs, action_repeat, episode_length, action_dim, action_type = 1, 1, 100, 2, "continuous"

    def __init__(self, obs_shape, **settings):
        self.obs_shape, self.settings = obs_shape, settings


@pytest.mark.parametrize(
    ("env", "warns"),
    [
        (Shapes((3, 64, 64), spec="atari:pong"), True),
        (Shapes((96, 96, 3), spec="CarRacing-v3"), True),
        (Shapes({"eyes": (64, 64, 3), "joints": (4,)}, spec="robot:Arm-v0"), True),
        (Shapes((9, 64, 64), spec="atari:pong", frame_stack=3), False),
        (Shapes((64, 64, 3), spec=None), False),
        (Shapes((10, 5, 1), spec="jax:Catch"), False),
        (Shapes((4,), spec="CartPole-v1"), False),
    ],
)
def test_tdmpc2_warns_of_single_images_whatever_their_size(env, warns, caplog):
    recipe("tdmpc2:tiny", env)
    assert ("shows no velocities" in caplog.text) == warns
    assert set(tdmpc2_recipes.JAX_SUITES) == set(JAX_SUITES)


@pytest.mark.parametrize(
    ("env", "said"),
    [(gym.make("Pendulum-v1"), "make_env makes them"), ("Pendulum-v1", "make_env makes them"), (Pendulum(), "make_env"),
     (gym.Env, "the class Env"), (3, "type int"), ({}, "type dict")],
    ids=["gymnasium", "id", "jax", "class", "number", "dict"],
)  # fmt: skip
def test_what_make_env_has_not_made_is_refused_by_recipe_and_play(env, said):
    model = create_world_model("tdmpc2:tiny", obs_shape=(3,), action_dim=1, device="cpu")
    for refuse in (lambda: recipe("tdmpc2:tiny", env), lambda: play(model, env, episodes=1)):
        with pytest.raises(ConfigError, match=f"as make_env returns them are expected, not .*{said}"):
            refuse()


def test_an_environment_without_spaces_is_refused():
    with pytest.raises(ConfigError, match="Env has no observation_space and no action_space"):
        make_env(gym.Env)
