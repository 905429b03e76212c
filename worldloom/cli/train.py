"""``worldloom train``."""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from worldloom.cli.flags import FAMILY_FLAG, Flag, FlagParser, config_flags, peek_option
from worldloom.devices import keep_freed_memory
from worldloom.errors import ConfigError
from worldloom.families import Family, get_family, imported_modules
from worldloom.models.registry import config_from_dict, create_world_model, get_config, saved_class, split_name
from worldloom.training.config import TrainingConfig
from worldloom.training.run_folder import RunFolder

RUN_FLAGS = [
    Flag("model", str, "Preset, as worldloom list shows them."),
    Flag("env", str, "Gymnasium id, or dmc:, dmc_vision:, atari:, atari100k: or crafter: and a task."),
    Flag("run", str, "Folder of the run.", "runs/<env>-<model>-<time>"),
    Flag("resume", bool, "Continue the run in --run (then --model and --env are known), or begin it."),
    FAMILY_FLAG,
]
ENV_FLAGS = [
    Flag("num_envs", int, "Environments stepped together.", 1),
    Flag("parallel", str, "sync: in this process, or subprocess: one process each.", "sync"),
    Flag("action_repeat", int, "Environment steps per action; the suite's usual if not given."),
    Flag("time_limit", int, "Environment steps after which an episode is cut."),
    Flag("image_size", int, "Side to which images are resized."),
    Flag("frame_stack", int, "Last images stacked, channels first; the tdmpc2 family from pixels usually takes 3."),
    Flag("worker_timeout", float, "Seconds after which a silent environment process is replaced.", 60.0),
]
SHAPES = ("obs_shape", "action_dim", "action_type", "model_type")
"""Fields that the environment or the preset settles."""


class Plan(NamedTuple):
    """What is about to be trained.

    Attributes:
      model: the world model.
      config: how.
      env: where.
      run: its folder.
      settled: lines that say what differs from the defaults, and why.
    """

    model: Any
    config: TrainingConfig
    env: Any
    run: RunFolder
    settled: list[str]


def train(words: Sequence[str]) -> int:
    """Train an agent in an environment, or go on with a run."""
    from worldloom.training.trainer import Trainer

    resume = _flag_given(words, "--resume")
    folder = peek_option(words, "--run")
    known = RunFolder(folder) if folder and resume and RunFolder(folder).exists else None
    name = peek_option(words, "--model")
    family = split_name(name)[0] if name else _family_of(known) if known else None
    given = _flags(family).parse(words)
    if family is None or not family.algorithm.short_updates(_config_before_env(name, known, family, given)):
        keep_freed_memory()
    plan = _go_on(known, given) if known and not name else _begin(given)
    print(_headline(plan), *(f"  {line}" for line in plan.settled), f"run folder {plan.run.path}", sep="\n", flush=True)
    again = "".join(f" --family-module {name}" for name in imported_modules)
    with plan.env:
        start = time.perf_counter()
        trainer = Trainer(plan.model, plan.config, plan.run.callbacks(plan.env))
        try:
            trainer.train(plan.env, resume="auto" if given.get("resume") else False)
        except (KeyboardInterrupt, SystemExit):
            if any(plan.run.checkpoints.glob("[0-9]*")):
                print(
                    f"Stopped after {trainer.step:,} updates. To continue: worldloom train --run {plan.run.path} "
                    f"--resume{again}",
                    file=sys.stderr,
                )
            raise
        seconds = time.perf_counter() - start
    print(
        f"{trainer.step:,} updates, {seconds:,.0f} s. Next: worldloom eval {plan.run.path}{again}; "
        f"worldloom play {plan.run.path}{again}; tensorboard --logdir {plan.run.path}"
    )
    return 0


def _flags(family: Family | None) -> FlagParser:
    further = (
        "" if family else "With --model, the fields of its config are flags too: worldloom train --model tdmpc2 --help"
    )
    flags = FlagParser("train", "Train an agent in an environment, or go on with a run.", epilog=further)
    flags.group("run", RUN_FLAGS)
    flags.group("environment (make_env)", ENV_FLAGS)
    training = [
        flag._replace(aliases=("steps",)) if flag.name == "env_steps" else flag for flag in config_flags(TrainingConfig)
    ]
    flags.group("training (TrainingConfig); defaults without a recipe in brackets", training)
    if family:
        config = family.config_class
        flags.group(
            f"model ({config.__name__}); defaults without a preset in brackets", config_flags(config, exclude=SHAPES)
        )
    return flags


def _begin(given: Mapping[str, Any]) -> Plan:
    """A new run: the preset, the recipe for it in this environment, and what was given on top."""
    from worldloom.envs import make_env
    from worldloom.training.recipes import recipe

    run = RunFolder(given["run"]) if "run" in given else None
    if run and run.exists and not given.get("resume"):
        raise ConfigError(f"{run.path} holds a run; add --resume to go on with it, or choose another folder by --run.")
    if "model" not in given or "env" not in given:
        raise ConfigError(
            "A new run needs --model and --env, for example: "
            "worldloom train --model tdmpc2:tiny --env Pendulum-v1 --steps 10000."
        )
    name, (model_given, training_given, env_given) = given["model"], _sort(given)
    seed = training_given.get("seed", TrainingConfig.seed)
    if given.get("resume") and "run" not in given:
        newest = max(Path("runs").glob(f"{_plain(given['env'], name)}-*"), default=Path("runs/FOLDER"))
        raise ConfigError(f"--resume needs the folder of the run, for example --run {newest}.")
    env = make_env(given["env"], seed=seed, **env_given)
    try:
        advice = recipe(name, env, {**model_given, **training_given})
        config = TrainingConfig(**{**advice.training, **training_given})
        model = create_world_model(name, **{**advice.model, **model_given}, seed=seed, device=config.device)
    except BaseException:
        env.close()
        raise
    reasons = {**dict.fromkeys([*advice.model, *advice.training], "recipe"), **advice.reasons}
    reasons |= dict.fromkeys({**model_given, **training_given, **env_given}, "given")
    chosen = {**env_given, **advice.model, **model_given, **advice.training, **training_given}
    settled = [_as_flag(field, value, reasons[field]) for field, value in chosen.items() if field not in SHAPES]
    return Plan(model, config, env, run or RunFolder(_new_folder(given["env"], name)), settled)


def _go_on(run: RunFolder, given: Mapping[str, Any]) -> Plan:
    """The run in a folder, with what was given changed; the checkpoint refuses what may not change."""
    settings = run.settings()
    model_given, training_given, env_given = _sort(given)
    if "env" in given:
        env_given["spec"] = given["env"]
    # The end that is given counts, not one of the other kind that the run was begun with.
    ends = {"env_steps": 0} if "total_steps" in training_given else {}
    config = run.training_config(**{**ends, **training_given})
    env = run.make_env(**env_given)
    try:
        cls = saved_class(settings["model"], settings.get("model_class"), str(run.path))
        model_config = cls.config_class.from_dict({**settings["model"], **model_given})
        model = cls(model_config, seed=config.seed, device=config.device)
    except BaseException:
        env.close()
        raise
    changed = {**model_given, **training_given, **env_given}
    return Plan(model, config, env, run, [_as_flag(name, value, "given") for name, value in changed.items()])


def _sort(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What was given of the model's config, of the training config, and for the environment."""
    about_env = {flag.name for flag in ENV_FLAGS}
    about_run = {flag.name for flag in RUN_FLAGS}
    about_training = TrainingConfig.__dataclass_fields__  # type: ignore[attr-defined]
    env = {name: value for name, value in given.items() if name in about_env}
    training = {name: value for name, value in given.items() if name in about_training}
    if training.get("total_steps") and training.get("env_steps"):
        raise ConfigError("--steps (environment steps) and --total-steps (updates) both say when to end; give one.")
    rest = about_env | about_run | set(about_training)
    return {name: value for name, value in given.items() if name not in rest}, training, env


def _headline(plan: Plan) -> str:
    env, config = plan.env, plan.model.config
    episodes = f", episodes of at most {env.episode_length:,} decision steps" if env.episode_length else ""
    return (
        f"{plan.model.num_parameters():,} parameters of {config.model_type} on "
        f"{env.settings['spec']}: observations {env.obs_shape}, {env.action_dim} {env.action_type} actions{episodes}"
    )


def _as_flag(name: str, value: Any, reason: str) -> str:
    """``--batch-size 64        recipe``."""
    flag = "steps" if name == "env_steps" else name.replace("_", "-")
    text = f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}"
    return f"{text:28} {reason}"


def _new_folder(env: str, model: str) -> Path:
    """A folder that was not there before, now taken: runs that begin in the same second get one each."""
    path = Path("runs") / f"{_plain(env, model)}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(2):
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            path = path.with_name(f"{path.name.partition('.')[0]}.{number}")
        else:
            break
    return path


def _plain(env: str, model: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{env}-{model}").strip("-").lower()


def _family_of(run: RunFolder) -> Family:
    return get_family(run.settings()["model"].get("model_type"))


def _config_before_env(name: str | None, known: RunFolder | None, family: Family, given: Mapping[str, Any]) -> Any:
    """The model's config as far as it is known before the environment is made: with the smallest shapes."""
    if name is None and known is not None:
        return config_from_dict({**known.settings()["model"], **_sort(given)[0]})
    shapes = {"obs_shape": (1,), "action_dim": 1}
    return get_config(str(name), **{**shapes, **_sort(given)[0]}) if name else family.config_class(**shapes)


def _flag_given(words: Sequence[str], option: str) -> bool:
    return any(word.partition("=")[0].replace("_", "-") == option for word in words)
