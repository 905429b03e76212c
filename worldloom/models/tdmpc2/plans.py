"""How much a TD-MPC2 agent may plan: the fields that say so, and plans from the config's own to none."""

from __future__ import annotations

from typing import Any

from worldloom.models.tdmpc2.config import TDMPC2Config

PLANNER_FIELDS = (
    "mpc",
    "iterations",
    "num_samples",
    "num_elites",
    "num_pi_trajs",
    "horizon",
    "temperature",
    "planner_lambda",
    "min_std",
    "max_std",
)
"""Fields of the config that no weight depends on. ``horizon`` is that of training too, but other plans are possible."""

_FRACTIONS = (1, 2, 4, 8, 16)


def smaller_plans(config: TDMPC2Config) -> list[dict[str, Any]]:
    """Changes of the config from its own plan to less and less work; the last acts by the policy prior alone.

    Work is candidates times iterations. Elites and candidates of the prior keep their shares of all candidates. Of two
    plans with equal work the one with more iterations comes first: later iterations search where the earlier found.
    """
    if not config.mpc:
        return [{}]
    plans = []
    for fraction in _FRACTIONS:
        samples = config.num_samples // fraction
        if samples < 2:
            break
        elites = max(1, config.num_elites // fraction)
        prior = min(config.num_pi_trajs // fraction, samples - 1)
        for iterations in range(config.planner_iterations, 0, -1):
            candidates = {"num_samples": samples, "num_elites": elites, "num_pi_trajs": prior}
            plans.append({**candidates, "iterations": iterations})
    plans.sort(key=lambda plan: (plan["num_samples"] * plan["iterations"], plan["iterations"]), reverse=True)
    return [{}, *plans[1:], {"mpc": False}]
