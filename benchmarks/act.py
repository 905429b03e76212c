"""What does acting cost beside its computation, does anything compile after the first call, does memory grow?

    python benchmarks/act.py --model dreamerv3:tiny --model tdmpc2:tiny --memory-calls 100000

Times, by turns: ``jitted``, the family's policy in a ``jax.jit`` of its own, given weights, carry and observation and
waited for; ``policy``, ``model.policy()(obs)`` from observation to clipped action; ``act``, ``model.act(...)`` waited
for; ``act_jitted``, the same computation in a ``jax.jit`` of its own. ``ratio`` is a median over that of the jitted
computation that belongs to it, and ``ratio_in_rounds`` its smallest and largest value in any round. Prints JSON.
"""

import argparse
import gc
import json
import os
import time
from pathlib import Path

import jax
import numpy as np

import worldloom
from worldloom import create_world_model
from worldloom.models.base import merge


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="may be given several times", default=None)
    parser.add_argument("--obs-dim", type=int, default=24)
    parser.add_argument("--image", action="store_true", help="observations are 64×64×3 pixels")
    parser.add_argument("--action-dim", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=100, help="calls of each kind in a round")
    parser.add_argument("--steps", type=int, default=1_000, help="calls without a compilation")
    parser.add_argument("--memory-calls", type=int, default=100_000, help="0 measures no memory")
    args = parser.parse_args()
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    names = args.model or ["dreamerv3:tiny", "dreamerv3:size1m", "tdmpc2:tiny"]
    about = {
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": {"worldloom": worldloom.__version__, "jax": jax.__version__, "numpy": np.__version__},
        **vars(args),
    }
    print(json.dumps({**about, "results": {name: measure(name, args, compiled) for name in names}}, indent=2))


def measure(name, args, compiled):
    shape = (64, 64, 3) if args.image else (args.obs_dim,)
    further = {"latent_dim": 512} if args.image and name.startswith("tdmpc2") else {}
    model = create_world_model(name, obs_shape=shape, action_dim=args.action_dim, **further)
    calls, policy, obs = make_calls(model)
    seconds = {kind: np.zeros((args.rounds, args.calls)) for kind in calls}
    for call in calls.values():
        call(), call()
    gc.collect()
    for number in range(args.rounds):
        for kind, call in calls.items():
            for repeat in range(args.calls):
                start = time.perf_counter()
                call()
                seconds[kind][number, repeat] = time.perf_counter() - start
    result = {"weights": len(jax.tree.leaves(model.params)), **{k: milliseconds(s) for k, s in seconds.items()}}
    for kind, bare in (("policy", "jitted"), ("act", "act_jitted")):
        medians = np.median(seconds[kind], 1) / np.median(seconds[bare], 1)
        result[kind] |= {
            "ratio": np.median(seconds[kind]) / np.median(seconds[bare]),
            "ratio_in_rounds": [medians.min(), medians.max()],
        }

    compiled.clear()
    for step in range(args.steps):
        policy(obs)
        if step % 100 == 99:
            policy.reset()
    result["compilations"] = {"calls": args.steps, "count": len(compiled)}
    if args.memory_calls:
        result["memory"] = memory(policy, obs, args.memory_calls)
    return result


def make_calls(model):
    """Functions that act once and wait, by kind; the policy, and its observation."""
    algorithm, key, flags = model.algorithm, jax.random.key(0), np.zeros(1, bool)
    rng, shape = np.random.default_rng(0), model.config.obs_shape
    image = len(shape) == 3
    obs = rng.integers(0, 256, shape, np.uint8) if image else rng.normal(size=shape).astype(np.float32)
    policy, params, carried = model.policy(), model.params, {}

    @jax.jit
    def acting(params, key, carry, obs, is_first, number):
        inner = merge(type(model), model.config, params, model.dtype)
        key = jax.random.fold_in(key, number)
        return algorithm.evaluation_policy(inner, carry, obs, key, is_first=is_first)

    @jax.jit
    def act(params, carry, obs, key):
        return merge(type(model), model.config, params, model.dtype).act(carry, obs, key)

    for kind in ("jitted", "act", "act_jitted"):
        carried[kind] = jax.device_put(algorithm.initial_carry(model.config, 1), jax.devices()[0])

    def step(kind, function):
        def call():
            carried[kind], action = jax.block_until_ready(function(carried[kind]))
            return np.asarray(action)

        return call

    return (
        {
            "jitted": step("jitted", lambda carry: acting(params, key, carry, obs[None], flags, np.uint32(1))),
            "policy": lambda: policy(obs),
            "act_jitted": step("act_jitted", lambda carry: act(params, carry, obs[None], key)),
            "act": step("act", lambda carry: model.act(carry, obs[None], key)),
        },
        policy,
        obs,
    )


def milliseconds(seconds):
    p50, p99 = np.percentile(1e3 * seconds, [50, 99])
    return {"p50_ms": p50, "p99_ms": p99}


def memory(policy, obs, calls):
    """Resident memory of the process after each tenth of ``calls`` calls, in MiB, and the arrays that are alive."""
    resident, alive = [], []
    for _ in range(10):
        for _ in range(calls // 10):
            policy(obs)
        gc.collect()
        resident.append(resident_mib())
        alive.append(len(jax.live_arrays()))
    return {
        "calls": calls,
        "resident_mib": resident,
        "growth_after_first_tenth_mib": resident[-1] - resident[0],
        "live_arrays": [alive[0], alive[-1]],
    }


def resident_mib():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


if __name__ == "__main__":
    main()
