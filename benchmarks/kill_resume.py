"""Is anything lost when a run is killed? Prints JSON; ``python benchmarks/kill_resume.py --kills 50``.

Each run of ``runs.py`` is done once without interruption, then again with ``kill -9`` at random moments during training
and saving, resumed each time by the same command. Weights, optimizer, key, replay and log must be equal bit for bit;
otherwise the exit code is 1.

With ``--cli`` the same is done to ``worldloom train`` with all it does in a run folder, by more signals, and from its
first moment on: see ``kill_cli.py``.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FINISHED = "finished.json"
EVERY = 5
"""Updates between two progress messages."""


def live(name, folder, steps, save_every, device):
    """One process of a run: resume from the latest checkpoint and train to the end."""
    from runs import fingerprint, small_run

    progress = (EVERY, lambda info: print(info.step, flush=True))
    trainer, source = small_run(name, folder, steps=steps, save_every=save_every, callbacks=[progress], device=device)
    trainer.train(source, resume="auto")
    (folder / FINISHED).write_text(json.dumps(fingerprint(trainer, source, folder)))


class Life:
    """A process that runs :func:`live`."""

    def __init__(self, name, folder, options):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "--live", name, "--folder", str(folder)]
        command += ["--steps", str(options.steps), "--save-every", str(options.save_every), "--device", options.device]
        self.folder, self.log = folder, folder / "stderr.txt"
        with self.log.open("ab") as errors:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        self.began_at = int(self.process.stdout.readline() or -1)  # first step reported; everything is compiled by then
        self.began = time.monotonic()

    def to_the_end(self):
        """Let it finish; returns the seconds it trained."""
        self.process.communicate()
        seconds = time.monotonic() - self.began
        self._expect(0)
        return seconds

    def kill_after(self, signs, seconds):
        """Kill it ``seconds`` after ``signs`` progress messages; returns what it was doing, or None if it had ended."""
        for _ in range(signs):
            self.process.stdout.readline()
        try:
            self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.communicate()
        if (self.folder / FINISHED).exists():
            return None
        self._expect(-signal.SIGKILL)
        checkpoints = self.folder / "checkpoints"
        if any((checkpoints / "replay").glob("*.partial")):
            return "writing replay"
        return "writing a checkpoint" if any(checkpoints.glob("*.partial")) else "training"

    def _expect(self, code):
        if self.process.returncode != code:
            raise SystemExit(f"A run ended with {self.process.returncode}:\n{self.log.read_text()[-3000:]}")


def survive(name, folder, kills, options, rng):
    """Kill runs ``kills`` times in total, starting a new one whenever one ends, and compare their final states."""
    uninterrupted = Life(name, folder / "whole", options)
    seconds = uninterrupted.to_the_end()
    expected = json.loads((folder / "whole" / FINISHED).read_text())
    deaths, resumed_at, different, runs = [], [], [], 0
    while len(deaths) < kills:
        runs += 1
        killed = folder / f"killed-{runs}"
        while not (killed / FINISHED).exists():
            life = Life(name, killed, options)
            resumed_at.append(life.began_at)
            if len(deaths) == kills:
                life.to_the_end()
            else:
                # A uniform moment, so that on average the kills are spread over one run.
                signs = rng.randint(0, 2 * options.steps // EVERY // (kills + 1))
                about = life.kill_after(signs, rng.uniform(0, 2 * EVERY * seconds / options.steps))
                deaths += [about] if about else []
        found = json.loads((killed / FINISHED).read_text())
        different += [f"{part} of run {runs}" for part in expected if found[part] != expected[part]]
    return {
        "kills": len(deaths),
        "while": {about: deaths.count(about) for about in sorted(set(deaths))},
        "runs": runs,
        "lives": len(resumed_at),
        "training_s": round(seconds, 2),
        "first_steps_seen": resumed_at,
        "different": different,
    }


def main():
    import kill_cli
    from runs import RUNS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="total number, shared between the runs")
    parser.add_argument("--runs", default=",".join(RUNS))
    parser.add_argument("--steps", type=int, default=200, help="updates of a run")
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills")
    parser.add_argument("--device", default="cpu", help="of TrainingConfig; auto is what JAX has")
    parser.add_argument("--folder", help="folder of the runs; temporary by default")
    parser.add_argument("--cli", action="store_true", help="stop the command line; --runs are tdmpc2, dreamerv3, toy")
    parser.add_argument("--live", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.live:
        live(options.live, Path(options.folder), options.steps, options.save_every, options.device)
        return
    if options.cli and options.runs == ",".join(RUNS):
        options.runs = "tdmpc2,dreamerv3"
    names, rng, report = options.runs.split(","), random.Random(options.seed), {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for number, name in enumerate(names):
            kills = options.kills * (number + 1) // len(names) - options.kills * number // len(names)
            test = kill_cli.survive if options.cli else survive
            report[name] = test(name, Path(folder) / name, kills, options, rng)
    equal = not any(entry["different"] or entry.get("wrong") for entry in report.values())
    report |= {"kills": options.kills, "equal": equal, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    print(json.dumps(report, indent=1))
    raise SystemExit(0 if equal else 1)


if __name__ == "__main__":
    main()
