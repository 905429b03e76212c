"""Writes a model's policy, encoder and imagination, with their weights, to one file that needs no worldloom."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from flax import nnx
from gymnasium import spaces
from jax import export

from worldloom import policy_file
from worldloom._version import __version__
from worldloom.acting import Policy
from worldloom.config import check, is_integer
from worldloom.devices import compute_dtype
from worldloom.envs.native import EnvSpaces
from worldloom.errors import ConfigError
from worldloom.files import atomic_file
from worldloom.models.compilation import graphdef
from worldloom.models.live_weights import live_weights
from worldloom.spaces import ACTION, OBS, named, unnamed
from worldloom.spaces.actions import ActionSpec
from worldloom.spaces.observations import ObservationSpec

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class _Program(NamedTuple):
    """A function over flat lists of arrays, and the shapes of its arguments.

    Attributes:
      function: (weights, *groups) → groups, every group a list of arrays.
      groups: shapes of the groups, for N and H as given.
    """

    function: Callable[..., Any]
    groups: Callable[[Any, Any], list[list[jax.ShapeDtypeStruct]]]


def export_policy(
    model: Any,
    path: str | Path,
    *,
    env: Any = None,
    num_envs: int | None = None,
    planner: Mapping[str, Any] | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    precision: str | None = None,
) -> Path:
    """Write what ``model`` does to a file, which :func:`worldloom.policy_file.load_policy` acts by.

    The file holds the programs ``sample`` and ``greedy`` (the two modes of ``model.policy``), ``encode`` and
    ``imagine`` as StableHLO, those weights that they use, the spaces of the environment, and a manifest. Its policy
    returns what ``model.policy(env)`` returns, from the same seed and observations.

    Args:
      model: the world model.
      path: of the file; it is replaced.
      env: see :class:`worldloom.Policy`; None is the environment that the model was trained in, if the model knows it.
      num_envs: environments that the file acts in together; None is any number, chosen when it is loaded.
      planner: fields of the config that change how much is planned.
      platforms: where it shall run: ``"cpu"``, ``"cuda"``, ``"rocm"``, ``"tpu"``.
      precision: ``"float32"`` or ``"bfloat16"`` activations; None is that of the model.

    Returns:
      ``path``.

    Raises:
      ConfigError: an argument is invalid, the environment does not fit the model, or the model cannot be exported for
        any number of environments; the message then says so.
    """
    platforms = _check_platforms(platforms)
    check(
        num_envs is None or (is_integer(num_envs) and num_envs >= 1),
        f"num_envs must be an integer ≥ 1, or None for any number, not {num_envs!r}.",
    )
    check(precision in (None, "float32", "bfloat16"), f"precision must be 'float32' or 'bfloat16', not {precision!r}.")
    # A policy checks the environment, the model and the plan; compiling one is cheap beside the lowering below.
    policy = Policy(model, env, num_envs=num_envs or 1, planner=planner)
    dtype = model.dtype if precision is None else compute_dtype(precision, jax.devices()[0])
    config = model.config.replace(**policy.plan)
    if dtype != model.dtype:
        config = config.replace(precision=jnp.dtype(dtype).name)  # carry and latents are of it too
    live, arrays = live_weights(model)
    weights = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    programs, carries = _programs(model, config, dtype, live.treedef, weights, policy.spaces)

    lowered: dict[str, tuple[list[int], list[list[jax.ShapeDtypeStruct]], export.Exported]] = {}
    for name, program in programs.items():
        used = _used_weights(program, weights)
        n, h = export.symbolic_shape("n, h")
        groups = program.groups(n if num_envs is None else num_envs, h)
        try:
            exported = _lower(program, weights, used, groups, platforms)
        except Exception as error:
            if num_envs is not None:
                raise
            raise ConfigError(
                f"{type(model).__name__} computes with the number of environments in a way that JAX cannot export for "
                f"any number ({type(error).__name__}: {str(error).splitlines()[0][:200]}). Give num_envs=1, or another "
                "number."
            ) from error
        lowered[name] = used, groups, exported

    names = _weight_names(live.treedef)
    kept = sorted({index for used, _, _ in lowered.values() for index in used})
    start = _start(model.algorithm, config, [axis for _, axis in carries])
    manifest: dict[str, Any] = {
        "format": "worldloom policy",
        "version": policy_file.VERSION,
        "worldloom": __version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "calling_convention_version": next(iter(lowered.values()))[2].calling_convention_version,
        "platforms": list(platforms),
        "num_envs": num_envs,
        "precision": jnp.dtype(dtype).name,
        "plan": policy.plan,
        "model": {"class": type(model).__name__, "config": model.config.to_dict()},
        "observation_space": _observation_leaves(policy.spaces),
        "action_space": _action_leaves(policy.spaces),
        "latents": _latent_names(model),
        "actions": [_about_action(name, config) for name in named(config.action_dim, ACTION)],
        "weights": [{"name": names[i], "shape": weights[i].shape} for i in kept],
        "carry": [{"dtype": x.dtype.name, "axis": axis} for x, axis in carries],
        "programs": {
            name: {
                "weights": [kept.index(i) for i in used],
                "inputs": [[_about(weights[i]) for i in used], *([_about(x) for x in group] for group in groups)],
                "outputs": [[_about(x) for x in group] for group in jax.tree.unflatten(e.out_tree, e.out_avals)],
                "uses_global_constants": e.uses_global_constants,
            }
            for name, (used, groups, e) in lowered.items()
        },
    }
    entries = {f"weights/{at}.npy": _npy(jax.device_get(arrays[i])) for at, i in enumerate(kept)}
    # bfloat16 is not among NumPy's own types; float32 holds it exactly.
    wide = [np.asarray(x, np.float32) if x.dtype == jnp.bfloat16 else x for x in start]
    entries |= {f"carry/{i}.npy": _npy(x) for i, x in enumerate(wide)}
    entries |= {f"programs/{name}.mlir": e.mlir_module_serialized for name, (_, _, e) in lowered.items()}
    manifest["sha256"] = {name: hashlib.sha256(data).hexdigest() for name, data in entries.items()}
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("manifest.json", json.dumps(manifest, indent=1))
        for name, data in entries.items():
            archive.writestr(name, data)
    return Path(path)


def _check_platforms(platforms: Sequence[str]) -> tuple[str, ...]:
    names = (platforms,) if isinstance(platforms, str) else tuple(platforms)
    for name in names:
        check(name in PLATFORMS, f"platforms holds {name!r}; there are {', '.join(PLATFORMS)}.")
    check(bool(names) and len(set(names)) == len(names), f"platforms must name each platform once, not {platforms!r}.")
    return names


# ---- programs ------------------------------------------------------------------------------------------------------


def _programs(
    model: Any, config: Any, dtype: Any, treedef: Any, weights: list[jax.ShapeDtypeStruct], env_spaces: EnvSpaces
) -> tuple[dict[str, _Program], list[tuple[jax.ShapeDtypeStruct, int | None]]]:
    """What the file can do, by name, and what its policy carries from step to step.

    The functions are those of :class:`worldloom.Policy` over lists of arrays. Of every array of the carry: its shape
    for two environments, its dtype, and which axis counts environments (None: none does).
    """
    cls, algorithm = type(model), model.algorithm
    graph, policy = graphdef(cls, config, dtype), algorithm.evaluation_policy
    obs_spec, is_dict = ObservationSpec(env_spaces.observation), isinstance(config.obs_shape, Mapping)
    shapes, dtypes = named(obs_spec.shape, OBS), named(obs_spec.dtype, OBS)
    dims, types = named(config.action_dim, ACTION), config.action_type
    struct = jax.ShapeDtypeStruct

    def rebuild(weights: list[Any]) -> Any:
        return nnx.merge(graph, jax.tree.unflatten(treedef, weights))

    def read_obs(obs: list[Any]) -> Any:
        return unnamed(dict(zip(shapes, obs, strict=True)), is_dict)

    def obs_group(n: Any) -> list[jax.ShapeDtypeStruct]:
        return [struct((n, *shapes[name]), dtypes[name]) for name in shapes]

    def act(weights: list[Any], carry: list[Any], obs: list[Any], first: Any, key: Any) -> Any:
        memory = jax.tree.unflatten(carry_tree, carry)
        after, actions = policy(rebuild(weights), memory, read_obs(obs), key, is_first=first[0])
        return jax.tree.leaves(after), list(named(actions, ACTION).values())

    def sample(weights: Any, carry: Any, obs: Any, first: Any, seed: Any, number: Any) -> Any:
        return act(weights, carry, obs, first, jax.random.fold_in(jax.random.key(seed[0]), number[0]))

    def greedy(weights: Any, carry: Any, obs: Any, first: Any, seed: Any, number: Any) -> Any:
        del seed, number
        return act(weights, carry, obs, first, None)

    def encode(weights: Any, obs: Any) -> Any:
        return [jax.tree.leaves(rebuild(weights).encode(read_obs(obs)))]

    def imagine(weights: Any, latents: Any, actions: Any) -> Any:
        chosen = unnamed(dict(zip(dims, actions, strict=True)), isinstance(config.action_dim, Mapping))
        path = rebuild(weights).imagine(jax.tree.unflatten(latent_tree, latents), chosen)
        return jax.tree.leaves(path.states), [path.rewards], [path.continues]

    def carry_group(n: Any) -> list[jax.ShapeDtypeStruct]:
        return [struct(_with_axis(x.shape, axis, n), x.dtype) for x, axis in carries]

    def act_groups(n: Any, h: Any) -> list[list[jax.ShapeDtypeStruct]]:
        scalar = [struct((), jnp.uint32)]
        return [carry_group(n), obs_group(n), [struct((n,), jnp.bool_)], scalar, scalar]

    def imagine_groups(n: Any, h: Any) -> list[list[jax.ShapeDtypeStruct]]:
        chosen = [
            struct((h, n, size) if _is_continuous(types, name) else (h, n), _action_dtype(types, name))
            for name, size in dims.items()
        ]
        return [[struct(_with_axis(x.shape, 0, n), x.dtype) for x in latents], chosen]

    two, three = (jax.eval_shape(lambda n=n: algorithm.initial_carry(config, n)) for n in (2, 3))
    before, carry_tree = jax.tree.flatten(two)
    # A step may return another dtype than the one of the start; that one is carried.
    after, _ = jax.eval_shape(act, weights, before, obs_group(2), [struct((2,), jnp.bool_)], None)
    carries = [
        (struct(first.shape, later.dtype), _axis_of_environments(first.shape, more.shape))
        for first, later, more in zip(before, after, jax.tree.leaves(three), strict=True)
    ]
    example = jax.eval_shape(lambda weights, obs: rebuild(weights).encode(read_obs(obs)), weights, obs_group(2))
    latents, latent_tree = jax.tree.flatten(example)
    programs = {
        "sample": _Program(sample, act_groups),
        "greedy": _Program(greedy, act_groups),
        "encode": _Program(encode, lambda n, h: [obs_group(n)]),
        "imagine": _Program(imagine, imagine_groups),
    }
    return programs, carries


def _axis_of_environments(two: tuple[int, ...], three: tuple[int, ...]) -> int | None:
    """The axis in which the shapes for two and for three environments differ."""
    axes = [axis for axis, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    check(len(axes) < 2, f"An array of the carry has two axes that count environments: {two}, {three}.")
    return axes[0] if axes else None


def _with_axis(shape: tuple[int, ...], axis: int | None, n: Any) -> tuple[Any, ...]:
    return shape if axis is None else (*shape[:axis], n, *shape[axis + 1 :])


def _start(algorithm: Any, config: Any, axes: list[int | None]) -> list[np.ndarray]:
    """The carry into the first step of one environment. The reader repeats it for several."""
    one, three = (jax.tree.leaves(algorithm.initial_carry(config, n)) for n in (1, 3))
    for x, more, axis in zip(one, three, axes, strict=True):
        repeated = x if axis is None else np.repeat(np.asarray(x), 3, axis)
        check(bool(np.array_equal(repeated, more)), "Environments start with different carries; this is not exported.")
    return [np.asarray(x) for x in one]


def _used_weights(program: _Program, weights: list[jax.ShapeDtypeStruct]) -> list[int]:
    """Which weights the program computes with."""
    # For numbers: with unknown sizes JAX keeps all arguments.
    exported = export.export(jax.jit(program.function), platforms=["cpu"])(weights, *program.groups(2, 3))
    return [index for index in exported.module_kept_var_idx if index < len(weights)]


def _lower(
    program: _Program,
    weights: list[jax.ShapeDtypeStruct],
    used: list[int],
    groups: list[list[jax.ShapeDtypeStruct]],
    platforms: Sequence[str],
) -> export.Exported:
    def run(given: list[Any], *groups: Any) -> Any:
        # Weights that nothing is computed with.
        full: list[Any] = [jnp.zeros(each.shape, each.dtype) for each in weights]
        for index, value in zip(used, given, strict=True):
            full[index] = value
        return program.function(full, *groups)

    jitted = jax.jit(run, keep_unused=True)
    return export.export(jitted, platforms=list(platforms))([weights[index] for index in used], *groups)


# ---- the manifest --------------------------------------------------------------------------------------------------


def _weight_names(treedef: Any) -> list[str]:
    tree = jax.tree.unflatten(treedef, range(treedef.num_leaves))
    return ["/".join(str(key.key) for key in path) for path, _ in jax.tree.leaves_with_path(tree)]


def _latent_names(model: Any) -> list[str]:
    """Names of the arrays of a latent state."""
    example = EnvSpaces.of_config(model.config).example_observation(1)
    spec = ObservationSpec(EnvSpaces.of_config(model.config).observation)
    state = jax.eval_shape(model.encode, spec.unwrap(spec.flatten(example, (1,))))
    return [
        "/".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path)
        for path, _ in jax.tree.leaves_with_path(state)
    ]


def _is_continuous(types: Any, name: str) -> bool:
    return (types if isinstance(types, str) else types[name]) == "continuous"


def _action_dtype(types: Any, name: str) -> Any:
    return np.dtype(np.float32 if _is_continuous(types, name) else np.int32)


def _about_action(name: str, config: Any) -> dict[str, Any]:
    size = named(config.action_dim, ACTION)[name]
    return {"name": name, "size": size, "dtype": _action_dtype(config.action_type, name).name}


def _about(value: Any) -> list[Any]:
    return [[dim if isinstance(dim, int) else str(dim) for dim in value.shape], jnp.dtype(value.dtype).name]


def _npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array, order="C"), allow_pickle=False)
    return file.getvalue()


def _observation_leaves(env_spaces: EnvSpaces) -> list[dict[str, Any]]:
    """How each array of an observation becomes one of the model's: what :class:`ObservationSpec` does, as values."""
    leaves = []
    for leaf in ObservationSpec(env_spaces.observation).leaves:
        classes, start = _classes(leaf.space)
        leaves.append(
            {
                "name": leaf.name,
                "path": list(leaf.path),
                "shape": list(leaf.native_shape),
                "model_shape": list(leaf.shape),
                "dtype": leaf.dtype.name,
                "classes": classes,
                "start": start,
                "range": _RANGES.get(leaf.kind) or ([_numbers(x) for x in _bounds(leaf)]),
                "whole": leaf.kind in ("integers", "image", "bits"),
            }
        )
    return leaves


_RANGES = {"image": [[0], [255]], "unit image": [[0], [1]], "bits": [[0], [1]]}


def _bounds(leaf: Any) -> list[np.ndarray]:
    """The least and greatest numbers that an observation may hold; empty where nothing depends on them."""
    return [leaf.space.low, leaf.space.high] if leaf.kind == "integers" else []


def _numbers(values: np.ndarray) -> list[Any]:
    """Floats for JSON: one where all are equal; as text where infinite, which JSON has no numbers for."""
    flat = np.asarray(values, np.float64).ravel().tolist()
    flat = flat[:1] if len(set(flat)) == 1 else flat
    return [x if np.isfinite(x) else str(x) for x in flat]


def _action_leaves(env_spaces: EnvSpaces) -> list[dict[str, Any]]:
    """How the model's actions become each array of the environment's: what :class:`ActionSpec` does, as values."""
    leaves, next_output = [], 0
    for leaf in ActionSpec(env_spaces.action).leaves:
        about: dict[str, Any] = {"path": list(leaf.path), "shape": list(leaf.space.shape or ())}
        if leaf.scale is not None:
            about |= {name: _numbers(getattr(leaf.scale, name)) for name in ("low", "high", "span")}
            about |= {"whole": leaf.scale.whole, "dtype": leaf.scale.dtype.name}
        else:
            discrete = isinstance(leaf.space, spaces.Discrete)
            about["start"] = _classes(leaf.space)[1] or [0] * len(leaf.names)
            about["dtype"] = "int64" if discrete else np.dtype(leaf.space.dtype).name
        about["outputs"] = list(range(next_output, next_output + len(leaf.names)))
        next_output += len(leaf.names)
        leaves.append(about)
    return leaves


def _classes(space: Any) -> tuple[list[int], list[int]]:
    """Numbers of classes and their first numbers; empty for other spaces."""
    if isinstance(space, spaces.Discrete):
        return [int(space.n)], [int(space.start)]
    if isinstance(space, spaces.MultiDiscrete):
        return np.ravel(space.nvec).tolist(), np.ravel(space.start).tolist()
    return [], []
