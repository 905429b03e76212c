"""Replay as arrays holds the rows and draws the windows of a ``ReplayBuffer``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom.errors import DataError
from worldloom.replay import ReplayBuffer
from worldloom.replay.online import OnlineQueue, add_steps, has_finished_window, is_interleaved
from worldloom.replay.ring import RingSpec, _scaled, add_rows, draw, empty_ring, take, uniforms_of, write_latents
from worldloom.replay.sampling import uniform

SHAPES = {
    "obs": jax.ShapeDtypeStruct((1,), jnp.float32),
    "actions": jax.ShapeDtypeStruct((1,), jnp.float32),
    "rewards": jax.ShapeDtypeStruct((), jnp.float32),
    "flags": jax.ShapeDtypeStruct((), jnp.uint8),
    "info": {},
    "latents": {"memory": jax.ShapeDtypeStruct((1,), jnp.float32)},
}
KINDS = [(True, True, True), (True, False, False), (False, True, False), (False, False, False)]


@functools.cache
def compiled(spec):
    return jax.jit(functools.partial(add_rows, spec)), jax.jit(functools.partial(draw, spec))


@pytest.mark.parametrize(("cross", "open_episodes", "fresh"), KINDS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_windows_are_those_of_a_buffer_with_the_same_rows(cross, open_episodes, fresh, seed):
    rng, num_envs, rows = np.random.default_rng(seed), 3, 4
    spec = RingSpec(64, 40, num_envs, 5, rows, cross, open_episodes, fresh)
    add, draw_windows = compiled(spec)
    ring, buffer, queue = empty_ring(spec, SHAPES), ReplayBuffer(40, latents={"memory": (1,)}), OnlineQueue()
    over, drawn = np.ones(num_envs, bool), 0
    for step in range(60):
        first, over = over, ((rng.random(num_envs) < 0.15) | (step == 50)) & ~over
        obs = rng.normal(size=(num_envs, 1)).astype(np.float32)
        flags = (first * 1 | over * 2 | over * 4).astype(np.uint8)
        zeros, reward = np.zeros((num_envs, 1), np.float32), np.zeros(num_envs, np.float32)
        buffer.add_rows(obs, zeros, reward, first, over, over)
        row = {
            "obs": obs,
            "actions": zeros,
            "rewards": reward,
            "flags": flags,
            "info": {},
            "latents": {"memory": zeros},
        }
        ring = add(ring, row)
        if step < 5 or rng.random() < 0.6:
            continue
        ring, ids, found = draw_windows(ring, uniforms_of(seed, step, 5))
        finished = not open_episodes
        try:
            expected = buffer.draw(5, rows, seed=seed, update=step, cross_episodes=cross, finished=finished)
        except DataError:
            assert not found
            continue
        if fresh:
            newest = queue.pop(buffer, 5, rows)
            expected[: len(newest)] = newest
        assert found
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_array_equal(take(spec, ring, ids)["obs"], buffer.take(expected)["obs"])
        drawn += 1
    assert drawn > 3
    assert is_interleaved(buffer, num_envs)
    assert has_finished_window(buffer, 1, cross_episodes=False)


@settings(max_examples=200, deadline=None)
@given(count=st.integers(1, 2**28), seed=st.integers(0, 2**40), near=st.integers(-2, 2))
def test_products_with_uniforms_are_floored_as_by_numpy(count, seed, near):
    number = uniform(seed, 3, (2, 8))
    bits = uniforms_of(seed, 3, 8)
    # The last is as near to an integer as 53 bits can be, where float64 rounds up.
    nearest = min(max((seed % count * 2**53) // count + near, 0), 2**53 - 1)
    number[0, -1], bits[0, :, -1] = nearest * 2.0**-53, (nearest >> 32, nearest & 0xFFFFFFFF)
    np.testing.assert_array_equal(jax.jit(_scaled)(bits[0], np.int32(count)), np.floor(number[0] * count).astype(int))


def test_of_a_row_that_occurs_twice_the_last_latents_count_and_evicted_rows_are_skipped():
    spec = RingSpec(8, 4, 1, 1, 2, True, True, False)
    ring = empty_ring(spec, SHAPES)
    row = jax.tree.map(lambda leaf: np.zeros((1, *leaf.shape), leaf.dtype), SHAPES)
    for _ in range(6):  # rows 2 … 5 are held
        ring = add_rows(spec, ring, row)
    ids, values = jnp.array([[1, 3], [3, 4]]), {"memory": jnp.array([[[10.0], [20.0]], [[30.0], [40.0]]])}
    written = write_latents(spec, ring, ids, values, jnp.asarray(True))
    assert written.latents["memory"][:, 0].tolist() == [0, 0, 0, 30, 40, 0, 0, 0]
    assert not write_latents(spec, ring, ids, values, jnp.asarray(False)).latents["memory"].any()


def test_steps_added_at_once_are_rows_added_one_by_one():
    rng = np.random.default_rng(0)
    one, many = (ReplayBuffer(30, action_dim=3, action_type="discrete") for _ in range(2))
    last = np.zeros((20, 2), bool)
    last[3::5] = True
    first = np.roll(last, 1, axis=0)
    first[0] = True
    obs = rng.normal(size=(20, 2, 4)).astype(np.float32)
    actions = np.where(last, -1, rng.integers(3, size=(20, 2)))
    rewards = rng.normal(size=(20, 2)).astype(np.float32) * ~first
    for step in range(20):
        one.add_rows(obs[step], actions[step], rewards[step], first[step], last[step], last[step])
    flat = [each.reshape(40, *each.shape[2:]) for each in (obs, actions, rewards, first, last, last)]
    add_steps(many, *flat, 2, latents={})
    ids = np.arange(10, 40)
    for name, value in one.take(ids).items():
        np.testing.assert_array_equal(value, many.take(ids)[name])
    assert one.state_dict() == many.state_dict()
    np.testing.assert_array_equal(one.episode_lengths, many.episode_lengths)
