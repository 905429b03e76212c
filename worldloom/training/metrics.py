"""Metrics of updates: fetched from the device asynchronously, accumulated for each callback, named for logs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from worldloom.errors import NonFiniteError

IN_FLIGHT = 2
"""Maximum number of compiled calls in flight: one running and one queued, so that the device is never idle."""


class MetricsAccumulator:
    """Sums and counts of the metrics of updates ``start`` + 1 to ``end`` (None while open).

    Rows are added one by one in float64, so a mean does not depend on how updates are grouped into calls or where a run
    was interrupted. Non-finite values are excluded from the means.

    Attributes:
      total: sums of the finite values, float64 [M].
      count: number of finite values, int64 [M].
      last: metrics of the newest update added, [M]; None if there is none.
      seen: number of the newest update added.
    """

    def __init__(self, start: int):
        self.start = start
        self.end: int | None = None
        self.total: np.ndarray = np.zeros(0)
        self.count: np.ndarray = np.zeros(0, np.int64)
        self.last: np.ndarray | None = None
        self.seen = start
        self._began, self._rows = time.perf_counter(), 0
        self._ended: float | None = None

    @property
    def complete(self) -> bool:
        """Whether all updates up to ``end`` have been added."""
        return self.end is not None and self.seen >= self.end

    def add(self, step: int, row: np.ndarray) -> None:
        """Add the metrics ``row`` [M] of update number ``step`` if it is in range and new."""
        if step <= self.seen or (self.end is not None and step > self.end):
            return
        if not len(self.total):
            self.total, self.count = np.zeros(len(row)), np.zeros(len(row), np.int64)
        finite = np.isfinite(row)
        self.total += np.where(finite, row, 0.0)
        self.count += finite
        self.last, self.seen, self._rows = row, step, self._rows + 1
        if self.complete:
            self._ended = time.perf_counter()

    def close(self, end: int) -> None:
        """Make update ``end`` the last one."""
        self.end = end
        if self.complete:
            self._ended = time.perf_counter()

    def closed_copy(self, end: int) -> MetricsAccumulator:
        """A copy closed at ``end``; this one stays open."""
        copied = MetricsAccumulator(self.start)
        copied.total, copied.count = self.total.copy(), self.count.copy()
        copied.last, copied.seen = self.last, self.seen
        copied._began, copied._rows = self._began, self._rows
        copied.close(end)
        return copied

    def means(self) -> np.ndarray:
        """Mean of each metric [M], NaN for one that was never finite."""
        return np.where(self.count > 0, self.total / np.maximum(self.count, 1), np.nan)

    def rate(self) -> float:
        """Updates per second, of the updates done in this process."""
        elapsed = (self._ended or time.perf_counter()) - self._began
        return self._rows / elapsed if self._rows and elapsed > 0 else 0.0

    def restart_clock(self) -> None:
        """Exclude the time between two calls of ``train`` from the rate."""
        self._began, self._rows = time.perf_counter(), 0

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "start": self.start,
            "seen": self.seen,
            "total": self.total.tolist(),
            "count": self.count.tolist(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> MetricsAccumulator:
        """Inverse of :meth:`state_dict`."""
        accumulator = cls(state["start"])
        accumulator.seen = state["seen"]
        accumulator.total, accumulator.count = np.array(state["total"], float), np.array(state["count"], np.int64)
        return accumulator


class MetricsStream:
    """Queue of metrics that the device is still computing; adds them in order to the registered accumulators.

    Attributes:
      names: metric names in the order of the rows [M]; empty before :meth:`open`.
      last: the newest row that was fetched, [M], with its step.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.last: tuple[int, np.ndarray] | None = None
        self._guarded: list[int] = []
        self._pending: deque[tuple[int, int, jax.Array]] = deque()
        self._accumulators: list[MetricsAccumulator] = []

    def open(self, names: tuple[str, ...], guarded: tuple[int, ...]) -> None:
        """Set the names of the rows' metrics; those at the positions ``guarded`` must be finite."""
        self.names, self._guarded = names, list(guarded)
        for accumulator in self._accumulators:
            accumulator.restart_clock()

    def register(self, accumulator: MetricsAccumulator) -> MetricsAccumulator:
        """Add the rows fetched from now on to ``accumulator``, until it is complete; returns it."""
        if not accumulator.complete:
            self._accumulators.append(accumulator)
        return accumulator

    def add(self, step: int, count: int, rows: jax.Array) -> None:
        """Queue the metrics ``rows`` [K, M] of ``count`` updates after ``step``; waits if too many calls are in flight.

        Raises ``NonFiniteError`` if a fetched loss or gradient norm is not finite.
        """
        self._pending.append((step, count, rows))
        self._fetch(IN_FLIGHT)

    def sync(self) -> None:
        """Wait for all calls in flight. Raises as :meth:`add`."""
        self._fetch(0)

    def _fetch(self, max_pending: int) -> None:
        while len(self._pending) > max_pending:
            step, count, device_rows = self._pending.popleft()
            rows = np.asarray(device_rows)[:count].astype(np.float64)
            self._check_finite(step, rows)
            for number, row in enumerate(rows, step + 1):
                for accumulator in self._accumulators:
                    accumulator.add(number, row)
            self.last = step + count, rows[-1]
            self._accumulators = [accumulator for accumulator in self._accumulators if not accumulator.complete]

    def _check_finite(self, step: int, rows: np.ndarray) -> None:
        if np.isfinite(rows[:, self._guarded]).all():
            return
        self._pending.clear()
        # The first non-finite update, and the terms that caused it: the total is not finite because a term is not.
        index = int(np.argmin(np.isfinite(rows[:, self._guarded]).all(axis=1)))
        nonfinite = {self.names[i]: rows[index, i] for i in self._guarded if not np.isfinite(rows[index, i])}
        causes = [name for name in nonfinite if name != "loss"] or ["loss"]
        listed = ", ".join(f"{name} = {nonfinite[name]}" for name in causes)
        raise NonFiniteError(f"Step {step + index + 1}: {listed}; the update was not applied.")


class LazyMetrics(Mapping[str, float]):
    """Metrics by name, fetched from the device when the first one is read.

    Args:
      stream: the stream that ``accumulator`` is registered with.
      accumulator: accumulates the updates in question.
      mean: whether to return their mean instead of the last update's values.
    """

    def __init__(self, stream: MetricsStream, accumulator: MetricsAccumulator, *, mean: bool):
        self._stream, self._accumulator, self._mean = stream, accumulator, mean
        self._values: dict[str, float] | None = None

    def _fetch(self) -> dict[str, float]:
        if self._values is None:
            self._values = self._read()
        return self._values

    def _read(self) -> dict[str, float]:
        if not self._stream.names:
            return {}
        self._stream.sync()
        row: np.ndarray | None = self._accumulator.means() if self._mean else self._accumulator.last
        # An accumulator that begins at its own end has no rows; the stream still holds that update's.
        newest = self._stream.last
        if not self._mean and row is None and newest and newest[0] == self._accumulator.end:
            row = newest[1]
        if row is None or not len(row):
            return {}
        return dict(zip(self._stream.names, row.tolist(), strict=True))

    def __getitem__(self, name: str) -> float:
        return self._fetch()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fetch())

    def __len__(self) -> int:
        return len(self._fetch())

    def __repr__(self) -> str:
        return repr(self._fetch())


def tag(name: str, loss_terms: tuple[str, ...], prefix: str = "train") -> str:
    """Name of a metric in TensorBoard and JSONL: ``train/loss``, ``train/loss/<term>`` or ``train/<name>``."""
    return f"{prefix}/loss/{name}" if name in loss_terms and name != "loss" else f"{prefix}/{name}"
