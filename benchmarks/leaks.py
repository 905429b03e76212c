"""What does a process keep of what it has closed? Prints JSON; ``python benchmarks/leaks.py``.

Trainers, models and environments are made, used and closed many times in one process. After a warm-up of a third,
allocated memory may grow by 1 %, and threads, open files, child processes and arrays not at all; exit code 1 if not.
Python's own objects count too: the script starts itself again with ``PYTHONMALLOC=malloc``. Reported besides: the
programs compiled, and the growth of resident memory, which also holds the free parts of pages that the allocator cannot
give back; those vary by a tenth, up or down, with the threads that happened to allocate. Without glibc's count,
resident memory is judged.

TensorStore 0.1.72 to 0.1.86 keeps four strings at each ``KvStore.Spec.to_json``; ``tensorstore_bytes`` is what one call
keeps here, measured alone. Orbax calls it for each array that it saves; ``worldloom.training.orbax_access`` keeps it to
one call for each checkpoint.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "training"))

MEMORY = ("allocated_mb", "resident_mb")
"""The first of these that is known is judged."""

LOOK_EVERY = 20


class Allocations(ctypes.Structure):
    """``struct mallinfo2`` of glibc 2.33."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def allocated():
    """Megabytes that are allocated and not freed, in all arenas and in mappings of their own; None if nobody counts."""
    try:
        mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        return None
    mallinfo.restype = Allocations
    found = mallinfo()
    return round((found.uordblks + found.hblkhd) / 2**20, 2)


def counts():
    """What the process holds now."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text().split()[1]) if statm.exists() else None
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    return {
        "allocated_mb": allocated(),
        "resident_mb": round(pages * resource.getpagesize() / 2**20, 2) if pages else None,
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None,
        "children": len(children.read_text().split()) if children.exists() else None,
        "arrays": len(jax.live_arrays()),
    }


def trainer(number):
    """A run of a toy model with log, events, checkpoints and evaluation, in a folder of its own."""
    from toy_family import ToyConfig, ToyWorldModel, fill

    from worldloom.replay import ReplayBuffer
    from worldloom.training import RunFolder, Trainer, TrainingConfig

    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder) / f"run [{number}]")
        config = TrainingConfig(
            total_steps=6, batch_size=4, sequence_length=5, log_interval=2, save_interval=3, device="cpu", seed=number
        )
        model = ToyWorldModel(ToyConfig(latents=True), seed=number)
        trainer = Trainer(model, config, run.callbacks(progress=False))
        trainer.train(fill(ReplayBuffer(500, latents={"memory": (1,)}), seed=number))


def model(number):
    """A new model of one of both families, which acts once."""
    import numpy as np

    from worldloom import create_world_model

    small = {"latent_dim": 16, "hidden_dim": 16, "encoder_dim": 16, "num_q": 2, "num_bins": 21, "iterations": 1}
    small |= {"num_samples": 8, "num_elites": 4, "num_pi_trajs": 2, "horizon": 2}
    small_dreamer = {
        "deter_dim": 16,
        "stoch_dim": 8,
        "num_categories": 4,
        "hidden_dim": 16,
        "mlp_layers": 1,
        "blocks": 2,
    }
    name, changes = ("tdmpc2:tiny", small) if number % 2 else ("dreamerv3:tiny", small_dreamer)
    made = create_world_model(name, obs_shape=(3,), action_dim=2, seed=number, device="cpu", **changes)
    made.act(None, np.zeros((1, 3), np.float32), None)


def environment(number):
    """Environments in this process or in workers, which are stepped once."""
    import numpy as np

    from worldloom.envs import make_env

    options = {"num_envs": 2, "parallel": "subprocess"} if number % 10 == 0 else {"num_envs": 3}
    with make_env("CartPole-v1", seed=number, **options) as env:
        env.reset()
        env.step(env.sample_actions(np.random.default_rng(number)))


def measure(make, count):
    """Make and close ``count`` of them; figures after the warm-up and at the end."""
    warm_up = max(count // 3, 1)
    start = time.perf_counter()
    for number in range(count):
        make(number)
        # Looked at often, so that both figures are taken in the same state: the first look frees up to 4 MB more.
        if number % LOOK_EVERY == 0:
            counts()
        if number == warm_up - 1:
            before = counts()
    after = counts()
    grown = {name: after[name] - value for name, value in before.items() if value is not None}
    percent = {name: round(100 * grown[name] / before[name], 2) for name in MEMORY if name in grown}
    kept = {name: value for name, value in grown.items() if value > 0 and name not in MEMORY}
    return {
        "count": count,
        "after_warm_up": before,
        "at_the_end": after,
        "percent": percent,
        "kept": kept,
        "seconds": round(time.perf_counter() - start, 1),
        "right": next(iter(percent.values()), 0) < 1 and not kept,
    }


def tensorstore_bytes(calls=20_000):
    """Bytes that TensorStore keeps at each call of ``to_json``; None if nobody counts."""
    import tensorstore

    spec = tensorstore.KvStore.Spec({"driver": "file", "path": tempfile.gettempdir() + "/run [100]/checkpoints/100/"})
    before = allocated()
    for _ in range(calls):
        spec.to_json()
    return None if before is None else round((allocated() - before) * 2**20 / calls)


def main():
    if os.environ.get("PYTHONMALLOC") != "malloc" and allocated() is not None:
        # Python's allocator of small objects takes its memory from the system directly, where glibc does not count it.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONMALLOC": "malloc"})
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trainers", type=int, default=300)
    parser.add_argument("--models", type=int, default=2000)
    parser.add_argument("--environments", type=int, default=500)
    options = parser.parse_args()
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    counts()  # starts JAX, which stays
    report = {}
    for name, make in (("environments", environment), ("models", model), ("trainers", trainer)):
        count = getattr(options, name)
        if count:
            third = len(compiled)
            report[name] = measure(make, count) | {"programs_compiled": len(compiled) - third}
    right = all(entry["right"] for entry in report.values())
    report |= {"tensorstore_bytes": tensorstore_bytes(), "right": right}
    print(json.dumps(report, indent=1))
    raise SystemExit(0 if right else 1)


if __name__ == "__main__":
    main()
