"""Every script in ``benchmarks/`` starts, ends and prints JSON; the figures of such small runs mean nothing."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"
TINY = "--model tdmpc2:tiny --batch-size 4 --length 4"
CASES = {  # script and further words: its smallest options
    "act.py": "--model tdmpc2:tiny --rounds 1 --calls 2 --steps 2 --memory-calls 10",
    "compile.py": "--model tdmpc2:tiny --repeats 1",
    "device_loop.py": "--rounds 1 --episodes 4 --shorter 64 --only random",
    "env_checks.py": "--turns 1 --steps 5",
    "explore.py": "--model tdmpc2:tiny --seeds 0 --cells 2 --steps 1008 --updates 2 --loop host",
    "fine_tune.py": "--seeds 0 --first-steps 401 --env-steps 401 --episodes 1 --out out.json",
    "full_disk.py": "--runs toy-online --steps 80",
    "hostile_files.py": "--files 40",
    "imagine.py": "--model tdmpc2:tiny --batch-size 4 --horizon 2 --repeats 1",
    "kill_resume.py --cli": "--runs toy --kills 1 --steps 40",
    "leaks.py": "--trainers 3 --models 0 --environments 3",
    "learning.py": "--steps 60 --episodes 1 --out out.json --set prefill=40 prefill_updates=1 eval_interval=50",
    "memory.py": f"{TINY} --repeats 1",
    "mesh.py": f"{TINY} --pairs 1 --updates 1",
    "offline_online.py": "--seeds 0 --data-steps 1001 --offline-updates 2 --env-steps 401 --episodes 1 --out out.json",
    "online.py": "--models tdmpc2:tiny --wait 1 --steps 2 --rounds 1",
    "plan.py": "--model tdmpc2:tiny --environments 2 --repeats 1",
    "replay.py": "--rows 1100 --repeats 2",
    "replay_store.py": "--rows 2000 --every 1000",
    "scaling.py": "--small --rounds 1 --only tdmpc2/update/batch_size",
    "soak.py": "--updates 200 --save-every 100",
    "stream.py": "--gb 0.01 --files 2 --buffer-gb 0.002 --batches 2",
    "train_step.py": "--models tdmpc2:tiny --updates 2 --rounds 1",
    "update.py": f"{TINY} --repeats 1",
}
JUDGES = ("leaks.py", "soak.py")
"""Exit with 1 if memory grows, as it does in the beginning of any run."""
ELSEWHERE = {
    "accelerator.py": "tests/faults/test_accelerator.py",
    "damage.py": "tests/faults/test_faults.py",
    "kill_resume.py": "tests/faults/test_faults.py",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_benchmark_prints_json(case, tmp_path):
    script, *words = case.split()
    found = subprocess.run(
        [sys.executable, str(FOLDER / script), *words, *CASES[case].split()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert found.returncode in ((0, 1) if script in JUDGES else (0,)), f"{found.stdout[-2000:]}\n{found.stderr[-3000:]}"
    printed = json.loads(found.stdout)
    assert printed
    if (tmp_path / "out.json").exists():
        assert json.loads((tmp_path / "out.json").read_text()) == printed


def test_every_benchmark_is_started_by_a_test():
    programs = {path.name for path in FOLDER.glob("*.py") if "argparse.ArgumentParser" in path.read_text("utf-8")}
    assert programs == {case.split()[0] for case in CASES} | {*ELSEWHERE}
    for script, test in ELSEWHERE.items():
        assert f'"{script}"' in (ROOT / test).read_text("utf-8")


@pytest.fixture
def script(monkeypatch):
    """``script("memory")`` is that module of ``benchmarks/``, or of ``benchmarks/peers/``."""
    monkeypatch.syspath_prepend(str(FOLDER / "peers"))
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_the_peak_of_updates_is_null_where_they_do_not_raise_the_mark(script, monkeypatch):
    memory = script("memory")
    program = SimpleNamespace(memory_analysis=lambda: SimpleNamespace(temp_size_in_bytes=2e6))
    trace = SimpleNamespace(lower=lambda: SimpleNamespace(compile=lambda: program))
    work = SimpleNamespace(
        update_call=lambda *_, **__: (None, None, lambda: trace), measure=lambda *_, **__: {"median_seconds": 0.5}
    )
    monkeypatch.setitem(sys.modules, "work", work)
    monkeypatch.setattr(memory, "lower_the_mark", lambda: None)
    for after, peak in ((30e6, None), (31e6, 21.0)):
        marks = [(10e6, 30e6), (12e6, after)]
        monkeypatch.setattr(memory, "memory_now", lambda marks=marks: marks.pop(0))
        expected = {"temporary_mb": 2.0, "peak_mb": peak, "seconds": 0.5}
        assert memory.one("plain", "tdmpc2:tiny", "vector", 4, 4, 1) == expected


def test_pythonpath_is_kept_from_another_python_only(script, monkeypatch):
    compare = script("compare")
    monkeypatch.setenv("PYTHONPATH", "here")
    assert compare.variables(sys.executable)["PYTHONPATH"] == "here"
    assert "PYTHONPATH" not in compare.variables("/elsewhere/bin/python")
