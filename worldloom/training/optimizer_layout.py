"""Two layouts of one optimizer state: a vector of all weights, or an array for each weight.

An elementwise transform runs on one vector where weights are whole, and on an array per weight where they are divided
over devices (``TrainingConfig.divides_weights``). A checkpoint holds what its run had; another run may need the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

_PARAMS, _OPTIMIZER = "params/", "opt_state/"


class OptimizerLayout(NamedTuple):
    """How the arrays of a checkpoint become those that a run needs.

    Attributes:
      joined: name of a vector that is needed → names of the arrays that it consists of.
      split: name of a vector that is there → shapes of the arrays that are needed of it, by name.
    """

    joined: dict[str, list[str]]
    split: dict[str, dict[str, tuple[int, ...]]]

    @classmethod
    def between(cls, saved: Mapping[str, Any], needed: Mapping[str, Any]) -> OptimizerLayout:
        """Compare arrays (or shapes) by flat name: those of a checkpoint, and those that a run needs."""
        weights = [name.removeprefix(_PARAMS) for name in needed if name.startswith(_PARAMS)]
        return cls(
            {name: parts for name in _vectors(needed, saved) if (parts := _parts(name, weights, saved))},
            {
                name: {part: tuple(needed[part].shape) for part in parts}
                for name in _vectors(saved, needed)
                if (parts := _parts(name, weights, needed))
                and sum(math.prod(needed[part].shape) for part in parts) == saved[name].size
            },
        )

    def shapes(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Shapes of the arrays of a checkpoint, ``ShapeDtypeStruct`` by name, once they are converted."""
        shapes = dict(saved)
        for name, parts in self.joined.items():
            found = [shapes.pop(part) for part in parts]
            shapes[name] = jax.ShapeDtypeStruct((sum(each.size for each in found),), found[0].dtype)
        for name, pieces in self.split.items():
            vector = shapes.pop(name)
            shapes |= {piece: jax.ShapeDtypeStruct(shape, vector.dtype) for piece, shape in pieces.items()}
        return shapes

    def sources(self, name: str) -> list[str]:
        """Names in the checkpoint of what the needed array ``name`` is made of."""
        vector = next((vector for vector, parts in self.split.items() if name in parts), name)
        return self.joined.get(name, [vector])

    def convert(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays of a checkpoint as a run needs them."""
        converted = dict(arrays)
        for name, parts in self.joined.items():
            if all(part in converted for part in parts):
                converted[name] = np.concatenate([converted.pop(part).ravel() for part in parts])
        for name, pieces in self.split.items():
            if name in converted:
                ends = np.cumsum([math.prod(shape) for shape in pieces.values()])[:-1]
                numbers = np.split(converted.pop(name), ends)
                converted |= {p: x.reshape(shape) for (p, shape), x in zip(pieces.items(), numbers, strict=True)}
        return converted


def _vectors(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Names of one-dimensional arrays of the optimizer that are ``here`` and not ``there``."""
    return [name for name, x in here.items() if name.startswith(_OPTIMIZER) and len(x.shape) == 1 and name not in there]


def _parts(vector: str, weights: list[str], arrays: Mapping[str, Any]) -> list[str]:
    """Names of the arrays that ``vector`` consists of, one for each weight that is trained, in their order."""
    return [f"{vector}/{weight}" for weight in weights if f"{vector}/{weight}" in arrays]
