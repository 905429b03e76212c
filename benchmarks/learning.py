"""Does an agent learn, and how fast? One run for each seed; prints JSON with the learning curves.

    python benchmarks/learning.py --model tdmpc2:tiny --env Pendulum-v1 --steps 10000 --seeds 0 1 2 3 4

Trains with the recipe of ``worldloom train``; ``--set field=value`` changes fields of either config. Each point of a
curve is the mean return of 10 episodes (``--episodes``) in separate evaluation environments, with the seconds since the
run began, including evaluation and compilation. With ``--test N`` the weights of the best point are then evaluated in N
further episodes, which were not used to choose them. ``--plot picture.png file.json …`` plots saved curves instead of
training.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import jax

import worldloom
from worldloom import create_world_model
from worldloom.devices import keep_freed_memory
from worldloom.envs import make_env
from worldloom.training import Trainer, TrainingConfig
from worldloom.training.callbacks import Callback, EvalCallback, StopTraining
from worldloom.training.evaluation import play
from worldloom.training.recipes import recipe


class Curve(Callback):
    """Records evaluations and the best weights, and stops at a target return."""

    every = 0

    def __init__(self, stop_at):
        self.points, self.stop_at, self.start = [], stop_at, time.perf_counter()
        self.best, self.model = -math.inf, None

    def on_eval(self, info, measurements):
        if "eval/return" not in measurements:
            return None
        point = {
            "env_steps": info.env_steps,
            "return": round(measurements["eval/return"], 2),
            "std": round(measurements["eval/return_std"], 2),
            "seconds": round(time.perf_counter() - self.start, 1),
        }
        if "eval/greedy_return" in measurements:
            point["greedy"] = round(measurements["eval/greedy_return"], 2)
        self.points.append(point)
        if point["return"] > self.best:
            self.best, self.model = point["return"], info.model()
        print(json.dumps(point), flush=True, file=sys.stderr)
        return StopTraining(f"return {point['return']}") if point["return"] >= self.stop_at else None


def run(args, seed, changes):
    """Train one run; returns its curve and its settings."""
    env = make_env(args.env, args.num_envs, seed=seed)
    model_fields, training_fields, _ = recipe(args.model, env, changes)
    known = set(TrainingConfig.__dataclass_fields__)
    model_fields |= {name: value for name, value in changes.items() if name not in known}
    training_fields |= {name: value for name, value in changes.items() if name in known}
    config = TrainingConfig(**{**training_fields, "env_steps": args.steps, "seed": seed})
    model = create_world_model(args.model, **model_fields, seed=seed)
    curve = Curve(args.stop_at)
    evaluation = EvalCallback(env.another(args.episodes, seed + 10_000), episodes=args.episodes, seed=seed + 10_000)
    trainer = Trainer(model, config, [evaluation, curve])
    trainer.train(env)
    done = {
        "seed": seed,
        "updates": trainer.step,
        "seconds": round(time.perf_counter() - curve.start, 1),
        "curve": curve.points,
    }
    if args.test:
        fresh = env.another(min(args.test, 25), seed + 20_000)
        returns = [end.episode_return for end in play(curve.model, fresh, episodes=args.test, seed=seed + 20_000)]
        done["test"] = {"episodes": args.test, "return": statistics.mean(returns), "worst": min(returns)}
        print(json.dumps(done["test"]), flush=True, file=sys.stderr)
    env.close()
    return done, {
        "parameters": model.num_parameters(),
        "model config": {name: value for name, value in model.config.to_dict().items() if name in model_fields},
        "training config": {name: getattr(config, name) for name in training_fields if name != "seed"},
    }


def summary(runs, target):
    """Per seed: best and last return, when the target was reached, and whether that was kept."""
    rows = []
    for one in runs:
        first = next((i for i, point in enumerate(one["curve"]) if point["return"] >= target), len(one["curve"]))
        reached = one["curve"][first] if first < len(one["curve"]) else None
        # By position: there are two evaluations at the same step, before and after the updates of the prefill.
        since = [point["return"] for point in one["curve"][first:]]
        rows.append(
            {
                "seed": one["seed"],
                "best": max(point["return"] for point in one["curve"]),
                "last": one["curve"][-1]["return"],
                "reached at env_steps": reached and reached["env_steps"],
                "after seconds": reached and reached["seconds"],
                "mean from there on": round(statistics.mean(since), 1) if since else None,
                "least from there on": min(since, default=None),
                "test": one.get("test"),
            }
        )
    return rows


def plot(target, files):
    """Plot the curves of each file in one panel: thin lines for seeds, a thick one for their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(files), 3.2), layout="constrained")
    for axes, file in zip(figure.subplots(1, len(files), squeeze=False)[0], files, strict=True):
        report = json.loads(Path(file).read_text())
        by_step = {}
        for one in report["runs"]:
            steps, returns = zip(*((point["env_steps"] / 1e3, point["return"]) for point in one["curve"]), strict=True)
            axes.plot(steps, returns, color="tab:blue", alpha=0.35, linewidth=1)
            for index, point in enumerate(zip(steps, returns, strict=True)):
                by_step.setdefault(index, []).append(point)
        mean = [
            tuple(map(statistics.mean, zip(*points, strict=True)))
            for points in by_step.values()
            if len(points) == len(report["runs"])
        ]
        axes.plot(*zip(*mean, strict=True), color="tab:blue", linewidth=2)
        if report.get("target") is not None:
            axes.axhline(report["target"], color="tab:orange", linestyle="--", linewidth=1)
        axes.set_title(f"{report['model']} on {report['env']}\n{len(report['runs'])} seeds", fontsize=10)
        axes.set_xlabel("environment steps, thousands")
        axes.set_ylabel("evaluation return")
        axes.grid(alpha=0.25)
    figure.savefig(target, dpi=110)


def value(text):
    """The value of JSON text, or the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tdmpc2:tiny")
    parser.add_argument("--env", default="Pendulum-v1")
    parser.add_argument("--steps", type=int, default=10_000, help="environment steps")
    parser.add_argument("--num-envs", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of either config")
    parser.add_argument("--episodes", type=int, default=10, help="episodes of each evaluation")
    parser.add_argument("--target", type=float, help="return to reach, for the summary")
    parser.add_argument("--stop-at", type=float, default=float("inf"), help="end a run when an evaluation reaches this")
    parser.add_argument("--test", type=int, default=0, help="test episodes of the best weights at the end")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument(
        "--plot", nargs="+", metavar="FILE", help="PNG to write, then JSON files to plot; nothing is trained"
    )
    args = parser.parse_args()
    if args.model != "tdmpc2:tiny":
        keep_freed_memory()
    if args.plot:
        plot(args.plot[0], args.plot[1:])
        return
    changes = {name: value(text) for name, _, text in (setting.partition("=") for setting in args.set)}
    runs = []
    for seed in args.seeds:
        done, configs = run(args, seed, changes)
        runs.append(done)
        report = {
            "benchmark": "learning",
            "model": args.model,
            "env": args.env,
            "num_envs": args.num_envs,
            "episodes": args.episodes,
            "target": args.target,
            **configs,
            "runs": runs,
            "summary": None if args.target is None else summary(runs, args.target),
            "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
            "versions": {"worldloom": worldloom.__version__, "jax": jax.__version__},
            "machine": {"cpus": len(os.sched_getaffinity(0)), "processor": platform.machine()},
        }
        if args.out:
            args.out.write_text(json.dumps(report) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
