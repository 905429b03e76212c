"""Several processes that train together: how they find each other, and what they tell each other on the host.

``jax.distributed`` connects them, and what they exchange goes through XLA's collectives. Every process makes the same
calls in the same order, or the others wait for it. One process is the degenerate case of everything in here.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import functools
import itertools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from worldloom import errors
from worldloom.config import check
from worldloom.errors import ConfigError, DeviceError, NonFiniteError, WorldloomError

_log = logging.getLogger("worldloom")

_ALIVE = "worldloom/alive/"
"""Keys, in the store that JAX's processes share, of their signs of life."""
_ENDED = "ended"
"""The last sign of a process that ends by itself, and may wait for others to do so."""
_ending = threading.Event()
"""Set when this process ends by itself: then process 0 may have ended before."""
_left = threading.Event()
"""Set when this process has failed by itself."""
_meetings = itertools.count()
"""Numbers of the meetings of this process, which name them in the store."""
_POLL = 1_000
"""Milliseconds of one request for another process's message."""
_LAG = 2
"""Calls after which a vote is counted, so that no process waits for the others' newest."""


def initialize(
    address: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 60.0,
) -> None:
    """Connect this process with the others of its run; call it before JAX computes anything.

    Without arguments, JAX finds the others by itself: under Slurm, Open MPI, on TPU pods and on Kubernetes.

    Args:
      address: ``host:port`` of process 0, which all processes can reach.
      processes: number of processes.
      process_id: number of this one, from 0.
      timeout: seconds after which a process that shows no sign of life ends the others, with a sentence: they would
        wait for it forever.

    Raises:
      ConfigError: only some of the arguments are given, or one is out of range.
      DeviceError: JAX has already started, finds no cluster, or cannot reach the others.
    """
    given = [value is not None for value in (address, processes, process_id)]
    check(
        all(given) or not any(given),
        "Give address, processes and process_id together (--coordinator HOST:PORT --processes N --process-id I), or "
        "none of them under Slurm, Open MPI, on TPU pods and on Kubernetes.",
    )
    if processes is not None and process_id is not None:
        check(processes >= 1, f"processes must be at least 1, not {processes}.")
        check(0 <= process_id < processes, f"process_id must be from 0 to {processes - 1}, not {process_id}.")
    try:
        jax.distributed.initialize(address, processes, process_id)
    except (RuntimeError, ValueError) as error:
        hint = "" if any(given) else " Name them: --coordinator HOST:PORT --processes N --process-id I."
        raise DeviceError(f"The processes cannot be connected: {' '.join(str(error).split())}.{hint}") from error
    _log.info(
        "Process %d of %d, with %d of %d devices.",
        *(jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count()),
    )
    if jax.process_count() > 1:
        thread = threading.Thread(target=_watch, args=(timeout,), name="worldloom-processes", daemon=True)
        atexit.register(_stop_watching, thread)
        thread.start()


def _watch(timeout: float) -> None:
    """Show the other processes a sign of life now and then, and end this one if one of theirs stays away.

    JAX's own watch ends a process after a similar time, but with a stack trace in place of a sentence.
    """
    client = _client()
    own, beat = jax.process_index(), 0
    seen: dict[str, tuple[str, float]] = {}
    while not _ending.wait(min(timeout / 10, 5.0)):
        if _left.is_set():
            return
        beat += 1
        try:
            client.key_value_set(f"{_ALIVE}{own}", str(beat), allow_overwrite=True)
            found = dict(client.key_value_dir_get(_ALIVE))
        except Exception:
            if _ending.is_set():
                return
            _end("Process 0 no longer answers")
        now = time.monotonic()
        for number in range(jax.process_count()):
            name = f"{_ALIVE}{number}"
            sign, since = seen.get(name, ("", now))
            seen[name] = (sign, since) if found.get(name, "") == sign else (found[name], now)
            if found.get(name) != _ENDED and now - seen[name][1] > timeout:
                _end(f"Process {number} has failed, or shown no sign of life for {timeout:.0f} s")
    if _left.is_set():
        return
    with contextlib.suppress(Exception):
        client.key_value_set(f"{_ALIVE}{own}", _ENDED, allow_overwrite=True)


@contextlib.contextmanager
def leaving_on_error() -> Iterator[None]:
    """After an error that the other processes cannot know of, show no more signs of life, which ends them in time."""
    try:
        yield
    except NonFiniteError:
        raise  # It happens to all of them.
    except BaseException:
        if jax.process_count() > 1:
            _left.set()
        raise


def has_left() -> bool:
    """Whether this process has failed, see :func:`leaving_on_error`; then nothing may be exchanged with the others."""
    return _left.is_set()


def _stop_watching(thread: threading.Thread) -> None:
    """Before Python ends: a thread that is within a call of the store then would abort the process."""
    _ending.set()
    thread.join(timeout=30)


def _end(why: str) -> NoReturn:
    """End this process at once: its main thread waits for the others and cannot be told."""
    print(
        f"worldloom: {why}, so process {jax.process_index()} ends too. Start all of them again with resume='auto' "
        "(--resume): the newest checkpoint is complete.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def is_primary() -> bool:
    """Whether this is process 0, which logs, prints, evaluates and writes files; True without other processes."""
    return jax.process_count() == 1 or jax.process_index() == 0


class Exchange:
    """Messages of any length to all processes: everyone gives one and gets those of all, in the order of processes."""

    def __init__(self) -> None:
        # Each length compiles once, so messages are padded to one that grows by doubling, everywhere alike.
        self._room = 1 << 12

    def __call__(self, message: bytes) -> list[bytes]:
        """The messages of all processes."""
        if jax.process_count() == 1:
            return [message]
        from jax.experimental import multihost_utils

        while True:
            buffer = np.zeros(8 + self._room, np.uint8)
            buffer[:8] = np.frombuffer(np.int64(len(message)).tobytes(), np.uint8)
            if len(message) <= self._room:
                buffer[8 : 8 + len(message)] = np.frombuffer(message, np.uint8)
            received = np.asarray(multihost_utils.process_allgather(buffer))
            lengths = [int(np.frombuffer(each[:8].tobytes(), np.int64)[0]) for each in received]
            if max(lengths) <= self._room:
                return [each[8 : 8 + length].tobytes() for each, length in zip(received, lengths, strict=True)]
            self._room = 1 << (max(lengths) - 1).bit_length()


class Meeting:
    """What each process computes by itself, told to all of them; an error of one is an error of all.

    Unlike an :class:`Exchange`, it does without XLA, so any thread may call it while updates are under way. It waits as
    long as the others live: those that fail end this process, see :func:`initialize`. All must construct their
    meetings in the same order, and call each equally often.
    """

    def __init__(self) -> None:
        self._name, self._calls = f"worldloom/meeting/{next(_meetings)}", 0

    def __call__(self, compute: Callable[[], Any]) -> list[Any]:
        """The results of ``compute`` of all processes, in their order; JSON values of up to a few megabytes.

        If it raises in this process, that error is raised once all have met; if in another one, an error of the same
        class of ``worldloom.errors`` is, or else a ``WorldloomError``.
        """
        if jax.process_count() == 1:
            return [compute()]
        own: Exception | None = None
        try:
            message = {"value": compute()}
        except Exception as error:
            own, message = error, {"error": str(error), "class": type(error).__name__}
        received = [json.loads(each) for each in self._tell(json.dumps(message))]
        if own is not None:
            raise own
        for number, each in enumerate(received):
            if "error" in each:
                kind = getattr(errors, each["class"], WorldloomError)
                raise kind(f"Process {number}: {each['error']}")
        return [each["value"] for each in received]

    def _tell(self, message: str) -> Iterator[str]:
        client, own = _client(), jax.process_index()
        client.key_value_set(f"{self._name}/{self._calls}/{own}", message)
        for number in range(jax.process_count()):
            yield _message(client, f"{self._name}/{self._calls}/{number}")
        if self._calls:  # All are here, so all have read what was told before.
            client.key_value_delete(f"{self._name}/{self._calls - 1}/{own}")
        self._calls += 1


class StopVote:
    """Whether any process wants to stop, decided by all of them alike.

    Every process votes once per call; a vote is counted two calls later, when its exchange has long been done.
    """

    def __init__(self) -> None:
        self._votes: collections.deque[jax.Array] = collections.deque()

    def __call__(self, stop: bool) -> bool:
        """Vote, and return the decision of two calls ago; with a single process, the vote itself."""
        if jax.process_count() == 1:
            return stop
        sharding, count = _one_each()
        votes = jax.make_array_from_process_local_data(sharding, np.full(jax.local_device_count(), stop, np.int32))
        self._votes.append(count(votes))
        return len(self._votes) > _LAG and bool(np.asarray(self._votes.popleft()))


def check_processes(facts: Mapping[str, Any]) -> None:
    """Raise ``ConfigError``, in every process, if they do not agree on ``facts``, JSON values by name."""
    received = [json.loads(each) for each in Exchange()(json.dumps(facts).encode())]
    for name, value in received[0].items():
        for number, other in enumerate(received):
            if other.get(name) != value:
                raise ConfigError(
                    f"Process {number} has {name}={other.get(name)!r}, process 0 has {value!r}; all processes of a run "
                    "must be started with the same settings and data."
                )


def _client() -> Any:
    """This process's connection to the store that all share."""
    from jax._src.distributed import global_state

    return global_state.client


def _message(client: Any, key: str) -> str:
    """What another process puts into the store under ``key``, once it is there."""
    while True:
        try:
            return str(client.blocking_key_value_get(key, _POLL))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


@functools.cache
def _one_each() -> tuple[NamedSharding, Any]:
    """The sharding of one number per device, and a compiled function that says whether any is not 0."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.array(devices), ("device",))
    count = jax.jit(lambda votes: jnp.max(votes) > 0, out_shardings=NamedSharding(mesh, P()))
    return NamedSharding(mesh, P("device")), count
