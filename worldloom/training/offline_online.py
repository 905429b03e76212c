"""Training on recorded data first, then in environments with a share of the data in every batch."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from worldloom.algorithm import TrainState
from worldloom.envs import is_env
from worldloom.errors import ConfigError
from worldloom.training.checkpoint import Checkpointer, locate_checkpoint
from worldloom.training.resume import save_dirs

_log = logging.getLogger("worldloom")


def offline_then_online(
    trainer: Any,
    data: Any,
    env: Any,
    *,
    total_steps: int | None = None,
    resume: bool | str | Path = False,
    replay: Any = None,
) -> TrainState:
    """Train on recorded data alone, then in environments with a share of the data in every batch.

        trainer = Trainer(model, config.replace(offline_updates=20_000, mix=0.5, env_steps=50_000), callbacks)
        offline_then_online(trainer, worldloom.data.open("minari:…"), make_env("Pendulum-v1"))

    The first ``config.offline_updates`` updates are on ``data`` alone; what follows is online training, whose batches
    hold the share ``config.mix`` of windows of ``data`` (see ``mix_end`` to change it). A run that is resumed, in
    either part, equals an uninterrupted one. With an ``lr_schedule``, the learning rate falls to 0 in each part.

    Args:
      trainer: a :class:`~worldloom.training.Trainer`.
      data: recorded episodes, a :class:`~worldloom.replay.ReplayBuffer` or a :class:`worldloom.data.Dataset`.
      env: environments, as ``Trainer.train`` takes them.
      total_steps: updates in total, those on the data included; None means the config's.
      resume: as in ``Trainer.train``.
      replay: as in ``Trainer.train``.

    Raises:
      ConfigError: ``env`` is no environment; the run that is resumed was begun with other data.
      DataError: the data do not fit the model. Others as ``Trainer.train``.
    """
    if not is_env(env):
        raise ConfigError("env must be an environment; Trainer.train(data) trains on recorded data alone.")
    updates = trainer.config.offline_updates
    if trainer.step < updates and not (resume and _is_online(trainer, resume)):
        _log.info("First, updates up to %s on recorded data alone.", f"{updates:,}")
        state = trainer.train(data, total_steps=updates, resume=resume)
        resume = False
        if trainer.step < updates or trainer.stop_reason is not None:
            return state
    trainer.run.data = data
    return trainer.train(env, total_steps=total_steps, resume=resume, replay=replay)


def _is_online(trainer: Any, resume: bool | str | Path) -> bool:
    """Whether the newest checkpoint that ``resume`` names was written while environments were stepped."""
    folder, step = locate_checkpoint(resume, next(iter(save_dirs(trainer._callbacks)), None))
    steps = Checkpointer(folder).steps() if step is None else [step]
    for number in reversed(steps):
        try:
            record = json.loads((folder / str(number) / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # Restoring says what is wrong with it, and falls back to the one before.
        return isinstance(record, dict) and "collector" in record
    return False
