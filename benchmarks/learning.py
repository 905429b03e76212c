"""Does an agent learn, and how fast? One run of one seed; prints JSON with its learning curve.

    python benchmarks/learning.py --model tdmpc2:tiny --env CartPole-v1 --steps 20000 --seed 0

Collects a decision step, does an update (one in ``--update-every`` decision steps), and evaluates every
``--eval-every`` steps on environments of their own. The curve is the mean return of the evaluation episodes.
"""

import argparse
import json
import os
import sys
import time

import jax
import numpy as np

from worldloom import create_world_model
from worldloom.envs import EpisodeEnd, make_env
from worldloom.replay import ReplayBuffer
from worldloom.training import TrainingConfig


def evaluate(act, state, carry, env, key):
    """Mean and standard deviation of the return without exploration: the first episode of every environment.

    Short episodes do not count more for ending early, as the first so many of all environments would.
    """
    rows, returns = env.reset(), {}
    while len(returns) < len(rows.is_first):
        key, step_key = jax.random.split(key)
        carry, actions = act(state, carry, rows.obs, step_key, is_first=rows.is_first)
        rows = env.step(np.asarray(actions))
        for event in rows.events:
            if isinstance(event, EpisodeEnd):
                returns.setdefault(event.env, event.episode_return)
    values = list(returns.values())
    return float(np.mean(values)), float(np.std(values))


def run(args):
    env = make_env(args.env, seed=args.seed)
    eval_env = env.another(args.eval_episodes, args.seed + 10_000)
    overrides = json.loads(args.config)
    model = create_world_model(
        args.model, obs_shape=env.obs_shape, action_dim=env.action_dim, action_type=env.action_type, seed=args.seed,
        **overrides,
    )  # fmt: skip
    algorithm = model.algorithm
    training = TrainingConfig(
        batch_size=args.batch_size, sequence_length=args.length, learning_rate=args.learning_rate, grad_clip=20.0
    )
    window = algorithm.window(model.config, training)
    buffer = ReplayBuffer(max(args.steps + 1000, 10_000))
    root = jax.random.key(args.seed)
    state = algorithm.init_state(model, training, root)
    update = jax.jit(algorithm.update, donate_argnums=0)
    explore = jax.jit(algorithm.act)
    quiet = {"explore": False} if args.model.startswith("tdmpc2") else {}
    exploit = jax.jit(lambda *arguments, **named: algorithm.act(*arguments, **named, **quiet))
    rng = np.random.default_rng(args.seed)
    eval_carry = algorithm.initial_carry(model.config, args.eval_episodes)

    rows, carry, updates, curve, start = env.reset(), None, 0, [], time.perf_counter()
    for step in range(args.steps + 1):
        if step % args.eval_every == 0 and step:
            mean, spread = evaluate(exploit, state, eval_carry, eval_env, jax.random.fold_in(root, 2**30 + step))
            curve.append({"steps": step, "return": mean, "std": spread, "seconds": time.perf_counter() - start})
            print(json.dumps(curve[-1]), flush=True, file=sys.stderr)
            if mean >= args.stop_at:
                break
        if step < args.prefill:
            actions = env.sample_actions(rng)
        else:
            carry, actions = explore(
                state, carry, rows.obs, jax.random.fold_in(root, 2**29 + step), is_first=rows.is_first
            )
            actions = np.asarray(actions)
        buffer.add_rows(rows.obs, actions, rows.reward, rows.is_first, rows.is_last, rows.is_terminal)
        rows = env.step(actions)
        due = args.prefill if step == args.prefill else step > args.prefill and step % args.update_every == 0
        for _ in range(int(due)):
            batch = buffer.sample(
                args.batch_size, window.rows, seed=args.seed, update=updates, cross_episodes=window.cross_episodes
            )
            batch.pop("row_ids")
            state, _ = update(state, batch, jax.random.fold_in(root, updates))
            updates += 1
    env.close()
    eval_env.close()
    return {
        "curve": curve,
        "updates": updates,
        "seconds": time.perf_counter() - start,
        "cpus": os.cpu_count(),
        **vars(args),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tdmpc2:tiny")
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prefill", type=int, default=1_000, help="random steps first, then as many updates at once")
    parser.add_argument("--update-every", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--length", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--eval-every", type=int, default=1_000)
    parser.add_argument("--eval-episodes", type=int, default=10)
    parser.add_argument("--stop-at", type=float, default=float("inf"), help="end when an evaluation reaches this")
    parser.add_argument("--config", default="{}", help="config fields as JSON")
    print(json.dumps(run(parser.parse_args())))


if __name__ == "__main__":
    main()
