"""Networks of TD-MPC2: task embedding, policy priors, the value scale, the planner's fused networks.

The encoders are in ``encoders``. Inputs are concatenated as in the reference (``common/world_model.py``):
[observation | task] for the encoder, [latent | task] for the policy and the termination head, [latent | task | action]
for dynamics, reward and Q networks.

Discrete actions are not in the reference. Here the policy prior is a categorical over one-hot actions, and values are
exact expectations over them, as in the discrete soft actor-critic (Christodoulou 2019), instead of reparameterised
samples. It is fitted to the Boltzmann policy of the Q networks by cross entropy, like the M-step of MPO (Abdolmaleki
et al. 2018): see ``CategoricalSample.objective``. How discrete actions are planned is described in ``planner``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from worldloom.models.base import Statistic
from worldloom.models.tdmpc2.config import TDMPC2Config
from worldloom.nn.normed import NormedMLP

# log(2π) / 2, with as many digits as the reference's `math.gaussian_logprob`.
_HALF_LOG_2PI = 0.9189385175704956
_MASKED = -1e9
"""Logit of actions that a task does not have."""


class TaskEmbedding(nnx.Module):
    """One learned vector per task, of norm at most 1 (reference: ``nn.Embedding`` with ``max_norm=1``)."""

    def __init__(self, config: TDMPC2Config, rngs: nnx.Rngs):
        shape = (config.num_tasks, config.task_dim)
        self.table = nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -0.02, 0.02))

    def __call__(self, task: jax.Array) -> jax.Array:
        """Integers [...] → [..., E]; NaN for a task that there is not, in place of the last one's."""
        rows = self.table[...].at[task].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return rows * jax.lax.stop_gradient(_unit_ball_factor(rows))


def project_rows(table: jax.Array, task: jax.Array) -> jax.Array:
    """Project the rows that ``task`` (integers [...]) names onto the unit ball: [num_tasks, E] → [num_tasks, E].

    PyTorch's ``max_norm`` rescales rows in place at every lookup, so that the optimizer steps from the rescaled rows.
    """
    used = jnp.zeros(table.shape[0], bool).at[task].set(True)
    return jnp.where(used[:, None], table * _unit_ball_factor(table), table)


def _unit_ball_factor(rows: jax.Array) -> jax.Array:
    """[..., E] → factors [..., 1] that bring rows longer than 1 to norm 1; 1 for others. The 1e-7 is PyTorch's."""
    norm = jnp.sqrt(jnp.sum(jnp.square(jax.lax.stop_gradient(rows)), axis=-1, keepdims=True))
    return jnp.where(norm > 1.0, 1.0 / (norm + 1e-7), 1.0)


class ValueScale(nnx.Module):
    """Running scale [] of the values that the policy maximises (reference: ``common/scale.py``, ``RunningScale``).

    An average of widths between the 5th and 95th percentile of a batch's values, each at least 1; see
    :func:`worldloom.models.tdmpc2.losses.update_scale`.
    """

    def __init__(self) -> None:
        self.value = Statistic(jnp.ones((), jnp.float32))


class GaussianSample(NamedTuple):
    """A sample of the continuous prior.

    Attributes:
      action: [..., A] in (−1, 1).
      mean: [..., A] the mode, tanh of the Gaussian's mean.
      log_std: [..., A] of the Gaussian before tanh.
      entropy: [...] minus the log density of ``action``.
      scaled_entropy: [...] used by the policy loss: minus the Gaussian's log density times the number of dimensions.
    """

    action: jax.Array
    mean: jax.Array
    log_std: jax.Array
    entropy: jax.Array
    scaled_entropy: jax.Array

    def evaluate(self, value: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Input of ``average``: the value of the one sample, [...], with a gradient to the policy."""
        return value(self.action)

    def average(self, values: jax.Array) -> jax.Array:
        """E[value(action)] from ``evaluate``'s values: [...] → [...]."""
        return values

    def expect(self, value: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Estimate of E[value(action)]: reparameterised, one sample."""
        return self.average(self.evaluate(value))

    def objective(self, values: jax.Array, beta: float) -> jax.Array:
        """The policy's objective [...]: value plus β times scaled entropy (reference: ``update_pi``)."""
        return values + beta * self.scaled_entropy


class GaussianPolicy(nnx.Module):
    """Policy prior of continuous actions: tanh of a diagonal Gaussian (reference: ``WorldModel.pi``)."""

    def __init__(self, config: TDMPC2Config, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.log_std_range = (config.log_std_min, config.log_std_max)
        self.mlp = _policy_mlp(config, 2 * config.action_dim, dtype, rngs)

    def __call__(
        self, x: jax.Array, mask: jax.Array, key: jax.Array | None = None, noise: jax.Array | None = None
    ) -> GaussianSample:
        """Sample one action per latent.

        Args:
          x: [..., L + E] latent and task embedding.
          mask: [..., A], 1 for dimensions that the task has, 0 for others.
          key: key of the noise; None is noise 0, the mode.
          noise: [..., A] standard normal, in place of a key.

        ``scaled_entropy`` follows the reference since October 2024, whose code multiplies the entropy by the ratio
        size · Gaussian log density / log density: that is −size · Gaussian log density, without the tanh term.
        """
        mean, raw = jnp.split(self.mlp(x), 2, axis=-1)
        low, high = self.log_std_range
        log_std = (low + 0.5 * (high - low) * (jnp.tanh(raw) + 1.0)) * mask
        if noise is None:
            noise = jnp.zeros_like(mean) if key is None else jax.random.normal(key, mean.shape, mean.dtype)
        mean, noise = mean * mask, noise * mask
        action = jnp.tanh(mean + noise * jnp.exp(log_std))
        gaussian = jnp.sum(-0.5 * jnp.square(noise) - log_std - _HALF_LOG_2PI, axis=-1)
        squash = jnp.sum(jnp.log(nnx.relu(1.0 - jnp.square(action)) + 1e-6), axis=-1)
        size = jnp.sum(mask, axis=-1)
        return GaussianSample(action, jnp.tanh(mean), log_std, squash - gaussian, -size * gaussian)


class CategoricalSample(NamedTuple):
    """A sample of the discrete prior.

    Attributes:
      action: [..., A] one-hot.
      mean: [..., A] one-hot of the most probable action.
      log_probs: [..., A].
    """

    action: jax.Array
    mean: jax.Array
    log_probs: jax.Array

    @property
    def probs(self) -> jax.Array:
        """[..., A]."""
        return jnp.exp(self.log_probs)

    @property
    def entropy(self) -> jax.Array:
        """[...] in nats, the exact sum."""
        return -jnp.sum(self.probs * self.log_probs, axis=-1)

    @property
    def valid(self) -> jax.Array:
        """bool [..., A], True for actions that the task has."""
        return self.log_probs > 0.5 * _MASKED

    @property
    def scaled_entropy(self) -> jax.Array:
        """The entropy; one categorical counts as one dimension."""
        return self.entropy

    def evaluate(self, value: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The value of every action, [..., A]."""
        every_action = jnp.eye(self.log_probs.shape[-1], dtype=self.log_probs.dtype)
        values = jax.vmap(lambda action: value(jnp.broadcast_to(action, self.log_probs.shape)))(every_action)
        return jnp.moveaxis(values, 0, -1)

    def average(self, values: jax.Array) -> jax.Array:
        """E[value(action)] from ``evaluate``'s values, the exact sum: [..., A] → [...]."""
        return jnp.sum(self.probs * values, axis=-1)

    def expect(self, value: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """E[value(action)], exact."""
        return self.average(self.evaluate(value))

    def regret(self, value: Callable[[jax.Array], jax.Array], action: jax.Array) -> jax.Array:
        """Value of the best action minus that of ``action`` [..., A]: [...], at least 0 for valid actions."""
        values = self.evaluate(value)
        return jnp.max(values, axis=-1, where=self.valid, initial=-jnp.inf) - jnp.sum(values * action, axis=-1)

    def objective(self, values: jax.Array, beta: float) -> jax.Array:
        """The policy's objective [...]: Σ_a π*_a · log π_a, where π* is optimal under ``values`` [..., A].

        π* ∝ exp(value / β) maximises value plus β times entropy. Gradient ascent on that sum itself moves logits by
        π · advantage, which vanishes once the policy is certain, even if it is wrong. This negative cross entropy has
        the same maximiser, and its gradient on the logits is π* − π.
        """
        scores = jnp.where(self.valid, jax.lax.stop_gradient(values) / jnp.maximum(beta, 1e-8), -jnp.inf)
        optimal = jax.nn.softmax(scores, axis=-1)
        return jnp.sum(optimal * self.log_probs, axis=-1)


class CategoricalPolicy(nnx.Module):
    """Policy prior of discrete actions."""

    def __init__(self, config: TDMPC2Config, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.mlp = _policy_mlp(config, config.action_dim, dtype, rngs)

    def __call__(
        self, x: jax.Array, mask: jax.Array, key: jax.Array | None = None, noise: jax.Array | None = None
    ) -> CategoricalSample:
        """Sample one action per latent, as :class:`GaussianPolicy` does; ``noise`` [..., A] is standard Gumbel."""
        log_probs = jax.nn.log_softmax(jnp.where(mask > 0, self.mlp(x), _MASKED), axis=-1)
        if noise is None:
            noise = jnp.zeros_like(log_probs) if key is None else jax.random.gumbel(key, log_probs.shape)
        one_hot = lambda scores: jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1])  # noqa: E731
        return CategoricalSample(one_hot(log_probs + noise), one_hot(log_probs), log_probs)


def _policy_mlp(config: TDMPC2Config, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> NormedMLP:
    inputs = config.latent_dim + config.embedding_dim
    return NormedMLP(inputs, [config.hidden_dim] * config.mlp_layers, outputs, dtype=dtype, rngs=rngs)


class FusedDynamicsReward:
    """Dynamics and reward of the same latent and action in the planner, their first layers fused into one product.

    Both networks read [latent | task | action]. The product of the first layers is split by input: a latent that all
    candidates share is then multiplied once, and its term broadcasts against the candidates' actions.

    Args:
      dynamics: [latent | task | action] → next latent.
      reward: [latent | task | action] → reward logits, with hidden layers of the same width.
      embedding: [E] task embedding, common to all candidates.
      latent_dim: L.
    """

    def __init__(self, dynamics: NormedMLP, reward: NormedMLP, embedding: jax.Array, latent_dim: int):
        self.dynamics, self.reward = dynamics, reward
        first = [dynamics.hidden[0].affine, reward.hidden[0].affine]
        self.dtype = first[0].dtype
        kernel = jnp.concatenate([layer.kernel[...] for layer in first], axis=1).astype(self.dtype)
        bias = jnp.concatenate([jnp.asarray(layer.bias) for layer in first])
        latent_kernel, task_kernel, action_kernel = jnp.split(kernel, [latent_dim, latent_dim + embedding.shape[-1]])
        self.latent_kernel, self.action_kernel = latent_kernel, action_kernel
        self.constant = bias + (embedding.astype(self.dtype) @ task_kernel).astype(jnp.float32)

    def __call__(self, z: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        """z [N, L], or [L] if shared, and action [N, A] → next latent [N, L] and reward logits [N, K]."""
        first = (z.astype(self.dtype) @ self.latent_kernel).astype(jnp.float32) + self.constant
        first = first + (action.astype(self.dtype) @ self.action_kernel).astype(jnp.float32)
        dynamics_first, reward_first = jnp.split(first, 2, axis=-1)
        return self.dynamics.after_first_affine(dynamics_first), self.reward.after_first_affine(reward_first)
