"""Translates observations of a Gymnasium space to the arrays that models take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from worldloom.envs.time_step import Arrays
from worldloom.errors import ConfigError, DataError
from worldloom.spaces import OBS


class _ObsLeaf(NamedTuple):
    """One array of an observation.

    Attributes:
      path: its keys in nested dict spaces.
      space: its Gymnasium space.
      shape: its shape as models take it.
      dtype: its dtype as models take it, float32 or uint8.
    """

    path: tuple[str, ...]
    space: spaces.Space[Any]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def name(self) -> str:
        return "/".join(self.path) or OBS


class ObservationSpec:
    """The arrays that models take for a Gymnasium observation space, and how observations are translated to them.

    ============================================  ===========================================================
    space                                         array
    ============================================  ===========================================================
    ``Box``, uint8, three axes                    image, kept: uint8 ``[H, W, C]`` or ``[C, H, W]``, 0–255
    ``Box``, uint8, two axes, up to 255           image with one channel, uint8 ``[H, W, 1]``
    ``Box``, float or bool, three axes, in [0,1]  image, float32
    other ``Box`` up to two axes                  vector, float32 ``[n]``
    ``Discrete``                                  one-hot, float32 ``[n]``
    ``MultiDiscrete``                             one-hots concatenated, float32
    ``MultiBinary``                               vector, float32
    ``Dict``                                      dict of the above; nested names are joined with ``/``
    ============================================  ===========================================================

    Raises ``ConfigError`` for all other spaces (``Tuple``, ``Text``, …) and for an empty dict.

    Attributes:
      shape: shape of the array, or a dict of shapes: the ``obs_shape`` of configs.
      dtype: its ``numpy.dtype``, or a dict of them.
    """

    def __init__(self, space: spaces.Space[Any]):
        self._is_dict = isinstance(space, spaces.Dict)
        self._leaves = list(_leaves(space, ()))
        if not self._leaves:
            raise ConfigError("The observation space is an empty dict; at least one array is needed.")
        shapes = {leaf.name: leaf.shape for leaf in self._leaves}
        dtypes = {leaf.name: leaf.dtype for leaf in self._leaves}
        self.shape: tuple[int, ...] | dict[str, tuple[int, ...]] = shapes if self._is_dict else shapes[OBS]
        self.dtype: np.dtype[Any] | dict[str, np.dtype[Any]] = dtypes if self._is_dict else dtypes[OBS]

    def flatten(self, obs: Any, lead: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
        """An observation of the space as ``{name: array}``; the arrays are copies.

        Args:
          obs: arrays ``[*lead, *space.shape]``, in nested dicts for dict spaces.
          lead: leading axes, such as ``(N,)`` for observations of N environments.

        Raises ``DataError`` when a name is missing or an array does not have the shape of its space.
        """
        return {leaf.name: _convert(leaf, _array_at(obs, leaf.path), lead) for leaf in self._leaves}

    def is_batch(self, obs: Any) -> bool:
        """Whether ``obs`` has a batch axis in front of the axes of its space. Raises ``DataError`` as above."""
        first = self._leaves[0]
        return _array_at(obs, first.path).ndim > len(first.space.shape or ())

    def check_values(self, obs: Any) -> None:
        """Raise ``DataError`` for what :meth:`flatten` would translate to something else without a word.

        NaN and infinity; numbers in images of uint8 that are not integers from 0 to 255; classes out of range.
        """
        for leaf in self._leaves:
            value = _array_at(obs, leaf.path)
            problem = _problem(leaf, value)
            if problem:
                raise DataError(f"The observation '{leaf.name}' {problem}")

    def unwrap(self, flat: dict[str, np.ndarray]) -> Arrays:
        """What the public interface shows: the dict itself for dict spaces, else its only array."""
        return flat if self._is_dict else flat[OBS]


def _leaves(space: spaces.Space[Any], path: tuple[str, ...]) -> Iterator[_ObsLeaf]:
    if isinstance(space, spaces.Dict):
        for key, inner in space.spaces.items():
            yield from _leaves(inner, (*path, str(key)))
        return
    vector = np.dtype(np.float32)
    if isinstance(space, spaces.Discrete):
        yield _ObsLeaf(path, space, (int(space.n),), vector)
    elif isinstance(space, spaces.MultiDiscrete):
        yield _ObsLeaf(path, space, (int(space.nvec.sum()),), vector)
    elif isinstance(space, spaces.MultiBinary):
        yield _ObsLeaf(path, space, (int(np.prod(space.shape)),), vector)
    elif isinstance(space, spaces.Box):
        yield _ObsLeaf(path, space, *_box_array(space, "/".join(path)))
    else:
        raise ConfigError(
            f"Observation space {type(space).__name__} ({'/'.join(path) or 'the whole observation'}) is not supported; "
            "use Box, Discrete, MultiDiscrete, MultiBinary or a Dict of these "
            "(an ObservationWrapper can turn a Tuple into a Dict)."
        )


def _array_at(obs: Any, path: tuple[str, ...]) -> np.ndarray:
    """The array at ``path`` in nested dicts."""
    for key in path:
        try:
            obs = obs[key]
        except (KeyError, IndexError, TypeError, ValueError):
            found = sorted(map(str, obs)) if isinstance(obs, Mapping) else f"a {type(obs).__name__}"
            raise DataError(
                f"The observation has no '{'/'.join(path)}': where '{key}' should be, there is {found}."
            ) from None
    if isinstance(obs, Mapping):
        raise DataError(f"The observation '{'/'.join(path) or OBS}' is a dict; its space is a single array.")
    try:
        array = np.asarray(obs)
    except ValueError as error:  # Sequences of different lengths.
        raise DataError(f"The observation '{'/'.join(path) or OBS}' is no array of numbers: {error}.") from None
    if array.dtype.kind in "OUSM":
        raise DataError(f"The observation '{'/'.join(path) or OBS}' has dtype {array.dtype}; numbers are needed.")
    return array


def _problem(leaf: _ObsLeaf, value: np.ndarray) -> str:
    """What is wrong with the numbers of one array, as the end of a sentence; empty if nothing is."""
    if value.dtype == leaf.dtype == np.uint8:
        return ""
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        return "is NaN or infinite. Nothing was computed; the state of the policy is as before."
    if leaf.dtype == np.uint8 and ((value < 0) | (value > 255) | (value != np.floor(value))).any():
        return (
            f"is an image of dtype {value.dtype} with values from {value.min():g} to {value.max():g}; its space says "
            "integers from 0 to 255."
        )
    if leaf.dtype != np.uint8 and len(leaf.shape) == 3 and ((value < 0) | (value > 1)).any():
        return f"is an image with values from {value.min():g} to {value.max():g}; floats from 0 to 1 are needed."
    if isinstance(leaf.space, spaces.Discrete | spaces.MultiDiscrete):
        size = leaf.space.n if isinstance(leaf.space, spaces.Discrete) else leaf.space.nvec
        index = value - leaf.space.start
        if ((index < 0) | (index >= size) | (index != np.floor(index))).any():
            return f"holds {value.tolist()!r:.80}, which is not in {leaf.space}."
    return ""


def _box_array(space: spaces.Box, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of the array for a Box, as in the table of :class:`ObservationSpec`."""
    axes = len(space.shape)
    if space.dtype == np.uint8 and axes == 3:
        return space.shape, np.dtype(np.uint8)
    if space.dtype == np.uint8 and axes == 2 and space.high.max(initial=0) == 255:
        return (*space.shape, 1), np.dtype(np.uint8)
    if axes <= 2:
        return (int(np.prod(space.shape)),), np.dtype(np.float32)
    if axes == 3 and space.low.min() >= 0 and space.high.max() <= 1:
        return space.shape, np.dtype(np.float32)
    raise ConfigError(
        f"Observation {name + ' ' if name else ''}has shape {space.shape}, dtype {space.dtype} and bounds "
        f"[{space.low.min():g}, {space.high.max():g}]; images need three axes and uint8 (0–255) or floats in [0, 1], "
        "vectors at most two axes. Convert it in an ObservationWrapper."
    )


def _convert(leaf: _ObsLeaf, value: np.ndarray, lead: tuple[int, ...]) -> np.ndarray:
    """``value`` ``[*lead, *space.shape]`` as a new array ``[*lead, *leaf.shape]`` of the leaf's dtype."""
    expected = lead + (leaf.space.shape or ())
    if value.shape != expected:
        raise DataError(
            f"The environment returned an observation '{leaf.name}' of shape {value.shape}; its space says {expected}."
        )
    if isinstance(leaf.space, spaces.Discrete):
        return _one_hot(value - leaf.space.start, int(leaf.space.n))
    if isinstance(leaf.space, spaces.MultiDiscrete):
        classes = (value - leaf.space.start).reshape(*lead, -1)
        sizes = leaf.space.nvec.ravel()
        return np.concatenate([_one_hot(classes[..., i], int(n)) for i, n in enumerate(sizes)], -1)
    return np.array(value, leaf.dtype).reshape(lead + leaf.shape)


def _one_hot(classes: np.ndarray, size: int) -> np.ndarray:
    """Classes ``[...]`` as float32 ``[..., size]``."""
    return (np.asarray(classes)[..., None] == np.arange(size)).astype(np.float32)
