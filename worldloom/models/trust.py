"""How far imagination can be believed: a signal for every row, and how errors grow with the imagined steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from worldloom.errors import DataError
from worldloom.models.compilation import compiled
from worldloom.models.rollout import observe_sequence, task_argument

_METHODS = ("encode", "observe", "imagine", "decode")


class Trust(NamedTuple):
    """What :func:`trust` measures on B recorded sequences of T rows.

    Attributes:
      rows: the family's signals by name, [B, T] each; the higher, the less imagination can be believed there. Empty
        for a family without one.
      units: unit of each signal, by the same names.
      errors: errors of imagination from the first row of every sequence, after 1 … T − 1 steps.
    """

    rows: dict[str, NDArray[np.float32]]
    units: dict[str, str]
    errors: HorizonErrors

    def worst(self, name: str | None = None, *, count: int = 10) -> list[tuple[int, int]]:
        """The ``count`` rows with the highest signal, as pairs (sequence, row), highest first.

        Args:
          name: the signal; None means the first one.
          count: how many rows; all of them if there are fewer.

        Raises ``DataError`` if there is no such signal.
        """
        name = name or next(iter(self.rows), None)
        if name is None or name not in self.rows:
            raise DataError(f"There is no signal {name!r}; this model's are {', '.join(self.rows) or 'none'}.")
        signal = self.rows[name]
        order = np.argsort(-signal, axis=None, kind="stable")[:count]
        return [(int(sequence), int(row)) for sequence, row in zip(*np.unravel_index(order, signal.shape), strict=True)]


class HorizonErrors(NamedTuple):
    """Root mean square errors after 1 … H imagined steps by quantity, [H] each.

    Quantities are ``reward`` and ``value``, in the units of the data, and ``latent``, as a fraction of the standard
    deviation of the latents; those that the model has.

    Attributes:
      imagined: errors of imagination.
      still: errors of a baseline that repeats row 0.
    """

    imagined: dict[str, NDArray[np.float64]]
    still: dict[str, NDArray[np.float64]]


def trust(model: Any, batch: Mapping[str, Any]) -> Trust:
    """How far the imagination of ``model`` can be believed on recorded sequences, see :meth:`WorldModel.trust`."""
    check_methods(model)
    missing = [name for name in ("obs", "actions", "rewards") if name not in batch]
    if missing:
        raise DataError(f"The batch has no {', '.join(missing)}; it has {', '.join(sorted(batch))}.")
    if np.any(np.asarray(batch.get("is_first", np.zeros((1, 1))))[:, 1:]):
        raise DataError(
            "A sequence spans two episodes; give sequences inside one episode, as buffer.sample(B, T) does."
        )
    errors = horizon_errors(model, batch)
    rows = {name: np.asarray(x, np.float32) for name, x in jax.device_get(model.uncertainty(batch)).items()}
    return Trust(rows, {name: model.uncertainty_units[name] for name in rows}, errors)


def horizon_errors(model: Any, batch: Mapping[str, Any]) -> HorizonErrors:
    """How the errors of imagination grow with the number of imagined steps.

    The model imagines from the first row of every sequence with the recorded actions. Its latents and their values are
    compared with those of the posterior states, which observe every row, and its rewards with the recorded ones.

    Args:
      model: a world model.
      batch: ``obs``, ``actions`` and ``rewards`` [B, T, ...] by the arrival rule, each sequence within one episode;
        ``task`` [B] for multitask models. H is T − 1.

    Returns:
      Errors of ``reward``, of ``value`` if ``decode`` returns it, and of ``latent`` if states have ``features``.

    Raises:
      TypeError: the model lacks a method that imagination needs.
      DataError: sequences have a single row.
    """
    check_methods(model)
    obs, actions = (
        jax.tree.map(lambda x: np.swapaxes(np.asarray(x), 0, 1), batch[name]) for name in ("obs", "actions")
    )
    if len(jax.tree.leaves(obs)[0]) < 2:
        raise DataError("Sequences need at least 2 rows to imagine a step.")
    actions = jax.tree.map(lambda x: x[:-1], actions)  # the last one leads to a row after the sequence
    posterior, prior, rewards = jax.device_get(_predictions(model, obs, actions, task_argument(model, batch)))

    # Row 0 counts as imagined without error; it is dropped below.
    recorded = np.swapaxes(np.asarray(batch["rewards"], np.float64), 0, 1)
    truth, imagined = ({name: np.asarray(x, np.float64) for name, x in values.items()} for values in (posterior, prior))
    truth = {"reward": recorded, **truth}
    imagined = {"reward": np.concatenate([recorded[:1], np.asarray(rewards, np.float64)]), **imagined}
    unit = dict.fromkeys(truth, 1.0)
    if "latent" in truth:
        unit["latent"] = np.sqrt(truth["latent"].var((0, 1)).mean()) or 1.0

    def errors(guess: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        return {name: _rms(guess[name] - truth[name])[1:] / unit[name] for name in truth}

    return HorizonErrors(errors(imagined), errors({name: x[:1] for name, x in truth.items()}))


@compiled
def _predictions(model: Any, obs: Any, actions: Any, task: Mapping[str, Any]) -> tuple[Any, Any, jax.Array]:
    """``value`` and ``latent`` [T, B, ...] of posterior and of imagined states, and imagined rewards [T − 1, B]."""
    posteriors = observe_sequence(model, obs, actions, task=task)
    trajectory = model.imagine(jax.tree.map(lambda x: x[0], posteriors), actions, **task)

    def quantities(states: Any) -> dict[str, Any]:
        decoded = model.decode(states, **task)
        found = {"value": decoded.get("value"), "latent": getattr(states, "features", None)}
        return {name: x for name, x in found.items() if x is not None}

    return quantities(posteriors), quantities(trajectory.states), trajectory.rewards


def check_methods(model: Any) -> None:
    """Raise ``TypeError`` if ``model`` lacks a method that imagination needs."""
    missing = [name for name in _METHODS if not hasattr(model, name)]
    if missing:
        raise TypeError(f"Imagination cannot be plotted: {type(model).__name__} has no method {' or '.join(missing)}.")


def _rms(errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Root mean square of errors [T, ...] over all axes but time: [T]."""
    return np.sqrt(np.mean(np.square(errors), axis=tuple(range(1, errors.ndim))))
