"""Everything that is measured on a GPU, with one command that goes on where the last one stopped.

    python benchmarks/accelerator.py --out DIR [--peers DIR] [--part NAME …] [--minutes 9]
    python benchmarks/accelerator.py --out DIR --first --minutes 11
    python benchmarks/accelerator.py --out DIR --only 'speed/plan tdmpc2:5m *' 'exact/golden *'

Parts: ``exact`` (recorded values of the reference programs, repeatability, resume), ``speed`` (updates, plans,
imagination, acting, replay, memory, kernels), ``flags`` (XLA's settings for GPUs), ``peers`` (the reference programs on
the same card) and ``learn`` (published experiments and small ones). Each figure is written to ``DIR/<part>.json`` when
it exists, and ``DIR/status.json`` lists what is done, left and failed. What is done is not measured again, whether the
program was killed or its ``--minutes`` were over. ``--smoke`` does everything in tiny sizes, on a CPU too; such figures
mean nothing.
"""

import argparse
import contextlib
import difflib
import fnmatch
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import accelerator_exact
import accelerator_flags
import accelerator_learn
import accelerator_peers
import accelerator_speed
import accelerator_wheels
from accelerator_store import Store
from accelerator_tasks import LeftOut, Place, Unfinished
from accelerator_worker import Clock, Failed, OutOfTime, Worker

PARTS = {
    "exact": lambda args: accelerator_exact.tasks(args.smoke),
    "speed": lambda args: accelerator_speed.tasks(args.smoke),
    "flags": lambda args: accelerator_flags.tasks(args.smoke),
    "peers": lambda args: accelerator_peers.tasks(args.smoke, args.peers),
    "learn": lambda args: accelerator_learn.tasks(args.smoke),
}
FIRST = (
    "exact/golden tdmpc2-single",
    "exact/golden dreamerv3-vector-discrete",
    "speed/large products",
    "speed/update tdmpc2:5m vector",
    "speed/update dreamerv3:size12m vector",
    "speed/plan tdmpc2:5m 1",
    "speed/plan tdmpc2:5m 16",
    "speed/profile tdmpc2:5m",
    "speed/profile dreamerv3:size12m",
)
"""What ``--first`` measures: one figure of each kind, for a card that is there for a quarter of an hour."""
SMOKE_SECONDS = 20
"""Of any measurement of a smoke run, instead of what it takes on a card."""


class NoDevice(Exception):
    """No process can use the device, so nothing can be measured; the text says why."""


class Workers:
    """The worker in use; there is one at a time, because each takes most of the memory of a card."""

    def __init__(self, env, clock, logs):
        self.env, self.clock = env, clock
        self._log, self._worker = logs / "worker.txt", None

    def of(self, env=None):
        """The worker with these variables in addition to the usual ones; XLA's flags are added to theirs."""
        merged = self.env | (env or {})
        if "XLA_FLAGS" in (env or {}):
            merged["XLA_FLAGS"] = f"{self.env['XLA_FLAGS']} {env['XLA_FLAGS']}".strip()
        if self._worker is None or self._worker.env != merged:
            self.close()
            try:
                self._worker = Worker(merged, self._log)
            except Failed as error:
                # With variables of its own, one measurement fails; without, every one would.
                raise error if env else NoDevice(str(error)) from None
        return self._worker

    def ask_alone(self, call, arguments, env, most):
        """The figure of a new worker that ends with it."""
        self.close()
        try:
            return self.of(env).ask(call, arguments, self.clock, most)
        finally:
            self.kill()

    def close(self):
        if self._worker:
            self._worker.close()
        self._worker = None

    def kill(self):
        if self._worker:
            self._worker.kill()
        self._worker = None


def variables(folder, smoke):
    """Environment variables of every process: one compilation cache, no progress bars, this checkout of worldloom."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        "TQDM_DISABLE": "1",
        "XLA_FLAGS": f"{flags} {quick_flags()}".strip() if smoke else flags,
    }


def quick_flags():
    """XLA flags of smoke runs, which spend all their time compiling; those of the tests."""
    flags = "--xla_backend_optimization_level=0"
    # XLA ends the process at flags that it does not know, so only versions that were tried get this one.
    known = importlib.metadata.version("jaxlib").startswith("0.10.")
    return f"{flags} --xla_cpu_use_fusion_emitters=false" if known else flags


def revision():
    """Commit of this checkout, with ``+changes`` if files are modified; None in a copy of the files alone."""

    def git(*words):
        return subprocess.run(["git", "-C", HERE, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def select(planned, patterns):
    """The measurements whose ``part/name`` matches a pattern, those of the first pattern first.

    Raises ``ValueError`` with near names for a pattern that matches none.
    """
    named = {f"{part}/{task.name}": (part, task) for part, task in planned}
    chosen = {}
    for pattern in patterns:
        found = fnmatch.filter(named, pattern)
        if not found:
            near = fnmatch.filter(named, f"*{pattern}*") or difflib.get_close_matches(pattern, named, cutoff=0.4)
            raise ValueError(
                f"{pattern!r} is none of the {len(named)} measurements that --list shows; a name is "
                f"part/measurement, * stands for anything. Near it: {', '.join(near[:4]) or 'none'}."
            )
        chosen |= {name: named[name] for name in found}
    return list(chosen.values())


def measure(task, part, store, workers, args, most):
    """The figure of a task."""
    if isinstance(task.call, str):
        if task.alone:
            return workers.ask_alone(task.call, task.arguments, task.env, most)
        return workers.of().ask(task.call, task.arguments, workers.clock, most)
    workers.close()
    ask = lambda call, arguments, env: workers.ask_alone(call, arguments, env, most)  # noqa: E731
    before = store.part(part).get(task.name, {})
    return task.call(Place(store.folder, args.smoke, workers.clock, most, workers.env, before, ask))


def run(planned, store, workers, args):
    """Measure what is left, as long as there is time; returns what was left out, with reasons."""
    names, left_out = [(part, task.name) for part, task in planned], {}
    store.write_status(names, left_out)
    for part, task in planned:
        entry, name = store.part(part).get(task.name, {}), f"{part}/{task.name}"
        needed = SMOKE_SECONDS if args.smoke else task.seconds
        if "figure" in entry or ("error" in entry and not args.again) or workers.clock.left() < needed:
            continue
        start = time.monotonic()
        most = workers.clock.left() if task.resumes else max(3 * needed, 300 if args.smoke else 60)
        result = {}
        try:
            result = {"figure": measure(task, part, store, workers, args, most)}
            said = "done"
        except LeftOut as reason:
            left_out[name], said = str(reason), f"left out: {reason}"
        except Unfinished as error:
            result, said = {"progress": error.progress}, str(error)
        except OutOfTime as error:
            workers.kill()
            said = f"left: {error}"
        except NoDevice:
            raise
        except Exception as error:
            # A worker that has run out of memory, or is still at work, is no place for the next measurement.
            workers.kill()
            text = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
            result, said = {"error": text}, f"failed: {text}"
        seconds = time.monotonic() - start
        if result:
            try:
                store.write(part, task.name, seconds, **result)
            except ValueError as error:  # a number that is none
                said = f"failed: {error} in {result}"
                store.write(part, task.name, seconds, error=said)
        print(f"{name}: {said.splitlines()[0][:200]} ({seconds:.0f} s)", flush=True)
        store.write_status(names, left_out)
    return left_out


def report(status, planned, minutes):
    """What is left, in a few sentences."""
    done, failed, left = len(status["done"]), len(status["failed"]), status["left"]
    out = status["left out"]
    left = [name for name in left if name not in out]
    print(f"{done} done, {failed} failed, {len(left)} left, {len(out)} left out.")
    if out:
        print(*(f"Left out: {name}: {reason}" for name, reason in out.items()), sep="\n")
    if left:
        print(f"Left: {', '.join(left)}. The same command goes on there.")
        long = [task.name for part, task in planned if f"{part}/{task.name}" in left and task.seconds > 60 * minutes]
        if long:
            print(f"More than --minutes {minutes:g} are needed for: {', '.join(long)}.")
    if failed:
        print(f"Failed: {', '.join(status['failed'])}; see the errors in status.json. --again tries them once more.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the figures and runs")
    parser.add_argument("--peers", type=Path, metavar="DIR", help=accelerator_peers.__doc__.partition("\n\n")[2])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", metavar="PATTERN", help="measurements by part/name; * stands for anything")
    which.add_argument("--first", action="store_true", help="a few of each kind, in an order for a first short visit")
    parser.add_argument("--minutes", type=float, default=9, help="no measurement is started that would take longer")
    parser.add_argument("--smoke", action="store_true", help="everything in tiny sizes; the figures mean nothing")
    parser.add_argument("--again", action="store_true", help="also repeat measurements that failed")
    parser.add_argument("--revision", help="commit to write beside the figures; needed where the files are a copy")
    parser.add_argument("--list-wheels", action="store_true", help="print what to carry to a machine without a network")
    parser.add_argument("--have", type=Path, metavar="FILE", help="pip list --format=freeze of that machine: list less")
    parser.add_argument("--have-python", metavar="X.Y", help="version of its Python, if it is another than this one's")
    parser.add_argument("--list", action="store_true", help="print the measurements and their seconds on a card")
    args = parser.parse_args()
    planned = [(part, task) for part in args.part for task in PARTS[part](args)]
    if args.only or args.first:
        names = {f"{part}/{task.name}" for part, task in planned}
        # Some of the first are not in the parts that were asked for, or have no tiny size.
        patterns = args.only or [name for name in FIRST if name in names]
        try:
            planned = select(planned, patterns)
        except ValueError as error:
            parser.error(str(error))
        if not planned:
            parser.error(f"--first has no measurement of the parts {', '.join(args.part)}; it has {', '.join(FIRST)}.")
    if args.list_wheels:
        have = args.have and accelerator_wheels.versions_in(args.have.read_text(encoding="utf-8"))
        if args.have and not have:
            parser.error(f"{args.have} has no line name==version, which pip list --format=freeze prints.")
        print(*accelerator_wheels.lines(have, args.have_python), sep="\n")
        return
    if args.list:
        print(*(f"{task.seconds:4.0f} s  {part}/{task.name}" for part, task in planned), sep="\n")
        seconds = sum(task.seconds for _, task in planned)
        print(f"{seconds:4.0f} s  in all, {seconds / 60:.0f} minutes")
        return
    if args.out is None:
        parser.error("--out DIR is needed: the folder of the figures, which may exist already")
    commit = args.revision or revision()
    if commit is None:
        print("The figures will be without a commit: this is no checkout, and there is no --revision.", file=sys.stderr)
    clock, folder = Clock(args.minutes), args.out.absolute()
    with tempfile.TemporaryDirectory() as logs:
        workers = Workers(variables(folder, args.smoke), clock, Path(logs))
        try:
            about = workers.of().about
            if about["platform"] == "cpu" and not args.smoke:
                print(
                    f"JAX {about['jax']} finds no accelerator on this machine, so there is nothing to measure; "
                    "--smoke tries everything in tiny sizes on the CPU.", file=sys.stderr,
                )  # fmt: skip
                raise SystemExit(2)
            with contextlib.closing(Store(folder)) as store:
                store.open_for(about | {"smoke": args.smoke, "revision": commit})
                run(planned, store, workers, args)
        except (NoDevice, OutOfTime) as error:
            raise SystemExit(f"No process could be started on this device: {error}") from None
        finally:
            workers.kill()
    report(store.status, planned, args.minutes)


if __name__ == "__main__":
    main()
