"""Values that models and training hand to each other; neither imports the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that one update reads and writes, as an immutable pytree.

    Attributes:
      step: optimizer updates done, int32 [].
      params: pure dict of *all* weights of the model: trained parts, slow or target networks, running statistics.
      opt_state: state of the family's optimizers.
      key: root key of the run; the key of update ``n`` is ``fold_in(key, n)``.
      config: the model's config (static).
      training: the ``TrainingConfig`` (static).
    """

    step: jax.Array
    params: dict[str, Any]
    opt_state: Any
    key: jax.Array
    config: Any = dataclasses.field(metadata={"static": True})
    training: Any = dataclasses.field(metadata={"static": True})

    def replace(self, **changes: Any) -> TrainState:
        """A copy with ``changes``."""
        return dataclasses.replace(self, **changes)


class WindowSpec(NamedTuple):
    """What an algorithm asks of replay.

    Attributes:
      rows: rows per window, ``sequence_length`` plus context rows.
      cross_episodes: whether a window may run over an episode's end (``is_first`` marks the seam).
      latents: shapes per row (without batch axes) of latents stored beside the rows, or empty.
    """

    rows: int
    cross_episodes: bool
    latents: Mapping[str, tuple[int, ...]]
