"""Online batches of which a part comes from recorded data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from worldloom.errors import ConfigError, DataError
from worldloom.replay import ReplayBuffer
from worldloom.training.config import TrainingConfig


class DataShare(NamedTuple):
    """The share of each batch that comes from recorded data, as a function of the update alone.

    Attributes:
      begin: share of the first online update.
      end: share from ``updates`` updates on; it changes linearly until then.
      updates: see above.
      first: updates before the first online one.
    """

    begin: float
    end: float
    updates: int
    first: int

    @classmethod
    def of(cls, config: TrainingConfig) -> DataShare:
        """The share of a run."""
        end = config.mix if config.mix_end is None else config.mix_end
        return cls(config.mix, end, config.mix_updates, config.offline_updates)

    def windows(self, batch_size: int, update: int) -> int:
        """How many windows of the batch of ``update`` come from the data: the nearest whole number."""
        passed = min(max((update - self.first) / self.updates, 0.0), 1.0)
        return int((self.begin + passed * (self.end - self.begin)) * batch_size + 0.5)


class MixedReplay:
    """Replay of rows that a run collects, whose batches are filled up with windows of recorded data.

    The windows of the data are the last ones of each batch. Row ``r`` of the data has the number ``-1 - r``. Data hold
    no latents: their windows begin with the initial one, and latents are only written to what was collected.

    Args:
      collected: the buffer that rows are collected into.
      data: recorded episodes, a :class:`~worldloom.replay.ReplayBuffer` or a dataset.
      share: the share of the data.

    Raises:
      DataError: the data is empty.
    """

    def __init__(self, collected: ReplayBuffer, data: Any, share: DataShare):
        if not len(data):
            raise DataError("The recorded data is empty; add episodes first.")
        self.collected, self.data, self.share = collected, data, share

    def __len__(self) -> int:
        """Rows collected."""
        return len(self.collected)

    @property
    def capacity(self) -> int:
        """Capacity of the buffer that rows are collected into."""
        return self.collected.capacity

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latents stored beside the rows that were collected."""
        return self.collected.latents

    @property
    def has_terminals(self) -> bool:
        """Whether any row is terminal."""
        return self.collected.has_terminals or bool(self.data.has_terminals)

    def match(self, **shapes: Any) -> None:
        """See ``ReplayBuffer.match``."""
        self.data.match(**shapes)
        if len(self.collected):
            self.collected.match(**shapes)

    def fresh_places(self, batch_size: int, update: int) -> int:
        """Windows of the batch of ``update`` that come from what was collected."""
        return batch_size - self.share.windows(batch_size, update)

    def draw(
        self, batch_size: int, sequence_length: int, *, seed: int = 0, update: int = 0, **options: Any
    ) -> np.ndarray:
        """Row numbers of a batch's windows, int64 [B, T]; see ``ReplayBuffer.draw``."""
        collected = self.fresh_places(batch_size, update)
        parts = []
        if collected:
            parts.append(self.collected.draw(collected, sequence_length, seed=seed, update=update, **options))
        if collected < batch_size:
            recorded = {name: value for name, value in options.items() if name != "finished"}
            count = batch_size - collected
            parts.append(-1 - self.data.draw(count, sequence_length, seed=seed, update=update, **recorded))
        return np.concatenate(parts)

    def take(self, row_ids: np.ndarray, *, latents: bool = False, observations: bool = True) -> dict[str, Any]:
        """The rows ``row_ids`` [B, T], each window from one of both; see ``ReplayBuffer.take``."""
        recorded = row_ids[:, 0] < 0
        parts = []
        if not recorded.all():
            parts.append(self.collected.take(row_ids[~recorded], latents=latents, observations=observations))
        if recorded.any():
            part = self.data.take(-1 - row_ids[recorded], observations=observations)
            if latents:
                shapes = self.latents.items()
                part["context"] = {key: np.zeros((len(part["rewards"]), *shape), np.float32) for key, shape in shapes}
            parts.append(part)
        if len(parts) == 2 and parts[0].keys() != parts[1].keys():
            one, other = (", ".join(sorted(part)) for part in parts)
            raise DataError(f"The recorded data has {other}; what is collected has {one}.")
        batch = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
        batch["row_ids"] = row_ids
        return batch

    def write_latents(self, row_ids: np.ndarray, latents: Mapping[str, np.ndarray]) -> None:
        """See ``ReplayBuffer.write_latents``; those of recorded rows are dropped."""
        collected = row_ids[:, 0] >= 0
        if collected.any():
            self.collected.write_latents(row_ids[collected], {name: v[collected] for name, v in latents.items()})


def mix_data(replay: Any, data: Any, config: TrainingConfig) -> Any:
    """What online batches are sampled from: ``replay``, mixed with ``data`` unless that is None."""
    return replay if data is None else MixedReplay(replay, data, DataShare.of(config))


def data_identity(data: Any) -> dict[str, int] | None:
    """What a checkpoint remembers of the recorded data of an online run."""
    return None if data is None else {"rows": len(data), "episodes": int(data.num_episodes)}


def check_same_data(saved: Any, data: Any) -> None:
    """Raise ``ConfigError`` if a run is resumed with other recorded data than it was begun with."""
    given = data_identity(data)
    if saved != given:
        raise ConfigError(
            f"The run was begun with recorded data ({saved}), and is resumed with other data ({given}). "
            "Give the same data (data=, --data), or go on inexactly by resume='continue' (--resume continue)."
        )


def data_changes(saved: Any, data: Any) -> list[str]:
    """What is different if a run goes on with other recorded data than it was begun with."""
    given = data_identity(data)
    return [] if saved == given else [f"recorded data {saved or 'none'} → {given or 'none'}"]
