"""Device strings in PyTorch users' habits, mapped to JAX devices. Nothing is configured at import time."""

from __future__ import annotations

import functools
import logging
import re

import jax
import jax.numpy as jnp

from worldloom.errors import ConfigError, DeviceError

_log = logging.getLogger("worldloom")
_PLATFORMS = {"cuda": "gpu", "gpu": "gpu", "tpu": "tpu", "cpu": "cpu"}


def check_device_name(name: str) -> str:
    """Return ``name`` if it is ``auto`` or a kind (``cpu cuda gpu tpu``), plain or with ``:N``; else raise."""
    if not isinstance(name, str) or not re.fullmatch(r"auto|(cpu|cuda|gpu|tpu)(:\d+)?", name):
        raise ConfigError(
            f"device={name!r} is not known; use 'auto', 'cpu', 'cuda', 'gpu', 'tpu', or a numbered one like 'cuda:1'."
        )
    return name


def resolve_device(name: str = "auto") -> jax.Device:
    """The JAX device meant by ``name``.

    ``auto`` is JAX's default device. A kind without a number that is absent (``cuda`` on a laptop) falls back to
    what JAX has and says so once; a numbered device that is absent raises ``DeviceError`` listing what is there.
    """
    check_device_name(name)
    default = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
    if isinstance(default, str):
        default = jax.devices(default)[0]
    if name == "auto":
        return default
    kind, _, number = name.partition(":")
    try:
        found = jax.devices(_PLATFORMS[kind])
    except RuntimeError:
        found = []
    if not number:
        if found:
            return default if default in found else found[0]
        _say_once(f"device='{name}' is not available here; training on {default.device_kind} ({default.platform}).")
        return default
    if int(number) < len(found):
        return found[int(number)]
    present = ", ".join(f"{d.platform}:{d.id} ({d.device_kind})" for d in {*jax.devices(), *jax.devices("cpu")})
    raise DeviceError(f"device='{name}' is not here; JAX sees: {present}.")


def compute_dtype(precision: str, device: jax.Device | None = None) -> jnp.dtype:
    """Dtype of activations: ``float32``, ``bfloat16``, or for ``auto`` bfloat16 on GPU and TPU and float32 on CPU."""
    if precision == "auto":
        platform = (device or resolve_device()).platform
        precision = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(precision)


@functools.cache
def _say_once(message: str) -> None:
    _log.warning(message)
