"""Published learning curves, from a JSON file in a family's package."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from worldloom.algorithm import Curve

_DOMAINS = {"cup": "ball_in_cup", "pointmass": "point_mass"}
"""Domains of the control suite under the names of TD-MPC2."""


def control_task(env: str) -> str | None:
    """``domain_task`` of a control-suite environment with state observations, such as ``dmc:cup-catch``; else None."""
    suite, colon, task = env.partition(":")
    if suite != "dmc" or not colon:
        return None
    task = task.replace("-", "_")
    for alias, domain in _DOMAINS.items():
        if task.startswith(f"{alias}_"):
            return domain + task.removeprefix(alias)
    return task


def read_curve(path: Path, name: str, task: str) -> Curve | None:
    """The curve of ``task`` in the collection ``name`` of a file; None if it has none.

    A point is a mean, or [mean, minimum, maximum] over seeds, by environment steps.
    """
    points = _read(path).get(name, {}).get(task)
    if points is None:
        return None
    triples = [value if isinstance(value, list) else [value] * 3 for value in points.values()]
    mean, low, high = (list(column) for column in zip(*triples, strict=True))
    return Curve([int(steps) for steps in points], mean, low, high)


@functools.cache
def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
