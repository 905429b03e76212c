"""What environments return is checked: in this process, in workers, and in Gymnasium's vector environments."""

import re

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tiny_envs import Nan, Steady, Walk, WalkPicture

from worldloom.envs import BadStep, EpisodeEnd, WorkerRestart, make_env
from worldloom.errors import ConfigError, DataError, EnvContractError


class Odd(gym.Env):
    """Observations, rewards and flags as given; the first is of reset, and steps return the others."""

    def __init__(self, space=None, obs=0, step=None, reset=None, action_space=None):
        self.observation_space = spaces.Discrete(4) if space is None else space
        self.action_space = spaces.Discrete(2) if action_space is None else action_space
        self.obs, self.answers = obs, {"step": step, "reset": reset}

    def reset(self, *, seed=None, options=None):
        first = self.obs[0] if isinstance(self.obs, list) else self.obs
        return (first, {}) if self.answers["reset"] is None else self.answers["reset"]

    def step(self, action):
        later = self.obs[1] if isinstance(self.obs, list) else self.obs
        return (later, 0.0, False, False, {}) if self.answers["step"] is None else self.answers["step"]


class WithoutSeed(Odd):
    def reset(self):
        return 0


def take_steps(env, count=1):
    """Reset, and take ``count`` steps with the action 0."""
    env.reset()
    for _ in range(count):
        env.step(env._actions.unwrap(env._actions.zeros(env.num_envs)))


BLACK = np.zeros((48, 48, 3), np.uint8)
IMAGE = spaces.Box(0, 255, (48, 48, 3), np.uint8)
CASES = {
    "an observation alone from reset": ({"reset": 0}, r"reset returned 0 \(int\); a tuple \(observation, info\)"),
    "an array alone from reset": ({"reset": np.zeros(2)}, "reset returned array"),
    "two numbers from reset": ({"reset": (0, 1)}, "reset returned a tuple of 2 entries; .*info a dict"),
    "four values from step": ({"step": (0, 0.0, False, {})}, "step returned a tuple of 4 entries; .*truncated, info"),
    "a list from step": ({"step": [0, 0.0, False, False, {}]}, "step returned a list of 5 entries"),
    "a reward of shape (1,)": (
        {"step": (0, np.ones(1), False, False, {})},
        r"reward is .* of shape \(1,\)",
    ),
    "a text as reward": ({"step": (0, "1.0", False, False, {})}, r"reward is '1.0' \(str\)"),
    "no reward": ({"step": (0, None, False, False, {})}, r"reward is None"),
    "flags of shape (2,)": (
        {"step": (0, 0.0, np.zeros(2, bool), False, {})},
        r"terminated is .*shape \(2,\); True",
    ),
    "a text as flag": ({"step": (0, 0.0, "False", False, {})}, r"terminated is 'False' \(str\); True or False"),
    "a number as flag": ({"step": (0, 0.0, False, 1, {})}, r"truncated is 1 \(int\)"),
    "no info": ({"step": (0, 0.0, False, False, None)}, "info that step returned is None .*a dict"),
    "None as flag": ({"step": (0, 0.0, False, None, {})}, "truncated is None"),
    "a class too large": ({"obs": [0, 4]}, r"step returned .*'obs' holds 4, which is not in Discrete\(4\)"),
    "a negative class": ({"obs": -1}, "reset returned .*'obs' holds -1"),
    "a fraction as class": ({"obs": [0, 1.5]}, "'obs' holds 1.5"),
    "a class of shape (1,)": ({"obs": [0, np.ones(1, int)]}, r"'obs' has shape \(1,\); its space says \(\)"),
    "floats as image": ({"space": IMAGE, "obs": BLACK / 255}, "'obs' is an image of dtype float64 .*0 to 255"),
    "300 in an image": ({"space": IMAGE, "obs": [BLACK, BLACK + np.int64(300)]}, "'obs' holds 300"),
    "5 in a MultiBinary": ({"space": spaces.MultiBinary(2), "obs": [np.zeros(2), np.array([0, 5])]}, "'obs' holds 5"),
    "a missing key": ({"space": spaces.Dict(a=spaces.Discrete(2)), "obs": [{"a": 0}, {}]}, "no 'a'"),
    "an undeclared key": ({"space": spaces.Dict(a=spaces.Discrete(2)), "obs": [{"a": 0}, {"a": 0, "b": 1}]}, "has 'b'"),
    "a shorter tuple": ({"space": spaces.Tuple([spaces.Discrete(2)] * 2), "obs": [(0, 1), (0,)]}, "tuple of 1 entries"),
    "texts": ({"space": spaces.Box(-1, 1, (2,)), "obs": [np.zeros(2), ["a", "b"]]}, "real numbers"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_spaces_and_the_interface_exclude_is_refused_by_name(case):
    options, words = CASES[case]
    with make_env(lambda: Odd(**options)) as env, pytest.raises(EnvContractError, match=words):
        take_steps(env)
    assert env.closed


@pytest.mark.parametrize("case", ["a text as flag", "300 in an image", "an observation alone from reset"])
def test_workers_that_break_the_contract_end_the_run_and_are_not_restarted(case):
    options, words = CASES[case]
    with make_env(lambda: Odd(**options), 2, parallel="subprocess") as env:
        with pytest.raises(EnvContractError, match=words) as error:
            take_steps(env)
        assert "Traceback" not in str(error.value)
        assert env._backend._restarts == [0, 0]


@pytest.mark.parametrize("wrap", [{"time_limit": 9}, {"action_repeat": 2}, {"drop_keys": ["a"]}])
def test_the_older_interface_is_recognised_under_wrappers(wrap):
    space = spaces.Dict(a=spaces.Discrete(2), b=spaces.Discrete(2))
    obs = {"a": 0, "b": 1}
    with (
        make_env(lambda: Odd(space, obs, step=(obs, 0.0, False, {})), **wrap) as env,
        pytest.raises(EnvContractError, match=r"since 0\.26"),
    ):
        take_steps(env)


def test_a_step_that_returns_nothing_is_recognised_under_wrappers():
    class Nothing(Odd):
        def step(self, action):
            return None

    for wrap, words in [({}, "step returned None"), ({"time_limit": 9}, "A wrapper could not read")]:
        with make_env(Nothing, **wrap) as env, pytest.raises(EnvContractError, match=words):
            take_steps(env)


def test_a_reset_without_seed_is_recognised():
    with make_env(WithoutSeed) as env, pytest.raises(EnvContractError, match="reset takes no seed"):
        env.reset()


def test_action_repeat_does_not_take_a_text_for_true():
    odd = Odd(step=(0, 1.0, "False", False, {}))
    with make_env(odd, action_repeat=3) as env, pytest.raises(EnvContractError, match="'False'"):
        take_steps(env)


def test_images_are_checked_before_they_are_resized_or_stacked():
    for obs, words in [(BLACK / 255, "float64"), (BLACK + np.int64(300), "300"), (BLACK[..., 0], "shape")]:
        for change in ({"image_size": 64}, {"frame_stack": 2}):
            with (
                make_env(lambda obs=obs: Odd(IMAGE, obs), **change) as env,
                pytest.raises(EnvContractError, match=words),
            ):
                env.reset()


def test_numbers_and_flags_of_numpy_are_numbers_and_flags():
    for reward in (np.float32(0.5), np.array(0.5), 1, np.int64(1), True):
        with make_env(lambda reward=reward: Odd(step=(0, reward, np.bool_(True), np.array(False), {}))) as env:
            env.reset()
            time_step = env.step([0])
            assert time_step.reward[0] == float(reward)
            assert time_step.is_terminal[0]


# ---- NaN ---------------------------------------------------------------------------------------------------------


class NanReward(Steady):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, (np.nan if self.steps == 4 else reward), *rest


@pytest.mark.parametrize("parallel", ["sync", "subprocess"])
@pytest.mark.parametrize(("kind", "length", "name"), [(Nan, 3, "'obs'"), (NanReward, 4, "'reward'")])
def test_a_step_that_returns_nan_can_close_its_episode(kind, length, name, parallel, caplog):
    with make_env(kind, 2, on_bad_step="restart", parallel=parallel) as env:
        time_step, number = env.reset(), 0
        for _ in range(3 * (length + 1) - 1):
            number = number + 1
            before, time_step = time_step, env.step(np.full((2, 1), 0.1))
            assert np.isfinite(time_step.obs).all()
            over = number % (length + 1) == length
            assert (time_step.is_last == over).all()
            assert not time_step.is_terminal.any()
            if over:
                np.testing.assert_array_equal(time_step.obs, before.obs)
                assert not time_step.reward.any()
                bad = [event for event in time_step.events if isinstance(event, BadStep)]
                assert bad == [BadStep(0, name), BadStep(1, name)]
                ends = [event for event in time_step.events if isinstance(event, EpisodeEnd)]
                assert all(end.length == length and not (end.crashed or end.terminated) for end in ends)
                assert all(end.bad_step and not end.whole for end in ends)
                assert not any(isinstance(event, WorkerRestart) for event in time_step.events)
                again = make_env(kind, 2, on_bad_step="restart")
                np.testing.assert_array_equal(again.restore(env.state()).obs, time_step.obs)
        assert number == 3 * (length + 1) - 1
        assert caplog.text.count(f"Environment 1 returned {name} NaN or infinite: its episode is closed") == 3


def test_nan_stops_by_default_and_names_the_way_on():
    with make_env(Nan) as env, pytest.raises(DataError, match=r"on_bad_step='restart' .*--on-bad-step restart"):
        take_steps(env, 3)


def test_nan_at_the_beginning_of_an_episode_stops_in_any_case():
    space = spaces.Box(-1, 1, (1,))
    with (
        make_env(lambda: Odd(space, np.float32([np.nan])), on_bad_step="restart") as env,
        pytest.raises(DataError, match="at the beginning of an episode"),
    ):
        env.reset()
    with pytest.raises(ConfigError, match="'stop' or 'restart'"):
        make_env(Walk, on_bad_step="ignore")
    with pytest.raises(ConfigError, match="one by one"):
        make_env(SyncVectorEnv([Walk]), on_bad_step="restart")


# ---- vector environments -----------------------------------------------------------------------------------------


class SameArray(Steady):
    """Returns the same array at every call, with the new numbers in it."""

    def __init__(self):
        super().__init__(length=3)
        self.array = np.zeros(1, np.float32)

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        self.array[:] = obs
        return self.array, info

    def step(self, action):
        obs, *rest = super().step(action)
        self.array[:] = obs
        return self.array, *rest


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_last_observations_are_right_if_an_environment_returns_the_same_array_again(mode):
    env = make_env(SyncVectorEnv([SameArray, SameArray], autoreset_mode=mode, copy=False))
    single = make_env(lambda: Steady(3), 2)
    env.reset()
    single.reset()
    ends = 0
    for _ in range(12):
        one, other = env.step(np.full((2, 1), 0.3)), single.step(np.full((2, 1), 0.3))
        np.testing.assert_array_equal(one.obs, other.obs)
        ends += one.is_last.sum()
    assert ends == 6


class Vector(gym.vector.VectorEnv):
    """Two environments that count, in SAME_STEP mode; ``answer`` changes what a step returns."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, **answer):
        self.num_envs, self.answer = 2, answer
        self.single_observation_space, self.single_action_space = spaces.Box(0, 9, (1,)), spaces.Discrete(2)
        self.observation_space = spaces.Box(0, 9, (2, 1))
        self.action_space = spaces.MultiDiscrete([2, 2])
        self.spec, self.steps = None, 0

    def reset(self, *, seed=None, options=None):
        self.steps = 0 if options is None else self.steps
        return np.zeros((2, 1), np.float32), {}

    def step(self, actions):
        self.steps += 1
        over = np.array([self.steps == 2] * 2)
        answer = {"obs": np.full((2, 1), self.steps, np.float32), "reward": np.zeros(2), "terminated": over}
        answer |= {"truncated": np.zeros(2, bool), "info": {}, **self.answer}
        values = tuple(answer[name] for name in ("obs", "reward", "terminated", "truncated", "info"))
        return values[:4] if "cut" in self.answer else values


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({}, r"info\['final_obs'\] does not hold its last observation.*NEXT_STEP"),
        ({"info": {"final_obs": [None, None]}}, "final_obs"),
        ({"info": {"final_obs": [np.zeros(2), np.zeros(2)]}}, r"final_obs.*shape \(2,\)"),
        ({"terminated": np.zeros(3, bool)}, r"terminated: shape \(3,\).*booleans of shape \(2,\)"),
        ({"truncated": ["False", "False"]}, "truncated: .*booleans"),
        ({"reward": np.zeros((2, 1))}, r"rewards: shape \(2, 1\)"),
        ({"obs": np.zeros((2, 2))}, "step returned .*'obs' has shape"),
        ({"cut": True}, "a tuple of 4 entries"),
    ],
)
def test_vector_environments_are_held_to_the_same_contract(answer, words):
    with make_env(Vector(**answer)) as env, pytest.raises(EnvContractError, match=words):
        take_steps(env, 2)


def test_last_observations_that_were_overwritten_are_refused():
    array = np.ones((2, 1), np.float32)
    with (
        make_env(Vector(obs=array, info={"final_obs": array})) as env,
        pytest.raises(EnvContractError, match="put a copy of the last one into it"),
    ):
        take_steps(env, 2)


def test_an_end_that_equals_the_next_beginning_is_mentioned_once(caplog):
    env = make_env(Vector(info={"final_obs": np.full((2, 1), 2, np.float32)}))
    take_steps(env, 2)
    assert "equals the first of the next" in caplog.text
    assert len(re.findall("equals the first", caplog.text)) == 1


# ---- narrower spaces ---------------------------------------------------------------------------------------------


class Boundless(Steady):
    action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def step(self, action):
        self.taken = float(action[0])
        return super().step(action)


@pytest.mark.parametrize("parallel", ["sync", "subprocess"])
def test_action_bounds_say_what_actions_are_scaled_to(parallel):
    with pytest.raises(ConfigError, match="--action-bounds -2 2"):
        make_env(Boundless, parallel=parallel)
    with make_env(Boundless, action_bounds=(-4, 2), parallel=parallel) as env:
        env.reset()
        assert env.step([[-0.5]]).obs[0, 0] == np.float32(1 - 2.5)
        assert env.action_space == spaces.Box(-4, 2, (1,), np.float32)
        with env.another(1, 0) as other:
            assert other.action_space == env.action_space
    vector = make_env(SyncVectorEnv([Boundless]), action_bounds=(-4, 2))
    vector.reset()
    assert vector.step([[-0.5]]).obs[0, 0] == np.float32(1 - 2.5)


class Buttons(Steady):
    action_space = spaces.Tuple([spaces.Discrete(2, start=1), spaces.MultiDiscrete([2, 3])])

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step(np.float32([action[0] + 10 * action[1][1]]))


@pytest.mark.parametrize("parallel", ["sync", "subprocess"])
def test_several_actions_are_taken_as_one(parallel):
    with make_env(Buttons, 2, join_actions=True, parallel=parallel) as env:
        assert (env.action_dim, env.action_type) == (12, "discrete")
        env.reset()
        # Combinations count like digits, the last the fastest: (2, (1, 2)) is the last.
        assert env.step([11, 2]).obs[:, 0].tolist() == [1 + 2 + 20, 1 + 1 + 20]
    vector = make_env(SyncVectorEnv([Buttons] * 2), join_actions=True)
    vector.reset()
    assert vector.step([11, 2]).obs[:, 0].tolist() == [23, 22]
    separate = make_env(Buttons)
    assert separate.action_dim == {"0": 2, "1/0": 2, "1/1": 3}
    separate.reset()
    assert separate.step({"0": [1], "1/0": [1], "1/1": [2]}).obs[0, 0] == 23


@pytest.mark.parametrize("parallel", ["sync", "subprocess"])
def test_dropped_keys_are_not_observed(parallel):
    with make_env(WalkPicture, drop_keys=["camera", "body/parity"], parallel=parallel) as env:
        assert env.obs_shape == {"body/position": (2,)}
        assert list(env.reset().obs) == ["body/position"]
    vector = make_env(SyncVectorEnv([WalkPicture] * 2), drop_keys=["camera"])
    assert set(vector.reset().obs) == {"body/parity", "body/position"}
    with pytest.raises(ConfigError, match="Did you mean 'camera'"):
        make_env(WalkPicture, drop_keys=["camra"])
