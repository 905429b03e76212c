"""The workloads that benchmarks time: a model, a batch of random data, and a function that does one unit of work."""

import os
import platform
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import worldloom
from worldloom import create_world_model
from worldloom.devices import keep_freed_memory
from worldloom.models.base import merge
from worldloom.training import TrainingConfig
from worldloom.training.collector import compiled_policy
from worldloom.training.update_loop import CompiledUpdate, Learner, NonFiniteGuard, call_capacity


def random_batch(obs_shape, action_dim, batch_size, rows, seed=0):
    """Random rows [B, T, ...]; images are uint8."""
    rng = np.random.default_rng(seed)
    shape = (batch_size, rows)
    image = len(obs_shape) == 3
    obs = rng.integers(0, 256, (*shape, *obs_shape), np.uint8) if image else rng.normal(size=(*shape, *obs_shape))
    return {
        "obs": obs if image else obs.astype(np.float32),
        "actions": rng.uniform(-1, 1, (*shape, action_dim)).astype(np.float32),
        "rewards": rng.normal(size=shape).astype(np.float32),
        "is_first": np.zeros(shape, bool),
        "is_last": np.zeros(shape, bool),
        "is_terminal": np.zeros(shape, bool),
    }


def update_parts(name, *, obs_shape, action_dim, batch_size, length, training=None, **overrides):
    """A model, its ``TrainingConfig``, a batch [B, T, ...] on the host and a new ``TrainState``.

    ``training`` are further fields of the ``TrainingConfig``, ``overrides`` of the model's.
    """
    model = create_world_model(name, obs_shape=obs_shape, action_dim=action_dim, **overrides)
    clip = 20.0 if name.startswith("tdmpc2") else 0.0
    training = TrainingConfig(batch_size=batch_size, sequence_length=length, grad_clip=clip, **(training or {}))
    algorithm = model.algorithm
    spec = algorithm.replay_spec(model.config, training)
    batch = random_batch(obs_shape, action_dim, batch_size, spec.rows)
    if spec.latents:
        batch["context"] = {k: np.zeros((batch_size, *shape), np.float32) for k, shape in spec.latents.items()}
    state = jax.device_put(algorithm.init_state(model, training, jax.random.key(0)), jax.devices()[0])
    return model, training, batch, jax.tree.map(lambda x: x.copy(), state)


def update_call(name, **sizes):
    """``call()`` does one full update and blocks; also returns the model and a function that traces the program.

    ``sizes`` are the arguments of :func:`update_parts`.
    """
    model, training, batch, state = update_parts(name, **sizes)
    batch, state = jax.device_put(batch), {"now": state}
    update = model.algorithm.make_update(model.config, training.of_update(), model_class=type(model))
    step = jax.jit(update, donate_argnums=0)
    key = jax.random.key(1)

    def call():
        state["now"], metrics = step(state["now"], batch, key)
        jax.block_until_ready((state["now"], metrics))

    return call, model, lambda: step.trace(state["now"], batch, key)


def chunk_call(name, capacity, **sizes):
    """``call(count)`` starts ``count`` updates in one compiled call, as training does, and returns without waiting.

    Also returns the model, a function that traces a single update, the compiled program, and the largest ``count``:
    ``capacity``, or 1 where updates cannot be in a loop.
    """
    model, training, batch, state = update_parts(name, **sizes)
    capacity, unrolled = call_capacity(model, training.replace(updates_per_call=capacity), jax.devices()[0])
    algorithm = model.algorithm
    update = algorithm.make_update(model.config, training.of_update(), model_class=type(model))
    latents = bool(algorithm.replay_spec(model.config, training).latents)
    compiled = CompiledUpdate(update, algorithm.loss_terms, False, latents, unrolled)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    now = {"learner": Learner(state, NonFiniteGuard.create())}
    batches = jax.device_put(jax.tree.map(lambda x: np.broadcast_to(x, (capacity, *x.shape)), batch))

    # Compiled ahead of the first call, which would otherwise compile it a second time.
    program = compiled.lower(now["learner"], batches).compile()

    def call(count):
        now["learner"], output = program(*now["learner"], batches, count, None)
        return output.metrics

    return call, model, lambda: jax.jit(update).trace(shapes, batch, jax.random.key(1)), program, capacity


def plan_call(name, *, obs_shape, action_dim, environments=1, **overrides):
    """``call()`` plans one action for each of ``environments`` parallel environments and blocks."""
    model = create_world_model(name, obs_shape=obs_shape, action_dim=action_dim, **overrides)
    algorithm = model.algorithm
    act = compiled_policy(algorithm.policy, type(model), model.config)
    obs = np.random.default_rng(0).normal(size=(environments, *obs_shape)).astype(np.float32)
    carry = algorithm.initial_carry(model.config, environments)
    # Root key, carry, observations, is_first, number of the call; the weights are an argument as in training.
    arguments = (jax.random.key(1), carry, obs, np.zeros(environments, bool), 0)
    params = jax.device_put(model.params)

    def call():
        jax.block_until_ready(act(params, *arguments))

    return call, model, lambda: act.trace(params, *arguments)


def imagine_call(name, *, obs_shape, action_dim, batch_size, horizon, **overrides):
    """``call()`` imagines ``horizon`` steps from ``batch_size`` states and blocks."""
    model = create_world_model(name, obs_shape=obs_shape, action_dim=action_dim, **overrides)
    rng = np.random.default_rng(0)
    actions = jax.device_put(rng.uniform(-1, 1, (horizon, batch_size, action_dim)).astype(np.float32))
    state, key = model.initial_state(batch_size), jax.random.key(0)
    params = jax.device_put(model.params)

    @jax.jit
    def imagine(params, state, actions, key):
        return merge(type(model), model.config, params, model.dtype).imagine(state, actions, key)

    def call():
        jax.block_until_ready(imagine(params, state, actions, key))

    return call, model, lambda: imagine.trace(params, state, actions, key)


def kept_or_returned(parser):
    """Add the option ``--returned``, and keep freed memory unless it is given; call this before JAX is used."""
    parser.add_argument(
        "--returned", action="store_true", help="let the C library return freed memory to the kernel (CPU)"
    )
    if "--returned" not in sys.argv:
        keep_freed_memory()


def measure(call, *, repeats):
    """Seconds per call: median and 5th to 95th percentile over ``repeats`` calls, after an untimed one."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    low, median, high = np.percentile(seconds, [5, 50, 95])
    return {"median_seconds": median, "p5_seconds": low, "p95_seconds": high, "repeats": repeats}


def matmul_ceiling(size=1024, repeats=20):
    """Floating-point operations per second of a square float32 matrix product in this process: the ceiling."""
    x = jnp.ones((size, size))
    product = jax.jit(lambda a, b: a @ b)
    timing = measure(lambda: jax.block_until_ready(product(x, x)), repeats=repeats)
    return 2 * size**3 / timing["p5_seconds"]


def report(question, timing, model, trace, /, **about):
    """Everything needed to interpret a timing, as a dict for JSON."""
    cost = trace().lower().compile().cost_analysis() or {}
    flops, ceiling = cost.get("flops", float("nan")), matmul_ceiling()
    return {
        "question": question,
        **timing,
        "parameters": model.num_parameters(),
        "gflop": flops / 1e9,
        "fraction_of_matmul_ceiling": flops / timing["median_seconds"] / ceiling,
        "matmul_ceiling_gflops": ceiling / 1e9,
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "versions": {
            "worldloom": worldloom.__version__,
            "jax": jax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        **about,
    }
