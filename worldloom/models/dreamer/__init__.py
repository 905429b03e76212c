"""DreamerV3 (Hafner et al. 2025): config, world model, losses, update and acting."""

from worldloom.algorithm import Algorithm
from worldloom.families import register_family
from worldloom.models.dreamer.config import DreamerV3Config
from worldloom.models.dreamer.losses import LOSS_TERMS
from worldloom.models.dreamer.protocols import PROTOCOLS, published_curve
from worldloom.models.dreamer.recipes import recipe
from worldloom.models.dreamer.rssm import Latent
from worldloom.models.dreamer.update import init_state, initial_carry, make_update, replay_spec, stored_latents
from worldloom.models.dreamer.world_model import ActorCarry, DreamerV3WorldModel, Trajectory

ALGORITHM = Algorithm(
    init_state=init_state,
    make_update=make_update,
    replay_spec=replay_spec,
    loss_terms=LOSS_TERMS,
    # The reference's evaluation mode changes nothing: latents and actions are drawn, and published scores are of that.
    eval_policy=None,
    initial_carry=initial_carry,
    stored_latents=stored_latents,
    recipe=recipe,
    # The untrained policy acts first, so that latents are stored from the first row on.
    random_prefill=False,
    protocols=PROTOCOLS,
    published_curve=published_curve,
    samples_in_evaluation=True,
)
register_family("dreamerv3", DreamerV3Config, DreamerV3WorldModel, ALGORITHM)

__all__ = [
    "ALGORITHM",
    "LOSS_TERMS",
    "ActorCarry",
    "DreamerV3Config",
    "DreamerV3WorldModel",
    "Latent",
    "Trajectory",
    "init_state",
    "initial_carry",
    "make_update",
    "recipe",
    "replay_spec",
    "stored_latents",
]
