"""Gymnasium wrappers: action repeat, image size, frame stacking."""

from __future__ import annotations

import collections
import functools
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from worldloom.errors import ConfigError


class ActionRepeat(gym.Wrapper[Any, Any, Any, Any]):
    """Takes each action ``repeat`` times and sums the rewards; stops early when the episode ends."""

    def __init__(self, env: gym.Env[Any, Any], repeat: int):
        super().__init__(env)
        self.repeat = repeat

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Returns the observation, flags and info of the last repeat, and the sum of the rewards."""
        total = 0.0
        for _ in range(self.repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


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
            return resize(observation, self._size)
        return {**observation, **{key: resize(observation[key], self._size) for key in self._keys}}


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
        self._frames.extend([_channel_first(image)] * (self._frames.maxlen or 1))
        return self._stacked(), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step and push its image."""
        image, reward, terminated, truncated, info = self.env.step(action)
        self._frames.append(_channel_first(image))
        return self._stacked(), reward, terminated, truncated, info

    def _stacked(self) -> np.ndarray:
        return np.concatenate(list(self._frames))


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


def _channel_first(image: np.ndarray) -> np.ndarray:
    """``[C, H, W]``, as a copy: an environment may render its next frame into the same array."""
    return np.ascontiguousarray(image.transpose(2, 0, 1)).copy()
