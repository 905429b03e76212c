"""Samples the batches of windows (slices of consecutive rows) that an algorithm trains on."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from worldloom.errors import DataError
from worldloom.replay.device import SLOTS, DeviceReplay, Ring, supports_device_storage
from worldloom.replay.online import OnlineQueue, has_finished_window
from worldloom.training.config import TrainingConfig
from worldloom.training.mixed_replay import MixedReplay

_log = logging.getLogger("worldloom")


class SequenceSampler:
    """Samples the batches of an algorithm's ``ReplaySpec``; batch n is a function of (seed, n, replay content).

    If the buffer stores the latents of the ``ReplaySpec``, each window starts from the stored latents of its first row.
    Otherwise (an ordinary dataset) it starts from the initial latent.

    Args:
      buffer: a :class:`~worldloom.replay.ReplayBuffer`, or an object with the same ``sample`` method.
      model: the world model to train.
      config: batch size and sequence length.
      allow_empty: whether the buffer may still be empty, as in online training.

    Attributes:
      buffer: see above.
      batch_size: windows per batch.
      rows: rows per window.
      uses_latents: whether windows start from stored latents, and fresh latents are written back.
      on_device: the copy of the rows on the device, a :class:`~worldloom.replay.device.DeviceReplay`, or whatever else
        writes latents back; None without one.

    Raises:
      DataError: the buffer is empty or holds data that the model cannot train on.
      TypeError: ``buffer`` has no ``sample`` method.
    """

    def __init__(self, buffer: Any, model: Any, config: TrainingConfig, *, allow_empty: bool = False):
        mixed = isinstance(buffer, MixedReplay)
        if not mixed and not callable(getattr(buffer, "sample", None)):
            raise TypeError(
                "A ReplayBuffer is expected as the source of data, or environments (an id, a function, what make_env "
                f"returns), not an object of type {type(buffer).__name__}."
            )
        if not len(buffer) and not allow_empty:
            raise DataError("The buffer is empty; add episodes first.")
        if hasattr(buffer, "match") and (len(buffer) or mixed):
            shapes = {"obs_shape": model.config.obs_shape, "action_dim": model.config.action_dim}
            buffer.match(**shapes, action_type=getattr(model.config, "action_type", None))
        has_terminals = bool(getattr(buffer, "has_terminals", False))
        model.algorithm.validate_data(model.config, has_terminals=has_terminals, online=False)
        spec = model.algorithm.replay_spec(model.config, config)
        stored = getattr(buffer, "latents", {})
        self.uses_latents = bool(spec.latents) and all(stored.get(k) == tuple(s) for k, s in spec.latents.items())
        self._latent_dtype = jnp.dtype(config.latent_dtype)
        # Context rows precede the rows that gradients flow through; without stored latents there is no context.
        self.rows = spec.rows if self.uses_latents or not spec.latents else config.sequence_length
        self.buffer, self.batch_size, self._cross_episodes = buffer, config.batch_size, spec.cross_episodes
        # Recorded data are drawn as they are. So is what a buffer with its own way of sampling draws.
        self._chooses_rows = allow_empty and (mixed or supports_device_storage(buffer))
        self._finished, self._fresh_first = not spec.open_episodes, spec.fresh_first
        self._checked = False
        self._tasks = model.config.num_tasks if getattr(model.config, "multitask", False) else 0
        self.on_device: Any = None
        shapes = model.config.obs_shape
        self._shapes = list(shapes.values()) if isinstance(shapes, Mapping) else [shapes]

    @property
    def rows_under_gradient(self) -> int:
        """Rows per window that gradients flow through: all but the context row."""
        return self.rows - self.uses_latents

    @property
    def ring(self) -> Ring | None:
        """The arrays of :attr:`on_device`."""
        return None if self.on_device is None else self.on_device.ring

    def sample(
        self, seed: int, update: int, queue: OnlineQueue | None = None, windows: np.ndarray | None = None
    ) -> tuple[dict[str, Any], np.ndarray | None]:
        """Batch number ``update``, [B, T, ...], and its row numbers [B, T] (None if the buffer does not number rows).

        The batch lacks the observations and latents that :attr:`on_device` holds; see :meth:`attach_slots`. Windows of
        ``queue``, if the algorithm replays fresh rows first, take the first places; its position is part of the content
        that the batch is a function of. With ``windows`` [W], the batch holds only those of its windows, in that order;
        the row numbers are still those of all.
        """
        options: dict[str, Any] = {"seed": seed, "update": update, "cross_episodes": self._cross_episodes}
        divided = windows is not None and supports_device_storage(self.buffer)
        if self.on_device is not None or self._chooses_rows or divided:
            finished = {"finished": True} if self._finished and self._chooses_rows else {}
            if finished and not self._checked:
                self._check_finished()
            ids = self.buffer.draw(self.batch_size, self.rows, **options, **finished)
            if queue is not None and self._fresh_first and self._chooses_rows:
                fresh = queue.pop(self._collected, self._fresh_places(update), self.rows)
                ids[: len(fresh)] = fresh
            on_host = self.on_device is None
            taken = ids if windows is None else ids[windows]
            batch = self.buffer.take(taken, observations=on_host, latents=self.uses_latents and on_host)
            del batch["row_ids"]
            self._check_tasks(batch)
            return batch, ids
        batch = self.buffer.sample(self.batch_size, self.rows, **options, latents=self.uses_latents)
        if "is_terminal" in batch:
            batch.pop("continues", None)  # It says the same.
        ids = batch.pop("row_ids", None)
        self._check_tasks(batch)
        return batch if windows is None else jax.tree.map(lambda x: x[windows], batch), ids

    def _check_tasks(self, batch: Mapping[str, Any]) -> None:
        """Raise ``DataError`` for a task that the model does not have: compiled code would take its last one."""
        if self._tasks and "task" in batch and not 0 <= np.min(batch["task"]) <= np.max(batch["task"]) < self._tasks:
            wrong = next(int(task) for task in np.ravel(batch["task"]) if not 0 <= task < self._tasks)
            raise DataError(f"The data hold task {wrong}; the model has the tasks 0 … {self._tasks - 1} (num_tasks).")

    @property
    def _collected(self) -> Any:
        """The buffer that rows are collected into."""
        return self.buffer.collected if isinstance(self.buffer, MixedReplay) else self.buffer

    def _fresh_places(self, update: int) -> int:
        """Windows of a batch that may be fresh ones: all but those of recorded data."""
        mixed = isinstance(self.buffer, MixedReplay)
        return self.buffer.fresh_places(self.batch_size, update) if mixed else self.batch_size

    def check_window(self, seed: int, update: int) -> None:
        """Raise ``DataError`` unless there is a window for batch number ``update``."""
        if self._finished and self._chooses_rows and not self._checked:
            self._check_finished()
        self.buffer.draw(self.batch_size, self.rows, seed=seed, update=update, cross_episodes=self._cross_episodes)

    def _check_finished(self) -> None:
        """Say once if an episode in progress must be replayed, because no finished one is long enough."""
        self._checked = True
        if not has_finished_window(self._collected, self.rows, cross_episodes=self._cross_episodes):
            _log.warning(
                "No finished episode has the %d rows of a window yet: those in progress are replayed until then. A "
                "larger prefill collects whole episodes first.",
                self.rows,
            )

    def attach_slots(self, batches: dict[str, Any], row_ids: list[Any], capacity: int) -> dict[str, Any]:
        """``batches`` [capacity, B, T, ...] plus the slots of their rows in :attr:`ring`, if rows are on the device."""
        if self.on_device is None:
            return batches
        return batches | {SLOTS: self.on_device.slots(row_ids, capacity)}

    def write_back(self) -> None:
        """Copy the latents on the device to the buffer before it is saved or read."""
        if self.on_device is not None and self.uses_latents:
            self.on_device.write_back()

    def bytes_on_device(self, *, growing: bool) -> float:
        """Memory in bytes that :meth:`to_device` would allocate; infinite if the buffer does not support it."""
        if not supports_device_storage(self.buffer):
            return math.inf
        # Images have three axes and stay uint8; everything else is float32.
        row_bytes = sum(math.prod(shape) * (1 if len(shape) == 3 else 4) for shape in self._shapes)
        latents = self.buffer.latents.values() if self.uses_latents else ()
        row_bytes += sum(self._latent_dtype.itemsize * math.prod(shape) for shape in latents)
        return row_bytes * (self.buffer.capacity if growing else len(self.buffer))

    def choose_storage(self, storage: str, device: jax.Device, *, growing: bool) -> None:
        """Copy rows to ``device`` if ``storage`` says so or, with "auto", if half of its free memory suffices."""
        if storage == "auto":
            memory = device.memory_stats() if device.platform != "cpu" else None
            free = memory["bytes_limit"] - memory["bytes_in_use"] if memory and "bytes_limit" in memory else 0
            storage = "device" if self.bytes_on_device(growing=growing) <= free / 2 else "host"
        if storage == "device":
            self.to_device(device, growing=growing)

    def to_device(self, device: jax.Device, *, growing: bool) -> None:
        """Keep a copy of observations and latents on ``device`` while training runs.

        Args:
          device: the device.
          growing: whether rows will be added, up to the buffer's capacity.
        """
        capacity = self.buffer.capacity if growing else len(self.buffer)
        latents = self._latent_dtype if self.uses_latents else None
        self.on_device = DeviceReplay(self.buffer, latents=latents, device=device, capacity=capacity)
