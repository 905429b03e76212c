"""Pictures among observations: which axis holds the channels, and which sides are taken. One rule for every family."""

from __future__ import annotations

from typing import NamedTuple

from worldloom.config import check

MIN_SIDE, MAX_SIDE = 5, 256
"""Smallest and largest height and width of a picture in pixels."""


class PictureLayout(NamedTuple):
    """How the three axes of a picture are read.

    Attributes:
      height: in pixels.
      width: in pixels.
      channels: colours, stacked frames or kinds of cells.
      channels_first: whether arrays are [..., channels, height, width], not [..., height, width, channels].
    """

    height: int
    width: int
    channels: int
    channels_first: bool


def picture_layout(shape: tuple[int, ...]) -> PictureLayout:
    """The layout of a picture of ``shape``, three axes.

    Channels are the first axis where the other two alone are equal, the last one where the first two alone are, and
    otherwise the shorter of the two ends (the last one if they are equal).
    """
    first, second, third = shape
    one_pair = (first == second) != (second == third)
    channels_first = second == third if one_pair else first < third
    return PictureLayout(second, third, first, True) if channels_first else PictureLayout(first, second, third, False)


def check_sides(field: str, shape: tuple[int, ...]) -> None:
    """Raise ``ConfigError`` unless a picture of ``shape``, given as ``field``, has sides that models take."""
    height, width = picture_layout(shape)[:2]
    check(
        min(height, width) >= MIN_SIDE and max(height, width) <= MAX_SIDE,
        f"The image {field}={shape} has sides {height} × {width}; from {MIN_SIDE} × {MIN_SIDE} to {MAX_SIDE} × "
        f"{MAX_SIDE} are taken. Resize it, for example to 64 × 64: make_env(…, image_size=64), on the command line "
        "--image-size 64.",
    )
