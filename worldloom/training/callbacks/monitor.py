"""The metric by which checkpoints and early stopping compare steps."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NoReturn

from worldloom.config import nearest
from worldloom.errors import ConfigError
from worldloom.training.callbacks.base import StepInfo
from worldloom.training.metrics import tag

_HIGHER_IS_BETTER = re.compile(r"return|score|success|accuracy|length")


class Monitor:
    """Reads one metric by name and compares its values.

    Args:
      name: a training metric (``loss``, ``reward``, or by its tag ``train/loss/reward``) or a published measurement
        (``eval/loss``).
      mode: ``"min"``, ``"max"``, or ``"auto"``: max for names of returns, scores, successes, accuracies and lengths.
    """

    def __init__(self, name: str, mode: str = "min"):
        if not isinstance(name, str) or not name:
            raise ConfigError(f"monitor must be the name of a metric such as 'loss', not {name!r}.")
        if mode not in ("min", "max", "auto"):
            raise ConfigError(f"mode={mode!r} is not known; use 'min', 'max' or 'auto'.")
        self.name = name
        self.mode = mode if mode != "auto" else "max" if _HIGHER_IS_BETTER.search(name) else "min"

    def better(self, value: float, best: float, min_delta: float = 0.0) -> bool:
        """Whether ``value`` is better than ``best`` by more than ``min_delta``; NaN is worse than any number."""
        if math.isnan(value) or math.isnan(best):
            return not math.isnan(value)
        return value < best - min_delta if self.mode == "min" else value > best + min_delta

    def training_mean(self, info: StepInfo) -> float | None:
        """``info.means`` of the monitored metric; None if it is a measurement instead of a training metric.

        Raises ``ConfigError`` naming the nearest metric if no metric or measurement can have that name.
        """
        values = dict(info.means)
        values |= {tag(name, info.loss_terms): value for name, value in info.means.items()}
        if self.name in values:
            return values[self.name]
        may_follow = info.measured and self._group_unpublished(info.measurements)
        if values and self.name not in info.measurements and not may_follow:
            self._raise_unknown([*values, *info.measurements])
        return None

    def _group_unpublished(self, measurements: Iterable[str]) -> bool:
        """Whether no measurement of the monitored group (such as ``eval/``) has been published yet."""
        group, slash, _ = self.name.rpartition("/")
        return bool(slash) and group != "train" and not any(name.startswith(f"{group}/") for name in measurements)

    def _raise_unknown(self, known: Iterable[str]) -> NoReturn:
        known = sorted(set(known))
        advice = " Names under eval/ need an EvalCallback." if self.name.startswith("eval/") else ""
        raise ConfigError(
            f"monitor='{self.name}' is not a metric of this run.{nearest(self.name, known)} "
            f"There are: {', '.join(known)}.{advice}"
        )
