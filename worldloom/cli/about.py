"""``worldloom list``, ``info`` and ``doctor``: names of models, their size and memory, a check of the installation."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from worldloom.algorithm import ReplaySpec
from worldloom.cli.diagnosis import rewards_seen
from worldloom.cli.flags import FAMILY_FLAG, Flag, FlagParser, config_flags
from worldloom.cli.mesh_report import (
    bytes_per_device,
    collective_bytes,
    compile_on_mesh,
    divided_share,
    link_lines,
    mesh_shape,
    use_virtual_devices,
)
from worldloom.cli.train import ENV_FLAGS
from worldloom.config import check
from worldloom.devices import compiled_programs
from worldloom.errors import CheckpointError, ConfigError, UnknownModelError
from worldloom.families import find_family, get_family
from worldloom.files import absolute_path
from worldloom.models.base import merge
from worldloom.models.params import count_parameters
from worldloom.models.pretrained import WEIGHTS_FILE, default_cache_dir, read_model
from worldloom.models.registry import config_from_dict, get_config, list_models
from worldloom.training.checkpoint import Checkpointer
from worldloom.training.config import TrainingConfig
from worldloom.training.recipes import recipe
from worldloom.training.run_folder import RunFolder
from worldloom.training.run_lock import RunLock

EXTRAS = {
    "envs": ("dm_control", "mujoco", "ale_py", "crafter"),
    "video": ("matplotlib", "PIL"),
    "hub": ("huggingface_hub",),
    "wandb": ("wandb",),
    "tensorboard": ("tensorboard",),
    "minari": ("minari", "h5py"),
    "lerobot": ("pyarrow",),
}
"""Extras and the packages that they install."""
_OF_BATCH = ("batch_size", "sequence_length", "mesh")
"""Fields of ``TrainingConfig`` that determine the memory of an update."""
_SHAPE_OPTIONS = ("image_size", "frame_stack")
"""Arguments of ``make_env`` that change the shape of observations."""


def names(words: Sequence[str]) -> int:
    """Print the names of models and kinds of environments."""
    from worldloom.envs.make import JAX_SUITES, SUITES

    if words[:1] == ["protocols"]:
        return _list_protocols(words[1:])
    about = "Names of models and kinds of environments; with 'protocols', the published experiments and their settings."
    if words and not words[0].startswith("-"):
        raise ConfigError(f"'{words[0]}' is not expected: worldloom list stands alone, or takes 'protocols'.")
    FlagParser("list", about).parse(words)
    print("models, and their parameters for usual shapes (for yours: worldloom info NAME --env ENV):")
    for name, found in list_models(verbose=True).items():
        print(f"  {name:20} {found['parameters']:>11,}")
    print("environments: any Gymnasium id (Pendulum-v1, module:Id), or a suite and a task:")
    print(*(f"  {prefix}:…" for prefix in SUITES), sep="\n")
    print("environments in JAX, on the device as a whole: jax:Pendulum-v1, or those of a package:")
    print(*(f"  {prefix}:…" for prefix in JAX_SUITES), sep="\n")
    print("published experiments: worldloom list protocols")
    return 0


def _list_protocols(words: Sequence[str]) -> int:
    """Print the published experiments with their settings."""
    from worldloom.training.protocols import find_protocol, protocol_names

    FlagParser("list protocols", "Published experiments, for worldloom train --protocol NAME --env ENV.").parse(words)
    for name in protocol_names():
        found = find_protocol(name)
        envs = " | ".join(found.envs) or f"recorded data, not --env: {found.data}"
        print(f"{name}: {name.partition('/')[0]}:{found.size} on {envs}")
        of_model = {**found.model_fields, **found.data_fields}
        fields = {**found.env_options, **of_model, **found.training, **found.derived}
        print(f"  {', '.join(f'{field}={value}' for field, value in fields.items())}")
        print(f"  score: {found.score.text}" + (f"; published curves: {found.curve}" if found.curve else ""))
    print("Other fields are those of the preset, or at the defaults in worldloom train --model MODEL --help.")
    return 0


# ---- info -----------------------------------------------------------------------------------------------------------


def info(words: Sequence[str]) -> int:
    """Print parameters of a model, and memory for training it."""
    # Flags depend on what is asked for, so find it first: values of flags are words too.
    plain = [word for word in words if not word.startswith("-")]
    name = next((word for word in plain if find_family(word.partition(":")[0])), "")
    family = find_family(name.partition(":")[0]) if name else None
    if not family and any(absolute_path(word).is_dir() for word in plain):
        return _info_of_folder(words)
    about = "Parameters of a model, and memory for training it. No weights are allocated."
    flags = FlagParser("info", about, argument="name", argument_help="preset, as worldloom list shows them, or folder")
    flags.group(
        "options",
        [
            Flag("env", str, "Take the shapes of this environment."),
            *[flag for flag in ENV_FLAGS if flag.name in _SHAPE_OPTIONS],
            FAMILY_FLAG,
            Flag("exact", bool, "Compile the update and print XLA's memory plan; may take minutes."),
            *[flag for flag in config_flags(TrainingConfig) if flag.name in _OF_BATCH],
        ],
    )
    if family:
        config_class = family.config_class
        flags.group(f"model ({config_class.__name__})", config_flags(config_class, exclude=("model_type",)))
    given = flags.parse(words)
    if family is None:
        raise UnknownModelError(
            f"There is no model '{given['name']}', and no folder. Known: {', '.join(list_models())}."
        )
    changes: dict[str, Any] = {field: given.pop(field) for field in _OF_BATCH if field in given}
    training = TrainingConfig(**{**recipe(given["name"], None).training, **changes})
    exact, env_id = given.pop("exact", False), given.pop("env", None)
    if exact and training.mesh:
        use_virtual_devices(math.prod(mesh_shape(training.mesh)))
    options = {flag: given.pop(flag) for flag in _SHAPE_OPTIONS if flag in given}
    check(not options or env_id is not None, f"{' and '.join(options)} belongs to an environment: give --env too.")
    shapes = _shapes_of(env_id, options) if env_id else family.config_class.example_shapes
    config = get_config(given.pop("name"), **{**shapes, **given})
    print(f"{name} for observations {config.obs_shape} and {config.action_dim} {config.action_type} actions")
    print(*_memory_report(config, training, exact), sep="\n")
    return 0


def _info_of_folder(words: Sequence[str]) -> int:
    """Print what the folder of a run or of a saved model holds. Nothing that it names is imported."""
    flags = FlagParser("info", "What a folder holds.", argument="folder", argument_help="folder of a run or a model")
    flags.group("options", [FAMILY_FLAG])
    path = absolute_path(flags.parse(words)["folder"])
    run = RunFolder(path)
    if (path / "checkpoints").is_dir() or (run.exists and not (path / WEIGHTS_FILE).exists()):
        print(*_run_report(run), sep="\n")
        return 0
    saved = read_model(path)
    config = config_from_dict(saved.config)
    print(f"{path} holds a saved model of {config.model_type} ({saved.class_name or 'no class named'})")
    print(f"  observations {config.obs_shape}, {config.action_dim} {config.action_type} actions")
    print(f"  {sum(math.prod(array.shape) for array in saved.arrays.values()):,} numbers in {len(saved.arrays)} arrays")
    return 0


def _run_report(run: RunFolder) -> Iterator[str]:
    """Lines about a run: model, environment, checkpoints, what to do next."""
    settings, training = run.settings(), run.training_config()
    config = config_from_dict(settings["model"])
    steps = Checkpointer(run.checkpoints).steps()
    yield f"{run.path} holds a run: {run.title()}"
    yield f"  model          {config.model_type} ({settings.get('model_class', 'no class named')})"
    yield f"  observations   {config.obs_shape}, {config.action_dim} {config.action_type} actions"
    end = f"{training.env_steps:,} environment steps" if training.env_steps else f"{training.total_steps:,} updates"
    yield f"  training       until {end}, seed {training.seed}, batches of {training.batch_size}"
    yield f"  checkpoints    {', '.join(f'{step:,}' for step in steps) or 'none yet'}"
    yield f"  final weights  {run.path / 'model' if (run.path / 'model').is_dir() else 'not yet'}"
    try:
        RunLock(run.path).check()
    except CheckpointError as error:
        yield f"  {error}"


def _shapes_of(env_id: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Observation shape, action size and action type of an environment."""
    from worldloom.envs import make_env

    with make_env(env_id, **options) as env:
        return {"obs_shape": env.obs_shape, "action_dim": env.action_dim, "action_type": env.action_type}


def _memory_report(config: Any, training: TrainingConfig, exact: bool) -> Iterator[str]:
    """Lines with the parameters of each part, and the memory of one update."""
    # Parameters.
    model_class, algorithm = get_family(config.model_type)[2:]
    settings = training.of_update()
    state = jax.eval_shape(lambda key: algorithm.init_state(model_class(config), settings, key), jax.random.key(0))
    trained = {name: part for name, part in state.params.items() if name not in model_class.untrained}
    for name, part in state.params.items():
        kind = "" if name in trained else "  (a copy or statistics, not trained)"
        yield f"  {name:16} {count_parameters(part):>13,}{kind}"
    yield f"  {'parameters':16} {count_parameters(trained):>13,}"
    # Memory, from abstract evaluation.
    batch = _abstract_batch(config, training, algorithm.replay_spec(config, training))
    data, fsdp = mesh_shape(training.mesh)
    devices = data * fsdp
    sizes = {
        "weights, copies": bytes_per_device(state.params, fsdp),
        "optimizer": bytes_per_device(state.opt_state, fsdp),
        "gradients": bytes_per_device(trained, fsdp),
        "batch": _nbytes(batch) // devices,
        "activations kept": _residuals(model_class, config, state.params, batch) // devices,
    }
    if fsdp > 1:
        # At most: XLA collects a layer's weights when it needs them, and may let go of them in between.
        sizes["collected weights"] = _nbytes(trained) - sizes["gradients"]
    rows = jax.tree.leaves(batch["obs"])[0].shape[1]
    update = f"an update of {training.batch_size} × {rows} rows"
    if training.mesh:
        check(
            training.batch_size % devices == 0,
            f"batch_size={training.batch_size} cannot be divided evenly over {devices} devices.",
        )
        yield f"memory per device for {update} on {devices} devices (data={data}, fsdp={fsdp}):"
    else:
        yield f"memory for {update}:"
    yield from (f"  {name:17} {_megabytes(size):>12}" for name, size in sizes.items())
    yield f"  {'in all, about':17} {_megabytes(sum(sizes.values())):>12}"
    if fsdp > 1:
        share = divided_share((state.params, state.opt_state), fsdp)
        yield f"  {share:.1%} of weights and optimizer is divided over {fsdp} devices, the rest is copied"
    # Memory, from the compiler.
    if exact:
        if training.mesh:
            program = compile_on_mesh(algorithm, model_class, config, training, batch)
        else:
            update_of_one = jax.jit(algorithm.make_update(config, settings, model_class=model_class), donate_argnums=0)
            program = update_of_one.lower(state, batch, jax.random.key(0)).compile()
        analysis: Any = program.memory_analysis()
        total = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.output_size_in_bytes
        # Donated arguments share their memory with outputs.
        backend = f"{jax.default_backend()}{', virtual devices' if training.mesh else ''}"
        yield f"  {'as XLA plans it':17} {_megabytes(total - analysis.alias_size_in_bytes):>12}  on {backend}"
        if training.mesh:
            yield "moved between devices in an update:"
            yield from link_lines(collective_bytes(program.as_text()), devices, _megabytes)


def _abstract_batch(config: Any, training: TrainingConfig, spec: ReplaySpec) -> dict[str, Any]:
    """A batch [B, T, ...] of the algorithm's windows as ``ShapeDtypeStruct``."""
    axes = (training.batch_size, spec.rows)

    def array(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*axes, *shape), dtype)

    def for_each(value: Any, make: Any) -> Any:
        return {name: make(name, x) for name, x in value.items()} if isinstance(value, Mapping) else make(None, value)

    def action_type(name: str | None) -> str:
        return config.action_type[name] if isinstance(config.action_type, Mapping) else config.action_type

    batch = {
        "obs": for_each(config.obs_shape, lambda name, x: array(x, jnp.uint8 if len(x) == 3 else jnp.float32)),
        "actions": for_each(
            config.action_dim,
            lambda name, x: array((), jnp.int32) if action_type(name) == "discrete" else array((x,), jnp.float32),
        ),
        "rewards": array((), jnp.float32),
        **{name: array((), jnp.bool_) for name in ("is_first", "is_last", "is_terminal")},
    }
    if spec.latents:
        latents = {n: jax.ShapeDtypeStruct((axes[0], *shape), jnp.float32) for n, shape in spec.latents.items()}
        batch["context"] = latents
    if getattr(config, "num_tasks", 0):
        batch["task"] = jax.ShapeDtypeStruct(axes[:1], jnp.int32)
    return batch


def _residuals(model_class: Any, config: Any, params: Any, batch: Any) -> int:
    """Bytes of the activations that the loss keeps for its backward pass, by abstract evaluation."""

    def backward(params: Any, batch: Any, key: jax.Array) -> Any:
        return jax.vjp(lambda p: merge(model_class, config, p).compute_loss(batch, key)["loss"], params)[1]

    kept = _nbytes(jax.eval_shape(backward, params, batch, jax.random.key(0)))
    return max(kept - _nbytes(params), 0)  # The residuals include the weights.


def _nbytes(tree: Any) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape")]
    return sum(math.prod(leaf.shape) * getattr(leaf.dtype, "itemsize", 8) for leaf in leaves)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.2f} GB"


# ---- doctor ---------------------------------------------------------------------------------------------------------


def doctor(words: Sequence[str]) -> int:
    """Print versions, devices, GPU support, extras and folders; returns 1 if there is a problem."""
    if words and not words[0].startswith("-"):
        return _diagnose(words)
    about = "Versions, devices, GPU support, extras and folders; with the folder of a run, what it has seen of rewards."
    FlagParser("doctor", about).parse(words)
    problems = list(_problems())
    for section in (_versions(), _devices(), _extras(), _folders()):
        print(*section, sep="\n")
    print("problems:" if problems else "no problems found", *(f"  {problem}" for problem in problems), sep="\n")
    return 1 if problems else 0


def _diagnose(words: Sequence[str]) -> int:
    """Print what a run has seen of rewards and returns."""
    flags = FlagParser("doctor", "What a run has seen of rewards.", argument="folder", argument_help="folder of a run")
    run = RunFolder(flags.parse(words)["folder"])
    print(*rewards_seen(run), sep="\n")
    return 0


def _versions() -> Iterator[str]:
    from worldloom.training.run_info import versions

    found = versions()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"python {found.pop('python')} on {platform.platform()}, CPU cores to use: {cores}"
    yield ", ".join(f"{name} {version}" for name, version in found.items())


def _devices() -> Iterator[str]:
    """Lines with the devices that JAX sees, and the environment variables that affect them."""
    yield f"JAX computes on {jax.default_backend()} and sees:"
    for device in jax.devices():
        limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
        yield f"  {device.platform}:{device.id} {device.device_kind}" + (
            f", {_megabytes(limit)} to use" if limit else ""
        )
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        if os.environ.get(name) is not None:
            yield f"  {name}={os.environ[name]}"


def _problems() -> Iterator[str]:
    """A sentence for each problem of the installation."""
    # Does the device compute?
    start = time.perf_counter()
    try:
        jnp.dot(jnp.ones((8, 8)), jnp.ones((8, 8))).block_until_ready()
    except Exception as error:  # A broken driver may raise exceptions of any type.
        yield f"a small matrix product failed after {time.perf_counter() - start:.1f} s: {error}"
    # Does JAX use the GPU that is there?
    driver, has_gpu = nvidia_driver(), jax.default_backend() == "gpu"
    plugins = cuda_plugins()
    if driver and not has_gpu:
        forced = os.environ.get("JAX_PLATFORMS")
        if forced and "cuda" not in forced and "gpu" not in forced:
            yield f"there is a GPU ({driver}), but JAX_PLATFORMS={forced} keeps JAX off it; unset it"
        elif not plugins:
            yield f"there is a GPU ({driver}), but JAX's plugin for it is missing: pip install 'worldloom[cuda12]'"
        else:
            yield f"there is a GPU ({driver}) and {plugins}, but JAX does not use it; jax.devices() may log why"
    # Do the plugins fit jaxlib?
    jaxlib = importlib.metadata.version("jaxlib")
    yield from (
        f"{name} {version} does not fit jaxlib {jaxlib}: pip install -U 'jax[{name.split('-')[1]}]'"
        for name, version in plugins.items()
        if version.split(".")[:2] != jaxlib.split(".")[:2]
    )


def nvidia_driver() -> str | None:
    """Names, memory and driver of NVIDIA GPUs, from ``nvidia-smi``; None without a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(output.splitlines()) or None


def cuda_plugins() -> dict[str, str]:
    """Installed CUDA plugins of JAX and their versions."""
    plugins = {}
    for name in ("jax-cuda12-plugin", "jax-cuda13-plugin"):
        try:
            plugins[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return plugins


def _extras() -> Iterator[str]:
    """Lines with GPU support and the packages missing for each extra."""
    yield "for a GPU: " + (
        "ready"
        if jax.default_backend() == "gpu"
        else f"driver {nvidia_driver() or 'not found'}, JAX's plugin {cuda_plugins() or 'not installed'}"
    )
    yield "extras:"
    for extra, packages in EXTRAS.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        yield f"  {extra:12}" + (
            f"missing {', '.join(missing)}: pip install 'worldloom[{extra}]'" if missing else "there"
        )


def _folders() -> Iterator[str]:
    saved = len(list((default_cache_dir() / "models").glob("*/config.json")))
    yield f"models saved by name: {saved} in {default_cache_dir()} (WORLDLOOM_CACHE_DIR)"
    yield f"programs compiled by train, eval and play: {compiled_programs() or default_cache_dir() / 'compiled'}"
    yield f"pictures of DeepMind Control: MUJOCO_GL={os.environ.get('MUJOCO_GL') or 'not set'}"
