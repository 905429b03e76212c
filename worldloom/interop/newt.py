"""Import of the weights of Newt, ``nicklashansen/newt``: TD-MPC2 with text embeddings of 200 tasks, or of one task."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.errors import WeightsError
from worldloom.interop.tdmpc2 import load_official_tdmpc2, read_official_tdmpc2
from worldloom.models.tdmpc2 import TDMPC2WorldModel

_log = logging.getLogger("worldloom")

_MEMBER = re.compile(r"_Qs\.(online|target)\._Qs\.(\d+)\.(.+)")
_ACTION_INPUTS = ("_dynamics", "_reward", "_Qs.params", "_target_Qs_params")
_NETWORKS = ("_encoder.state", "_pi", *_ACTION_INPUTS)


def load_official_newt(
    path_or_state_dict: str | Path | Mapping[str, Any],
    *,
    obs_dim: int,
    task_embeddings: Any = None,
    **overrides: Any,
) -> TDMPC2WorldModel:
    """Build a world model with weights of Newt's program; sizes are inferred from the arrays.

    Newt's networks are TD-MPC2's without dropout. Its Q networks are separate modules, and its text embeddings have
    norms of about 15, where TD-MPC2's are kept at most 1: they are divided by a power of two here, and the kernels that
    read them multiplied by it, which changes no output. They are trained like all others if the model is.

    Its single-task models have no embedding, and as many actions as its multitask ones. Those that their task does not
    have are always 0, and cut off here: entropies are lower by log(2π) / 2 for each, which Newt counts along.

    Args:
      path_or_state_dict: a ``.pt`` file, read without PyTorch, or a mapping of names to arrays; nesting and prefixes as
        in :func:`load_official_tdmpc2`.
      obs_dim: width of the state observations; Newt fills all of them up with zeros, to 128. Models that read pictures
        beside them are refused.
      task_embeddings: [tasks, task_dim], for multitask files without them, or to replace theirs.
      **overrides: further config fields, such as ``episode_lengths``, or ``episode_length`` of a single task, which
        decide about discounts.

    Raises as :func:`load_official_tdmpc2`, and ``WeightsError`` for weights that are none of Newt.
    """
    arrays = read_official_tdmpc2(path_or_state_dict)
    members: dict[tuple[str, str], dict[int, Any]] = {}
    for name in [name for name in arrays if _MEMBER.fullmatch(name)]:
        which, number, rest = _MEMBER.fullmatch(name).groups()  # type: ignore[union-attr]
        members.setdefault((which, rest), {})[int(number)] = arrays.pop(name)
    if not members:
        raise WeightsError("These are not weights of Newt: there is no _Qs.online._Qs.0.0.weight.")
    for (which, rest), found in members.items():
        if sorted(found) != list(range(len(found))) or len({array.shape for array in found.values()}) > 1:
            raise WeightsError(f"The Q networks _Qs.{which}._Qs.*.{rest} do not belong together.")
        prefix = "_Qs.params" if which == "online" else "_target_Qs_params"
        arrays[f"{prefix}.{rest}"] = np.stack([found[number] for number in range(len(found))])
    if task_embeddings is not None:
        arrays["_task_emb.weight"] = np.asarray(task_embeddings, np.float32)
    for name in (f"{network}.0.weight" for network in _NETWORKS):
        axes = 3 if "Qs" in name else 2
        if name in arrays and np.ndim(arrays[name]) != axes:
            raise WeightsError(f"{name} has shape {np.shape(arrays[name])}; {axes} axes are expected.")
    inputs = np.shape(arrays.get("_encoder.state.0.weight", np.zeros((0, 0))))[-1]
    if "_task_emb.weight" not in arrays:
        if inputs != obs_dim:
            raise WeightsError(
                "The weights hold no task embeddings (_task_emb.weight): give task_embeddings. Or they are those of a "
                f"single task, whose encoder reads {inputs} numbers, not obs_dim={obs_dim}: another obs_dim, or a "
                "model that reads pictures too, which is not supported."
            )
        _cut_actions(arrays)
        return load_official_tdmpc2(arrays, **{"dropout": 0.0, **overrides})
    table = np.asarray(arrays["_task_emb.weight"], np.float32)
    masks = arrays.get("_action_masks")
    if table.ndim != 2 or (masks is not None and len(masks) != len(table)):
        raise WeightsError(f"The task embeddings have shape {table.shape}; [tasks, task_dim] is needed.")
    if inputs != obs_dim + table.shape[1]:
        raise WeightsError(
            f"The encoder reads {inputs} numbers, which are not obs_dim={obs_dim} and {table.shape[1]} of the task: "
            "another obs_dim, or a model that reads pictures too, which is not supported."
        )
    _rescale_embeddings(arrays, table, obs_dim)
    return load_official_tdmpc2(arrays, **{"dropout": 0.0, **overrides})


def _cut_actions(arrays: dict[str, Any]) -> None:
    """Leave out the actions that the one task of these weights does not have."""
    if "_action_masks" not in arrays or "_pi.0.weight" not in arrays:
        return  # load_official_tdmpc2 names weights that are missing.
    masks = np.asarray(arrays.pop("_action_masks"))  # one row for each environment that it was trained in
    size, valid = np.shape(masks)[-1] if masks.size else 0, int(masks[:1].sum())
    if masks.ndim != 2 or not valid or (masks != (np.arange(size) < valid)).any():
        raise WeightsError(
            "The weights hold no task embeddings, so they are those of a single task, but _action_masks are not: "
            "every row must be 1 for the actions that the task has, and 0 behind them."
        )
    latent = np.shape(arrays["_pi.0.weight"])[-1]  # Networks of actions read [latent | action].
    for name in (f"{network}.0.weight" for network in _ACTION_INPUTS):
        if name in arrays:
            arrays[name] = np.asarray(arrays[name])[..., : latent + valid]
    # The policy's outputs are means, then standard deviations, of all actions.
    outputs = np.concatenate([np.arange(valid), size + np.arange(valid)])
    last = max(int(found[1]) for name in arrays if (found := re.fullmatch(r"_pi\.(\d+)\.weight", name)))
    for name in (f"_pi.{last}.weight", f"_pi.{last}.bias"):
        if name in arrays:
            if np.shape(arrays[name])[:1] != (2 * size,):
                raise WeightsError(f"{name} has shape {np.shape(arrays[name])}, but there are {size} _action_masks.")
            arrays[name] = np.asarray(arrays[name])[outputs]


def _rescale_embeddings(arrays: dict[str, Any], table: np.ndarray, obs_dim: int) -> None:
    """Divide embeddings by a power of two that leaves none longer than 1, and multiply what reads them by it."""
    longest = float(np.sqrt((table.astype(np.float64) ** 2).sum(-1)).max(initial=0))
    factor = np.float32(2.0 ** max(0, int(np.ceil(np.log2(max(longest, 1.0) * (1 + 1e-6))))))
    arrays["_task_emb.weight"] = table / factor
    width = table.shape[1]
    # Every network reads [latent or observation | task | …].
    latent = np.shape(arrays["_pi.0.weight"])[-1] - width if "_pi.0.weight" in arrays else 0
    for name in (f"{network}.0.weight" for network in _NETWORKS):
        if name in arrays:
            start = obs_dim if name.startswith("_encoder") else latent
            weight = np.array(arrays[name], np.float32)
            weight[..., start : start + width] *= factor
            arrays[name] = weight
    if factor > 1:
        _log.info("The task embeddings are %g times shorter here, and their weights as much larger.", factor)
