"""The loss of DreamerV3: world model, imagination, actor and critic, replayed returns, in the paper's order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from worldloom.models.base import merge
from worldloom.models.dreamer.batch import align
from worldloom.models.dreamer.config import DreamerV3Config
from worldloom.models.dreamer.networks import unit_range
from worldloom.models.dreamer.rssm import Latent
from worldloom.models.dreamer.spaces import embed_actions, strip_single
from worldloom.ops.distributions import (
    Categorical,
    Normal,
    OneHot,
    binary_cross_entropy,
    draw,
    symlog_squared_error,
)
from worldloom.ops.keys import split_key, step_keys
from worldloom.ops.returns import lambda_return
from worldloom.ops.symexp_twohot import symexp_twohot_loss, symexp_twohot_mean

if TYPE_CHECKING:
    from worldloom.models.dreamer.model import DreamerV3WorldModel

LOSS_TERMS = (
    "loss",
    "reconstruction",
    "reward",
    "continue",
    "dynamics",
    "representation",
    "actor",
    "critic",
    "replay_critic",
)
sg = jax.lax.stop_gradient
Policy = Mapping[str, Normal | Categorical]


class LossAux(NamedTuple):
    """What the loss knows besides its terms.

    Attributes:
      elements: each term before its mean: [B, T], ``actor`` and ``critic`` [H, B·K], ``replay_critic`` [B, K − 1].
      latents: posterior states [B, T, ...] of the rows that counted.
      posterior: logits of those states, [B, T, S, C].
      returns: imagined λ-returns, [H, B·K].
      return_range: the moved percentiles ``{"lo": [], "hi": []}``.
      metrics: further scalars worth a look.
    """

    elements: dict[str, jax.Array]
    latents: Latent
    posterior: jax.Array
    returns: jax.Array
    return_range: dict[str, jax.Array]
    metrics: dict[str, jax.Array]


def loss(
    model: DreamerV3WorldModel,
    batch: Mapping[str, Any],
    key: jax.Array | None,
    *,
    scale: jax.Array | None = None,
    remat: bool = False,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], LossAux]]:
    """Total loss of a batch [B, T, ...], its terms (plain means before their scales) and :class:`LossAux`.

    One backward pass trains all parts; who learns from what is decided by the stop-gradients here. The batch is
    described at :func:`worldloom.models.dreamer.batch.align`; ``key=None`` takes the mode of every draw.

    Args:
      model, batch, key: see above.
      scale: of the advantages, [], if it is not to follow from this batch's returns.
      remat: keep no activations of networks for the backward pass; compute them again there.
    """
    forget = jax.checkpoint if remat else lambda network: network
    config, rows = model.config, align(model.config, batch, model.dtype)
    batch_size, length = rows.rewards.shape
    observe_key, imagine_key = split_key(key)
    losses: dict[str, jax.Array] = {}

    # World model: states inferred from the rows, and what each state explains.
    tokens = forget(model.encoder)(rows.obs)
    initial = rows.initial or model.initial_state(batch_size)
    latents, logits = model.rssm.observe(
        initial, tokens, rows.previous_actions, rows.is_first, observe_key, remat=remat
    )
    posterior = OneHot.from_logits(logits, config.unimix)
    prior = OneHot.from_logits(model.rssm.prior(latents.deter), config.unimix)
    features = latents.features
    discount = 1 - 1 / config.return_horizon
    losses["reconstruction"] = reconstruction_loss(forget(model.decoder)(latents), rows.obs)
    losses["reward"] = symexp_twohot_loss(forget(model.reward)(features), rows.rewards)
    goes_on = forget(model.continuation)(features)[..., 0]
    losses["continue"] = binary_cross_entropy(goes_on, discount * (1 - rows.is_terminal))
    losses["dynamics"] = jnp.maximum(sg(posterior).kl(prior), config.kl_free)
    losses["representation"] = jnp.maximum(posterior.kl(sg(prior)), config.kl_free)

    # Imagination: the policy acts in the world model from the last K states; neither learns through the rollout.
    frozen = merge(type(model), config, sg(model.params), model.dtype)
    starting = min(config.imagination_starts or length, length)
    starts = jax.tree.map(lambda x: sg(x[:, -starting:]).reshape(-1, *x.shape[2:]), latents)
    dream_features, actions, products = imagine(frozen, starts, config.imagination_horizon, imagine_key)

    # Actor and critic learn from the imagined returns. Heads see all H + 1 states and results are cut: cutting the
    # features would copy the largest array there is. The actor has seen them; only its gradient is to come.
    policy = forget(model.actor.finish)(model.actor.product(dream_features, known=products))
    critic_logits = forget(model.critic)(dream_features)
    rewards = frozen.predict_reward(dream_features)[1:]
    continues = frozen.predict_continue(dream_features)
    values = symexp_twohot_mean(sg(critic_logits))
    returns = lambda_return(rewards, continues[1:], values[1:], config.return_lambda)
    return_range, own_scale = normalise(model.params["return_range"], returns, config.return_range_rate)
    scale = sg(own_scale) if scale is None else scale
    weights = jnp.cumprod(continues, 0)[:-1]
    slow_values = symexp_twohot_mean(frozen.slow_critic(dream_features))
    advantages = sg(returns - values[:-1]) / scale
    losses["actor"] = weights * actor_loss(policy, actions, advantages, config.entropy_scale)
    targets = jnp.concatenate([returns, values[-1:]])
    losses["critic"] = weights * critic_loss(critic_logits, targets, slow_values, config.slow_critic_scale)[:-1]

    # The critic also learns from replayed rewards, with the imagined returns as its bootstrap.
    bootstrap = returns[0].reshape(batch_size, starting)
    real = (x[:, -starting:] for x in (features, rows.rewards, rows.is_terminal, rows.is_last))
    real_features, real_rewards, is_terminal, is_last = real
    targets = replay_return(real_rewards, is_terminal, is_last, bootstrap, discount, config.return_lambda)
    slow_values = symexp_twohot_mean(frozen.slow_critic(sg(real_features[:, :-1])))
    replayed = critic_loss(forget(model.critic)(real_features[:, :-1]), targets, slow_values, config.slow_critic_scale)
    losses["replay_critic"] = (1 - is_last[:, :-1]) * replayed

    terms = {name: jnp.mean(value) for name, value in losses.items()}
    scales = loss_scales(config)
    total = sum((scales[name] * terms[name] for name in terms), jnp.zeros(()))
    metrics = {
        "policy_entropy": jnp.mean(entropy(policy)),
        "posterior_entropy": jnp.mean(posterior.entropy()),
        "prior_entropy": jnp.mean(prior.entropy()),
        "imagined_reward": jnp.mean(rewards),
        "imagined_return": jnp.mean(returns),
        "return_scale": scale,
    }
    return total, ({"loss": total, **terms}, LossAux(losses, latents, logits, returns, return_range, metrics))


def imagine(
    model: DreamerV3WorldModel, starts: Latent, horizon: int, key: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """Let the policy act in the world model.

    Returns:
      Features [H + 1, N, F] from ``starts`` [N, ...]; the action at each; the actor's first product with each.
    """
    mixing = model.rssm.core.mixing(model.dtype)
    # Features are written where they are read from; to stack and to append them would copy them twice.
    put = jax.lax.dynamic_update_index_in_dim
    first = starts.features
    dream = put(jnp.zeros((horizon + 1, *first.shape), model.dtype), first, 0, 0)

    def act(features: jax.Array, key: jax.Array | None) -> tuple[dict[str, jax.Array], jax.Array]:
        product = model.actor.product(features)
        return draw(model.actor.finish(product), key), product

    def step(carry: tuple, now: tuple) -> tuple[tuple, tuple]:
        (state, features, dream), (index, key, noise) = carry, now
        actions, product = act(features, key)
        embedded = embed_actions(model.config, strip_single(model.config, actions), 1, model.dtype)
        state = model.rssm.predict(state, embedded, noise, mixing)
        features = state.features
        return (state, features, put(dream, features, index + 1, 0)), (actions, product)

    action_key, latent_key, last_key = split_key(key, 3)
    noise = model.rssm.noise(latent_key, horizon, len(first))
    steps = (jnp.arange(horizon), step_keys(action_key, horizon), noise)
    (_, last, dream), acted = jax.lax.scan(step, (starts, first, dream), steps)
    whole = jax.tree.map(lambda xs, x: jnp.concatenate([xs, x[None]]), acted, act(last, last_key))
    return dream, *whole


def reconstruction_loss(decoded: Mapping[str, jax.Array], obs: Mapping[str, jax.Array]) -> jax.Array:
    """Squared errors [B, T] summed over all entries of all observations: no ½, no mean over pixels.

    Vectors compare in symlog space, images from 0 to 1.
    """
    total = jnp.zeros(())
    for name, prediction in decoded.items():
        if prediction.ndim == 5:
            error = jnp.sum(jnp.square(prediction - unit_range(obs[name], jnp.float32)), (-3, -2, -1))
        else:
            error = symlog_squared_error(prediction, obs[name])
        total += error
    return total


def actor_loss(
    policy: Policy, actions: Mapping[str, jax.Array], advantages: jax.Array, entropy_scale: float
) -> jax.Array:
    """REINFORCE with an entropy bonus, ``−(A_t · log π(a_t) + η · H(π_t))`` [H, N] (``imag_loss``).

    Discrete and continuous actions alike: no gradient runs through actions or dynamics, and advantages come without
    one. The policy and its actions have one step more than the advantages [H, N]; it is left out.
    """
    log_prob = sum((policy[name].log_prob(sg(actions[name])) for name in policy), jnp.zeros(()))
    return -(advantages * log_prob[:-1] + entropy_scale * entropy(policy)[:-1])


def critic_loss(logits: jax.Array, returns: jax.Array, slow_values: jax.Array, slow_scale: float) -> jax.Array:
    """Two-hot cross entropy to the returns, and to the slow critic's value as a regulariser (``slowreg``)."""
    return symexp_twohot_loss(logits, returns) + slow_scale * symexp_twohot_loss(logits, slow_values)


def replay_return(
    rewards: jax.Array,
    is_terminal: jax.Array,
    is_last: jax.Array,
    bootstrap: jax.Array,
    discount: float,
    lambda_: float,
) -> jax.Array:
    """λ-returns [B, T − 1] along replayed rows [B, T] (``repl_loss``).

    ``G_t = r_{t+1} + γ (1 − terminal_{t+1}) [(1 − λ_{t+1}) b_{t+1} + λ_{t+1} G_{t+1}]`` with b the imagined return
    that starts at a row, and λ_t = 0 where the window's episode ends at t.
    """
    live, trace = discount * (1 - is_terminal), lambda_ * (1 - is_last)
    return lambda_return(rewards.T[1:], live.T[1:], bootstrap.T[1:], trace.T[1:]).T


def normalise(
    return_range: Mapping[str, jax.Array], returns: jax.Array, rate: float
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Move the 5th and 95th percentile towards those of ``returns``; the scale is their distance, at least 1.

    ``lo ← (1 − rate) lo + rate · Per(R, 5)``, ``S = max(1, hi − lo)`` with the moved values (``retnorm``).
    """
    percentiles = jnp.percentile(sg(returns), jnp.array([5.0, 95.0]))
    moved = {
        name: (1 - rate) * return_range[name] + rate * now for name, now in zip(("lo", "hi"), percentiles, strict=True)
    }
    return moved, jnp.maximum(1.0, moved["hi"] - moved["lo"])


def entropy(policy: Policy) -> jax.Array:
    """Entropy [...] of all actions together, in nats."""
    return sum((distribution.entropy() for distribution in policy.values()), jnp.zeros(()))


def loss_scales(config: DreamerV3Config) -> dict[str, float]:
    """Weight of each term in the total."""
    return {
        "reconstruction": config.reconstruction_scale,
        "reward": config.reward_scale,
        "continue": config.continue_scale,
        "dynamics": config.kl_scale * config.kl_balance,
        "representation": config.kl_scale * (1 - config.kl_balance),
        "actor": config.actor_scale,
        "critic": config.critic_scale,
        "replay_critic": config.replay_critic_scale,
    }
