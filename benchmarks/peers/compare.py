"""Time our program and a reference program alternately, and print the ratio of each pair as JSON.

    python benchmarks/peers/compare.py tdmpc2-update --checkout DIR --peer-python DIR/bin/python
    python benchmarks/peers/compare.py dreamerv3-size1m-vector --checkout DIR --peer-python DIR/bin/python

``ratio`` is reference / ours: 2 means that ours takes half the time. On a CPU both sides keep freed memory in the
process (see ``worldloom.devices.keep_freed_memory``), which speeds up both; ``--returned`` turns this off on both
sides, ``--as-shipped`` on the reference's side only.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def dreamer(size, obs, batch_size, length):
    sizes = ["--obs", obs, "--batch-size", str(batch_size), "--length", str(length)]
    return (
        "dreamerv3_official.py",
        ["--size", size, *sizes],
        ["--model", f"dreamerv3:{size}", *sizes],
    )


TDMPC2 = ["--model", "tdmpc2:5m", "--batch-size", "256", "--length", "4"]
WORKS = {
    "tdmpc2-update": ("tdmpc2_official.py", ["--work", "update"], [*TDMPC2, "--work", "update"]),
    "tdmpc2-plan": ("tdmpc2_official.py", ["--work", "plan"], [*TDMPC2, "--work", "plan"]),
    "tdmpc2-update-port": ("tdmpc2_jax_port.py", ["--work", "update"], [*TDMPC2, "--work", "update"]),
    "tdmpc2-plan-port": ("tdmpc2_jax_port.py", ["--work", "plan"], [*TDMPC2, "--work", "plan"]),
    "dreamerv3-size1m-vector": dreamer("size1m", "vector", 16, 64),
    "dreamerv3-size12m-vector": dreamer("size12m", "vector", 16, 64),
    "dreamerv3-size1m-image": dreamer("size1m", "image", 16, 64),
    "dreamerv3-size12m-image": dreamer("size12m", "image", 8, 32),
}


class Side:
    """One of the two processes; it answers counts with seconds."""

    def __init__(self, command, *, kept):
        environment = variables(command[0]) | ({"KEEP_FREED_MEMORY": "1"} if kept else {})
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.about = self._answer()

    def seconds(self, calls):
        self.process.stdin.write(f"{calls}\n")
        self.process.stdin.flush()
        return self._answer()["seconds"] / calls

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def _answer(self):
        for line in self.process.stdout:
            if line.startswith("{"):  # programs print other lines while they start
                return json.loads(line)
        sys.exit(f"{self.process.args[1]} ended without an answer (exit code {self.process.wait()}).")


def variables(python):
    """Environment variables of a side that runs under ``python``: those of this process.

    ``PYTHONPATH`` is left out under another Python, whose packages it would hide. Ours keeps it: worldloom may be
    importable by it only.
    """
    # The path and not the file behind it, which virtual environments of one Python share.
    same = os.path.abspath(shutil.which(python) or python) == os.path.abspath(sys.executable)
    return {name: value for name, value in os.environ.items() if same or name != "PYTHONPATH"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--checkout", type=Path, required=True, help="checkout of the reference program")
    parser.add_argument("--peer-python", required=True, help="a Python that can run it")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--calls", type=int, default=3, help="calls per measurement")
    parser.add_argument("--compile", action="store_true", help="torch.compile, for TD-MPC2")
    parser.add_argument(
        "--precision",
        choices=["float32", "bfloat16"],
        default="float32",
        help="activations; of DreamerV3 on both sides",
    )
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument("--returned", action="store_true", help="return freed memory to the kernel, on both sides")
    memory.add_argument("--as-shipped", action="store_true", help="return it on the reference's side only")
    args = parser.parse_args()
    script, theirs, ours = WORKS[args.work]
    theirs = [*theirs, "--compile"] if args.compile else theirs
    ours = [*ours, "--precision", args.precision]
    if script == "dreamerv3_official.py":
        theirs = [*theirs, "--precision", args.precision]
    elif args.precision != "float32":
        parser.error(f"{args.work} is compared in float32 only, in which the reference program computes")
    peer = Side(
        [args.peer_python, str(HERE / script), "--checkout", str(args.checkout.resolve()), *theirs],
        kept=not (args.returned or args.as_shipped),
    )
    own = Side([sys.executable, str(HERE / "worldloom_work.py"), *ours], kept=not args.returned)
    pairs = [(peer.seconds(args.calls), own.seconds(args.calls)) for _ in range(args.pairs + 1)][1:]
    peer.close()
    own.close()
    ratios = sorted(reference / mine for reference, mine in pairs)
    print(
        json.dumps(
            {
                "work": args.work,
                "ratio": {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]},
                "reference_seconds": statistics.median(reference for reference, _ in pairs),
                "our_seconds": statistics.median(mine for _, mine in pairs),
                "pairs": args.pairs,
                "precision": args.precision,
                "freed_memory": "returned" if args.returned else "kept by ours" if args.as_shipped else "kept",
                "cpus": os.cpu_count(),
                "reference": peer.about,
                "ours": own.about,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
