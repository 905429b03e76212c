"""Planning in the latent space of any model: MPPI and the cross-entropy method over callables. No weights, no family.

:func:`mppi` and :func:`cem` are pure functions of a latent, a mean to start from and three callables. Their stages
(:func:`shift`, :func:`rollout`, :func:`bootstrapped_return`, :func:`refit`) are functions too, for planners of one's
own. TD-MPC2's planner is :func:`mppi` with its networks.
"""

from worldloom.planning.actions import ActionSampler, CategoricalActions, GaussianActions
from worldloom.planning.planners import cem, mppi
from worldloom.planning.stages import bootstrapped_return, refit, rollout, shift
from worldloom.planning.types import Candidates, Distribution, Estimate, Plan, Prior, Step, Transition, Value

__all__ = [
    "ActionSampler",
    "Candidates",
    "CategoricalActions",
    "Distribution",
    "Estimate",
    "GaussianActions",
    "Plan",
    "Prior",
    "Step",
    "Transition",
    "Value",
    "bootstrapped_return",
    "cem",
    "mppi",
    "refit",
    "rollout",
    "shift",
]
