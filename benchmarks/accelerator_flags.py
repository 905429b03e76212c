"""Part ``flags`` of ``accelerator.py``: what XLA's settings for GPUs change, each in a process of its own.

Nothing here is set by worldloom: whoever wants one sets ``XLA_FLAGS`` (or the variable named) before starting Python.
"""

from typing import NamedTuple

from accelerator_speed import windows_of
from accelerator_tasks import in_worker


class Setting(NamedTuple):
    """Flags of XLA, or environment variables, and what they do."""

    flags: str
    effect: str
    env: dict = {}  # noqa: RUF012  (never changed)


SETTINGS = {
    "default": Setting("", "XLA's defaults, which the others are compared with"),
    "no command buffers": Setting(
        "--xla_gpu_enable_command_buffer=", "kernels are launched one by one, not recorded as CUDA graphs"
    ),
    "command buffers from one kernel": Setting(
        "--xla_gpu_graph_min_graph_size=1", "even single kernels become CUDA graphs"
    ),
    "loops in command buffers": Setting(
        "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL",
        "scans and branches become nodes of CUDA graphs, without the host in between",
    ),
    "unrolled loops in command buffers": Setting(
        "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL --xla_gpu_command_buffer_unroll_loops=true",
        "the same with the steps of loops of known length recorded one after the other",
    ),
    "no Triton products": Setting(
        "--xla_gpu_enable_triton_gemm=false", "matrix products by cuBLAS only, not by generated Triton kernels"
    ),
    "Triton products anywhere": Setting(
        "--xla_gpu_triton_gemm_any=true", "Triton kernels wherever they are possible, chosen by autotuning"
    ),
    "cuBLASLt": Setting("--xla_gpu_enable_cublaslt=true", "cuBLASLt, which fuses biases and activations"),
    "cuDNN products": Setting(
        "--xla_gpu_cudnn_gemm_fusion_level=1", "fused products by cuDNN where autotuning prefers it"
    ),
    "latency hiding scheduler": Setting(
        "--xla_gpu_enable_latency_hiding_scheduler=true", "operations ordered so that copies overlap with computation"
    ),
    "double buffered loops": Setting(
        "--xla_gpu_enable_while_loop_double_buffering=true", "two steps of a loop in one, without copies between them"
    ),
    "no autotuning": Setting("--xla_gpu_autotune_level=0", "compiles faster; no implementation is tried out"),
    "deterministic": Setting(
        "--xla_gpu_deterministic_ops=true", "the same result in every run, or an error where XLA has no such kernel"
    ),
    "rbg random numbers": Setting(
        "",
        "random bits by XLA's own generator; draws differ from those of the default",
        {"JAX_DEFAULT_PRNG_IMPL": "rbg"},
    ),
}
MODELS = {"tdmpc2:5m": 60, "dreamerv3:size12m": 90}


def tasks(smoke):
    """Two models with every setting; the default first, and for each model alike."""
    for model, seconds in {"tdmpc2:tiny": 20}.items() if smoke else MODELS.items():
        for name, setting in SETTINGS.items():
            if smoke and name != "no command buffers":
                continue
            # Without the compilation cache, so that the first call compiles with these settings.
            env = {"JAX_ENABLE_COMPILATION_CACHE": "false", **setting.env}
            yield in_worker(
                f"{model}, {name}", seconds, "accelerator_speed:updates", flags=setting.flags, env=env, name=model,
                obs="vector", windows=windows_of(model, smoke), counts=[1] if smoke else [1, 8],
                seconds=0.05 if smoke else 1.0, size=256 if smoke else 8192,
            )  # fmt: skip
