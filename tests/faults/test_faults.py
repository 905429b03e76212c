"""Small runs of the kill and damage benchmarks; the scripts in ``benchmarks/`` print the full figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(script, *options):
    """Run a benchmark and return the JSON that it prints; fails if the script fails."""
    found = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *map(str, options)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=3_600,  # Many kills take minutes; what hangs is to fail, not to hold the suite up.
    )
    assert found.returncode == 0, f"{found.stdout[-3000:]}\n{found.stderr[-3000:]}"
    return json.loads(found.stdout)


def test_five_kills_leave_no_trace(tmp_path):
    """``kill -9`` at random moments; weights, optimizer, key, replay and log equal those of an undisturbed run."""
    check_kills("toy-online", 5, tmp_path)


@pytest.mark.slow
def test_twenty_kills_of_a_loop_on_the_device_leave_no_trace(tmp_path):
    """The same where environments, replay and updates are on the device."""
    check_kills("toy-jax", 20, tmp_path)


def check_kills(name, kills, folder):
    figures = run("kill_resume.py", "--kills", kills, "--runs", name, "--steps", 100, "--folder", folder)
    assert figures["equal"]
    assert figures[name]["kills"] == kills
    # Runs went on from where they were, not from the beginning.
    assert max(figures[name]["first_steps_seen"]) > 10


def test_damaged_checkpoints_never_pass_for_good_ones():
    figures = run("damage.py", "--checkpoints", 30, "--runs", "toy-online")
    assert figures["wrong"] == 0
    outcomes = figures["toy-online"]["outcomes"]
    assert sum(outcomes.values()) == 30
    assert outcomes["went back, and said so"] > 5
    assert outcomes["said that none is left"] > 0
