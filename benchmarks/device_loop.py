"""The whole loop on the device against ``Trainer`` on the host path, in the same environments; prints JSON.

``python benchmarks/device_loop.py`` compares, in turns so that other load meets both alike: updates per second of
``tdmpc2:tiny`` at one update per step, random collecting in many environments, acting with DreamerV3's policy,
evaluating 1,000 episodes, and the time of an update per seed with 8 seeds in one program. Compilation is left out.

``ratio`` is against the host loop in the same JAX environments, ``gymnasium_ratio`` against the host loop in the
environments of that name in Gymnasium: as many in one process for collecting, and the usual 10 for an evaluation. An
evaluation on the device has an environment for every episode, all of which are stepped until the longest episode is
over; ``tenth_ratio`` is that with a tenth as many environments, which play ten episodes each.

Figures are ratios of CPU time of the process where the device is a CPU (``--wall`` for wall-clock time instead).
"""

import argparse
import functools
import json
import statistics
import time

import jax

from worldloom import create_world_model
from worldloom.envs import make_env
from worldloom.training import Trainer, TrainingConfig, collect, recipe
from worldloom.training import evaluation as evaluation_module
from worldloom.training.callbacks.runner import CallbackRunner
from worldloom.training.evaluation import play
from worldloom.training.interrupts import Interrupts
from worldloom.training.on_device.fit import Device, fit_members
from worldloom.training.run_state import Run

ONE_UPDATE_A_STEP = {"train_ratio": 0.0, "prefill_updates": 0, "log_interval": 10_000}


class Clock:
    """CPU time of this process, or wall-clock time."""

    def __init__(self, wall):
        self.now = time.perf_counter if wall else time.process_time

    def of(self, function, *arguments):
        start = self.now()
        function(*arguments)
        return self.now() - start


def model_in(name, env, seed=0, **changes):
    model, training, _ = recipe(name, env, changes)
    config = TrainingConfig(**{**training, **changes, "device": "auto"})
    return create_world_model(name, **model, seed=seed, device="auto"), config


def paired(clock, rounds, one, other):
    """Median of the other's time over the one's, and both medians, after two warm-ups of each.

    The first compiles. A trainer whose loop is on the device compiled its program once more in its second call of
    ``train``, and no timed round may hold that.
    """
    for _ in range(2):
        one(), other()
    times = [(clock.of(one), clock.of(other)) for _ in range(rounds)]
    ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    return statistics.median(b / a for a, b in times), ours, theirs


def training(clock, options):
    """Updates at one update per step: a trainer on either loop, continued for ``updates`` more."""
    trainers = {}
    for loop in ("device", "host"):
        env = make_env("jax:Pendulum-v1", seed=0)
        model, config = model_in("tdmpc2:tiny", env, loop=loop, prefill=300, **ONE_UPDATE_A_STEP)
        trainers[loop] = Trainer(model, config, callbacks=[]), env

    def go_on(loop):
        trainer, env = trainers[loop]
        trainer.train(env, total_steps=trainer.step + options.updates)

    ratio, ours, theirs = paired(clock, options.rounds, lambda: go_on("device"), lambda: go_on("host"))
    ours, theirs = (1e3 * each / options.updates for each in (ours, theirs))
    return {"ratio": ratio, "device_ms_per_update": ours, "host_ms_per_update": theirs}


def collecting(clock, options, name, num_envs, steps, capacity):
    """Decision steps of the prefill: random ones, or the policy's; replay of ``capacity`` rows."""

    env = make_env("jax:CartPole-v1" if name.startswith("dreamer") else "jax:Pendulum-v1", num_envs, seed=0)
    model, config = model_in(name, env, prefill=10**9, replay_capacity=capacity)
    run = Run(model, config)
    run.use_env(env)
    run.begin(1)
    device = Device([run], 1, members=False)

    def on_device():
        device.collect_until_due(due=[run.collector.decisions + num_envs * steps])

    host_steps = max(4, steps // options.shorter)

    def on_host(other):
        return lambda: collect(model, other, num_envs * host_steps, config=config)

    found = {}
    for prefix, spec in (("", env.settings["spec"]), ("gymnasium_", env.settings["spec"].removeprefix("jax:"))):
        other = make_env(spec, num_envs, seed=0)
        ratio, ours, theirs = paired(clock, options.rounds, on_device, on_host(other))
        found |= {f"{prefix}ratio": ratio * steps / host_steps, "device_steps_per_s": num_envs * steps / ours}
        found[f"{prefix or 'host_'}steps_per_s"] = num_envs * host_steps / theirs
    return found


def evaluating(clock, options):
    """1,000 episodes: in as many environments on the device or a tenth of it, in 10 environments on the host."""
    envs = [make_env("jax:CartPole-v1", max(1, options.episodes // each), seed=0) for each in (1, 10)]
    model, _ = model_in("dreamerv3:tiny", envs[0])
    on_device = evaluation_module.is_on_device

    def on_host(env):
        evaluation_module.is_on_device = lambda env: False
        try:
            play(model, env, episodes=options.episodes // options.shorter)
        finally:
            evaluation_module.is_on_device = on_device

    found = {}
    for prefix, env, spec in (
        ("", envs[0], "jax:CartPole-v1"),
        ("tenth_", envs[1], "jax:CartPole-v1"),
        ("gymnasium_", envs[0], "CartPole-v1"),
    ):
        ours = functools.partial(play, model, env, episodes=options.episodes)
        theirs = functools.partial(on_host, make_env(spec, 10, seed=0))
        ratio, device, host = paired(clock, options.rounds, ours, theirs)
        found[f"{prefix}ratio"] = ratio * options.shorter
        found |= {f"{prefix}device_s": device, f"{prefix}host_s": host * options.shorter}
    return found


def seeds(clock, options):
    """Time of an update per seed: 8 seeds in one program against one seed."""

    def fit(count):
        runs, runners = [], []
        for seed in range(count):
            env = make_env("jax:Pendulum-v1", seed=seed)
            model, config = model_in("tdmpc2:tiny", env, seed, prefill=100, **ONE_UPDATE_A_STEP)
            runs.append(Run(model, config.replace(seed=seed)))
            runs[-1].use_env(env)
            runners.append(CallbackRunner([]))
            runners[-1].start(config, runs[-1].new_metrics())

        def go_on():
            fit_members(runs, runs[0].step + options.updates, runners, Interrupts(), members=count > 1)

        return go_on

    ratio, one, many = paired(clock, options.rounds, fit(1), fit(8))
    one, many = (1e3 * each / options.updates for each in (one, many))
    return {"update_per_seed": ratio / 8, "one_ms": one, "eight_ms": many}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--shorter", type=int, default=20, help="the host does so much less of what it is slow at")
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--only", default="training,random,policy,evaluation,seeds")
    options = parser.parse_args()
    clock = Clock(options.wall or jax.default_backend() != "cpu")
    parts = {
        "training": lambda: training(clock, options),
        "random": lambda: collecting(clock, options, "tdmpc2:tiny", 256, 1000, 2**22),
        "policy": lambda: collecting(clock, options, "dreamerv3:tiny", 16, 200, 100_000),
        "evaluation": lambda: evaluating(clock, options),
        "seeds": lambda: seeds(clock, options),
    }
    found = {name: parts[name]() for name in options.only.split(",")}
    device = jax.devices()[0]
    print(json.dumps({"device": device.device_kind, "jax": jax.__version__, **found}, indent=1))


if __name__ == "__main__":
    main()
