"""Meshes: which are allowed, who holds what, how a batch is dealt out; without any device."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from worldloom import ConfigError
from worldloom.errors import DeviceError
from worldloom.sharding import SMALLEST_DIVIDED, interleaved, resolve_mesh, row_shards, weight_spec
from worldloom.training import TrainingConfig


@pytest.mark.parametrize(
    ("mesh", "devices", "shape"),
    [
        ({}, 8, (1, 1)),
        ({"data": -1}, 8, (8, 1)),
        ({"data": 4}, 8, (4, 1)),
        ({"fsdp": -1}, 8, (1, 8)),
        ({"data": 2, "fsdp": 4}, 8, (2, 4)),
        ({"data": -1, "fsdp": 4}, 8, (2, 4)),
        ({"data": -1}, 1, (1, 1)),
    ],
)
def test_a_mesh_takes_the_devices_that_it_names(mesh, devices, shape):
    assert resolve_mesh(TrainingConfig(mesh=mesh).mesh, devices) == shape


@pytest.mark.parametrize(
    ("mesh", "says"),
    [
        ({"model": 2}, "no axis 'model'"),
        ({"dat": 2}, "Did you mean 'data'"),
        ({"data": 0}, "must be a number of devices"),
        ({"data": -2}, "must be a number of devices"),
        ({"data": 2.5}, "must be a number of devices"),
        ({"data": True}, "must be a number of devices"),
        ({"data": -1, "fsdp": -1}, "-1 twice"),
        ("data", "must be a dict"),
        (None, "must be a dict"),
    ],
)
def test_another_mesh_is_refused_with_what_is_allowed(mesh, says):
    with pytest.raises(ConfigError, match=says):
        TrainingConfig(mesh=mesh)


@pytest.mark.parametrize(("mesh", "devices"), [({"data": 4}, 2), ({"data": -1, "fsdp": 4}, 6), ({"fsdp": 2}, 1)])
def test_a_mesh_larger_than_the_machine_is_refused_with_the_number_of_devices(mesh, devices):
    with pytest.raises(DeviceError, match=f"{devices} device"):
        resolve_mesh(mesh, devices)


@pytest.mark.parametrize(
    "fields", [{"device": "cuda:1"}, {"replay_storage": "device"}], ids=["one device", "replay on one device"]
)
def test_settings_that_name_one_device_exclude_a_mesh(fields):
    with pytest.raises(ConfigError, match="one device"):
        TrainingConfig(mesh={"data": 2}, **fields)
    TrainingConfig(**fields)


@given(st.lists(st.integers(1, 64), max_size=4), st.integers(1, 8))
def test_weights_are_divided_along_their_largest_axis_that_divides_or_not_at_all(sizes, fsdp):
    shape = tuple(64 * size for size in sizes)
    spec = weight_spec(shape, fsdp)
    divisible = [size for size in shape if size % fsdp == 0]
    if fsdp == 1 or not divisible or np.prod(shape) < SMALLEST_DIVIDED:
        assert spec == P()
    else:
        (axis,) = [axis for axis, name in enumerate(spec) if name == "fsdp"]
        assert shape[axis] == max(divisible)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
def test_every_device_has_as_many_windows_of_every_microbatch(parts, shards, each):
    size = parts * shards * each
    order = interleaved(size, parts)
    assert sorted(order) == list(range(size))
    of_part = order // (size // parts)  # the microbatch that a window is in on one device
    for windows in np.split(of_part, shards):
        assert np.bincount(windows, minlength=parts).tolist() == [each] * parts
    # Dealt out in turn, as on a mesh, they are the same microbatches in the same order.
    np.testing.assert_array_equal(order.reshape(-1, parts).T, np.arange(size).reshape(parts, -1))


def test_without_a_mesh_rows_are_on_one_device():
    assert row_shards() == 1
    assert jax.jit(lambda x: x * row_shards())(2) == 2
