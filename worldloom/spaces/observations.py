"""Translates observations of a Gymnasium space to the arrays that models take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from gymnasium import spaces

from worldloom.errors import ConfigError, DataError
from worldloom.spaces import OBS
from worldloom.spaces.leaves import Arrays, Path, as_numbers, check_names, describe, leaf_name, space_leaves, value_at

_Kind = Literal["vector", "integers", "image", "unit image", "class", "classes", "bits"]

_UINT8, _FLOAT32 = np.dtype(np.uint8), np.dtype(np.float32)
_ROUNDING = 1e-6
"""How far rounding may take a float image beyond 0 and 1; replay allows as much."""


class _ObsLeaf(NamedTuple):
    """One array of an observation.

    Attributes:
      path: its keys and indices in nested spaces.
      name: the parts of the path joined.
      space: its Gymnasium space.
      native_shape: its shape in the environment.
      shape: its shape as models take it.
      dtype: its dtype as models take it, float32 or uint8.
      kind: which rule translates and checks it.
    """

    path: Path
    name: str
    space: Any
    native_shape: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    kind: _Kind


class ObservationSpec:
    """The arrays that models take for a Gymnasium observation space, and how observations are translated to them.

    ==============================================  =========================================================
    space                                           array
    ==============================================  =========================================================
    ``Box`` of integers, three axes, in [0, 255]    image, uint8 ``[H, W, C]`` or ``[C, H, W]``, 0–255
    ``Box``, uint8, two axes, up to 255             image with one channel, uint8 ``[H, W, 1]``
    ``Box`` of any dtype, three axes, in [0, 1]     image, float32
    other ``Box`` up to two axes                    vector, float32 ``[n]``; matrices are flattened
    ``Discrete``                                    one-hot, float32 ``[n]``
    ``MultiDiscrete``                               one-hots concatenated, float32
    ``MultiBinary``                                 vector, float32
    ``Dict``                                        dict of the above; nested names are joined with ``/``
    ``Tuple``                                       dict of the above with the names ``0``, ``1``, …
    ==============================================  =========================================================

    Raises ``ConfigError`` for all other spaces (``Text``, ``Graph``, …), which ``drop_keys`` leaves out, for an empty
    dict, and where two arrays would have the same name.

    Attributes:
      shape: shape of the array, or a dict of shapes: the ``obs_shape`` of configs.
      dtype: its ``numpy.dtype``, or a dict of them.
    """

    def __init__(self, space: spaces.Space[Any]):
        self._space = space
        self._is_dict = isinstance(space, spaces.Dict | spaces.Tuple)
        self._leaves = list(_leaves(space))
        if not self._leaves:
            raise ConfigError("The observation space is an empty dict; at least one array is needed.")
        check_names([leaf.name for leaf in self._leaves], "observations")
        first = self._leaves[0]
        is_plain = not self._is_dict and first.kind == "vector" and first.native_shape == first.shape
        self._plain_shape = first.shape if is_plain else None
        shapes = {leaf.name: leaf.shape for leaf in self._leaves}
        dtypes = {leaf.name: leaf.dtype for leaf in self._leaves}
        self.shape: tuple[int, ...] | dict[str, tuple[int, ...]] = shapes if self._is_dict else shapes[OBS]
        self.dtype: np.dtype[Any] | dict[str, np.dtype[Any]] = dtypes if self._is_dict else dtypes[OBS]

    @property
    def leaves(self) -> list[_ObsLeaf]:
        """The single arrays of the space, in its order."""
        return list(self._leaves)

    def flatten(self, obs: Any, lead: tuple[int, ...] = (), *, any_dtype: bool = False) -> dict[str, np.ndarray]:
        """An observation of the space as ``{name: array}``; the arrays are copies. NaN and infinity pass.

        Args:
          obs: arrays ``[*lead, *space.shape]``, in nested dicts and tuples where the space is one.
          lead: leading axes, such as ``(N,)`` for observations of N environments.
          any_dtype: whether images of uint8 may be given as floats that are whole numbers.

        Raises ``DataError`` when an entry is missing, an array does not have the shape of its space, or its numbers
        would be translated to something else without a word: floats or numbers beyond 0–255 in an image of uint8,
        floats beyond 0–1 in one of floats, classes that there are not, fractions where the space has integers. The
        bounds of a vector of floats are not checked, because nothing depends on them.
        """
        if type(obs) is np.ndarray and obs.shape == self._plain_shape and obs.dtype == _FLOAT32 and not lead:
            return {OBS: obs.copy()}  # The usual case, at every step: nothing is left to check.
        return {leaf.name: _convert(leaf, _array_at(obs, leaf), lead, any_dtype) for leaf in self._leaves}

    def is_batch(self, obs: Any) -> bool:
        """Whether ``obs`` has a batch axis in front of the axes of its space. Raises ``DataError`` as above."""
        first = self._leaves[0]
        return _array_at(obs, first).ndim > len(first.native_shape)

    def count(self, obs: Any) -> int:
        """Length of the first axis of observations with a leading axis. Raises ``DataError`` if there is none."""
        first = _array_at(obs, self._leaves[0])
        if first.ndim == 0:
            raise DataError(f"The observations '{self._leaves[0].name}' are a single number.")
        return len(first)

    def share_memory(self, obs: Any, other: Any) -> bool:
        """Whether an array of ``obs`` lies in the memory of the same one of ``other``."""
        pairs = ((value_at(obs, leaf.path, OBS), value_at(other, leaf.path, OBS)) for leaf in self._leaves)
        return any(isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and np.shares_memory(a, b) for a, b in pairs)

    def check_finite(self, flat: Mapping[str, np.ndarray]) -> None:
        """Raise ``DataError`` for NaN and infinity in what :meth:`flatten` returned."""
        for name, value in flat.items():
            if value.dtype != np.uint8 and not np.isfinite(value).all():
                raise DataError(f"The observation '{name}' is NaN or infinite.")

    def check_keys(self, obs: Any) -> None:
        """Raise ``DataError`` where ``obs`` has entries, in dicts or tuples, that its space does not have."""
        _check_keys(self._space, obs, ())

    def unwrap(self, flat: dict[str, np.ndarray]) -> Arrays:
        """What the public interface shows: the dict itself for dict and tuple spaces, else its only array."""
        return flat if self._is_dict else flat[OBS]


def _leaves(space: spaces.Space[Any]) -> Iterator[_ObsLeaf]:
    for path, inner in space_leaves(space):
        name = leaf_name(path, OBS)
        native = tuple(inner.shape or ())
        if isinstance(inner, spaces.Discrete):
            yield _ObsLeaf(path, name, inner, native, (int(inner.n),), _FLOAT32, "class")
        elif isinstance(inner, spaces.MultiDiscrete):
            yield _ObsLeaf(path, name, inner, native, (int(inner.nvec.sum()),), _FLOAT32, "classes")
        elif isinstance(inner, spaces.MultiBinary):
            yield _ObsLeaf(path, name, inner, native, (math.prod(native),), _FLOAT32, "bits")
        elif isinstance(inner, spaces.Box):
            yield _ObsLeaf(path, name, inner, native, *_box_array(inner, leaf_name(path, "")))
        else:
            where = f"'{name}'" if path else "the whole observation"
            leave_out = (
                f"leave it out: drop_keys=['{name}'] in make_env and from_minari, --drop-keys {name} on the command "
                "line; or convert it in an ObservationWrapper"
                if path
                else "convert it in an ObservationWrapper"
            )
            raise ConfigError(
                f"Observation space {type(inner).__name__} ({where}) is not supported; {leave_out}. Models take Box, "
                "Discrete, MultiDiscrete and MultiBinary, and Dict and Tuple of these."
            )


def _box_array(space: spaces.Box, name: str) -> tuple[tuple[int, ...], np.dtype[Any], _Kind]:
    """Shape, dtype and kind of the array for a Box, as in the table of :class:`ObservationSpec`."""
    axes, integers = len(space.shape), np.dtype(space.dtype).kind in "iu"
    if 0 in space.shape:
        raise ConfigError(f"Observation {name + ' ' if name else ''}has shape {space.shape}: it holds no number.")
    low, high = float(space.low.min()), float(space.high.max())
    if axes == 3 and low >= 0 and high <= 1:
        return space.shape, _FLOAT32, "unit image"
    if axes == 3 and integers and low >= 0 and high <= 255:
        return space.shape, _UINT8, "image"
    if axes == 2 and space.dtype == np.uint8 and high == 255:
        return (*space.shape, 1), _UINT8, "image"
    if axes <= 2:
        return (math.prod(space.shape),), _FLOAT32, "vector" if np.dtype(space.dtype).kind == "f" else "integers"
    raise ConfigError(
        f"Observation {name + ' ' if name else ''}has shape {space.shape}, dtype {space.dtype} and bounds "
        f"[{low:g}, {high:g}]; images need three axes and integers in [0, 255] or numbers in [0, 1], vectors at most "
        "two axes. Convert it in an ObservationWrapper."
    )


def _array_at(obs: Any, leaf: _ObsLeaf) -> np.ndarray:
    return as_numbers(value_at(obs, leaf.path, "observation"), leaf.name, "observation")


def _check_keys(space: spaces.Space[Any], obs: Any, path: Path) -> None:
    if isinstance(space, spaces.Dict):
        if not isinstance(obs, Mapping):
            raise DataError(f"The observation '{leaf_name(path, OBS)}' is {describe(obs)}; its space is a dict.")
        unknown = [key for key in obs if key not in space.spaces]
        if unknown:
            raise DataError(
                f"The observation has '{leaf_name((*path, unknown[0]), OBS)}', which its space does not have: it says "
                f"{sorted(map(str, space.spaces))}. Add it to the space, or leave it out of the observation."
            )
        for key, inner in space.spaces.items():
            _check_keys(inner, obs.get(key), (*path, key))
    elif isinstance(space, spaces.Tuple):
        if not isinstance(obs, tuple | list) or len(obs) != len(space.spaces):
            raise DataError(
                f"The observation '{leaf_name(path, OBS)}' is {describe(obs)}; its space is a tuple of "
                f"{len(space.spaces)}."
            )
        for i, inner in enumerate(space.spaces):
            _check_keys(inner, obs[i], (*path, i))


def _convert(leaf: _ObsLeaf, value: np.ndarray, lead: tuple[int, ...], any_dtype: bool) -> np.ndarray:
    """``value`` ``[*lead, *space.shape]`` as a new array ``[*lead, *leaf.shape]`` of the leaf's dtype."""
    expected = lead + leaf.native_shape
    if value.shape != expected:
        raise DataError(f"The observation '{leaf.name}' has shape {value.shape}; its space says {expected}.")
    kind = leaf.kind
    if kind == "vector":
        return _cast(value).reshape(lead + leaf.shape)
    if kind in ("class", "classes"):
        return _one_hots(leaf, value, lead)
    if kind == "image" and value.dtype != np.uint8:
        whole = value.dtype.kind in "iu" or (any_dtype and bool((value == np.floor(value)).all()))
        if not whole:
            raise DataError(
                f"The observation '{leaf.name}' is an image of dtype {value.dtype} with values from {value.min():g} to "
                f"{value.max():g}; its space says integers from 0 to 255. Return uint8, or declare a Box from 0 to 1 "
                "with dtype float32."
            )
        _check_range(leaf, value, 0, 255, "integers from 0 to 255")
    elif kind == "unit image":
        _check_range(leaf, value, -_ROUNDING, 1 + _ROUNDING, "floats from 0 to 1")
    elif kind == "bits":
        if value.dtype != np.bool_:
            _check_range(leaf, value, 0, 1, "0 or 1")
            _check_whole(leaf, value)
    elif kind == "integers" and value.dtype != np.bool_:
        _check_range(leaf, value, leaf.space.low, leaf.space.high, f"{leaf.space}")
        _check_whole(leaf, value)
    return np.array(value, leaf.dtype).reshape(lead + leaf.shape)


def _cast(value: np.ndarray) -> np.ndarray:
    """A copy as float32; what is too large for it becomes infinite, which callers refuse."""
    if value.dtype == np.float32 or value.dtype.kind != "f":
        return np.array(value, np.float32)
    with np.errstate(over="ignore"):
        return value.astype(np.float32)


def _check_range(leaf: _ObsLeaf, value: np.ndarray, low: Any, high: Any, allowed: str) -> None:
    """Raise ``DataError`` for numbers outside of [low, high]; NaN passes."""
    outside = (value < low) | (value > high)
    if outside.any():
        raise DataError(f"The observation '{leaf.name}' holds {value[outside].flat[0]:g}; its space says {allowed}.")


def _check_whole(leaf: _ObsLeaf, value: np.ndarray) -> None:
    if value.dtype.kind != "f":
        return
    fractions = np.isfinite(value) & (value != np.floor(value))
    if fractions.any():
        raise DataError(
            f"The observation '{leaf.name}' holds {value[fractions].flat[0]:g}; its space {leaf.space} says integers."
        )


def _one_hots(leaf: _ObsLeaf, value: np.ndarray, lead: tuple[int, ...]) -> np.ndarray:
    """Classes ``[*lead, *space.shape]`` as float32 ``[*lead, n]``, for several classes concatenated."""
    space = leaf.space
    if leaf.kind == "class":
        index, sizes = (value - space.start)[..., None], [int(space.n)]
    else:
        index, sizes = (value - space.start).reshape(*lead, -1), [int(n) for n in space.nvec.ravel()]
    one_hots = [index[..., i, None] == np.arange(n) for i, n in enumerate(sizes)]
    result = np.concatenate(one_hots, -1, dtype=np.float32) if len(one_hots) > 1 else one_hots[0].astype(np.float32)
    # A class that there is not, or a fraction, equals no number of a class.
    if result.sum() != index.size:
        wrong = ~np.stack([one_hot.any(-1) for one_hot in one_hots], -1).reshape(value.shape)
        raise DataError(f"The observation '{leaf.name}' holds {value[wrong].flat[0]:g}, which is not in {space}.")
    return result
