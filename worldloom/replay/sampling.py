"""Random windows of rows, as a pure function of seed, update and the rows held."""

from __future__ import annotations

import numpy as np

from worldloom.errors import ConfigError, DataError
from worldloom.replay.index import EpisodeIndex, Segments
from worldloom.replay.schema import integer


def draw_windows(
    index: EpisodeIndex,
    batch_size: int,
    sequence_length: int,
    *,
    seed: int,
    update: int,
    cross_episodes: bool,
    finished: bool = False,
) -> np.ndarray:
    """Row numbers of random windows, int64 [B, T]; see ``ReplayBuffer.draw``.

    Raises:
      DataError: no episode (with ``cross_episodes``: no stream) is long enough for such a window.
    """
    size, rows = integer(batch_size, "batch_size", 1), integer(sequence_length, "sequence_length", 1)
    segments, fitting = fitting_segments(index, rows, cross_episodes, finished=finished)
    if finished and len(fitting) == 0:
        segments, fitting = fitting_segments(index, rows, cross_episodes, finished=False)
    if len(fitting) == 0:
        raise DataError(too_short(rows, cross_episodes, int(segments.length.max(initial=0))))
    chosen, start = WindowTable(segments, rows, cross_episodes, fitting).draw(size, seed=seed, update=update)
    return index.rows(segments.stream[chosen], segments.begin[chosen] + start, rows)


class WindowTable:
    """The windows of ``rows`` rows in some segments, to draw from.

    Args:
      segments: episodes, or with ``cross_episodes`` streams.
      rows: rows per window.
      cross_episodes: whether every window is equally likely; else every segment is that is long enough.
      fitting: which segments [F] are long enough; None finds them.
    """

    def __init__(self, segments: Segments, rows: int, cross_episodes: bool, fitting: np.ndarray | None = None):
        rows = integer(rows, "sequence_length", 1)
        self._fitting = np.flatnonzero(segments.length >= rows) if fitting is None else fitting
        self._starts = segments.length[self._fitting] - rows + 1
        self._total = np.cumsum(self._starts) if cross_episodes else None

    def __len__(self) -> int:
        """Segments that are long enough."""
        return len(self._fitting)

    def draw(self, batch_size: int, *, seed: int, update: int) -> tuple[np.ndarray, np.ndarray]:
        """Number of a segment and start in it, int64 [B] each; a pure function of the arguments."""
        size = (2, integer(batch_size, "batch_size", 1))
        # Two numbers per window, of which windows across episodes need only the first.
        u1, u2 = uniform(integer(seed, "seed", 0), integer(update, "update", 0), size)
        starts, total = self._starts, self._total
        if total is not None:
            # Uniform over all windows: number them through, then find the segment of each and the start in it.
            window = np.floor(u1 * total[-1]).astype(np.int64)
            segment = np.searchsorted(total, window, side="right")
            start = window - (total[segment] - starts[segment])
        else:
            # Uniform over segments, then over the starts in the segment.
            segment = np.floor(u1 * len(starts)).astype(np.int64)
            start = np.floor(u2 * starts[segment]).astype(np.int64)
        return self._fitting[segment], start


def fitting_segments(
    index: EpisodeIndex, rows: int, cross_episodes: bool, *, finished: bool
) -> tuple[Segments, np.ndarray]:
    """Episodes, or with ``cross_episodes`` streams, and which of them [F] are at least ``rows`` long."""
    if cross_episodes:
        segments = index.streams(finished=finished)
    else:
        segments = index.finished_episodes() if finished else index.episodes()
    return segments, np.flatnonzero(segments.length >= rows)


def draw_held_out(episodes: int, fraction: float, *, seed: int) -> set[int]:
    """A random ``fraction`` of the numbers ``0 … episodes - 1``; at least one, and not all.

    Raises:
      ConfigError: ``fraction`` is not between 0 and 1.
      DataError: there are fewer than two episodes.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"fraction must lie between 0 and 1, not {fraction!r}.")
    if episodes < 2:
        raise DataError(f"{episodes} episode(s) cannot be split; two at least are needed.")
    count = min(max(round(fraction * episodes), 1), episodes - 1)
    shuffled = np.argsort(uniform(integer(seed, "seed", 0), 0, (episodes,)), kind="stable")
    return set(shuffled[:count].tolist())


def uniform(seed: int, update: int, size: tuple[int, ...]) -> np.ndarray:
    """Numbers in [0, 1), float64 of shape ``size``, the same for the same ``seed`` and ``update`` on every machine.

    Computed from raw Philox bits, which NumPy keeps the same between versions, unlike its distributions.
    """
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(update,))).random_raw(int(np.prod(size)))
    return (bits >> np.uint64(11)).reshape(size) * 2.0**-53


def too_short(rows: int, cross_episodes: bool, longest: int) -> str:
    """Why there is no window of ``rows`` rows, and what to do."""
    if longest == 0:
        return "The buffer is empty; add episodes before sampling."
    what = "stream" if cross_episodes else "episode"
    hint = "" if cross_episodes else ", or let windows cross episodes if the algorithm does (cross_episodes=True)"
    return (
        f"A window needs {rows} rows; the longest {what} held has {longest}. Use sequence_length ≤ {longest}, add "
        f"longer episodes{hint}."
    )
