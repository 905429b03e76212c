"""Members of one program over several devices: each is on one of them, and none hears of the others."""

import jax
import pytest

from worldloom.errors import ConfigError, DeviceError
from worldloom.training import TrainingConfig, train_many

CALLS = {"latents": {"train", "collect"}, "prefill": {"train", "collect", "collect_random", "choose"}}


@pytest.fixture(scope="module", params=CALLS)
def found(request, on_mesh, tmp_path_factory):
    return on_mesh("members", request.param, str(tmp_path_factory.mktemp(request.param))) | {"kind": request.param}


def test_members_over_two_devices_are_those_of_one_device(found):
    assert found["between members"] > 1e-3
    assert max(found["differences"]["two"].values()) <= 1e-6


def test_members_go_on_over_two_devices_and_back_on_one(found):
    if found["kind"] == "latents":
        assert max(found["differences"]["to two"].values()) <= 1e-6
        assert max(found["differences"]["to one"].values()) <= 1e-6
    # Folders and models are those of runs of one device.
    assert found["meshes"] == [{}] * 4
    assert len(found["models are on"]) == 1


def test_devices_exchange_nothing(found):
    assert set(found["calls"]) >= CALLS[found["kind"]]
    for call in found["calls"].values():
        assert call["parts"] == 2
        assert call["moved"] == {}
        assert call["divided"]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"seeds": range(3)}, ConfigError, r"3 members .* over the 2 devices .* multiple of 2, or mesh={'data': 1}"),
        ({"mesh": {"fsdp": 2}}, ConfigError, "divides weights"),
        ({"mesh": {"data": 2, "fsdp": -1}}, ConfigError, "divides weights"),
        ({"mesh": {"date": 2}}, ConfigError, "Did you mean 'data'"),
        ({"config": TrainingConfig(mesh={"data": 4}, device="cpu")}, DeviceError, "needs 4 devices; 2 devices are"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_made(monkeypatch, options, error, text):
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices() * 2)
    given = {"seeds": range(2), "device": "cpu"} | ({} if "config" in options else {"mesh": {"data": 2}}) | options
    with pytest.raises(error, match=text):
        train_many("no such preset", "no such environment", **given)


def test_members_are_of_one_process(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="one process, and there are 2"):
        train_many("no such preset", "no such environment")
