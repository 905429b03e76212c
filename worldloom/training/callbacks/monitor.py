"""The metric that decides: looked up by name, compared in its direction."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from worldloom.config import nearest
from worldloom.errors import ConfigError
from worldloom.training.callbacks.base import StepInfo
from worldloom.training.metrics import tag

_MORE_IS_BETTER = re.compile(r"return|score|success|accuracy|length")


class Monitor:
    """Reads one value by name and says whether a value is better than another.

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
        self.mode = mode if mode != "auto" else "max" if _MORE_IS_BETTER.search(name) else "min"

    def better(self, value: float, best: float, min_delta: float = 0.0) -> bool:
        """Whether ``value`` beats ``best`` by more than ``min_delta``; NaN never does."""
        if math.isnan(value) or math.isnan(best):
            return not math.isnan(value)
        return value < best - min_delta if self.mode == "min" else value > best + min_delta

    def trained(self, info: StepInfo) -> float | None:
        """The mean of a training metric since the last look; None if the name is a measurement's.

        Raises ``ConfigError`` naming the nearest metric if the name can never be one.
        """
        values = dict(info.means)
        values |= {tag(name, info.loss_terms): value for name, value in info.means.items()}
        if self.name in values:
            return values[self.name]
        if values and self.name not in info.measurements:
            self._check([*values, *info.measurements], waiting=info.measured and self._unheard(info.measurements))
        return None

    def _unheard(self, measurements: Iterable[str]) -> bool:
        """Whether nothing of the monitored group (``eval/``) has been published yet, so that it may still come."""
        group, slash, _ = self.name.rpartition("/")
        return bool(slash) and group != "train" and not any(name.startswith(f"{group}/") for name in measurements)

    def _check(self, known: Iterable[str], waiting: bool) -> None:
        if waiting:
            return
        known = sorted(set(known))
        advice = " Names under eval/ need an EvalCallback." if self.name.startswith("eval/") else ""
        raise ConfigError(
            f"monitor='{self.name}' is not a metric of this run.{nearest(self.name, known)} "
            f"There are: {', '.join(known)}.{advice}"
        )
