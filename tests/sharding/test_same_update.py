"""The same update on one device and on eight: recorded numbers, compiled programs."""

import pytest

ONE, EIGHT, BOTH_AXES = {}, {"data": 8}, {"data": 2, "fsdp": 4}
TDMPC2 = {"batch_size": 64, "sequence_length": 4}
DREAMER = {"batch_size": 16, "sequence_length": 16}


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


def check_text(one, data, both=None, *, share=0.55):
    """Every device does its share, only the percentile's input is collected, and no loop waits for other devices."""
    assert data["flops"] <= share * one["flops"]
    assert len(data["gathered"]) == 1
    assert data["weights_gathered"] == 0
    assert data["in_loops"] == []
    assert set(data["bytes"]) <= {"all-gather", "all-reduce"}
    if both is not None:
        assert len(both["gathered"]) == 1
        assert both["weights_gathered"] > 0
        assert both["in_loops"] == []


def test_tdmpc2_does_the_recorded_updates_on_eight_devices(on_mesh):
    one, eight = results = on_mesh("tdmpc2_updates", "single", ONE, EIGHT)
    check_tdmpc2(results)
    check_text(one, eight, share=0.3)


def test_dreamerv3_has_the_recorded_losses_and_gradients_on_eight_devices(on_mesh):
    check_dreamer(on_mesh("dreamer_losses", "vector-free-nats", EIGHT))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["single", "episodic"])
def test_tdmpc2_does_the_recorded_updates_on_any_mesh(on_mesh, variant):
    results = on_mesh("tdmpc2_updates", variant, ONE, {"data": 1}, EIGHT, BOTH_AXES, {"fsdp": 8})
    check_tdmpc2(results)
    assert any("fsdp" in spec for spec in results[3]["specs"])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["vector-free-nats", "vector-discrete", "image-continuous"])
def test_dreamerv3_has_the_recorded_losses_on_any_mesh(on_mesh, variant):
    check_dreamer(on_mesh("dreamer_losses", variant, ONE, EIGHT, BOTH_AXES))


@pytest.mark.slow
def test_tdmpc2_collects_nothing_but_the_percentiles_values(on_mesh):
    check_text(*on_mesh("compiled_text", "tdmpc2:tiny", [12], TDMPC2, ONE, {"data": 2}, {"data": 2, "fsdp": 2}))


@pytest.mark.slow
def test_dreamerv3_collects_nothing_but_the_percentiles_returns(on_mesh):
    check_text(*on_mesh("compiled_text", "dreamerv3:tiny", [12], DREAMER, ONE, {"data": 2}, {"data": 2, "fsdp": 2}))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dreamerv3:tiny", "tdmpc2:tiny"])
@pytest.mark.parametrize("fields", [{"microbatches": 2}, {}], ids=["microbatches", "images"])
def test_microbatches_and_images_are_divided_too(on_mesh, name, fields):
    sizes = dict(TDMPC2 if name.startswith("tdmpc2") else DREAMER)
    if fields:
        sizes["batch_size"] *= 4  # XLA counts the loop over microbatches once, and the optimizer is not divided.
    obs_shape = [12] if fields else [64, 64, 3]
    one, two = on_mesh("compiled_text", name, obs_shape, {**sizes, **fields}, ONE, {"data": 2})
    assert two["flops"] <= 0.55 * one["flops"]
    assert len(two["gathered"]) == 1


def check_restored(results):
    for metrics in results:
        for name, (restored, unbroken) in metrics.items():
            assert restored == pytest.approx(unbroken, rel=1e-5, abs=1e-7), name


def test_a_run_goes_on_elsewhere_from_8_to_2_to_1_to_8_devices(on_mesh, tmp_path):
    fields = {"sequence_length": 4, "updates_per_call": 2}
    check_restored(on_mesh("restored_elsewhere", "toy", str(tmp_path), fields))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dreamerv3:tiny", "tdmpc2:tiny"])
def test_a_model_goes_on_elsewhere_with_its_optimizer(on_mesh, tmp_path, name):
    check_restored(on_mesh("restored_elsewhere", name, str(tmp_path), {"sequence_length": 4, "microbatches": 2}))
