"""Open-loop prediction: observe the first rows of recorded sequences, imagine the rest, compare with the record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from worldloom.errors import DataError
from worldloom.models.base import WorldModel, compiled
from worldloom.models.pictures import picture_layout
from worldloom.models.rollout import observe_sequence, task_argument
from worldloom.ops.keys import split_key

_GREEN, _RED = (0.2, 0.7, 0.3), (0.85, 0.25, 0.2)  # RGB of the line above observed and imagined rows


class OpenLoop(NamedTuple):
    """An open-loop prediction of B recorded sequences of T rows.

    Attributes:
      prediction: decoded observations by name, [B, T, ...] in the units of the data (images in [0, 1]); the first
        ``observed`` rows are reconstructions, the others imagined.
      truth: recorded observations by name, same shapes and units.
      observed: number of rows that the model observed, 1 … T − 1.
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

        Each of the first ``sequences`` sequences has three bands: truth, prediction and error (grey is zero). A line
        above them marks observed rows green and imagined rows red. The entries of a vector are stacked cells, each
        scaled to the range of its truth. If ``name`` is None, the first image is shown, or else the first observation.

        Source: ``Agent.report`` of danijar/dreamerv3 stacks the same three bands.
        """
        if name is None:
            name = next((n for n, x in self.truth.items() if x.ndim == 5), next(iter(self.truth)))
        truth, prediction = self.truth[name][:sequences], self.prediction[name][:sequences]
        if truth.ndim != 5:
            truth, prediction = _vectors_as_images(truth, prediction)
        elif picture_layout(truth.shape[2:]).channels_first:
            truth, prediction = np.moveaxis(truth, 2, -1), np.moveaxis(prediction, 2, -1)
        bands = np.stack([truth, prediction, (prediction - truth + 1) / 2], 1)  # [B, 3, T, H, W, C]
        colours = np.where(np.arange(truth.shape[1])[:, None] < self.observed, _GREEN, _RED)
        return _tile(bands, colours)


def open_loop(
    model: WorldModel, batch: Mapping[str, Any], *, observed: int | None = None, key: jax.Array | None = None
) -> OpenLoop:
    """Let ``model`` observe the first rows of each sequence and imagine the others with the recorded actions.

    Args:
      model: a world model whose ``decode`` returns ``"obs"``.
      batch: ``obs`` and ``actions`` [B, T, ...] by the arrival rule, each sequence within one episode; ``task`` [B] for
        multitask models.
      observed: rows to observe, 1 … T − 1; None means half of them.
      key: samples the latents; None takes their modes.

    Raises:
      DataError: a sequence is too short or spans two episodes, or ``observed`` leaves no row to imagine.
    """
    obs = jax.tree.map(np.asarray, batch["obs"])
    length = jax.tree.leaves(obs)[0].shape[1]
    observed = length // 2 if observed is None else observed
    if not 1 <= observed < length:
        raise DataError(
            f"observed={observed} of {length} rows: give 1 to {length - 1}, so that rows are left to imagine."
        )
    if np.any(np.asarray(batch.get("is_first", np.zeros((1, 1))))[:, 1:]):
        raise DataError("A sequence spans two episodes; give sequences inside one episode.")
    seen = jax.tree.map(lambda x: x[:, :observed], obs)
    # The last action leads to a row after the sequence.
    actions = jax.tree.map(lambda x: np.asarray(x)[:, :-1], batch["actions"])
    decoded = jax.device_get(_rollout(model, seen, actions, key, task_argument(model, batch)))
    prediction, truth = (x if isinstance(x, Mapping) else {"obs": x} for x in (decoded, obs))
    return OpenLoop(
        {name: np.swapaxes(x, 0, 1) for name, x in prediction.items()},
        {name: _as_decoded(x) for name, x in truth.items()},
        observed,
    )


@compiled
def _rollout(model: Any, obs: Any, actions: Any, key: jax.Array | None, task: Mapping[str, Any]) -> Any:
    """Decoded observations [T, B, ...] by name; ``obs`` [B, observed, ...], ``actions`` [B, T − 1, ...]."""
    first_key, observe_key, imagine_key = split_key(key, 3)
    obs, actions = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (obs, actions))
    observed = jax.tree.leaves(obs)[0].shape[0]
    taken, ahead = (
        jax.tree.map(lambda x, part=part: x[part], actions) for part in np.s_[: observed - 1, observed - 1 :]
    )
    posteriors = observe_sequence(model, obs, taken, (first_key, observe_key), task)
    imagined = model.imagine(jax.tree.map(lambda x: x[-1], posteriors), ahead, imagine_key, **task).states
    # Row 0 of the imagined states is the last posterior.
    states = jax.tree.map(lambda a, b: jnp.concatenate([a, b[1:]]), posteriors, imagined)
    return model.decode(states, **task)["obs"]


def _as_decoded(truth: NDArray[Any]) -> NDArray[np.float32]:
    """Recorded observations in the units of decoded ones: uint8 images are divided by 255."""
    is_image = truth.dtype == np.uint8 and truth.ndim == 5
    return truth.astype(np.float32) / np.float32(255 if is_image else 1)


def _vectors_as_images(truth: NDArray[Any], prediction: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Vectors [B, T, ...] as images [B, T, 8 × entries, 8, 1]: a cell of 8×8 pixels for each entry."""
    batch, length = truth.shape[:2]
    truth, prediction = (x.reshape(batch, length, -1) for x in (truth, prediction))
    low, high = truth.min((0, 1)), truth.max((0, 1))
    span = np.where(high > low, high - low, 1)

    def cells(x: NDArray[Any]) -> NDArray[Any]:
        return np.kron(((x - low) / span)[..., None], np.ones((1, 1, 8, 8)))[..., None]

    return cells(truth), cells(prediction)


def _tile(bands: NDArray[Any], colours: NDArray[Any]) -> NDArray[np.uint8]:
    """Bands [B, 3, T, H, W, C] under lines of ``colours`` [T, 3] → one picture [height, width, 3].

    Only the first channel is shown unless there are three.
    """
    bands = np.clip(bands, 0, 1)
    bands = bands if bands.shape[-1] == 3 else np.repeat(bands[..., :1], 3, -1)
    batch, kinds, length, height, width, _ = bands.shape
    strips = bands.transpose(0, 1, 3, 2, 4, 5).reshape(batch, kinds * height, length * width, 3)
    line = np.broadcast_to(np.repeat(colours, width, 0), (batch, 3, length * width, 3))
    picture = np.concatenate([line, strips], 1).reshape(-1, length * width, 3)
    return np.round(picture * 255).astype(np.uint8)
