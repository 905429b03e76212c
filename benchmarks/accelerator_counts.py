"""Floating-point operations of a program, the peaks of cards, and kernels in a profile."""

import functools
import math
import re
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from work import measure

PEAKS = {  # TFLOP/s of dense matrix products, from NVIDIA's data sheets: bfloat16, TF32, float32
    "B200": (2250, 1125, 75),
    "H200 NVL": (836, 418, 60),
    "H200": (989, 494, 67),
    "H100 PCIe": (756, 378, 51),
    "H100 NVL": (836, 418, 60),
    "H100": (989, 494, 67),
    "A100": (312, 156, 19.5),
    "L40S": (362, 183, 91.6),
    "L4": (121, 60, 30.3),
    "A10G": (70, 35, 35),
    "RTX 4090": (165, 82.6, 82.6),
}
"""The first name that is a word of ``device_kind`` counts. Other devices, and parts of a card (MIG), only have the
measured ceiling."""


def published_peak(kind, precision):
    """FLOP/s of the data sheet for ``bfloat16``, ``tf32`` or ``float32``; None for a device that is not in it."""
    for name, row in PEAKS.items():
        if re.search(rf"\b{name}\b", kind) and "MIG" not in kind:
            return 1e12 * row[("bfloat16", "tf32", "float32").index(precision)]
    return None


@functools.cache
def ceiling(precision, size):
    """FLOP/s of a product of two random size × size matrices in this process; zeros and ones would draw less power."""
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    with jax.default_matmul_precision({"bfloat16": "default", "tf32": "tensorfloat32"}.get(precision, "float32")):
        product = jax.jit(lambda a, b: a @ b)
        timing = measure(lambda: [product(x, x) for _ in range(8)][-1].block_until_ready(), repeats=10)
    return 8 * 2 * size**3 / timing["p5_seconds"]


def count_flops(trace):
    """FLOPs of the matrix products and convolutions of ``trace()``, a body of a scan as often as it runs.

    XLA's own count (``cost_analysis``) has the body of a scan once. Everything elementwise is left out. The second
    value is the number of loops whose length is not known before they run, whose body counts once.
    """
    return _flops(trace().jaxpr.jaxpr)


def _flops(jaxpr):
    total, unknown = 0, 0
    for equation in jaxpr.eqns:
        name, given = equation.primitive.name, equation.params
        inner = [_flops(each) for value in given.values() for each in _programs(value)]
        if name == "cond":
            inner = [max(inner)]
        times = given["length"] if name == "scan" else 1
        total += times * sum(flops for flops, _ in inner)
        unknown += sum(loops for _, loops in inner) + (name == "while")
        output = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        shapes = [getattr(each.aval, "shape", ()) for each in equation.invars]
        if name == "dot_general":
            (contracted, _), _ = given["dimension_numbers"]
            total += 2 * output * math.prod(shapes[0][axis] for axis in contracted)
        elif name == "conv_general_dilated":
            features = shapes[1][given["dimension_numbers"].rhs_spec[0]]
            taps = math.prod(shapes[1]) / features
            # Zeros between the pixels of a transposed convolution are multiplied by no implementation.
            total += 2 * output * taps / math.prod(given["lhs_dilation"])
    return total, unknown


def _programs(value):
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, Jaxpr):
        return [value]
    return [each for item in value for each in _programs(item)] if isinstance(value, (tuple, list)) else []


def achieved(flops, seconds, precision, size):
    """FLOP/s over the peak of the data sheet and over a large matrix product in this process."""
    kind = jax.devices()[0].device_kind
    peak = published_peak(kind, precision)
    return {
        "gflop": flops / 1e9,
        "tflop_per_s": flops / seconds / 1e12,
        "of_published_peak": None if peak is None else flops / seconds / peak,
        "of_large_product": flops / seconds / ceiling(precision, size),
    }


def profile(call, calls):
    """Kernels of ``calls`` calls, from ``jax.profiler``: see :func:`kernels_of`."""
    call()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                call()
        (file,) = Path(folder).rglob("*.xplane.pb")
        return kernels_of(jax.profiler.ProfileData.from_file(str(file)).planes, calls, jax.default_backend())


def kernels_of(planes, calls, platform="cpu", top=20):
    """Kernels per call, the time between them, and the ``top`` names by time, from the planes of a profile.

    On a GPU a kernel is an event of a stream; XLA records the kernels of a command buffer one by one only where CUPTI
    can. On a CPU an event is an operation of the compiled program. Copies between host and device, and within it, are
    no kernels. ``gaps`` are the times in which the device did nothing, between two events: the launch gaps, and the
    waiting for the host between two calls. Of several cards, the first that did something counts.

    Raises ``ValueError`` for a profile of the ``platform`` "gpu" without a card's events; the host's are no kernels.
    """
    planes = list(planes)
    cards = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    cards = [plane for plane in cards if any(line.name.startswith("Stream") for line in plane.lines)][:1]
    if platform == "gpu" and not cards:
        names = ", ".join(plane.name for plane in planes)
        raise ValueError(f"the profile holds no stream of a GPU, only {names}; the driver may refuse profiling (CUPTI)")
    events = [
        (event.start_ns, event.duration_ns, event.name)
        for plane in cards or planes
        for line in plane.lines
        if line.name.startswith("Stream" if cards else "tf_XLA")
        for event in line.events
        if cards or any(name == "hlo_op" for name, _ in event.stats)
    ]
    if not events:
        raise ValueError("the profile holds no kernel: neither a stream of a GPU nor operations of XLA on a CPU")
    events.sort()
    gaps, busy, end = [], 0, events[0][0]
    for start, length, _ in events:
        if start > end:
            gaps.append(start - end)
        busy += max(0, start + length - max(start, end))
        end = max(end, start + length)
    by_name, copies = defaultdict(list), []
    for _, length, name in events:
        (copies if re.match(r"mem(cpy|set)", name, re.IGNORECASE) else by_name[name]).append(length)
    ranked = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    return {
        "calls": calls,
        "kernels_per_call": sum(map(len, by_name.values())) / calls,
        "copies_per_call": len(copies) / calls,
        "copies_ms_per_call": sum(copies) / calls / 1e6,
        "ms_per_call": (end - events[0][0]) / calls / 1e6,
        "busy": busy / max(end - events[0][0], 1),
        "gaps_per_call": len(gaps) / calls,
        "gap_us": {"median": statistics.median(gaps) / 1e3, "longest": max(gaps) / 1e3} if gaps else None,
        "top": [
            {"name": name[:160], "per_call": len(each) / calls, "ms_per_call": sum(each) / calls / 1e6}
            for name, each in ranked[:top]
        ],
    }
