"""The recurrent state-space model: block GRU, posterior and prior over categorical latents.

Names in parentheses are those of danijar/dreamerv3, ``dreamerv3/rssm.py``.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from worldloom.models.dreamer.config import DreamerV3Config
from worldloom.models.states import LatentBase
from worldloom.nn.linear import MLP, BlockLinear, Dense, Linear, RMSNorm, block_matmul
from worldloom.ops.distributions import OneHot
from worldloom.sharding import scan_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Latent(LatentBase):
    """State of the world model.

    Attributes:
      deter: deterministic part h, [..., D].
      stoch: stochastic part z as one-hot vectors, [..., S, C].
    """

    deter: jax.Array
    stoch: jax.Array

    @property
    def features(self) -> jax.Array:
        """Input of every head: deterministic, then flat stochastic part, [..., D + S·C]."""
        return jnp.concatenate([self.deter, self.flat_stoch], -1)

    @property
    def flat_stoch(self) -> jax.Array:
        """The stochastic part with its classes side by side, [..., S·C]."""
        return self.stoch.reshape(*self.stoch.shape[:-2], -1)


class GRUKernels(NamedTuple):
    """The kernel of :attr:`BlockGRU.hidden` split by input, float32; see the comment in :class:`BlockGRU`.

    Attributes:
      recurrent: block-diagonal, for h: [g, D/g, D/g].
      input: dense, for the embeddings of h and z side by side: [2H, D].
      action: dense, for the embedding of the action: [H, D].
    """

    recurrent: jax.Array
    input: jax.Array
    action: jax.Array


class BlockGRU(nnx.Module):
    """The sequence model ``h' = f(h, z, a)``: a GRU with block-diagonal recurrent weights (``RSSM._core``).

    With ``e = [embed(h), embed(z), embed(a)]``, each embedding a Dense layer of H units, and h cut into g blocks h_k::

        x_k                = silu(norm(W_k [h_k, e] + b_k))        hidden layer (``dynhid0``), norm over all blocks
        [r_k, c_k, u_k]    = V_k x_k + d_k                         gates (``dyngru``)
        reset, update      = σ(r), σ(u − 1)
        candidate          = tanh(reset · c)
        h'                 = update · candidate + (1 − update) · h

    The −1 starts the update gate low, so that a new model keeps most of its state.
    """

    # Split kernel: every block multiplies its own part of h but the *same* embeddings e. The reference copies e into
    # each block and applies one block-diagonal kernel [g, D/g + 3H, D/g]. The same sums need no copies: W_k is split
    # by input rows into a block-diagonal part for h and, since all blocks share e, one dense matrix [3H, D] for e.
    # Of the latter, the rows of the action's embedding depend on no state: a sequence of known actions is multiplied
    # at once, before the scan. With the copies an update takes 1.21 times as long (size1m, two CPU cores). Weights
    # keep the reference's layout: `split_kernel` is the only place that knows both.

    def __init__(self, config: DreamerV3Config, *, rngs: nnx.Rngs):
        deter, hidden, blocks = config.deter_dim, config.hidden_dim, config.blocks
        self.deter_in = Dense(deter, hidden, rngs=rngs)
        self.stoch_in = Dense(config.stoch_dim, hidden, rngs=rngs)
        self.action_in = Dense(config.action_width, hidden, rngs=rngs)
        self.hidden = BlockLinear(deter + blocks * 3 * hidden, deter, blocks, rngs=rngs)
        self.norm = RMSNorm(deter)
        self.gates = BlockLinear(deter, 3 * deter, blocks, rngs=rngs)

    def __call__(self, state: Latent, action: jax.Array, kernels: GRUKernels | None = None) -> jax.Array:
        """Next deterministic state [..., D] from states [...] and embedded actions [..., A].

        A scan passes ``kernels``, made once by :meth:`split_kernel`, so that its steps do not split again.
        """
        kernels = kernels or self.split_kernel()
        return self.step(state, self.action_term(action, kernels), kernels)

    def split_kernel(self) -> GRUKernels:
        """The hidden layer's kernel [g, D/g + 3H, D/g] in the three parts that :meth:`step` multiplies with."""
        kernel = self.hidden.kernel[...]
        width = kernel.shape[2]
        # [g, 3H, D/g] → [3H, D]: the blocks' outputs side by side.
        dense = kernel[:, width:].transpose(1, 0, 2).reshape(kernel.shape[1] - width, -1)
        end_of_state = 2 * (len(dense) // 3)
        return GRUKernels(kernel[:, :width], dense[:end_of_state], dense[end_of_state:])

    def action_term(self, action: jax.Array, kernels: GRUKernels) -> jax.Array:
        """What the action [..., A] and the bias contribute to the hidden layer: [..., D].

        Entries beyond ±1 act like ±1; their gradient is divided by their size instead of cut (as in ``_core``).
        """
        bounded = action / jax.lax.stop_gradient(jnp.maximum(1, jnp.abs(action)))
        return self.action_in(bounded) @ kernels.action.astype(action.dtype) + self.hidden.bias.astype(action.dtype)

    def step(self, state: Latent, action_term: jax.Array, kernels: GRUKernels) -> jax.Array:
        """Next deterministic state [..., D] from states [...] and :meth:`action_term` [..., D]."""
        # Kernels are cast here, inside of scans, so that a scan sums up their gradients in float32.
        recurrent, dense = (kernel.astype(state.deter.dtype) for kernel in (kernels.recurrent, kernels.input))
        embedded = jnp.concatenate([self.deter_in(state.deter), self.stoch_in(state.flat_stoch)], -1)
        hidden = block_matmul(state.deter, recurrent) + embedded @ dense + action_term
        reset, candidate, update = self.gates.split(jax.nn.silu(self.norm(hidden)), 3)
        candidate = jnp.tanh(jax.nn.sigmoid(reset) * candidate)
        update = jax.nn.sigmoid(update - 1)
        return update * candidate + (1 - update) * state.deter


class RSSM(nnx.Module):
    """Latent dynamics (``RSSM``). Activations follow the dtype of the states and inputs.

    Args:
      config: sizes.
      token_dim: width E of the encoder's output.
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
        """Posterior states along a sequence, one ``lax.scan`` (``observe``).

        Args:
          initial: state before the first row, [B, ...].
          tokens: encoded observations [B, T, E].
          actions: embedded *previous* actions [B, T, A]: row t holds the action chosen at t − 1.
          is_first: [B, T], bool or 0 and 1; where true, state and previous action are zeroed first.
          key: for sampling the latents (consumed), or None for modes.
          remat: keep only the states for the backward pass and recompute the steps there.

        Returns:
          States [B, T, ...] and posterior logits [B, T, S, C].
        """
        keep = 1 - is_first.astype(tokens.dtype)[..., None]
        # Before the scan, for all rows at once: everything that depends on no state. The posterior's kernel is split
        # by input, h and token, like the GRU's.
        kernels = self.core.split_kernel()
        kernel, bias = self.posterior_hidden.linear.kernel[...], self.posterior_hidden.linear.bias[...]
        deter_kernel, token_kernel = jnp.split(kernel, [initial.deter.shape[-1]])
        action_terms = self.core.action_term(actions * keep, kernels)
        token_terms = tokens @ token_kernel.astype(tokens.dtype) + bias.astype(tokens.dtype)
        uniforms = self.sampling_uniforms(key, tokens.shape[1], tokens.shape[0])

        graph, weights = nnx.split(self)

        def step(weights: tuple, state: Latent, inputs: tuple) -> tuple[Latent, tuple[Latent, jax.Array]]:
            rssm, kernels, deter_kernel = nnx.merge(graph, weights[0]), *weights[1:]
            (action_term, token_term, keep_t), uniform = inputs
            state = Latent(state.deter * keep_t, state.stoch * keep_t[..., None])
            deter = rssm.core.step(state, action_term, kernels)
            hidden = deter @ deter_kernel.astype(deter.dtype) + token_term
            logits = rssm._to_latents(rssm.posterior_logits(jax.nn.silu(rssm.posterior_hidden.norm(hidden))))
            state = Latent(deter, rssm._sample(logits, uniform))
            return state, (state, logits)

        if remat:
            # A scan's backward pass is a loop of its own, which already keeps XLA from merging the recomputation away.
            step = jax.checkpoint(step, prevent_cse=False)
        rows = jax.tree.map(_swap_time, (action_terms, token_terms, keep))
        _, out = scan_rows(step, (weights, kernels, deter_kernel), initial, (rows, uniforms))
        states, logits = jax.tree.map(_swap_time, out)
        return states, logits

    def prior(self, deter: jax.Array) -> jax.Array:
        """Logits [..., S, C] of the stochastic part predicted from the deterministic part [..., D] (``_prior``)."""
        return self._to_latents(self.prior_logits(self.prior_hidden(deter)))

    def predict(
        self, state: Latent, action: jax.Array, uniforms: jax.Array | None, kernels: GRUKernels | None = None
    ) -> Latent:
        """One imagined step from states [...] and embedded actions [..., A] (``imagine``).

        Args:
          state: where to start, [...].
          action: embedded, [..., A].
          uniforms: of :meth:`sampling_uniforms`, [..., S]; None takes the modes.
          kernels: in a scan, the core's ``split_kernel()``, made once.
        """
        deter = self.core(state, action, kernels)
        return Latent(deter, self._sample(self.prior(deter), uniforms))

    def sampling_uniforms(self, key: jax.Array | None, *shape: int) -> jax.Array | None:
        """Uniforms from [0, 1) for sampling the latents, [*shape, S]; None (modes) without a key.

        A scan's uniforms are drawn for all steps at once, which is faster than inside, step by step.
        """
        return None if key is None else jax.random.uniform(key, (*shape, self.latents[0]))

    def _sample(self, logits: jax.Array, uniforms: jax.Array | None) -> jax.Array:
        return OneHot.from_logits(logits, self.unimix).sample_straight_through(uniforms).astype(logits.dtype)

    def _to_latents(self, logits: jax.Array) -> jax.Array:
        return logits.reshape(*logits.shape[:-1], *self.latents)


def _swap_time(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 0, 1)
