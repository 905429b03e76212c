"""DreamerV3 (Hafner et al. 2025): config, world model, loss, update and acting."""

from worldloom.models.dreamer.config import DreamerV3Config as DreamerV3Config
from worldloom.models.dreamer.losses import LOSS_TERMS as LOSS_TERMS
from worldloom.models.dreamer.rssm import Latent as Latent
from worldloom.models.dreamer.update import RANDOM_PREFILL as RANDOM_PREFILL
from worldloom.models.dreamer.update import act as act
from worldloom.models.dreamer.update import act_in_evaluation as act_in_evaluation
from worldloom.models.dreamer.update import init_state as init_state
from worldloom.models.dreamer.update import initial_carry as initial_carry
from worldloom.models.dreamer.update import stored_latents as stored_latents
from worldloom.models.dreamer.update import update as update
from worldloom.models.dreamer.update import window as window
from worldloom.models.dreamer.world_model import ActorCarry as ActorCarry
from worldloom.models.dreamer.world_model import DreamerV3WorldModel as DreamerV3WorldModel
from worldloom.models.dreamer.world_model import Trajectory as Trajectory
