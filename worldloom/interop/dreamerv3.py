"""Import and export of the weights of DreamerV3's reference program, ``danijar/dreamerv3``.

Its weights have flat names such as ``dyn/dyngru/kernel``, after the modules of ``dreamerv3/agent.py`` and ``rssm.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from worldloom.algorithm import TrainState
from worldloom.errors import ConfigError, WeightsError
from worldloom.interop.archive import read_npz
from worldloom.interop.pickles import read_dreamerv3_checkpoint
from worldloom.models.compilation import abstract_params
from worldloom.models.dreamer import DreamerV3Config, DreamerV3WorldModel
from worldloom.models.params import flatten, unflatten
from worldloom.spaces import name_of_attribute

# The reference has 32 latents at every size; its arrays determine only the product latents × classes.
_LATENTS = 32
# Its KL scales, 1.0 for dynamics and 0.1 for representation, in terms of this library's config.
_KL = {"kl_scale": 1.1, "kl_balance": 1 / 1.1}
_MODULES = ("enc", "dyn", "dec", "rew", "con", "pol", "val", "slowval", "retnorm")
# (pattern of our layer name, name in the reference); the first match counts. The norm of a layer is <layer>norm.
# The last group are MLPs, which number linear layers and norms separately.
_LAYERS = (
    (r"encoder\.mlp\.layers\.(\d+)", r"enc/mlp\1"),
    (r"encoder\.cnn\.(\d+)", r"enc/cnn\1"),
    (r"rssm\.core\.deter_in", "dyn/dynin0"),
    (r"rssm\.core\.stoch_in", "dyn/dynin1"),
    (r"rssm\.core\.action_in", "dyn/dynin2"),
    (r"rssm\.core\.hidden", "dyn/dynhid0"),
    (r"rssm\.core(?=\.norm)", "dyn/dynhid0"),
    (r"rssm\.core\.gates", "dyn/dyngru"),
    (r"rssm\.posterior_hidden", "dyn/obs0"),
    (r"rssm\.posterior_logits", "dyn/obslogit"),
    (r"rssm\.prior_hidden\.layers\.(\d+)", r"dyn/prior\1"),
    (r"rssm\.prior_logits", "dyn/priorlogit"),
    (r"decoder\.vectors\.([^.]+)", r"dec/vec/\1/pred"),
    (r"decoder\.image\.from_deter", "dec/sp0"),
    (r"decoder\.image\.stoch_hidden", "dec/sp1"),
    (r"decoder\.image\.from_stoch", "dec/sp2"),
    (r"decoder\.image(?=\.norm)", "dec/sp"),
    (r"decoder\.image\.cnn\.0", "dec/conv2"),
    (r"decoder\.image\.cnn\.1", "dec/conv1"),
    (r"decoder\.image\.cnn\.2", "dec/conv0"),
    (r"decoder\.image\.output", "dec/imgout"),
    (r"reward\.output", "rew/head/logits"),
    (r"continuation\.output", "con/head/logit"),
    (r"actor\.outputs\.([^.]+)\.(\w+)", r"pol/head/\1/\2"),
    (r"critic\.output", "val/head/logits"),
    (r"slow_critic\.output", "slowval/head/logits"),
    (r"return_range\.(lo|hi)", r"retnorm/\1/value"),
    (r"decoder(?=\.mlp)", "dec"),
    (r"reward(?=\.mlp)", "rew"),
    (r"continuation(?=\.mlp)", "con"),
    (r"actor(?=\.mlp)", "pol"),
    (r"critic(?=\.mlp)", "val"),
    (r"slow_critic(?=\.mlp)", "slowval"),
)


def load_official_dreamerv3(
    path_or_params: str | Path | Mapping[str, Any],
    *,
    obs_shape: Any,
    action_dim: Any,
    action_type: Any = "continuous",
    **overrides: Any,
) -> DreamerV3WorldModel:
    """Build a world model with weights of the reference program; sizes are inferred from the arrays.

    Args:
      path_or_params: a checkpoint folder or ``agent.pkl`` of the reference program, an ``.npz`` file, or a mapping of
        flat names to arrays. Names may have the prefix ``params/``. Optimizer state is ignored, a missing slow critic
        is copied from the critic, and a missing return range starts at 0.
      obs_shape: as in ``DreamerV3Config``; a mapping if the environment's key is not ``image`` or ``vector``.
      action_dim: as in ``DreamerV3Config``; a mapping if the environment's key is not ``action``.
      action_type: as in ``DreamerV3Config``.
      **overrides: further config fields. The arrays determine only the product latents × classes: without the 32
        latents of all sizes of the reference, ``num_categories`` must be given.

    Raises:
      FileFormatError: the file is damaged or holds more than arrays.
      WeightsError: arrays are missing, unexpected or of another shape than these arguments need.
      ConfigError: the number of classes cannot be inferred.
    """
    arrays = _read(path_or_params)
    inferred = _infer_sizes(arrays) | {"obs_shape": obs_shape, "action_dim": action_dim, "action_type": action_type}
    if "num_categories" not in overrides:
        inferred["num_categories"] = _infer_categories(overrides.get("stoch_dim", inferred["stoch_dim"]))
    config = DreamerV3Config(**{**inferred, **_KL, **overrides})
    _check_shapes(config, arrays)
    model = DreamerV3WorldModel(config)
    own = flatten(model.params)
    official = _official_names(own)
    model.load_params(unflatten({name: arrays[official[name]] if name in official else own[name] for name in own}))
    return model


def to_official_dreamerv3(model: DreamerV3WorldModel | TrainState) -> dict[str, NDArray[Any]]:
    """All weights by the reference program's flat names, including slow critic, its update counter and return range.

    Names, shapes and values are those that :func:`load_official_dreamerv3` reads. The counter is the step of a
    ``TrainState``, and 0 for a model. Networks of ``explore="disagreement"``, which the reference does not have, are
    left out; ``WeightsError`` for other parts of that kind.
    """
    weights = flatten(jax.device_get(model.params))
    named = {theirs: np.array(weights[ours]) for ours, theirs in _official_names(weights).items()}
    step = model.step if isinstance(model, TrainState) else 0
    return named | {"slowval_count/value": np.asarray(step, np.int32)}


def _official_names(names: Iterable[str]) -> dict[str, str]:
    """Ours → theirs, of the weights that the reference has: it has nothing like ``explore="disagreement"``."""
    return {name: official_name(name) for name in names if not name.startswith("explorer.")}


def official_name(name: str) -> str:
    """The reference program's name of our weight ``name`` (``rssm.core.gates.kernel`` → ``dyn/dyngru/kernel``)."""
    matches = ((re.match(pattern + r"(?=\.|$)", name), layer) for pattern, layer in _LAYERS)
    found, layer = next(((match, layer) for match, layer in matches if match), (None, ""))
    if found is None:
        raise WeightsError(f"The reference program has no part like {name}, so its weights cannot hold it.")
    layer, rest = name_of_attribute(found.expand(layer)), name[found.end() :]
    in_mlp = re.fullmatch(r"\.mlp\.layers\.(\d+)\.(linear|norm)\.(\w+)", rest)
    if in_mlp:
        return in_mlp.expand(rf"{layer}/mlp/\2\1/\3")
    if rest == ".norm.scale":
        return f"{layer}norm/scale"
    return layer + re.sub(r"^\.(linear\.|conv\.)?", "/", rest) if rest else layer


def _read(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a file or mapping by flat names, without optimizer state and with the defaults filled in."""
    if isinstance(source, Mapping):
        arrays = dict(source)
    elif Path(source).suffix == ".npz":
        arrays = read_npz(source)
    else:
        arrays = read_dreamerv3_checkpoint(source)
    if any(name.startswith("params/") for name in arrays):
        arrays = {name.removeprefix("params/"): v for name, v in arrays.items() if name.startswith("params/")}
    arrays = {name: value for name, value in arrays.items() if name.split("/")[0] in _MODULES}
    for name in [name for name in arrays if name.startswith("val/")]:
        arrays.setdefault(f"slow{name}", arrays[name])
    for name in ("retnorm/lo/value", "retnorm/hi/value"):
        arrays.setdefault(name, np.zeros((), np.float32))
    return arrays


def _infer_sizes(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Config fields that follow from names and shapes of the arrays."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in arrays:
            raise WeightsError(f"{name} is missing: these are not the weights of a DreamerV3 reference agent.")
        return tuple(arrays[name].shape)

    def layers(prefix: str) -> int:
        return sum(re.fullmatch(re.escape(prefix) + r"\d+/kernel", name) is not None for name in arrays)

    deter, hidden = shape("dyn/dynin0/kernel")
    units = shape("pol/mlp/linear0/kernel")[-1]
    sizes = {
        "deter_dim": deter,
        "hidden_dim": hidden,
        "stoch_dim": shape("dyn/dynin1/kernel")[0],
        "blocks": shape("dyn/dynhid0/kernel")[0],
        "units": None if units == hidden else units,
        "mlp_layers": layers("pol/mlp/linear"),
        "reward_layers": layers("rew/mlp/linear"),
        "continue_layers": layers("con/mlp/linear"),
        "bins": shape("rew/head/logits/kernel")[-1],
    }
    # The last level has 4 · cnn_depth channels, however many there are.
    levels = layers("enc/cnn")
    return sizes | ({"cnn_depth": shape(f"enc/cnn{levels - 1}/kernel")[-1] // 4} if levels else {})


def _infer_categories(stoch_dim: int) -> int:
    if stoch_dim % _LATENTS or stoch_dim == _LATENTS:
        raise ConfigError(
            f"The arrays give latents × classes = {stoch_dim}, not the number of classes, and {stoch_dim} is not 2 or "
            f"more times the reference's {_LATENTS} latents; give num_categories=…"
        )
    return stoch_dim // _LATENTS


def _check_shapes(config: DreamerV3Config, arrays: Mapping[str, Any]) -> None:
    """Raise ``WeightsError`` naming the arrays that are missing, unexpected or of another shape."""
    own = flatten(abstract_params(DreamerV3WorldModel, config))
    expected = {theirs: tuple(own[ours].shape) for ours, theirs in _official_names(own).items()}
    problems = [f"{name} is missing" for name in expected if name not in arrays]
    problems += [f"{name} is unexpected" for name in arrays if name not in expected]
    problems += [
        f"{name} has shape {tuple(arrays[name].shape)}, {shape} is expected"
        for name, shape in expected.items()
        if name in arrays and tuple(arrays[name].shape) != shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise WeightsError(
            f"These weights do not fit obs_shape={config.obs_shape}, action_dim={config.action_dim}, "
            f"action_type={config.action_type!r}: {'; '.join(problems[:5])}{more}."
        )
