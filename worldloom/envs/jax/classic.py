"""The classic control tasks from their equations, as Gymnasium has them; constants and names are those of its tasks.

States and observations are float32 where Gymnasium's are float64, so that a step differs by less than 1e-5. For
Acrobot that holds while the lower link turns by less than 8 rad/s: near the limit of 28, its integrator turns rounding
into 1e-3.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

Step = tuple[Any, jax.Array, jax.Array, jax.Array, jax.Array, dict[str, jax.Array]]
_NEVER = False


class PendulumState(NamedTuple):
    """``angle`` from upright in [−π, π] and ``velocity``, float32 []."""

    angle: jax.Array
    velocity: jax.Array


class Pendulum:
    """``Pendulum-v1``: swing a pendulum up and hold it, with a torque of up to ±2."""

    obs_shape: ClassVar = (3,)
    action_dim, action_type, time_limit = 1, "continuous", 200
    gravity, mass, length, dt, max_speed, max_torque = 10.0, 1.0, 1.0, 0.05, 8.0, 2.0

    def reset(self, key: jax.Array) -> tuple[PendulumState, jax.Array]:
        """A random angle, and a velocity in [−1, 1]."""
        angle, velocity = jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0)
        state = PendulumState(jnp.pi * angle, velocity)
        return state, self.observe(state)

    def step(self, key: jax.Array, state: PendulumState, action: jax.Array) -> Step:
        """One step of ``dt``, semi-implicit Euler; the cost is that of the state before it."""
        torque = self.max_torque * jnp.clip(action[0], -1.0, 1.0)
        cost = state.angle**2 + 0.1 * state.velocity**2 + 0.001 * torque**2
        gravity = 3 * self.gravity / (2 * self.length) * jnp.sin(state.angle)
        acceleration = gravity + 3.0 / (self.mass * self.length**2) * torque
        velocity = jnp.clip(state.velocity + acceleration * self.dt, -self.max_speed, self.max_speed)
        state = PendulumState(_wrap(state.angle + velocity * self.dt), velocity)
        return state, self.observe(state), -cost, jnp.asarray(_NEVER), jnp.asarray(_NEVER), {}

    def observe(self, state: PendulumState) -> jax.Array:
        """Cosine and sine of the angle, velocity."""
        return jnp.stack([jnp.cos(state.angle), jnp.sin(state.angle), state.velocity])


class CartPole:
    """``CartPole-v1``: balance a pole on a cart that is pushed left or right; 1 per step until it falls."""

    obs_shape: ClassVar = (4,)
    action_dim, action_type, time_limit = 2, "discrete", 500
    gravity, cart_mass, pole_mass, half_length, force, dt = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
    max_position, max_angle = 2.4, 12 * jnp.pi / 180

    def reset(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Position, velocity, angle and angular velocity within ±0.05, which is also the observation."""
        state = jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)
        return state, state

    def step(self, key: jax.Array, state: jax.Array, action: jax.Array) -> Step:
        """One step of ``dt``, explicit Euler."""
        _, velocity, angle, spin = state
        force = jnp.where(action == 1, self.force, -self.force)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        total, moment = self.cart_mass + self.pole_mass, self.pole_mass * self.half_length
        push = (force + moment * spin**2 * sin) / total
        inertia = self.half_length * (4.0 / 3.0 - self.pole_mass * cos**2 / total)
        spin_rate = (self.gravity * sin - cos * push) / inertia
        acceleration = push - moment * spin_rate * cos / total
        rates = jnp.stack([velocity, acceleration, spin, spin_rate])
        state = state + self.dt * rates
        fallen = (jnp.abs(state[0]) > self.max_position) | (jnp.abs(state[2]) > self.max_angle)
        return state, state, jnp.ones(()), fallen, jnp.asarray(_NEVER), {}


class Acrobot:
    """``Acrobot-v1``: swing the lower of two links above a bar, by a torque on the joint between them; −1 per step."""

    obs_shape: ClassVar = (6,)
    action_dim, action_type, time_limit = 3, "discrete", 500
    gravity, mass, length, center, inertia, dt = 9.8, 1.0, 1.0, 0.5, 1.0, 0.2
    max_speed: ClassVar = (4 * jnp.pi, 9 * jnp.pi)

    def reset(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Two angles and two velocities within ±0.1: both links hang down."""
        state = jax.random.uniform(key, (4,), minval=-0.1, maxval=0.1)
        return state, self.observe(state)

    def step(self, key: jax.Array, state: jax.Array, action: jax.Array) -> Step:
        """One step of ``dt``, fourth-order Runge-Kutta, with a torque of −1, 0 or 1."""
        torque = jnp.asarray(action, jnp.float32) - 1.0
        k1 = self._rates(state, torque)
        k2 = self._rates(state + self.dt / 2 * k1, torque)
        k3 = self._rates(state + self.dt / 2 * k2, torque)
        k4 = self._rates(state + self.dt * k3, torque)
        moved = state + self.dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        limits = jnp.asarray(self.max_speed)
        state = jnp.concatenate([_wrap(moved[:2]), jnp.clip(moved[2:], -limits, limits)])
        above = -jnp.cos(state[0]) - jnp.cos(state[1] + state[0]) > 1.0
        return state, self.observe(state), jnp.where(above, 0.0, -1.0), above, jnp.asarray(_NEVER), {}

    def observe(self, state: jax.Array) -> jax.Array:
        """Cosine and sine of both angles, and both velocities."""
        first, second = state[0], state[1]
        return jnp.stack([jnp.cos(first), jnp.sin(first), jnp.cos(second), jnp.sin(second), state[2], state[3]])

    def _rates(self, state: jax.Array, torque: jax.Array) -> jax.Array:
        """Time derivatives of the state, as in Sutton and Barto's book."""
        first, second, spin1, spin2 = state
        m, l, c, i, g = self.mass, self.length, self.center, self.inertia, self.gravity  # noqa: E741
        d1 = m * c**2 + m * (l**2 + c**2 + 2 * l * c * jnp.cos(second)) + 2 * i
        d2 = m * (c**2 + l * c * jnp.cos(second)) + i
        phi2 = m * c * g * jnp.cos(first + second - jnp.pi / 2)
        phi1 = (
            -m * l * c * spin2**2 * jnp.sin(second)
            - 2 * m * l * c * spin2 * spin1 * jnp.sin(second)
            + (m * c + m * l) * g * jnp.cos(first - jnp.pi / 2)
            + phi2
        )
        rate2 = (torque + d2 / d1 * phi1 - m * l * c * spin1**2 * jnp.sin(second) - phi2) / (m * c**2 + i - d2**2 / d1)
        rate1 = -(d2 * rate2 + phi1) / d1
        return jnp.stack([spin1, spin2, rate1, rate2])


class MountainCarContinuous:
    """``MountainCarContinuous-v0``: rock a weak car out of a valley; 100 at the top, minus the energy spent."""

    obs_shape: ClassVar = (2,)
    action_dim, action_type, time_limit = 1, "continuous", 999
    power, gravity, max_speed, left, right, goal = 0.0015, 0.0025, 0.07, -1.2, 0.6, 0.45

    def reset(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """At rest between −0.6 and −0.4; the state, position and velocity, is also the observation."""
        state = jnp.stack([jax.random.uniform(key, (), minval=-0.6, maxval=-0.4), jnp.zeros(())])
        return state, state

    def step(self, key: jax.Array, state: jax.Array, action: jax.Array) -> Step:
        """One step; the wall on the left stops the car."""
        force = jnp.clip(action[0], -1.0, 1.0)
        velocity = state[1] + force * self.power - self.gravity * jnp.cos(3 * state[0])
        velocity = jnp.clip(velocity, -self.max_speed, self.max_speed)
        position = jnp.clip(state[0] + velocity, self.left, self.right)
        velocity = jnp.where((position == self.left) & (velocity < 0), 0.0, velocity)
        there = (position >= self.goal) & (velocity >= 0)
        reward = jnp.where(there, 100.0, 0.0) - 0.1 * action[0] ** 2
        state = jnp.stack([position, velocity])
        return state, state, reward, there, jnp.asarray(_NEVER), {}


def _wrap(angle: jax.Array) -> jax.Array:
    """``angle`` in [−π, π]."""
    return jnp.mod(angle + jnp.pi, 2 * jnp.pi) - jnp.pi
