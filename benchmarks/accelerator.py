"""Everything that is measured on a GPU, with one command that goes on where the last one stopped.

    python benchmarks/accelerator.py --out DIR [--peers DIR] [--part NAME …] [--minutes 9]
    python benchmarks/accelerator.py --out DIR --first
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
import re
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
from accelerator_store import Store, wrong
from accelerator_tasks import LeftOut, Place, Unfinished
from accelerator_worker import MARK, Clock, Failed, OutOfTime, TooLong, Worker, end_leftovers

PARTS = {
    "exact": lambda args: accelerator_exact.tasks(args.smoke),
    "speed": lambda args: accelerator_speed.tasks(args.smoke),
    "flags": lambda args: accelerator_flags.tasks(args.smoke),
    "peers": lambda args: accelerator_peers.tasks(args.smoke, args.peers),
    "learn": lambda args: accelerator_learn.tasks(args.smoke),
}
MOST_MINUTES = 10_000
FIRST = (
    "speed/large products",
    "speed/update tdmpc2:5m vector",
    "speed/plan tdmpc2:5m 1",
    "speed/update dreamerv3:size12m vector",
    "speed/profile tdmpc2:5m",
    "speed/profile dreamerv3:size12m",
    "exact/golden tdmpc2-single",
    "exact/golden dreamerv3-vector-discrete",
    "speed/plan tdmpc2:5m 16",
)
"""What ``--first`` measures: one figure of each kind, for a card that is there for a quarter of an hour. What is short
comes first, since all seconds were estimated without a card."""


class NoDevice(Exception):
    """No process can use the device, so nothing can be measured; the text says why."""


class Workers:
    """The worker in use; there is one at a time, because each takes most of the memory of a card."""

    def __init__(self, env, clock, logs):
        self.env, self.clock = env, clock
        self._log, self._worker, self._device = logs / "worker.txt", None, None

    def of(self, env=None):
        """The worker with these variables in addition to the usual ones; XLA's flags are added to theirs."""
        merged = self.env | (env or {})
        if "XLA_FLAGS" in (env or {}):
            merged["XLA_FLAGS"] = f"{self.env['XLA_FLAGS']} {env['XLA_FLAGS']}".strip()
        if self._worker is None or self._worker.env != merged:
            self.close()
            try:
                self._worker = Worker(merged, self._log, self.clock)
            except Failed as error:
                # With variables of its own, one measurement fails; without, every one would.
                raise error if env else NoDevice(str(error)) from None
            if self._device not in (None, found := self._device_of(self._worker)):
                self.kill()
                raise NoDevice(f"a process has found {found} in place of {self._device}")
        return self._worker

    def stay(self):
        """The device of the present worker is that of all later processes: none may fall back to a CPU."""
        self._device = self._device_of(self._worker)
        if self._worker.about["platform"] == "cpu" or "JAX_PLATFORMS" in os.environ:
            return
        version = self._worker.about["platform_version"].lower()
        name = next((each for each in ("cuda", "rocm") if each in version), self._worker.about["platform"])
        # JAX warns and takes the CPU if no device can be used, unless one is named.
        for env in (self.env, self._worker.env):
            env["JAX_PLATFORMS"] = f"{name},cpu"

    def _device_of(self, worker):
        return f"{worker.about['device']} ({worker.about['platform']})"

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
        MARK: str(folder),
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


def run(planned, store, workers, args, every=None):
    """Measure what is left, as long as there is time; returns what was left out, with reasons.

    What was started before and did not end comes after what was never tried, and has failed at the second time.
    """
    names, left_out = [(part, task.name) for part, task in every or planned], {}
    store.write_status(names, left_out)

    def tried(item):
        part, task = item
        return not task.resumes and "starts" in store.part(part).get(task.name, {})

    planned = sorted(planned, key=tried)
    for number, (part, task) in enumerate(planned):
        entry, name = store.part(part).get(task.name, {}), f"{part}/{task.name}"
        needed = task.seconds_of(args.smoke)
        if "figure" in entry or ("error" in entry and not args.again) or workers.clock.left() < needed:
            continue
        before, start, left = store.begin(part, task.name), time.monotonic(), workers.clock.left()
        full = max(3 * needed, 300 if args.smoke else 60)
        # One that hangs leaves half of the time to the others.
        most = left if task.resumes else full if number + 1 == len(planned) else min(full, max(needed, left / 2))
        result = {}
        try:
            result = {"figure": measure(task, part, store, workers, args, most)}
            fault = wrong(result["figure"])
            said = f"done, but {fault}" if fault else "done"
        except LeftOut as reason:
            left_out[name], said = str(reason), f"left out: {reason}"
            store.forget(part, task.name)
        except Unfinished as error:
            result, said = {"progress": error.progress}, str(error)
        except (OutOfTime, TooLong) as error:
            workers.kill()
            if task.resumes or (not before and (isinstance(error, OutOfTime) or most < full)):
                said = f"left: {error}"
            else:
                result, said = {"error": f"{error}; started {before + 1} times"}, f"failed: {error}"
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
            # A number that is none, or what JSON does not know.
            except (ValueError, TypeError, AttributeError) as error:
                said = f"failed: {error} in {result}"
                store.write(part, task.name, seconds, error=said)
        print(f"{name}: {said.splitlines()[0][:300]} ({seconds:.0f} s)", flush=True)
        store.write_status(names, left_out)
    return left_out


def named(text):
    """A path, which an empty text is not: it would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("'' is no folder")
    return Path(text)


def minutes(text):
    """A number of minutes, of which the start of a worker alone may take one."""
    value = float(text)
    if not 0 < value <= MOST_MINUTES:
        raise argparse.ArgumentTypeError(f"{text} is no number of minutes above 0 and up to {MOST_MINUTES:,}")
    return value


def check_folders(parser, args):
    """End the program with a sentence if a folder that is given cannot be used, before the device is."""
    if args.out is None:
        parser.error("--out DIR is needed: the folder of the figures, which may exist already")
    if args.peers is not None and not args.peers.is_dir():
        parser.error(f"--peers {args.peers} is no folder; it holds checkouts of the reference programs")
    nearest = next(each for each in (args.out.absolute(), *args.out.absolute().parents) if each.exists())
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        parser.error(f"--out {args.out} cannot be written: {nearest} is no folder that takes files ({error.strerror})")


def report(status, planned, most):
    """Say what is left, in a few sentences; returns whether anything failed or is wrong."""
    chosen = {f"{part}/{task.name}" for part, task in planned}
    done, failed, out = ([each for each in status[key] if each in chosen] for key in ("done", "failed", "left out"))
    left = [name for name in status["left"] if name in chosen and name not in out]
    bad = {name: fault for name, fault in status["wrong"].items() if name in chosen}
    print(f"{len(done)} done, {len(failed)} failed, {len(left)} left, {len(out)} left out.")
    if bad:
        print(*(f"Wrong: {name}: {fault}." for name, fault in bad.items()), sep="\n")
    if out:
        print(*(f"Left out: {name}: {status['left out'][name]}" for name in out), sep="\n")
    if left:
        print(f"Left: {', '.join(left)}. The same command goes on there.")
        long = [task.name for part, task in planned if f"{part}/{task.name}" in left and task.seconds > 60 * most]
        if long:
            print(f"More than --minutes {most:g} are needed for: {', '.join(long)}.")
    if failed:
        print(f"Failed: {', '.join(failed)}; see the errors in status.json. --again tries them once more.")
    return bool(bad or failed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=named, metavar="DIR", help="folder of the figures and runs")
    parser.add_argument("--peers", type=Path, metavar="DIR", help=accelerator_peers.__doc__.partition("\n\n")[2])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", metavar="PATTERN", help="measurements by part/name; * stands for anything")
    which.add_argument("--first", action="store_true", help="a few of each kind, in an order for a first short visit")
    parser.add_argument("--minutes", type=minutes, default=9, help="no measurement is started that would take longer")
    parser.add_argument("--smoke", action="store_true", help="everything in tiny sizes; the figures mean nothing")
    parser.add_argument("--again", action="store_true", help="also repeat measurements that failed")
    parser.add_argument("--revision", help="commit to write beside the figures; needed where the files are a copy")
    parser.add_argument("--list-wheels", action="store_true", help="print what to carry to a machine without a network")
    parser.add_argument("--have", type=Path, metavar="FILE", help="pip list --format=freeze of that machine: list less")
    parser.add_argument("--have-python", metavar="X.Y", help="version of its Python, if it is another than this one's")
    parser.add_argument("--list", action="store_true", help="print the measurements and their seconds on a card")
    args = parser.parse_args()
    every = [(part, task) for part, tasks in PARTS.items() for task in tasks(args)]
    planned = [item for part in args.part for item in every if item[0] == part]
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
    if args.have and not args.have.is_file():
        parser.error(f"--have {args.have} is no file; pip list --format=freeze writes one on that machine")
    if args.have_python and not re.fullmatch(r"3\.\d{1,2}", args.have_python):
        parser.error(f"--have-python {args.have_python} is no version of Python; give one like 3.12")
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
    check_folders(parser, args)
    commit = args.revision or revision()
    if commit is None:
        print("The figures will be without a commit: this is no checkout, and there is no --revision.", file=sys.stderr)
    clock, folder = Clock(args.minutes), args.out.absolute()
    with tempfile.TemporaryDirectory() as logs, contextlib.ExitStack() as stack:
        workers = Workers(variables(folder, args.smoke), clock, Path(logs))
        store = stack.enter_context(contextlib.closing(Store(folder))) if folder.exists() else None
        if store and (ended := end_leftovers(folder)):
            print(f"Ended {ended} processes of an earlier start, which had outlived it.", file=sys.stderr)
        try:
            about = workers.of().about
            if about["platform"] == "cpu" and not args.smoke:
                print(
                    f"JAX {about['jax']} finds no accelerator on this machine, so there is nothing to measure; "
                    "--smoke tries everything in tiny sizes on the CPU.", file=sys.stderr,
                )  # fmt: skip
                raise SystemExit(2)
            workers.stay()
            store = store or stack.enter_context(contextlib.closing(Store(folder)))
            others = store.open_for(about | {"smoke": args.smoke, "revision": commit})
            if others:
                print(f"Of other commits than {commit}, and kept: {', '.join(others)}.", file=sys.stderr)
            run(planned, store, workers, args, every)
        except (NoDevice, OutOfTime) as error:
            raise SystemExit(f"No process could be started on this device: {error}") from None
        finally:
            workers.kill()
    if report(store.status, planned, args.minutes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
