"""The latent state of TD-MPC2."""

from __future__ import annotations

import dataclasses

import jax

from worldloom.models.states import LatentBase


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class LatentState(LatentBase):
    """A latent ``z`` [..., L]: L / ``simnorm_dim`` simplices side by side."""

    z: jax.Array

    @property
    def features(self) -> jax.Array:
        """[..., L], the input of all heads."""
        return self.z
