"""N environments in N processes, which are replaced when they crash or hang.

Workers are fresh interpreters started with ``subprocess``. They are not forks, because forking a process with JAX's
threads can deadlock; and not started by ``multiprocessing``, whose children import the main script again, JAX included.
POSIX only (the pipe is an inherited socket). Observations are sent through the pipe: a 128×128×3 image adds a tenth to
the 0.25 ms of a round trip, so shared memory would gain nothing.
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

from worldloom.envs.backends.base import BatchedStepResult, StepResult, check_same_spaces, index_nested
from worldloom.envs.time_step import WorkerRestart
from worldloom.errors import ConfigError, EnvContractError, EnvError

START_TIMEOUT = 120.0
"""Seconds that a worker may take to import and build its environment."""

CLOSE_TIMEOUT = 5.0
"""Seconds that a worker may take to close its environment before it is killed."""

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from worldloom.envs.backends.worker import main; main({fd})"
)


class WorkerCrash(Exception):
    """A worker died, raised or did not answer in time; ``cause`` is what it raised, if that could be pickled.

    The message continues a sentence whose subject is the worker.
    """

    def __init__(self, reason: str, cause: BaseException | None = None):
        super().__init__(reason)
        self.cause = cause


class WorkerProcess:
    """One process with one environment, and the pipe to it.

    Args:
      payload: pickled function that builds the environment.
      timeout: seconds that the worker may take for a request.
    """

    def __init__(self, payload: bytes, timeout: float):
        parent_end, worker_end = socket.socketpair()
        with worker_end, contextlib.ExitStack() as on_error:
            on_error.callback(parent_end.close)
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT.format(fd=worker_end.fileno()), json.dumps(sys.path)],
                pass_fds=[worker_end.fileno()],
                stdin=subprocess.DEVNULL,
                env=_worker_environment(),
                # Its own process group: Ctrl-C reaches only the parent, and a kill includes the worker's children.
                start_new_session=True,
            )
            on_error.pop_all()
        self._connection = Connection(parent_end.detach())
        self._timeout = timeout
        self._ready = False
        with contextlib.suppress(OSError):  # If it is dead already, `spaces` raises.
            self._connection.send_bytes(payload)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def spaces(self) -> tuple[gym.Space[Any], gym.Space[Any], int | None]:
        """Wait until the environment is built; returns its observation space, action space and time limit."""
        self._ready = True
        return self._read(START_TIMEOUT, START_TIMEOUT)

    def send(self, request: str, arguments: Any = None) -> None:
        """Send a request. If the worker is dead, :meth:`receive` raises."""
        with contextlib.suppress(OSError):
            self._connection.send((request, arguments))

    def receive(self, since: float) -> Any:
        """The answer to the last request, within the timeout from ``since`` (``time.monotonic``).

        Raises ``WorkerCrash``, and ``EnvContractError`` if the environment returned what its spaces exclude.
        """
        if not self._ready:
            # A replacement that is still building its environment: the timeout starts when it is built.
            self.spaces()
            since = time.monotonic()
        return self._read(max(0.0, since + self._timeout - time.monotonic()), self._timeout)

    def kill(self) -> None:
        """Kill the process group and reap the process."""
        self._connection.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def disconnect(self) -> None:
        """Close the pipe, whereupon the worker closes its environment and exits."""
        self._connection.close()

    def wait(self, deadline: float) -> None:
        """Reap the process after :meth:`disconnect`; kill it at ``deadline`` (``time.monotonic``)."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()

    def _read(self, remaining: float, timeout: float) -> Any:
        """The next answer, within ``remaining`` of ``timeout`` seconds."""
        try:
            if not self._connection.poll(remaining):
                raise WorkerCrash(f"gave no answer within {timeout:g} s")
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            raise WorkerCrash(self._exit_reason()) from None
        if kind == "contract":
            raise EnvContractError(value)
        if kind == "error":
            raise WorkerCrash(*value)
        return value

    def _exit_reason(self) -> str:
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


class SubprocBackend:
    """N environments, each in a worker process, stepped in parallel.

    A worker that dies, raises or does not answer within ``timeout`` seconds is replaced. Its episode ends as truncated
    (last observation repeated, reward 0), and a ``WorkerRestart`` is reported.

    Args:
      build: function that builds an environment; sent to the workers by ``cloudpickle``.
      num_envs: N.
      timeout: seconds that a worker may take for a step or a reset.
      max_crashes: how often in a row the worker of an environment may crash without completing a step. One crash more
        raises ``EnvError``: restarting does not help then.

    Raises ``ConfigError`` where there is no POSIX or if the spaces of the environments differ, what ``build`` raises,
    and ``EnvError`` if a worker dies while building.
    """

    def __init__(self, build: Callable[[], gym.Env[Any, Any]], num_envs: int, *, timeout: float, max_crashes: int = 3):
        if os.name != "posix":
            raise ConfigError("parallel='subprocess' needs a POSIX system; use parallel='sync' here.")
        self.num_envs = num_envs
        self._timeout, self._max_crashes = timeout, max_crashes
        self._payload = cloudpickle.dumps(build)
        self._workers: list[WorkerProcess] = []
        # Also runs on garbage collection and at interpreter exit, so that no process is left running.
        self._finalizer = weakref.finalize(self, _close_all, self._workers)
        self._restarts = [0] * num_envs
        self._consecutive_crashes = [0] * num_envs
        self._obs: dict[str, np.ndarray] = {}
        # Workers replaced between two steps: the next step ends their episodes.
        self._unreported: dict[int, WorkerRestart] = {}
        try:
            for _ in range(num_envs):
                self._workers.append(WorkerProcess(self._payload, timeout))
            spaces = [worker.spaces() for worker in self._workers]
            check_same_spaces([pair[:2] for pair in spaces])
        except WorkerCrash as crash:
            self.close()
            if crash.cause is not None:
                raise crash.cause from crash
            raise EnvError(f"A worker could not build its environment: it {crash}.") from None
        except BaseException:
            self.close()
            raise
        self.observation_space, self.action_space, self.time_limit = spaces[0]

    def step(self, actions: Any, reset_mask: np.ndarray, seeds: Sequence[int | None]) -> BatchedStepResult:
        """See :meth:`worldloom.envs.backends.base.Backend.step`.

        Raises ``EnvError`` when a worker has crashed more than ``max_crashes`` times without completing a step, and
        ``EnvContractError`` at once: a new worker would return the same.
        """
        # Send all requests, so that the workers run in parallel.
        for i, worker in enumerate(self._workers):
            if reset_mask[i]:
                worker.send("reset", seeds[i])
            elif i not in self._unreported:
                worker.send("step", index_nested(actions, i))
        sent = time.monotonic()

        # Collect the answers; replace workers that crashed.
        results, restarts = [], [*self._unreported.values()]
        for i, worker in enumerate(self._workers):
            if i in self._unreported and not reset_mask[i]:
                results.append(self._truncated(i))
                continue
            try:
                results.append(worker.receive(sent))
                if not reset_mask[i]:
                    self._consecutive_crashes[i] = 0
            except WorkerCrash as crash:
                restarts.append(self._replace(i, crash))
                results.append(
                    self._retry_reset(i, int(seeds[i] or 0), restarts) if reset_mask[i] else self._truncated(i)
                )
        self._unreported = {}
        stacked = BatchedStepResult.stack(results, restarts)
        self._obs = stacked.obs
        return stacked

    def replay_actions(
        self, seeds: Sequence[int], actions: Sequence[Any], lengths: np.ndarray
    ) -> BatchedStepResult | None:
        """See :meth:`worldloom.envs.backends.base.Backend.replay_actions`.

        A worker that crashes is replaced, and ``None`` is returned.
        """
        for i, worker in enumerate(self._workers):
            worker.send("replay_actions", (seeds[i], actions[i], int(lengths[i])))
        self._unreported = {}
        results = []
        for i, worker in enumerate(self._workers):
            try:
                # The timeout is per step: `lengths[i]` of them, and the reset.
                results.append(worker.receive(time.monotonic() + self._timeout * int(lengths[i])))
            except WorkerCrash as crash:
                self._replace(i, crash)
        if len(results) < self.num_envs:
            return None
        stacked = BatchedStepResult.stack(results)
        self._obs = stacked.obs
        return stacked

    def render(self) -> Any:
        """See :meth:`worldloom.envs.backends.base.Backend.render`.

        Raises what the environment raised, or ``EnvError`` if its worker crashed.
        """
        self._workers[0].send("render")
        try:
            frame = self._workers[0].receive(time.monotonic())
        except WorkerCrash as crash:
            self._unreported[0] = self._replace(0, crash)
            raise EnvError(f"Environment 0 could not be rendered: its worker {crash}.") from None
        if isinstance(frame, Exception):
            raise frame
        return frame

    def close(self) -> None:
        """See :meth:`worldloom.envs.backends.base.Backend.close`. Kills workers that do not exit in time."""
        self._finalizer()

    def _replace(self, env: int, crash: WorkerCrash) -> WorkerRestart:
        """Start a new worker without waiting for it: it builds its environment while the others are stepped."""
        self._workers[env].kill()
        self._restarts[env] += 1
        self._consecutive_crashes[env] += 1
        if self._consecutive_crashes[env] > self._max_crashes:
            raise EnvError(
                f"Environment {env} crashed {self._consecutive_crashes[env]} times without completing a step; "
                f"the last time its worker {crash}."
            ) from crash.cause
        self._workers[env] = WorkerProcess(self._payload, self._timeout)
        return WorkerRestart(env, f"The worker of environment {env} {crash}.", self._restarts[env])

    def _retry_reset(self, env: int, seed: int, restarts: list[WorkerRestart]) -> StepResult:
        """Reset again after a crash, with other seeds in case the first one caused it; appends to ``restarts``."""
        while True:
            seed = (seed + 1) % 2**31
            self._workers[env].send("reset", seed)
            try:
                return self._workers[env].receive(time.monotonic())
            except WorkerCrash as crash:
                restarts.append(self._replace(env, crash))

    def _truncated(self, env: int) -> StepResult:
        """The last row of an episode that was lost in a crash: truncated, with its last known observation."""
        return StepResult({name: value[env] for name, value in self._obs.items()}, 0.0, is_last=True, is_terminal=False)


def _close_all(workers: Sequence[WorkerProcess]) -> None:
    for worker in workers:
        worker.disconnect()
    deadline = time.monotonic() + CLOSE_TIMEOUT
    for worker in workers:
        worker.wait(deadline)


def _worker_environment() -> dict[str, str]:
    """The parent's environment variables, with defaults that keep workers off its accelerator and most of its cores."""
    return {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", **os.environ}
