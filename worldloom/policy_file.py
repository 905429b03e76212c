"""Acts by a policy file. Needs JAX and NumPy only: copy this module beside the file to act without worldloom.

    from policy_file import load_policy

    policy = load_policy("policy.worldloom")
    obs, _ = env.reset()
    while ...:
        obs, reward, terminated, truncated, _ = env.step(policy(obs))
        if terminated or truncated:
            obs, _ = env.reset()
            policy.reset()

``worldloom export RUN --to policy.worldloom`` writes such files. One is a zip archive, without compression, of

- ``manifest.json``: spaces, shapes, versions, and the SHA-256 of every other entry;
- ``weights/N.npy`` and ``carry/N.npy``: the weights, and what is carried into an episode's first step, for one
  environment;
- ``programs/NAME.mlir``: StableHLO of ``sample``, ``greedy``, ``encode`` and ``imagine``, as ``jax.export`` wrote it.

Loading unpickles nothing and imports nothing. A program can call nothing but the operations of XLA: one with custom
calls, callbacks or transfers from and to the host is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

VERSION = 1
"""Of the file's layout."""

_MAX_MANIFEST = 1 << 24
_CUSTOM_CALLS = {"shape_assertion"}  # A check that belongs to programs for any batch size.
_FORBIDDEN = re.compile(r"stablehlo\.(?:infeed|outfeed|send|recv|dynamic_custom_call)\b|custom_call @\"?([^\s(\"]+)")
_DIMENSION = re.compile(r"n|h|h \+ 1")
_DTYPES = {"bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "bfloat16", "float32"}
# What readers of zip, JSON, arrays and programs raise on damaged input.
_DAMAGE = OSError, EOFError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError


class PolicyFileError(ValueError):
    """A file that is damaged, is no policy file, or cannot be used by this version of JAX or on this device."""


def load_policy(path: str | Path, **options: Any) -> PolicyFile:
    """``PolicyFile(path, **options)``: read a policy file and compile it."""
    return PolicyFile(path, **options)


class PolicyFile:
    """An agent from a file: ``action = policy(obs)``.

    Args:
      path: of the file.
      num_envs: N, environments that are acted in together; None is the number that the file was made for, or 1 where
        it acts in any number.
      mode: ``"sample"`` draws as evaluations do; ``"greedy"`` takes the mode of every draw.
      device: a ``jax.Device``, or the name of a platform (``"cpu"``, ``"gpu"``, ``"tpu"``); None is JAX's default.
      seed: of all draws.

    Attributes:
      manifest: contents of the file's ``manifest.json``.
      num_envs, mode: N, and as given.
      plan: how much is planned, by name; empty for models that do not plan.
      functions: names of the programs in the file.

    Raises:
      PolicyFileError: see there.
      FileNotFoundError: there is no such file.
      ValueError: an argument is invalid.
    """

    def __init__(
        self, path: str | Path, *, num_envs: int | None = None, mode: str = "sample", device: Any = None, seed: int = 0
    ):
        if mode not in ("sample", "greedy"):
            raise ValueError(f"mode must be 'sample' or 'greedy', not {mode!r}.")
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise ValueError(f"seed must be an integer in [0, 2^32), not {seed!r}.")
        self.path, self.mode, self._seed = Path(path), mode, np.uint32(seed)
        self._device = _find_device(device)
        with self.path.open("rb") as file, _damage_named(self.path):
            self._read(file)
        fixed = self.manifest["num_envs"]
        if fixed is not None and num_envs not in (None, fixed):
            raise ValueError(
                f"{path} acts in {fixed} environments, not {num_envs}; export it with num_envs={num_envs}."
            )
        self.num_envs = fixed or 1 if num_envs is None else num_envs
        if type(self.num_envs) is not int or self.num_envs < 1:
            raise ValueError(f"num_envs must be an integer ≥ 1, not {num_envs!r}.")
        self._nowhere, self._is_first, self._calls = np.zeros(self.num_envs, bool), np.ones(self.num_envs, bool), 0
        with _damage_named(self.path):
            # Environments start alike.
            start = [x if axis is None else np.repeat(x, self.num_envs, axis) for x, axis in self._start]
            self._carry = jax.device_put(start, self._device)
            self.latency(2)  # Compiles.

    def __call__(self, obs: Any, is_first: Any = None) -> Any:
        """The actions for ``obs``, and one step of the policy's memory.

        Args:
          obs: an observation as the environment returns it: of one environment (where N is 1), or with a leading axis
            [N, ...]; nested dicts (or tuples) of arrays where its space is one.
          is_first: bool [N] (or a bool where N is 1), true where ``obs`` starts an episode, in addition to those that
            :meth:`reset` announced.

        Returns:
          The action, as ``env.step`` takes it: clipped, scaled to the bounds of its space, an ``int`` for one class.

        Raises ``ValueError`` for observations that are not of the space, NaN or infinite, and for actions that are NaN.
        The policy is then as before the call.
        """
        arrays, alone = self._observations(obs, self.num_envs)
        first = self._is_first
        if is_first is not None:
            given = np.asarray(is_first)
            if given.dtype != bool or given.size != self.num_envs or given.ndim > 1:
                raise ValueError(f"is_first must be bool ({self.num_envs},), not {given.dtype} {given.shape}.")
            first = first | given.reshape(self.num_envs)
        number = np.uint32(self._calls & 0xFFFFFFFF)
        carry, actions = self._run(self.mode, self._carry, arrays, first, self._seed, number)
        native: Any = {}
        for leaf in self._action_leaves:
            native = _set(native, leaf["path"], _to_env(leaf, [np.asarray(actions[i]) for i in leaf["outputs"]]))
        native = _as_tuples(native)
        self._carry, self._is_first, self._calls = carry, self._nowhere, self._calls + 1
        return _first(native) if alone else native

    def reset(self, index: int | Sequence[int] | np.ndarray | None = None) -> None:
        """Start new episodes: in all environments, or in those of ``index`` (numbers, or bool [N])."""
        first = np.ones(self.num_envs, bool) if index is None else self._is_first.copy()
        if index is not None:
            first[np.asarray(index)] = True
        self._is_first = first

    def latency(self, calls: int = 200) -> dict[str, float]:
        """Milliseconds ``{"p50_ms", "p99_ms", "max_ms"}`` of ``calls`` calls; the policy is afterwards as before."""
        before = self._carry, self._is_first, self._calls
        obs = self._example()
        ms = np.zeros(calls)
        for call in range(calls):
            start = time.perf_counter()
            self(obs)
            ms[call] = 1e3 * (time.perf_counter() - start)
        self._carry, self._is_first, self._calls = before
        return {"p50_ms": float(np.median(ms)), "p99_ms": float(np.percentile(ms, 99)), "max_ms": float(ms.max())}

    def encode(self, obs: Any) -> dict[str, jax.Array]:
        """Latents {name: [N, ...]} of observations [N, ...] that start episodes; every draw takes its mode."""
        count = None if self.manifest["num_envs"] is None else self.num_envs
        arrays, _ = self._observations(obs, count)
        (latents,) = self._run("encode", arrays)
        return dict(zip(self.manifest["latents"], latents, strict=True))

    def imagine(self, latents: Mapping[str, Any], actions: Any) -> dict[str, Any]:
        """The future that the model predicts for ``actions``; every draw takes its mode.

        Args:
          latents: {name: [N, ...]}, as :meth:`encode` returns them.
          actions: [H, N, A] in [−1, 1], classes [H, N], or a dict of these, in the model's units.

        Returns:
          ``"latents"`` {name: [H + 1, N, ...]}, ``"rewards"`` [H, N] of arriving at latents 1 to H, and ``"continues"``
          [H, N], the probability that the episode goes on there, times the model's discount if it has one.
        """
        names, kinds = self.manifest["latents"], self.manifest["actions"]
        if set(latents) != set(names):
            raise ValueError(f"The latents are called {names}, not {sorted(latents)}.")
        if not isinstance(actions, Mapping):
            actions = {kinds[0]["name"]: actions} if len(kinds) == 1 else {}
        if set(actions) != {kind["name"] for kind in kinds}:
            raise ValueError(f"The actions are called {[kind['name'] for kind in kinds]}, not {sorted(actions)}.")
        given = [np.asarray(actions[kind["name"]], kind["dtype"]) for kind in kinds]
        states, rewards, continues = self._run("imagine", [latents[name] for name in names], given)
        return {"latents": dict(zip(names, states, strict=True)), "rewards": rewards[0], "continues": continues[0]}

    def __repr__(self) -> str:
        plan = "".join(f", {name}={value}" for name, value in self.plan.items())
        return f"PolicyFile({str(self.path)!r}, num_envs={self.num_envs}, mode={self.mode!r}{plan})"

    # ---- reading ---------------------------------------------------------------------------------------------------

    def _read(self, file: Any) -> None:
        with zipfile.ZipFile(file) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            manifest = json.loads(_entry(archive, entries, "manifest.json", _MAX_MANIFEST))
            if manifest["format"] != "worldloom policy":
                raise PolicyFileError(f"{self.path} is no policy file.")
            if manifest["version"] != VERSION:
                raise PolicyFileError(
                    f"{self.path} has layout {manifest['version']!r:.20}; this reader knows layout {VERSION}. Take the "
                    f"reader of worldloom {manifest.get('worldloom')!r:.20}."
                )
            _check_platform(self.path, manifest["platforms"], self._device)
            _check_convention(self.path, manifest)
            if not 0 < (manifest["num_envs"] or 1) < 1 << 31:
                raise ValueError("num_envs is no number of environments")
            sums = manifest["sha256"]

            def read(name: str) -> bytes:
                data = _entry(archive, entries, name)
                if hashlib.sha256(data).hexdigest() != sums[name]:
                    raise PolicyFileError(f"{self.path} is damaged: {name} differs from what was written.")
                return data

            def read_array(name: str) -> np.ndarray:
                return np.lib.format.read_array(io.BytesIO(read(name)), allow_pickle=False)

            self.manifest = manifest
            weights = [read_array(f"weights/{i}.npy") for i in range(len(manifest["weights"]))]
            self._start = [
                (read_array(f"carry/{i}.npy").astype(_dtype(each["dtype"])), each["axis"])
                for i, each in enumerate(manifest["carry"])
            ]
            self._modules = {name: read(f"programs/{name}.mlir") for name in manifest["programs"]}
        self._weights = jax.device_put(weights, self._device)
        self._programs: dict[str, Any] = {}
        self.plan, self.functions = dict(manifest["plan"]), tuple(self._modules)
        self._obs_leaves, self._action_leaves = manifest["observation_space"], manifest["action_space"]

    def _program(self, name: str) -> Any:
        """The compiled function of a program: (weights, groups of arrays) → groups of arrays."""
        about = self.manifest["programs"][name]
        scope = export.SymbolicScope()
        specs = [[_spec(each, scope) for each in group] for group in about["inputs"]]
        results = [[_spec(each, scope) for each in group] for group in about["outputs"]]

        # A function of the same arguments and results, whose program is then replaced by that of the file. So nothing
        # but jax.export's public interface is needed; its own reader would need a further package.
        def shell(*groups: Any) -> Any:
            return [[jnp.zeros(spec.shape, spec.dtype) for spec in group] for group in results]

        jitted: Any = jax.jit(shell)
        exported = dataclasses.replace(
            export.export(jitted, platforms=self.manifest["platforms"])(*specs),
            mlir_module_serialized=self._modules[name],
            calling_convention_version=self.manifest["calling_convention_version"],
            module_kept_var_idx=tuple(range(sum(map(len, specs)))),
            uses_global_constants=bool(about["uses_global_constants"]),
        )
        try:
            text = exported.mlir_module()
        except Exception as error:
            raise PolicyFileError(
                f"JAX {jax.__version__} cannot read the program '{name}' of {self.path}, written with JAX "
                f"{self.manifest['jax']!r:.20}: {_short(error)} Act with a newer version of JAX, or export again."
            ) from error
        for match in _FORBIDDEN.finditer(text):
            if match[1] not in _CUSTOM_CALLS:
                raise PolicyFileError(
                    f"{self.path} is refused: its program '{name}' contains {_short(match[0])}, which may run code "
                    "outside of XLA."
                )
        chosen = list(about["weights"])
        call = jax.jit(exported.call)
        return lambda weights, *groups: call([weights[i] for i in chosen], *groups)

    def _run(self, name: str, *groups: Any) -> Any:
        if name not in self._modules:
            raise ValueError(f"{self.path} has no '{name}'; it has {', '.join(self.functions)}.")
        if name not in self._programs:
            with _damage_named(self.path):
                self._programs[name] = self._program(name)
        grouped = [list(group) if isinstance(group, list | tuple) else [group] for group in groups]
        with jax.default_device(self._device):
            return self._programs[name](self._weights, *grouped)

    # ---- observations ----------------------------------------------------------------------------------------------

    def _observations(self, obs: Any, num_envs: int | None) -> tuple[list[np.ndarray], bool]:
        """The model's arrays [N, ...], and whether ``obs`` was of one environment without a batch axis."""
        leaves = self._obs_leaves
        native = [_at(obs, leaf) for leaf in leaves]
        alone = native[0].ndim == len(leaves[0]["shape"])
        if alone and num_envs not in (None, 1):
            raise ValueError(f"The observation is of one environment; [{num_envs}, ...] is needed.")
        count = 1 if alone else len(native[0])
        if num_envs not in (None, count):
            raise ValueError(f"The observation is of {count} environments; this policy acts in {num_envs}.")
        return [_to_model(leaf, x[None] if alone else x, count) for leaf, x in zip(leaves, native, strict=True)], alone

    def _example(self) -> Any:
        """An observation of zeros, or the first classes."""
        obs: Any = {}
        for leaf in self._obs_leaves:
            zeros = np.zeros((self.num_envs, *leaf["shape"]), np.float32)
            obs = _set(
                obs, leaf["path"], zeros + np.reshape(leaf["start"], leaf["shape"]) if leaf["classes"] else zeros
            )
        return obs


def _to_model(leaf: Mapping[str, Any], value: np.ndarray, count: int) -> np.ndarray:
    """Numbers of a space's leaf [N, *shape] as the model takes them."""
    name, shape, dtype = leaf["name"], (count, *leaf["shape"]), np.dtype(leaf["dtype"])
    if value.shape != shape:
        raise ValueError(f"The observation '{name}' has shape {value.shape}; {shape} is needed.")
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise ValueError(f"The observation '{name}' is NaN or infinite.")
    if leaf["whole"] and (value != np.floor(value)).any():
        raise ValueError(f"The observation '{name}' holds fractions; integers are needed.")
    if leaf["range"]:
        low, high = (np.array(bound, np.float64) for bound in leaf["range"])
        if not ((value.reshape(count, -1) >= low) & (value.reshape(count, -1) <= high)).all():
            raise ValueError(f"The observation '{name}' holds numbers beyond {leaf['range']}.")
    if leaf["classes"]:
        value = (value - np.reshape(leaf["start"], leaf["shape"])).reshape(count, -1)
        sizes = leaf["classes"]
        if ((value < 0) | (value >= sizes) | (value % 1 != 0)).any():
            raise ValueError(f"The observation '{name}' holds a class that there is not.")
        value = np.concatenate([value[:, [i]] == np.arange(size) for i, size in enumerate(sizes)], -1)
    return np.array(value, dtype).reshape(count, *leaf["model_shape"])


def _to_env(leaf: Mapping[str, Any], values: list[np.ndarray]) -> np.ndarray:
    """The model's actions [N, ...] of a space's leaf, in the environment's units."""
    shape, dtype = (len(values[0]), *leaf["shape"]), np.dtype(leaf["dtype"])
    if "start" in leaf:
        return (np.stack(values, -1).reshape(shape) + np.reshape(leaf["start"], leaf["shape"])).astype(dtype)
    if not np.isfinite(values[0]).all():
        raise ValueError("The action is NaN or infinite.")
    low, high, span = (np.array(leaf[name], np.float64) for name in ("low", "high", "span"))
    scaled = low + (np.minimum(np.maximum(values[0], -1), 1) + 1) / 2 * span
    # Clipped again: rounding may leave the bounds.
    bounded = np.minimum(np.maximum(np.rint(scaled) if leaf["whole"] else scaled, low), high)
    return bounded.astype(dtype).reshape(shape)


def _at(obs: Any, leaf: Mapping[str, Any]) -> np.ndarray:
    for key in leaf["path"]:
        try:
            obs = obs[int(key)] if isinstance(obs, tuple) else obs[key]
        except (LookupError, TypeError, ValueError):
            raise ValueError(f"The observation has no '{leaf['name']}'.") from None
    array = np.asarray(obs)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"The observation '{leaf['name']}' has dtype {array.dtype}; numbers are needed.")
    return array


def _set(tree: Any, path: Sequence[Any], value: Any) -> Any:
    if not path:
        return value
    tree[path[0]] = _set(tree.get(path[0], {}), path[1:], value)
    return tree


def _as_tuples(tree: Any) -> Any:
    """Dicts with the keys 0, 1, … as tuples, which is what they stand for."""
    if not isinstance(tree, dict):
        return tree
    inner = {key: _as_tuples(value) for key, value in tree.items()}
    return tuple(inner.values()) if all(isinstance(key, int) for key in inner) else inner


def _first(tree: Any) -> Any:
    """The action of the only environment; a Python integer for a class."""
    if isinstance(tree, dict):
        return {key: _first(value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(map(_first, tree))
    action = tree[0]
    return int(action) if np.ndim(action) == 0 and action.dtype.kind in "iu" else action


# ---- the file ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """What damaged input makes readers raise, as one error that names the file."""
    try:
        yield
    except PolicyFileError:
        raise
    except (*_DAMAGE, zipfile.BadZipFile) as error:
        raise PolicyFileError(
            f"{path} is damaged or no policy file ({type(error).__name__}: {_short(error)})."
        ) from error


def _entry(archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], name: str, limit: int = 1 << 40) -> bytes:
    info = entries[name]
    # Without compression an entry is no larger than the file; a larger one is a lie about memory.
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.file_size > limit:
        raise ValueError(f"the entry {name} is not stored as it should be")
    return archive.read(info)


def _dtype(name: str) -> Any:
    if name not in _DTYPES:
        raise ValueError(f"{str(name)[:20]!r} is no dtype of a program")
    return jnp.dtype(name)


def _spec(about: Sequence[Any], scope: Any) -> jax.ShapeDtypeStruct:
    """``[[dimension, ...], dtype]``, where a dimension is a number, ``n``, ``h`` or ``h + 1``."""
    dims, dtype = about
    for dim in dims:
        if not (type(dim) is int and dim >= 0) and not (isinstance(dim, str) and _DIMENSION.fullmatch(dim)):
            raise ValueError(f"{str(dim)[:20]!r} is no dimension")
    shape = export.symbolic_shape(", ".join(map(str, dims)), scope=scope) if dims else ()
    return jax.ShapeDtypeStruct(shape, _dtype(dtype))


def _find_device(device: Any) -> jax.Device:
    try:
        return jax.devices(device)[0] if device is None or isinstance(device, str) else device
    except RuntimeError as error:
        raise ValueError(f"JAX finds no device '{device}': {_short(error)}") from None


def _check_platform(path: Path, platforms: Sequence[str], device: jax.Device) -> None:
    here = "cuda" if device.platform == "gpu" else device.platform
    if here == "cuda" and "rocm" in device.client.platform_version.lower():
        here = "rocm"
    if here not in platforms:
        raise PolicyFileError(
            f"{path} was exported for {', '.join(platforms)}, and this device is {here}. Export it with "
            f"platforms=[…, {here!r}], or give device={platforms[0]!r}."
        )


def _check_convention(path: Path, manifest: Mapping[str, Any]) -> None:
    known = (export.minimum_supported_calling_convention_version, export.maximum_supported_calling_convention_version)
    if not known[0] <= manifest["calling_convention_version"] <= known[1]:
        raise PolicyFileError(
            f"{path} was written with JAX {manifest['jax']!r:.20} (calling convention "
            f"{manifest['calling_convention_version']!r:.5}); JAX {jax.__version__} reads {known[0]} to {known[1]}. "
            "Act with a version of JAX nearer to that one, or export again."
        )


def _short(value: Any) -> str:
    return " ".join(str(value).split())[:200]
