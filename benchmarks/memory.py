"""How much memory does an update need, and what do ``microbatches`` and ``remat`` save, for how much time?

    python benchmarks/memory.py --model dreamerv3:size1m

Prints JSON. Every setting runs in its own process: ``peak_mb`` is the peak memory of the process (on a GPU: the device)
during the updates minus what it holds before the first one; ``temporary_mb`` is XLA's figure for one update. The peak
is a mark that never falls, except on Linux, where that of a process can be set back. Where compilation or the first
weights took more than the updates do, the mark stays, the updates' own peak is not known, and ``peak_mb`` is null.
"""

import argparse
import contextlib
import json
import resource
import subprocess
import sys
from pathlib import Path

from worldloom.devices import keep_freed_memory

SETTINGS = {
    "plain": {},
    "remat": {"remat": True},
    "2 parts": {"microbatches": 2},
    "4 parts": {"microbatches": 4},
    "8 parts": {"microbatches": 8},
    "4 parts, remat": {"microbatches": 4, "remat": True},
}


def memory_now():
    """Bytes in use now, and the most so far: of the device where it counts them, else of this process."""
    import jax

    held = jax.devices()[0].memory_stats()
    if held:
        return held["bytes_in_use"], held["peak_bytes_in_use"]
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return tuple(1024 * int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return most, most  # the system only tells the mark


def lower_the_mark():
    """Set the most that this process has held back to what it holds now, where Linux allows that; see ``proc(5)``."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def one(setting, name, obs, batch_size, length, repeats):
    from work import measure, update_call

    obs_shape = (64, 64, 3) if obs == "image" else (24,)
    sizes = {"batch_size": batch_size, "length": length, "training": SETTINGS[setting]}
    call, _, trace = update_call(name, obs_shape=obs_shape, action_dim=6, **sizes)
    program = trace().lower().compile()
    lower_the_mark()
    before, mark = memory_now()
    timing = measure(call, repeats=repeats)
    peak = memory_now()[1]
    return {
        "temporary_mb": round(program.memory_analysis().temp_size_in_bytes / 1e6, 1),
        "peak_mb": round((peak - before) / 1e6, 1) if peak > mark else None,
        "seconds": round(timing["median_seconds"], 3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dreamerv3:size1m")
    parser.add_argument("--obs", choices=["vector", "image"], default="vector")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--setting", choices=SETTINGS, help="run only this setting, in this process")
    parser.add_argument("--kept", action="store_true", help="keep freed memory in the process (CPU)")
    args = parser.parse_args()
    if args.kept:
        keep_freed_memory()
    work = (args.model, args.obs, args.batch_size, args.length, args.repeats)
    if args.setting:
        print(json.dumps(one(args.setting, *work)))
        return
    found = {}
    for setting in SETTINGS:
        command = [sys.executable, *sys.argv, "--setting", setting]
        found[setting] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(json.dumps({"benchmark": "memory", "work": work, "kept": args.kept, "settings": found}, indent=2))


if __name__ == "__main__":
    main()
