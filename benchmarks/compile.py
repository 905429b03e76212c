"""How long until the first update is done, with an empty and with a filled compilation cache?

    python benchmarks/compile.py --model dreamerv3:size1m

Starts new processes that import, build the model and do one update (DreamerV3 16×64, TD-MPC2 256 sequences) with freed
memory kept, first with an empty compilation cache and then with that of the first process. Prints the seconds of each
stage as JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def first_update(name, folder, kept):
    """Code of the new process; prints the seconds since its start after each stage."""
    start = time.perf_counter()
    import jax
    from work import update_call

    from worldloom.devices import keep_compiled_programs, keep_freed_memory

    if kept:
        keep_freed_memory()
    keep_compiled_programs(folder)
    parts = {"imports": time.perf_counter() - start}
    windows = {"batch_size": 256, "length": 4} if name.startswith("tdmpc2") else {"batch_size": 16, "length": 64}
    call, *_ = update_call(name, obs_shape=(24,), action_dim=6, precision="float32", **windows)
    parts["model, state, tracing"] = time.perf_counter() - start - sum(parts.values())
    call()
    parts["compilation and the first update"] = time.perf_counter() - start - sum(parts.values())
    print(json.dumps({"seconds": sum(parts.values()), "parts": parts, "jax": jax.__version__}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dreamerv3:size1m")
    parser.add_argument("--repeats", type=int, default=2, help="starts with a filled compilation cache")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--returned", action="store_true", help="let the C library return freed memory to the kernel")
    args = parser.parse_args()
    if args.folder:
        first_update(args.model, args.folder, not args.returned)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--model", args.model, "--folder", folder]
        command += ["--returned"] * args.returned
        environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}

        def start():
            output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            return json.loads(output.splitlines()[-1])

        cold = start()
        warm = [start() for _ in range(args.repeats)]
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    report = {
        "model": args.model,
        "cold": cold,
        "warm": warm,
        "mib_on_disk": round(size / 2**20, 1),
        "freed_memory": "returned" if args.returned else "kept",
        "cpus": os.cpu_count(),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
