"""``worldloom train --data SPEC``: runs that learn from recorded data, alone or before environments."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.cli.data import DATA_OPTIONS, open_dataset
from worldloom.cli.flags import Flag
from worldloom.config import check
from worldloom.errors import ConfigError
from worldloom.models.registry import split_name
from worldloom.training.protocols import find_protocol
from worldloom.training.recipes import recipe

_log = logging.getLogger("worldloom")

DATA_FLAGS = [
    Flag("data", str, "Recorded data to train on, as worldloom data inspect takes them."),
    *DATA_OPTIONS,
    Flag("held_out", float, "Share of the episodes that is only evaluated on.", 0.1),
    Flag("then_env", str, "Environment to go on in, after --offline-updates on the data."),
]
INIT_FLAGS = [
    Flag("init_from", str, "Begin with the weights of this run, saved model or repository, as far as they fit."),
    Flag("task_like", str, "With --init-from a multitask model: the task to begin with, its number or name."),
    Flag("reset", str, "With --init-from: parts that begin anew all the same, such as reward.", words="+"),
]
_ENV_ONLY = ("prefill", "prefill_updates", "train_ratio", "env_steps")
"""Fields of the training config that mean nothing without environments."""
_WITH_BOTH = ("offline_updates", "mix", "mix_end", "mix_updates")
_WITH_ENV = (*_ENV_ONLY, "prefill_policy", "replay_capacity", *_WITH_BOTH)
_WITH_DATA = ("data", "then_env", "held_out", "data_option", "download", *_WITH_BOTH)
_RECORDED = ("data", "data_option", "held_out")


def check_family(protocol: str, size: str, model: str) -> None:
    """Raise ``ConfigError`` if the preset ``model`` is of another family than the protocol, published for ``size``."""
    family = protocol.partition("/")[0]
    check(
        split_name(model)[0].name == family,
        f"The protocol '{protocol}' is of another family than the model '{model}': leave out --model for the published "
        f"{size}, or give another size of {family}.",
    )


class DataSource:
    """The recorded data of a run.

    Attributes:
      training: what is trained on.
      held_out: what is only evaluated on; None if the run has environments for that.
      settings: the flags that say so, as JSON values for the run's config.
    """

    def __init__(self, given: Mapping[str, Any], *, evaluate: bool):
        self.settings = {name: given[name] for name in _RECORDED if name in given}
        self.training = open_dataset(str(given["data"]), dict(given))
        self.held_out = None
        share = given.get("held_out", 0.1)
        if not 0 <= share < 1:
            raise ConfigError(f"--held-out is a share from 0 to below 1, not {share!r}.")
        if evaluate and share and self.training.num_episodes >= 2:
            self.training, self.held_out = self.training.split(share)

    def settings_of(
        self, name: str, protocol: str | None, model_given: Mapping[str, Any], training_given: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
        """Fields of the model's and of the training config of a run from the data alone, and a reason for each.

        Args:
          name: preset of the model.
          protocol: published experiment with recorded data, or None.
          model_given: fields of the model's config that were given.
          training_given: fields of the training config that were given.
        """
        config = split_name(name)[0].config_class
        fields = {field.name for field in dataclasses.fields(config)}
        fixed: dict[str, Any] = {}
        if protocol is not None:
            found = find_protocol(protocol)
            if not found.data:
                raise ConfigError(f"The protocol '{protocol}' is run in an environment, not on recorded data.")
            check_family(protocol, found.size, name)
            fixed = {**found.model_fields, **found.data_fields, **found.training}
            # A model of another size differs in the fields of its preset alone.
            name = f"{protocol.partition('/')[0]}:{found.size}"
        known = self._fields(fields, {**fixed, **model_given})
        recommended = recipe(name, _Shapes(self.training), {**fixed, **known, **model_given, **training_given})
        model = {**recommended.model, **{n: v for n, v in {**fixed, **known}.items() if n in fields}, **model_given}
        training = {n: v for n, v in {**recommended.training, **fixed}.items() if n not in fields}
        training = {n: v for n, v in training.items() if n not in _ENV_ONLY} | dict(training_given)
        reasons = {**dict.fromkeys([*model, *training], "recipe"), **dict.fromkeys(known, "of the data")}
        reasons |= {**dict.fromkeys(fixed, "protocol"), **dict.fromkeys({**model_given, **training_given}, "given")}
        return model, training, reasons

    def _fields(self, known: set[str], given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the ``known`` fields that follow from the data, other than those ``given``."""
        dataset, found = self.training, {"episodic": self.training.has_terminals}
        if dataset.has_task and "num_tasks" not in known:
            _log.warning("The data are of several tasks, which this model does not tell apart.")
        tasks = 1 + max(int(task) for task in _tasks(dataset)) if dataset.has_task else 0
        if tasks > 1:
            found["num_tasks"] = tasks
            if found.pop("episodic"):
                _log.warning("The data hold terminations, which models of several tasks do not learn.")
        return {name: value for name, value in found.items() if name in known and name not in given}

    def headline(self) -> str:
        """What is trained on."""
        dataset, held_out = self.training, self.held_out
        apart = f", {held_out.num_episodes:,} held out" if held_out else ""
        return (
            f"{dataset.spec}: {len(dataset):,} rows of {dataset.num_episodes:,} episodes{apart}; observations "
            f"{dataset.obs_shape}, {dataset.action_dim} {dataset.action_type} actions"
        )


def init_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``create_world_model`` among the ``given`` flags that say what it begins with."""
    return {flag.name: given[flag.name] for flag in INIT_FLAGS if flag.name in given}


def check_data_flags(given: Mapping[str, Any], env_flags: Sequence[str]) -> None:
    """Raise ``ConfigError`` for flags of a new run that do not go together; ``env_flags`` are those of ``make_env``."""
    if "data" not in given:
        if unread := _flags_among(given, _WITH_DATA):
            raise ConfigError(f"{unread}: for recorded data; add --data.")
        return
    if "env" in given:
        raise ConfigError("--data with --env: say --then-env to go on in an environment after the data.")
    if "then_env" not in given:
        if unread := _flags_among(given, (*_WITH_ENV, "env_option", *env_flags)):
            raise ConfigError(
                f"{unread}: for an environment, and there is none beside the data; add --then-env, or leave it out. "
                "--total-steps sets the end of a run from data alone."
            )
        return
    if "held_out" in given:
        raise ConfigError("--held-out is for runs from data alone; with --then-env, the environment is evaluated in.")
    if "protocol" in given:
        raise ConfigError("--protocol with --data and --then-env: no published experiment has both.")


def check_resumed_flags(
    given: Mapping[str, Any], folder: Path, env_flags: Sequence[str], *, has_env: bool, has_data: bool
) -> None:
    """Raise ``ConfigError`` for flags that the run in ``folder`` does not read when it goes on."""
    if not has_env and (unread := _flags_among(given, ("env", "then_env", *_WITH_ENV, "env_option", *env_flags))):
        raise ConfigError(f"{unread}: for an environment, and {folder} was begun with recorded data alone.")
    if not has_data and (unread := _flags_among(given, _WITH_DATA)):
        raise ConfigError(f"{unread}: for recorded data, and {folder} was begun without.")
    if has_env and (unread := _flags_among(given, ("then_env", "held_out"))):
        raise ConfigError(f"{unread}: for a new run; {folder} goes on in its environment, or in another by --env.")


def _flags_among(given: Mapping[str, Any], names: Sequence[str]) -> str:
    """Those of ``names`` that were given, as flags; "" for none."""
    found = [name for name in dict.fromkeys(names) if name in given]
    return " and ".join("--steps" if name == "env_steps" else f"--{name.replace('_', '-')}" for name in found)


class _Shapes:
    """The attributes of environments that recipes read."""

    num_envs = action_repeat = 1

    def __init__(self, dataset: Any):
        self.obs_shape, self.action_dim, self.action_type = dataset.obs_shape, dataset.action_dim, dataset.action_type
        self.episode_length = int(dataset.episode_lengths.max()) - 1
        self.settings: dict[str, Any] = {"spec": None}


def _tasks(dataset: Any, rows: int = 4096) -> set[int]:
    """Numbers of the tasks, from the first row of every episode."""
    found: set[int] = set()
    first = dataset.first_rows[:-1]
    for start in range(0, len(first), rows):
        batch = dataset.take(first[start : start + rows, None], observations=False)
        found |= set(np.unique(batch["task"]).tolist())
    return found
