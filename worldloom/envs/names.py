"""What the entries of observations mean, for labels of plots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_ENTRIES = {
    "Acrobot": (
        "cos of the first angle",
        "sin of the first angle",
        "cos of the second angle",
        "sin of the second angle",
        "first angular velocity (rad/s)",
        "second angular velocity (rad/s)",
    ),
    "CartPole": ("cart position (m)", "cart velocity (m/s)", "pole angle (rad)", "pole angular velocity (rad/s)"),
    "MountainCar": ("position", "velocity"),
    "MountainCarContinuous": ("position", "velocity"),
    "Pendulum": ("cos of the angle", "sin of the angle", "angular velocity (rad/s)"),
}
"""Entries of the observation vector by Gymnasium id without its version, from the environments' documentation."""


def entry_names(spec: Any) -> Sequence[str]:
    """Names of the entries of the observations of ``make_env(spec)``; empty where they are not known."""
    return _ENTRIES.get(spec.rpartition("-v")[0], ()) if isinstance(spec, str) else ()
