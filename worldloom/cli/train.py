"""``worldloom train``."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from worldloom import distributed
from worldloom.cli.flags import FALSE, FAMILY_FLAG, TRUE, Flag, FlagParser, config_flags, peek_option
from worldloom.cli.plan import (
    Plan,
    as_flag,
    budget,
    env_values,
    goal,
    headline,
    new_folder,
    protocol_lines,
    remark,
    shown_path,
    slug,
)
from worldloom.cli.train_data import (
    DATA_FLAGS,
    INIT_FLAGS,
    DataSource,
    check_data_flags,
    check_family,
    check_resumed_flags,
    init_options,
)
from worldloom.config import check
from worldloom.devices import keep_freed_memory
from worldloom.distributed import is_primary
from worldloom.envs.make import module_of
from worldloom.errors import ConfigError
from worldloom.families import Family, get_family, import_from_current_folder, imported_modules
from worldloom.models.registry import config_from_dict, create_world_model, get_config, saved_class, split_name
from worldloom.report.summary import SUMMARY_FILE
from worldloom.training.config import TrainingConfig
from worldloom.training.run_folder import RunFolder
from worldloom.training.run_lock import RunLock

RUN_FLAGS = [
    Flag("model", str, "Preset, as worldloom list shows them."),
    Flag("protocol", str, "Published experiment with all its settings, as worldloom list protocols shows them."),
    Flag("env", str, "Gymnasium id, or dmc:, dmc_vision:, atari:, atari100k:, crafter: or jax: and a task."),
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
PROCESS_FLAGS = [
    Flag(
        "distributed",
        bool,
        "This is one of several processes of a run, all started with the same arguments: by Slurm, Open MPI, on a TPU "
        "pod, or by the three flags that follow. Process 0 prints, evaluates and writes.",
    ),
    Flag("coordinator", str, "HOST:PORT of process 0, which all processes can reach; JAX finds it if not given."),
    Flag("processes", int, "Number of processes; JAX finds it if not given."),
    Flag("process_id", int, "Number of this process, from 0; JAX finds it if not given."),
]
ENV_FLAGS = [
    Flag("num_envs", int, "Environments stepped together, of all processes.", 1),
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


def train(words: Sequence[str]) -> int:
    """Train an agent in an environment, or resume a run."""
    from worldloom.training.checkpoint import Checkpointer
    from worldloom.training.offline_online import offline_then_online
    from worldloom.training.trainer import Trainer

    # Flags depend on the family, so find it first.
    resume = _resume_mode(peek_option(words, "--resume")) if _flag_given(words, "--resume") else False
    folder = peek_option(words, "--run")
    existing = RunFolder(folder) if folder and resume and RunFolder(folder).exists else None
    name = peek_option(words, "--model") or _preset_of(peek_option(words, "--protocol"))
    family = split_name(name)[0] if name else _family_of(existing) if existing else None
    given = _flags(family).parse(words)
    _connect(given)
    # This setting only works before JAX computes anything.
    if family is None or not family.algorithm.short_updates(_config_before_env(name, existing, family, given)):
        keep_freed_memory()
    if folder and is_primary():
        RunLock(RunFolder(folder).path).check()
    import_from_current_folder()
    plan = _resumed_run(existing, given) if existing and not name else _new_run(given, name)
    shown, made = shown_path(plan.run.path), not plan.run.path.exists()
    with plan.env or contextlib.nullcontext():
        source = plan.source
        # The number of episodes is given here, so that no more environments are made than there are episodes.
        callbacks = plan.run.callbacks(
            plan.env or (source.held_out if source else None),
            episodes=plan.config.eval_episodes,
            experiment=plan.experiment,
            data=source.settings if source else None,
            evaluate=bool(plan.config.eval_interval or plan.config.eval_at_start or plan.config.eval_at_end),
        )
        trainer = Trainer(plan.model, plan.config, callbacks)
        goes_on = bool(resume) and bool(Checkpointer(plan.run.checkpoints).steps())
        if plan.env and not goes_on:
            trainer.check_length(plan.env)
        lines = [
            headline(plan),
            *(f"  {line}" for line in plan.settings),
            goal(plan) if goes_on else budget(plan),
            *filter(None, [remark(plan)]),
            f"run folder {shown}",
        ]
        if is_primary():
            print(*lines, sep="\n", flush=True)
        flags = "".join(f" --family-module {shlex.quote(name)}" for name in imported_modules)
        start = time.perf_counter()
        try:
            if source is None or plan.env is None:
                trainer.train(plan.env if source is None else source.training, resume=resume)
            else:
                offline_then_online(trainer, source.training, plan.env, resume=resume)
        except (KeyboardInterrupt, SystemExit):
            command = f"worldloom train --run {shlex.quote(shown)} --resume{flags}"
            if is_primary():
                print(f"Stopped after {trainer.step:,} updates. To continue: {command}", file=sys.stderr)
            raise
        finally:
            if made and is_primary():
                with contextlib.suppress(OSError):
                    plan.run.path.rmdir()  # Only if it is empty: training was refused.
        seconds = time.perf_counter() - start
    if plan.env is None:
        env = "" if plan.model.algorithm.tasks(plan.model.config) else " --env ENVIRONMENT"
        print(
            f"{trainer.step:,} updates, {seconds:,.0f} s. Next: worldloom eval {shlex.quote(shown)}{flags}{env}; "
            f"tensorboard --logdir {shlex.quote(shown)}"
        )
        return 0
    spec = plan.env.settings["spec"]
    pages = [f"open {shlex.quote(str(Path(shown) / SUMMARY_FILE))} in a browser"]
    if importlib.util.find_spec("tensorboard") is not None:
        pages.append(f"tensorboard --logdir {shlex.quote(shown)}")
    trust = f" --env {shlex.quote(spec)}" if isinstance(spec, str) and module_of(spec) else ""
    if is_primary():
        print(
            f"{trainer.step:,} updates, {seconds:,.0f} s. Next: worldloom eval {shlex.quote(shown)}{flags}{trust}; "
            f"worldloom play {shlex.quote(shown)}{flags}{trust}; {'; '.join(pages)}"
        )
    return 0


def _connect(given: dict[str, Any]) -> None:
    """Connect the processes of a distributed run, and take the flags for that out of ``given``."""
    wanted = given.pop("distributed", False)
    found = {flag.name: given.pop(flag.name) for flag in PROCESS_FLAGS if flag.name in given}
    if not wanted:
        check(not found, f"{' and '.join(_option_names(found))} only means something with --distributed.")
        return
    check(
        bool(given.get("run")),
        "--distributed needs --run FOLDER: every process must know the folder, on a disk that all of them see.",
    )
    distributed.initialize(found.get("coordinator"), found.get("processes"), found.get("process_id"))
    if not is_primary():
        # Process 0 says it all; errors of this one still end it with a sentence.
        logging.getLogger("worldloom").setLevel(logging.ERROR)


def _option_names(names: Iterable[str]) -> list[str]:
    return [f"--{name.replace('_', '-')}" for name in names]


def _own_share(num_envs: int) -> int:
    """How many of ``num_envs`` environments this process steps. Raises ``ConfigError`` if they cannot be divided."""
    count = jax.process_count()
    check(
        num_envs % count == 0,
        f"--num-envs {num_envs} cannot be divided evenly over {count} processes; use a multiple of {count}.",
    )
    return num_envs // count


def _flags(family: Family | None) -> FlagParser:
    """The parser of the command's flags, including the fields of the family's config."""
    epilog = (
        "" if family else "With --model, the fields of its config are flags too: worldloom train --model tdmpc2 --help"
    )
    flags = FlagParser("train", "Train an agent in an environment, or resume a run.", epilog=epilog)
    flags.group("run", RUN_FLAGS)
    flags.group("recorded data (worldloom.data.open)", DATA_FLAGS)
    flags.group("several processes", PROCESS_FLAGS)
    flags.group("weights of another model (create_world_model)", INIT_FLAGS)
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
    if run and run.exists and "protocol" in given and not {"env", "data"} & set(given):
        raise ConfigError(
            f"{run.path} goes on with its own protocol: give --run {run.path} --resume alone, or the whole command "
            "that began it, with --env."
        )
    experiment = protocol(given["protocol"], given.get("env")) if "protocol" in given and "data" not in given else None
    check_data_flags(given, [flag.name for flag in ENV_FLAGS])
    spec = experiment.env if experiment else given.get("then_env", given.get("env"))
    if name is None or (spec is None and "data" not in given):
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
    if experiment:
        check_family(experiment.name, experiment.protocol.size, name)
    seed = training_given.get("seed", TrainingConfig.seed)
    of = spec or str(given["data"])
    if given.get("resume") and "run" not in given:
        newest = max(Path("runs").glob(f"{slug(of, name)}-*"), default=Path("runs/FOLDER"))
        raise ConfigError(f"--resume needs the folder of the run, for example --run {newest}.")
    source = DataSource(given, evaluate=spec is None) if "data" in given else None
    if source and spec is None:
        return _run_of_data(source, name, model_given, training_given, run or RunFolder(new_folder(of, name)), given)
    # Environment, recipe, model.
    env_fixed = experiment.env_options if experiment else {}
    with experiment.named_in_errors() if experiment else contextlib.nullcontext():
        env, env_chosen = _make_env(spec, split_name(name)[0], {**env_fixed, **env_given}, seed)
    try:
        fixed = {**model_given, **training_given}
        recommended = experiment.recipe(env, fixed) if experiment else recipe(name, env, fixed)
        config = TrainingConfig(**{**recommended.training, **training_given})
        values = {**recommended.model, **model_given}
        model = create_world_model(name, **values, seed=seed, device=config.device, **init_options(given))
    except BaseException:
        env.close()
        raise
    # The settings to print, with reasons.
    reasons = {**dict.fromkeys([*recommended.model, *recommended.training], "recipe"), **recommended.reasons}
    reasons |= {**dict.fromkeys(env_fixed, "protocol"), **env_chosen}
    reasons |= dict.fromkeys({**model_given, **training_given, **env_given}, "given")
    values = {**env_values(env), **recommended.model, **model_given, **recommended.training, **training_given}
    lines = [
        as_flag(field, value, reasons.get(field, "usual")) for field, value in values.items() if field not in SHAPES
    ]
    if experiment:
        lines = [*protocol_lines(experiment, model, config, env), *lines]
    return Plan(model, config, env, run or RunFolder(new_folder(of, name)), lines, experiment, source)


def _run_of_data(
    source: DataSource,
    name: str,
    model_given: dict[str, Any],
    training_given: dict[str, Any],
    run: RunFolder,
    given: Mapping[str, Any],
) -> Plan:
    """A new run from recorded data alone, with the settings of a protocol of such data if one is given."""
    values, training, reasons = source.settings_of(name, given.get("protocol"), model_given, training_given)
    config = TrainingConfig(**training)
    model = create_world_model(name, **values, seed=config.seed, device=config.device, **init_options(given))
    lines = [
        as_flag(name, value, reasons[name]) for name, value in {**values, **training}.items() if name not in SHAPES
    ]
    return Plan(model, config, None, run, lines, None, source)


def _make_env(spec: str, family: Family, options: dict[str, Any], seed: int) -> tuple[Any, dict[str, str]]:
    """Environments; of images, with as many frames stacked as the family needs unless ``options`` say how many.

    Returns the environments, and reasons for arguments that were chosen here.
    """
    from worldloom.envs import make_env
    from worldloom.envs.across_processes import across_processes
    from worldloom.envs.make import JAX_SUITES

    if jax.process_count() > 1:
        options = {**options, "num_envs": _own_share(options.get("num_envs", 1))}
    try:
        env = make_env(spec, seed=seed, **options)
        # Environments in JAX are not stacked by make_env.
        in_jax = isinstance(spec, str) and spec.partition(":")[0] in JAX_SUITES
        frames = None if in_jax else family.algorithm.frame_stack
        if frames and "frame_stack" not in options and isinstance(env.obs_shape, tuple) and len(env.obs_shape) == 3:
            env.close()
            env = make_env(spec, seed=seed, frame_stack=frames, **options)
            return across_processes(env), {"frame_stack": "one image shows no motion"}
        return across_processes(env), {}
    except TypeError as error:
        # What a simulator's constructor says of an option that it does not have.
        raise ConfigError(f"{spec} cannot be made with {_option_flags(options)}: {error}") from error


def _option_flags(options: Mapping[str, Any]) -> str:
    own = {flag.name for flag in ENV_FLAGS}
    flags = [f"--env-option {name}={value}" for name, value in options.items() if name not in own]
    return " ".join(flags) or "these options"


def _resumed_run(run: RunFolder, given: Mapping[str, Any]) -> Plan:
    """The run in a folder, with the ``given`` changes; restoring its checkpoint refuses those that are impossible."""
    from worldloom.envs.across_processes import across_processes

    settings = run.settings()
    for name in init_options(given):
        raise ConfigError(f"--{name.replace('_', '-')} is for a new run; {run.path} goes on with its own weights.")
    kinds = {"has_env": settings.get("env") is not None, "has_data": bool(settings.get("data"))}
    check_resumed_flags(given, run.path, [flag.name for flag in ENV_FLAGS], **kinds)
    model_given, training_given, env_given = _split_given(given)
    if "env" in given:
        env_given["spec"] = given["env"]
    # A given number of updates replaces the number of environment steps that the run was begun with.
    end = {"env_steps": 0} if "total_steps" in training_given else {}
    config = run.training_config(**{**end, **training_given})
    # Whoever trains into a folder owns it; eval, play and info ask for --trust.
    recorded = run.settings().get("data")
    has_env = run.settings().get("env") is not None
    source = DataSource({**recorded, **given}, evaluate=not has_env) if recorded else None
    env = None
    if has_env or not source:
        share = {}
        if jax.process_count() > 1:
            share["num_envs"] = _own_share(env_given.get("num_envs") or (settings["env"] or {}).get("num_envs", 1))
        env = across_processes(run.make_env(trust=True, **{**env_given, **share}))
    experiment = run.experiment()
    try:
        cls = saved_class(settings["model"], settings.get("model_class"), str(run.path))
        model_config = cls.config_class.from_dict({**settings["model"], **model_given})
        model = cls(model_config, seed=config.seed, device=config.device)
    except BaseException:
        if env:
            env.close()
        raise
    changed = {**model_given, **training_given, **env_given}
    lines = [as_flag(name, value, "given") for name, value in changed.items()]
    if experiment:
        lines = [*protocol_lines(experiment, model, config, env), *lines]
    return Plan(model, config, env, run, lines, experiment, source)


def _split_given(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The given fields of the model's config and of the training config, and the arguments of ``make_env``."""
    env_names = {flag.name for flag in ENV_FLAGS}
    run_names = {flag.name for flag in (*RUN_FLAGS, *DATA_FLAGS, *INIT_FLAGS, *PROCESS_FLAGS)}
    training_names = TrainingConfig.__dataclass_fields__  # type: ignore[attr-defined]
    env = {name: value for name, value in given.items() if name in env_names}
    for name, value in given.get("env_option", {}).items():
        if name in env_names | {"seed", "render", "spec"}:
            raise ConfigError(f"--env-option {name}={value}: write --{name.replace('_', '-')} {value} instead.")
        env[name] = value
    training = {name: value for name, value in given.items() if name in training_names}
    if training.get("env_steps") == 0 and not training.get("total_steps"):
        raise ConfigError("--steps 0 is no end of a run; give its environment steps, or its updates as --total-steps.")
    if training.get("total_steps") and training.get("env_steps"):
        raise ConfigError("--steps (environment steps) and --total-steps (updates) both set the end; give one.")
    other_names = env_names | run_names | set(training_names)
    return {name: value for name, value in given.items() if name not in other_names}, training, env


def _resume_mode(text: str | None) -> bool | str:
    """What the value of ``--resume`` means to ``Trainer.train``."""
    if text == "continue":
        return "continue"
    if text is None or text.startswith("--") or text.lower() in TRUE:
        return "auto"
    if text.lower() in FALSE:
        return False
    raise ConfigError(f"--resume stands alone or takes 'continue', not '{text}'.")


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
