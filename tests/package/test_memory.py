"""Freed memory that stays: the same pages serve one update after another."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, time
import jax, jax.numpy as jnp
from worldloom.devices import keep_freed_memory

how = sys.argv[1]
print(None if how == "returned" else keep_freed_memory())
call = jax.jit(lambda x: jnp.tanh(x @ x.T) @ x)  # 100 MB between the products.
faults, shares = [], []
for _ in range(5):
    x = jax.block_until_ready(jnp.ones((5000, 4)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    y = call(x)
    called = time.perf_counter()
    jax.block_until_ready(y)
    shares.append((called - start) / (time.perf_counter() - start))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[1:]), min(shares[1:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.parametrize("how", ["returned", "kept"])
def test_kept_memory_is_not_faulted_in_again(how):
    """100 MB are 24,000 pages, or 50 huge ones. A call waits for its result where memory is kept."""
    command = [sys.executable, "-c", PROGRAM, how]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    kept, faults, waiting = output.split()
    assert kept == {"returned": "None"}.get(how, "True")
    assert int(faults) > 40 if how == "returned" else int(faults) < 20
    assert float(waiting) > 0.9 if how == "kept" else float(waiting) < 0.5
