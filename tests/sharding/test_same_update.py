"""The same update on one device and on eight: recorded numbers, compiled programs."""

import pytest

ONE, EIGHT, BOTH_AXES = {}, {"data": 8}, {"data": 2, "fsdp": 4}
TDMPC2 = {"batch_size": 64, "sequence_length": 4}
DREAMER = {"batch_size": 8, "sequence_length": 4}


def check_tdmpc2(results):
    for result in results:
        for name, expected in result["expected"].items():
            assert result["metrics"][name] == pytest.approx(expected, rel=1e-4)
        assert result["off"] < 1e-4
        assert result["from_first"] <= 0.01  # learning rates
        first = results[0]["metrics"]
        for name in ("loss", "policy", "grad_norm", "pi_grad_norm"):
            assert result["metrics"][name][0] == pytest.approx(first[name][0], rel=1e-5)


def check_dreamer(results):
    for result in results:
        assert max(result["terms"].values()) <= 1e-5
        assert result["grads"] <= 1e-4


def test_tdmpc2_does_the_recorded_updates_on_eight_devices(on_mesh):
    results = on_mesh("tdmpc2_updates", "single", ONE, BOTH_AXES)
    check_tdmpc2(results)
    assert any("fsdp" in spec for spec in results[1]["specs"])


def test_dreamerv3_has_the_recorded_losses_and_gradients_on_eight_devices(on_mesh):
    check_dreamer(on_mesh("dreamer_losses", "vector-free-nats", EIGHT))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["single", "episodic"])
def test_tdmpc2_does_the_recorded_updates_on_any_mesh(on_mesh, variant):
    check_tdmpc2(on_mesh("tdmpc2_updates", variant, ONE, {"data": 1}, EIGHT, BOTH_AXES, {"fsdp": 8}))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["vector-free-nats", "vector-discrete", "image-continuous"])
def test_dreamerv3_has_the_recorded_losses_on_any_mesh(on_mesh, variant):
    check_dreamer(on_mesh("dreamer_losses", variant, ONE, EIGHT, BOTH_AXES))
