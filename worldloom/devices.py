"""Device strings in PyTorch users' habits, mapped to JAX devices. Nothing is configured at import time."""

from __future__ import annotations

import ctypes
import functools
import logging
import re
from pathlib import Path

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


def keep_compiled_programs(folder: str | Path) -> Path:
    """Let JAX keep what it compiles in ``folder``, for programs that want to start faster the next time.

    A folder that was chosen before, as with ``JAX_COMPILATION_CACHE_DIR``, stays. The command line chooses
    ``WORLDLOOM_CACHE_DIR/compiled``; imports choose nothing.

    Returns:
      The folder in use.
    """
    chosen = compiled_programs()
    if chosen is None:
        chosen = Path(folder).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(chosen))
        # JAX leaves out what compiles within a second, of which a start has many.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return chosen


def compiled_programs() -> Path | None:
    """The folder where JAX keeps what it compiles, or None."""
    folder = getattr(jax.config, "jax_compilation_cache_dir", None)
    return Path(folder) if folder else None


def keep_freed_memory() -> bool:
    """Keep freed memory in the process, for programs that train on a CPU; returns whether it could (glibc only).

    XLA asks for an update's temporary memory anew each time. glibc takes blocks of that size from the kernel and gives
    them back, so that every page is faulted in and cleared again in every update: a third of the time of a DreamerV3
    ``size1m`` update on two cores. After this call they come from a heap that only grows. It concerns the whole
    process, and must come before JAX computes; the command line calls it, imports never do. Starting Python with
    ``GLIBC_TUNABLES=glibc.malloc.hugetlb=1`` has nearly the same effect.

    Only the main thread's heap can grow that far, so ``jax_cpu_enable_async_dispatch`` is set to False too: on a CPU,
    JAX then computes in the thread that calls it and makes it wait. Models whose update takes no longer than what the
    host does meanwhile (``tdmpc2:tiny`` in environments) are better off without; they need little memory anyway.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # Windows, macOS, musl.
        return False
    mmap_max, trim_threshold = -4, -1  # malloc.h
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return all(mallopt(name, value) for name, value in ((mmap_max, 0), (trim_threshold, -1)))


@functools.cache
def _say_once(message: str) -> None:
    _log.warning(message)
