"""How far imagination can be trusted: observe the first rows of recorded sequences, imagine the rest, compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from worldloom.errors import DataError
from worldloom.models.base import WorldModel, compiled
from worldloom.ops.keys import split_key, step_keys

_OBSERVED, _IMAGINED = (0.2, 0.7, 0.3), (0.85, 0.25, 0.2)


class OpenLoop(NamedTuple):
    """An open-loop prediction of B recorded sequences of T rows.

    Attributes:
      prediction: by name, [B, T, ...] in the units of the data (images from 0 to 1); the first ``observed`` rows are
        reconstructions of what was seen, the others imagined.
      truth: what was recorded, likewise.
      observed: number of rows the model saw.
    """

    prediction: dict[str, NDArray[Any]]
    truth: dict[str, NDArray[Any]]
    observed: int

    @property
    def error(self) -> dict[str, NDArray[Any]]:
        """``prediction − truth`` by name, [B, T, ...]."""
        return {name: self.prediction[name] - self.truth[name] for name in self.truth}

    def rmse(self) -> dict[str, NDArray[Any]]:
        """Root mean square error of each row, over sequences and entries: [T] by name."""
        return {name: np.sqrt(np.mean(np.square(e), (0, *range(2, e.ndim)))) for name, e in self.error.items()}

    def strip(self, name: str | None = None, *, sequences: int = 6) -> NDArray[np.uint8]:
        """A picture [height, width, 3] of one observation: time runs to the right.

        For each sequence there are three bands: truth, prediction and error (grey is none). A line above marks
        observed rows green and imagined rows red. A vector's entries are cells below each other, each scaled to the
        range of its truth. ``name`` None takes the first image, or the first observation.
        """
        if name is None:
            name = next((n for n, x in self.truth.items() if x.ndim == 5), next(iter(self.truth)))
        truth, prediction = self.truth[name][:sequences], self.prediction[name][:sequences]
        if truth.ndim != 5:
            truth, prediction = _as_pictures(truth, prediction)
        elif truth.shape[-1] not in (1, 3) and truth.shape[2] in (1, 3):
            truth, prediction = np.moveaxis(truth, 2, -1), np.moveaxis(prediction, 2, -1)
        bands = np.stack([truth, prediction, (prediction - truth + 1) / 2], 1)  # [B, 3, T, H, W, C]
        colours = np.where(np.arange(truth.shape[1])[:, None] < self.observed, _OBSERVED, _IMAGINED)
        return _tile(bands, colours)


def open_loop(
    model: WorldModel, batch: Mapping[str, Any], *, observed: int | None = None, key: jax.Array | None = None
) -> OpenLoop:
    """Let ``model`` observe the first rows of each sequence and imagine the others with the recorded actions.

    Args:
      model: a world model that decodes observations.
      batch: ``obs`` and ``actions`` [B, T, ...] by the arrival rule, each sequence inside one episode.
      observed: rows to observe, 1 … T − 1; None is the first half.
      key: for sampled latents; None takes modes.

    Raises:
      DataError: sequences are too short, cross an episode's start, or ``observed`` leaves nothing to imagine.
    """
    obs = jax.tree.map(np.asarray, batch["obs"])
    length = jax.tree.leaves(obs)[0].shape[1]
    observed = length // 2 if observed is None else observed
    if not 1 <= observed < length:
        raise DataError(f"observed={observed} of {length} rows: give 1 to {length - 1}, so that rows are left.")
    if np.any(np.asarray(batch.get("is_first", np.zeros((1, 1))))[:, 1:]):
        raise DataError("A sequence crosses the start of an episode; give windows that lie inside one.")
    seen = jax.tree.map(lambda x: x[:, :observed], obs)
    # The last action leads out of the window.
    actions = jax.tree.map(lambda x: np.asarray(x)[:, :-1], batch["actions"])
    decoded = jax.device_get(_rollout(model, seen, actions, key))
    prediction, truth = (x if isinstance(x, Mapping) else {"obs": x} for x in (decoded, obs))
    return OpenLoop(
        {name: np.swapaxes(x, 0, 1) for name, x in prediction.items()},
        {name: _in_units_of_predictions(x) for name, x in truth.items()},
        observed,
    )


@compiled
def _rollout(model: Any, obs: Any, actions: Any, key: jax.Array | None) -> Any:
    first_key, observe_key, imagine_key = split_key(key, 3)
    obs, actions = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (obs, actions))
    observed = jax.tree.leaves(obs)[0].shape[0]
    start = model.encode(jax.tree.map(lambda x: x[0], obs), first_key)

    def step(state: Any, row: Any) -> tuple[Any, Any]:
        action, seen, key = row
        state = model.observe(state, action, seen, key)
        return state, state

    rows = (jax.tree.map(lambda x: x[: observed - 1], actions), jax.tree.map(lambda x: x[1:], obs))
    last, states = jax.lax.scan(step, start, (*rows, step_keys(observe_key, observed - 1)))
    imagined = model.imagine(last, jax.tree.map(lambda x: x[observed - 1 :], actions), imagine_key).states
    # Row 0 of what was imagined is ``last``, the last observed state.
    whole = jax.tree.map(lambda a, b, c: jnp.concatenate([a[None], b, c[1:]]), start, states, imagined)
    return model.decode(whole)["obs"]


def _in_units_of_predictions(truth: NDArray[Any]) -> NDArray[np.float32]:
    is_image = truth.dtype == np.uint8 and truth.ndim == 5
    return truth.astype(np.float32) / np.float32(255 if is_image else 1)


def _as_pictures(truth: NDArray[Any], prediction: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    batch, length = truth.shape[:2]
    truth, prediction = (x.reshape(batch, length, -1) for x in (truth, prediction))
    low, high = truth.min((0, 1)), truth.max((0, 1))
    span = np.where(high > low, high - low, 1)

    def cells(x: NDArray[Any]) -> NDArray[Any]:
        return np.kron(((x - low) / span)[..., None], np.ones((1, 1, 8, 8)))[..., None]

    return cells(truth), cells(prediction)


def _tile(bands: NDArray[Any], colours: NDArray[Any]) -> NDArray[np.uint8]:
    # [B, 3, T, H, W, C] → one picture; a grey or many-channelled image shows its first channel.
    bands = np.clip(bands, 0, 1)
    bands = bands if bands.shape[-1] == 3 else np.repeat(bands[..., :1], 3, -1)
    batch, kinds, length, height, width, _ = bands.shape
    strips = bands.transpose(0, 1, 3, 2, 4, 5).reshape(batch, kinds * height, length * width, 3)
    line = np.broadcast_to(np.repeat(colours, width, 0), (batch, 3, length * width, 3))
    picture = np.concatenate([line, strips], 1).reshape(-1, length * width, 3)
    return np.round(picture * 255).astype(np.uint8)
