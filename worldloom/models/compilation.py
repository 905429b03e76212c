"""Models in compiled programs: methods under ``jax.jit``, models rebuilt from class, config and weights in a trace.

Everything is cached by (class, config, dtype), so that instances share what was traced and compiled.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from worldloom.algorithm import Params
from worldloom.devices import compute_dtype, host_memory
from worldloom.errors import ConfigError, DataError
from worldloom.models.live_weights import any_traced, live_weights
from worldloom.models.params import count_parameters, flatten, unflatten
from worldloom.nn.linear import OneDraw
from worldloom.sharding import whole_weights
from worldloom.xla_workarounds import fast_compile_options

F = TypeVar("F", bound=Callable[..., Any])


def compiled(method: F) -> F:
    """Run a :class:`WorldModel` method under ``jax.jit``, closing over the graph and passing weights as a flat list.

    One compilation per (class, config, dtype) and argument shapes; all instances share it. Inside a trace the method
    runs inline. Arguments must be pytrees of arrays (or None). Each call reads the model's newest weights, see
    :mod:`worldloom.models.live_weights`.

    Arguments that are no arrays, and a ``state`` without the fields of the model's ``state_class``, are refused with
    ``DataError``. Numbers on the host are refused where they are NaN or infinite, as environments and replay refuse
    them. Arrays on devices are not read: that would wait for them. A ``task`` that the model does not have is refused
    wherever it lies, as it is a few integers; in a trace it is not known, and its embedding is NaN.
    """

    takes_state = "state" in inspect.signature(method).parameters

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if takes_state and (args or "state" in kwargs):
            _check_state(self, method.__name__, args[0] if args else kwargs["state"])
        leaves = jax.tree.leaves((args, kwargs))
        if any_traced(leaves):
            return method(self, *args, **kwargs)
        weights, arrays = live_weights(self)
        if any_traced(arrays):
            return method(self, *args, **kwargs)
        if not all(map(_is_fine, leaves)):
            raise DataError(_what_is_wrong(method, self, args, kwargs))
        if kwargs.get("task") is not None:
            _check_tasks(kwargs["task"], getattr(self.config, "num_tasks", 0))
        cls, version = self.__class__, class_version(self.__class__)
        jitted = weights.calls.get((method, version))
        if jitted is None:
            jitted = _jitted(method, cls, self.config, self.dtype, version, weights.treedef)
            weights.calls[method, version] = jitted
        return jitted(arrays, args, kwargs)

    return call  # type: ignore[return-value]


def _check_state(model: Any, name: str, state: Any) -> None:
    """Raise ``DataError`` unless ``state`` has the fields of the model's latent states."""
    if not all(hasattr(state, field) for field in getattr(model.state_class, "__annotations__", ())):
        raise DataError(
            f"state given to {type(model).__name__}.{name} must be a {model.state_class.__name__}, as encode and "
            f"predict return it; its type is {type(state).__name__}."
        )


def _is_fine(leaf: Any) -> bool:
    """Whether a leaf is an array or a number without NaN or infinity; of arrays on devices that is not known."""
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind in "biuV" or (leaf.dtype.kind == "f" and bool(np.isfinite(leaf).all()))
    if isinstance(leaf, float):
        return math.isfinite(leaf)
    return isinstance(leaf, jax.Array | int)


def _check_tasks(task: Any, num_tasks: int) -> None:
    """Raise ``DataError`` for a task that there is not; a model of one task says itself that it has one."""
    if not num_tasks or (isinstance(task, jax.Array) and not task.is_fully_addressable):
        return
    numbers = np.asarray(task)
    if numbers.dtype.kind not in "iu":
        raise DataError(f"task must hold integers, the numbers of tasks; its dtype is {numbers.dtype}.")
    wrong = numbers[(numbers < 0) | (numbers >= num_tasks)]
    if wrong.size:
        raise DataError(f"There is no task {wrong.flat[0]}; the model has the tasks 0 … {num_tasks - 1}.")


def _what_is_wrong(method: Callable[..., Any], model: Any, args: Any, kwargs: Any) -> str:
    """The sentence for arguments that are no arrays or not finite, with the argument's name and its first bad row."""
    given = inspect.signature(method).bind(model, *args, **kwargs).arguments
    found = (
        (name, path, leaf)
        for name, value in given.items()
        if value is not model
        for path, leaf in jax.tree.leaves_with_path(value)
        if not _is_fine(leaf)
    )
    name, path, leaf = next(found)
    what = f"{name}{jax.tree_util.keystr(path)} given to {type(model).__name__}.{method.__name__}"
    kind = getattr(getattr(leaf, "dtype", None), "kind", None)
    if kind != "f" and not isinstance(leaf, float):
        found_type = f"of type {type(leaf).__name__}" if kind is None else f"an array of dtype {leaf.dtype}"
        return f"{what} is {found_type}; arrays of real numbers are expected."
    bad = np.argwhere(~np.isfinite(leaf))
    where = f", first at {tuple(bad[0].tolist())}" if np.ndim(leaf) else ""
    return f"{what} is NaN or infinite{where}; nothing was computed. Check where it comes from."


def merge(cls: Any, config: Any, params: Params, dtype: jnp.dtype | None = None) -> Any:
    """The model with the weights ``params``, for traced code; ``dtype`` None follows ``config.precision``."""
    return nnx.merge(graphdef(cls, config, dtype or compute_dtype(config.precision)), whole_weights(params))


def graphdef(cls: Any, config: Any, dtype: jnp.dtype) -> Any:
    """The static half of a model (``nnx.GraphDef``), by abstract evaluation: no weight is allocated."""
    return _graphdef(cls, config, dtype, class_version(cls))


@functools.lru_cache(maxsize=512)
def _graphdef(cls: Any, config: Any, dtype: jnp.dtype, version: Any) -> Any:
    return nnx.split(abstract_model(cls, config, dtype))[0]


class _Identity:
    """Compares by identity, and keeps its value alive so that no other object gets its address."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value


def class_version(cls: Any) -> tuple[_Identity, ...]:
    """The attributes of a model class and its bases as they are now.

    Compiled programs are cached by class; with this in the key, a method or number that is assigned to a class later,
    as notebooks and monkeypatches do, is what runs from then on.
    """
    return tuple(
        _Identity(value)
        for base in cls.__mro__
        if issubclass(base, nnx.Module) and base is not nnx.Module
        for name, value in vars(base).items()
        if not name.startswith(("__", "_pytree"))
    )


def abstract_params(cls: Any, config: Any) -> Params:
    """Shapes and dtypes of all weights as ``ShapeDtypeStruct``; allocates nothing, whatever the size."""
    return nnx.to_pure_dict(nnx.state(abstract_model(cls, config, compute_dtype(config.precision))))


def trained_parameters(cls: Any, config: Any) -> int:
    """``num_parameters`` of a model of ``config``; allocates nothing."""
    params = abstract_params(cls, config)
    return count_parameters({name: part for name, part in params.items() if name not in cls.untrained})


def abstract_model(cls: Any, config: Any, dtype: jnp.dtype) -> Any:
    """The model with shapes in place of weights; allocates nothing."""
    return nnx.eval_shape(lambda: cls(config, dtype=dtype))


@functools.lru_cache(maxsize=64)
def initializer(cls: Any, config: Any, dtype: jnp.dtype, version: Any) -> tuple[Any, Callable[..., Params]]:
    """The graph of a new model's parts, and a function key → their initial weights.

    All weights are drawn in one compiled call: eager initialization compiles every distinct shape, seconds per model.
    """

    def parts(rngs: nnx.Rngs) -> nnx.Dict:
        return nnx.Dict(cls.build(config, dtype, rngs))

    graph, shapes = nnx.split(nnx.eval_shape(lambda: parts(nnx.Rngs(0))))
    size = count_parameters(nnx.to_pure_dict(shapes))

    def init_params(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(parts(OneDraw(key, size))))

    compiled_init = jax.jit(init_params, compiler_options=fast_compile_options())

    def init(key: jax.Array) -> Params:
        if isinstance(key, jax.core.Tracer):
            # Under a trace (abstract evaluation), JAX refuses a nested jit with compiler options.
            return init_params(key)
        memory = host_memory() if jax.default_backend() == "cpu" else None
        if memory is not None and 4 * size > memory:
            raise MemoryError(f"its weights take {4 * size / 1e9:,.0f} GB, this machine has {memory / 1e9:,.0f} GB")
        return compiled_init(key)

    return graph, init


@contextlib.contextmanager
def too_large_is_refused(cls: Any) -> Iterator[None]:
    """Turn what Python and JAX raise for weights that no memory holds into one ``ConfigError``."""
    try:
        yield
    except (MemoryError, OverflowError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        why = error if isinstance(error, MemoryError | jax.errors.JaxRuntimeError) else "no array has such a size"
        raise ConfigError(
            f"A {cls.__name__} of this config is too large: {why}. Choose smaller sizes; worldloom info NAME counts "
            "the parameters of a preset."
        ) from error


@functools.lru_cache(maxsize=512)
def _jitted(
    method: Callable[..., Any], cls: Any, config: Any, dtype: jnp.dtype, version: Any, treedef: Any
) -> Callable[..., Any]:
    graph = graphdef(cls, config, dtype)

    def run(arrays: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return method(nnx.merge(graph, jax.tree.unflatten(treedef, arrays)), *args, **kwargs)

    return jax.jit(run)


def freeze_constants(cls: Any, config: Any, gradients: Params) -> Params:
    """``gradients`` with zeros for the variables of a model that are no ``nnx.Param``.

    Flax trains parameters only; a variable of another type in a part of one's own is a table, a mask or a statistic.
    """
    names = _constants(cls, config, class_version(cls))
    if not names:
        return gradients
    flat = flatten(gradients)
    return unflatten({name: jnp.zeros_like(value) if name in names else value for name, value in flat.items()})


@functools.lru_cache(maxsize=64)
def _constants(cls: Any, config: Any, version: Any) -> frozenset[str]:
    model = abstract_model(cls, config, compute_dtype(config.precision))
    constants = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
    return frozenset(flatten({name: part for name, part in constants.items() if name not in cls.untrained}))
