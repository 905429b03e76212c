"""One process of an online run of the toy model: ``python one_process.py SETTINGS``, where SETTINGS are JSON.

``id, count, port`` name the process, ``devices`` are its virtual devices, ``envs`` its environments. It trains
``steps`` updates over ``mesh``, saving in ``folder``, and writes its metrics, weights and replay to ``out``. With
``die_at`` it kills itself before that update, with ``stop_at`` it gets SIGTERM after it, with ``fail_at`` its
environments raise after so many steps.
"""

import json
import os
import signal
import sys
import warnings
from pathlib import Path

if __name__ == "__main__":
    SETTINGS = json.loads(sys.argv[1])
    devices = f"--xla_force_host_platform_device_count={SETTINGS['devices']}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    tests = Path(__file__).resolve().parents[1]
    sys.path += [str(tests / "training"), str(tests / "envs")]

import numpy as np
from online_worlds import Glide, every_row, flat, toy

from worldloom import distributed, sharding
from worldloom.envs import make_env
from worldloom.envs.across_processes import across_processes
from worldloom.training import Trainer, TrainingConfig
from worldloom.training.callbacks import CheckpointCallback


class Failing(Glide):
    """Raises after a number of steps."""

    steps = 0

    def step(self, action):
        Failing.steps += 1
        if Failing.steps > SETTINGS.get("fail_at", 10**9):
            raise RuntimeError("the simulator broke")
        return super().step(action)


def main():
    if SETTINGS["count"] > 1:
        distributed.initialize(f"localhost:{SETTINGS['port']}", SETTINGS["count"], SETTINGS["id"], timeout=20)
    if SETTINGS.get("divide_all"):
        sharding.SMALLEST_DIVIDED = 1
    rows = []

    def note(info):
        rows.append([info.step, dict(info.metrics)])

    env = across_processes(make_env(Failing, SETTINGS["envs"], seed=3))
    config = TrainingConfig(
        **{
            "batch_size": 8,
            "sequence_length": 3,
            "learning_rate": 1e-2,
            "device": "cpu",
            "prefill": 20,
            "train_ratio": 6,
        },
        **{"mesh": SETTINGS["mesh"], "save_interval": 5, "log_interval": 5, "total_steps": SETTINGS["steps"]},
    )
    callbacks = [(1, note), CheckpointCallback(SETTINGS["folder"], save_every=5)]
    trainer = Trainer(toy(env, latents=True), config, callbacks)
    update = trainer.run.update

    def interrupted(chunk):
        if chunk.step == SETTINGS.get("die_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if chunk.step == SETTINGS.get("stop_at"):
            os.kill(os.getpid(), signal.SIGTERM)
        return update(chunk)

    trainer.run.update = interrupted
    try:
        trainer.train(env, resume=SETTINGS.get("resume", False))
    finally:
        Path(f"{SETTINGS['out']}.json").write_text(json.dumps({"rows": rows, "step": trainer.step}))
    weights = {f"weights{name}": value for name, value in flat(trainer.model.params).items()}
    replay = {f"replay{name}": value for name, value in flat(every_row(trainer.replay)).items()}
    np.savez(SETTINGS["out"], **weights, **replay)


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()
