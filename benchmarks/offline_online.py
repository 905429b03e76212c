"""Offline data, online learning, and both: returns at equal environment steps, by seed.

    python benchmarks/offline_online.py --seeds 0 1 2 --out runs/offline_online.json --plot runs/offline_online.png

The data are Pendulum episodes of an agent in training, which itself is left out. ``offline`` learns from them alone,
``online`` never sees them, ``both`` begins with them and mixes them into its batches. All evaluate the same episodes.
Prints JSON, which ``--out`` has after every seed.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from worldloom import create_world_model
from worldloom.envs import make_env
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer, TrainingConfig, offline_then_online, play, recipe

ENV, MODEL = "Pendulum-v1", "tdmpc2:tiny"


def record(seed: int, env_steps: int) -> ReplayBuffer:
    """Episodes of an agent that learns for ``env_steps`` steps."""
    with make_env(ENV, seed=10_000 + seed) as env:
        trainer = new_trainer(env, 10_000 + seed, env_steps=env_steps)
        trainer.train(env)
    data = ReplayBuffer()
    for episode in trainer.replay.episodes():
        if len(episode["rewards"]) > 3:
            data.add_episode(episode["obs"], episode["actions"], episode["rewards"], layout="arrival")
    return data


def new_trainer(env, seed: int, **fields) -> Trainer:
    model_fields, training, _ = recipe(MODEL, env)
    config = TrainingConfig(**{**training, "device": "cpu", "seed": seed, "eval_interval": 0, **fields})
    return Trainer(create_world_model(MODEL, seed=seed, device="cpu", **model_fields), config, [])


def returns(model, episodes: int) -> list[float]:
    with make_env(ENV, episodes, seed=77) as env:
        return [float(end.episode_return) for end in play(model, env, episodes=episodes, seed=77)]


def plot(target: Path, found: list[dict]) -> None:
    """Curves of mean returns: thin lines for seeds, thick ones for their mean; offline data alone as a level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    seeds = sorted({each["seed"] for each in found})
    for kind, color in (("online", "tab:blue"), ("both", "tab:green")):
        steps = sorted({each["env_steps"] for each in found if each["kind"] == kind})
        means = {(e["seed"], e["env_steps"]): np.mean(e["returns"]) for e in found if e["kind"] == kind}
        curves = np.array([[means[seed, step] for step in steps] for seed in seeds])
        axes.plot(steps, curves.T, color=color, alpha=0.35, linewidth=1)
        axes.plot(steps, curves.mean(0), color=color, linewidth=2, label=kind)
    offline = [np.mean(each["returns"]) for each in found if each["kind"] == "offline"]
    axes.axhline(np.mean(offline), color="tab:orange", linestyle="--", label="offline")
    axes.set_title(f"{MODEL} on {ENV}, {len(seeds)} seeds", fontsize=10)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("return, mean of 10 episodes")
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data-steps", type=int, default=3000)
    parser.add_argument("--offline-updates", type=int, default=3000)
    parser.add_argument("--env-steps", type=int, nargs="+", default=[800, 1200, 1600, 2000, 3000])
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/offline_online.json"))
    parser.add_argument("--plot", type=Path, help="PNG of the curves")
    args = parser.parse_args()
    found: list[dict] = []
    for seed in args.seeds:
        data = record(seed, args.data_steps)
        with make_env(ENV, seed=seed) as env:
            offline = new_trainer(env, seed, total_steps=args.offline_updates)
            offline.train(data)
            found.append(
                {"seed": seed, "kind": "offline", "env_steps": 0, "returns": returns(offline.model, args.episodes)}
            )
        for kind in ("online", "both"):
            with make_env(ENV, seed=seed) as env:
                fields = {"offline_updates": args.offline_updates if kind == "both" else 0, "prefill": 400}
                fields |= {"prefill_updates": 400, "prefill_policy": "initial" if kind == "both" else "auto"}
                trainer = new_trainer(env, seed, env_steps=args.env_steps[0], **fields)
                for steps in args.env_steps:
                    trainer.config = trainer.config.replace(env_steps=steps)
                    if kind == "both":
                        offline_then_online(trainer, data, env)
                    else:
                        trainer.train(env)
                    measured = returns(trainer.model, args.episodes)
                    found.append({"seed": seed, "kind": kind, "env_steps": steps, "returns": measured})
                    mean = round(float(np.mean(measured)), 1)
                    print(time.strftime("%H:%M:%S"), seed, kind, steps, mean, flush=True, file=sys.stderr)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1))
        if args.plot:
            plot(args.plot, found)
    for kind in ("offline", "online", "both"):
        for steps in sorted({each["env_steps"] for each in found if each["kind"] == kind}):
            means = [np.mean(e["returns"]) for e in found if (e["kind"], e["env_steps"]) == (kind, steps)]
            by_seed = np.round(means, 1).tolist()
            print(f"{kind:8} {steps:6} steps: {np.mean(means):8.1f}  by seed {by_seed}", file=sys.stderr)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
