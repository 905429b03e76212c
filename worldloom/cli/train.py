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
from worldloom.training.train_ratio import TrainRatio

RUN_FLAGS = [
    Flag("model", str, "Preset, as worldloom list shows them."),
    Flag("protocol", str, "Published experiment with all its settings, as worldloom list protocols shows them."),
    Flag("env", str, "Gymnasium id, or dmc:, dmc_vision:, atari:, atari100k: or crafter: and a task."),
    Flag("env_option", list, "Option of the suite or of gymnasium.make, such as noops=30; may be repeated."),
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
    Flag(
        "frame_stack", int, "Last images stacked, channels first; the tdmpc2 family from pixels takes 3 if not given."
    ),
    Flag("action_bounds", float, "Range of continuous actions that have no bounds of their own: LOW HIGH.", words=2),
    Flag("drop_keys", str, "Names of observations to leave out, such as texts.", words="+"),
    Flag("join_actions", bool, "Make one action of several, for models that take one, such as the tdmpc2 family."),
    Flag("on_bad_step", str, "stop, or restart: cut an episode at a step that returns NaN and go on.", "stop"),
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
      experiment: the published experiment that the run follows, or None.
    """

    model: Any
    config: TrainingConfig
    env: Any
    run: RunFolder
    settings: list[str]
    experiment: Any = None


def train(words: Sequence[str]) -> int:
    """Train an agent in an environment, or resume a run."""
    from worldloom.training.trainer import Trainer

    # Flags depend on the family, so find it first.
    resume = _resume_mode(peek_option(words, "--resume")) if _flag_given(words, "--resume") else False
    folder = peek_option(words, "--run")
    existing = RunFolder(folder) if folder and resume and RunFolder(folder).exists else None
    name = peek_option(words, "--model") or _preset_of(peek_option(words, "--protocol"))
    family = split_name(name)[0] if name else _family_of(existing) if existing else None
    given = _flags(family).parse(words)
    # This setting only works before JAX computes anything.
    if family is None or not family.algorithm.short_updates(_config_before_env(name, existing, family, given)):
        keep_freed_memory()
    if folder:
        RunLock(RunFolder(folder).path).check()
    import_from_current_folder()
    plan = _resumed_run(existing, given) if existing and not name else _new_run(given, name)
    shown, made = _shown(plan.run.path), not plan.run.path.exists()
    with plan.env:
        # The number of episodes is given here, so that no more environments are made than there are episodes.
        callbacks = plan.run.callbacks(plan.env, episodes=plan.config.eval_episodes, experiment=plan.experiment)
        trainer = Trainer(plan.model, plan.config, callbacks)
        trainer.check_length(plan.env)
        lines = [_headline(plan), *(f"  {line}" for line in plan.settings), _budget(plan), f"run folder {shown}"]
        print(*lines, sep="\n", flush=True)
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


def _new_run(given: Mapping[str, Any], name: str | None) -> Plan:
    """A new run of the preset ``name`` with the settings of its protocol or recipe; the ``given`` flags win."""
    from worldloom.training.protocols import protocol
    from worldloom.training.recipes import recipe

    run = RunFolder(given["run"]) if "run" in given else None
    if run and run.exists and not given.get("resume"):
        raise ConfigError(f"{run.path} holds a run; add --resume to continue it, or choose another folder by --run.")
    experiment = protocol(given["protocol"], given.get("env")) if "protocol" in given else None
    spec = experiment.env if experiment else given.get("env")
    if name is None or spec is None:
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
    model_given, training_given, env_given = _split_given(given)
    if experiment and split_name(name)[0].name != experiment.model.partition(":")[0]:
        raise ConfigError(f"The protocol '{experiment.name}' is of another family than the model '{name}'.")
    seed = training_given.get("seed", TrainingConfig.seed)
    if given.get("resume") and "run" not in given:
        newest = max(Path("runs").glob(f"{_slug(spec, name)}-*"), default=Path("runs/FOLDER"))
        raise ConfigError(f"--resume needs the folder of the run, for example --run {newest}.")
    # Environment, recipe, model.
    env_fixed = dict(experiment.protocol.env_options) if experiment else {}
    env, env_chosen = _make_env(spec, split_name(name)[0], {**env_fixed, **env_given}, seed)
    try:
        fixed = {**model_given, **training_given}
        recommended = experiment._replace(model=name).recipe(env, fixed) if experiment else recipe(name, env, fixed)
        config = TrainingConfig(**{**recommended.training, **training_given})
        model = create_world_model(name, **{**recommended.model, **model_given}, seed=seed, device=config.device)
    except BaseException:
        env.close()
        raise
    # The settings to print, with reasons.
    reasons = {**dict.fromkeys([*recommended.model, *recommended.training], "recipe"), **recommended.reasons}
    reasons |= {**dict.fromkeys(env_fixed, "protocol"), **env_chosen}
    reasons |= dict.fromkeys({**model_given, **training_given, **env_given}, "given")
    values = {**_env_values(env), **recommended.model, **model_given, **recommended.training, **training_given}
    lines = [
        _as_flag(field, value, reasons.get(field, "usual")) for field, value in values.items() if field not in SHAPES
    ]
    if experiment:
        lines = [*_protocol_lines(experiment, model, config, env), *lines]
    return Plan(model, config, env, run or RunFolder(_new_folder(spec, name)), lines, experiment)


def _make_env(spec: str, family: Family, options: dict[str, Any], seed: int) -> tuple[Any, dict[str, str]]:
    """Environments; of images, with as many frames stacked as the family needs unless ``options`` say how many.

    Returns the environments, and reasons for arguments that were chosen here.
    """
    from worldloom.envs import make_env
    from worldloom.envs.make import JAX_SUITES

    try:
        env = make_env(spec, seed=seed, **options)
        # Environments in JAX are not stacked by make_env.
        frames = None if spec.partition(":")[0] in JAX_SUITES else family.algorithm.frame_stack
        if frames and "frame_stack" not in options and isinstance(env.obs_shape, tuple) and len(env.obs_shape) == 3:
            env.close()
            return make_env(spec, seed=seed, frame_stack=frames, **options), {
                "frame_stack": "one image shows no motion"
            }
        return env, {}
    except TypeError as error:
        # What a simulator's constructor says of an option that it does not have.
        raise ConfigError(f"{spec} cannot be made with {_option_flags(options)}: {error}") from error


def _option_flags(options: Mapping[str, Any]) -> str:
    own = {flag.name for flag in ENV_FLAGS}
    flags = [f"--env-option {name}={value}" for name, value in options.items() if name not in own]
    return " ".join(flags) or "these options"


def _env_values(env: Any) -> dict[str, Any]:
    """Number of environments, action repeat, and the options of the environments in effect."""
    from worldloom.envs.make import effective_defaults

    hidden = ("spec", "seed", "time_limit", "worker_timeout", "parallel")
    defaults = {name: value for name, value in effective_defaults(env).items() if name not in hidden}
    given = {n: v for n, v in env.settings.items() if v is not None and n not in ("spec", "seed", "worker_timeout")}
    if given.get("parallel") == "sync":
        given.pop("parallel")
    return {"num_envs": env.num_envs, "action_repeat": env.action_repeat, **given, **defaults}


def _protocol_lines(experiment: Any, model: Any, config: TrainingConfig, env: Any) -> list[str]:
    """The protocol, and what of it was changed."""
    changes = experiment.changes(model.config, config, env)
    lines = [f"protocol {experiment.name}; score: {experiment.protocol.score.text}"]
    if changes:
        told = ", ".join(f"{name} {_short(new)} (published {_short(old)})" for name, (old, new) in changes.items())
        lines.append(f"CHANGED, not the published experiment: {told}")
    return lines


def _short(value: Any) -> str:
    return "default" if value is None else str(value)


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
    experiment = run.experiment()
    try:
        cls = saved_class(settings["model"], settings.get("model_class"), str(run.path))
        model_config = cls.config_class.from_dict({**settings["model"], **model_given})
        model = cls(model_config, seed=config.seed, device=config.device)
    except BaseException:
        env.close()
        raise
    changed = {**model_given, **training_given, **env_given}
    lines = [_as_flag(name, value, "given") for name, value in changed.items()]
    if experiment:
        lines = [*_protocol_lines(experiment, model, config, env), *lines]
    return Plan(model, config, env, run, lines, experiment)


def _split_given(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The given fields of the model's config and of the training config, and the arguments of ``make_env``."""
    env_names = {flag.name for flag in ENV_FLAGS}
    run_names = {flag.name for flag in RUN_FLAGS}
    training_names = TrainingConfig.__dataclass_fields__  # type: ignore[attr-defined]
    env = {name: value for name, value in given.items() if name in env_names}
    for name, value in given.get("env_option", {}).items():
        if name in env_names | {"seed", "render", "spec"}:
            raise ConfigError(f"--env-option {name}={value}: write --{name.replace('_', '-')} {value} instead.")
        env[name] = value
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


def _budget(plan: Plan) -> str:
    """At how many environment steps and updates the run ends."""
    algorithm, config = plan.model.algorithm, plan.config
    spec = algorithm.replay_spec(plan.model.config, config)
    ratio = TrainRatio.of(config, spec.rows - bool(spec.latents))
    repeat = plan.env.action_repeat
    if config.env_steps:
        return (
            f"ends after {config.env_steps:,} environment steps, {ratio.updates(config.env_steps // repeat):,} updates"
        )
    steps = ratio.decisions(config.total_steps) * repeat
    return f"ends after {config.total_steps:,} updates, {steps:,} environment steps (--steps sets another end)"


def _as_flag(name: str, value: Any, reason: str) -> str:
    """A line such as ``--batch-size 64        recipe``."""
    flag = "steps" if name == "env_steps" else name.replace("_", "-")
    value = " ".join(map(str, value)) if name in ("action_bounds", "drop_keys") else value
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


def _preset_of(name: str | None) -> str | None:
    """The model of a protocol, before the environment is known."""
    if name is None:
        return None
    from worldloom.training.protocols import find_protocol

    return f"{name.partition('/')[0]}:{find_protocol(name).size}"


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
