"""A world of pictures: catch a falling ball."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from worldloom.config import as_integer, check


class CatchState(NamedTuple):
    """Column and row of the ball, and column of the paddle, int32 []."""

    column: jax.Array
    row: jax.Array
    paddle: jax.Array


class Catch:
    """``Catch-v0``: a ball falls through a grid; a paddle in the lowest row moves left, stays, or moves right.

    The episode ends when the ball arrives in the lowest row, with reward 1 if the paddle is there, else −1. Pictures
    are uint8 [size, size, 3] with a white ball and a green paddle.

    Args:
      size: side of the pictures in pixels, a multiple of ``cells``.
      cells: side of the grid, at least 3.

    Raises ``ConfigError`` for other numbers.
    """

    action_dim, action_type = 3, "discrete"
    _BALL: ClassVar = (255, 255, 255)
    _PADDLE: ClassVar = (60, 200, 60)

    def __init__(self, size: int = 64, cells: int = 8):
        self.size, self.cells = as_integer("size", size), as_integer("cells", cells)
        check(self.cells >= 3, f"cells must be at least 3, not {cells}.")
        check(self.size % self.cells == 0, f"size={size} must be a multiple of cells={cells}.")
        self.time_limit = self.cells - 1  # where the ball arrives
        self.obs_shape = (self.size, self.size, 3)

    def reset(self, key: jax.Array) -> tuple[CatchState, jax.Array]:
        """The ball in a random column of the highest row, the paddle in the middle."""
        column = jax.random.randint(key, (), 0, self.cells, jnp.int32)
        state = CatchState(column, jnp.zeros((), jnp.int32), jnp.full((), self.cells // 2, jnp.int32))
        return state, self.observe(state)

    def step(self, key: jax.Array, state: CatchState, action: jax.Array) -> tuple[Any, ...]:
        """Move the paddle by ``action`` − 1, and the ball one row down."""
        paddle = jnp.clip(state.paddle + jnp.asarray(action, jnp.int32) - 1, 0, self.cells - 1)
        state = CatchState(state.column, state.row + 1, paddle)
        over = state.row >= self.cells - 1
        caught = over & (state.column == state.paddle)
        reward = jnp.where(over, jnp.where(caught, 1.0, -1.0), 0.0)
        info = {"success": caught.astype(jnp.float32)}
        return state, self.observe(state), reward, over, jnp.asarray(False), info

    def observe(self, state: CatchState) -> jax.Array:
        """The picture, uint8 [size, size, 3]."""
        cell = jnp.arange(self.size) // (self.size // self.cells)
        at = lambda row, column: (cell[:, None] == row) & (cell[None] == column)  # noqa: E731
        ball, paddle = at(state.row, state.column), at(self.cells - 1, state.paddle)
        white, green = (jnp.asarray(color, jnp.uint8) for color in (self._BALL, self._PADDLE))
        return jnp.where(ball[..., None], white, jnp.where(paddle[..., None], green, jnp.uint8(0)))
