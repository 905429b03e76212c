"""What both families share at the rim: building, compiled methods, saving, loading, counting."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from worldloom.devices import compute_dtype, resolve_device
from worldloom.errors import ConfigError, DataError, WeightsError
from worldloom.files import write_atomically
from worldloom.nn.linear import OneDraw

F = TypeVar("F", bound=Callable[..., Any])
Params = dict[str, Any]


class Statistic(nnx.Variable):
    """A running number that no gradient moves (return range, value scale). Saved with the weights."""


class WorldModel(nnx.Module):
    """A world model with all its weights: dynamics, heads, policy, critics and their slow copies.

    Subclasses name their config class, list in ``untrained`` the parts that no gradient reaches, and implement
    ``build``. Methods marked :func:`compiled` run under ``jax.jit`` when called from Python and inline when called
    from traced code, so the same methods serve users and the loss.

    Args:
      config: the family's config.
      seed: seed of the initial weights.
      device: where the weights are put, see :func:`worldloom.devices.resolve_device`.
      dtype: dtype of activations; None follows ``config.precision`` on that device.
    """

    config_class: ClassVar[type[Any]]
    untrained: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, *, seed: int = 0, device: str = "auto", dtype: Any = None):
        if not isinstance(config, self.config_class):
            raise TypeError(f"{type(self).__name__} takes a {self.config_class.__name__}, not {type(config).__name__}.")
        self.config = config
        target = resolve_device(device)
        self.dtype = jnp.dtype(dtype or compute_dtype(config.precision, target))
        graph, draw = _initializer(type(self), config, self.dtype)
        params = jax.device_put(draw(jax.random.key(seed)), target)
        for name, part in nnx.merge(graph, params).items():
            setattr(self, name, part)

    @staticmethod
    def build(config: Any, dtype: jnp.dtype, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        """Create the parts of the model by name. ``dtype`` is that of activations; parameters are float32."""
        raise NotImplementedError

    @property
    def algorithm(self) -> types.ModuleType:
        """The family's package: pure ``init_state``, ``update``, ``act`` and ``window``."""
        raise NotImplementedError

    @property
    def params(self) -> Params:
        """All weights as a nested pure dict of arrays (no copies)."""
        return nnx.to_pure_dict(nnx.state(self))

    def load_params(self, params: Mapping[str, Any]) -> None:
        """Replace all weights. Raises ``WeightsError`` naming the arrays that are missing, unexpected or misshapen."""
        own, given = flatten(self.params), flatten(params)
        check_fit(type(self), own, given)
        placed = {name: jax.device_put(jnp.asarray(given[name], own[name].dtype), own[name].sharding) for name in own}
        nnx.update(self, unflatten(placed))

    def num_parameters(self) -> int:
        """Trainable scalars; slow or target copies and statistics are not counted."""
        return count_parameters({k: v for k, v in self.params.items() if k not in self.untrained})

    def save_pretrained(self, path: str | Path | None = None, *, name: str | None = None) -> Path:
        """Write ``config.json`` and ``model.safetensors`` and return their folder.

        Args:
          path: the folder, created if needed.
          name: instead of ``path``: a plain name under which ``create_world_model`` finds the model again; it is
            kept in ``WORLDLOOM_CACHE_DIR``.
        """
        from safetensors.numpy import save

        from worldloom.models.registry import named_folder

        if (path is None) == (name is None):
            raise TypeError("save_pretrained takes either a path or name=…")
        folder = Path(path) if path is not None else named_folder(str(name))
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {key: np.asarray(value, order="C") for key, value in flatten(jax.device_get(self.params)).items()}
        write_atomically(folder / "model.safetensors", save(arrays, metadata={"format": "worldloom"}))
        write_atomically(folder / "config.json", self.config.to_json())
        return folder

    def push_to_hub(self, repo_id: str, *, token: str | None = None, private: bool = False) -> str:
        """Upload the saved model to a Hugging Face repository and return its address (extra ``hub``)."""
        import tempfile

        from worldloom.models.registry import hub

        client = hub()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            address = client.create_repo(repo_id, token=token, private=private, exist_ok=True)
            client.upload_folder(repo_id=repo_id, folder_path=folder, token=token)
        return str(address)

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, *, device: str = "auto", **options: Any) -> Self:
        """Load what :meth:`save_pretrained` wrote; arguments and errors as in :func:`worldloom.from_pretrained`.

        Raises ``ConfigError`` when the folder holds a model of the other family.
        """
        from worldloom.models.registry import from_pretrained

        model = from_pretrained(path_or_repo, device=device, **options)
        if not isinstance(model, cls):
            raise ConfigError(f"{path_or_repo} holds a {type(model).__name__}; load it with that class.")
        return model


def check_time_first(batch: tuple[int, ...], states: tuple[int, ...]) -> None:
    """Raise ``DataError`` unless actions [H, *batch, ...] belong to states [*states, ...]."""
    if batch != states:
        raise DataError(
            f"Actions for a batch of shape {batch} do not fit states of batch shape {states}. Actions are time first, "
            "[H, B, ...]; swapaxes(0, 1) makes them so."
        )


def check_environments(count: int, carry: int | None, is_first: Any) -> None:
    """Raise ``DataError`` unless a carry and flags belong to as many environments as there are observations."""
    if carry not in (None, count):
        raise DataError(f"carry is of {carry} environments, obs of {count}; give carry=None to start anew.")
    if is_first is not None and jnp.shape(is_first) != (count,):
        raise DataError(f"is_first has shape {jnp.shape(is_first)}; obs of {count} environments need ({count},).")


def compiled(method: F) -> F:
    """Run a :class:`WorldModel` method under ``jax.jit``, closing over the graph and passing weights as a pure dict.

    One compilation per (class, config, dtype) and argument shapes; all instances share it. Inside a trace the method
    runs inline. Arguments must be pytrees of arrays (or None).
    """

    @functools.wraps(method)
    def call(self: WorldModel, *args: Any, **kwargs: Any) -> Any:
        params = self.params
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, args, kwargs))):
            return method(self, *args, **kwargs)
        return _jitted(method, type(self), self.config, self.dtype)(params, args, kwargs)

    return call  # type: ignore[return-value]


def merge(cls: type[WorldModel], config: Any, params: Params, dtype: jnp.dtype | None = None) -> Any:
    """The model that holds ``params``, for use inside traced code; ``dtype`` None follows ``config.precision``."""
    return nnx.merge(graphdef(cls, config, dtype or compute_dtype(config.precision)), params)


@functools.cache
def graphdef(cls: type[WorldModel], config: Any, dtype: jnp.dtype) -> Any:
    """The static half of a model, found by abstract evaluation: no weight is allocated."""
    return nnx.split(_abstract(cls, config, dtype))[0]


def abstract_params(cls: type[WorldModel], config: Any) -> Params:
    """Shapes and dtypes of all weights as ``ShapeDtypeStruct``; allocates nothing, whatever the size."""
    return nnx.to_pure_dict(nnx.state(_abstract(cls, config, compute_dtype(config.precision))))


def check_fit(cls: type[WorldModel], own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ``WeightsError`` naming the arrays ``given`` to ``cls`` that are missing, unexpected or misshapen.

    Both are flat; of ``own``, what the config needs, only shapes are looked at.
    """
    problems = [f"{name} is missing" for name in own if name not in given]
    problems += [f"{name[:100]} is unexpected" for name in given if name not in own]
    problems += [
        f"{name} has shape {tuple(given[name].shape)}, the config needs {tuple(own[name].shape)}"
        for name in own
        if name in given and tuple(given[name].shape) != tuple(own[name].shape)
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise WeightsError(f"These weights do not fit {cls.__name__}: {'; '.join(problems[:5])}{more}.")


def count_parameters(params: Mapping[str, Any]) -> int:
    """Number of scalars in a nested dict of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict → ``{"encoder.mlp.0.kernel": array}``, sorted by name. List indices (ints) become digits."""
    flat: dict[str, Any] = {}
    for key in sorted(params, key=str):
        value = params[key]
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Inverse of :func:`flatten`; parts that are digits become ints again."""
    nested: dict[Any, Any] = {}
    for name, value in flat.items():
        *path, last = (int(part) if part.isdigit() else part for part in name.split("."))
        node: Any = nested
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return nested


def _abstract(cls: type[WorldModel], config: Any, dtype: jnp.dtype) -> WorldModel:
    return nnx.eval_shape(lambda: cls(config, dtype=dtype))


@functools.lru_cache(maxsize=64)
def _initializer(cls: type[WorldModel], config: Any, dtype: jnp.dtype) -> tuple[Any, Callable[..., Params]]:
    # Drawn in one compiled call: eager initialisation compiles every distinct shape by itself, seconds per model.
    def parts(rngs: nnx.Rngs) -> nnx.Dict:
        return nnx.Dict(cls.build(config, dtype, rngs))

    graph, shapes = nnx.split(nnx.eval_shape(lambda: parts(nnx.Rngs(0))))
    size = count_parameters(nnx.to_pure_dict(shapes))

    def params(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(parts(OneDraw(key, size))))

    # It runs once, so it should be quick to compile rather than quick.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    quick = jax.jit(params, compiler_options=options)
    # Abstract evaluation builds models too, and takes no compiler options.
    return graph, lambda key: params(key) if isinstance(key, jax.core.Tracer) else quick(key)


@functools.lru_cache(maxsize=512)
def _jitted(method: Callable[..., Any], cls: type[WorldModel], config: Any, dtype: jnp.dtype) -> Callable[..., Any]:
    graph = graphdef(cls, config, dtype)

    def run(params: Params, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return method(nnx.merge(graph, params), *args, **kwargs)

    return jax.jit(run)
