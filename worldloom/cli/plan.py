"""What ``worldloom train`` is about to do, and the lines that say so."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

from worldloom.cli.train_data import DataSource
from worldloom.training.config import TrainingConfig
from worldloom.training.run_folder import RunFolder
from worldloom.training.train_ratio import TrainRatio


class Plan(NamedTuple):
    """A training run that is ready to start.

    Attributes:
      model: the world model.
      config: the training config.
      env: the environments; None for a run from recorded data alone.
      run: the run's folder.
      settings: lines that list the settings other than the defaults, with reasons.
      experiment: the published experiment that the run follows, or None.
      source: its recorded data, or None.
    """

    model: Any
    config: TrainingConfig
    env: Any
    run: RunFolder
    settings: list[str]
    experiment: Any = None
    source: DataSource | None = None


def protocol_lines(experiment: Any, model: Any, config: TrainingConfig, env: Any) -> list[str]:
    """The protocol, and what of it was changed."""
    changes = experiment.changes(model.config, config, env)
    lines = [f"protocol {experiment.name}; score: {experiment.protocol.score.text}"]
    if changes:
        told = ", ".join(f"{name} {_short(new)} (published {_short(old)})" for name, (old, new) in changes.items())
        lines.append(f"CHANGED, not the published experiment: {told}")
    return lines


def _short(value: Any) -> str:
    return "default" if value is None else str(value)


def headline(plan: Plan) -> str:
    """Parameters of the model, and shapes of the environment."""
    env, config = plan.env, plan.model.config
    if env is None:
        assert plan.source is not None
        return f"{plan.model.num_parameters():,} parameters of {config.model_type} on {plan.source.headline()}"
    episodes = f", episodes of at most {env.episode_length:,} decision steps" if env.episode_length else ""
    return (
        f"{plan.model.num_parameters():,} parameters of {config.model_type} on "
        f"{env.settings['spec']}: observations {env.obs_shape}, {env.action_dim} {env.action_type} actions{episodes}"
    )


def budget(plan: Plan) -> str:
    """At how many environment steps and updates the run ends."""
    config = plan.config
    if plan.env is None:
        return f"ends after {config.total_steps:,} updates (--total-steps sets another end)"
    ratio, repeat, offline = _ratio(plan), plan.env.action_repeat, _offline(plan)
    first = f"{offline:,} updates on {plan.source.headline()}, then " if plan.source else ""
    rate = f"{ratio.ratio / ratio.rows:.3g} updates per decision step"
    if config.env_steps:
        updates = ratio.updates(config.env_steps // repeat)
        last = ratio.decisions(updates) * repeat
        # Steps after the last update would be trained on by none.
        due = "" if last == config.env_steps else f" (the last is due at {last:,})"
        return f"{first}ends after {config.env_steps:,} environment steps, {updates:,} updates{due}; {rate}"
    steps = ratio.decisions(max(0, config.total_steps - offline)) * repeat
    end = f"{config.total_steps:,} updates{' in all' if offline else ''}"
    return f"{first}ends after {end}, {steps:,} environment steps (--steps sets another end); {rate}"


def _ratio(plan: Plan) -> TrainRatio:
    spec = plan.model.algorithm.replay_spec(plan.model.config, plan.config)
    return TrainRatio.of(plan.config, spec.rows - bool(spec.latents))


def _offline(plan: Plan) -> int:
    """Updates on recorded data before the first step in an environment."""
    return plan.config.offline_updates if plan.source else 0


def goal(plan: Plan) -> str:
    """The end of a run that goes on from a checkpoint, which knows what it has done, maybe at other settings."""
    config = plan.config
    if plan.env is not None and config.env_steps:
        return f"goes on until {config.env_steps:,} environment steps"
    return f"goes on until {config.total_steps:,} updates"


def remark(plan: Plan) -> str | None:
    """What these settings come to that may not be meant, a sentence; None for nothing."""
    config, training = plan.model.config, plan.config
    if plan.env is None or getattr(config, "explore", "none") == "none":
        return None
    total = training.total_steps
    if training.env_steps:
        total = _offline(plan) + _ratio(plan).updates(training.env_steps // plan.env.action_repeat)
    if config.explore_updates <= total:
        return None
    return (
        "The intrinsic reward is still part of what is maximised at the end: --explore-updates "
        f"{config.explore_updates} in a run of {total:,} updates."
    )


def as_flag(name: str, value: Any, reason: str) -> str:
    """A line such as ``--batch-size 64        recipe``."""
    flag = "steps" if name == "env_steps" else name.replace("_", "-")
    value = " ".join(map(str, value)) if name in ("action_bounds", "drop_keys") else value
    value = ",".join(f"{axis}={size}" for axis, size in value.items()) if name == "mesh" and value else value
    text = f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}"
    return f"{text:28} {reason}"


def new_folder(env: str, model: str) -> Path:
    """A folder that does not exist yet; the lock keeps two runs that begin in the same second apart."""
    path = Path("runs") / f"{slug(env, model)}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (path.name if number == 1 else f"{path.name}.{number}" for number in itertools.count(1))
    return next(each for each in map(path.with_name, names) if not each.exists())


def shown_path(path: Path) -> str:
    """A path in messages: relative to the current folder if it is below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def slug(env: str, model: str) -> str:
    """Environment and model as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{env}-{model}").strip("-").lower()


def env_values(env: Any) -> dict[str, Any]:
    """Number of environments, action repeat, and the options of the environments in effect."""
    from worldloom.envs.make import effective_defaults

    hidden = ("spec", "seed", "time_limit", "worker_timeout", "parallel")
    defaults = {name: value for name, value in effective_defaults(env).items() if name not in hidden}
    given = {n: v for n, v in env.settings.items() if v is not None and n not in ("spec", "seed", "worker_timeout")}
    if given.get("parallel") == "sync":
        given.pop("parallel")
    return {"num_envs": env.num_envs, "action_repeat": env.action_repeat, **given, **defaults}
