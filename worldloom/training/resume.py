"""Resuming a run: exactly as it was, or with changes that are listed."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from worldloom.training.callbacks import CheckpointCallback
from worldloom.training.callbacks.runner import CallbackRunner
from worldloom.training.checkpoint import Checkpointer, locate_checkpoint
from worldloom.training.checkpoint_files import MAY_CHANGE
from worldloom.training.checkpoint_identity import differences
from worldloom.training.run_state import Run

_log = logging.getLogger("worldloom")


def resume_run(run: Run, callbacks: CallbackRunner, resume: bool | str | Path) -> None:
    """Restore ``run`` and the state of its callbacks from the checkpoint that ``resume`` names.

    Args:
      run: the run, with its source of data.
      callbacks: its callbacks.
      resume: see ``Trainer.train``.

    Raises what ``Trainer.train`` raises for ``resume``.
    """
    folder, step = locate_checkpoint(resume, next(iter(save_dirs(callbacks)), None))
    checkpoints, exact = Checkpointer(folder), resume != "continue"
    if resume in ("auto", "continue") and not checkpoints.steps():
        _begin_again(run, callbacks)
        return
    identity = run.identity()
    snapshot = checkpoints.restore(run.state, identity, step, exact=exact)
    _say_where(snapshot.record, run)
    _keep_latent_group(snapshot.record, run)
    changes = [] if exact else _changes(snapshot.record, identity)
    changes += run.restore(snapshot, folder, exact=not changes and exact)
    callbacks.load_state_dict(snapshot.record["callbacks"], run.step)
    if changes:
        _log.warning(
            "Continuing from step %d of %s with changes, so the run is not the one it would have been: %s.",
            *(run.step, folder, "; ".join(changes)),
        )


def save_dirs(callbacks: CallbackRunner) -> list[Path]:
    """Folders of the callbacks that write checkpoints."""
    return [callback.save_dir for callback in callbacks.callbacks if isinstance(callback, CheckpointCallback)]


def _say_where(record: Mapping[str, Any], run: Run) -> None:
    """Say if the run goes on over other devices or processes, where results are equal up to rounding only."""
    training = record.get("training") or {}
    before = dict(training.get("mesh") or {}), record.get("processes", 1)
    now = dict(run.config.mesh), jax.process_count()
    if before != now:
        _log.warning(
            "The run goes on over %s, it was saved over %s: its results are equal up to rounding.",
            *(_devices_in_words(*each) for each in (now, before)),
        )


def _keep_latent_group(record: Mapping[str, Any], run: Run) -> None:
    """Write latents back in the groups of updates of the saved run, so that the batches stay what they would be.

    A call must then end with a group, so it may do fewer updates than here otherwise.
    """
    group = record.get("latent_group")  # None in early checkpoints, and without stored latents.
    if not group or group == run.writeback.group:
        return
    before, run.capacity = run.capacity, math.gcd(group, run.capacity)
    run.writeback.group = group
    if run.capacity < before:
        _log.warning(
            "A call does %d in place of %d updates (updates_per_call): the run that goes on writes latents back to "
            "replay in groups of %d.",
            *(run.capacity, before, group),
        )


def _devices_in_words(mesh: dict[str, int], processes: int) -> str:
    devices = f"mesh={mesh}" if mesh or processes > 1 else "one device"
    return f"{devices} of {processes} processes" if processes > 1 else devices


def _begin_again(run: Run, callbacks: CallbackRunner) -> None:
    """Keep the id of a run that was stopped before its first checkpoint: the same run begins again."""
    # Only the callback that records the run in its folder knows an id.
    recorders = [callback for callback in callbacks.callbacks if hasattr(callback, "recorded_run_id")]
    run_id = next((each for recorder in recorders if (each := recorder.recorded_run_id())), None)
    if run_id and run.step == 0:
        run.run_id = run_id
        _log.warning("The run was stopped before its first checkpoint: the same run begins again from step 0.")


def _changes(record: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """How the configs and the class of a saved run differ from those that go on, other than without effect."""
    found = []
    for part, kind in (("config", "model"), ("training", "training")):
        changed = differences(kind, record.get(part), identity[part])
        found += [f"{name} {old!r} → {new!r}" for name, (old, new) in changed.items() if name not in MAY_CHANGE]
    if record.get("model_class") != identity["model_class"]:
        found.append(f"model {record.get('model_class')} → {identity['model_class']}")
    return found
