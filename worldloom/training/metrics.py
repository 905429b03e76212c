"""Metrics on their way from the device: accumulated per callback, fetched late, named for the logs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from worldloom.errors import NonFiniteError

IN_FLIGHT = 2
"""Compiled calls that may be under way: one runs, one waits, so the device never does."""


class MetricsAccumulator:
    """Metrics of the updates after ``start`` up to and including ``end`` (None: still open).

    Rows are added one by one in float64, so a mean does not depend on how many updates a call had or where a run was
    interrupted. Values that are not finite are left out of the means.
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
        twin = MetricsAccumulator(self.start)
        twin.total, twin.count, twin.last, twin.seen = self.total.copy(), self.count.copy(), self.last, self.seen
        twin._began, twin._rows = self._began, self._rows
        twin.close(end)
        return twin

    def means(self) -> np.ndarray:
        """Mean of each metric [M], NaN for one that was never finite."""
        return np.where(self.count > 0, self.total / np.maximum(self.count, 1), np.nan)

    def rate(self) -> float:
        """Updates per second, of those that were done in this process."""
        elapsed = (self._ended or time.perf_counter()) - self._began
        return self._rows / elapsed if self._rows and elapsed > 0 else 0.0

    def restart_clock(self) -> None:
        """Leave the time between two calls of ``train`` out of the rate."""
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
    """Rows of metrics in flight from the device, added in order to the accumulators that follow.

    Attributes:
      names: metric names in the order of the rows; empty before :meth:`open`.
      last: the newest row that has arrived, with its step.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.last: tuple[int, np.ndarray] | None = None
        self._guarded: list[int] = []
        self._pending: deque[tuple[int, int, jax.Array]] = deque()
        self._accumulators: list[MetricsAccumulator] = []

    def open(self, names: tuple[str, ...], guarded: tuple[int, ...]) -> None:
        """Rows with these names are about to come; those at the positions ``guarded`` must be finite."""
        self.names, self._guarded = names, list(guarded)
        for accumulator in self._accumulators:
            accumulator.restart_clock()

    def follow(self, accumulator: MetricsAccumulator) -> MetricsAccumulator:
        """Add rows to ``accumulator`` from now on, until it is complete."""
        if not accumulator.complete:
            self._accumulators.append(accumulator)
        return accumulator

    def add(self, step: int, count: int, rows: jax.Array) -> None:
        """Note that ``count`` updates after ``step`` were started; waits until at most ``IN_FLIGHT`` calls are.

        Raises ``NonFiniteError`` when a loss or gradient that has arrived is not finite.
        """
        self._pending.append((step, count, rows))
        self._receive(IN_FLIGHT)

    def sync(self) -> None:
        """Wait for everything in flight. Raises as :meth:`add`."""
        self._receive(0)

    def _receive(self, leave: int) -> None:
        while len(self._pending) > leave:
            step, count, device_rows = self._pending.popleft()
            rows = np.asarray(device_rows)[:count].astype(np.float64)
            self._check(step, rows)
            for number, row in enumerate(rows, step + 1):
                for accumulator in self._accumulators:
                    accumulator.add(number, row)
            self.last = step + count, rows[-1]
            self._accumulators = [accumulator for accumulator in self._accumulators if not accumulator.complete]

    def _check(self, step: int, rows: np.ndarray) -> None:
        if np.isfinite(rows[:, self._guarded]).all():
            return
        self._pending.clear()
        index = int(np.argmin(np.isfinite(rows[:, self._guarded]).all(axis=1)))
        wrong = {self.names[i]: rows[index, i] for i in self._guarded if not np.isfinite(rows[index, i])}
        # The total says nothing that its terms do not say better.
        culprits = [name for name in wrong if name != "loss"] or ["loss"]
        listed = ", ".join(f"{name} = {wrong[name]}" for name in culprits)
        raise NonFiniteError(f"Step {step + index + 1}: {listed}; the update was not applied.")


class LazyMetrics(Mapping[str, float]):
    """Metrics by name, fetched from the device when the first one is read.

    Args:
      stream: where the rows arrive.
      accumulator: the updates meant.
      mean: their mean, or else the values of the last of them.
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
