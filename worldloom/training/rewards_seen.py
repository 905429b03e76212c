"""What rewards a run has met: whether there was anything to learn from that random actions had not found already."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

_SAME = 1e-3
"""Part of the range of the prefill's rewards by which a reward must exceed them to count as larger."""
_RARE = 3.0
"""Standard deviations above the mean from which the best reward of the prefill is a rare event, such as a goal."""
_RECENT, _VARIED = 10, 0.1
"""Number of newest returns, and the part of the range of all returns from which these still differ."""


@dataclasses.dataclass
class RewardsSeen:
    """Statistics of the rewards of single steps, in the prefill and since, and of the returns of whole episodes.

    Attributes:
      steps: steps of the prefill.
      mean: mean of their rewards.
      spread: sum of their squared deviations from it.
      low: smallest of them; None before the first step.
      high: largest of them; None before the first step.
      since: largest reward after the prefill; None until then.
      worst: smallest return of an episode; None before the first end.
      best: largest return of an episode; None before the first end.
      origin: number near the rewards of the prefill, from which deviations are summed: the first of them; None before.
      total: sum of their deviations from it, ``mean = origin + total / steps``.
      squares: sum of the squares of these deviations, ``spread = squares − total² / steps``.
      recent: the newest returns.
    """

    steps: int = 0
    mean: float = 0.0
    spread: float = 0.0
    low: float | None = None
    high: float | None = None
    since: float | None = None
    worst: float | None = None
    best: float | None = None
    origin: float | None = None
    total: float = 0.0
    squares: float = 0.0
    recent: list[float] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.steps and self.origin is None:
            # Checkpoints of earlier versions hold no sums: deviations from the mean sum to 0.
            self.origin, self.total, self.squares = self.mean, 0.0, self.spread

    def add_rewards(self, rewards: np.ndarray, *, prefill: bool) -> None:
        """Add the rewards [N] of one or several steps of the environments.

        The numbers do not depend on how rewards are divided into calls.
        """
        if len(rewards) == 0:
            return
        lowest, highest = float(rewards.min()), float(rewards.max())
        if not prefill:
            self.since = highest if self.since is None else max(self.since, highest)
            return
        if self.low is None or self.high is None or self.origin is None:
            self.low, self.high, self.origin = lowest, highest, float(rewards[0])
        self.low, self.high = min(self.low, lowest), max(self.high, highest)
        deviations = rewards.astype(np.float64) - self.origin
        self.steps += len(rewards)
        self.total = _add_in_order(self.total, deviations)
        self.squares = _add_in_order(self.squares, deviations * deviations)
        self.mean = self.origin + self.total / self.steps
        self.spread = max(0.0, self.squares - self.total**2 / self.steps)

    def add_return(self, value: float) -> None:
        """Add the return of a whole episode."""
        self.worst = value if self.worst is None else min(self.worst, value)
        self.best = value if self.best is None else max(self.best, value)
        self.recent = [*self.recent, value][-_RECENT:]

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON values."""
        return dataclasses.asdict(self)

    def nothing_new(self) -> str | None:
        """A sentence if the run has met no reward that the prefill had not, else None.

        Nothing is said where the best reward of the prefill is a rare event: the goal has been met then. Where every
        step pays the same, episodes must differ in length. While returns differ from episode to episode, the agent has
        a task: a pendulum that begins upright by chance meets the best reward at once. One that has learned to do
        nothing gets the same again and again.
        """
        if self.low is None or self.high is None or self.since is None:
            return None
        if self.low == self.high == self.since:
            if self.worst is None or self.worst != self.best:
                return None
            return (
                f"Every step so far has paid {self.since:.4g} and every episode has returned {self.best:.4g}: there "
                f"was nothing to learn from. {_ADVICE}"
            )
        rare = self.high - self.mean > _RARE * (self.spread / self.steps) ** 0.5
        if rare or self._varied() or self.since > self.high + _SAME * (self.high - self.low):
            return None
        return (
            f"No step since the prefill has paid more than the best step of it ({self.since:.4g}, prefill "
            f"{self.high:.4g}). If the task pays more at its goal, the agent has not seen it. {_ADVICE}"
        )

    def _varied(self) -> bool:
        """Whether the newest returns differ, compared with the range of all returns."""
        if len(self.recent) < _RECENT or self.best is None or self.worst is None:
            return False
        return max(self.recent) - min(self.recent) > _VARIED * (self.best - self.worst)


_ADVICE = "Try prefill_policy='correlated', a longer prefill or more environments."


def _add_in_order(start: float, values: np.ndarray) -> float:
    """``start`` plus ``values`` [N], added one after the other; ``np.sum`` would add in pairs."""
    return float(np.add.accumulate(np.concatenate([[start], values]))[-1])
