"""What rewards a run has met: whether there was anything to learn from that random actions had not found already."""

from __future__ import annotations

import dataclasses
from statistics import fmean, median, pstdev
from typing import Any

import numpy as np

_SAME = 1e-3
"""Part of the range of the prefill's rewards by which a reward must exceed them to count as larger."""
_RARE = 3.0
"""Standard deviations above the mean from which the best reward of the prefill is a rare event, such as a goal."""
_EPISODES = 10
"""Number of first episodes, and of newest ones, that are compared; before there are so many, nothing is said."""
_CHANCE, _CONSTANT = 1.5, 0.1
"""Multiples of the spread by chance up to which returns differ by chance alone, or hardly differ at all."""
_EQUAL = 1e-3
"""Relative difference up to which two returns of equal rewards are of equally long episodes."""
_OTHERWISE = 1.5
"""Ratio from which the lengths of episodes are other ones."""
_ALL = 0.05
"""Part of the way from the mean reward of the prefill to its best one that may be missing from having all of it."""


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
      least: smallest reward after the prefill; None until then.
      worst: smallest return of an episode; None before the first end.
      best: largest return of an episode; None before the first end.
      origin: number near the rewards of the prefill, from which deviations are summed: the first of them; None before.
      total: sum of their deviations from it, ``mean = origin + total / steps``.
      squares: sum of the squares of these deviations, ``spread = squares − total² / steps``.
      lengths: lengths of the first episodes.
      recent: the newest returns.
      recent_lengths: and lengths of these episodes.
    """

    steps: int = 0
    mean: float = 0.0
    spread: float = 0.0
    low: float | None = None
    high: float | None = None
    since: float | None = None
    least: float | None = None
    worst: float | None = None
    best: float | None = None
    origin: float | None = None
    total: float = 0.0
    squares: float = 0.0
    lengths: list[int] = dataclasses.field(default_factory=list)
    recent: list[float] = dataclasses.field(default_factory=list)
    recent_lengths: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.steps and self.origin is None:
            # Checkpoints of earlier versions hold no sums: deviations from the mean sum to 0.
            self.origin, self.total, self.squares = self.mean, 0.0, self.spread
        if self.least is None:
            self.least = self.since

    def add_rewards(self, rewards: np.ndarray, *, prefill: bool) -> None:
        """Add the rewards [N] of one or several steps of the environments.

        The numbers do not depend on how rewards are divided into calls.
        """
        if len(rewards) == 0:
            return
        lowest, highest = float(rewards.min()), float(rewards.max())
        if not prefill:
            self.since = highest if self.since is None else max(self.since, highest)
            self.least = lowest if self.least is None else min(self.least, lowest)
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

    def add_return(self, value: float, length: int) -> None:
        """Add the return of a whole episode of ``length`` steps."""
        self.worst = value if self.worst is None else min(self.worst, value)
        self.best = value if self.best is None else max(self.best, value)
        if len(self.lengths) < _EPISODES:
            self.lengths = [*self.lengths, length]
        self.recent = [*self.recent, value][-_EPISODES:]
        self.recent_lengths = [*self.recent_lengths, length][-_EPISODES:]

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON values."""
        return dataclasses.asdict(self)

    def nothing_new(self) -> str | None:
        """A sentence if the run has met no reward that the prefill had not, else None.

        No step since the prefill has paid more than its best step. In many tasks that says nothing: every step of
        CartPole pays 1, and a pendulum that begins upright meets the best reward at once. So nothing is said

        - before ten episodes are over, unless every reward was 0;
        - where the best reward has been met again and is worth having: it is positive, or was a rare event in the
          prefill, such as a goal;
        - where returns show that there is something to learn: they differ by more than sums of the prefill's rewards do
          by chance, or are better than those of the prefill. Where they are better because every step now pays the best
          reward of the prefill, which is not positive, and episodes last as long as before, there are two readings:
          the task is solved, or what was learned is to do nothing.
        """
        if self.low is None or self.high is None or self.since is None or self.least is None:
            return None
        if self.low == self.high == self.since == self.least:
            return self._all_alike(self.since)
        noise = _SAME * (self.high - self.low)
        again = self.since >= self.high - noise
        rare = self.high - self.mean > _RARE * (self.spread / self.steps) ** 0.5
        if self.since > self.high + noise or (again and (rare or self.high > 0)):
            return None
        if not self._enough:
            return None
        length, newest = fmean(self.lengths), fmean(self.recent)
        met = (
            f"No step since the prefill has paid more than the best step of it ({self.since:.4g}, prefill "
            f"{self.high:.4g}), and the newest {_EPISODES} episodes have returned {newest:.4g} on average, "
            f"where {length:.0f} steps of the prefill paid {self.mean * length:.4g}. "
        )
        if self._all_of_it(self.high):
            if self._last_otherwise:
                return None
            return (
                f"{met}Nearly every step pays that best reward now. If the task has no better one (no error, nothing "
                f"hit), it is solved; if it pays more at a goal, the agent has learned to do nothing. {_ADVICE}"
            )
        if self._no_better(self.high, again=again):
            return f"{met}If the task pays more at its goal, the agent has not seen it. {_ADVICE}"
        return None

    @property
    def _enough(self) -> bool:
        """Whether enough episodes are over to compare their returns."""
        return len(self.lengths) == len(self.recent) == _EPISODES

    @property
    def _last_otherwise(self) -> bool:
        """Whether the newest episodes are much longer or shorter than the first: their end was learned."""
        if not self.recent_lengths:  # Checkpoints of earlier versions know none.
            return False
        ratio = fmean(self.recent_lengths) / fmean(self.lengths)
        return not 1 / _OTHERWISE < ratio < _OTHERWISE

    def _all_alike(self, reward: float) -> str | None:
        """What to say where every step has paid ``reward``."""
        if reward == 0:
            return f"Every step so far has paid 0: there was nothing to learn from. {_ADVICE}"
        if not self._enough:
            return None
        # The length of an episode tells good from bad, if it ever changes. A single other one shows too little.
        usual = median(self.recent)
        for returns in (self.recent, [reward * length for length in self.lengths]):
            if sum(abs(value - usual) > _EQUAL * abs(usual) for value in returns) > 1:
                return None
        others = "" if self.worst == self.best else f", with few exceptions (from {self.worst:.4g} to {self.best:.4g})"
        return (
            f"Every step so far has paid {reward:.4g} and every episode has returned {usual:.4g}{others}: there was "
            f"nothing to learn from. {_ADVICE}"
        )

    def _no_better(self, high: float, *, again: bool) -> bool:
        """Whether the newest returns are no better than those of the prefill, and differ by chance alone.

        Rewards that depend on the state of the world are alike in successive steps, so that the returns of episodes
        differ by far more than sums of independent draws do. Those that are only the price of an action do not.

        Args:
          high: the best reward of the prefill.
          again: whether it has been met again, and so is the best there is in ordinary steps. Where it was one of those
            that a task has ever better ones of, only returns that hardly differ are conspicuous.
        """
        length = fmean(self.lengths)
        chance = (self.spread / self.steps * length) ** 0.5
        if fmean(self.recent) > self.mean * length + chance:
            return False
        return self.low == high or pstdev(self.recent) <= (_CHANCE if again else _CONSTANT) * chance

    def _all_of_it(self, high: float) -> bool:
        """Whether all the newest returns but one are those of the best reward of the prefill, ``high``, at every step.

        Where none of them is positive, that is what an agent gets that has learned to do nothing.
        """
        length = fmean(self.lengths)
        limit = _ALL * (high - self.mean) * length
        return high <= 0 and sum(abs(high * length - value) > limit for value in self.recent) <= 1


_ADVICE = "Try prefill_policy='correlated', a longer prefill or more environments."


def _add_in_order(start: float, values: np.ndarray) -> float:
    """``start`` plus ``values`` [N], added one after the other; ``np.sum`` would add in pairs."""
    return float(np.add.accumulate(np.concatenate([[start], values]))[-1])
