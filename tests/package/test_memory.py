"""Freed memory that stays: the same pages serve one large array after another."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from worldloom.devices import keep_freed_memory
kept = keep_freed_memory() if "keep" in sys.argv else None
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(25_000_000)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, min(faults[1:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_kept_memory_is_not_faulted_in_again():
    def run(*words):
        return subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True).stdout.split()

    assert run()[0] == "None"
    kept, faults = run("keep")
    assert kept == "True"
    assert int(faults) < 100
