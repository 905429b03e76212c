"""Small runs of the kill and damage benchmarks; the scripts in ``benchmarks/`` print the full figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(script, *options):
    """Run a benchmark and return the JSON that it prints; fails if the script fails."""
    found = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *map(str, options)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert found.returncode == 0, f"{found.stdout[-3000:]}\n{found.stderr[-3000:]}"
    return json.loads(found.stdout)


def test_five_kills_leave_no_trace(tmp_path):
    """``kill -9`` at random moments; weights, optimizer, key, replay and log equal those of an undisturbed run."""
    figures = run("kill_resume.py", "--kills", 5, "--runs", "toy-online", "--steps", 100, "--folder", tmp_path)
    assert figures["equal"]
    assert figures["toy-online"]["kills"] == 5
    # Runs went on from where they were, not from the beginning.
    assert max(figures["toy-online"]["first_steps_seen"]) > 10


def test_damaged_checkpoints_never_pass_for_good_ones():
    figures = run("damage.py", "--checkpoints", 30, "--runs", "toy-online")
    assert figures["wrong"] == 0
    outcomes = figures["toy-online"]["outcomes"]
    assert sum(outcomes.values()) == 30
    assert outcomes["went back, and said so"] > 5
    assert outcomes["said that none is left"] > 0
