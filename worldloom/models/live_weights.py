"""The weights of a model as a flat list, read afresh at every call without walking the model's graph.

``nnx.state`` takes tens of microseconds for every array: ten milliseconds of Python for a model whose step takes less
than one. What it finds out is where the arrays are, and that changes only when an attribute of a module is set. So the
variables are found once and kept; a call compares the attributes of all modules, by identity, with those that were
there then, and reads the arrays out of the variables. No array is kept: weights that were replaced in any way
(``load_params``, ``nnx.update``, an assignment to a variable, a part or a module) are seen by the next call.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterator
from itertools import chain
from typing import Any

import jax
from flax import nnx

_attributes = operator.attrgetter("__dict__")
_array = operator.methodcaller("get_raw_value")


class LiveWeights:
    """Where the arrays of a model are, found by one walk of its graph.

    Args:
      model: the module; it is not kept.

    Attributes:
      treedef: structure of the nested dict ``params`` whose leaves :meth:`read` returns.
      calls: for :func:`worldloom.models.base.compiled`: its compiled functions, which depend on the same attributes.
    """

    def __init__(self, model: nnx.Module):
        params = nnx.to_pure_dict(nnx.state(model))
        named, self.treedef = jax.tree.flatten_with_path(params)
        self.calls: dict[Any, Any] = {}
        modules: list[nnx.Pytree] = []
        found = dict(_walk(model, (), modules, set()))
        opaque = any(map(_may_hold_weights, chain.from_iterable(map(dict.values, map(_attributes, modules)))))
        self._modules = modules[1:]
        self._values = tuple(chain.from_iterable(map(dict.values, map(_attributes, modules))))
        self._names = tuple(chain.from_iterable(map(_attributes, modules)))
        paths = [tuple(str(key.key) for key in path) for path, _ in named]
        variables = [found.get(path) for path in paths]
        # Arrays in places that the walk does not enter (containers of the user's), or that a variable translates when
        # it is read: these models are walked by nnx.state at every call.
        self.known = (
            not opaque
            and found.keys() == set(paths)
            and all(
                isinstance(variable, nnx.Variable) and variable.get_raw_value() is leaf
                for variable, (_, leaf) in zip(variables, named, strict=True)
            )
        )
        self._variables = variables

    def still_holds(self, model: nnx.Module) -> bool:
        """Whether all modules of ``model`` have the attributes that they had, so that :meth:`read` is complete."""
        if not self.known:
            return False
        dicts = [model.__dict__, *map(_attributes, self._modules)]
        if sum(map(len, dicts)) != len(self._values):
            return False
        return all(map(operator.is_, chain.from_iterable(map(dict.values, dicts)), self._values)) and all(
            map(operator.is_, chain.from_iterable(dicts), self._names)
        )

    def read(self, model: nnx.Module) -> list[Any]:
        """The newest arrays, in the order of ``treedef``."""
        if self.known:
            return list(map(_array, self._variables))
        return jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))


_found: weakref.WeakKeyDictionary[nnx.Module, LiveWeights] = weakref.WeakKeyDictionary()


def live_weights(model: nnx.Module) -> tuple[LiveWeights, list[Any]]:
    """Where the weights of ``model`` are, and its newest arrays: jax or NumPy arrays, or tracers.

    A model whose weights are tracers is one that exists during that trace only, and is not remembered.
    """
    weights = _found.get(model)
    if weights is None or not weights.still_holds(model):
        weights = LiveWeights(model)
        arrays = weights.read(model)
        if not any_traced(arrays):
            _found[model] = weights
        return weights, arrays
    return weights, weights.read(model)


def any_traced(arrays: list[Any]) -> bool:
    """Whether a JAX transformation is tracing one of ``arrays``."""
    # Thousands of isinstance calls cost more than the set of their few types.
    return any(issubclass(kind, jax.core.Tracer) for kind in set(map(type, arrays)))


def _may_hold_weights(value: Any) -> bool:
    """Whether an attribute is a container in which weights are, or may be put later without setting an attribute."""
    if isinstance(value, nnx.Pytree | nnx.Variable):
        return False  # Walked.
    if isinstance(value, list | dict | set):
        return True
    return isinstance(value, tuple) and any(
        isinstance(inner, nnx.Pytree | nnx.Variable | jax.Array) or _may_hold_weights(inner) for inner in value
    )


def _walk(
    node: Any, path: tuple[str, ...], modules: list[nnx.Pytree], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Variables (and bare arrays) below ``node`` by path; the modules passed are appended to ``modules``."""
    if isinstance(node, nnx.Variable | jax.Array):
        if id(node) not in seen:
            seen.add(id(node))
            yield path, node
    elif isinstance(node, nnx.Pytree) and id(node) not in seen:
        seen.add(id(node))
        modules.append(node)
        for name, value in sorted(vars(node).items()):
            yield from _walk(value, (*path, str(name)), modules, seen)
