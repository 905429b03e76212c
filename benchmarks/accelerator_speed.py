"""Part ``speed`` of ``accelerator.py``: what updates, plans, imagination and acting take on this device."""

import argparse
import statistics
import time

import jax
from accelerator_counts import achieved, ceiling, count_flops, profile, published_peak
from accelerator_tasks import in_worker
from work import chunk_call, imagine_call, measure, plan_call, update_call

UPDATES = (1, 8, 32)
"""Updates per compiled call."""
MODELS = {  # seconds until the figures of a vector and of an image model are there, with compilation
    "tdmpc2:5m": (40, 45),
    "dreamerv3:size12m": (70, 90),
    "tdmpc2:1m": (35, 40),
    "dreamerv3:size1m": (60, 80),
    "tdmpc2:tiny": (30, 35),
    "dreamerv3:tiny": (50, 70),
    "tdmpc2:48m": (45, 60),
    "dreamerv3:size50m": (80, 110),
    "dreamerv3:size200m": (110, 150),
}


def tasks(smoke):
    """Measurements in the order in which they are done: the published sizes first."""
    names = ["tdmpc2:tiny", "dreamerv3:tiny"] if smoke else list(MODELS)
    size = 256 if smoke else 8192
    yield in_worker("large products", 30, "accelerator_speed:products", size=size)
    for name in names:
        for obs, seconds in zip(("vector",) if smoke else ("vector", "image"), MODELS[name], strict=False):
            yield in_worker(
                f"update {name} {obs}", seconds, "accelerator_speed:updates", name=name, obs=obs, size=size,
                windows=windows_of(name, smoke), counts=[1, 2] if smoke else UPDATES, seconds=0.05 if smoke else 1.0,
            )  # fmt: skip
    for name in ["tdmpc2:tiny"] if smoke else ["tdmpc2:5m", "tdmpc2:1m", "tdmpc2:48m"]:
        for environments in (2,) if smoke else (1, 16, 256):
            yield in_worker(
                f"plan {name} {environments}", 25, "accelerator_speed:plan", name=name, environments=environments,
                repeats=2 if smoke else 30, size=size,
            )  # fmt: skip
    for name in ["tdmpc2:tiny"] if smoke else ["dreamerv3:size12m", "tdmpc2:5m"]:
        batch_size, horizon = (4, 3) if smoke else (512, 3) if name.startswith("tdmpc2") else (1024, 15)
        yield in_worker(
            f"imagine {name}", 25, "accelerator_speed:imagine", name=name, batch_size=batch_size, horizon=horizon,
            size=size, repeats=2 if smoke else 30,
        )  # fmt: skip
    for name, image in [("dreamerv3:tiny", False)] if smoke else [
        ("tdmpc2:5m", False), ("dreamerv3:size12m", False), ("dreamerv3:size12m", True)
    ]:  # fmt: skip
        yield in_worker(
            f"policy {name}{' image' * image}", 45, "accelerator_speed:policy", name=name, image=image,
            calls=2 if smoke else 100,
        )  # fmt: skip
    name = "tdmpc2:tiny" if smoke else "dreamerv3:size12m"
    yield in_worker(
        f"replay {name}", 120, "accelerator_speed:replay", name=name, windows=windows_of(name, smoke),
        obs="vector" if smoke else "image", updates=2 if smoke else 64, rounds=2 if smoke else 5,
    )  # fmt: skip
    if not smoke:
        for name, obs in (("tdmpc2:5m", "vector"), ("dreamerv3:size12m", "image")):
            yield in_worker(
                f"loop {name} {obs}", 120, "accelerator_speed:loop", name=name, obs=obs, windows=windows_of(name, smoke)
            )
    for name in ["tdmpc2:tiny"] if smoke else ["dreamerv3:size12m", "dreamerv3:size200m"]:
        for setting in ("2 parts",) if smoke else (
            "plain", "remat", "2 parts", "4 parts", "8 parts", "4 parts, remat"
        ):  # fmt: skip
            # Alone: the peak memory of a process never falls.
            yield in_worker(
                f"memory {name} {setting}", 80, "accelerator_speed:memory", alone=True, name=name, setting=setting,
                obs="vector" if smoke else "image", windows=windows_of(name, smoke), repeats=1 if smoke else 5,
            )  # fmt: skip
    for name in ["tdmpc2:tiny"] if smoke else ["tdmpc2:5m", "dreamerv3:size12m"]:
        for ending, flags in (("", None),) if smoke else (
            ("", None), (" without command buffers", "--xla_gpu_enable_command_buffer=")
        ):  # fmt: skip
            yield in_worker(
                f"profile {name}{ending}", 60, "accelerator_speed:kernels", flags=flags, name=name,
                windows=windows_of(name, smoke), calls=2 if smoke else 10,
            )  # fmt: skip


def windows_of(name, smoke):
    """Windows of a batch and rows of a window: the reference's."""
    if smoke:
        return [4, 4]
    return [256, 4] if name.startswith("tdmpc2") else [16, 64]


def shape_of(name, obs):
    """Observations of the reference: TD-MPC2 stacks three images."""
    return (24,) if obs == "vector" else (9, 64, 64) if name.startswith("tdmpc2") else (64, 64, 3)


def sizes_of(name, obs, windows):
    sizes = {"obs_shape": shape_of(name, obs), "action_dim": 6, "batch_size": windows[0], "length": windows[1]}
    if obs == "image" and name.startswith("tdmpc2"):
        sizes["latent_dim"] = 512  # the output size of its image encoder
    return sizes


def products(size):
    """TFLOP/s of large products by precision: what this card does when nothing else is in the way."""
    kind = jax.devices()[0].device_kind
    rates = {precision: ceiling(precision, size) for precision in ("bfloat16", "tf32", "float32")}
    return {
        "size": size,
        "tflop_per_s": {precision: rate / 1e12 for precision, rate in rates.items()},
        "published": {precision: (published_peak(kind, precision) or 0) / 1e12 or None for precision in rates},
    }


def updates(name, obs, windows, counts, seconds, size):
    """Milliseconds per update for each number of updates in a call, in calls that do not wait for one another."""
    start = time.perf_counter()
    call, model, trace, program, capacity = chunk_call(name, max(counts), **sizes_of(name, obs, windows))
    found = {"model_and_compilation_s": time.perf_counter() - start, "ms_per_update": {}}
    flops, unknown = count_flops(trace)
    for count in (count for count in counts if count <= capacity):
        found["ms_per_update"][str(count)] = timed(lambda count=count: call(count), count, seconds)
    best = min(each["median"] for each in found["ms_per_update"].values())
    held = program.memory_analysis()
    return {
        "parameters": model.num_parameters(),
        "batch": windows,
        "precision": str(model.dtype),
        **found,
        **achieved(flops, best / 1e3, product_precision(model), size),
        "loops_counted_once": unknown,
        "memory_mb": {
            "temporary": held.temp_size_in_bytes / 1e6,
            "arguments": held.argument_size_in_bytes / 1e6,
            "batches_held": capacity,
        },
    }


def timed(call, count, seconds, rounds=5):
    """Milliseconds of each of ``count`` things in a call, over rounds of about ``seconds`` that wait at their end."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    calls = max(2, min(200, round(seconds / (time.perf_counter() - start))))
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            last = call()
        jax.block_until_ready(last)
        found.append(1e3 * (time.perf_counter() - start) / calls / count)
    return {"median": statistics.median(found), "least": min(found), "most": max(found), "calls": calls}


def product_precision(model):
    """The row of the data sheet that a model's products belong to; JAX computes float32 products in TF32 on a GPU."""
    if str(model.dtype) == "bfloat16":
        return "bfloat16"
    return "tf32" if jax.default_backend() == "gpu" else "float32"


def plan(name, environments, repeats, size):
    """Milliseconds of a plan for each of ``environments``, in one call that is waited for."""
    call, model, trace = plan_call(name, obs_shape=(24,), action_dim=6, environments=environments)
    timing = measure(call, repeats=repeats)
    return milliseconds(timing) | {
        "ms_per_environment": 1e3 * timing["median_seconds"] / environments,
        **of_program(timing, model, trace, size),
    }


def imagine(name, batch_size, horizon, repeats, size):
    """Milliseconds of imagining ``horizon`` steps from ``batch_size`` states."""
    call, model, trace = imagine_call(name, obs_shape=(24,), action_dim=6, batch_size=batch_size, horizon=horizon)
    timing = measure(call, repeats=repeats)
    return milliseconds(timing) | {
        "states_per_second": batch_size * horizon / timing["median_seconds"],
        **of_program(timing, model, trace, size),
    }


def of_program(timing, model, trace, size):
    flops, unknown = count_flops(trace)
    held = trace().lower().compile().memory_analysis()
    return {
        **achieved(flops, timing["median_seconds"], product_precision(model), size),
        "loops_counted_once": unknown,
        "memory_mb": {"temporary": held.temp_size_in_bytes / 1e6, "arguments": held.argument_size_in_bytes / 1e6},
    }


def milliseconds(timing):
    return {f"{name.removesuffix('_seconds')}_ms": 1e3 * timing[name] for name in timing if name.endswith("_seconds")}


def policy(name, image, calls):
    """Latency of acting in one environment, as ``act.py`` measures it."""
    import act

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    sizes = {"obs_dim": 24, "action_dim": 6, "image": image}
    return act.measure(
        name, argparse.Namespace(**sizes, rounds=5, calls=calls, steps=5 * calls, memory_calls=0), compiled
    )


def replay(name, obs, windows, updates, rounds):
    """Milliseconds per update of training from replay on the host and on the device, by turns."""
    from train_step import episodes

    from worldloom import create_world_model
    from worldloom.training import Trainer, TrainingConfig

    sizes = sizes_of(name, obs, windows)
    batch_size, length = sizes.pop("batch_size"), sizes.pop("length")
    buffer = episodes(sizes["obs_shape"], sizes["action_dim"])
    trainers = {
        storage: Trainer(
            create_world_model(name, **sizes),
            TrainingConfig(total_steps=10**9, batch_size=batch_size, sequence_length=length, device="auto",
                           replay_storage=storage),
            callbacks=[],
        )
        for storage in ("host", "device")
    }  # fmt: skip
    times = {storage: [] for storage in trainers}
    for number in range(rounds + 1):
        for storage, trainer in trainers.items():
            start = time.perf_counter()
            trainer.train(buffer, total_steps=trainer.step + updates)
            if number:  # the first compiles
                times[storage].append(1e3 * (time.perf_counter() - start) / updates)
    return {
        "ms_per_update": {storage: statistics.median(each) for storage, each in times.items()},
        "host_over_device": statistics.median(a / b for a, b in zip(*times.values(), strict=True)),
        "batch": windows,
    }


def loop(name, obs, windows):
    """What the training loop costs in addition to the updates, as ``train_step.py`` measures it: logged every round."""
    from train_step import compare

    shape = (64, 64, 3) if obs == "image" else (24,)
    return compare(name, shape, *windows, updates=100, rounds=5)


def memory(name, obs, setting, windows, repeats):
    """Memory and time of an update with ``microbatches`` and ``remat``, as ``memory.py`` measures them."""
    import memory as script

    return script.one(setting, name, obs, *windows, repeats)


def kernels(name, windows, calls):
    """Kernels of an update, and the gaps between them."""
    call, *_ = update_call(name, **sizes_of(name, "vector", windows))
    return profile(call, calls)
