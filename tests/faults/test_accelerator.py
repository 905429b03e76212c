"""``benchmarks/accelerator.py`` in tiny sizes on a CPU: killed and continued, out of time, and with failures."""

import argparse
import contextlib
import importlib
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "accelerator.py"
LIMIT_S = 1_800
"""For what takes minutes: a program that hangs is a failed test, not a suite that never ends."""


def command(*options):
    return [sys.executable, str(SCRIPT), *map(str, options)]


def run(*options):
    return subprocess.run(command(*options), capture_output=True, text=True, cwd=ROOT, timeout=LIMIT_S)


@pytest.fixture
def benchmarks(monkeypatch):
    """``benchmarks("accelerator_counts")`` is that module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_a_smoke_run_killed_in_every_part_goes_on_and_ends_complete(tmp_path):
    """``kill -9`` in each part; what was finished is not measured again, and in the end nothing is left."""
    before = {}
    for part, entries in {"exact": 1, "speed": 2, "flags": 1, "learn": 1}.items():
        process = subprocess.Popen(
            command("--smoke", "--out", tmp_path, "--minutes", 60), stdout=subprocess.DEVNULL, cwd=ROOT
        )
        figures, latest = tmp_path / f"{part}.json", time.monotonic() + LIMIT_S
        try:
            while len(measured(figures)) < entries:
                assert process.poll() is None, "it ended before it could be killed"
                assert time.monotonic() < latest, f"{part} has less than {entries} figures after {LIMIT_S} s"
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
        status = json.loads((tmp_path / "status.json").read_text())
        assert set(status["left"]) - set(status.get("left out", {})), "nothing was left to do"
        assert_kept(before, tmp_path)
        before[part] = measured(figures)

    again = run("--smoke", "--out", tmp_path, "--minutes", 60)
    assert again.returncode == 0, again.stderr[-3000:]
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["failed"] == {}
    assert status["left"] == list(status["left out"]) == ["peers/tdmpc2-update"]
    assert "no --peers DIR" in status["left out"]["peers/tdmpc2-update"]
    assert_kept(before, tmp_path)
    figures = {
        part: json.loads((tmp_path / f"{part}.json").read_text()) for part in ("exact", "speed", "flags", "learn")
    }
    assert sum(map(len, figures.values())) == len(status["done"])
    check_figures(figures)


def measured(file):
    """Entries of a part that hold a figure, not only that one was begun."""
    found = json.loads(file.read_text()) if file.exists() else {}
    return {name: entry for name, entry in found.items() if "figure" in entry}


def assert_kept(before, folder):
    """Raise ``AssertionError`` unless the figures ``before`` are still the same in ``folder``."""
    for part, entries in before.items():
        after = json.loads((folder / f"{part}.json").read_text())
        assert {name: after[name] for name in entries} == entries, "measured again"


def check_figures(figures):
    """What must be true of them on any machine."""
    exact, speed, learn = ({name: each["figure"] for name, each in figures[part].items()}
                           for part in ("exact", "speed", "learn"))  # fmt: skip
    assert exact["golden tdmpc2-single"] == {"passed": 1, "skipped": 0, "wrong": {}}
    # Activations of bfloat16 are off by about 2 to the power −8, and by no more than a few of these.
    assert 1e-4 < exact["distance tdmpc2-single bfloat16"]["relative"]["next latent"] < 0.05
    assert exact["repeat tdmpc2:tiny"]["equal_within_a_process"]
    assert exact["repeat tdmpc2:tiny"]["equal_between_processes"]
    assert exact["resume toy-online"]["equal"]
    for name in ("tdmpc2:tiny", "dreamerv3:tiny"):
        update = speed[f"update {name} vector"]
        assert set(update["ms_per_update"]) == {"1", "2"}
        assert update["of_published_peak"] is None  # A CPU has no data sheet here.
        assert update["gflop"] > 0
        assert update["memory_mb"]["temporary"] > 0
    assert speed["profile tdmpc2:tiny"]["kernels_per_call"] > 10
    assert learn["tdmpc2/dmc seed 1"]["env_steps"] == 100
    assert set(learn["2 seeds tdmpc2:tiny"]["members"]) == {"seed0", "seed1"}


def test_without_an_accelerator_it_says_so_and_writes_nothing(tmp_path):
    if jax.default_backend() != "cpu":
        pytest.skip("this machine has an accelerator")
    found = run("--out", tmp_path / "out")
    assert found.returncode == 2
    assert "no accelerator" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_nothing_is_started_that_would_not_fit(tmp_path):
    found = run("--smoke", "--out", tmp_path, "--part", "speed", "--minutes", 0.05)
    assert found.returncode == 0
    assert "Left: speed/large products" in found.stdout
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["done"] == []
    assert len(status["left"]) > 5
    # Figures of the card do not go where those of a smoke run are.
    status["about"]["device"] = "another"
    (tmp_path / "status.json").write_text(json.dumps(status))
    refused = run("--smoke", "--out", tmp_path, "--part", "speed", "--minutes", 0.05)
    assert refused.returncode == 1
    assert "holds figures of another device ('another', now" in refused.stderr


def test_measurements_are_chosen_by_name(benchmarks):
    script = benchmarks("accelerator")
    args = argparse.Namespace(smoke=False, peers=None)
    planned = [(part, task) for part, tasks in script.PARTS.items() for task in tasks(args)]

    def names(*patterns):
        return [f"{part}/{task.name}" for part, task in script.select(planned, patterns)]

    assert names("speed/plan tdmpc2:5m 1*", "exact/golden *single") == [
        "speed/plan tdmpc2:5m 1", "speed/plan tdmpc2:5m 16", "exact/golden tdmpc2-single"
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"'plan tdmpc2:5m' is none .* Near it: speed/plan tdmpc2:5m 1, "):
        names("plan tdmpc2:5m")
    assert names(*script.FIRST) == list(script.FIRST)
    seconds = sum(task.seconds for _, task in script.select(planned, script.FIRST))
    assert f"--first` takes {seconds} s" in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    refused = run("--only", "exact/golden tdmpc2-sinle", "--list")
    assert refused.returncode == 2
    assert "Near it: exact/golden tdmpc2-single" in refused.stderr


def test_a_failure_is_recorded_and_does_not_stop_the_others(tmp_path, benchmarks):
    """A worker that dies, one that raises, a number that is none, and a mistake in this process."""
    script, tasks, store = (benchmarks(name) for name in ("accelerator", "accelerator_tasks", "accelerator_store"))
    args = argparse.Namespace(smoke=True, again=False)
    planned = [
        ("speed", tasks.in_worker("dies", 5, "os:abort")),
        ("speed", tasks.in_worker("raises", 5, "json:loads", s="{")),
        ("speed", tasks.in_worker("is no number", 5, "json:loads", s="NaN")),
        ("speed", tasks.in_worker("has an unknown flag", 5, "json:loads", flags="--xla_no_such_flag=1", s="1")),
        ("speed", tasks.Task("is wrong", 5, lambda place: {}["missing"])),
        ("speed", tasks.in_worker("is fine", 5, "json:loads", s="[1]")),
    ]
    workers = script.Workers(script.variables(tmp_path, True), benchmarks("accelerator_worker").Clock(30), tmp_path)
    kept = store.Store(tmp_path)
    kept.open_for(workers.of().about | {"smoke": True, "revision": None})
    try:
        script.run(planned, kept, workers, args)
        with pytest.raises(SystemExit, match="Another process is measuring"):
            store.Store(tmp_path)
    finally:
        workers.kill()
        kept.close()
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["done"] == ["speed/is fine"]
    assert set(status["failed"]) == {f"speed/{task.name}" for _, task in planned[:-1]}
    assert "exit code -6" in status["failed"]["speed/dies"]
    assert "JSONDecodeError" in status["failed"]["speed/raises"]
    assert "Unknown flag" in status["failed"]["speed/has an unknown flag"]
    assert "KeyError" in status["failed"]["speed/is wrong"]


def test_one_that_hangs_leaves_time_to_the_others_and_fails_the_second_time(tmp_path, benchmarks, monkeypatch):
    script, tasks, store, worker = (
        benchmarks(f"accelerator{name}") for name in ("", "_tasks", "_store", "_worker")
    )  # fmt: skip
    monkeypatch.setattr(tasks, "SMOKE_SECONDS", 1)
    (tmp_path / "hanging.py").write_text("import time\n\ndef hang():\n    time.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    args = argparse.Namespace(smoke=True, again=False)
    planned = [
        ("exact", tasks.in_worker("hangs", 1, "hanging:hang")),
        ("exact", tasks.Task("hangs elsewhere", 1, lambda place: place.run(["sleep", "600"]))),
        ("exact", tasks.in_worker("wanted", 1, "json:loads", s="1")),
    ]
    kept = store.Store(tmp_path)
    done = []
    try:
        for _ in range(2):
            clock = worker.Clock(0.3)
            workers = script.Workers(script.variables(tmp_path, True), clock, tmp_path)
            kept.open_for(workers.of().about | {"smoke": True, "revision": None})
            monkeypatch.setattr(clock, "end", time.monotonic() + 8)  # the start of a worker is not what is timed
            script.run(planned, kept, workers, args)
            done.append((list(kept.status["done"]), sorted(kept.status["failed"])))
            workers.kill()
    finally:
        kept.close()
    assert done[0] == (["exact/wanted"], [])
    assert done[1] == (["exact/wanted"], ["exact/hangs", "exact/hangs elsewhere"])
    assert "started 2 times" in kept.status["failed"]["exact/hangs"]


def test_what_outlived_a_kill_is_ended_at_the_next_start(tmp_path, benchmarks):
    worker = benchmarks("accelerator_worker")
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    mark = {worker.MARK: str(tmp_path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", child + "print(p.pid, flush=True); p.wait()"],
        env=os.environ | mark, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    number = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert worker.end_leftovers(tmp_path / "another") == 0
    assert Path(f"/proc/{number}/environ").read_bytes()
    assert worker.end_leftovers(tmp_path) == 1
    parent.stdout.close()
    assert not Path(f"/proc/{number}").exists() or Path(f"/proc/{number}/environ").read_bytes() == b""


def test_a_damaged_file_is_moved_aside_and_measured_again(tmp_path, benchmarks, capsys):
    stored = benchmarks("accelerator_store")
    about = {"device": "card", "platform": "gpu", "smoke": False, "jax": "1", "xla_flags": "", "revision": "a"}
    with contextlib.closing(stored.Store(tmp_path)) as store:
        store.open_for(about)
        store.write("speed", "plan", 1.0, figure=1)
        store.write("exact", "golden", 1.0, figure={"passed": 2, "wrong": {"test_loss": "0.1 != 0.2"}})
        store.write_status([("speed", "plan"), ("exact", "golden")], {})
        assert store.status["wrong"] == {"exact/golden": "1 of 3 tests have other values: test_loss"}
    for content in ("", '{"plan": {"fig', "[]", '{"plan": 1}'):
        (tmp_path / "speed.json").write_text(content)
        with contextlib.closing(stored.Store(tmp_path)) as store:
            assert store.open_for(about) == []
            assert store.part("speed") == {}
            assert "speed.json is damaged, and now speed.damaged" in capsys.readouterr().err
        assert (tmp_path / "speed.damaged").read_text() == content


def test_figures_of_other_devices_flags_and_sizes_are_not_mixed(tmp_path, benchmarks):
    """Also where ``status.json`` is gone; those of another commit are kept and named."""
    stored = benchmarks("accelerator_store")
    about = {"device": "card", "platform": "gpu", "smoke": True, "jax": "1", "xla_flags": "", "revision": "a"}
    with contextlib.closing(stored.Store(tmp_path)) as store:
        store.open_for(about)
        store.write("learn", "run", 1.0, progress={"env_steps": 1})
    for change in ({"smoke": False}, {"device": "another"}, {"xla_flags": "--xla_gpu_autotune_level=0"}):
        with contextlib.closing(stored.Store(tmp_path)) as store:
            (name,) = change
            with pytest.raises(SystemExit, match=f"figures of another {name}"):
                store.open_for(about | change)
    with contextlib.closing(stored.Store(tmp_path)) as store:
        assert store.open_for(about | {"revision": "b"}) == ["learn/run"]
        store.write("learn", "run", 1.0, progress={"env_steps": 2})
        store.write("learn", "run", 1.0, figure={"env_steps": 3})
        assert store.part("learn")["run"]["begun at"] == "a"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "x", "--minutes", "0"], "--minutes: 0 is no number of minutes above 0"),
        (["--out", "x", "--minutes", "nan"], "--minutes: nan is no number of minutes above 0"),
        (["--out", "x", "--minutes", "inf"], "--minutes: inf is no number of minutes above 0"),
        (["--out", __file__], "is no folder that takes files"),
        (["--out", "/proc/x"], "is no folder that takes files"),
        (["--out", ""], "--out: '' is no folder"),
        ([], "--out DIR is needed"),
        (["--out", "x", "--peers", "nowhere"], "--peers nowhere is no folder"),
        (["--list-wheels", "--have", "nowhere"], "--have nowhere is no file"),
        (["--list-wheels", "--have-python", "banana"], "--have-python banana is no version of Python"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(options, words, benchmarks, monkeypatch, capsys):
    script = benchmarks("accelerator")
    monkeypatch.setattr(sys, "argv", ["accelerator.py", *options])
    monkeypatch.setattr(script, "Workers", None)
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_a_process_that_falls_back_to_the_cpu_measures_nothing(tmp_path, benchmarks, monkeypatch):
    script, worker = benchmarks("accelerator"), benchmarks("accelerator_worker")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    card = {"device": "NVIDIA H200", "platform": "gpu", "platform_version": "PJRT C API\ncuda 12090"}
    abouts = iter([card, {"device": "cpu", "platform": "cpu", "platform_version": "cpu"}])
    fake = lambda env, log, clock: SimpleNamespace(  # noqa: E731
        env=env, about=next(abouts), close=lambda: None, kill=lambda: None
    )
    monkeypatch.setattr(script, "Worker", fake)
    workers = script.Workers(script.variables(tmp_path, False), worker.Clock(1), tmp_path)
    first = workers.of()
    workers.stay()
    assert workers.env["JAX_PLATFORMS"] == "cuda,cpu"
    assert workers.of() is first
    with pytest.raises(script.NoDevice, match=r"found cpu \(cpu\) in place of NVIDIA H200"):
        workers.of({"XLA_FLAGS": "--xla_gpu_autotune_level=0"})


def test_what_a_card_measures_of_the_device_loop_runs(benchmarks, monkeypatch):
    """The calls are those that ``device_loop.py`` takes."""
    learn, script = benchmarks("accelerator_learn"), benchmarks("device_loop")
    for name in ("training", "collecting", "evaluating", "seeds"):
        function = getattr(script, name)
        bound = lambda *given, function=function: inspect.signature(function).bind(*given).args  # noqa: E731
        monkeypatch.setattr(script, name, bound)
    found = {what: learn.device_loop(what) for what in learn.LOOPS}
    assert found["random"][2:] == ("tdmpc2:tiny", 256, 1000, 2**22)
    assert found["policy"][2:] == ("dreamerv3:tiny", 16, 200, 100_000)


def test_small_runs_are_those_of_the_cpu(benchmarks):
    """Steps, environments, episodes and so the falling learning rate: otherwise their bands mean nothing."""
    learn = benchmarks("accelerator_learn")
    for name, (file, words) in learn.TINY.items():
        report = json.loads((learn.RESULTS / file).read_text())
        given = dict(zip(words[::2], words[1::2], strict=True))
        assert f"{report['model']} {report['env']}" == name
        # The last evaluation is less than two intervals before the end.
        assert 0 <= given["--steps"] - report["runs"][0]["curve"][-1]["env_steps"] < 2_000
        assert given.get("--num-envs", 1) == report["num_envs"]
        assert given.get("--eval-episodes", 10) == report.get("episodes", 10)


def test_programs_that_take_too_long_are_ended(benchmarks):
    worker = benchmarks("accelerator_worker")
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(worker.Failed, match=r"longer than 1 s"):
        worker.run_command(sleep, worker.Clock(1), 1)
    with pytest.raises(worker.OutOfTime):
        worker.run_command(sleep, worker.Clock(0.01), 30)
    code, _, _ = worker.run_command(sleep, worker.Clock(0.05), 30, stop_first=2.5)
    assert code == -15  # It was asked to stop, in time to save.


def test_peers_are_called_by_their_own_python(tmp_path, benchmarks):
    peers = benchmarks("accelerator_peers")
    calls = []
    place = SimpleNamespace(smoke=False, run=lambda words, env: calls.append((words, env)) or (0, '{"ratio": 2}', ""))
    with pytest.raises(Exception, match="is not there"):
        peers.compare(place, "tdmpc2-update", tmp_path)
    python = tmp_path / "tdmpc2-venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    (tmp_path / "tdmpc2").mkdir()
    assert peers.compare(place, "tdmpc2-update", tmp_path) == {"ratio": 2}
    words, env = calls[0]
    assert words[words.index("--peer-python") + 1] == python
    assert "--compile" in words
    assert env == {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    compare = subprocess.run(
        [sys.executable, peers.COMPARE, "--help"], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    for work, (_, options, _) in peers.WORKS.items():
        assert work in compare
        assert all(option in compare for option in options)


def test_flops_count_every_step_of_a_scan(benchmarks):
    counts = benchmarks("accelerator_counts")
    x = jnp.ones((3, 8, 8))

    def program(x, kernel):
        y = jax.lax.scan(lambda carry, _: (carry @ carry, None), x[0], None, length=5)[0]
        picture = jnp.ones((2, 6, 6, 4))
        return y, jax.lax.conv_general_dilated(
            picture, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    trace = lambda: jax.jit(program).trace(x, jnp.ones((3, 3, 4, 7)))  # noqa: E731
    assert counts.count_flops(trace) == (5 * 2 * 8**3 + 2 * (2 * 6 * 6 * 7) * (3 * 3 * 4), 0)
    unknown = lambda: jax.jit(lambda n, x: jax.lax.fori_loop(0, n, lambda i, y: y @ y, x)).trace(3, x[0])  # noqa: E731
    assert counts.count_flops(unknown) == (2 * 8**3, 1)


def test_peaks_are_found_by_the_name_of_the_card(benchmarks):
    peak = benchmarks("accelerator_counts").published_peak
    assert peak("NVIDIA H200", "bfloat16") == 989e12
    assert peak("NVIDIA H100 80GB HBM3", "tf32") == 494e12
    assert peak("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak("NVIDIA A100-SXM4-40GB", "float32") == 19.5e12
    assert peak("NVIDIA L40S", "bfloat16") == 362e12
    assert peak("NVIDIA L4", "bfloat16") == 121e12
    assert peak("NVIDIA H200 NVL", "bfloat16") == 836e12
    for other in ("cpu", "NVIDIA GB200", "NVIDIA H200 MIG 1g.18gb"):
        assert peak(other, "bfloat16") is None


def test_kernels_and_gaps_are_those_of_the_streams(benchmarks):
    """Two streams that overlap, over two calls; other lines of the card and the host are not counted."""
    event = lambda name, start, length: SimpleNamespace(name=name, start_ns=start, duration_ns=length, stats=[])  # noqa: E731
    line = lambda name, *events: SimpleNamespace(name=name, events=events)  # noqa: E731
    card = SimpleNamespace(
        name="/device:GPU:0",
        lines=[
            line("Stream #1(Compute)", event("gemm", 0, 1000), event("add", 3000, 1000), event("gemm", 6000, 1000)),
            line("Stream #2(Memcpy)", event("MemcpyD2H", 3500, 1500)),
            line("XLA Modules", event("jit_update", 0, 7000)),
        ],
    )
    host = SimpleNamespace(name="/host:CPU", lines=[line("tf_XLA", event("op", 0, 9000))])
    other = SimpleNamespace(name="/device:GPU:1", lines=card.lines)
    kernels_of = benchmarks("accelerator_counts").kernels_of
    found = kernels_of([host, card, other], 2, "gpu")
    assert found["kernels_per_call"] == 1.5
    assert found["copies_per_call"] == 0.5
    assert found["copies_ms_per_call"] == pytest.approx(0.75e-3)
    assert found["gaps_per_call"] == 1
    assert found["gap_us"] == {"median": 1.5, "longest": 2.0}
    assert found["busy"] == pytest.approx(4000 / 7000)
    assert found["top"][0] == {"name": "gemm", "per_call": 1.0, "ms_per_call": 1e-3}
    with pytest.raises(ValueError, match="no stream of a GPU, only /host:CPU"):
        kernels_of([host], 2, "gpu")


def test_all_flags_are_known_to_this_jaxlib(benchmarks):
    """XLA ends a process at a flag that it does not know, also on a CPU."""
    settings = benchmarks("accelerator_flags").SETTINGS.values()
    flags = " ".join(setting.flags for setting in settings)
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    code = "import jax; jax.devices()"
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-500:]


def test_wheels_are_listed_with_versions():
    found = run("--list-wheels").stdout.splitlines()
    assert f"jax-cuda12-plugin[with-cuda]=={jax.__version__}" in found
    assert f"jax=={jax.__version__}" in found
    assert any(line.startswith(("mujoco==", "mujoco<4")) for line in found)
    assert any(line.startswith("dm-control") for line in found)
    assert len(found) == len(set(found))


def test_wheels_that_a_machine_has_are_not_listed(benchmarks):
    wheels = benchmarks("accelerator_wheels")
    everything = [line.split("  #")[0] for line in wheels.lines()]
    same = "".join(f"{name}=={wheels.installed(name)}\n" for name in ("jax", "jaxlib", "numpy"))
    have = wheels.versions_in(f"{same}flax==0.10.0\ntorch @ file:///torch.whl\nnvidia-cublas-cu12==12.4\n")
    found = [line.split("  #")[0] for line in wheels.lines(have, "3.12")]
    names = {line.partition("==")[0] for line in found}
    assert not names & {"jax", "jaxlib", "numpy", "jax-cuda13-plugin[with-cuda]"}
    assert f"jax-cuda12-plugin[with-cuda]=={jax.__version__}" in found
    assert {line for line in everything if line.startswith(("flax==", "optax=="))} <= {*found}
    assert "--python-version 3.12" in found[0]
    both = have | {"jax-cuda12-plugin": jax.__version__, "jax-cuda12-pjrt": jax.__version__}
    assert not any(line.startswith("jax-cuda") for line in wheels.lines(both))


def test_the_readme_has_the_settings(benchmarks):
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for name, setting in benchmarks("accelerator_flags").SETTINGS.items():
        words = setting.flags or " ".join(f"{key}={value}" for key, value in setting.env.items())
        assert f"| {name} | {f'`{words}`' if words else ''} | {setting.effect} |".replace("|  |", "| |") in text
