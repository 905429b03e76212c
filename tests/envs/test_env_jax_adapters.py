"""Adapters of other packages' environments, with stand-ins that have those packages' methods."""

import dataclasses
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldloom.envs import make_env
from worldloom.envs.jax import adapt
from worldloom.errors import ConfigError, EnvContractError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fields:
    """A frozen record with ``replace``, like those of flax."""

    position: jax.Array
    time: jax.Array

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Params:
    max_steps_in_episode: int = 6
    goal: float = 3.0

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


def walk(state, move):
    return state.replace(position=state.position + move, time=state.time + 1)


class OldGymnax:
    """gymnax 0.0.x and craftax: five values, ``done`` includes the time limit."""

    default_params = Params()

    def action_space(self, params):
        return types.SimpleNamespace(n=3)

    def reset_env(self, key, params):
        state = Fields(jnp.zeros(()), jnp.zeros((), jnp.int32))
        return state.position[None], state

    def is_terminal(self, state, params):
        return (state.position >= params.goal) | (state.time >= params.max_steps_in_episode)

    def step_env(self, key, state, action, params):
        state = walk(state, action.astype(jnp.float32) - 1)
        return state.position[None], state, state.position, self.is_terminal(state, params), {"discount": jnp.ones(())}

    def step(self, *_):
        raise AssertionError("this one resets by itself")


class NewGymnax(OldGymnax):
    """gymnax 1.x: ``step_env`` tells of terminations alone; continuous actions with bounds."""

    def action_space(self, params):
        return types.SimpleNamespace(shape=(1,), low=-3.0, high=1.0)

    def is_terminal(self, state, params):
        return state.position >= params.goal

    def is_truncated(self, state, params):
        return state.time >= params.max_steps_in_episode

    def step_env(self, key, state, action, params):
        state = walk(state, action[0])
        return state.position[None], state, state.position, self.is_terminal(state, params), {}


class BraxState(NamedTuple):
    obs: jax.Array
    reward: jax.Array
    done: jax.Array
    metrics: dict
    info: dict


class Brax:
    """brax and MuJoCo Playground: one state, ``done`` is a float, no time limit."""

    action_size = 2

    def reset(self, key):
        zero = jnp.zeros(())
        return BraxState(jnp.zeros(4), zero, zero, {"forward": zero}, {"key": key})

    def step(self, state, action):
        obs = state.obs + jnp.concatenate([action, action])
        done = (obs[0] > 2.5).astype(jnp.float32)
        return state._replace(obs=obs, reward=action.sum(), done=done, metrics={"forward": obs[0]})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NavixStep:
    state: Fields
    observation: jax.Array
    reward: jax.Array
    step_type: jax.Array
    t: jax.Array

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NavixState:
    key: jax.Array
    position: jax.Array

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


class Navix:
    """navix: a time step is the state; grids of small integers as observations."""

    max_steps, action_set = 6, (0, 1, 2)
    termination_fn = transitions_fn = None

    def replace(self, max_steps):
        env = Navix()
        env.max_steps = max_steps
        return env

    def reset(self, key):
        zero = jnp.zeros((), jnp.int32)
        state = NavixState(key, jnp.zeros(()))
        return NavixStep(state, jnp.zeros((5, 5, 3), jnp.uint8), jnp.zeros(()), zero, zero)

    def _step(self, step, action):
        position, t = step.state.position + action - 1, step.t + 1
        kind = jnp.where(position >= 3, 2, jnp.where(t >= self.max_steps, 1, 0))
        grid = jnp.full((5, 5, 3), jnp.abs(position).astype(jnp.uint8))
        return NavixStep(step.state.replace(position=position), grid, position, kind, t)

    def step(self, *_):
        raise AssertionError("this one resets by itself")


class View(NamedTuple):
    grid: jax.Array
    step_count: jax.Array


class JumanjiStep(NamedTuple):
    step_type: jax.Array
    reward: jax.Array
    discount: jax.Array
    observation: View
    extras: dict


class Jumanji:
    """jumanji: several discrete actions, a named tuple as observation, ``discount`` tells a time limit apart."""

    time_limit = 6
    observation_spec = None
    action_spec = types.SimpleNamespace(num_values=np.array([2, 3]))

    def _view(self, position, time):
        return View(jnp.full((2, 2), position), time)

    def reset(self, key):
        position, time = jnp.zeros(()), jnp.zeros((), jnp.int32)
        first = JumanjiStep(jnp.asarray(0), jnp.zeros(()), jnp.ones(()), self._view(position, time), {})
        return (position, time), first

    def step(self, state, action):
        position, time = state[0] + action[0] * (action[1] - 1), state[1] + 1
        reached, late = position >= 3, time >= 6
        kind = jnp.where(reached | late, 2, 1)
        discount = jnp.where(reached, 0.0, 1.0)
        return (position, time), JumanjiStep(kind, position, discount, self._view(position, time), {})


def rows(env, action, count=8):
    """The rows of ``count`` equal actions in one environment."""
    world = make_env(env, 1)
    found = [world.reset()]
    for _ in range(count):
        found.append(world.step(np.array([action])))
    return world, found


@pytest.mark.parametrize(
    ("native", "forward", "backward"),
    [(OldGymnax(), 2, 0), (NewGymnax(), [1.0], [-1.0]), (Navix(), 2, 0), (Jumanji(), 5, 3)],
    ids=["gymnax 0", "gymnax 1", "navix", "jumanji"],
)
def test_a_goal_terminates_and_a_time_limit_truncates(native, forward, backward):
    env, found = rows(adapt(native), forward)
    assert env.episode_length == 6
    assert [bool(row.is_last[0]) for row in found[:5]] == [False, False, False, True, False]
    assert found[3].is_terminal[0]
    assert found[3].reward[0] == 3
    assert found[4].is_first[0]
    _, found = rows(adapt(native), backward)
    assert [bool(row.is_last[0]) for row in found[:8]] == [False] * 6 + [True, False]
    assert not found[6].is_terminal[0]
    # The last observation is the one arrived at, not the first of the next episode.
    last = found[6].obs["grid"] if isinstance(found[6].obs, dict) else found[6].obs
    assert last.any()


def test_brax_has_the_time_limit_that_is_given_and_keeps_its_metrics():
    env, found = rows(adapt(Brax(), time_limit=4), [0.5, 0.25])
    assert (env.obs_shape, env.action_dim, env.action_type, env.episode_length) == ((4,), 2, "continuous", 4)
    assert [bool(row.is_last[0]) for row in found[:6]] == [False, False, False, False, True, False]
    assert not found[4].is_terminal[0]
    assert found[4].events[0].info == {"forward": 2.0}
    _, found = rows(adapt(Brax(), time_limit=4), [1.0, 0.0])
    assert found[3].is_terminal[0]


def test_actions_are_scaled_to_their_bounds_and_several_choices_become_one():
    _, found = rows(adapt(NewGymnax()), [0.0], 2)
    assert found[1].obs[0, 0] == -1.0  # the middle of [−3, 1]
    env, _ = rows(adapt(Jumanji()), 5, 1)
    assert (env.action_type, env.action_dim) == ("discrete", 6)
    assert env.obs_shape == {"grid": (4,), "step_count": (1,)}
    env, _ = rows(adapt(Navix()), 1, 1)
    assert (env.obs_shape, env.obs_dtype) == ((75,), np.float32)


def test_a_time_limit_of_ones_own_replaces_that_of_the_environment():
    for native in (OldGymnax(), Navix()):
        _, found = rows(adapt(native, time_limit=2), 0, 4)
        assert [bool(row.is_last[0]) for row in found[:4]] == [False, False, True, False]
        assert not found[2].is_terminal[0]


def test_unbounded_actions_and_other_objects_are_refused():
    unbounded = NewGymnax()
    unbounded.action_space = lambda params: types.SimpleNamespace(shape=(1,), low=-np.inf, high=np.inf)
    with pytest.raises(ConfigError, match="cannot be scaled"):
        adapt(unbounded)
    with pytest.raises(ConfigError, match="A list is no environment of gymnax, craftax, brax"):
        adapt([])


class Wrapped:
    """What wrappers of these packages have in common: attributes and methods of the environment inside."""

    def __init__(self, env, **attributes):
        self.env = env
        vars(self).update(attributes)

    def __getattr__(self, name):
        return getattr(self.env, name)

    @property
    def unwrapped(self):
        return getattr(self.env, "unwrapped", self.env)

    def reset(self, key):
        return self.env.reset(key)

    def step(self, state, action):
        return self.env.step(state, action)


class Richer(Wrapped):
    """A wrapper of one's own: 100 more reward, for one action more."""

    action_size = 3

    def step(self, state, action):
        after = self.env.step(state, action[:2])
        return after._replace(reward=after.reward + 100)


class AutoResetWrapper(Wrapped):
    def step(self, *_):
        raise AssertionError("this one resets by itself")


VmapWrapper = type("VmapWrapper", (AutoResetWrapper,), {})
EpisodeWrapper = type("EpisodeWrapper", (AutoResetWrapper,), {})
LogWrapper = type("LogWrapper", (AutoResetWrapper,), {})
DomainRandomizationVmapWrapper = type("DomainRandomizationVmapWrapper", (Wrapped,), {})
OwnReset = type("OwnReset", (AutoResetWrapper,), {})


def test_wrappers_of_ones_own_are_kept_below_those_that_reset():
    for env in (Richer(Brax()), VmapWrapper(AutoResetWrapper(Richer(Brax())))):
        env, found = rows(adapt(env, time_limit=4), [0.5, 0.25, 0.0])
        assert (env.action_dim, env.episode_length) == (3, 4)
        assert found[1].reward[0] == 100.75
    limited = EpisodeWrapper(Richer(Brax()), episode_length=3, action_repeat=1)
    env, found = rows(adapt(AutoResetWrapper(limited)), [0] * 3)
    assert env.episode_length == 3
    assert [bool(row.is_last[0]) for row in found[:4]] == [False, False, False, True]
    assert not found[3].is_terminal[0]
    env, found = rows(adapt(AutoResetWrapper(Jumanji())), 5)
    assert found[3].reward[0] == 3
    env, found = rows(adapt(LogWrapper(OldGymnax())), 2)
    assert found[3].reward[0] == 3


@pytest.mark.parametrize(
    ("env", "text"),
    [
        (Richer(AutoResetWrapper(Brax())), "AutoResetWrapper under Richer cannot be taken off"),
        (AutoResetWrapper(Richer(EpisodeWrapper(Brax()))), "EpisodeWrapper under Richer cannot be taken off"),
        (OwnReset(Brax()), "OwnReset cannot be taken off"),
        (DomainRandomizationVmapWrapper(Brax()), "DomainRandomizationVmapWrapper cannot be taken off"),
        (EpisodeWrapper(Brax(), action_repeat=4), "repeats each action 4 times: .* make_env action_repeat=4"),
        (Wrapped(OldGymnax()), "Wrapped changes step, .* step_env is called in its place: change step_env"),
        (type("Own", (OldGymnax,), {"step": Wrapped.step})(), "Own changes step"),
        (Wrapped(Navix()), "Wrapped changes step, .* _step is called"),
    ],
)
def test_wrappers_that_would_be_lost_are_refused(env, text):
    with pytest.raises(ConfigError, match=text):
        adapt(env)


def test_a_terminal_state_of_several_agents_is_one_of_all():
    class Agents(Jumanji):
        def step(self, state, action):
            state, after = super().step(state, action)
            one_ended = jnp.stack([after.discount, jnp.where(after.step_type == 2, 0.0, 1.0)])
            return state, after._replace(reward=jnp.stack([after.reward, after.reward]), discount=one_ended)

        def reset(self, key):
            state, first = super().reset(key)
            return state, first._replace(reward=jnp.zeros(2), discount=jnp.ones(2))

    _, found = rows(adapt(Agents()), 5)
    assert found[3].reward[0] == 6
    assert (found[3].is_last[0], found[3].is_terminal[0]) == (True, True)
    _, found = rows(adapt(Agents()), 3)
    assert (found[6].is_last[0], found[6].is_terminal[0]) == (True, False)


class Whole(Brax):
    """Its reset writes integers, and booleans, for what a step makes floats."""

    action_size = 1

    def reset(self, key):
        return BraxState(jnp.zeros(2), jnp.array(0), jnp.array(False), {"speed": 0}, {"speed": jnp.array(0)})

    def step(self, state, action):
        speed = state.info["speed"] + 0.25
        done = (state.obs[0] > 9).astype(jnp.float32)
        return state._replace(
            obs=state.obs + speed, reward=0.75 + 0 * speed, done=done, metrics={"speed": speed}, info={"speed": speed}
        )


def test_what_a_reset_writes_as_integers_stays_a_float_in_the_steps():
    _, found = rows(adapt(Whole(), time_limit=5), [0.0], 4)
    assert [float(row.reward[0]) for row in found[1:4]] == [0.75] * 3
    assert [float(row.obs[0, 0]) for row in found[:4]] == [0.0, 0.25, 0.75, 1.5]

    class WholeJumanji(Jumanji):
        def reset(self, key):
            state, first = super().reset(key)
            return (jnp.array(0), state[1]), first

        def step(self, state, action):
            state, after = super().step(state, action * jnp.array([1, 1]))
            return (state[0] + 0.5, state[1]), after

    _, found = rows(adapt(WholeJumanji()), 4, 3)  # One choice keeps the place, and so every step adds a half.
    assert [float(row.reward[0]) for row in found[1:4]] == [0.0, 0.5, 1.0]

    class WholeNavix(Navix):
        def reset(self, key):
            first = super().reset(key)
            return first.replace(state=first.state.replace(position=jnp.array(0)), reward=jnp.array(0))

        def _step(self, step, action):
            after = super()._step(step, action)
            return after.replace(state=after.state.replace(position=after.state.position + 0.5))

    _, found = rows(adapt(WholeNavix()), 1, 3)
    assert [float(row.reward[0]) for row in found[1:4]] == [0.0, 0.5, 1.0]


def test_floats_are_kept_however_many_steps_they_take_to_reach_a_part_of_the_state():
    class Chain(Brax):
        """Each of twelve numbers becomes, in a step, the one before it; the first becomes a half."""

        def reset(self, key):
            return super().reset(key)._replace(info={str(i): jnp.array(0) for i in range(12)})

        def step(self, state, action):
            info = {str(i): state.info[str(i - 1)] if i else jnp.array(0.5) for i in range(12)}
            return super().step(state, action)._replace(info=info, reward=info["11"])

    _, found = rows(adapt(Chain(), time_limit=20), [0.0, 0.0], 13)
    assert [float(row.reward[0]) for row in found[1:14]] == [0.0] * 11 + [0.5] * 2


def test_a_step_that_adds_to_the_state_is_refused_with_what_it_adds():
    class Adds(Brax):
        def step(self, state, action):
            after = super().step(state, action)
            return after._replace(info={**after.info, "late": jnp.zeros(())})

    with pytest.raises(EnvContractError, match=r"Adds.reset and Adds.step return states of another structure.*late"):
        adapt(Adds())

    class Text(Brax):
        def reset(self, key):
            return super().reset(key)._replace(info={"name": "x"})

    with pytest.raises(EnvContractError, match=r"Text.reset returned a str in state.*name"):
        adapt(Text())


class Limited(Jumanji):
    """As most of jumanji's: the limit is its own attribute, and an end like any other."""

    def __init__(self, time_limit=6):
        self.time_limit = time_limit

    def step(self, state, action):
        (position, time), after = super().step(state, action)
        over = (position >= 3) | (time >= self.time_limit)
        return (position, time), after._replace(step_type=jnp.where(over, 2, 1), discount=jnp.where(over, 0.0, 1.0))


@pytest.mark.parametrize("wrap", [lambda env: env, Wrapped])
def test_a_time_limit_of_jumanji_is_no_termination(wrap):
    native = Limited(4)
    _, found = rows(adapt(wrap(native)), 3)
    assert [bool(row.is_last[0]) for row in found[:6]] == [False] * 4 + [True, False]
    assert not found[4].is_terminal[0]
    _, found = rows(adapt(wrap(native)), 5)
    assert (found[3].is_last[0], found[3].is_terminal[0]) == (True, True)
    _, found = rows(adapt(wrap(native), time_limit=5), 3)
    assert [bool(row.is_last[0]) for row in found[:6]] == [False] * 5 + [True]
    assert not found[5].is_terminal[0]
    assert native.time_limit == 4  # The object that was given is as it was.


def test_integers_between_bounds_are_rounded_to():
    class Whole(NewGymnax):
        def action_space(self, params):
            return types.SimpleNamespace(shape=(1,), low=-3, high=1, dtype=np.int32)

        def step_env(self, key, state, action, params):
            assert action.dtype == jnp.int32
            return super().step_env(key, state, action, params)

    for action, taken in ((-1.0, -3), (-0.8, -3), (-0.7, -2), (0.1, -1), (0.99, 1)):
        _, found = rows(adapt(Whole()), [action], 1)
        assert found[1].obs[0, 0] == taken


def test_other_forms_of_gymnax_are_taken_or_refused_in_a_sentence():
    class Six(NewGymnax):
        def step_env(self, key, state, action, params):
            obs, state, reward, _, _ = super().step_env(key, state, action, params)
            ends = self.is_terminal(state, params), self.is_truncated(state, params)
            return (obs, obs), state, reward, *ends, None

        def reset_env(self, key, params):
            obs, state = super().reset_env(key, params)
            return (obs, obs), state

    env, found = rows(adapt(Six()), [1.0])
    assert env.obs_shape == {"0": (1,), "1": (1,)}
    assert (found[3].is_last[0], found[3].is_terminal[0]) == (True, True)
    with pytest.raises(ConfigError, match="adapt takes an environment, not the class NewGymnax"):
        adapt(NewGymnax)
    nested = NewGymnax()
    nested.action_space = lambda params: types.SimpleNamespace(spaces={})
    with pytest.raises(ConfigError, match="NewGymnax has actions of the space SimpleNamespace; Box and Discrete"):
        adapt(nested)


def test_more_combinations_of_actions_than_can_be_learned_are_refused():
    many = Jumanji()
    many.action_spec = types.SimpleNamespace(num_values=np.full(9, 9))
    with pytest.raises(ConfigError, match=r"9 discrete actions with 387,420,489 combinations \(9 × 9 × .* × …\)"):
        adapt(many)
