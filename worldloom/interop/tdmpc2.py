"""Import and export of the weights of TD-MPC2's reference program, ``nicklashansen/tdmpc2``.

Its files have one of three layouts (:func:`to_official_tdmpc2` lists the names):

- the current one (since October 2024), which is the one written here;
- that of the published files of 2023: the Q ensembles are flat lists, ``_Qs.params.0`` … ``_Qs.params.9``;
- that of a few files from before the release: Linear and LayerNorm are separate modules with their own indices. These
  models were trained on symlog observations, for which the importer sets ``symlog_obs``.

PyTorch kernels are (out, in) and (out, in, height, width); ours are (in, out) and (height, width, in, out).
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from worldloom.algorithm import TrainState
from worldloom.errors import ConfigError, WeightsError
from worldloom.interop.archive import read_npz
from worldloom.interop.torch_file import read_torch
from worldloom.models.params import flatten, unflatten
from worldloom.models.tdmpc2 import TDMPC2Config, TDMPC2WorldModel
from worldloom.models.tdmpc2.tasks import task_fields

Arrays = dict[str, NDArray[Any]]

_log = logging.getLogger("worldloom")

_PARTS_OF_A_LAYER = ("weight", "bias", "ln.weight", "ln.bias")
_PRERELEASE_KEY = "_dynamics.0.0.weight"  # only in the layout from before the release
_LOG_STD_RANGE = (-10.0, 2.0)  # of the reference's config, at every size
_CONVOLUTIONS = 4  # of the reference's image encoder
_NESTED = ("model", "state_dict", "agent")  # names under which programs put the weights
_PREFIXES = re.compile(r"(?:params/)?(?:_orig_mod\.|module\.|model\.)*")  # of wrappers: torch.compile, DataParallel
_FLAT_Q = r"(_Qs|_target_Qs)\.params\.(\d+)"  # a weight of the Q networks in the files of 2023
_BUFFERS = ("log_std_min", "log_std_dif", "_action_masks")


def load_official_tdmpc2(
    path_or_state_dict: str | Path | Mapping[str, Any], *, task: str | None = None, **overrides: Any
) -> TDMPC2WorldModel:
    """Build a world model with weights of the reference program; sizes are inferred from the arrays.

    The value scale of the policy loss is not in these files; it starts at 1. If there are no target networks, they
    are copied from the online ones.

    Args:
      path_or_state_dict: a ``.pt`` file (read without PyTorch, tensors only), an ``.npz`` file, or a mapping of names
        to arrays or tensors. The weights may be nested under ``"model"`` or ``"state_dict"``, and names may have the
        prefixes ``params/``, and ``module.``, ``_orig_mod.`` and ``model.``, which PyTorch's wrappers add.
      task: the task that the weights were trained on, by the reference's name: a single one such as ``"walker-run"``
        or ``"mw-assembly"``, or ``"mt30"`` or ``"mt80"``. It determines what cannot be inferred from the arrays:
        episode lengths, and thereby the discount, and the action dimensions of each task.
      **overrides: further config fields. The networks of ``explore="disagreement"`` are new ones.

    Raises:
      FileFormatError: the file is damaged or holds more than tensors and plain containers.
      WeightsError: arrays are missing, unexpected or of another shape than the config needs; they are named as the
        file names them.
      ConfigError: ``task`` is not known, or overrides contradict the arrays.
    """
    read, prefix = _read(path_or_state_dict)
    file, arrays = _to_current_layout(read, prefix)
    inferred = _infer_fields(arrays, file) | {"symlog_obs": file.is_prerelease}
    config = TDMPC2Config(**{**inferred, **task_fields(task), **overrides})
    if config.multitask and not config.action_dims:
        warnings.warn(
            "These multitask weights do not hold the action dimensions of each task (files of 2023 do not), so all "
            "dimensions count as valid; give task='mt30' or 'mt80', or action_dims=…",
            stacklevel=2,
        )
    model = TDMPC2WorldModel(config)
    own = flatten(model.params)
    names = dict(_weight_names(_Layout.of_weights(own)))
    _check_shapes(names, own, arrays, file)
    weights = {name: own[name] for name in own if _is_explorers(name)}
    weights |= {ours: _from_pytorch(arrays[official], ours) for official, ours in names.items()}
    model.load_params(unflatten({**weights, "scale.value": np.ones((), np.float32)}))
    return model


def read_official_tdmpc2(path_or_state_dict: str | Path | Mapping[str, Any]) -> Arrays:
    """The arrays of a file or mapping by their names there, without nesting and wrappers' prefixes.

    Raises as :func:`load_official_tdmpc2`.
    """
    return _read(path_or_state_dict)[0]


def to_official_tdmpc2(model: TDMPC2WorldModel | TrainState, *, config: TDMPC2Config | None = None) -> Arrays:
    """All weights, including target networks, with the reference program's names, orientation and current layout.

    ``_encoder.state.{i}``, ``_dynamics.{i}``, ``_reward.{i}``, ``_pi.{i}``, ``_termination.{i}``, ``_Qs.params.{i}``
    and ``_target_Qs_params.{i}`` with ``weight`` (out, in), ``bias``, ``ln.weight`` and ``ln.bias``;
    ``_encoder.rgb.{2,4,6,8}`` with ``weight`` (out, in, height, width) for images; ``_task_emb.weight``; and the
    buffers ``log_std_min``, ``log_std_dif``, ``_action_masks``. The duplicates ``_detach_Qs_params`` are left out.

    Args:
      model: a world model, or the state of a run.
      config: of the model whose run a state is of; a state holds arrays only. Without it, ``log_std_min`` and
        ``log_std_max`` take their defaults, the reference program's.

    The state of a multitask model does not say which actions its tasks have: without ``config``, ``_action_masks`` is
    left out, and a warning is logged. Vectors by name become one ``state`` encoder, in the config's order. The networks
    of ``explore="disagreement"``, which the reference does not have, are left out.

    Raises ``ConfigError`` for encoders that the reference does not have: of images together with others, or of another
    size than 64×64 pixels with a latent of 512.
    """
    weights = flatten(jax.device_get(model.params))
    config = model.config if isinstance(model, TDMPC2WorldModel) else config
    layout = _Layout.of_weights(weights)
    if layout.multitask and config is None:
        _log.warning(
            "_action_masks is left out: a state does not say which actions its tasks have. Give the config too: "
            "to_official_tdmpc2(state, config=model.config)."
        )
    arrays = {official: _to_pytorch(weights[ours], ours) for official, ours in _weight_names(layout)}
    low, high = _LOG_STD_RANGE if config is None else (config.log_std_min, config.log_std_max)
    arrays["log_std_min"] = _as_buffer(low)
    arrays["log_std_dif"] = _as_buffer(high - low)
    if layout.multitask and config is not None:
        arrays["_action_masks"] = config.action_masks
    return arrays


class _Layout(NamedTuple):
    """What decides about the names of the weights."""

    is_image: bool
    encoder_hidden: int
    hidden: int
    episodic: bool
    multitask: bool

    @classmethod
    def of_weights(cls, weights: Mapping[str, Any]) -> _Layout:
        """That of our weights by flat name. Raises ``ConfigError`` if the reference has no such encoder."""

        def hidden_layers(mlp: str) -> int:
            return sum(
                re.fullmatch(rf"{re.escape(mlp)}\.hidden\.\d+\.affine\.kernel", name) is not None for name in weights
            )

        parts = {name.partition(".")[0] for name in weights}
        convolutions = sum(re.fullmatch(r"encoder\.convs\.\d+\.kernel", name) is not None for name in weights)
        if "encoder.head.affine.kernel" in weights or convolutions not in (0, _CONVOLUTIONS):
            raise ConfigError(
                "The reference program has no such encoder: it takes either vectors, or one image of 64 × 64 pixels "
                "with latent_dim=512. Save models of other images, or of images and other observations together, by "
                "save_pretrained."
            )
        return cls(
            is_image=convolutions > 0,
            encoder_hidden=hidden_layers("encoder.mlp"),
            hidden=hidden_layers("dynamics"),
            episodic="termination" in parts,
            multitask="task_embedding" in parts,
        )


class _FileNames(NamedTuple):
    """How a file names its weights, to name them in messages as it does.

    Attributes:
      prefix: before every name.
      is_prerelease: whether the names are those from before the release.
      has_flat_q: whether the Q networks are flat lists, as in 2023.
    """

    prefix: str = ""
    is_prerelease: bool = False
    has_flat_q: bool = False

    def of(self, name: str) -> str:
        """The file's name of the weight that has ``name`` in the current layout."""
        return self.prefix + self._in_layout(name)

    def _in_layout(self, name: str) -> str:
        ensemble = re.fullmatch(r"(_Qs\.params|_target_Qs_params)\.(\d+)\.(.+)", name)
        if ensemble and self.has_flat_q and ensemble[3] in _PARTS_OF_A_LAYER:
            of = "_Qs" if ensemble[1] == "_Qs.params" else "_target_Qs"
            return f"{of}.params.{4 * int(ensemble[2]) + _PARTS_OF_A_LAYER.index(ensemble[3])}"
        layer = re.fullmatch(r"(_encoder\.state|_dynamics|_reward|_pi|_termination)\.(\d+)\.(ln\.)?(weight|bias)", name)
        if not layer or not self.is_prerelease:
            return name
        index = 3 * int(layer[2]) + bool(layer[3]) + (layer[1] == "_encoder.state")
        if layer[1] != "_dynamics":
            return f"{layer[1]}.{index}.{layer[4]}"
        return f"_dynamics.1.{layer[4]}" if index == 7 else f"_dynamics.0.{index}.{layer[4]}"


def _is_explorers(name: str) -> bool:
    """Whether a weight is of ``explore="disagreement"``, of which the reference has nothing."""
    return name.startswith("explorer.")


def _weight_names(layout: _Layout) -> Iterator[tuple[str, str]]:
    """Pairs (official name in the current layout, our flat name) of all weights except the value scale."""

    def mlp(official: str, ours: str, hidden: int, *, normed_head: bool = False) -> Iterator[tuple[str, str]]:
        for i in range(hidden + normed_head):
            layer = f"{ours}.hidden.{i}" if i < hidden else f"{ours}.head"
            leaves = ("affine.kernel", "affine.bias", "norm.scale", "norm.bias")
            yield from (
                (f"{official}.{i}.{part}", f"{layer}.{leaf}")
                for part, leaf in zip(_PARTS_OF_A_LAYER, leaves, strict=True)
            )
        if not normed_head:
            yield f"{official}.{hidden}.weight", f"{ours}.head.kernel"
            yield f"{official}.{hidden}.bias", f"{ours}.head.bias"

    if layout.is_image:
        for i in range(_CONVOLUTIONS):
            yield f"_encoder.rgb.{2 * i + 2}.weight", f"encoder.convs.{i}.kernel"
            yield f"_encoder.rgb.{2 * i + 2}.bias", f"encoder.convs.{i}.bias"
    else:
        yield from mlp("_encoder.state", "encoder.mlp", layout.encoder_hidden, normed_head=True)
    yield from mlp("_dynamics", "dynamics", layout.hidden, normed_head=True)
    yield from mlp("_reward", "reward", layout.hidden)
    if layout.episodic:
        yield from mlp("_termination", "termination", layout.hidden)
    yield from mlp("_pi", "policy.mlp", layout.hidden)
    yield from mlp("_Qs.params", "q.members", layout.hidden)
    yield from mlp("_target_Qs_params", "target_q.members", layout.hidden)
    if layout.multitask:
        yield "_task_emb.weight", "task_embedding.table"


def _from_pytorch(array: NDArray[Any], name: str) -> NDArray[Any]:
    """A PyTorch weight in the orientation of our weight ``name``."""
    if not name.endswith("kernel"):
        return array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.swapaxes(-1, -2)


def _to_pytorch(array: NDArray[Any], name: str) -> NDArray[Any]:
    """Inverse of :func:`_from_pytorch`."""
    if name.endswith("kernel"):
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.swapaxes(-1, -2)
    return np.array(array, order="C")


def _as_buffer(number: float) -> NDArray[Any]:
    # The reference creates these buffers from its config, whose values are integers by default.
    return np.array(int(number), np.int64) if float(number).is_integer() else np.array(number, np.float32)


def _read(source: str | Path | Mapping[str, Any]) -> tuple[Arrays, str]:
    """The arrays of a file or mapping by their official names, without bookkeeping and duplicates, and their prefix."""
    if isinstance(source, Mapping):
        values: Any = source
    elif Path(source).suffix == ".npz":
        values = read_npz(source)
    else:
        # Multitask files also hold the configuration of the run, objects that are replaced by stubs.
        values = read_torch(source, stub_unknown=True)
    while isinstance(values, Mapping) and (nested := [n for n in _NESTED if isinstance(values.get(n), Mapping)]):
        values = values[nested[0]]
    if not isinstance(values, Mapping):
        what = "This" if isinstance(source, Mapping) else str(source)
        raise WeightsError(f"{what} holds a {type(values).__name__}; a mapping of names to arrays is expected.")
    if any(str(name).startswith("params/") for name in values):
        values = {name: v for name, v in values.items() if str(name).startswith("params/")}
    named = {str(name): value for name, value in values.items()}
    prefixes = {name: _PREFIXES.match(name).group() for name in named}  # type: ignore[union-attr]
    stripped = {name.removeprefix(prefixes[name]).replace("._orig_mod.", "."): name for name in named}
    if len(stripped) < len(named):
        raise WeightsError("Some weights are there twice, with and without a prefix such as module. or _orig_mod.")
    # Bookkeeping of tensordict, and duplicates of the online Q networks.
    ignored = re.compile(r"\.module\.|__|^_detach_Qs")
    arrays = {name: _array(named[full]) for name, full in stripped.items() if not ignored.search(name)}
    return arrays, next((prefixes[stripped[name]] for name in arrays), "")


def _array(value: Any) -> NDArray[Any]:
    if hasattr(value, "detach"):
        value = value.detach().cpu()  # torch.Tensor
    return np.asarray(value)


def _to_current_layout(arrays: Arrays, prefix: str) -> tuple[_FileNames, Arrays]:
    """How the file names its weights, and the arrays in the current layout."""
    file = _FileNames(prefix, _PRERELEASE_KEY in arrays, any(re.fullmatch(_FLAT_Q, name) for name in arrays))
    if file.is_prerelease:
        arrays = {_from_prerelease(name): value for name, value in arrays.items()}
    arrays = {_from_2023(name): value for name, value in arrays.items()}
    if not any(name.startswith("_target_Qs_params.") for name in arrays):
        online = [name for name in arrays if name.startswith("_Qs.params.")]
        arrays |= {name.replace("_Qs.params.", "_target_Qs_params."): arrays[name] for name in online}
    return file, arrays


def _from_prerelease(name: str) -> str:
    """The current name of a weight in the layout from before the release.

    An MLP is a Sequential of (Linear, LayerNorm, activation): module 3i is layer i, module 3i + 1 its norm. The encoder
    starts with a module without weights (symlog); the dynamics nest the Sequential and have their last norm outside.
    """
    name = re.sub(r"^_dynamics\.1\.", "_dynamics.0.7.", name)
    found = re.fullmatch(r"(_encoder\.state|_dynamics\.0|_reward|_pi|_termination)\.(\d+)\.(weight|bias)", name)
    if not found:
        return name
    module, index, leaf = found[1], int(found[2]) - (found[1] == "_encoder.state"), found[3]
    layer, is_norm = divmod(index, 3)
    return f"{module.removesuffix('.0')}.{layer}.{'ln.' if is_norm else ''}{leaf}"


def _from_2023(name: str) -> str:
    """The current name of a weight in the layout of 2023: Q networks are ``_Qs.params.{4·layer + part}``.

    The parts are weight, bias, norm weight and norm bias; the last layer has no norm.
    """
    found = re.fullmatch(_FLAT_Q, name)
    if not found:
        return name
    layer, part = divmod(int(found[2]), 4)
    prefix = "_Qs.params" if found[1] == "_Qs" else "_target_Qs_params"
    return f"{prefix}.{layer}.{_PARTS_OF_A_LAYER[part]}"


def _infer_fields(arrays: Arrays, file: _FileNames) -> dict[str, Any]:
    """Config fields that follow from names and shapes of the arrays."""

    def shape(name: str, ndim: int = 2) -> tuple[int, ...]:
        if name not in arrays:
            raise WeightsError(f"{file.of(name)} is missing: {_not_a_model(arrays, file)}")
        if arrays[name].ndim != ndim:
            raise WeightsError(f"{file.of(name)} has shape {arrays[name].shape}; {ndim} axes are expected.")
        return tuple(arrays[name].shape)

    def layers(prefix: str) -> int:
        return sum(re.fullmatch(re.escape(prefix) + r"\.\d+\.weight", name) is not None for name in arrays)

    # Hidden layers: of the reward network, or where it is missing, of the first other one that is there.
    last = next((count for name in ("_reward", "_pi", "_dynamics") if (count := layers(name))), 1) - 1
    for name in ("_reward.0.weight", "_dynamics.0.weight", "_pi.0.weight"):
        shape(name)
    members, num_bins, hidden_dim = shape(f"_Qs.params.{last}.weight", 3)
    fields: dict[str, Any] = {
        "action_dim": shape(f"_pi.{last}.weight")[0] // 2,
        "latent_dim": shape(f"_dynamics.{last}.weight")[0],
        "hidden_dim": hidden_dim,
        "mlp_layers": last,
        "num_q": members,
        "num_bins": num_bins,
        "episodic": "_termination.0.weight" in arrays,
    }
    if "_task_emb.weight" in arrays:
        fields["num_tasks"], fields["task_dim"] = shape("_task_emb.weight")
    if "_action_masks" in arrays:
        fields["action_dims"] = tuple(int(n) for n in arrays["_action_masks"].sum(-1))
    if "log_std_min" in arrays and "log_std_dif" in arrays:
        fields["log_std_min"] = float(arrays["log_std_min"])
        fields["log_std_max"] = float(arrays["log_std_min"] + arrays["log_std_dif"])
    if "_encoder.rgb.2.weight" in arrays:
        return fields | {"obs_shape": (shape("_encoder.rgb.2.weight", 4)[1], 64, 64)}
    encoder_dim, inputs = shape("_encoder.state.0.weight")
    return fields | {
        "obs_shape": (inputs - fields.get("task_dim", 0),),
        "encoder_dim": encoder_dim,
        "encoder_layers": layers("_encoder.state"),
    }


def _not_a_model(arrays: Arrays, file: _FileNames) -> str:
    """The end of a sentence: what the file holds instead of a model's weights."""
    if not any(name.startswith(("_encoder.", "_dynamics.", "_reward.", "_pi.", "_Qs.")) for name in arrays):
        found = [f"{file.prefix}{name}"[:100] for name in arrays]
        listed = ", ".join(found[:3] + ["…"] * (len(found) > 3)) or "none"
        return f"these are not the weights of a TD-MPC2 reference model; the names here: {listed}."
    return "these are not all weights of a TD-MPC2 reference model."


def _check_shapes(names: Mapping[str, str], own: Mapping[str, Any], arrays: Arrays, file: _FileNames) -> None:
    """Raise ``WeightsError`` naming the arrays that are missing, unexpected or of another shape, as the file does."""
    shapes = {official: _pytorch_shape(own[ours].shape, ours) for official, ours in names.items()}
    problems = [f"{file.of(name)} is missing" for name in shapes if name not in arrays]
    problems += [f"{file.of(name)} is unexpected" for name in arrays if name not in shapes and name not in _BUFFERS]
    problems += [
        f"{file.of(name)} has shape {arrays[name].shape}, {shape} is expected"
        for name, shape in shapes.items()
        if name in arrays and arrays[name].shape != shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise WeightsError(f"These weights do not fit together: {'; '.join(problems[:5])}{more}.")


def _pytorch_shape(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    if not name.endswith("kernel"):
        return shape
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else (*shape[:-2], shape[-1], shape[-2])
