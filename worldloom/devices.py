"""PyTorch-style device strings for JAX devices, and process-wide JAX settings; importing configures nothing."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp

from worldloom.errors import ConfigError, DeviceError

_log = logging.getLogger("worldloom")
_PLATFORMS = {"cuda": "gpu", "gpu": "gpu", "tpu": "tpu", "cpu": "cpu"}


def check_device_name(name: str) -> str:
    """Return ``name`` if it is ``auto``, or ``cpu``, ``cuda``, ``gpu`` or ``tpu`` with an optional ``:N``.

    Raises ``ConfigError`` for anything else.
    """
    if not isinstance(name, str) or not re.fullmatch(r"auto|(cpu|cuda|gpu|tpu)(:\d+)?", name):
        raise ConfigError(
            f"device={name!r} is not known; use 'auto', 'cpu', 'cuda', 'gpu', 'tpu', or a numbered one like 'cuda:1'."
        )
    return name


def resolve_device(name: str = "auto") -> jax.Device:
    """The JAX device that ``name`` stands for.

    ``auto`` is JAX's default device. A platform without a number that is missing (``cuda`` on a laptop) falls back to
    the default device and logs a warning once.

    Raises:
      ConfigError: ``name`` is not a device string.
      DeviceError: a numbered device does not exist; the message lists those that do.
    """
    check_device_name(name)
    # Devices of other processes are in jax.devices(), too.
    default = jax.config.jax_default_device or jax.local_devices()[0]  # type: ignore[attr-defined]
    if isinstance(default, str):
        default = jax.local_devices(backend=default)[0]
    if name == "auto":
        return default
    platform, _, number = name.partition(":")
    try:
        found = jax.local_devices(backend=_PLATFORMS[platform])
    except RuntimeError:
        found = []
    if not number:
        if found:
            return default if default in found else found[0]
        _warn_once(f"device='{name}' is not available here; training on {default.device_kind} ({default.platform}).")
        return default
    if int(number) < len(found):
        return found[int(number)]
    present = ", ".join(f"{d.platform}:{d.id} ({d.device_kind})" for d in {*jax.devices(), *jax.devices("cpu")})
    raise DeviceError(f"device='{name}' does not exist; JAX sees: {present}.")


def compute_dtype(precision: str, device: jax.Device | None = None) -> jnp.dtype:
    """Dtype of activations. ``auto`` means bfloat16 on GPU and TPU and float32 on CPU."""
    if precision == "auto":
        platform = (device or resolve_device()).platform
        precision = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(precision)


def host_memory() -> int | None:
    """Bytes of the machine's main memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows; systems without these names.
        return None


def keep_compiled_programs(folder: str | Path) -> Path:
    """Turn on JAX's persistent compilation cache in ``folder``, so that the next process starts faster.

    A cache folder that is already set, for example by ``JAX_COMPILATION_CACHE_DIR``, stays in use. The command line
    uses ``WORLDLOOM_CACHE_DIR/compiled``.

    Returns:
      The cache folder in use.
    """
    chosen = compiled_programs()
    if chosen is None:
        chosen = Path(folder).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(chosen))
        # By default JAX does not cache programs that compile in less than a second, and a start compiles many.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return chosen


def compiled_programs() -> Path | None:
    """The folder of JAX's persistent compilation cache, or None if it is off."""
    folder = getattr(jax.config, "jax_compilation_cache_dir", None)
    return Path(folder) if folder else None


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory in the process, which speeds up training on a CPU.

    XLA allocates the temporary memory of every update. glibc maps blocks of that size from the kernel and unmaps them
    when freed, so every page is faulted in and zeroed again in every update: a third of the time of a DreamerV3
    ``size1m`` update on two cores. After this call they come from a heap that only grows. The setting concerns the
    whole process and must be made before JAX computes anything; the command line makes it, an import never does.
    Starting Python with ``GLIBC_TUNABLES=glibc.malloc.hugetlb=1`` has nearly the same effect.

    Only the main thread's heap can grow that far, so ``jax_cpu_enable_async_dispatch`` is turned off too: on a CPU, JAX
    then computes in the calling thread and blocks it. Models whose update takes no longer than the host's work in the
    meantime (small ones that train online) are faster without this call, and need little memory anyway.

    Returns:
      Whether it succeeded: False without glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # Windows, macOS, musl.
        return False
    mmap_max, trim_threshold = -4, -1  # malloc.h
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return all(mallopt(name, value) for name, value in ((mmap_max, 0), (trim_threshold, -1)))


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning(message)
