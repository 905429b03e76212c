"""Protocol of both sides of a comparison: read a count from stdin, make that many calls, print the seconds.

Two long-lived processes alternate, so that changes of the machine's speed affect both.
"""

import contextlib
import ctypes
import json
import os
import platform
import sys
import time

if os.environ.get("KEEP_FREED_MEMORY") and platform.libc_ver()[0] == "glibc":
    # What worldloom.devices.keep_freed_memory does, for Pythons without worldloom: no mmap, no trimming, and JAX
    # computes in the calling thread, whose heap this concerns.
    for name, value in ((-4, 0), (-1, -1)):
        ctypes.CDLL(None).mallopt(name, value)
    with contextlib.suppress(ImportError):  # PyTorch computes in the calling thread anyway
        import jax

        jax.config.update("jax_cpu_enable_async_dispatch", False)


def serve(call, **about):
    """Answer each line ``n`` on stdin with ``{"seconds": …}`` for ``n`` calls; the first answer describes the work.

    ``call()`` must block until its results are there.
    """
    answers = sys.stdout
    sys.stdout = sys.stderr  # output of the timed program must not mix with the answers
    start = time.perf_counter()
    call()
    print(json.dumps({"first_call_seconds": time.perf_counter() - start, **about}), file=answers, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            call()
        print(json.dumps({"seconds": time.perf_counter() - start}), file=answers, flush=True)
