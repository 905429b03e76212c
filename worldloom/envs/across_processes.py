"""Environments of several processes as one: each process steps its own, and all see the rows of all."""

from __future__ import annotations

import json
import struct
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from gymnasium.spaces import Space

from worldloom.config import check
from worldloom.distributed import Exchange
from worldloom.envs.backends.base import Backend, BatchedStepResult, StatefulBackend
from worldloom.envs.time_step import WorkerRestart
from worldloom.envs.vector import VectorEnv
from worldloom.errors import EnvError

_joined: weakref.WeakKeyDictionary[VectorEnv, VectorEnv] = weakref.WeakKeyDictionary()
"""What :func:`across_processes` made of the environments of this process."""


class ProcessesBackend:
    """The backends of all processes, each with the same number of environments, as a :class:`Backend` of all.

    Environments are numbered through, in the order of processes, so their seeds do not depend on how many there are. An
    error in one process is raised in all of them.

    Args:
      own: the backend of this process; it is closed with this one.
    """

    observation_space: Space[Any]
    action_space: Space[Any]

    def __init__(self, own: Backend):
        self._own, self._exchange = own, Exchange()
        self.num_envs = own.num_envs * jax.process_count()
        self._first = own.num_envs * jax.process_index()
        self.observation_space, self.action_space = own.observation_space, own.action_space
        self.time_limit = own.time_limit

    def step(self, actions: Any, reset_mask: np.ndarray, seeds: Sequence[int | None]) -> BatchedStepResult:
        """See :class:`Backend`."""
        own = slice(self._first, self._first + self._own.num_envs)
        return self._share(lambda: self._own.step(_rows(actions, own), reset_mask[own], seeds[own]))

    def replay_actions(
        self, seeds: Sequence[int], actions: Sequence[Any], lengths: np.ndarray
    ) -> BatchedStepResult | None:
        """See :class:`Backend`; None if the backend of any process cannot replay."""
        own = slice(self._first, self._first + self._own.num_envs)
        return self._share(lambda: self._own.replay_actions(seeds[own], actions[own], lengths[own]))

    def render(self) -> Any:
        """A frame of this process's first environment."""
        return self._own.render()

    def close(self) -> None:
        """Close the environments of this process."""
        self._own.close()

    def _share(self, compute: Any) -> Any:
        """The results of all processes; None if one has none."""
        try:
            result = compute()
            message = _pack(result, self._first)
        except BaseException as error:
            about = f"Process {jax.process_index()}: {type(error).__name__}: {error}"
            self._exchange(json.dumps({"error": about}).encode())
            raise
        received = self._exchange(message)
        for number, each in enumerate(received):
            if each.startswith(b'{"error"') and number != jax.process_index():
                raise EnvError(f"The environments of another process failed. {json.loads(each)['error']}")
        results = [_unpack(each) for each in received]
        return None if any(each is None for each in results) else _join([each for each in results if each])


def across_processes(env: VectorEnv) -> VectorEnv:
    """``env`` and those of all other processes as one; ``env`` itself without other processes.

    Every process calls this, with as many environments of the same kind and the same seed. ``env`` is used up by it;
    given again, it returns the same as before. Raises ``ConfigError`` for environments in JAX.
    """
    if jax.process_count() == 1 or isinstance(env._backend, ProcessesBackend):
        return env
    check(
        not isinstance(env._backend, StatefulBackend),
        f"Environments in JAX are stepped in one process, and there are {jax.process_count()}: train in one, or take "
        "environments of Gymnasium.",
    )
    if env not in _joined:
        backend = ProcessesBackend(env._backend)
        _joined[env] = VectorEnv(
            backend,
            seed=env.seed,
            action_repeat=env.action_repeat,
            restart_bad=env._restart_bad,
            remake=env._remake,
            settings={**env.settings, "num_envs": backend.num_envs},
        )
    return _joined[env]


def _rows(batch: Any, own: slice) -> Any:
    """The rows of this process of an array, or of every array in nested dicts and tuples."""
    if isinstance(batch, dict):
        return {key: _rows(value, own) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(_rows(value, own) for value in batch)
    return None if batch is None else batch[own]


def _pack(result: BatchedStepResult | None, first: int) -> bytes:
    """A result as bytes: the length of a JSON header, the header, the arrays. Environments get their global numbers."""
    if result is None:
        return b""
    arrays = {**{f"obs/{k}": v for k, v in result.obs.items()}, **_columns(result)}
    header = {
        "arrays": [[name, array.dtype.str, array.shape] for name, array in arrays.items()],
        "restarts": [[each.env + first, each.reason, each.restarts] for each in result.restarts],
        "infos": {str(env + first): dict(info) for env, info in result.infos.items()},
    }
    text = json.dumps(header).encode()
    return struct.pack("<q", len(text)) + text + b"".join(np.ascontiguousarray(x).tobytes() for x in arrays.values())


def _unpack(message: bytes) -> BatchedStepResult | None:
    if not message:
        return None
    (length,) = struct.unpack_from("<q", message)
    header, position = json.loads(message[8 : 8 + length]), 8 + length
    arrays = {}
    for name, dtype, shape in header["arrays"]:
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(message, np.dtype(dtype), count, position).reshape(shape)
        position += arrays[name].nbytes
    return BatchedStepResult(
        obs={name.removeprefix("obs/"): x for name, x in arrays.items() if name.startswith("obs/")},
        **{name: arrays[name] for name in ("reward", "is_last", "is_terminal")},
        restarts=tuple(WorkerRestart(*each) for each in header["restarts"]),
        infos={int(env): info for env, info in header["infos"].items()},
    )


def _join(results: Sequence[BatchedStepResult]) -> BatchedStepResult:
    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(result, name) for result in results])

    return BatchedStepResult(
        obs={name: np.concatenate([result.obs[name] for result in results]) for name in results[0].obs},
        reward=joined("reward"),
        is_last=joined("is_last"),
        is_terminal=joined("is_terminal"),
        restarts=tuple(each for result in results for each in result.restarts),
        infos={env: info for result in results for env, info in result.infos.items()},
    )


def _columns(result: BatchedStepResult) -> dict[str, np.ndarray]:
    return {"reward": result.reward, "is_last": result.is_last, "is_terminal": result.is_terminal}
