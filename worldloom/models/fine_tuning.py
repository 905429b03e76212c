"""New models that begin with the weights of another one, and a report of what was taken."""

from __future__ import annotations

import dataclasses
import logging
import re
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from worldloom.config import check, nearest
from worldloom.errors import ConfigError
from worldloom.models.params import flatten, unflatten

_log = logging.getLogger("worldloom")

_COPIES = ("target_", "slow_")
"""Before the names of parts that follow another part slowly."""


@dataclasses.dataclass(frozen=True)
class InitReport:
    """What a model took from another one; ``str`` is a summary of a few lines.

    Attributes:
      taken: names of the arrays that were taken.
      reset: {name: reason} of those that begin anew.
      refused: {name: reason} of those of the other model that this one has no place for.
      notes: what else differs.
    """

    taken: tuple[str, ...]
    reset: Mapping[str, str]
    refused: Mapping[str, str]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.taken)} arrays taken, {len(self.reset)} begin anew, {len(self.refused)} not used."]
        for heading, found in (("anew", self.reset), ("not used", self.refused)):
            by_reason: dict[str, list[str]] = {}
            for name, reason in found.items():
                by_reason.setdefault(reason, []).append(name)
            lines += [f"{heading}: {', '.join(_shortened(names))} ({reason})" for reason, names in by_reason.items()]
        return "\n".join([*lines, *self.notes])


reports: weakref.WeakKeyDictionary[Any, InitReport] = weakref.WeakKeyDictionary()
"""Reports by model; beside the models, whose attributes are all compared with what their class builds."""


def take_weights(
    model: Any, source: Any, *, task_like: int | str | None = None, reset: Sequence[str] = ()
) -> InitReport:
    """Load the weights of ``source`` into ``model`` as far as they fit, and log and return what was done.

    Arrays of the same name and shape are taken; the others begin anew, as do those that ``reset`` names. Where a
    network begins anew, so does its slow copy, and with values and rewards the statistics of their size.

    Args:
      model: a new model.
      source: a model of the same family.
      task_like: of a multitask ``source``, the task that the single-task ``model`` begins with: its number or name.
      reset: names of parts, such as ``"reward"`` or ``"policy"``, or beginnings of names of arrays.

    Raises:
      ConfigError: the families differ, ``reset`` names nothing, or ``task_like`` is for another kind of model.
    """
    check(not isinstance(reset, str), f"reset must be a list of names, not {reset!r}: reset=[{reset!r}].")
    own_type, given_type = model.config.model_type, source.config.model_type
    check(own_type == given_type, f"init_from is a {given_type} model; a {own_type} model cannot begin with it.")
    config, params, notes = source.config, source.params, []
    if task_like is not None:
        if not hasattr(source, "single_task_weights"):
            raise ConfigError(f"task_like is for multitask models; {given_type} models have none.")
        check(not getattr(model.config, "multitask", False), "task_like makes a single-task model; leave num_tasks=0.")
        config, params = source.single_task_weights(task_like, like=model.config)
        notes.append(f"The embedding of task {task_like} is part of the biases now, exactly.")
    elif getattr(config, "multitask", False) and not getattr(model.config, "multitask", False):
        raise ConfigError(
            f"init_from is a model of {config.num_tasks} tasks, the new one has a single task: say which one it is "
            "like, task_like=NUMBER (or a name of mt30)."
        )
    own = {name: np.asarray(array) for name, array in flatten(model.params).items()}
    given = {name: np.asarray(array) for name, array in flatten(params).items()}
    wanted = _resets(reset, own)
    fresh = {name: f"reset={sorted(wanted[name])}" for name in wanted}
    for name, array in own.items():
        if name not in fresh and name not in given:
            fresh[name] = "the other model has none"
        elif name not in fresh and given[name].shape != array.shape:
            fresh[name] = f"of another shape, {given[name].shape} → {array.shape}"
    if model.config.action_type != config.action_type:
        outputs = [
            name for name in own if re.match(r"(policy|actor)\.", name) and re.search(r"(head|outputs?)\.", name)
        ]
        fresh |= {name: f"of {config.action_type} actions" for name in outputs if name not in fresh}
        notes.append(f"Actions were {config.action_type} and are {model.config.action_type}: what reads them is taken "
                     "where shapes agree, and has to learn what they mean.")  # fmt: skip
    # The schedule of an intrinsic reward is that of the new run.
    fresh |= {name: "of the new run" for name in own if name == "explorer.weight" and name not in fresh}
    fresh |= _with_copies(fresh, own)
    taken = {name: given[name].astype(own[name].dtype) for name in own if name not in fresh}
    refused = {name: "the new model has none" for name in given if name not in own}
    model.load_params(unflatten({**own, **taken}))
    notes.append("The optimizer begins anew; a learning rate below that of the first training keeps more.")
    notes += _config_notes(model.config, config)
    report = InitReport(tuple(taken), fresh, refused, tuple(notes))
    reports[model] = report
    _log.info("Initial weights: %s", report)
    return report


def _resets(reset: Sequence[str], own: Mapping[str, Any]) -> dict[str, set[str]]:
    """{array: names in ``reset`` that cover it}. Raises ``ConfigError`` for a name that covers none."""
    found: dict[str, set[str]] = {}
    for given in reset:
        covered = [name for name in own if name == given or name.startswith(f"{given}.")]
        if not covered:
            parts = sorted({name.partition(".")[0] for name in own})
            raise ConfigError(f"reset names '{given}', which is no part of the model.{nearest(given, parts)} Parts: "
                              f"{', '.join(parts)}.")  # fmt: skip
        for name in covered:
            found.setdefault(name, set()).add(given)
    return found


def _with_copies(fresh: Mapping[str, str], own: Mapping[str, Any]) -> dict[str, str]:
    """Arrays that cannot stay when those in ``fresh`` begin anew: slow copies, and statistics of values."""
    found: dict[str, str] = {}
    for name in own:
        part, _, rest = name.partition(".")
        follows = next((part.removeprefix(copy) for copy in _COPIES if part.startswith(copy)), None)
        if name not in fresh and follows is not None and f"{follows}.{rest}" in fresh:
            found[name] = f"follows {follows}"
    if any(name.startswith("explorer.networks.") for name in fresh):
        scales = [name for name in own if name.startswith("explorer.scale") and name not in fresh]
        found |= dict.fromkeys(scales, "a statistic of the networks before")
    values = [name for name in fresh if re.match(r"(reward|q|critic)\.", name) and re.search(r"(head|output)\.", name)]
    if values:
        statistics = [name for name in own if re.match(r"(scale|return_range)\.", name) and name not in fresh]
        found |= dict.fromkeys(statistics, "a statistic of the values before")
    return found


def _config_notes(config: Any, given: Any) -> list[str]:
    """Fields in which the configs differ, other than those of shapes."""
    shapes = {"obs_shape", "action_dim", "action_type", "num_tasks", "task_dim", "action_dims", "episode_lengths"}
    names = [
        name
        for name, value in vars(config).items()
        if name not in shapes and not name.startswith("_") and getattr(given, name, value) != value
    ]
    if not names:
        return []
    return [f"Other settings: {', '.join(f'{n} {getattr(given, n)!r} → {getattr(config, n)!r}' for n in names[:12])}."]


def _shortened(names: Sequence[str]) -> list[str]:
    """At most six names, whole parts first."""
    parts = sorted({".".join(name.split(".")[:2]) for name in names})
    return parts[:6] + ([f"and {len(parts) - 6} more"] if len(parts) > 6 else [])
