"""Part ``peers`` of ``accelerator.py``: the reference programs and ours on one card, by turns.

``--peers DIR`` holds checkouts: ``DIR/tdmpc2`` (nicklashansen/tdmpc2), ``DIR/dreamerv3`` (danijar/dreamerv3) and
``DIR/tdmpc2-jax`` (ShaneFlandermeyer/tdmpc2-jax). ``DIR/<name>-venv/bin/python`` runs a program, if it is there, and
otherwise the Python of this process.
"""

import json
import sys
from pathlib import Path

from accelerator_tasks import LeftOut, Task
from accelerator_worker import Failed

COMPARE = Path(__file__).parent / "peers" / "compare.py"
WORKS = {  # work of compare.py: checkout, further words, seconds
    # The reference's own settings on a GPU: compiled PyTorch with TF32, JAX with bfloat16 activations.
    "tdmpc2-update": ("tdmpc2", ["--compile", "--precision", "float32"], 180),
    "tdmpc2-plan": ("tdmpc2", ["--compile", "--precision", "float32"], 180),
    "dreamerv3-size12m-vector": ("dreamerv3", ["--precision", "bfloat16"], 240),
    "dreamerv3-size12m-image": ("dreamerv3", ["--precision", "bfloat16"], 240),
    "dreamerv3-size1m-vector": ("dreamerv3", ["--precision", "bfloat16"], 200),
    "dreamerv3-size1m-image": ("dreamerv3", ["--precision", "bfloat16"], 200),
    "tdmpc2-update-port": ("tdmpc2-jax", ["--precision", "float32"], 150),
    "tdmpc2-plan-port": ("tdmpc2-jax", ["--precision", "float32"], 150),
}


def tasks(smoke, folder):
    """One comparison for each kind of work."""
    for work in ["tdmpc2-update"] if smoke else WORKS:
        yield Task(work, WORKS[work][2], lambda place, work=work: compare(place, work, folder))


def compare(place, work, folder):
    """Seconds of both, and the ratio of each pair; see ``peers/compare.py``."""
    if folder is None:
        raise LeftOut("no --peers DIR with checkouts of the reference programs was given")
    name, words, _ = WORKS[work]
    folder = Path(folder).absolute()
    if not (folder / name).is_dir():
        raise LeftOut(f"{folder / name}, the checkout of the reference program, is not there")
    python = folder / f"{name}-venv" / "bin" / "python"
    command = [sys.executable, COMPARE, work, "--checkout", folder / name, *words]
    command += ["--peer-python", python if python.exists() else sys.executable]
    command += ["--pairs", 1, "--calls", 1] if place.smoke else ["--pairs", 7, "--calls", 20]
    # Both processes have the card at the same time, so neither may take most of its memory.
    code, output, errors = place.run(command, env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    if code:
        raise Failed(f"compare.py ended with exit code {code}: {errors}")
    return json.loads(output)
