"""Videos of an agent as GIFs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.config import check
from worldloom.errors import DataError, MissingDependencyError
from worldloom.files import atomic_file


def save_gif(
    frames: Sequence[np.ndarray], path: str | Path, *, fps: float = 25.0, max_side: int = 320, max_frames: int = 500
) -> Path:
    """Write frames as a looping GIF small enough for a README, and return its path.

    Args:
      frames: uint8 [H, W, 3] each, all of one size, as ``VectorEnv.render`` returns them.
      path: the file; its folder is created.
      fps: frames per second, in (0, 50]. GIFs store delays in hundredths of a second, and viewers slow down delays
        below two of them.
      max_side: longest side in pixels. Larger frames are downscaled; small ones (64×64) are upscaled by an integer.
      max_frames: most frames written. Longer recordings keep every k-th frame and the last one, at the same speed.

    Raises:
      DataError: there are no frames, or they are not RGB images of one size.
      ConfigError: a number is out of range.
      MissingDependencyError: Pillow is missing.
    """
    check(0 < fps <= 50, f"fps must be a number above 0 and at most 50, not {fps!r}.")
    check(max_side >= 1 and max_frames >= 1, "max_side and max_frames must be at least 1.")
    if not len(frames):
        raise DataError("There are no frames to write.")
    shapes = {np.shape(frame) for frame in frames}
    if len(shapes) > 1 or any(len(shape) != 3 or shape[2] != 3 for shape in shapes):
        raise DataError(f"Frames must all be [H, W, 3] of one size, not {sorted(shapes)}.")
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError("Videos need Pillow: pip install 'worldloom[video]'.") from error
    stride = -(-len(frames) // max_frames)
    chosen = frames[::stride]
    if chosen[-1] is not frames[-1]:
        chosen = [*chosen, frames[-1]]  # the end of the episode
    size = _size(chosen[0].shape[1], chosen[0].shape[0], max_side)
    method = Image.Resampling.LANCZOS if size[0] < chosen[0].shape[1] else Image.Resampling.NEAREST
    pictures = [Image.fromarray(np.asarray(frame, np.uint8)).resize(size, method) for frame in chosen]
    # One palette for all frames: no flicker, and pixels that do not change take no bytes.
    palette = _montage(pictures).quantize(255)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    duration = max(20, round(100 * stride / fps) * 10)  # milliseconds, a multiple of 10
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        pictures[0].save(
            file, format="GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0, optimize=True
        )
    return path


def _size(width: int, height: int, max_side: int) -> tuple[int, int]:
    """Width and height with the longest side at most ``max_side``: shrunk, or enlarged by an integer."""
    longest = max(width, height)
    scale = max_side / longest if longest > max_side else max_side // longest
    return max(1, round(width * scale)), max(1, round(height * scale))


def _montage(pictures: list[Any]) -> Any:
    """Thumbnails of up to 64 of the pictures side by side, from which the palette is chosen."""
    from PIL import Image

    some = pictures[:: -(-len(pictures) // 64)]
    width, height = (min(side, 64) for side in some[0].size)
    sheet = Image.new("RGB", (width * len(some), height))
    for index, picture in enumerate(some):
        # NEAREST: averaging would add colours that no frame has.
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (index * width, 0))
    return sheet
