"""Checkpoints that several processes write and read, each its own part."""

import json
import os
import subprocess
import sys
from pathlib import Path

import checkpoint_process
import jax
import numpy as np
import pytest

import worldloom
from worldloom.sharding import Placement
from worldloom.training.checkpoint import Checkpointer

PROGRAM = Path(__file__).with_name("checkpoint_process.py")


def run_processes(count, *, of_process=None, **settings):
    """Exit codes, results and messages of processes that are started together."""
    common = {
        "count": count,
        "port": checkpoint_process.free_port(),
        "devices": 1,
        "save": [],
        "restore": [],
    } | settings
    started = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), json.dumps(common | {"id": number} | (of_process or {}).get(number, {}))],
            env={**os.environ, "PYTHONPATH": str(Path(worldloom.__file__).parents[1])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    outputs = [process.communicate(timeout=300) for process in started]
    codes = [process.returncode for process in started]
    results = [json.loads(out.splitlines()[-1]) for (out, _), code in zip(outputs, codes, strict=True) if code == 0]
    return codes, results, [messages for _, messages in outputs]


def write_alone(folder, *steps):
    """Checkpoints of this process."""
    checkpoints = Checkpointer(folder)
    checkpoints.open("one")
    for step in steps:
        checkpoints.save(checkpoint_process.snapshot(step, Placement(jax.devices()[0])))
    checkpoints.wait()
    checkpoints.close()


def steps_in(folder):
    return sorted(path.name for path in folder.iterdir())


def bytes_of(checkpoint, process):
    return sum(path.stat().st_size for path in checkpoint.glob(f"state/ocdbt.process_{process}/**/*") if path.is_file())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Results of two processes that save over ``fsdp=2``, once with a full disk, and restore over several meshes."""
    folder = tmp_path_factory.mktemp("shared")
    write_alone(folder / "alone", 5)
    meshes = [{"fsdp": 2}, {"data": 2}]
    codes, results, messages = run_processes(
        2,
        mesh={"fsdp": 2},
        folder=str(folder / "two"),
        save=[1, 2, 3, 4],
        bad=3,
        of_process={1: {"fail": 2}},
        restore=[[str(folder / name), mesh] for name in ("two", "alone") for mesh in meshes],
    )
    assert codes == [0, 0], messages
    return folder, results


def test_each_of_two_processes_writes_about_half(saved):
    checkpoint, divided = saved[0] / "two" / "4", 2 * 256 * 192 * 4
    sizes = [bytes_of(checkpoint, process) for process in (0, 1)]
    for size in sizes:
        assert size == pytest.approx(divided / 2, rel=0.15)  # random numbers hardly compress
    assert steps_in(saved[0] / "two") == ["1", "4"]


def test_what_fails_in_one_process_fails_in_all_and_leaves_nothing(saved):
    for errors in (result["errors"] for result in saved[1]):
        assert errors.keys() == {"2", "3"}
        assert "CheckpointError" in errors["2"]
        assert os.strerror(28) in errors["2"]
        assert "NonFiniteError: Step 3: the weights params/w are not finite" in errors["3"]
    assert "Process 1: " in saved[1][0]["errors"]["2"]


def test_processes_read_their_parts_of_what_several_or_one_has_written(saved):
    for result in saved[1]:
        assert [each["step"] for each in result["restored"]] == [4, 4, 5, 5]
        assert ["fsdp" in each["spec"] for each in result["restored"]] == [True, False, True, False]
        assert all(each["warned"] == [] for each in result["restored"])
        assert [each["rows"] for each in result["restored"]] == [[4] * 3] * 2 + [[5] * 3] * 2


def test_one_process_reads_what_two_have_written(saved):
    found = Checkpointer(saved[0] / "two").restore(checkpoint_process.host_state(0), checkpoint_process.IDENTITY)
    expected = checkpoint_process.host_state(4)
    assert found.record["processes"] == 2
    for name in ("params", "opt_state"):
        for array, value in zip(
            jax.tree.leaves(getattr(found.state, name)), jax.tree.leaves(getattr(expected, name)), strict=True
        ):
            np.testing.assert_array_equal(array, value)


@pytest.mark.slow
def test_other_numbers_of_devices_and_processes_read_it_and_damage_is_found_by_all(saved, tmp_path):
    two = str(saved[0] / "two")
    codes, results, messages = run_processes(
        1, devices=4, mesh={}, folder=str(tmp_path / "a"), restore=[[two, {"fsdp": 4}]]
    )
    assert codes == [0], messages
    assert results[0]["restored"][0]["step"] == 4
    # A file that only one process verifies.
    damaged = max((saved[0] / "two" / "4").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    codes, results, messages = run_processes(3, mesh={}, folder=str(tmp_path / "b"), restore=[[two, {"fsdp": 3}]])
    damaged.write_bytes(content)
    assert codes == [0, 0, 0], messages
    for result in results:
        assert result["restored"][0]["step"] == 1
        assert "is damaged" in result["restored"][0]["warned"][0]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_dies_while_saving_ends_the_other_and_leaves_the_checkpoint_before(tmp_path, killed):
    folder = tmp_path / "two"
    codes, _, messages = run_processes(
        2, mesh={"fsdp": 2}, folder=str(folder), save=[1, 2], of_process={killed: {"die": 2}}
    )
    assert codes[killed] == -9
    assert codes[1 - killed] not in (0, None)
    assert "resume" in messages[1 - killed] or "another task died" in messages[1 - killed]
    assert "2" not in steps_in(folder)
    found = Checkpointer(folder).restore(checkpoint_process.host_state(0), checkpoint_process.IDENTITY)
    assert found.step == 1
