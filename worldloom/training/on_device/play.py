"""Episodes of an evaluation in environments in JAX: the policy and the environments in one compiled program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from worldloom.envs import EpisodeEnd, TimeStep, VectorEnv
from worldloom.envs.jax.backend import JaxBackend, as_backend
from worldloom.envs.jax.batch import advance
from worldloom.errors import DataError
from worldloom.ops.seed_sequence import entropy_words, spawned_state
from worldloom.training.on_device.program import executed_actions

_MOST = 256
"""Steps in one call at most."""


def is_on_device(env: Any) -> bool:
    """Whether ``env`` is a ``VectorEnv`` of environments in JAX that stop at a bad step."""
    in_jax = isinstance(env, VectorEnv) and isinstance(getattr(env, "_backend", None), JaxBackend)
    return in_jax and env.settings.get("on_bad_step") != "restart"


def steps_on_device(
    act: Callable[..., Any],
    params: Any,
    key: jax.Array,
    carry: Any,
    env: VectorEnv,
    first: TimeStep,
    episodes: np.ndarray,
) -> Iterator[TimeStep]:
    """The time steps that ``play`` sees after ``first``, the reset of ``env``; their observations are left out.

    The last one is that at which every environment has ended its ``episodes`` [N]. ``env`` itself stays at its reset.
    Raises ``DataError`` for NaN from an environment or from the policy.
    """
    backend = as_backend(env)
    assert backend.batch is not None
    program = _program(backend.env, backend.limit, act, min(_MOST, (backend.limit or _MOST) + 1))
    count = env.num_envs
    none = np.zeros(count, bool)
    state = (carry, jax.tree.map(jnp.copy, backend.batch), first.obs, none, first.is_first, np.zeros(count, np.int32))
    # Where the weights are, as the program returns them: from other places it would be compiled twice.
    home = next(iter(jax.tree.leaves(params)[0].devices()))
    state, remaining = jax.device_put((state, episodes.astype(np.int32)), home)
    returns, lengths, number = np.zeros(count), np.zeros(count, int), 0
    while remaining.any():
        state, remaining, done, arrivals = program(
            params, key, entropy_words(env.seed), state, remaining, np.int32(number)
        )
        done, (reward, is_first, is_last, is_terminal, info, good) = jax.device_get((done, arrivals))
        for step in range(done):
            if not good[step]:
                env.close()
                raise DataError("An observation, a reward or an action came back NaN or infinite; check the simulator.")
            returns = np.where(is_first[step], 0, returns) + reward[step]
            lengths = np.where(is_first[step], 0, lengths + 1)
            ends = [
                EpisodeEnd(
                    env=int(i),
                    episode_return=float(returns[i]),
                    length=int(lengths[i]),
                    terminated=bool(is_terminal[step, i]),
                    crashed=False,
                    info={name: float(v[step, i]) for name, v in info.items() if np.isfinite(v[step, i])},
                )
                for i in np.flatnonzero(is_last[step])
            ]
            yield TimeStep({}, reward[step], is_first[step], is_last[step], is_terminal[step], tuple(ends))
        number += int(done)


@functools.lru_cache(maxsize=16)
def _program(env: Any, limit: int | None, act: Any, steps: int) -> Callable[..., Any]:
    """Up to ``steps`` steps of all environments, until none has episodes remaining.

    (params, key, entropy, state, remaining int32 [N], number) → (state, remaining, steps done, arrivals [steps, N]).
    """

    def run(
        params: Any, key: jax.Array, entropy: jax.Array, state: Any, remaining: jax.Array, number: jax.Array
    ) -> Any:
        def step(state: Any, number: jax.Array) -> Any:
            carry, envs, obs, over, is_first, episodes = state
            inputs = jax.lax.optimization_barrier((params, carry, obs, is_first))
            carry, actions, _ = jax.lax.optimization_barrier(act(inputs[0], key, *inputs[1:], number))
            episodes = episodes + over
            seeds = spawned_state(entropy, jnp.arange(len(over)), episodes)[0] >> 1
            executed, good = executed_actions(env, actions, over)
            envs, arrival = advance(env, limit, envs, executed, over, seeds)
            floats = [x for x in jax.tree.leaves((arrival.obs, arrival.reward)) if x.dtype == jnp.float32]
            good = good & jnp.all(jnp.stack([jnp.isfinite(x).all() for x in floats]))
            row = (arrival.reward, over, arrival.is_last, arrival.is_terminal, arrival.info, good)
            return (carry, envs, arrival.obs, arrival.is_last, over, episodes), row

        def go_on(loop: Any) -> jax.Array:
            _, remaining, done, _ = loop
            return (done < steps) & jnp.any(remaining > 0)

        def body(loop: Any) -> Any:
            state, remaining, done, rows = loop
            state, row = step(state, number + done)
            _, _, is_last, *_ = row
            rows = jax.tree.map(lambda whole, part: whole.at[done].set(part), rows, row)
            return state, jnp.maximum(remaining - is_last, 0), done + 1, rows

        _, shapes = jax.eval_shape(step, state, number)
        rows = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype), shapes)
        return jax.lax.while_loop(go_on, body, (state, remaining, jnp.zeros((), jnp.int32), rows))

    return jax.jit(run)
