"""Meshes: which are allowed, who holds what, how a batch is dealt out; without any device."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from worldloom import ConfigError
from worldloom.cli import main
from worldloom.cli.mesh_report import bytes_per_device
from worldloom.errors import DeviceError
from worldloom.families import get_family
from worldloom.models.registry import get_config
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


@pytest.mark.parametrize("name", ["dreamerv3:size400m", "tdmpc2:317m"])
def test_each_of_eight_devices_holds_an_eighth_of_weights_and_optimizer(name):
    model_class, algorithm = get_family(name.partition(":")[0])[2:]
    config = get_config(name, obs_shape=(64, 64, 3) if name.startswith("dreamer") else (24,), action_dim=6)

    def held(fsdp):
        settings = TrainingConfig(mesh={"fsdp": fsdp}).of_update()
        init = lambda key: algorithm.init_state(model_class(config), settings, key)  # noqa: E731
        state = jax.eval_shape(init, jax.random.key(0))
        return bytes_per_device((state.params, state.opt_state), fsdp)

    assert held(8) <= held(1) / 7.9


def test_info_prints_what_each_device_holds(capsys):
    assert main(["info", "dreamerv3:tiny", "--mesh", "data=2,fsdp=4"]) == 0
    text = capsys.readouterr().out
    assert "on 8 devices (data=2, fsdp=4)" in text
    assert "divided over 4 devices" in text
    assert main(["info", "dreamerv3:tiny", "--mesh", "model=2"]) == 2
    assert "no axis 'model'" in capsys.readouterr().err
    assert main(["info", "dreamerv3:tiny", "--mesh", "data=3"]) == 2
    assert "cannot be divided evenly over 3 devices" in capsys.readouterr().err


def test_without_a_mesh_rows_are_on_one_device():
    assert row_shards() == 1
    assert jax.jit(lambda x: x * row_shards())(2) == 2
