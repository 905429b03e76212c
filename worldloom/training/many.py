"""Many seeds and settings of one run in one compiled program."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from worldloom.config import check, freeze, is_integer, is_number, nearest, shown
from worldloom.devices import resolve_device
from worldloom.envs import VectorEnv, is_env, make_env
from worldloom.envs.hints import about_object
from worldloom.errors import NonFiniteError
from worldloom.families import get_family
from worldloom.files import absolute_path, write_atomically
from worldloom.report.curves import points, read_records
from worldloom.report.many import seeds_curve
from worldloom.report.score import bootstrap_interval, interquartile_mean
from worldloom.sharding import resolve_mesh
from worldloom.training.callbacks import EpisodesCallback
from worldloom.training.callbacks.base import as_callback
from worldloom.training.callbacks.runner import CallbackRunner
from worldloom.training.checkpoint import Checkpointer
from worldloom.training.config import TrainingConfig
from worldloom.training.interrupts import Interrupts
from worldloom.training.on_device.fit import fit_members
from worldloom.training.on_device.transfer import why_on_host
from worldloom.training.recipes import recipe
from worldloom.training.resume import resume_run, save_dirs
from worldloom.training.run_folder import RunFolder
from worldloom.training.run_state import Run
from worldloom.training.update_loop import CompiledUpdate

_log = logging.getLogger("worldloom")

VARIABLE = ("learning_rate", "weight_decay", "grad_clip", "train_ratio")
"""Fields of ``TrainingConfig`` that members may differ in; all but ``train_ratio`` become arrays in the program."""
SUMMARY, PICTURE = "summary.json", "summary.png"


class Member(NamedTuple):
    """One run among many.

    Attributes:
      run: its folder, which is that of any other run.
      seed: its seed.
      settings: the fields in which it differs from the others, by name.
      model: the trained model.
      returns: of its newest evaluation, or mean over its last training episodes; NaN if there are none.
    """

    run: RunFolder
    seed: int
    settings: dict[str, float]
    model: Any
    returns: float


def train_many(
    name: str,
    env: Any,
    seeds: Sequence[int] = range(8),
    vary: Mapping[str, Sequence[float]] | None = None,
    config: TrainingConfig | None = None,
    *,
    folder: str | Path | None = None,
    num_envs: int = 1,
    env_options: Mapping[str, Any] | None = None,
    resume: bool = False,
    callbacks: Callable[[int], Sequence[Any]] | None = None,
    model: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> list[Member]:
    """Train one member for every seed and every combination of settings, all of them in one program.

        members = train_many("tdmpc2:tiny", "jax:Pendulum-v1", seeds=range(8), vary={"learning_rate": [1e-3, 3e-4]})

    A member is the run of that seed and those settings alone, up to rounding: the compiler computes products of many
    members in another order. Each has the folder of an ordinary run, ``<folder>/<settings>seed<n>``, which can be
    resumed, evaluated and loaded alone. ``<folder>/summary.json`` and ``summary.png`` hold the interquartile mean over
    seeds with its 95 % bootstrap interval, for every setting.

    ``mesh={"data": 4}`` divides the members over four devices: each trains a quarter of them, without any traffic.

    Args:
      name: preset, such as ``"tdmpc2:tiny"``.
      env: a spec of environments in JAX, or such an object.
      seeds: a seed for each member: of its weights, environments and draws.
      vary: values to try of ``learning_rate``, ``weight_decay``, ``grad_clip`` and ``train_ratio``; every combination.
        Lists, or arrays of NumPy or JAX.
      config: None means the recipe of the preset in this environment. Its ``mesh`` is of all members together: that
        of each is empty, so that they go on alone, without a mesh, or over another one.
      folder: None means ``runs/<env>-<preset>-many``.
      num_envs: environments of each member.
      env_options: further arguments of ``make_env``.
      resume: continue the members from their newest checkpoints, where there are any; all must be at the same update.
      callbacks: member's index → its callbacks, in place of those of a run folder (which then is not written).
      model: fields of the model's config.
      **overrides: fields of ``config``.

    Raises:
      ConfigError: the environment is not in JAX; the folder holds runs, and ``resume`` is False or they are no
        members; a setting cannot be varied; members are at different updates; they cannot be divided evenly over the
        devices of ``mesh``, or it divides weights (``fsdp``).
      DeviceError: there are fewer devices than in ``mesh``.
      NonFiniteError, KeyboardInterrupt, SystemExit: see ``Trainer.train``; all members end together.
    """
    check(isinstance(name, str), f"The model is the name of a preset, such as 'tdmpc2:tiny', not {name!r:.80}.")
    seeds, vary = _checked_seeds(seeds), _checked_vary(vary)
    check(
        is_env(env) and not isinstance(env, VectorEnv),
        "train_many makes its environments itself: give it a spec such as 'jax:Pendulum-v1', or an environment in JAX, "
        f"not {type(env).__name__}.{'' if isinstance(env, VectorEnv) else about_object(env)}",
    )
    path = absolute_path(folder or f"runs/{_slug(env)}-{name.replace(':', '-')}-many")
    plans = [
        (dict(zip(vary, chosen, strict=True)), seed) for chosen in itertools.product(*vary.values()) for seed in seeds
    ]
    check("seed" not in overrides, "seeds of train_many are its argument seeds, not seed.")
    check(
        overrides.get("loop", config.loop if config else "auto") != "host",
        "train_many trains on the device; loop='host' is for Trainer.train, one seed after the other.",
    )
    names = [_member_name(_texts(chosen, vary), seed) for chosen, seed in plans]
    if callbacks is None:
        _check_folder(path, names, resume=resume)
    devices = _devices(len(plans), config or TrainingConfig(), overrides)
    worlds = [make_env(env, num_envs, seed=seed, **(env_options or {})) for _, seed in plans]
    runs, folders, runners = [], [], []
    for index, ((chosen, seed), world) in enumerate(zip(plans, worlds, strict=True)):
        # Each run is one of one device, as are its folder and its checkpoints: the mesh divides the members.
        fixed = {**overrides, **chosen, "seed": seed, "mesh": {}}
        recommended = recipe(name, world, {**(model or {}), **(config.to_dict() if config else {}), **fixed})
        training = config or TrainingConfig(**recommended.training)
        training = training.replace(**fixed)
        run = Run(_new_model(name, {**recommended.model, **(model or {})}, seed, training.device), training)
        run.use_env(world)
        reason = why_on_host(run)
        check(reason is None, f"train_many trains on the device, which is impossible: {reason}.")
        own = RunFolder(path / names[index])
        given: Sequence[Any] = callbacks(index) if callbacks else own.callbacks(world, progress=index == 0)
        runner = CallbackRunner([EpisodesCallback(run.collector), *(as_callback(each) for each in given)])
        runs.append(run)
        folders.append(own)
        runners.append(runner)
    if resume:
        _resume(runs, runners, folders)
    _check_together(runs, vary)
    _fit(runs, runners, vary, plans, devices)
    members = [
        Member(own, seed, chosen, run.model, _returns(run, runner, own if callbacks is None else None))
        for own, run, runner, (chosen, seed) in zip(folders, runs, runners, plans, strict=True)
    ]
    for world in worlds:
        world.close()
    if callbacks is None:
        _summarize(path, members, vary)
    return members


def _fit(
    runs: list[Run],
    runners: list[CallbackRunner],
    vary: Mapping[str, Sequence[float]],
    plans: Sequence[tuple[dict[str, float], int]],
    devices: Sequence[jax.Device],
) -> None:
    first = runs[0]
    total = first.config.total_steps
    if first.config.env_steps:
        total = max(run.updates_for(run.config.env_steps) for run in runs)
    names = [name for name in vary if name != "train_ratio"]
    settings = [{name: np.float32(chosen[name]) for name in names} for chosen, _ in plans] if names else None
    for run, runner in zip(runs, runners, strict=True):
        runner.start(run.config, run.new_metrics())
    with jax.default_device(first.device), Interrupts() as interrupts:
        try:
            if first.step < total:
                make_update = _VariedUpdate.of(first, total) if names else None
                shared: dict[str, Any] = {"make_update": make_update, "settings": settings, "devices": devices}
                fit_members(runs, total, runners, interrupts, **shared)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error} All members were stopped.") from None
        finally:
            for run, runner in zip(runs, runners, strict=True):
                runner.close()
                run.sync_model()
    interrupts.raise_received()


def _checked_seeds(seeds: Any) -> list[int]:
    """``seeds`` as Python's integers. Raises ``ConfigError`` unless they are different, and at least one."""
    values = _values(seeds)
    fine = bool(values) and all(is_integer(value) and value >= 0 for value in values) and len({*values}) == len(values)
    check(fine, f"seeds must be different integers ≥ 0, at least one, such as range(8), not {shown(seeds):.200}.")
    return values


def _checked_vary(vary: Any) -> dict[str, list[float]]:
    """``vary`` with Python's numbers. Raises ``ConfigError`` for what cannot be varied, or is no list of numbers."""
    example = "such as {'learning_rate': [1e-3, 3e-4]}"
    check(vary is None or isinstance(vary, Mapping), f"vary must be a dict, {example}, not {vary!r:.200}.")
    found = {}
    for key, given in (vary or {}).items():
        check(
            key in VARIABLE,
            f"'{key}' cannot be varied in one program; {', '.join(VARIABLE)} can.{nearest(str(key), VARIABLE)}",
        )
        values = _values(given)
        check(
            bool(values) and all(is_number(value) for value in values),
            f"vary[{key!r}] must be a list of numbers, {example}, not {given!r:.200}.",
        )
        # All but the train ratio are float32 in the program; values beyond its range are refused by the config.
        with np.errstate(over="ignore"):
            computed = values if key == "train_ratio" else [float(np.float32(value)) for value in values]
        check(
            len(values) == len({*computed}) and (all(computed) or key == "train_ratio"),
            f"vary[{key!r}]={values} must hold different values, in float32, other than 0, which is another program.",
        )
        found[key] = values
    return found


def _values(given: Any) -> list[Any]:
    """The entries of a sequence or an array, numbers as Python's; none of anything else."""
    try:
        return [] if isinstance(given, str | Mapping) else [freeze(value) for value in given]
    except TypeError:
        return []


def _devices(count: int, config: TrainingConfig, overrides: Mapping[str, Any]) -> list[jax.Device]:
    """The devices that ``mesh`` divides ``count`` members over; none without a mesh.

    Raises ``ConfigError`` or ``DeviceError`` if it cannot.
    """
    check(
        jax.process_count() == 1,
        f"train_many trains in one process, and there are {jax.process_count()}: give each its own seeds, without "
        "worldloom.distributed.",
    )
    given = {name: overrides.get(name, getattr(config, name)) for name in ("mesh", "device")}
    asked = TrainingConfig(**given)  # refuses what is no mesh
    mesh = dict(asked.mesh)
    if not mesh:
        return []
    check(
        not asked.divides_weights,
        f"mesh={mesh} divides weights (fsdp), and in train_many each device holds members whole; use mesh={{'data': "
        "-1}, or train one run alone with fsdp.",
    )
    devices = jax.devices(resolve_device(asked.device).platform)
    used, _ = resolve_mesh(mesh, len(devices))
    fitting = max(n for n in range(1, used + 1) if count % n == 0)
    check(
        fitting == used,
        f"{count} member{'s' if count > 1 else ''} (seeds × settings) cannot be divided evenly over the {used} devices "
        f"of mesh={mesh}; use a multiple of {used}, or mesh={{'data': {fitting}}}.",
    )
    _log.info("%d members on %d devices, %d on each.", count, used, count // used)
    return devices[:used]


class _Varied:
    """A training config in which some numbers are arrays, for an update that computes with them."""

    def __init__(self, config: TrainingConfig, values: Mapping[str, Any]):
        self._config, self._values = config, values

    def __getattr__(self, name: str) -> Any:
        return self._values[name] if name in self._values else getattr(self._config, name)


class _VariedUpdate(NamedTuple):
    """Makes the update of a member from its settings. Equal ones share their compiled program, which holds no run."""

    config: Any
    training: TrainingConfig
    model_class: type[Any]
    version: Any
    loss_terms: tuple[str, ...]
    skip_nonfinite: bool
    keeps_latents: bool
    unrolled: bool

    @classmethod
    def of(cls, run: Run, total_steps: int) -> _VariedUpdate:
        """That of ``run``, whose learning rate's schedule ends at ``total_steps`` updates."""
        assert run.sampler is not None
        model, training = run.model, run.config.of_update(total_steps)
        skip, keeps = run.config.skip_nonfinite, run.sampler.uses_latents
        return cls(model.config, training, type(model), model.version(), run.loss_terms, skip, keeps, run.unrolled)

    def __call__(self, settings: Mapping[str, Any]) -> CompiledUpdate:
        """The update of a member with ``settings``, in traced code."""
        training: Any = _Varied(self.training, settings)
        update = self.model_class.algorithm.make_update(self.config, training, model_class=self.model_class)
        parts = self.loss_terms, self.skip_nonfinite, self.keeps_latents, self.unrolled
        return CompiledUpdate(update, *parts, latent_dtype=self.training.latent_dtype)


def _check_folder(path: Path, names: Sequence[str], *, resume: bool) -> None:
    """Raise ``ConfigError`` if the folder holds runs that would be begun anew, or left out of its summary."""
    held = [each for each in names if Checkpointer(RunFolder(path / each).checkpoints).steps()]
    check(
        resume or not held,
        f"{path} holds runs already: {', '.join(held)}. Continue them with resume=True, or choose another folder.",
    )
    others = sorted(_summarized(path) - {*names})
    check(
        not others,
        f"{path} also holds {', '.join(others)}, which its summary would no longer name: train them too, or choose "
        "another folder.",
    )


def _summarized(path: Path) -> set[str]:
    """The runs in the summary of the folder ``path``; empty if there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        groups = json.loads((path / "summary.json").read_text(encoding="utf-8"))["groups"]
        return {str(name) for group in groups for name in group["runs"]}
    return set()


def _new_model(name: str, fields: Mapping[str, Any], seed: int, device: str) -> Any:
    """A model of the preset ``name``, as ``create_world_model`` makes it."""
    kind, _, size = name.partition(":")
    family = get_family(kind)
    config = family.config_class.from_size(size, **fields) if size else family.config_class(**fields)
    return family.model_class(config, seed=seed, device=device)


def _resume(runs: Sequence[Run], runners: Sequence[CallbackRunner], folders: Sequence[RunFolder]) -> None:
    """Restore all members from the newest update of which every one of them has a checkpoint.

    They are saved one after the other: one that was killed in between leaves some behind. Raises ``ConfigError`` if
    there is no such update, but some member has a checkpoint.
    """
    saves = [folder for runner in runners for folder in save_dirs(runner)[:1]]
    steps = [set(Checkpointer(each).steps()) for each in saves]
    if not any(steps) or len(steps) < len(runs):  # The latter without callbacks that save, which is said.
        for run, runner in zip(runs, runners, strict=True):
            resume_run(run, runner, "auto")
        return
    missing = [str(own.path) for own, each in zip(folders, steps, strict=True) if not each]
    check(
        not missing,
        f"There is no checkpoint in {', '.join(missing)}, and members begin together; train those alone, or in a call "
        "of train_many with a folder of its own.",
    )
    newest, common = {max(each) for each in steps}, set.intersection(*steps)
    check(
        bool(common),
        f"No update is in the checkpoints of all members, whose newest are at {sorted(newest)}. Resume them alone, by "
        "worldloom train --run FOLDER --resume.",
    )
    if len(newest) > 1:
        _log.warning("Members were saved up to the updates %s: all go on from %d.", sorted(newest), max(common))
    for run, runner, folder in zip(runs, runners, saves, strict=True):
        resume_run(run, runner, "auto" if len(newest) == 1 else folder / str(max(common)))


def _check_together(runs: Sequence[Run], vary: Mapping[str, Any]) -> None:
    check(
        not runs[0].config.env_steps or len(set(vary.get("train_ratio", [0]))) == 1,
        f"Members of different train_ratio do different numbers of updates in env_steps={runs[0].config.env_steps}, "
        "and all members of one program do as many: give total_steps in place of env_steps.",
    )
    steps = {run.step for run in runs}
    check(
        len(steps) == 1,
        f"The members are at the updates {sorted(steps)}, as the newest checkpoint of one cannot be read: delete those "
        f"after update {min(steps)} of the others, then resume all of them.",
    )


def _returns(run: Run, runner: CallbackRunner, own: RunFolder | None) -> float:
    """The newest mean return: of an evaluation, else of training episodes. Without a folder, of what was measured."""
    if own is None and "eval/return" in runner.measurements:
        return runner.measurements["eval/return"]
    log = own.path / "metrics.jsonl" if own else None
    if log and log.is_file():
        for name in ("eval/return", "collect/return"):
            _, found = points(read_records(log), name)
            if len(found):
                return float(found[-1])
    ends = [record.end.episode_return for record in run.collector.ends] if run.collector else []
    return float(np.mean(ends)) if ends else float("nan")


def _summarize(path: Path, members: Sequence[Member], vary: Mapping[str, Sequence[float]]) -> None:
    """Write ``summary.json`` and, where Matplotlib is installed, ``summary.png``."""
    groups: dict[str, list[Member]] = {}
    for member in members:
        texts = _texts(member.settings, vary)
        groups.setdefault(", ".join(f"{name} {text}" for name, text in texts.items()), []).append(member)
    table = []
    for text, group in groups.items():
        scores = [member.returns for member in group if np.isfinite(member.returns)]
        entry: dict[str, Any] = {"settings": group[0].settings, "seeds": [member.seed for member in group]}
        entry["returns"] = [member.returns if np.isfinite(member.returns) else None for member in group]
        if scores:
            low, high = bootstrap_interval([scores])
            entry |= {"iqm": interquartile_mean(scores), "interval_95": [low, high]}
        table.append(entry | {"runs": [member.run.path.name for member in group], "name": text or "all"})
    write_atomically(path / SUMMARY, json.dumps({"format": 1, "groups": table}, indent=2) + "\n")
    try:
        seeds_curve(
            {
                text or "all": [read_records(m.run.path / "metrics.jsonl") for m in group]
                for text, group in groups.items()
            },
            path / PICTURE,
        )
    except Exception as error:  # A picture must not fail a run that is complete.
        _log.warning("%s was not drawn: %s", PICTURE, error)


def _member_name(texts: Mapping[str, str], seed: int) -> str:
    return "-".join([*(f"{name}={text}" for name, text in texts.items()), f"seed{seed}"])


def _texts(settings: Mapping[str, float], vary: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """A text for each value: its first six digits, or all where they are those of another value as well."""
    short = {name: [f"{value:g}" for value in values] for name, values in vary.items()}
    texts = {name: f"{value:g}" for name, value in settings.items()}
    return {n: repr(settings[n]) if short.get(n, []).count(text) > 1 else text for n, text in texts.items()}


def _slug(env: Any) -> str:
    return (env if isinstance(env, str) else type(env).__name__).replace(":", "-")
