"""The command line, stopped at random moments in every way, then resumed by the same command. See ``kill_resume.py``.

A run has four environments in processes of their own, terminations, evictions from replay, evaluations with pictures,
and four updates per call. It is stopped from its first moment on: while it starts, compiles, evaluates and saves; some
of the signals wait until a checkpoint, a replay chunk or a picture is half written. Between two lives its folder may be
moved, or copied and left, and another life sees another number of devices. At the end, weights, optimizer, replay and
log must be those of a run that was never stopped.
"""

import collections
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = {
    "tdmpc2": (
        ["--model", "tdmpc2:tiny", "--env", "CartPole-v1", "--episodic", "--latent-dim=16", "--hidden-dim=16"],
        ["--encoder-dim=16", "--num-q=2", "--num-bins=21", "--iterations=1", "--num-samples=8", "--num-elites=4"],
        ["--num-pi-trajs=2", "--horizon=2", "--precision=float32"],
    ),
    "dreamerv3": (
        ["--model", "dreamerv3:tiny", "--env", "CartPole-v1", "--deter-dim=16", "--stoch-dim=8", "--num-categories=4"],
        ["--hidden-dim=16", "--mlp-layers=1", "--blocks=2", "--reward-layers=1", "--continue-layers=1"],
        ["--imagination-horizon=3", "--bins=21", "--precision=float32"],
    ),
    "toy": (
        ["--family-module", str(ROOT / "tests" / "training" / "toy_family.py"), "--model", "toy"],
        ["--env", "MountainCarContinuous-v0", "--latents"],
    ),
}
COMMON = [
    "--num-envs=4", "--parallel=subprocess", "--time-limit=30", "--updates-per-call=4", "--batch-size=4",
    "--sequence-length=6", "--prefill=60", "--prefill-updates=0", "--replay-capacity=200", "--device=cpu", "--seed=11",
    "--log-interval=7", "--save-interval=20", "--eval-interval=30", "--replay-storage=host",
]  # fmt: skip
HOW = ["KILL"] * 5 + ["TERM", "INT", "INT INT", "HUP", "STOP CONT KILL"]
WHEN = [None] * 7 + ["a checkpoint", "a replay chunk", "a picture or model file"]
HALF_WRITTEN = {
    "a checkpoint": "checkpoints/*.partial",
    "a replay chunk": "checkpoints/replay/*.partial",
    "a picture or model file": "**/.*.tmp",
}
"""What is there while something is being written."""
DEVICES = [1, 1, 2, 4]
"""Numbers of devices that JAX is told the machine has; a run computes on the first."""
EXPECTED = {"KILL": -9, "TERM": 143, "INT": 130, "INT INT": 130, "HUP": 129, "STOP CONT KILL": -9}


def command(family, folder, steps):
    """The command that begins a run or goes on with it."""
    words = [word for group in FAMILIES[family] for word in group]
    return [sys.executable, "-m", "worldloom", "train", *words, *COMMON, f"--total-steps={steps}", "--run", str(folder)]


class Life:
    """One process of a run, from its start."""

    def __init__(self, family, folder, steps, hash_seed, devices=1):
        self.folder, self.stopped = folder, False
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(hash_seed), "XLA_FLAGS": flags}
        self._errors = (folder.parent / f"{folder.name}.stderr").open("ab")
        self.process = subprocess.Popen(
            [*command(family, folder, steps), "--resume"],
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env=env,
        )

    def end(self, how=None, seconds=None, when=None):
        """Wait ``seconds``, then until ``when`` is half written; send the signals of ``how``; return the exit code."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            while when and self.process.poll() is None and not any(self.folder.glob(HALF_WRITTEN[when])):
                time.sleep(0.001)
            self.stopped = self.process.poll() is None
            for name in how.split():
                self.process.send_signal(getattr(signal, f"SIG{name}"))
                time.sleep(0.3 if name == "STOP" else 0.02)
            self.process.wait(300)
        self._errors.close()
        return self.process.returncode

    def doing(self):
        """What the process was doing when it ended, by the files it left."""
        checkpoints = self.folder / "checkpoints"
        if not (self.folder / "config.json").exists():
            return "starting"
        if any(checkpoints.glob("*.partial")) or any((checkpoints / "replay").glob("*.partial")):
            return "saving"
        if not any(checkpoints.glob("[0-9]*")):
            return "before the first checkpoint"
        return "writing a file" if any(self.folder.rglob(".*.tmp")) else "training"


def content(folder):
    """Digests of what a run left: weights and optimizer, replay, log."""
    from worldloom.replay import ReplayStore
    from worldloom.training import checkpoint_files as files
    from worldloom.training.checkpoint import Checkpointer

    checkpoints = folder / "checkpoints"
    newest = checkpoints / str(Checkpointer(checkpoints).steps()[-1])
    shapes = {name: shape for name, shape in files._saved_shapes(newest).items() if not name.startswith("around/")}
    arrays = files._load_arrays(newest, shapes)
    found = {"step": newest.name}
    for part in ("params", "opt_state", "key"):
        digest = hashlib.sha256()
        for name in sorted(name for name in arrays if name.split("/")[0] == part):
            digest.update(name.encode() + np.asarray(arrays[name]).tobytes())
        found[part] = digest.hexdigest()
    replay = ReplayStore(checkpoints / "replay").load(files.read_record(newest)["replay"])
    batch = replay.take(np.arange(*replay.state_dict().values())[:, None], latents=bool(replay.latents))
    digest = hashlib.sha256()
    for name in sorted(batch):
        for value in batch[name].values() if isinstance(batch[name], dict) else [batch[name]]:
            digest.update(name.encode() + np.ascontiguousarray(value).tobytes())
    found["replay"] = digest.hexdigest()
    found["files"] = sorted(path.name for path in (folder / "model").iterdir())
    return found, log(folder)


def log(folder):
    """The records of a log without what differs between any two runs."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time" and "fps" not in name} for line in lines]


def differences(folder, whole, stopped_at):
    """The parts in which a run differs from the one that was never stopped.

    A run that was stopped politely has records of its own at those steps.
    """
    (found, records), (expected, expected_records) = content(folder), whole
    different = [name for name, value in expected.items() if found[name] != value]
    own = [record for record in records if record not in expected_records and record["step"] not in stopped_at]
    missing = [record for record in expected_records if record not in records]
    return different + ([f"log (not expected: {own[:2]}; missing: {missing[:2]})"] if own or missing else [])


def survive(family, folder, kills, options, rng):
    """Stop runs ``kills`` times in total, starting a new one whenever one ends, and compare what they leave."""
    folder.mkdir(parents=True)
    # A shell starts background processes with Ctrl-C ignored, nohup with SIGHUP ignored, and so would ours be.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    start, whole = time.monotonic(), Life(family, folder / "whole", options.steps, 0)
    if whole.end() != 0:
        raise SystemExit((folder / "whole.stderr").read_text()[-3000:])
    # Once more, with all programs compiled, for the length of a life.
    start, again = time.monotonic(), Life(family, folder / "again", options.steps, 1)
    again.end()
    seconds, expected = time.monotonic() - start, content(folder / "whole")
    different = [
        f"{part} of an unbroken run with another hash seed" for part in differences(folder / "again", expected, ())
    ]
    doing, devices, moves, runs = collections.Counter(), collections.Counter(), 0, 0
    codes = collections.defaultdict(collections.Counter)
    wrong, stopped = [], 0
    while stopped < kills:
        runs += 1
        place, stopped_at = folder / f"run-{runs}-0 [a]*", set()
        for life_number in range(1, 1000):
            number = rng.choice(DEVICES)
            life, how, when = Life(family, place, options.steps, life_number, number), rng.choice(HOW), rng.choice(WHEN)
            # Mostly within the first half, so that a run is stopped several times.
            code = life.end(how, None if stopped >= kills else rng.uniform(0, seconds * rng.choice([0.5, 1.1])), when)
            if code == 0:
                break
            if not life.stopped:
                raise SystemExit((place.parent / f"{place.name}.stderr").read_text()[-3000:])
            stopped += 1
            devices[number] += 1
            doing[life.doing()] += 1
            codes[how][code] += 1
            # Before Python has installed its handlers, a signal ends the process at once.
            early = code in (-signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT)
            if code != EXPECTED[how] and not (early or code == -signal.SIGINT):
                wrong.append({"signals": how, "code": code, "stderr": (place.parent / f"{place.name}.stderr").name})
            if (place / "metrics.jsonl").exists() and code in (129, 130, 143):
                stopped_at |= {record["step"] for record in log(place)[-3:]}
            if place.exists() and rng.random() < 0.3:
                moves += 1
                moved = place.with_name(f"run-{runs}-{life_number} [a]*")
                if rng.random() < 0.5:
                    place.rename(moved)
                else:
                    shutil.copytree(place, moved)
                place = moved
        different += [f"{part} of run {runs}" for part in differences(place, expected, stopped_at)]
    return {
        "stopped": stopped,
        "while": dict(doing),
        "devices": {str(number): count for number, count in sorted(devices.items())},
        "exit_codes": {how: {str(code): count for code, count in found.items()} for how, found in codes.items()},
        "moved_or_copied": moves,
        "runs": runs,
        "life_s": round(seconds, 1),
        "wrong": wrong,
        "different": different,
    }
