"""Part ``learn`` of ``accelerator.py``: do agents learn on this device as published, and as on a CPU?

Every run has a folder in ``--out``; one whose time is over is stopped, saves itself, and goes on at the next start.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

from accelerator_tasks import Task, Unfinished, in_worker
from accelerator_worker import Failed

RESULTS = Path(__file__).parent / "results"
STOPPED = (143, -15)
"""Exit codes after SIGTERM: of a run that has saved, and of one that had not begun."""
GRACE = 45.0
"""Seconds in which a run that is stopped saves its replay and a checkpoint."""
SHORTEST = 150.0
"""Least seconds in which a run begins, compiles, gets somewhere and saves itself."""
TINY = {  # seeds on a card; the file of the CPU's seeds, whose range is the band
    "tdmpc2:tiny Pendulum-v1": ("pendulum-tdmpc2-tiny.json", ["--steps", 10_000, "--eval-episodes", 30]),
    "dreamerv3:tiny CartPole-v1": ("cartpole-dreamerv3-tiny.json", ["--steps", 30_000, "--num-envs", 4]),
}
PUBLISHED = {
    "tdmpc2/dmc": ["--env", "dmc:cartpole_swingup", "--steps", 100_000],
    "dreamerv3/dmc-proprio@2024": ["--env", "dmc:cartpole_balance"],
}
SMALL = [  # a run of the protocol that ends at once, without dm_control
    "--model", "tdmpc2:tiny", "--env", "Pendulum-v1", "--time-limit", 20, "--steps", 100, "--prefill", 40,
    "--prefill-updates", 2, "--batch-size", 4, "--eval-episodes", 1, "--no-eval-at-start", "--no-eval-greedy",
    "--iterations", 1,
]  # fmt: skip
LOOPS = {"training": 90, "random": 60, "policy": 60, "evaluation": 60, "seeds": 150}
MANY = {
    "tdmpc2:tiny": ("jax:Pendulum-v1", {"env_steps": 10_000}),
    "dreamerv3:tiny": ("jax:CartPole-v1", {"env_steps": 30_000, "num_envs": 4}),
}
FEW = {"env_steps": 60, "prefill": 40, "prefill_updates": 2, "batch_size": 4, "eval_at_end": False,
       "env_options": {"time_limit": 20}, "model": {"iterations": 1}}  # fmt: skip


def tasks(smoke):
    """Short runs first. A run takes all the time that there is."""
    if smoke:
        yield Task("tdmpc2/dmc seed 1", 20, lambda place: published(place, "tdmpc2/dmc", SMALL), resumes=True)
        yield Task("2 seeds tdmpc2:tiny", 20, lambda place: many(place, "tdmpc2:tiny", 2, FEW), resumes=True)
        return
    for name, (file, words) in TINY.items():
        for seed in (0, 1):
            yield Task(
                f"{name} seed {seed}", SHORTEST,
                lambda place, name=name, file=file, words=words, seed=seed: tiny(place, name, file, words, seed),
                resumes=True,
            )  # fmt: skip
    for what, seconds in LOOPS.items():
        yield in_worker(f"device loop, {what}", seconds, "accelerator_learn:device_loop", what=what)
    for name, (_, settings) in MANY.items():
        yield Task(
            f"16 seeds {name}", SHORTEST + 60,
            lambda place, name=name, settings=settings: many(place, name, 16, settings),
            resumes=True,
        )  # fmt: skip
    for name, words in PUBLISHED.items():
        yield Task(
            f"{name} seed 1",
            SHORTEST,
            lambda place, name=name, words=words: published(place, name, words),
            resumes=True,
        )


def train(place, name, words):
    """Continue a run of ``worldloom train``: its folder, and what ``metrics.jsonl`` says of it."""
    folder = place.folder / "runs" / name.replace("/", "-").replace(":", "-").replace(" ", "-")
    command = [sys.executable, "-m", "worldloom", "train", "--run", folder, "--resume", "--device", "auto", *words]
    start = time.monotonic()
    code, _, errors = place.run(command, cwd=place.folder, stop_first=GRACE)
    found = {"training_s": place.before.get("progress", {}).get("training_s", 0) + time.monotonic() - start}
    found |= {"command": " ".join(map(str, command[2:])), **of_folder(folder)}
    if code in STOPPED:
        raise Unfinished(found)
    if code:
        raise Failed(f"worldloom train ended with exit code {code}: {errors}")
    return folder, found


def of_folder(folder):
    """Steps, updates and evaluations of a run so far."""
    from worldloom.report.curves import points, read_records

    path = folder / "metrics.jsonl"
    records = read_records(path) if path.exists() else []
    found = {"env_steps": 0, "updates": 0}
    for record in records:
        found |= {"env_steps": record.get("env_steps", found["env_steps"]), "updates": record["step"]}
    for name in ("eval/return", "eval/greedy_return"):
        steps, values = points(records, name)
        if len(steps):
            found[name] = [[int(a), round(float(b), 2)] for a, b in zip(steps, values, strict=True) if math.isfinite(b)]
    return found


def published(place, name, words):
    """A protocol's run, and its published statistic beside the published figure, as ``worldloom score`` prints them."""
    folder, found = train(place, f"{name} seed 1", ["--protocol", name, *words, "--seed", 1])
    code, output, errors = place.run([sys.executable, "-m", "worldloom", "score", folder], cwd=place.folder)
    if code:
        raise Failed(f"worldloom score ended with exit code {code}: {errors}")
    return found | {"score": output.splitlines()}


def tiny(place, name, file, words, seed):
    """A small run, and whether it reaches the goal within the range of the CPU's seeds."""
    model, env = name.split()
    _, found = train(place, f"{name} seed {seed}", ["--model", model, "--env", env, *words, "--seed", seed])
    report = json.loads((RESULTS / file).read_text())
    on_cpu = [row["reached at env_steps"] for row in report["summary"]]
    reached = next((steps for steps, value in found["eval/return"] if value >= report["target"]), None)
    return found | {
        "goal": report["target"],
        "reached_at_env_steps": reached,
        "reached_on_cpu": on_cpu,
        "in_band": reached is not None and reached <= max(on_cpu),
    }


def device_loop(what):
    """The whole loop on the device against the host's, as ``device_loop.py`` measures it."""
    import device_loop as script

    options = argparse.Namespace(rounds=5, updates=200, episodes=1000, shorter=20)
    clock = script.Clock(True)
    return {
        "training": lambda: script.training(clock, options),
        "random": lambda: script.collecting(clock, options, "tdmpc2:tiny", 256, 1000, 2**22),
        "policy": lambda: script.collecting(clock, options, "dreamerv3:tiny", 16, 200, 100_000),
        "evaluation": lambda: script.evaluating(clock, options),
        "seeds": lambda: script.seeds(clock, options),
    }[what]()


def many(place, name, count, settings):
    """Seeds in one program, and the interquartile mean of their returns with its interval."""
    folder = place.folder / "runs" / f"{name.replace(':', '-')}-many"
    start = time.monotonic()
    words = [sys.executable, Path(__file__), name, count, json.dumps(settings), folder]
    code, _, errors = place.run(words, cwd=place.folder, stop_first=GRACE)
    found = {"training_s": place.before.get("progress", {}).get("training_s", 0) + time.monotonic() - start}
    found |= {"members": {run.name: of_folder(run) for run in sorted(folder.glob("*seed*"))}}
    if code in STOPPED:
        raise Unfinished(found)
    if code:
        raise Failed(f"train_many ended with exit code {code}: {errors}")
    return found | json.loads((folder / "summary.json").read_text())


def main():
    """Train or continue the seeds of :func:`many`: ``accelerator_learn.py MODEL COUNT SETTINGS FOLDER``."""
    from worldloom.training import train_many

    name, count, settings, folder = sys.argv[1:]
    train_many(
        name, MANY[name][0], range(int(count)), folder=folder, resume=True, device="auto", **json.loads(settings)
    )


if __name__ == "__main__":
    main()
