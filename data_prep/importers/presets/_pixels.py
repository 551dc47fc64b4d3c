"""Pixels as the reference files of the public sets were made: Pillow's antialiased filters, in 8 bits.

Letters: H W stored size, h w the size asked for. Rounding to 8 bits is part of the rules here, so a cell that is half covered counts as foreground.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.importers.fit import FILTERS, HOW, choose, fit_image, frame, nearest_index
from fedmed.data.formats.limits import BadFile
from fedmed.data.formats.pictures import read_levels, read_picture

Size = tuple[int, int]


@dataclass(frozen=True)
class Shape:
    """How images come to the size asked for; a base of the `Params` of presets."""

    fit: str = "stretch"  # "stretch" (aspect ratio not kept), "pad" (zeros around) or "crop" (the centre)
    filter: str = "bilinear"  # of images: "bilinear" (antialiased, as Pillow does), "box", "nearest" or "bicubic"

    def __post_init__(self) -> None:
        """Check the two words."""
        choose("fit", self.fit, HOW)
        choose("filter", self.filter, tuple(FILTERS))


@dataclass(frozen=True)
class MaskedShape(Shape):
    """The same for images with a mask of two levels."""

    threshold: float = 0.5  # share of a pixel's area, in steps of 1/255, above which it is foreground, 0..1

    def __post_init__(self) -> None:
        """Check the words and the range."""
        super().__post_init__()
        if not 0.0 <= self.threshold < 1.0:
            raise ValueError(f"threshold: expected 0 <= threshold < 1, got {self.threshold}")


def colour(path: Path) -> np.ndarray:
    """Picture as (H, W, 3) uint8; a grey one has three equal channels. Raises BadFile for other depths."""
    array = _eight_bits(read_picture(path))
    return np.stack([array] * 3, axis=-1) if array.ndim == 2 else array


def grey(path: Path) -> np.ndarray:
    """Picture as (H, W) uint8; of colours the luma of ITU-R 601, which leaves equal channels as they are."""
    array = _eight_bits(read_picture(path))
    if array.ndim == 2:
        return array
    return np.asarray(Image.fromarray(array).convert("L"))


def fit_area(levels: np.ndarray, size: Size, how: str, threshold: float) -> np.ndarray:
    """Mask of two classes from levels 0..255, or 0 and 1: foreground where the area mean, rounded to 8 bits, is above threshold * 255.

    In: (H, W) integer. Out: (h, w) uint8 of 0 and 1.
    """
    scale = 255 if levels.max(initial=0) <= 1 else 1
    framed = frame(levels.astype(np.uint8) * np.uint8(scale), size, how)
    return (fit_image(framed, size, "stretch", "box") > threshold * 255).astype(np.uint8)


def masked_picture(image: Path, masks: dict[str, Path], size: Size, shape: MaskedShape) -> dict[str, np.ndarray]:
    """Arrays of a row: `image` (h, w, 3) uint8 and each of `masks` (h, w) uint8 of 0 and 1.

    A mask may be of another size than the image, in the same proportions; BadFile where they differ by more than 2 %.
    """
    pixels = colour(image)
    arrays = {"image": fit_image(pixels, size, shape.fit, shape.filter)}
    for name, path in masks.items():
        levels = read_levels(path)
        tall, wide = levels.shape[0] * pixels.shape[1], levels.shape[1] * pixels.shape[0]
        if abs(tall - wide) > 0.02 * wide:
            raise BadFile("image and mask are of different proportions")
        arrays[name] = fit_area(levels, size, shape.fit, shape.threshold)
    return arrays


def drawn_cells(marks: np.ndarray, size: Size, ignore: int) -> np.ndarray:
    """Scribble made smaller: the most frequent drawn value of the stored pixels whose corner lies in a pixel, ties to the lowest.

    In: (H, W) uint8, `ignore` where nothing is drawn. Out: (h, w) uint8, `ignore` where no stored pixel is drawn. Along an axis that grows,
    every pixel takes the value of its middle.
    """
    index = [nearest_index(old, max(old, new)) for old, new in zip(marks.shape, size, strict=True)]
    marks = marks[index[0][:, None], index[1]]
    row, column = (np.arange(old) * new // old for old, new in zip(marks.shape, size, strict=True))
    drawn = marks != ignore
    cell = (row[:, None] * size[1] + column)[drawn]
    depth = int(marks[drawn].max(initial=0)) + 1
    votes = np.bincount(cell * depth + marks[drawn], minlength=size[0] * size[1] * depth).reshape(*size, depth)
    return np.where(votes.any(axis=2), votes.argmax(axis=2), ignore).astype(np.uint8)


def _eight_bits(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8:
        raise BadFile(f"{array.dtype} pixels, expected 8 bits")
    return array
