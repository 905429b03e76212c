"""TD-MPC2: a decoder-free world model that acts by planning in its latent space."""

from worldloom.models.tdmpc2.config import TDMPC2Config
from worldloom.models.tdmpc2.update import (
    LOSS_TERMS,
    RANDOM_PREFILL,
    act,
    act_in_evaluation,
    check_data,
    init_state,
    initial_carry,
    update,
    window,
)
from worldloom.models.tdmpc2.world_model import LatentState, TDMPC2WorldModel, Trajectory

__all__ = [
    "LOSS_TERMS",
    "RANDOM_PREFILL",
    "LatentState",
    "TDMPC2Config",
    "TDMPC2WorldModel",
    "Trajectory",
    "act",
    "act_in_evaluation",
    "check_data",
    "init_state",
    "initial_carry",
    "update",
    "window",
]
