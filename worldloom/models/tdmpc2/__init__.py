"""TD-MPC2: a decoder-free world model that acts by planning in its latent space."""

from worldloom.algorithm import Algorithm
from worldloom.families import register_family
from worldloom.models.tdmpc2.config import TDMPC2Config
from worldloom.models.tdmpc2.losses import LOSS_TERMS
from worldloom.models.tdmpc2.plans import PLANNER_FIELDS, smaller_plans
from worldloom.models.tdmpc2.protocols import PROTOCOLS, published_curve
from worldloom.models.tdmpc2.recipes import FRAME_STACK, recipe
from worldloom.models.tdmpc2.tasks import tasks_of
from worldloom.models.tdmpc2.update import (
    eval_policy,
    init_state,
    initial_carry,
    make_update,
    replay_spec,
    validate_data,
)
from worldloom.models.tdmpc2.world_model import LatentState, TDMPC2WorldModel, Trajectory

ALGORITHM = Algorithm(
    init_state=init_state,
    make_update=make_update,
    replay_spec=replay_spec,
    loss_terms=LOSS_TERMS,
    eval_policy=eval_policy,
    initial_carry=initial_carry,
    validate_data=validate_data,
    recipe=recipe,
    # Measured on two cores with Pendulum-v1: up to this width the update and a step of the host take equally long.
    short_updates=lambda config: config.latent_dim <= 64,
    planner_fields=PLANNER_FIELDS,
    smaller_plans=smaller_plans,
    frame_stack=FRAME_STACK,
    protocols=PROTOCOLS,
    published_curve=published_curve,
    tasks=tasks_of,
)
register_family("tdmpc2", TDMPC2Config, TDMPC2WorldModel, ALGORITHM)

__all__ = [
    "ALGORITHM",
    "LOSS_TERMS",
    "LatentState",
    "TDMPC2Config",
    "TDMPC2WorldModel",
    "Trajectory",
    "eval_policy",
    "init_state",
    "initial_carry",
    "make_update",
    "recipe",
    "replay_spec",
    "validate_data",
]
