"""What every world model has: building, compiled methods, saving, loading, counting."""

from __future__ import annotations

import functools
import importlib
import types
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from worldloom.algorithm import Algorithm, Params
from worldloom.devices import compute_dtype, resolve_device
from worldloom.errors import ConfigError, DataError
from worldloom.families import get_family
from worldloom.models import pretrained
from worldloom.models.live_weights import any_traced, live_weights
from worldloom.models.params import check_shapes, count_parameters, flatten, unflatten
from worldloom.nn.linear import OneDraw
from worldloom.xla_workarounds import quick_to_compile

F = TypeVar("F", bound=Callable[..., Any])


class Statistic(nnx.Variable):
    """A running number that no gradient moves (return range, value scale). Saved with the weights."""


_env_spaces: weakref.WeakKeyDictionary[WorldModel, dict[str, Any]] = weakref.WeakKeyDictionary()
"""Spaces of the environments that models were trained in, as JSON values; beside the models, whose attributes are all
compared with what their class builds."""


def make_policy(
    self: WorldModel,
    env: Any = None,
    *,
    num_envs: int | None = None,
    mode: str = "sample",
    planner: Mapping[str, Any] | None = None,
    max_ms: float | None = None,
    device: str | None = None,
    seed: int = 0,
) -> Any:
    """``model.policy(env)``: an agent that acts in an environment, see :class:`worldloom.acting.Policy`."""
    # By name, because acting stands above models: it needs environments too.
    policy = importlib.import_module("worldloom.acting").Policy
    return policy(self, env, num_envs=num_envs, mode=mode, planner=planner, max_ms=max_ms, device=device, seed=seed)


class _PolicyMethod:
    """The method :func:`make_policy` under the name ``policy``, which a part of the model may have too.

    TD-MPC2's prior is called so in all saved weights. A method alone would be hidden by that part, so this descriptor
    stores the part where all parts are, in ``vars(model)``, and answers with the method.
    """

    def __get__(self, model: WorldModel | None, owner: Any = None) -> Callable[..., Any]:
        return make_policy if model is None else types.MethodType(make_policy, model)

    def __set__(self, model: WorldModel, part: Any) -> None:
        vars(model)["policy"] = part

    def __delete__(self, model: WorldModel) -> None:
        del vars(model)["policy"]


class WorldModel(nnx.Module):
    """A world model with all its weights: dynamics, heads, policy, critics and their slow copies.

    A family's class names its config class, lists in ``untrained`` the parts that no gradient reaches, and implements
    ``build``. Methods marked :func:`compiled` run under ``jax.jit`` when called from Python and inline when called
    from traced code, so the same methods serve users and the loss.

    A subclass that changes ``build`` (other encoder, extra head) or one of the ``loss_hooks`` (extra loss term) is what
    ``Trainer`` trains, saves and loads; a change that training would not see is refused by :func:`check_trainable`.

    Args:
      config: the family's config.
      seed: seed of the initial weights.
      device: where the weights are put, see :func:`worldloom.devices.resolve_device`.
      dtype: dtype of activations; None follows ``config.precision`` on that device.
    """

    config_class: ClassVar[type[Any]]
    algorithm: ClassVar[Algorithm]
    """The family's algorithm; set by :func:`worldloom.register_family`."""
    untrained: ClassVar[tuple[str, ...]] = ()
    """Parts that no optimizer moves. They are not counted as parameters."""
    loss_terms: ClassVar[tuple[str, ...]] = ()
    """Names of the terms in ``compute_loss``, total first; a subclass with more terms appends theirs."""
    loss_hooks: ClassVar[tuple[str, ...]] = ()
    """Methods that an update takes its loss from; override these for another loss."""
    views: ClassVar[tuple[str, ...]] = ()
    """Methods that no update calls: they show users what the parts compute. Overriding one changes no training."""

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
    def params(self) -> Params:
        """All weights as a nested pure dict of arrays (no copies)."""
        return nnx.to_pure_dict(nnx.state(self))

    def load_params(self, params: Mapping[str, Any]) -> None:
        """Replace all weights. Raises ``WeightsError`` naming the arrays that are missing, unexpected or misshapen."""
        own, given = flatten(self.params), flatten(params)
        check_shapes(type(self).__name__, own, given)
        placed = {name: jax.device_put(jnp.asarray(given[name], own[name].dtype), own[name].sharding) for name in own}
        nnx.update(self, unflatten(placed))

    policy = _PolicyMethod()

    @property
    def env_spaces(self) -> dict[str, Any] | None:
        """Spaces of the environment that the model was trained in, as JSON values; None if they are not known.

        ``worldloom.envs.EnvSpaces.from_json`` makes Gymnasium spaces of them. They are saved with the model.
        """
        return _env_spaces.get(self)

    def remember_env_spaces(self, spaces: Mapping[str, Any] | None) -> None:
        """Set :attr:`env_spaces`, the values of ``EnvSpaces.to_json``; None forgets them."""
        if spaces is None:
            _env_spaces.pop(self, None)
        else:
            _env_spaces[self] = dict(spaces)

    @classmethod
    def rebuild(cls, config: Any, params: Params) -> Self:
        """The model of ``config`` that holds ``params``, for use inside traced code."""
        return merge(cls, config, params)

    def check_trainable(self, device: jax.Device) -> None:
        """Raise ``ConfigError`` unless training on ``device`` trains exactly this model; see the function."""
        check_trainable(self, device)

    def num_parameters(self) -> int:
        """Trainable scalars; slow or target copies and statistics are not counted."""
        return count_parameters({k: v for k, v in self.params.items() if k not in self.untrained})

    def save_pretrained(self, path: str | Path | None = None, *, name: str | None = None) -> Path:
        """Write ``config.json`` and ``model.safetensors`` and return their folder.

        A model that was trained in an environment also leaves ``spaces.json``, so that it acts in the environment's
        units when it is loaded.

        Args:
          path: the folder, created if needed.
          name: instead of ``path``: a plain name under which ``create_world_model`` finds the model again; it is
            kept in ``WORLDLOOM_CACHE_DIR``.
        """
        if (path is None) == (name is None):
            raise TypeError("save_pretrained takes either a path or name=…")
        folder = Path(path) if path is not None else pretrained.named_folder(str(name))
        arrays = {key: np.asarray(value, order="C") for key, value in flatten(jax.device_get(self.params)).items()}
        pretrained.write_model(folder, self.config.to_json(), arrays, type(self), self.env_spaces)
        return folder

    def push_to_hub(self, repo_id: str, *, token: str | None = None, private: bool = False) -> str:
        """Upload the saved model to a Hugging Face repository and return its address (extra ``hub``)."""
        import tempfile

        client = pretrained.hub()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            address = client.create_repo(repo_id, token=token, private=private, exist_ok=True)
            client.upload_folder(repo_id=repo_id, folder_path=folder, token=token)
        return str(address)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        device: str = "auto",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> Self:
        """Load what :meth:`save_pretrained` wrote, as this class or the subclass of it that was saved.

        Arguments and errors are those of :func:`worldloom.from_pretrained`. A class loads what its base class saved if
        it has the same weights: only the loss differs then.

        Raises ``ConfigError`` when the folder holds a model of another class.
        """
        folder = pretrained.find_model_folder(
            path_or_repo,
            known=pretrained.saved_names(),
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        saved = pretrained.read_model(folder)
        if cls is WorldModel:
            cls = get_family(saved.config.get("model_type")).model_class
        return build_saved(find_class(cls, saved.class_name, str(path_or_repo)), saved, device, overrides)


# ---- which class was saved -----------------------------------------------------------------------------------------


def find_class(cls: type[Any], saved: str | None, place: str) -> type[Any]:
    """The class to build for weights that were saved by the class ``saved`` (``module:QualifiedName``) under ``cls``.

    Nothing is imported: the saved class must be ``cls``, one of its bases, or a subclass that this process has defined.

    Raises:
      ConfigError: it is none of these; the message says what to import or call.
    """
    if saved is None:
        return cls
    name = saved.rpartition(":")[2]
    if name in {base.__qualname__ for base in cls.__mro__}:
        return cls
    found = [sub for sub in _subclasses(cls) if sub.__qualname__ == name]
    # A class of a script is __main__'s there and its module's elsewhere; the module only settles who is meant.
    found = [sub for sub in found if pretrained.class_name(sub) == saved] or found
    if found:
        return found[-1]
    raise ConfigError(
        f"{place} was saved by {saved.replace(':', '.')}, which is not a class that {cls.__name__} loads here. Import "
        f"the module that defines it and call {name}.from_pretrained(…), on the command line: --family-module MODULE."
    )


def build_saved(cls: type[Any], saved: pretrained.SavedModel, device: str, overrides: Mapping[str, Any]) -> Any:
    """The model ``cls`` of a saved config and weights; sizes are compared before memory is taken.

    Raises ``ConfigError`` for the config of another family, ``WeightsError`` for arrays that do not fit.
    """
    kind, own = saved.config.get("model_type"), cls.config_class.__dataclass_fields__["model_type"].default
    try:
        config = cls.config_class.from_dict(saved.config).replace(**overrides)
    except ConfigError as error:
        if kind in (None, own):
            raise
        raise ConfigError(f"{saved.folder} holds a model of type {kind!r}, not a {cls.__name__}.") from error
    pretrained.check_part_counts(config, len(saved.arrays))
    check_shapes(cls.__name__, flatten(abstract_params(cls, config)), saved.arrays)
    model = cls(config, device=device)
    model.load_params(unflatten(saved.arrays))
    model.remember_env_spaces(saved.spaces)
    return model


def _subclasses(cls: type[Any]) -> list[type[Any]]:
    direct = cls.__subclasses__()
    return direct + [further for sub in direct for further in _subclasses(sub)]


# ---- whether training sees a user's changes ------------------------------------------------------------------------


def check_trainable(model: Any, device: jax.Device) -> None:
    """Raise ``ConfigError`` unless an update, which rebuilds the model from class and config, trains exactly ``model``.

    Refused are parts, attributes or methods changed on the object after it was built, methods overridden that no
    update calls, and an activation dtype that the config does not say.
    """
    cls: Any = type(model)
    if not hasattr(cls, "algorithm"):
        raise ConfigError(f"{cls.__name__} belongs to no family yet; call worldloom.register_family for it first.")
    family: Any = next(base for base in reversed(cls.__mro__) if "algorithm" in base.__dict__)
    overridden = {
        name for base in cls.__mro__[: cls.__mro__.index(family)] for name in base.__dict__ if name in family.__dict__
    }
    hooks = " or ".join(family.loss_hooks)
    unseen = [name for name in family.views if name in overridden]
    if unseen and not overridden & {*family.loss_hooks}:
        raise ConfigError(
            f"{cls.__name__} overrides {', '.join(unseen)}, which training never calls: it would train as "
            f"{family.__name__} does. Training takes its loss from {hooks} and its parts from build; override those."
        )
    dtype = compute_dtype(model.config.precision, device)
    if model.dtype != dtype:
        raise ConfigError(
            f"The model was built with dtype={model.dtype.name}, but training follows config.precision="
            f"{model.config.precision!r}, which is {dtype.name} on {device.platform}. Set "
            f"precision={model.dtype.name!r} in the config instead."
        )
    try:
        rebuilt = graphdef(cls, model.config, dtype)
    except TypeError as error:
        raise ConfigError(
            f"{cls.__name__} cannot be built from its config alone, as training does: {error}. Give further arguments "
            "of __init__ defaults, or make them fields of a config class of its own."
        ) from error
    if nnx.split(model)[0] != rebuilt:
        raise ConfigError(
            f"This {cls.__name__} was changed after it was built; training rebuilds it from class and config and would "
            f"not see {_difference(model, cls, dtype)}. Define a subclass: override build for its parts, "
            f"{hooks or 'its methods'} for its loss."
        )


def _difference(model: Any, cls: type[Any], dtype: jnp.dtype) -> str:
    """The attributes in which ``model`` differs from what its class builds."""
    fresh = _abstract(cls, model.config, dtype)
    names = sorted({*vars(model), *vars(fresh)})
    graphs = [
        {name: _graph_of(getattr(each, name)) for name in names if hasattr(each, name)} for each in (model, fresh)
    ]
    changed = [name for name in names if graphs[0].get(name) != graphs[1].get(name)]
    return ", ".join(changed) or "the change"


def _graph_of(value: Any) -> Any:
    return nnx.split(value)[0] if isinstance(value, nnx.Module) else value


# ---- checks that both kinds of families share ----------------------------------------------------------------------


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
        raise DataError(f"carry is of {carry} environments, obs of {count}; give carry=None to start again.")
    if is_first is not None and jnp.shape(is_first) != (count,):
        raise DataError(f"is_first has shape {jnp.shape(is_first)}; obs of {count} environments need ({count},).")


# ---- compiled methods ----------------------------------------------------------------------------------------------


def compiled(method: F) -> F:
    """Run a :class:`WorldModel` method under ``jax.jit``, closing over the graph and passing weights as a flat list.

    One compilation per (class, config, dtype) and argument shapes; all instances share it. Inside a trace the method
    runs inline. Arguments must be pytrees of arrays (or None). Each call reads the model's newest weights, see
    :mod:`worldloom.models.live_weights`.
    """

    @functools.wraps(method)
    def call(self: WorldModel, *args: Any, **kwargs: Any) -> Any:
        if any_traced(jax.tree.leaves((args, kwargs))):
            return method(self, *args, **kwargs)
        weights, arrays = live_weights(self)
        if any_traced(arrays):
            return method(self, *args, **kwargs)
        jitted = weights.calls.get(method)
        if jitted is None:
            jitted = weights.calls[method] = _jitted(method, type(self), self.config, self.dtype, weights.treedef)
        return jitted(arrays, args, kwargs)

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

    quick = jax.jit(params, compiler_options=quick_to_compile())
    # Abstract evaluation builds models too, and takes no compiler options.
    return graph, lambda key: params(key) if isinstance(key, jax.core.Tracer) else quick(key)


@functools.lru_cache(maxsize=512)
def _jitted(
    method: Callable[..., Any], cls: type[WorldModel], config: Any, dtype: jnp.dtype, treedef: Any
) -> Callable[..., Any]:
    graph = graphdef(cls, config, dtype)

    def run(arrays: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return method(nnx.merge(graph, jax.tree.unflatten(treedef, arrays)), *args, **kwargs)

    return jax.jit(run)
