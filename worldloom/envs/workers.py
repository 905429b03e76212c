"""N environments in N processes, replaced when they crash or hang.

Workers are fresh interpreters started with ``subprocess``, not forks: JAX runs threads, which a fork would break, and
not ``multiprocessing`` either, whose children import the main script again, JAX included. POSIX only (the pipe is an
inherited socket). Observations come through the pipe: of the 0.25 ms that a round trip takes, a 128×128×3 image is a
tenth, so shared memory would gain nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np

from worldloom.envs.player import check_alike
from worldloom.envs.rows import Arrival, Arrivals, WorkerRestart, pick
from worldloom.errors import ConfigError, EnvError

START_TIMEOUT = 120.0
"""Seconds that a worker may take to import and build its environment."""

CLOSE_TIMEOUT = 5.0
"""Seconds that a worker may take to close its environment before it is killed."""

_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from worldloom.envs.worker import main; main({fd})"


class WorkerCrash(Exception):
    """A worker died, raised or gave no answer in time; ``cause`` is what it raised, if that could be sent."""

    def __init__(self, reason: str, cause: BaseException | None = None):
        super().__init__(reason)
        self.cause = cause


class Worker:
    """One process with one environment, and the pipe to it."""

    def __init__(self, payload: bytes, timeout: float):
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT.format(fd=theirs.fileno()), json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(),
                # Its own group: Ctrl-C is the parent's business, and a kill takes the environment's children along.
                start_new_session=True,
            )
            undo.pop_all()
        self._connection = Connection(ours.detach())
        self._timeout = timeout
        self._ready = False
        with contextlib.suppress(OSError):  # A worker that is dead already shows when it is asked for its spaces.
            self._connection.send_bytes(payload)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def spaces(self) -> tuple[gym.Space[Any], gym.Space[Any], int | None]:
        """Wait until the environment is built; its observation space, action space and time limit."""
        self._ready = True
        return self._answer(START_TIMEOUT, START_TIMEOUT)

    def send(self, request: str, arguments: Any = None) -> None:
        """Ask for something; a worker that is dead by then shows in :meth:`receive`."""
        with contextlib.suppress(OSError):
            self._connection.send((request, arguments))

    def receive(self, since: float) -> Any:
        """The answer, within the timeout from ``since`` (``time.monotonic``). Raises ``WorkerCrash``."""
        if not self._ready:
            self.spaces()
            since = time.monotonic()
        return self._answer(max(0.0, since + self._timeout - time.monotonic()), self._timeout)

    def kill(self) -> None:
        """End the process group at once and collect it."""
        self._connection.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def hang_up(self) -> None:
        """Close the pipe, which asks the worker to close its environment and leave."""
        self._connection.close()

    def wait(self, deadline: float) -> None:
        """Collect the process after :meth:`hang_up`; kill it at ``deadline``."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()

    def _answer(self, timeout: float, allowed: float) -> Any:
        try:
            if not self._connection.poll(timeout):
                raise WorkerCrash(f"gave no answer within {allowed:g} s")
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            raise WorkerCrash(self._obituary()) from None
        if kind == "error":
            raise WorkerCrash(*value)
        return value

    def _obituary(self) -> str:
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"


class Workers:
    """N environments, each in a worker process, stepped in parallel.

    A worker that dies, raises or gives no answer within ``timeout`` seconds is replaced; the episode it was in is
    closed as truncated (last observation repeated, reward 0) and a ``WorkerRestart`` reported. After ``max_crashes``
    of one environment without a completed step between them ``EnvError`` is raised: restarting does not help then.
    """

    def __init__(self, build: Callable[[], gym.Env[Any, Any]], num_envs: int, *, timeout: float, max_crashes: int = 3):
        if os.name != "posix":
            raise ConfigError("parallel='subprocess' needs a POSIX system; use parallel='sync' here.")
        self.num_envs = num_envs
        self._timeout, self._max_crashes = timeout, max_crashes
        self._payload = cloudpickle.dumps(build)
        self._workers: list[Worker] = []
        # Also runs when this object is forgotten without close, and at interpreter exit: no process stays behind.
        self._finalizer = weakref.finalize(self, _close_all, self._workers)
        self._restarts = [0] * num_envs
        self._crashes_in_a_row = [0] * num_envs
        self._obs: dict[str, np.ndarray] = {}
        self._lost: dict[int, WorkerRestart] = {}
        try:
            for _ in range(num_envs):
                self._workers.append(Worker(self._payload, timeout))
            spaces = [worker.spaces() for worker in self._workers]
            check_alike([pair[:2] for pair in spaces])
        except WorkerCrash as crash:
            self.close()
            if crash.cause is not None:
                raise crash.cause from crash
            raise EnvError(f"A worker could not build its environment: it {crash}.") from None
        except BaseException:
            self.close()
            raise
        self.observation_space, self.action_space, self.time_limit = spaces[0]

    def advance(self, actions: Any, starting: np.ndarray, seeds: Sequence[int | None]) -> Arrivals:
        """See :class:`worldloom.envs.rows.Backend`."""
        for i, worker in enumerate(self._workers):
            if starting[i]:
                worker.send("reset", seeds[i])
            elif i not in self._lost:
                worker.send("step", pick(actions, i))
        asked = time.monotonic()
        rows, restarts = [], [*self._lost.values()]
        for i in range(self.num_envs):
            if i in self._lost and not starting[i]:
                rows.append(self._cut(i))
                continue
            try:
                rows.append(self._workers[i].receive(asked))
                self._crashes_in_a_row[i] *= bool(starting[i])
            except WorkerCrash as crash:
                restarts.append(self._replace(i, crash))
                rows.append(self._restarted(i, int(seeds[i] or 0), restarts) if starting[i] else self._cut(i))
        self._lost = {}
        arrivals = Arrivals.stack(rows, restarts)
        self._obs = arrivals.obs
        return arrivals

    def replay(self, seeds: Sequence[int], actions: Sequence[Any], lengths: np.ndarray) -> Arrivals | None:
        """See :class:`worldloom.envs.rows.Backend`; a worker that crashes is replaced and ``None`` returned."""
        for i, worker in enumerate(self._workers):
            worker.send("replay", (seeds[i], actions[i], int(lengths[i])))
        self._lost = {}
        rows = []
        for i, worker in enumerate(self._workers):
            try:
                rows.append(worker.receive(time.monotonic() + self._timeout * int(lengths[i])))
            except WorkerCrash as crash:
                self._replace(i, crash)
        if len(rows) < self.num_envs:
            return None
        arrivals = Arrivals.stack(rows)
        self._obs = arrivals.obs
        return arrivals

    def render(self) -> Any:
        """See :class:`worldloom.envs.rows.Backend`; raises what the environment raised, or ``EnvError``."""
        self._workers[0].send("frame")
        try:
            frame = self._workers[0].receive(time.monotonic())
        except WorkerCrash as crash:
            # The new worker has no episode: the next step closes the one that was lost.
            self._lost[0] = self._replace(0, crash)
            raise EnvError(f"Environment 0 could not draw itself: its worker {crash}.") from None
        if isinstance(frame, Exception):
            raise frame
        return frame

    def close(self) -> None:
        """See :class:`worldloom.envs.rows.Backend`. A worker that does not leave in time is killed."""
        self._finalizer()

    def _replace(self, env: int, crash: WorkerCrash) -> WorkerRestart:
        """Start a new worker; it builds its environment while the others go on."""
        self._workers[env].kill()
        self._restarts[env] += 1
        self._crashes_in_a_row[env] += 1
        if self._crashes_in_a_row[env] > self._max_crashes:
            raise EnvError(
                f"Environment {env} crashed {self._crashes_in_a_row[env]} times without completing a step; "
                f"the last time its worker {crash}."
            ) from crash.cause
        self._workers[env] = Worker(self._payload, self._timeout)
        return WorkerRestart(env, f"The worker of environment {env} {crash}.", self._restarts[env])

    def _restarted(self, env: int, seed: int, restarts: list[WorkerRestart]) -> Arrival:
        """First row of an episode whose reset crashed, from other seeds in case the first one was the reason."""
        while True:
            seed = (seed + 1) % 2**31
            self._workers[env].send("reset", seed)
            try:
                return self._workers[env].receive(time.monotonic())
            except WorkerCrash as crash:
                restarts.append(self._replace(env, crash))

    def _cut(self, env: int) -> Arrival:
        """Close an episode that cannot go on: a truncation where it last was."""
        return Arrival({name: value[env] for name, value in self._obs.items()}, 0.0, last=True, terminal=False)


def _close_all(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.hang_up()
    deadline = time.monotonic() + CLOSE_TIMEOUT
    for worker in workers:
        worker.wait(deadline)


def _environment() -> dict[str, str]:
    """The parent's variables, with defaults that keep N workers from taking its accelerator and all its cores."""
    return {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", **os.environ}
