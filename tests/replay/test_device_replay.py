"""Replay on a device against the buffer it copies: the same rows and latents after any sequence of changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom.errors import ConfigError
from worldloom.replay import ReplayBuffer
from worldloom.replay.device import SLOTS, DeviceReplay, gather_rows

DETER = 3


def episode(draw, steps, *, picture=False):
    obs = draw.integers(0, 256, (steps + 1, 4, 4, 3)).astype(np.uint8) if picture else draw.normal(size=(steps + 1, 2))
    return obs, draw.uniform(-1, 1, (steps, 1)), draw.normal(size=steps)


def gather(device, ids):
    """The batch of rows [B, T], as a compiled update sees it."""
    small = device._buffer.take(ids, observations=False)
    assert "obs" not in small
    row_ids = small.pop("row_ids")
    return jax.jit(gather_rows)(device.ring, small | {SLOTS: device.slots([row_ids], 1)[0]})


def assert_same(device, buffer, *, latents, update=0):
    ids = buffer.draw(6, 4, update=update, cross_episodes=True)
    expected = buffer.take(ids, latents=latents)
    del expected["row_ids"]
    found = gather(device, ids)
    assert found.keys() == expected.keys()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), expected)


@pytest.mark.parametrize("kind", ["vector", "picture", "both", "dict of obs"])
def test_a_batch_equals_that_of_the_buffer(kind):
    draw, buffer = np.random.default_rng(0), ReplayBuffer(100)
    for steps in (9, 4, 30):
        obs, actions, rewards = episode(draw, steps, picture=kind == "picture")
        obs = {"eyes": episode(draw, steps, picture=True)[0], "joints": obs} if kind == "both" else obs
        obs = {"obs": obs} if kind == "dict of obs" else obs
        buffer.add_episode(obs, actions, rewards, terminated=True)
    device = DeviceReplay(buffer, latents=None, device=jax.devices()[0], capacity=len(buffer))
    device.copy_new_rows()
    assert_same(device, buffer, latents=False)
    images = [rows for rows in jax.tree.leaves(device.ring) if rows.ndim == 4]
    assert all(rows.dtype == np.uint8 for rows in images)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(4, 20)),
        st.tuples(st.just("write"), st.booleans()),
        st.tuples(st.just("read"), st.just(0)),
        st.tuples(st.just("back"), st.just(0)),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(steps=steps, capacity=st.sampled_from([24, 64]), room=st.sampled_from([4, 24, 64]))
def test_it_matches_the_buffer_after_any_changes(steps, capacity, room):
    """Rows are added and evicted, latents written, some twice, some for evicted rows; ``truth`` stays on the host."""
    draw = np.random.default_rng(len(steps))
    truth, buffer = (ReplayBuffer(capacity, latents={"deter": (DETER,)}) for _ in range(2))
    device = DeviceReplay(buffer, latents=np.float32, device=jax.devices()[0], capacity=room)
    old = []
    for number, (what, size) in enumerate([("add", 10), *steps, ("read", 0), ("back", 0)]):
        if what == "add":
            data = episode(draw, size)
            for one in (truth, buffer):
                one.add_episode(*data, terminated=True)
        elif what == "write":
            device.copy_new_rows()
            # Windows that overlap, and the ones drawn before rows were evicted.
            old.append(truth.draw(6, 4, update=number, cross_episodes=True))
            latents = draw.normal(size=(6, 4, DETER)).astype(np.float32)
            device.write_latents(old[0], {"deter": jnp.asarray(latents)}, jnp.asarray(size))
            if size:
                truth.write_latents(old[0], {"deter": latents})
            old = old[-2:]
        elif what == "read":
            device.copy_new_rows()
            assert_same_latents(device, truth, number)
        else:
            device.write_back()
            held = np.arange(*truth.state_dict().values())[:, None]
            np.testing.assert_array_equal(
                buffer.take(held, latents=True)["context"]["deter"], truth.take(held, latents=True)["context"]["deter"]
            )


def assert_same_latents(device, truth, update):
    ids = truth.draw(6, 4, update=update, cross_episodes=True)
    found, expected = gather(device, ids), truth.take(ids, latents=True)
    np.testing.assert_array_equal(found["context"]["deter"], expected["context"]["deter"])
    np.testing.assert_array_equal(found["obs"], expected["obs"])


def test_new_rows_are_written_in_place():
    draw, buffer = np.random.default_rng(0), ReplayBuffer(100)
    buffer.add_episode(*episode(draw, 9), terminated=True)
    device = DeviceReplay(buffer, latents=None, device=jax.devices()[0], capacity=100)
    device.copy_new_rows()
    before, address = device.ring["obs"], device.ring["obs"].unsafe_buffer_pointer()
    buffer.add_episode(*episode(draw, 9), terminated=True)
    device.copy_new_rows()
    assert before.is_deleted()
    assert device.ring["obs"].unsafe_buffer_pointer() == address


def test_a_buffer_that_overrides_sampling_stays_on_the_host():
    class Prioritised(ReplayBuffer):
        def draw(self, *args, **kwargs):
            return super().draw(*args, **kwargs)

    with pytest.raises(ConfigError, match="a Prioritised stays on the host"):
        DeviceReplay(Prioritised(), latents=None, device=jax.devices()[0], capacity=10)
