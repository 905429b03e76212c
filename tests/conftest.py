"""Shared test set-up: one compilation cache for all runs, recorded arrays by name."""

import importlib.metadata
import logging
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"

# Before JAX is imported. Compiling is most of the suite's time, and its results outlive a run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
# A test's program runs a few times, so it should be quick to compile rather than quick. .ci/run compares the recorded
# numbers of the reference programs once more with XLA's usual optimization.
if os.environ.get("WORLDLOOM_TEST_OPTIMIZED") != "1":
    flags = ["--xla_backend_optimization_level=0"]
    # The newer code generator takes two thirds of a compilation. XLA ends the process at flags that it does not know,
    # so only versions that were tried get this one.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def golden():
    """``golden("tdmpc2-single-s0")`` is the dict of arrays recorded from the reference program."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(DATA / f"{name}.npz", allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    return load


@pytest.fixture
def getkey():
    """A function that returns a fresh PRNG key at every call, the same ones in every run."""
    state = {"key": jax.random.key(0)}

    def fresh() -> jax.Array:
        state["key"], key = jax.random.split(state["key"])
        return key

    return fresh


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs of a module are of no use to the next, and gigabytes by the end."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _messages_reach_pytest():
    """The command line, called in this process, keeps worldloom's messages to itself."""
    logging.getLogger("worldloom").propagate = True


@pytest.fixture(scope="session")
def elsewhere(request):
    """``elsewhere(condition)`` skips a way of computing updates that is compared for another recorded file.

    Each is a compilation, which is all the time that these tests take; `-m slow` compares every file in every way.
    """

    def skip_if(condition: bool) -> None:
        if condition and "slow" not in request.config.getoption("-m").replace("not slow", ""):
            pytest.skip("another recorded file is computed in this way; run with -m slow")

    return skip_if
