"""NumPy's ``SeedSequence`` in traced code: seeds that a program on the host and one on the device agree on."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_MASK = 0xFFFFFFFF
_POOL = 4  # words
_INIT_A, _MULT_A = 0x43B0D7E5, 0x931E8875
_INIT_B, _MULT_B = 0x8B51F9DD, 0x58F38DED
_MIX_L, _MIX_R = 0xCA01F9DD, 0x4973F715


def entropy_words(entropy: int) -> np.ndarray:
    """An integer below 2^128 as ``SeedSequence`` reads it: uint32 [4], the lowest word first."""
    return np.array([entropy >> 32 * i & _MASK for i in range(_POOL)], np.uint32)


def spawned_state(entropy: Any, *spawn_key: Any, words: int = 1) -> jax.Array:
    """``SeedSequence(entropy, spawn_key=…).generate_state(words)``, uint32 [words, ...].

    NumPy guarantees this function not to change between versions. Its constants and mixing steps are those of M.
    O'Neill's ``seed_seq_fe``.

    Args:
      entropy: uint32 [4], from :func:`entropy_words`.
      *spawn_key: at least one; integers below 2^32, arrays of shapes that broadcast.
      words: at most four, more are not needed.
    """
    sources = [entropy[i] for i in range(_POOL)] + [jnp.asarray(key).astype(jnp.uint32) for key in spawn_key]
    constant = _INIT_A

    def hashed(value: jax.Array) -> jax.Array:
        nonlocal constant
        value = value ^ jnp.uint32(constant)
        constant = constant * _MULT_A & _MASK
        return _xorshift(value * jnp.uint32(constant))

    def mixed(x: jax.Array, y: jax.Array) -> jax.Array:
        return _xorshift(jnp.uint32(_MIX_L) * x - jnp.uint32(_MIX_R) * y)

    pool = [hashed(word) for word in sources[:_POOL]]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                pool[target] = mixed(pool[target], hashed(pool[source]))
    for word in sources[_POOL:]:
        pool = [mixed(each, hashed(word)) for each in pool]
    state, constant = [], _INIT_B
    for each in pool[:words]:
        state.append(_xorshift((each ^ jnp.uint32(constant)) * jnp.uint32(constant * _MULT_B & _MASK)))
        constant = constant * _MULT_B & _MASK
    return jnp.stack(state)


@jax.jit
def _philox_words(entropy: Any, *spawn_key: Any) -> jax.Array:
    return spawned_state(entropy, *spawn_key, words=_POOL)


def philox_keys(entropy: int, purpose: int, first: int, count: int) -> np.ndarray:
    """Keys of ``Philox(SeedSequence(entropy, spawn_key=(purpose, first + i)))`` for ``count`` i, uint64 [count, 2]."""
    # In blocks of 1024: they take less time than to compile a program for every count.
    numbers = np.arange(first, first + 1024 * -(-count // 1024)).astype(np.uint32)
    words = np.asarray(_philox_words(entropy_words(entropy), np.uint32(purpose), numbers))[:, :count]
    low, high = words[::2].astype(np.uint64), words[1::2].astype(np.uint64)
    return np.ascontiguousarray((low | high << np.uint64(32)).T)


def _xorshift(value: jax.Array) -> jax.Array:
    return value ^ value >> jnp.uint32(16)
