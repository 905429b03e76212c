"""Two processes train like one: online, killed and started again, stopped, and when one of them fails."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoint_process import free_port

import worldloom

PROGRAM = Path(__file__).with_name("one_process.py")


class Processes:
    """The processes of a run, started together; each has ``devices`` virtual devices and ``envs`` environments."""

    def __init__(self, outputs, name, count, *, devices, envs, of_process=None, **settings):
        self.outputs = [outputs / f"{name}-{number}.npz" for number in range(count)]
        self.begun, self.errors = time.monotonic(), []
        path = str(Path(worldloom.__file__).parents[1])
        common = {
            "count": count,
            "port": free_port(),
            "devices": devices,
            "envs": envs,
            "mesh": {"data": -1},
            "steps": 12,
        }
        self._processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    str(PROGRAM),
                    json.dumps(common | settings | (of_process or {}).get(number, {}) | own),
                ],
                env={**os.environ, "PYTHONPATH": path},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number, own in enumerate({"id": i, "out": str(output)} for i, output in enumerate(self.outputs))
        ]

    def wait(self):
        """Exit codes of all processes."""
        self.errors = [process.communicate(timeout=300)[1] for process in self._processes]
        return [process.returncode for process in self._processes]

    def finish(self):
        """Arrays of each process's result, all of which ended well."""
        assert self.wait() == [0] * len(self._processes), self.errors
        results = []
        for output in self.outputs:
            with np.load(output) as file:
                results.append(dict(file))
        return results


def assert_close(actual, expected, tolerance=1e-6):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        np.testing.assert_allclose(
            np.asarray(actual[name], float), np.asarray(value, float), rtol=tolerance, atol=tolerance, err_msg=name
        )


TWO, ONE = {"devices": 2, "envs": 2}, {"devices": 4, "envs": 4}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Results of both processes of a run that nothing happens to, and its folder of checkpoints."""
    folder = tmp_path_factory.mktemp("unbroken")
    return Processes(folder, "two", 2, **TWO, folder=str(folder / "checkpoints")).finish(), folder


def test_two_processes_collect_and_learn_what_one_does(unbroken, tmp_path):
    """Weights, and all rows of replay, which come from two environments of each process."""
    (one,) = Processes(tmp_path, "one", 1, **ONE, folder=str(tmp_path / "checkpoints")).finish()
    for result in unbroken[0]:
        assert_close(result, one)
    # Process 0 calls the callbacks.
    records, other = (
        json.loads(path.read_text()) for path in (tmp_path / "one-0.npz.json", unbroken[1] / "two-0.npz.json")
    )
    assert len(records["rows"]) == 12
    for (step, metrics), (same_step, same) in zip(records["rows"], other["rows"], strict=True):
        assert step == same_step
        assert same == pytest.approx(metrics, rel=1e-6, abs=1e-6)
    assert json.loads((unbroken[1] / "two-1.npz.json").read_text()) == {"rows": [], "step": 12}
    assert [path.name for path in (unbroken[1] / "checkpoints").iterdir() if path.name.isdigit()].count("12") == 1


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_and_both_go_on_as_if_nothing_had_happened(unbroken, tmp_path, killed):
    checkpoints = tmp_path / "checkpoints"
    run = Processes(tmp_path, "killed", 2, **TWO, folder=str(checkpoints), of_process={killed: {"die_at": 8}})
    codes = run.wait()
    assert codes[killed] == -9
    assert codes[1 - killed] not in (0, None)
    assert time.monotonic() - run.begun < 200
    assert "resume" in run.errors[1 - killed] or "another task died" in run.errors[1 - killed]
    shutil.copytree(checkpoints, tmp_path / "copy")
    for result, expected in zip(
        Processes(tmp_path, "again", 2, **TWO, folder=str(checkpoints), resume="auto").finish(),
        unbroken[0],
        strict=True,
    ):
        assert_close(result, expected, 0)
    alone = Processes(tmp_path, "alone", 1, **ONE, folder=str(tmp_path / "copy"), resume="auto")
    assert_close(alone.finish()[0], unbroken[0][0])
    assert "it was saved over mesh={'data': -1} of 2 processes" in alone.errors[0] or killed == 0


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_with_a_checkpoint(unbroken, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    run = Processes(tmp_path, "stopped", 2, **TWO, folder=str(checkpoints), of_process={1: {"stop_at": 6}})
    assert run.wait() == [0, 143], run.errors
    steps = sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    assert 6 <= steps[-1] < 12
    results = Processes(tmp_path, "again", 2, **TWO, folder=str(checkpoints), resume="auto").finish()
    assert_close(results[0], unbroken[0][0], 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "says"),
    [({"fail_at": 20}, "The environments of another process failed"), ({"steps": 13}, "Process 1 has total_steps=13")],
    ids=["environment", "settings"],
)
def test_an_error_in_one_process_is_an_error_in_both(tmp_path, change, says):
    run = Processes(tmp_path, "failed", 2, **TWO, folder=str(tmp_path / "checkpoints"), of_process={1: change})
    assert run.wait() == [1, 1]
    assert says in run.errors[0]


@pytest.mark.slow
def test_weights_divided_over_processes_are_saved_and_restored(tmp_path):
    """The weights of the toy model are too small to be divided, unless arrays of any size are."""
    settings = {"mesh": {"data": 2, "fsdp": 2}, "divide_all": True, "folder": str(tmp_path / "checkpoints")}
    results = Processes(tmp_path, "two", 2, **TWO, **settings).finish()
    settings["folder"] = str(tmp_path / "others")
    (one,) = Processes(tmp_path, "one", 1, **ONE, **settings).finish()
    for result in results:
        assert_close(result, one)
    again = Processes(tmp_path, "again", 2, **TWO, **settings, resume=True).finish()
    assert_close(again[0], one)
