"""``worldloom train``."""

from __future__ import annotations

import contextlib
import itertools
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from worldloom.cli.flags import FALSE, FAMILY_FLAG, TRUE, Flag, FlagParser, config_flags, peek_option
from worldloom.devices import keep_freed_memory
from worldloom.envs.make import module_of
from worldloom.errors import ConfigError
from worldloom.families import Family, get_family, import_from_current_folder, imported_modules
from worldloom.models.registry import config_from_dict, create_world_model, get_config, saved_class, split_name
from worldloom.training.config import TrainingConfig
from worldloom.training.run_folder import RunFolder
from worldloom.training.run_lock import RunLock

RUN_FLAGS = [
    Flag("model", str, "Preset, as worldloom list shows them."),
    Flag("env", str, "Gymnasium id, or dmc:, dmc_vision:, atari:, atari100k: or crafter: and a task."),
    Flag("run", str, "Folder of the run.", "runs/<env>-<model>-<time>"),
    Flag(
        "resume",
        bool | str,
        "Continue the run in --run (then --model and --env are known), or begin it. --resume continue does so with "
        "changed settings or environments: what fits is taken along, what changed is listed.",
    ),
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
"""Fields of the model's config that the environment or the preset determines; they are no flags."""


class Plan(NamedTuple):
    """A training run that is ready to start.

    Attributes:
      model: the world model.
      config: the training config.
      env: the environments.
      run: the run's folder.
      settings: lines that list the settings other than the defaults, with reasons.
    """

    model: Any
    config: TrainingConfig
    env: Any
    run: RunFolder
    settings: list[str]


def train(words: Sequence[str]) -> int:
    """Train an agent in an environment, or resume a run."""
    from worldloom.training.trainer import Trainer

    # Flags depend on the family, so find it first.
    resume = _resume_mode(peek_option(words, "--resume")) if _flag_given(words, "--resume") else False
    folder = peek_option(words, "--run")
    existing = RunFolder(folder) if folder and resume and RunFolder(folder).exists else None
    name = peek_option(words, "--model")
    family = split_name(name)[0] if name else _family_of(existing) if existing else None
    given = _flags(family).parse(words)
    # This setting only works before JAX computes anything.
    if family is None or not family.algorithm.short_updates(_config_before_env(name, existing, family, given)):
        keep_freed_memory()
    if folder:
        RunLock(RunFolder(folder).path).check()
    import_from_current_folder()
    plan = _resumed_run(existing, given) if existing and not name else _new_run(given)
    shown, made = _shown(plan.run.path), not plan.run.path.exists()
    with plan.env:
        trainer = Trainer(plan.model, plan.config, plan.run.callbacks(plan.env))
        trainer.check_length(plan.env)
        print(_headline(plan), *(f"  {line}" for line in plan.settings), f"run folder {shown}", sep="\n", flush=True)
        flags = "".join(f" --family-module {shlex.quote(name)}" for name in imported_modules)
        start = time.perf_counter()
        try:
            trainer.train(plan.env, resume=resume)
        except (KeyboardInterrupt, SystemExit):
            command = f"worldloom train --run {shlex.quote(shown)} --resume{flags}"
            print(f"Stopped after {trainer.step:,} updates. To continue: {command}", file=sys.stderr)
            raise
        finally:
            if made:
                with contextlib.suppress(OSError):
                    plan.run.path.rmdir()  # Only if it is empty: training was refused.
        seconds = time.perf_counter() - start
    spec = plan.env.settings["spec"]
    trust = f" --env {shlex.quote(spec)}" if isinstance(spec, str) and module_of(spec) else ""
    print(
        f"{trainer.step:,} updates, {seconds:,.0f} s. Next: worldloom eval {shlex.quote(shown)}{flags}{trust}; "
        f"worldloom play {shlex.quote(shown)}{flags}{trust}; tensorboard --logdir {shlex.quote(shown)}"
    )
    return 0


def _flags(family: Family | None) -> FlagParser:
    """The parser of the command's flags, including the fields of the family's config."""
    epilog = (
        "" if family else "With --model, the fields of its config are flags too: worldloom train --model tdmpc2 --help"
    )
    flags = FlagParser("train", "Train an agent in an environment, or resume a run.", epilog=epilog)
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


def _new_run(given: Mapping[str, Any]) -> Plan:
    """A new run with the preset and its recipe in this environment, overridden by the ``given`` flags."""
    from worldloom.envs import make_env
    from worldloom.training.recipes import recipe

    run = RunFolder(given["run"]) if "run" in given else None
    if run and run.exists and not given.get("resume"):
        raise ConfigError(f"{run.path} holds a run; add --resume to continue it, or choose another folder by --run.")
    if "model" not in given or "env" not in given:
        if run and given.get("resume"):
            found = "is not there" if not run.path.exists() else "holds no run: it has no config.json"
            raise ConfigError(
                f"--run {run.path} {found}, so there is nothing to resume. Check the folder's name; a new run there "
                "needs --model and --env too."
            )
        raise ConfigError(
            "A new run needs --model and --env, for example: "
            "worldloom train --model tdmpc2:tiny --env Pendulum-v1 --steps 10000."
        )
    name, (model_given, training_given, env_given) = given["model"], _split_given(given)
    seed = training_given.get("seed", TrainingConfig.seed)
    if given.get("resume") and "run" not in given:
        newest = max(Path("runs").glob(f"{_slug(given['env'], name)}-*"), default=Path("runs/FOLDER"))
        raise ConfigError(f"--resume needs the folder of the run, for example --run {newest}.")
    # Environment, recipe, model.
    env = make_env(given["env"], seed=seed, **env_given)
    try:
        recommended = recipe(name, env, {**model_given, **training_given})
        config = TrainingConfig(**{**recommended.training, **training_given})
        model = create_world_model(name, **{**recommended.model, **model_given}, seed=seed, device=config.device)
    except BaseException:
        env.close()
        raise
    # The settings to print, with reasons.
    reasons = {**dict.fromkeys([*recommended.model, *recommended.training], "recipe"), **recommended.reasons}
    reasons |= dict.fromkeys({**model_given, **training_given, **env_given}, "given")
    values = {**env_given, **recommended.model, **model_given, **recommended.training, **training_given}
    lines = [_as_flag(field, value, reasons[field]) for field, value in values.items() if field not in SHAPES]
    return Plan(model, config, env, run or RunFolder(_new_folder(given["env"], name)), lines)


def _resumed_run(run: RunFolder, given: Mapping[str, Any]) -> Plan:
    """The run in a folder, with the ``given`` changes; restoring its checkpoint refuses those that are impossible."""
    settings = run.settings()
    model_given, training_given, env_given = _split_given(given)
    if "env" in given:
        env_given["spec"] = given["env"]
    # A given number of updates replaces the number of environment steps that the run was begun with.
    end = {"env_steps": 0} if "total_steps" in training_given else {}
    config = run.training_config(**{**end, **training_given})
    # Whoever trains into a folder owns it; eval, play and info ask for --trust.
    env = run.make_env(trust=True, **env_given)
    try:
        cls = saved_class(settings["model"], settings.get("model_class"), str(run.path))
        model_config = cls.config_class.from_dict({**settings["model"], **model_given})
        model = cls(model_config, seed=config.seed, device=config.device)
    except BaseException:
        env.close()
        raise
    changed = {**model_given, **training_given, **env_given}
    return Plan(model, config, env, run, [_as_flag(name, value, "given") for name, value in changed.items()])


def _split_given(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The given fields of the model's config and of the training config, and the arguments of ``make_env``."""
    env_names = {flag.name for flag in ENV_FLAGS}
    run_names = {flag.name for flag in RUN_FLAGS}
    training_names = TrainingConfig.__dataclass_fields__  # type: ignore[attr-defined]
    env = {name: value for name, value in given.items() if name in env_names}
    training = {name: value for name, value in given.items() if name in training_names}
    if training.get("total_steps") and training.get("env_steps"):
        raise ConfigError("--steps (environment steps) and --total-steps (updates) both set the end; give one.")
    other_names = env_names | run_names | set(training_names)
    return {name: value for name, value in given.items() if name not in other_names}, training, env


def _headline(plan: Plan) -> str:
    """Parameters of the model, and shapes of the environment."""
    env, config = plan.env, plan.model.config
    episodes = f", episodes of at most {env.episode_length:,} decision steps" if env.episode_length else ""
    return (
        f"{plan.model.num_parameters():,} parameters of {config.model_type} on "
        f"{env.settings['spec']}: observations {env.obs_shape}, {env.action_dim} {env.action_type} actions{episodes}"
    )


def _as_flag(name: str, value: Any, reason: str) -> str:
    """A line such as ``--batch-size 64        recipe``."""
    flag = "steps" if name == "env_steps" else name.replace("_", "-")
    text = f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}"
    return f"{text:28} {reason}"


def _new_folder(env: str, model: str) -> Path:
    """A folder that does not exist yet; the lock keeps two runs that begin in the same second apart."""
    path = Path("runs") / f"{_slug(env, model)}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (path.name if number == 1 else f"{path.name}.{number}" for number in itertools.count(1))
    return next(each for each in map(path.with_name, names) if not each.exists())


def _shown(path: Path) -> str:
    """A path in messages: relative to the current folder if it is below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _resume_mode(text: str | None) -> bool | str:
    """What the value of ``--resume`` means to ``Trainer.train``."""
    if text == "continue":
        return "continue"
    if text is None or text.startswith("--") or text.lower() in TRUE:
        return "auto"
    if text.lower() in FALSE:
        return False
    raise ConfigError(f"--resume stands alone or takes 'continue', not '{text}'.")


def _slug(env: str, model: str) -> str:
    """Environment and model as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{env}-{model}").strip("-").lower()


def _family_of(run: RunFolder) -> Family:
    return get_family(run.settings()["model"].get("model_type"))


def _config_before_env(name: str | None, existing: RunFolder | None, family: Family, given: Mapping[str, Any]) -> Any:
    """The model's config before the environment is made; of a new run with the smallest shapes."""
    if name is None and existing is not None:
        return config_from_dict({**existing.settings()["model"], **_split_given(given)[0]})
    shapes = {"obs_shape": (1,), "action_dim": 1}
    return get_config(str(name), **{**shapes, **_split_given(given)[0]}) if name else family.config_class(**shapes)


def _flag_given(words: Sequence[str], option: str) -> bool:
    names = (option, f"--no-{option[2:]}")
    return any(word.partition("=")[0].replace("_", "-") in names for word in words)
