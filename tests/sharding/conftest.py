"""Runs programs on eight virtual devices, whose number is fixed when JAX starts: each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import worldloom

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def on_mesh():
    """``on_mesh("program", *arguments)`` is the result of a function of ``mesh_programs.py``; each is run once."""
    results = {}

    def run(name, *arguments):
        words = (name, *(word if isinstance(word, str) else json.dumps(word) for word in arguments))
        if words not in results:
            results[words] = json.loads(run_python(HERE / "mesh_programs.py", *words).splitlines()[-1])
        return results[words]

    return run


def run_python(*words, **environment):
    """Standard output of a Python program that imports this checkout's package."""
    path = str(Path(worldloom.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
