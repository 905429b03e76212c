"""Root key and package versions of a run, and copies of its state and model."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import jax
import numpy as np
from flax import nnx

from worldloom._version import __version__
from worldloom.algorithm import TrainState
from worldloom.errors import ConfigError
from worldloom.sharding import Placement
from worldloom.training.config import TrainingConfig
from worldloom.training.update_loop import copy

_FIXED = ("seed", "device", "mesh", "updates_per_call", "replay_capacity")
"""Fields of ``TrainingConfig`` that cannot change once a run has begun, because its state depends on them."""


def check_is_model(model: Any) -> None:
    """Raise ``TypeError`` unless ``model`` is a world model."""
    if isinstance(model, type) or not hasattr(model, "check_trainable"):
        what = f"the class {model.__name__}; build one from its config" if isinstance(model, type) else repr(model)
        raise TypeError(f"A Trainer trains a world model, such as create_world_model returns, not {what:.200}.")


def check_latents(model: Any, config: TrainingConfig) -> None:
    """Raise ``ConfigError`` if ``latent_dtype`` is set for a model whose algorithm stores no latents."""
    if config.latent_dtype != "float32" and not model.algorithm.replay_spec(model.config, config).latents:
        raise ConfigError(
            f"latent_dtype='{config.latent_dtype}' is the precision of latents stored in replay, and "
            f"{type(model).__name__} stores none; leave it at 'float32'."
        )


def check_fixed(before: TrainingConfig, after: TrainingConfig, *, begun: bool, online: bool) -> None:
    """Raise ``ConfigError`` for a change of a field that the state of a run depends on.

    Args:
      before: config of the run.
      after: the new one.
      begun: whether the run has a state already.
      online: whether it has a replay buffer of its own.
    """
    for name in _FIXED:
        old, new = getattr(before, name), getattr(after, name)
        if old != new and (online if name == "replay_capacity" else begun):
            raise ConfigError(
                f"{name}={old!r} cannot change to {new!r} within a run; begin a new Trainer with this model."
            )


def check_optimizer(model: Any, config: TrainingConfig, state: TrainState) -> None:
    """Raise ``ConfigError`` if ``state`` has not the optimizer's state that ``config`` needs."""
    expected = jax.eval_shape(lambda key: model.algorithm.init_state(model, config.of_update(), key), state.key)
    if str(jax.tree.structure(expected.opt_state)) != str(jax.tree.structure(state.opt_state)):
        raise ConfigError(
            "The state of the optimizer does not fit the new config, which switches one of its parts (such as "
            "weight_decay) on or off; begin a new Trainer with this model."
        )


def root_key(seed: int) -> jax.Array:
    """The root key of a run. Unlike ``jax.random.key``, it uses all bits of seeds beyond 32 bits."""
    key = jax.random.key(seed & 0xFFFFFFFF)
    return jax.random.fold_in(key, seed >> 32) if seed >> 32 else key


def on_host(state: TrainState, placement: Placement | None = None) -> TrainState:
    """A copy of ``state`` with NumPy arrays, independent of later updates. The key stays a JAX key.

    ``placement`` says where the state is; None is on one device.
    """
    arrays, key = (state.step, state.params, state.opt_state), state.key
    if placement is not None:
        arrays, key = placement.to_host(arrays), placement.to_device(key)
    step, params, opt_state = jax.tree.map(np.array, jax.device_get(arrays))
    return state.replace(step=step, params=params, opt_state=opt_state, key=copy(key))


def facts(run: Any) -> dict[str, Any]:
    """What the processes that train a ``Run`` together must agree on before it goes on, as JSON values by name."""
    identity = run.identity()
    settings = {**identity.pop("config"), **identity.pop("training"), **identity}
    return settings | {"updates done": run.step, "rows in replay": len(run.sampler.buffer)}


def versions() -> dict[str, str]:
    """Versions of the packages that results may depend on."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "worldloom": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def with_params(model: Any, params: dict[str, Any]) -> Any:
    """A copy of ``model`` with the weights ``params``."""
    copied = nnx.clone(model)
    copied.load_params(params)
    return copied
