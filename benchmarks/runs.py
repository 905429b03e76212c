"""Small runs of both families, offline and online, for the fault benchmarks.

Every run uses evaluation, early stopping, a log and checkpoints. Replay is split into many small files, drops its
oldest rows during the run, and stores DreamerV3's latents, offline too.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from worldloom import create_world_model
from worldloom.envs import make_env
from worldloom.replay import ReplayBuffer, table
from worldloom.training import Trainer, TrainingConfig
from worldloom.training.callbacks import (
    CheckpointCallback,
    EarlyStoppingCallback,
    EvalCallback,
    LoggingCallback,
)
from worldloom.training.checkpoint_files import flatten_state

RUNS = ("tdmpc2-offline", "tdmpc2-online", "dreamerv3-offline", "dreamerv3-online")
"""In addition there is ``toy-online``, a toy family of the tests that compiles in a second, and ``toy-jax``, the same
in an environment in JAX, whose whole loop runs on the device."""

_MODELS = {
    "tdmpc2": {"latent_dim": 16, "hidden_dim": 16, "encoder_dim": 16, "num_q": 2, "num_bins": 21, "iterations": 1,
               "num_samples": 8, "num_elites": 4, "num_pi_trajs": 2, "horizon": 2},
    "dreamerv3": {"deter_dim": 16, "stoch_dim": 8, "num_categories": 4, "hidden_dim": 16, "mlp_layers": 1, "blocks": 2,
                  "reward_layers": 1, "continue_layers": 1, "imagination_horizon": 3, "bins": 21},
}  # fmt: skip
_ENVS = {"tdmpc2": "Pendulum-v1", "dreamerv3": "CartPole-v1", "toy": "MountainCarContinuous-v0"}


def small_run(name, folder, *, steps, save_every, keep_last=3, callbacks=(), device="cpu"):
    """A trainer and what it trains from; ``name`` is one of ``RUNS``, ``device`` one of ``TrainingConfig``."""
    table.BLOCK_BYTES = 1 << 10
    family, _, kind = name.partition("-")
    env = make_env(f"jax:{_ENVS[family]}" if kind == "jax" else _ENVS[family], num_envs=2, seed=5, time_limit=30)
    shapes = {"obs_shape": env.obs_shape, "action_dim": env.action_dim, "action_type": env.action_type}
    model = toy_model(shapes) if family == "toy" else real_model(family, shapes, device)
    config = TrainingConfig(
        total_steps=steps, batch_size=4, sequence_length=6, learning_rate=1e-3, prefill=60,
        log_interval=max(7, steps // 500), replay_capacity=200, updates_per_call=3, device=device, seed=11,
    )  # fmt: skip
    latents = model.algorithm.replay_spec(model.config, config).latents
    if kind in ("online", "jax"):
        source, held_out = env, env.another(2, seed=99)
    else:
        source, held_out = recorded(env, 8, latents), recorded(env, 2, {})
    callbacks = [
        *callbacks,
        EvalCallback(held_out, every=max(1, steps // 4), batches=2, episodes=2),
        EarlyStoppingCallback(patience=steps, min_delta=0.0),
        LoggingCallback(str(folder), log_to_console=False),
        CheckpointCallback(str(folder / "checkpoints"), save_every=save_every, keep_last=keep_last),
    ]
    return Trainer(model, config, callbacks), source


def real_model(family, shapes, device):
    overrides = _MODELS[family] | ({"episode_length": 30} if family == "tdmpc2" else {})
    return create_world_model(f"{family}:tiny", **shapes, **overrides, precision="float32", device=device, seed=1)


def toy_model(shapes):
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "training"))
    from toy_family import ToyConfig, ToyWorldModel

    return ToyWorldModel(ToyConfig(**shapes, latents=True))


def recorded(env, episodes, latents):
    """Episodes of random actions with at least eight steps."""
    buffer, rng, number = ReplayBuffer(10_000, latents=latents), np.random.default_rng(3), 0
    while buffer.num_episodes < episodes:
        with env.another(1, seed=100 + number) as world:
            arrivals, actions, number = [world.reset()], [], number + 1
            while not arrivals[-1].is_last[0]:
                actions.append(world.sample_actions(rng))
                arrivals.append(world.step(actions[-1]))
        if len(actions) >= 8:
            buffer.add_episode(
                np.concatenate([time_step.obs for time_step in arrivals]),
                np.concatenate(actions),
                np.concatenate([time_step.reward for time_step in arrivals[1:]]),
                terminated=bool(arrivals[-1].is_terminal[0]),
                truncated=not arrivals[-1].is_terminal[0],
            )
    return buffer


def fingerprint(trainer, source, folder):
    """Digests of the final state of a run; equal if and only if the states are equal bit for bit."""
    digests = {}
    for part in ("params", "opt_state", "key", "step"):
        digest = hashlib.sha256()
        for name, array in sorted(flatten_state(trainer.state).items()):
            if name.split("/")[0] == part:
                array = np.asarray(array)
                digest.update(f"{name} {array.shape} {array.dtype}".encode() + array.tobytes())
        digests[part] = digest.hexdigest()
    path = (trainer.replay if trainer.replay is not None else source).save(Path(folder) / "replay.npz")
    digests["replay"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.unlink()
    log = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    digests["metrics"] = hashlib.sha256("\n".join(map(_timeless, log)).encode()).hexdigest()
    return digests


def _timeless(line):
    """A log record without the entries that differ between any two runs."""
    return json.dumps({key: value for key, value in json.loads(line).items() if key != "time" and "fps" not in key})
