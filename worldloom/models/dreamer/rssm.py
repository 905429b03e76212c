"""The recurrent state-space model: block GRU, posterior and prior over categorical latents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from worldloom.models.dreamer.config import DreamerV3Config
from worldloom.nn.late import Kernels, Products, late_scan
from worldloom.nn.linear import MLP, BlockLinear, Dense, Linear, RMSNorm
from worldloom.ops.distributions import OneHot


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Latent:
    """State of the world model.

    Attributes:
      deter: deterministic part h, [..., D].
      stoch: stochastic part z as one-hot vectors, [..., S, C].
    """

    deter: jax.Array
    stoch: jax.Array

    @property
    def features(self) -> jax.Array:
        """What every head reads: deterministic then flat stochastic part, [..., D + S·C]."""
        return jnp.concatenate([self.deter, self.flat_stoch], -1)

    @property
    def flat_stoch(self) -> jax.Array:
        """The stochastic part with its classes side by side, [..., S·C]."""
        return self.stoch.reshape(*self.stoch.shape[:-2], -1)


class Mixing(NamedTuple):
    """The weights of :class:`BlockGRU` as its steps use them.

    Attributes:
      kernels: of the embeddings ``deter_in`` and ``stoch_in``; the hidden kernel's shares ``own`` chunk [g, D/g, D/g]
        and ``shared`` state embeddings [2H, D]; and ``gates``.
      action: the hidden kernel's share of the action embedding, [H, D].
      gate_bias: [3, D]; each block's 3·D/g outputs are its reset, candidate and update gates, in this order.
    """

    kernels: Kernels
    action: jax.Array
    gate_bias: jax.Array


class BlockGRU(nnx.Module):
    """``h' = u · c + (1 − u) · h`` from state and action, with block-diagonal recurrent weights (``_core``).

    The reference program hands each of the g blocks its own chunk of h beside a copy of the three input embeddings.
    The same numbers come from two products without the copies: block-diagonal with h, dense with the embeddings
    (:meth:`mixing` cuts the one kernel accordingly). The action's share needs no state, so it is computed for a
    whole sequence before the scan.
    """

    def __init__(self, config: DreamerV3Config, *, rngs: nnx.Rngs):
        deter, hidden, blocks = config.deter_dim, config.hidden_dim, config.blocks
        self.deter_in = Dense(deter, hidden, rngs=rngs)
        self.stoch_in = Dense(config.stoch_dim, hidden, rngs=rngs)
        self.action_in = Dense(config.action_width, hidden, rngs=rngs)
        self.hidden = BlockLinear(deter + blocks * 3 * hidden, deter, blocks, rngs=rngs)
        self.norm = RMSNorm(deter)
        self.gates = BlockLinear(deter, 3 * deter, blocks, rngs=rngs)

    def mixing(self, dtype: jnp.dtype) -> Mixing:
        """What all steps of a scan share, cut once."""
        kernel, bias = self.hidden.kernel.astype(dtype), self.gates.bias.astype(dtype)
        own = kernel.shape[2]
        shared = kernel[:, own:].transpose(1, 0, 2).reshape(kernel.shape[1] - own, -1)
        cut = 2 * (shared.shape[0] // 3)
        kernels = {
            "deter_in": self.deter_in.linear.kernel.astype(dtype),
            "stoch_in": self.stoch_in.linear.kernel.astype(dtype),
            "own": kernel[:, :own],
            "shared": shared[:cut],
            "gates": self.gates.kernel.astype(dtype),
        }
        return Mixing(kernels, shared[cut:], bias.reshape(-1, 3, own).swapaxes(0, 1).reshape(3, -1))

    def action_share(self, action: jax.Array, mixing: Mixing) -> jax.Array:
        """What the action [..., A] and the bias add to the hidden layer: [..., D].

        Entries beyond ±1 act like ±1; their gradient is divided by their size instead of cut.
        """
        bounded = action / jax.lax.stop_gradient(jnp.maximum(1, jnp.abs(action)))
        return self.action_in(bounded) @ mixing.action + self.hidden.bias.astype(action.dtype)

    def __call__(
        self, state: Latent, action_share: jax.Array, gate_bias: jax.Array, products: Callable[..., jax.Array]
    ) -> jax.Array:
        """Next deterministic state [..., D]; ``products`` with the kernels of :class:`Mixing`."""
        deter, stoch = products("deter_in", state.deter), products("stoch_in", state.flat_stoch)
        embedded = jnp.concatenate([self.deter_in.finish(deter), self.stoch_in.finish(stoch)], -1)
        hidden = products("own", state.deter) + products("shared", embedded) + action_share
        gates = products("gates", jax.nn.silu(self.norm(hidden)), 3)
        reset, candidate, update = (gates[i] + gate_bias[i] for i in range(3))
        candidate = jnp.tanh(jax.nn.sigmoid(reset) * candidate)
        update = jax.nn.sigmoid(update - 1)
        return update * candidate + (1 - update) * state.deter


class RSSM(nnx.Module):
    """Latent dynamics. Activations follow the dtype of the states and inputs.

    Args:
      config: sizes.
      token_dim: width of the encoder's output.
      rngs: source of the initial weights.
    """

    def __init__(self, config: DreamerV3Config, token_dim: int, *, rngs: nnx.Rngs):
        deter, hidden, stoch = config.deter_dim, config.hidden_dim, config.stoch_dim
        self.core = BlockGRU(config, rngs=rngs)
        self.posterior_hidden = Dense(deter + token_dim, hidden, rngs=rngs)
        self.posterior_logits = Linear(hidden, stoch, rngs=rngs)
        self.prior_hidden = MLP(deter, hidden, 2, rngs=rngs)
        self.prior_logits = Linear(hidden, stoch, rngs=rngs)
        self.latents = (config.num_latents, config.num_categories)
        self.unimix = config.unimix

    def observe(
        self,
        initial: Latent,
        tokens: jax.Array,
        actions: jax.Array,
        is_first: jax.Array,
        key: jax.Array | None,
        *,
        remat: bool = False,
    ) -> tuple[Latent, jax.Array]:
        """Posterior states along a sequence, one ``lax.scan``.

        Args:
          initial: state before the first row, [B, ...].
          tokens: encoded observations [B, T, E].
          actions: embedded *previous* actions [B, T, A]: row t holds what was done at t − 1.
          is_first: [B, T]; true rows start from zeros, as if nothing had been done before.
          key: for the draws, or None for modes.
          remat: keep only the states for the backward pass.

        Returns:
          States [B, T, ...] and posterior logits [B, T, S, C].
        """
        keep = 1 - is_first.astype(tokens.dtype)[..., None]
        mixing = self.core.mixing(tokens.dtype)
        kernel = self.posterior_hidden.linear.kernel.astype(tokens.dtype)
        from_deter, from_tokens = jnp.split(kernel, [initial.deter.shape[-1]])
        kernels = mixing.kernels | {
            "posterior": from_deter,
            "logits": self.posterior_logits.kernel.astype(tokens.dtype),
        }
        action_shares = self.core.action_share(actions * keep, mixing)
        token_shares = tokens @ from_tokens + self.posterior_hidden.linear.bias.astype(tokens.dtype)
        graph, weights = nnx.split(self)

        def step(weights: Any, products: Products, state: Latent, row: tuple, noise: jax.Array | None) -> tuple:
            rssm, gate_bias = nnx.merge(graph, weights[0]), weights[1]
            action_share, token_share, keep_t = row
            state = Latent(state.deter * keep_t, state.stoch * keep_t[..., None])
            deter = rssm.core(state, action_share, gate_bias, products)
            hidden = jax.nn.silu(rssm.posterior_hidden.norm(products("posterior", deter) + token_share))
            logits = products("logits", hidden) + rssm.posterior_logits.bias.astype(hidden.dtype)
            logits = rssm._to_latents(logits)
            state = Latent(deter, rssm._draw(logits, noise))
            return state, (state, logits)

        rows = jax.tree.map(_swap_time, (action_shares, token_shares, keep))
        shared, noise = (nnx.to_pure_dict(weights), mixing.gate_bias), self.noise(key, tokens.shape[1], len(tokens))
        if remat:
            # A scan keeps the recomputation apart by itself.
            one = lambda state, now: step(shared, Products(kernels), state, *now)  # noqa: E731
            _, out = jax.lax.scan(jax.checkpoint(one, prevent_cse=False), initial, (rows, noise))
        else:
            _, out = late_scan(step, shared, kernels, initial, rows, noise)
        states, logits = jax.tree.map(_swap_time, out)
        return states, logits

    def prior(self, deter: jax.Array) -> jax.Array:
        """Logits [..., S, C] of the stochastic part predicted from the deterministic part [..., D] alone."""
        return self._to_latents(self.prior_logits(self.prior_hidden(deter)))

    def noise(self, key: jax.Array | None, *shape: int) -> jax.Array | None:
        """What drawing the stochastic part takes: numbers from [0, 1), [*shape, S], or None for modes.

        For all steps of a scan at once: drawn one by one inside of it they cost more.
        """
        return None if key is None else jax.random.uniform(key, (*shape, self.latents[0]))

    def predict(
        self, state: Latent, action: jax.Array, noise: jax.Array | None, mixing: Mixing | None = None
    ) -> Latent:
        """One imagined step from [..., ] states and embedded actions [..., A].

        ``noise`` [..., S] is of :meth:`noise`; ``mixing`` spares cutting it again.
        """
        mixing = mixing or self.core.mixing(action.dtype)
        action_share = self.core.action_share(action, mixing)
        deter = self.core(state, action_share, mixing.gate_bias, Products(mixing.kernels))
        return Latent(deter, self._draw(self.prior(deter), noise))

    def _draw(self, logits: jax.Array, noise: jax.Array | None) -> jax.Array:
        return OneHot.from_logits(logits, self.unimix).pick(noise).astype(logits.dtype)

    def _to_latents(self, logits: jax.Array) -> jax.Array:
        return logits.reshape(*logits.shape[:-1], *self.latents)


def _swap_time(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 0, 1)
