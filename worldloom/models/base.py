"""Base class of world models: building, compiled methods, saving, loading, parameter counts."""

from __future__ import annotations

import importlib
import tempfile
import types
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from worldloom.algorithm import Algorithm, Params
from worldloom.devices import compute_dtype, resolve_device
from worldloom.errors import ConfigError, DataError
from worldloom.families import class_name, get_family
from worldloom.files import absolute_path, write_atomically
from worldloom.models import pretrained
from worldloom.models.card import CARD_FILE, Card
from worldloom.models.compilation import (
    abstract_params,
    class_version,
    initializer,
    too_large_is_refused,
)
from worldloom.models.compilation import compiled as compiled
from worldloom.models.compilation import merge as merge
from worldloom.models.fine_tuning import InitReport, reports
from worldloom.models.params import check_shapes, count_parameters, describe_model, flatten, unflatten
from worldloom.models.trainable import check_trainable

if TYPE_CHECKING:
    from worldloom.models.trust import Trust

F = TypeVar("F", bound=Callable[..., Any])


class Statistic(nnx.Variable):
    """A running statistic (return range, value scale): updated without gradients, saved with the weights."""


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

    A family's class names its config class, lists in ``untrained`` the parts that receive no gradient, and implements
    ``build``. Methods marked :func:`compiled` run under ``jax.jit`` when called from Python and inline when called
    from traced code, so users and the loss call the same methods.

    ``Trainer`` trains, saves and loads subclasses that override ``build`` (other encoder, extra head) or one of the
    ``loss_hooks`` (extra loss term); :func:`check_trainable` refuses changes that training would ignore.

    Args:
      config: the family's config.
      seed: seed of the initial weights.
      device: device of the weights, see :func:`worldloom.devices.resolve_device`.
      dtype: dtype of activations; None follows ``config.precision`` on that device.
    """

    config_class: ClassVar[type[Any]]
    state_class: ClassVar[type[Any]] = object
    """The named tuple of its latent states: what methods take as ``state`` must have its fields."""
    algorithm: ClassVar[Algorithm]
    """The family's algorithm; set by :func:`worldloom.register_family`."""
    untrained: ClassVar[tuple[str, ...]] = ()
    """Parts that no optimizer updates. They are not counted as parameters."""
    loss_terms: ClassVar[tuple[str, ...]] = ()
    """Names of the terms of ``compute_loss``, the total first; a subclass appends those that it adds."""
    loss_hooks: ClassVar[tuple[str, ...]] = ()
    """Methods that an update calls for its loss; override these to change the loss."""
    views: ClassVar[tuple[str, ...]] = ()
    """Methods for users only, which no update calls: overriding one does not change training."""
    uncertainty_units: ClassVar[Mapping[str, str]] = {}
    """Name and unit of every signal that :meth:`uncertainty` returns."""

    def __init__(self, config: Any, *, seed: int = 0, device: str = "auto", dtype: Any = None):
        if not isinstance(config, self.config_class):
            raise TypeError(f"{type(self).__name__} takes a {self.config_class.__name__}, not {type(config).__name__}.")
        self.config = config
        target = resolve_device(device)
        self.dtype = jnp.dtype(dtype or compute_dtype(config.precision, target))
        with too_large_is_refused(type(self)):
            graph, init_params = initializer(type(self), config, self.dtype, class_version(type(self)))
            params = jax.device_put(init_params(jax.random.key(seed)), target)
        for name, part in nnx.merge(graph, params).items():
            setattr(self, name, part)

    @staticmethod
    def build(config: Any, dtype: jnp.dtype, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        """Create the parts of the model by name. ``dtype`` is the activations' dtype; parameters are float32."""
        raise NotImplementedError

    @property
    def params(self) -> Params:
        """All weights as a nested pure dict of arrays (no copies)."""
        return nnx.to_pure_dict(nnx.state(self))

    def load_params(self, params: Mapping[str, Any]) -> None:
        """Replace all weights. Raises ``WeightsError`` naming the arrays that are missing, unexpected or misshapen."""
        old, new = flatten(self.params), flatten(params)
        check_shapes(type(self).__name__, old, new)
        placed = {name: jax.device_put(jnp.asarray(new[name], old[name].dtype), old[name].sharding) for name in old}
        nnx.update(self, unflatten(placed))

    def __repr__(self) -> str:
        return describe_model(self)

    __str__ = __repr__

    policy = _PolicyMethod()

    @property
    def env_spaces(self) -> dict[str, Any] | None:
        """Spaces of the environment that the model was trained in, as JSON values; None if they are not known.

        ``worldloom.envs.EnvSpaces.from_json`` makes Gymnasium spaces of them. They are saved with the model.
        """
        return _env_spaces.get(self)

    @property
    def init_report(self) -> InitReport | None:
        """What this model took from another one (``init_from``); None if it took nothing, or was loaded."""
        return reports.get(self)

    def remember_env_spaces(self, spaces: Mapping[str, Any] | None) -> None:
        """Set :attr:`env_spaces`, the values of ``EnvSpaces.to_json``; None forgets them."""
        if spaces is None:
            _env_spaces.pop(self, None)
        else:
            _env_spaces[self] = dict(spaces)

    @classmethod
    def version(cls) -> Any:
        """The class's attributes as they are now, for the keys of compiled programs; see :func:`class_version`."""
        return class_version(cls)

    @classmethod
    def rebuild(cls, config: Any, params: Params) -> Self:
        """The model of ``config`` with the weights ``params``, for use inside traced code."""
        return merge(cls, config, params)

    @classmethod
    def abstract_params(cls, config: Any, arrays: int) -> Params:
        """Shapes and dtypes of all weights of ``config``, which somebody else's file may hold; nothing is allocated.

        Args:
          config: the config.
          arrays: number of arrays that hold the weights.

        Raises ``WeightsError`` for a config of more parts than arrays, ``ConfigError`` for one of impossible sizes.
        """
        pretrained.check_part_counts(config, arrays)
        try:
            return abstract_params(cls, config)
        except (ArithmeticError, ValueError, TypeError, MemoryError, RecursionError) as error:
            raise ConfigError(f"The config describes no {cls.__name__} that can be built: {error}") from error

    def check_trainable(self, device: jax.Device) -> None:
        """Raise ``ConfigError`` unless training on ``device`` trains exactly this model (:func:`check_trainable`)."""
        check_trainable(self, device)

    def num_parameters(self) -> int:
        """Number of trainable scalars, without slow or target copies and statistics."""
        return count_parameters({k: v for k, v in self.params.items() if k not in self.untrained})

    @property
    def continue_discount(self) -> float:
        """The discount that the ``continues`` of ``imagine`` contain: they are this times a probability; 1 for none."""
        return 1.0

    def uncertainty(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The family's signals of where imagination fails, [B, T] by name: those of ``uncertainty_units``.

        A family that has none returns an empty dict, as this method does.

        Args:
          batch: rows [B, T, ...] as for ``compute_loss``.
        """
        del batch
        return {}

    def trust(self, batch: Mapping[str, Any]) -> Trust:
        """How far imagination can be believed: a signal for each row, and errors by the number of imagined steps.

        ``trust(batch).rows`` holds ``kl`` [B, T] for DreamerV3 and ``q_disagreement`` [B, T] for TD-MPC2, see
        :meth:`uncertainty` there; ``.errors`` the root mean square errors of imagining from row 0 of every sequence
        with the recorded actions (:func:`worldloom.models.trust.horizon_errors`). Give episodes that the model was not
        trained on.

        Args:
          batch: rows [B, T, ...] by the arrival rule, every sequence within one episode, as of
            ``held_out.sample(B, T)``; T is at least 2.

        Raises:
          DataError: sequences are too short or span two episodes, a key is missing, or a shape does not fit.
          TypeError: the model lacks a method that imagination needs.
        """
        from worldloom.models.trust import trust

        return trust(self, batch)

    def save_pretrained(self, path: str | Path | None = None, *, name: str | None = None) -> Path:
        """Write ``config.json`` and ``model.safetensors`` and return their folder.

        A model that was trained in an environment also leaves ``spaces.json``, so that it acts in the environment's
        units when it is loaded.

        Args:
          path: the folder, created if needed.
          name: instead of ``path``, a plain name by which ``create_world_model`` finds the model; it is saved in
            ``WORLDLOOM_CACHE_DIR``.
        """
        if (path is None) == (name is None):
            raise TypeError("save_pretrained takes either a path or name=…")
        folder = absolute_path(path) if path is not None else pretrained.named_folder(str(name))
        arrays = {key: np.asarray(value, order="C") for key, value in flatten(jax.device_get(self.params)).items()}
        pretrained.write_model(folder, self.config.to_json(), arrays, type(self), self.env_spaces)
        return folder

    def push_to_hub(self, repo_id: str, *, token: str | None = None, private: bool = False) -> str:
        """Upload the saved model with a card to a Hugging Face repository and return its address (extra ``hub``).

        ``worldloom push``, or ``worldloom.export.push_to_hub`` of a run, tells more: results, curve, video, settings.
        """
        client = pretrained.hub()
        with tempfile.TemporaryDirectory() as folder:
            path = self.save_pretrained(folder)
            card = Card(repo_id, self.config.to_dict(), self.num_parameters())
            write_atomically(path / CARD_FILE, card.text())
            return pretrained.upload(client, repo_id, path, token=token, private=private)

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
        """Load what :meth:`save_pretrained` wrote, as this class or as the subclass of it that was saved.

        Arguments and errors as in :func:`worldloom.from_pretrained`. A subclass also loads what its base class saved if
        both have the same weights, that is, if it only changes the loss.

        Raises ``ConfigError`` if the folder holds a model of another class.
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


# ---- the class of a saved model ------------------------------------------------------------------------------------


def find_class(cls: type[Any], saved: str | None, place: str) -> type[Any]:
    """``cls`` or the subclass of it to build for weights saved by the class ``saved`` (``module:QualifiedName``).

    Nothing is imported: the saved class must be ``cls``, one of its bases, or a subclass that this process has defined.

    Args:
      cls: the class that the caller loads.
      saved: from the file; None (files of earlier versions) means ``cls``.
      place: path or name of the saved model, for the message.

    Raises:
      ConfigError: it is none of these; the message names the module to import or the method to call.
    """
    if saved is None:
        return cls
    name = saved.rpartition(":")[2]
    candidates = [cls, *_subclasses(cls)]
    # Exact matches first. Then the name alone: a class of a script is in __main__ there, in a module when imported.
    for same in (lambda each: class_name(each) == saved, lambda each: each.__qualname__ == name):
        if any(same(base) for base in cls.__mro__):
            return cls
        matches = [candidate for candidate in candidates if same(candidate)]
        if matches:
            return matches[-1]
    raise ConfigError(
        f"{place} was saved by {saved.replace(':', '.')}, which is not a class that {cls.__name__} loads here. Import "
        f"the module that defines it and call {name}.from_pretrained(…), on the command line: --family-module MODULE."
    )


def build_saved(cls: type[Any], saved: pretrained.SavedModel, device: str, overrides: Mapping[str, Any]) -> Any:
    """Build ``cls`` from a saved config and weights; shapes are compared before memory is allocated.

    Raises ``ConfigError`` for the config of another family, ``WeightsError`` for arrays that do not fit.
    """
    saved_type, own_type = saved.config.get("model_type"), cls.config_class.__dataclass_fields__["model_type"].default
    try:
        config = cls.config_class.from_dict(saved.config).replace(**overrides)
    except ConfigError as error:
        if saved_type in (None, own_type):
            raise
        raise ConfigError(f"{saved.folder} holds a model of type {saved_type!r}, not a {cls.__name__}.") from error
    check_shapes(cls.__name__, flatten(cls.abstract_params(config, len(saved.arrays))), saved.arrays)
    model = cls(config, device=device)
    model.load_params(unflatten(saved.arrays))
    model.remember_env_spaces(saved.spaces)
    return model


def _subclasses(cls: type[Any]) -> list[type[Any]]:
    direct = cls.__subclasses__()
    return direct + [descendant for sub in direct for descendant in _subclasses(sub)]


# ---- checks of arguments, shared by the families --------------------------------------------------------------------


def check_time_first(batch: tuple[int, ...], states: tuple[int, ...]) -> None:
    """Raise ``DataError`` unless actions [H, *batch, ...] and states [*states, ...] have the same batch shape."""
    if batch != states:
        raise DataError(
            f"Actions for a batch of shape {batch} do not fit states of batch shape {states}. Actions are time first, "
            "[H, B, ...]; swapaxes(0, 1) converts batch-first actions."
        )


def check_one_batch(**shapes: tuple[int, ...]) -> None:
    """Raise ``DataError`` unless all arguments have the same batch shape; keywords are their names."""
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise DataError(f"The batch shapes differ: {listed}. Give one entry of each for every state.")


def check_new_metrics(metrics: Mapping[str, Any], terms: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` if a loss term has the name of another metric of the update."""
    if twice := sorted({*metrics} & {*terms}):
        raise ConfigError(f"The update has metrics '{', '.join(twice)}' of its own; give your loss terms other names.")


def check_new_term(name: str, terms: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` if a further loss term has the name of one that is there, or of a total."""
    if name in (*terms, "loss", "policy"):
        raise ConfigError(f"A loss term '{name}' is there already; give yours another name.")


def check_environments(count: int, carry: int | None, is_first: Any) -> None:
    """Raise ``DataError`` unless carry and ``is_first`` are of as many environments as the observations, ``count``."""
    if carry not in (None, count):
        raise DataError(f"carry is of {carry} environments, obs of {count}; give carry=None to start again.")
    if is_first is not None and jnp.shape(is_first) != (count,):
        raise DataError(f"is_first has shape {jnp.shape(is_first)}; obs of {count} environments need ({count},).")
