"""A linear system with quadratic costs, which planners are compared with: x' = A·x + B·u at the cost x·Q·x + u·R·u."""

import functools

import jax.numpy as jnp
import numpy as np

A = np.array([[1.0, 0.1], [0.0, 1.0]])
B = np.array([[0.0], [0.1]])
Q, R = np.diag([100.0, 10.0]), np.array([[10.0]])  # costs of a few tens: what the planners' temperature is made for
GAMMA = 0.99


@functools.cache
def riccati():
    """Cost-to-go matrix P and feedback matrix K of the discounted problem: the optimal action is −K·x."""
    P = Q
    for _ in range(5_000):
        K = GAMMA * np.linalg.solve(R + GAMMA * B.T @ P @ B, B.T @ P @ A)
        P = Q + GAMMA * A.T @ P @ A - GAMMA * A.T @ P @ B @ K
    return P, K


def quadratic(x, matrix):
    """x·M·x of vectors [..., N] in float32."""
    return jnp.einsum("...i,ij,...j->...", x, jnp.asarray(matrix, jnp.float32), x)


def transition(x, action):
    """The next vector [..., 2] and the reward [...] of an action [..., 1] at ``x`` [..., 2]."""
    after = x @ jnp.asarray(A.T, jnp.float32) + action @ jnp.asarray(B.T, jnp.float32)
    return after, -quadratic(x, Q) - quadratic(action, R)
