"""Processes that ``accelerator.py`` starts: they measure, and end when it ends or when their time is over.

The program itself never starts a JAX backend: it would keep most of the memory of a card from the others.
"""

import contextlib
import ctypes
import importlib
import json
import os
import platform
import selectors
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent


class Failed(Exception):
    """A measurement that gave no figure; the text says why."""


class TooLong(Failed):
    """A measurement that took longer than it may, and was ended."""


class OutOfTime(Exception):
    """The time of this start is over; the measurement is not a failure, and is left."""


class Clock:
    """The end of this start, in seconds of ``time.monotonic``."""

    def __init__(self, minutes):
        self.end = time.monotonic() + 60 * minutes

    def left(self):
        return self.end - time.monotonic()

    def limit(self, most):
        """Seconds that a process may take, and the exception if it takes longer."""
        if self.left() < most:
            return max(self.left(), 0.0), OutOfTime("the time of this start was over")
        return most, TooLong(f"took longer than {most:.0f} s and was ended")


def ending_with_me(*words):
    """The command ``words`` with this process as a parent that it does not outlive, even if this one is killed."""
    return [sys.executable, str(HERE / "accelerator_worker.py"), str(os.getpid()), *map(str, words)]


def end_with_parent(parent):
    """Have Linux end this process when ``parent``, which has started it, ends; an ``exec`` does not change that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit(f"process {parent} has ended before its child began")


def run_command(words, clock, most, *, env=None, cwd=None, stop_first=0.0):
    """Run a command for at most ``most`` seconds: exit code, standard output and the end of standard error.

    At the end of its time it gets SIGTERM ``stop_first`` seconds before SIGKILL, if that is not 0, and its exit code is
    returned; otherwise ``Failed`` or ``OutOfTime`` is raised.
    """
    seconds, late = clock.limit(most)
    process = subprocess.Popen(
        ending_with_me(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
        env=os.environ | (env or {}), start_new_session=True,
    )  # fmt: skip
    try:
        try:
            output, errors = process.communicate(timeout=max(seconds - stop_first, 0.1))
        except subprocess.TimeoutExpired:
            if not stop_first:
                raise
            process.terminate()
            output, errors = process.communicate(timeout=stop_first)
    except subprocess.TimeoutExpired:
        raise late from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode, output, last_lines(errors)


MARK = "WORLDLOOM_ACCELERATOR"
"""Variable in the environment of all processes of one ``--out``, those that its processes start too."""


def end_leftovers(folder):
    """End processes of an earlier start into ``folder`` that outlived it, and give back the card; returns how many.

    A process ends with its parent, but a kill reaches none that its children have started. The caller holds the lock of
    the folder, so that nobody else's are ended. Linux only; elsewhere there are none to be found.
    """
    mark, ended = f"{MARK}={folder}".encode(), 0
    for place in Path("/proc").glob("[0-9]*/environ"):
        pid = int(place.parent.name)
        with contextlib.suppress(OSError):
            if pid != os.getpid() and mark in place.read_bytes().split(b"\0"):
                os.kill(pid, signal.SIGKILL)
                ended += 1
    if ended:
        time.sleep(2)  # The driver frees the memory of a process some time after its end.
    return ended


def last_lines(text, count=12):
    return "\n".join(text.strip().splitlines()[-count:])[-2000:]


class Worker:
    """A process that calls functions of the ``accelerator_*`` modules, one after the other."""

    def __init__(self, env, log, clock):
        self.env = env
        self._log, self._rest = log, b""
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                ending_with_me(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=errors, env=os.environ | env, start_new_session=True,
            )  # fmt: skip
        try:
            # A card takes some seconds to start, also for one that begins when the time is nearly over.
            self.about = self._answer(Clock(max(clock.left(), 60) / 60), 300)["about"]
        except BaseException:
            self.kill()
            raise

    def ask(self, call, arguments, clock, most):
        """The figure of ``call`` ("module:function"). After ``Failed`` or ``OutOfTime`` the worker may be dead."""
        self._process.stdin.write(json.dumps({"call": call, "arguments": arguments}).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._answer(clock, most)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["figure"]

    def close(self):
        """Let it end by itself, so that it gives back its memory before the next one starts."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        self.kill()

    def kill(self):
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what a dead process has not read
                pipe.close()

    def _answer(self, clock, most):
        seconds, late = clock.limit(most)
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(end - time.monotonic(), 0)):
                    raise late
                read = os.read(self._process.stdout.fileno(), 1 << 16)
                if not read:
                    code, log = self._process.wait(), self._log.read_text(errors="replace")
                    raise Failed(f"the process ended with exit code {code}: {last_lines(log)}")
                self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)


def about():
    """Device and versions, for every file of figures."""
    import jax

    import worldloom

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "platform_version": getattr(device.client, "platform_version", ""),
        "memory_bytes": stats.get("bytes_limit"),
        "cpus": os.cpu_count(),
        "jax": jax.__version__,
        "worldloom": worldloom.__version__,
        "python": platform.python_version(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "products": os.environ.get("JAX_DEFAULT_MATMUL_PRECISION", ""),
    }


def main():
    """Become the command that is given, or answer each line on standard input with a figure or an error."""
    parent, *words = sys.argv[1:]
    end_with_parent(int(parent))
    if words:
        os.execvp(words[0], words)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a measured program prints must not mix with the answers
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    say = lambda value: print(json.dumps(value, default=lambda number: number.item()), file=answers, flush=True)  # noqa: E731
    say({"about": about()})
    for line in sys.stdin:
        request = json.loads(line)
        module, _, function = request["call"].partition(":")
        try:
            say({"figure": getattr(importlib.import_module(module), function)(**request["arguments"])})
        except Exception as error:
            traceback.print_exc()
            say({"error": f"{type(error).__name__}: {str(error)[:1500]}"})


if __name__ == "__main__":
    main()
