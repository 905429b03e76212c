"""Examples are programs that people copy: they run, alone and as they stand, small."""

import importlib
import json
import re
import runpy
import shutil
import sys
import types
from pathlib import Path

import jax
import pytest

import worldloom
from worldloom import families
from worldloom.cli import main

EXAMPLES = Path(worldloom.__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.fixture
def small(tmp_path, monkeypatch):
    """An empty folder to run in, and the wish to be quick."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAST", "1")
    monkeypatch.setenv("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    return tmp_path


def run(name, monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_train_tdmpc2_and_plan_with_it(small, monkeypatch, capsys):
    out = run("train_tdmpc2.py", monkeypatch, capsys, "--run", "run")
    assert "Return of 2 further episodes" in out
    assert (small / "run" / "learning_curve.png").is_file()
    out = run("plan_tdmpc2.py", monkeypatch, capsys, "run/model")
    assert "iteration 3" in out
    assert "Return by the policy alone" in out


def test_train_dreamer_and_look_into_it(small, monkeypatch, capsys):
    out = run("train_dreamer.py", monkeypatch, capsys, "--run", "run")
    assert "Return of 2 further episodes" in out
    assert (small / "run" / "open_loop.png").is_file()
    out = run("imagine.py", monkeypatch, capsys, "run/model")
    assert "always right" in out
    assert (small / "runs" / "imagine" / "open_loop.png").is_file()


def test_custom_callback(small, monkeypatch, capsys):
    out = run("custom_callback.py", monkeypatch, capsys)
    assert "2 evaluations in a row reached" in out
    lines = [json.loads(line) for line in (small / "runs/custom_callback/metrics.jsonl").read_text().splitlines()]
    assert any("weights/encoder" in line for line in lines)


def test_reinforce_in_imagination(small, monkeypatch, capsys):
    out = run("reinforce_in_imagination.py", monkeypatch, capsys)
    assert "update    3: imagined return" in out
    assert "after learning in imagination" in out


def test_a_changed_model_in_less_than_60_lines(small, monkeypatch, capsys):
    assert len((EXAMPLES / "custom_model.py").read_text(encoding="utf-8").splitlines()) < 60
    out = run("custom_model.py", monkeypatch, capsys)
    assert re.search(r"\binverse 0\.\d+", out)  # on the console with the other terms
    assert "all read back: True" in out
    assert (small / "runs" / "custom_model" / "model" / "model.safetensors").is_file()


def test_a_family_in_one_file(small, monkeypatch, capsys):
    out = run("linear_family.py", monkeypatch, capsys)
    families._registered.pop("linear")
    (score,) = re.findall(r"Mean return of 2 episodes: (-\d+)", out)
    assert -900 < int(score) < 0  # Pendulum's rewards are at least -16.3, and an episode has 50 steps


def test_a_family_in_one_file_works_on_the_command_line(small, monkeypatch, capsys):
    """The commands in its head, with less to do."""
    text = (EXAMPLES / "linear_family.py").read_text(encoding="utf-8")
    typed = re.findall(r"^ +worldloom (.*)$", text, flags=re.M)
    assert [line.split()[0] for line in typed] == ["train", "eval"]
    tiny = ["--steps=40", "--prefill=30", "--time-limit=10", "--sequence-length=4", "--eval-interval=0", "--device=cpu"]
    monkeypatch.setattr(families, "imported_modules", [])
    try:
        for line, further in zip(typed, (tiny, ["--episodes=1"]), strict=True):
            words = [str(EXAMPLES.parent / word) if word.endswith(".py") else word for word in line.split()]
            assert main([*words, *further]) == 0
    finally:
        families._registered.pop("linear", None)
        sys.modules.pop("linear_family", None)
    assert "of 1 episodes terminated" in capsys.readouterr().out


@pytest.fixture
def kernel(small, monkeypatch):
    """Runs cells of a notebook in a stand-in for IPython, which only keeps what is displayed."""
    importlib.import_module("flax.nnx")  # It looks for a real IPython when it is first imported.
    shown = []
    display = types.ModuleType("IPython.display")
    display.Image = lambda filename: Path(filename)
    display.display = shown.append
    package = types.ModuleType("IPython")
    package.version_info, package.get_ipython = (9, 0, 0), lambda: None  # What Matplotlib asks it.
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)

    def run_cells(name, namespace):
        for number, cell in enumerate(json.loads((EXAMPLES / name).read_text(encoding="utf-8"))["cells"]):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), namespace)
        found = [path.name for path in shown]
        assert all(path.stat().st_size > 5_000 for path in shown)
        shown.clear()
        return found

    return run_cells


def see_gpu(there, monkeypatch):
    """Notebooks ask for ``nvidia-smi``, and find it or do not."""
    which = shutil.which
    tool = "/usr/bin/nvidia-smi" if there else None
    monkeypatch.setattr(
        "shutil.which", lambda name, *args, **options: tool if name == "nvidia-smi" else which(name, *args, **options)
    )


def test_the_quickstart_notebook_runs_and_runs_again(kernel, monkeypatch, capsys, caplog):
    namespace: dict = {}
    for gpu, message in ((False, "No accelerator: fine"), (True, "JAX does not use this machine's GPU")):
        see_gpu(gpu, monkeypatch)
        assert kernel("quickstart.ipynb", namespace) == ["learning_curve.png", "eval.gif", "horizon.png"]
        out = capsys.readouterr()
        assert "running on" in out.out
        assert (message in out.out) == (jax.default_backend() == "cpu")
        assert "the reloaded model plans the same: True" in out.out
        assert len(out.out + out.err) < 10_000
    assert "Nothing to train" in caplog.text  # The second time, the run is found done.


def test_the_offline_notebook_runs(kernel, capsys):
    assert kernel("offline.ipynb", {}) == ["learning_curve.png", "horizon.png"]
    out = capsys.readouterr().out
    assert "error of imagined rewards after 1, 5 and 15 steps" in out
    assert "the reloaded model is the same: True" in out


def test_the_notebook_of_many_seeds_runs(kernel, small, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(small))
    assert kernel("many_seeds.ipynb", {}) == ["summary.png"]
    out = capsys.readouterr().out
    assert "learning_rate 0.001: " in out
    assert "over seeds [0, 1]" in out
    assert "over 4 episodes" in out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_stripped_and_open_in_colab(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    assert f"colab.research.google.com/github/worldloom/worldloom/blob/main/examples/{path.name}" in "".join(
        cells[0]["source"]
    )
    assert "git+https://github.com/worldloom/worldloom" in installing(path)


def installing(path):
    """The source of the cell that installs worldloom."""
    sources = ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    return next(source for source in sources if "pip" in source)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_install_what_jax_needs_for_a_gpu(path, gpu, monkeypatch):
    """JAX refuses a plugin of another version than its own, which is what a machine may already have."""
    typed = []
    shell = types.SimpleNamespace(run_line_magic=lambda *words: typed.append(words))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    see_gpu(gpu, monkeypatch)
    exec(compile(installing(path), path.name, "exec"), {"get_ipython": lambda: shell})
    ((magic, line),) = typed
    assert magic == "pip"
    assert f"'worldloom[{'cuda12,video' if gpu else 'video'}] @ git+https" in line


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_say_how_they_are_run(path):
    assert f"python examples/{path.name}" in path.read_text(encoding="utf-8")
