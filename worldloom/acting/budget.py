"""The largest plan within a time limit."""

from __future__ import annotations

from collections.abc import Callable


def largest_plan(measure: Callable[[int], float], count: int, max_ms: float) -> tuple[int | None, float]:
    """The first of ``count`` plans, in order of decreasing work, that takes at most ``max_ms``.

    Time falls with work, so the order is bisected: about log₂(count) plans are compiled and timed.

    Args:
      measure: number of a plan → milliseconds.
      count: how many there are, at least 1.
      max_ms: the limit.

    Returns:
      The number of the plan and its milliseconds; None, and those of the last plan, if even that takes longer.
    """
    ms = measure(0)
    if ms <= max_ms or count == 1:
        return (0 if ms <= max_ms else None), ms
    # The first of all is too slow. From here on `slow` is a plan that is too slow, `fast` a later one that is not.
    best = measure(count - 1)
    if best > max_ms:
        return None, best
    slow, fast = 0, count - 1
    while fast - slow > 1:
        middle = (slow + fast) // 2
        ms = measure(middle)
        if ms <= max_ms:
            fast, best = middle, ms
        else:
            slow = middle
    return fast, best
