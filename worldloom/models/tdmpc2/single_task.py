"""A single-task model out of a multitask one: the task's embedding is a constant, and becomes part of biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from worldloom.config import check
from worldloom.models.params import flatten, unflatten
from worldloom.models.tdmpc2.config import TDMPC2Config
from worldloom.models.tdmpc2.tasks import task_number

_ACTION_INPUTS = ("dynamics", "reward", "q.members", "target_q.members")
_NETWORKS = ("encoder.mlp", "policy.mlp", *_ACTION_INPUTS)


def single_task_weights(
    config: TDMPC2Config,
    params: Any,
    task: int | str,
    *,
    obs_dim: int | None = None,
    action_dim: int | None = None,
) -> tuple[TDMPC2Config, Any]:
    """Config and weights of a single-task model that computes what a multitask one does for ``task``.

    Every network reads the task's embedding beside its other inputs. As it is the same for all of them, its product
    with the first layer's kernel is a constant, which is added to that layer's bias. An intrinsic reward (``explore``)
    is left out.

    Args:
      config: of the multitask model.
      params: its weights.
      task: number of the task, or its name in mt30.
      obs_dim: width of the task's observations; those of multitask data are filled up with zeros behind it. None keeps
        the multitask model's.
      action_dim: likewise of its actions; None is what the task has, ``config.valid_actions``.

    Raises ``ConfigError`` if there is no such task, or a size is larger than the model's.
    """
    check(config.multitask, "The model has a single task already; task_like is for multitask models.")
    number = task_number(task, config.num_tasks)
    width, valid = config.vector_dim, config.valid_actions[number]
    obs_dim, actions = width if obs_dim is None else obs_dim, valid if action_dim is None else action_dim
    check(1 <= obs_dim <= width, f"obs_dim={obs_dim} must lie in 1 … {width}, the multitask model's.")
    check(
        obs_dim == width or not isinstance(config.obs_shape, Mapping),
        f"obs_dim={obs_dim} cuts off observations by name; leave it out, the model takes {dict(config.observations)}.",
    )
    check(1 <= actions <= config.action_dim, f"action_dim={actions} must lie in 1 … {config.action_dim}.")
    # What explores reads the embedding too, and is of use in training only.
    flat = {name: np.asarray(array) for name, array in flatten(params).items() if not name.startswith("explorer.")}
    row = flat.pop("task_embedding.table")[number].astype(np.float64)
    norm = np.sqrt(np.sum(row**2))
    row = row / (norm + 1e-7) if norm > 1 else row  # as ``TaskEmbedding`` looks it up
    for network in _NETWORKS:
        inputs = width if network == "encoder.mlp" else config.latent_dim
        kernel, bias = _first_layer(flat, network)
        kept = obs_dim if network == "encoder.mlp" else inputs
        parts = [flat[kernel][..., :kept, :]]
        if network in _ACTION_INPUTS:
            start = inputs + config.task_dim
            parts.append(flat[kernel][..., start : start + actions, :])
        embedding = flat[kernel][..., inputs : inputs + config.task_dim, :].astype(np.float64)
        flat[bias] = (flat[bias] + np.einsum("e,...eh->...h", row, embedding)).astype(np.float32)
        flat[kernel] = np.concatenate(parts, axis=-2)
    # The policy's outputs are means, then standard deviations, of all actions.
    outputs = np.concatenate([np.arange(actions), config.action_dim + np.arange(actions)])
    if config.action_type == "discrete":
        outputs = np.arange(actions)
    for part in ("kernel", "bias"):
        flat[f"policy.mlp.head.{part}"] = flat[f"policy.mlp.head.{part}"][..., outputs]
    lengths = config.episode_lengths or (config.episode_length,) * config.num_tasks
    single = config.replace(
        num_tasks=0,
        action_dims=(),
        episode_lengths=(),
        episode_length=lengths[number],
        action_dim=actions,
        obs_shape=config.obs_shape if obs_dim == width else (obs_dim,),
        iterations=config.planner_iterations,
        explore="none",
    )
    return single, unflatten(flat)


def _first_layer(flat: dict[str, Any], network: str) -> tuple[str, str]:
    """Names of kernel and bias of the layer that reads a network's inputs."""
    for layer in ("hidden.0.affine", "head.affine", "head"):
        if f"{network}.{layer}.kernel" in flat:
            return f"{network}.{layer}.kernel", f"{network}.{layer}.bias"
    raise AssertionError(network)
