"""Gymnasium wrappers: action repeat, image size, frame stacking."""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from worldloom.envs.backends.base import index_nested
from worldloom.envs.contract import read_step
from worldloom.errors import ConfigError, DataError, EnvContractError
from worldloom.spaces import OBS
from worldloom.spaces.joined import JoinedActions
from worldloom.spaces.leaves import value_at
from worldloom.spaces.narrow import bound_actions, drop_entries, drop_observations
from worldloom.spaces.observations import ObservationSpec


class ActionRepeat(gym.Wrapper[Any, Any, Any, Any]):
    """Takes each action ``repeat`` times and sums the rewards; stops early when the episode ends."""

    def __init__(self, env: gym.Env[Any, Any], repeat: int):
        super().__init__(env)
        self.repeat = repeat

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Returns the observation, flags and info of the last repeat, and the sum of the rewards."""
        total = 0.0
        for _ in range(self.repeat):
            # Before rewards are summed and flags are asked: a text such as "False" would count as true.
            obs, reward, terminated, truncated, info = read_step(self.env.step(action))
            total += reward
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, dict(info)


class DropKeys(gym.ObservationWrapper[Any, Any, Any]):
    """Leaves entries out of dict and tuple observations; names and errors as in ``drop_observations``."""

    def __init__(self, env: gym.Env[Any, Any], keys: Sequence[str]):
        super().__init__(env)
        self._keys = frozenset(keys)
        self.observation_space = drop_observations(env.observation_space, keys)

    def observation(self, observation: Any) -> Any:
        """The observation without them."""
        return drop_entries(observation, self._keys)


class BoundActions(gym.Wrapper[Any, Any, Any, Any]):
    """Narrows the bounds of the action space, to which actions are scaled; errors as in ``bound_actions``."""

    def __init__(self, env: gym.Env[Any, Any], bounds: tuple[float, float]):
        super().__init__(env)
        self.action_space = bound_actions(env.action_space, bounds)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode; the environment's own action space is seeded like the narrower one."""
        self.env.action_space.seed(seed)
        return self.env.reset(seed=seed, options=options)


class JoinActions(gym.ActionWrapper[Any, Any, Any]):
    """Takes one action in place of several; errors as in ``JoinedActions``."""

    def __init__(self, env: gym.Env[Any, Any]):
        super().__init__(env)
        self._joined = JoinedActions(env.action_space)
        self.action_space = self._joined.space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode; the environment's own action space is seeded like the joined one."""
        self.env.action_space.seed(seed)
        return self.env.reset(seed=seed, options=options)

    def action(self, action: Any) -> Any:
        """The actions of the environment."""
        return index_nested(self._joined.split(np.asarray(action)[None]), 0)


class ResizeImages(gym.ObservationWrapper[Any, Any, Any]):
    """Resizes every image (uint8 ``[H, W, C]``, C of 1, 3 or 4) of the observation to ``[size, size, C]``.

    The observation is one image or a dict (not nested) that holds images. Raises ``ConfigError`` if there is none.
    """

    def __init__(self, env: gym.Env[Any, Any], size: int):
        super().__init__(env)
        self._size = size
        inner = env.observation_space
        self._is_single = _is_image(inner)
        members = dict(inner.spaces) if isinstance(inner, spaces.Dict) else {}
        self._keys = [key for key, space in members.items() if _is_image(space)]
        if not self._is_single and not self._keys:
            raise ConfigError(f"image_size={size} was given, but {inner} holds no uint8 image [H, W, C] to resize.")
        members |= {key: _resized_space(members[key], size) for key in self._keys}
        self.observation_space = _resized_space(inner, size) if self._is_single else spaces.Dict(members)

    def observation(self, observation: Any) -> Any:
        """The observation with its images resized."""
        if self._is_single:
            return resize(checked_image(observation, self.env.observation_space, OBS), self._size)
        inner: Any = self.env.observation_space
        images = {
            key: checked_image(value_at(observation, (key,), "observation"), inner[key], key) for key in self._keys
        }
        return {**observation, **{key: resize(image, self._size) for key, image in images.items()}}


class FrameStack(gym.Wrapper[Any, Any, Any, Any]):
    """Stacks the last ``frames`` images (uint8 ``[H, W, C]``), oldest first, channel-first: ``[frames·C, H, W]``.

    At the start of an episode all of them are its first image. TD-MPC2 from pixels stacks three (its
    ``envs/wrappers/pixels.py``). Raises ``ConfigError`` unless the observation is a single image.
    """

    def __init__(self, env: gym.Env[Any, Any], frames: int):
        super().__init__(env)
        if not _is_image(env.observation_space):
            raise ConfigError(f"frame_stack={frames} needs one uint8 image [H, W, C], not {env.observation_space}.")
        height, width, channels = env.observation_space.shape or ()
        self.observation_space = spaces.Box(0, 255, (frames * channels, height, width), np.uint8)
        self._frames: collections.deque[np.ndarray] = collections.deque(maxlen=frames)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode and fill the stack with its first image."""
        image, info = self.env.reset(seed=seed, options=options)
        self._frames.extend([self._channel_first(image)] * (self._frames.maxlen or 1))
        return self._stacked(), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step and push its image."""
        image, reward, terminated, truncated, info = self.env.step(action)
        self._frames.append(self._channel_first(image))
        return self._stacked(), reward, terminated, truncated, info

    def _stacked(self) -> np.ndarray:
        return np.concatenate(list(self._frames))

    def _channel_first(self, image: Any) -> np.ndarray:
        """``[C, H, W]``, as a copy: an environment may render its next frame into the same array."""
        checked = checked_image(image, self.env.observation_space, OBS)
        return np.ascontiguousarray(checked.transpose(2, 0, 1)).copy()


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """``image`` uint8 [H, W, C] resized to [size, size, C] by an antialiased triangle filter (Pillow's ``BILINEAR``).

    Values differ from Pillow's by at most 1.
    """
    (rows, row_weights), (columns, column_weights) = _taps(image.shape[0], size), _taps(image.shape[1], size)
    # `einsum` without `optimize` loops in C; matrix products would start BLAS threads, which slow down the training.
    flat = image.reshape(image.shape[0], -1).astype(np.float32)
    shorter = np.einsum("ut,utx->ux", row_weights, flat[rows]).reshape(size, *image.shape[1:])
    resized = np.einsum("vt,uvtc->uvc", column_weights, shorter[:, columns])
    return np.clip(np.rint(resized), 0, 255).astype(np.uint8)


@functools.cache
def _taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Input indices int64 and weights float32 [new, taps] of each output pixel, along one axis of length ``old``.

    The triangle around an output pixel reaches one output pixel to either side, and at least one input pixel when
    enlarging. Each row of weights sums to 1.
    """
    scale = old / new
    reach = max(scale, 1.0)
    centers = (np.arange(new)[:, None] + 0.5) * scale
    index = np.floor(centers - reach).astype(np.int64) + np.arange(int(np.ceil(2 * reach)) + 1)
    # Inputs beyond the image's edge get no weight.
    weights = np.maximum(0.0, 1.0 - np.abs(index + 0.5 - centers) / reach) * ((index >= 0) & (index < old))
    return index.clip(0, old - 1), (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _is_image(space: spaces.Space[Any]) -> bool:
    return (
        isinstance(space, spaces.Box)
        and space.dtype == np.uint8
        and len(space.shape) == 3
        and space.shape[-1] in (1, 3, 4)
    )


def _resized_space(space: spaces.Space[Any], size: int) -> spaces.Box:
    return spaces.Box(0, 255, (size, size, (space.shape or ())[-1]), np.uint8)


def checked_image(image: Any, space: spaces.Space[Any], name: str) -> np.ndarray:
    """``image`` as uint8. Raises ``EnvContractError`` for other values than those of ``space``, an image's."""
    array = np.asarray(image)
    if array.dtype == np.uint8 and array.shape == space.shape:
        return array
    try:
        return ObservationSpec(space).flatten(image)[OBS]
    except DataError as error:
        raise EnvContractError(f"An image '{name}' is not as its space says. {error}") from error
