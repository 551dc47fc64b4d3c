"""Images and masks brought to one size: first to the asked shape by `stretch`, `pad` or `crop`, then scaled by a filter or a rule.

Pure functions of one image. H, W: stored height and width; h, w: those asked for. What already has the size is given back as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from data_prep.resize import overlap

HOW = ("stretch", "pad", "crop")
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
    "bicubic": Image.Resampling.BICUBIC,
}
RULES = ("classes", "area", "majority", "nearest")
_TIE = 1e-6  # above the rounding of float32 shares, below any share that one pixel can make


@dataclass(frozen=True)
class FitImage:
    """How images come to the size of `--size`; a base of the importers' `Params`."""

    fit: str = "stretch"  # with --size: "stretch", "pad" (zeros around, to the shape asked for) or "crop" (the centre)
    filter: str = "bilinear"  # of images: "bilinear" (antialiased, Pillow), "box" (area mean), "nearest" or "bicubic"

    def __post_init__(self) -> None:
        """Check the two words."""
        choose("fit", self.fit, HOW)
        choose("filter", self.filter, tuple(FILTERS))


@dataclass(frozen=True)
class Fit(FitImage):
    """The same for images with masks."""

    mask_rule: str = "classes"  # a pixel takes the class of largest share ("classes") or of its middle ("nearest")

    def __post_init__(self) -> None:
        """Check the three words."""
        super().__post_init__()
        choose("mask_rule", self.mask_rule, ("classes", "nearest"))


def choose(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: expected {' or '.join(allowed)}, got {value!r}")


def fit_image(array: np.ndarray, size: tuple[int, int], how: str = "stretch", filter: str = "bilinear") -> np.ndarray:
    """Bring an image to a size. In: (H, W) or (H, W, C), uint8, uint16 or float; size (h, w). Out: (h, w[, C]), the same type.

    Integers are rounded; uint8 is scaled in Pillow's own fixed-point arithmetic, the other types in float32. `pad` adds zeros.
    """
    framed = frame(array, size, how)
    if framed.shape[:2] == size:
        return framed
    if framed.dtype == np.uint8 and (framed.ndim == 2 or framed.shape[2] == 3):
        return _pillow(framed, size, filter)
    if framed.ndim == 3:
        planes = [fit_image(framed[..., channel], size, "stretch", filter) for channel in range(framed.shape[2])]
        return np.stack(planes, axis=-1)
    if framed.dtype == np.uint8:
        return _pillow(framed, size, filter)
    scaled = _pillow(framed.astype(np.float32), size, filter)
    if np.issubdtype(framed.dtype, np.integer):
        limits = np.iinfo(framed.dtype)
        scaled = np.clip(np.rint(scaled), limits.min, limits.max)
    return scaled.astype(framed.dtype)


def fit_mask(
    levels: np.ndarray,
    size: tuple[int, int],
    how: str = "stretch",
    rule: str = "classes",
    *,
    threshold: float = 0.5,
    ignore: int | None = None,
    fill: int = 0,
) -> np.ndarray:
    """Bring a mask to a size. In: (H, W) integer class ids; size (h, w). Out: (h, w), the same type.

    rule: `classes`: the class with the largest share of the area of a pixel, ties to the lowest id (binary: foreground needs more than half);
    `area`: 1 where the share of everything but 0 exceeds `threshold`; `majority`: the most frequent value other than `ignore` of the stored
    pixels whose middle lies in a pixel, `ignore` where there is none (scribbles); `nearest`: the value in the middle. Where the size asked
    for is the larger one, all rules take the nearest. fill: what `pad` adds.
    """
    choose("rule", rule, RULES)
    framed = frame(levels, size, how, fill)
    if rule == "area":
        framed = (framed != 0).astype(framed.dtype)
    if framed.shape == size:
        return framed
    if rule == "nearest":
        return framed[nearest_index(framed.shape[0], size[0])[:, None], nearest_index(framed.shape[1], size[1])]
    if rule == "majority":
        return _majority(framed, size, ignore)
    if rule == "area":
        return (shares(framed != 0, size) > threshold + _TIE).astype(framed.dtype)
    return _largest(framed, size)


def frame(array: np.ndarray, size: tuple[int, int], how: str, fill: int = 0) -> np.ndarray:
    """Cut (`crop`) or fill up (`pad`) an image (H, W, ...) around its middle until it has the shape of `size`; `stretch` leaves it."""
    (height, width), (rows, columns) = array.shape[:2], frame_shape(array.shape[:2], size, how)
    top, left = abs(height - rows) // 2, abs(width - columns) // 2
    if how == "crop":
        return array[top : top + rows, left : left + columns]
    if (rows, columns) == (height, width):
        return array
    around = ((top, rows - height - top), (left, columns - width - left), *[(0, 0)] * (array.ndim - 2))
    return np.pad(array, around, constant_values=fill)


def frame_shape(shape: tuple[int, ...], size: tuple[int, int], how: str) -> tuple[int, int]:
    """Height and width of an image after `frame`."""
    choose("fit", how, HOW)
    height, width = shape[:2]
    tall = height * size[1] - width * size[0]  # > 0: too high for its width
    if how == "stretch" or tall == 0:
        return height, width
    if (how == "crop") == (tall > 0):
        return max(1, round(width * size[0] / size[1])), width
    return height, max(1, round(height * size[1] / size[0]))


def fitted_spacing(
    spacing: tuple[float, float], shape: tuple[int, ...], size: tuple[int, int] | None, how: str
) -> np.ndarray:
    """Millimetres between rows and columns (2,) float32 after an image of `shape` was brought to `size`; None: it was not."""
    framed = shape[:2] if size is None else frame_shape(shape, size, how)
    return np.array([mm * old / new for mm, old, new in zip(spacing, framed, size or framed, strict=True)], np.float32)


def shares(region: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Share of each new pixel that a region covers: (H, W) bool -> (h, w) float32; the nearest pixel along an axis that grows."""
    rows, columns = _weights(region.shape[0], size[0]), _weights(region.shape[1], size[1])
    covered: np.ndarray = rows @ region.astype(np.float32) @ columns.T
    return covered


def nearest_index(old: int, new: int) -> np.ndarray:
    """Stored pixel in the middle of each new one, (new,) int."""
    return ((2 * np.arange(new) + 1) * old) // (2 * new)


@lru_cache(maxsize=64)
def _weights(old: int, new: int) -> np.ndarray:
    if new <= old:
        return overlap(old, new).astype(np.float32)
    return np.eye(old, dtype=np.float32)[nearest_index(old, new)]


def _pillow(array: np.ndarray, size: tuple[int, int], filter: str) -> np.ndarray:
    picture = Image.fromarray(np.ascontiguousarray(array)).resize((size[1], size[0]), FILTERS[filter])
    return np.asarray(picture)


def _largest(levels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    winner = np.zeros(size, dtype=levels.dtype)
    best = np.zeros(size, dtype=np.float32)
    for value in np.flatnonzero(np.bincount(levels.ravel())):
        share = shares(levels == value, size)
        better = share > best + _TIE
        winner[better], best[better] = value, share[better]
    return winner


def _majority(levels: np.ndarray, size: tuple[int, int], ignore: int | None) -> np.ndarray:
    if size[0] > levels.shape[0] or size[1] > levels.shape[1]:
        return fit_mask(levels, size, "stretch", "nearest")
    row, column = (((2 * np.arange(old) + 1) * new) // (2 * old) for old, new in zip(levels.shape, size, strict=True))
    cell = row[:, None] * size[1] + column
    values, numbered = np.unique(levels, return_inverse=True)  # few values, however large
    drawn = np.ones(levels.shape, dtype=bool) if ignore is None else levels != ignore
    ballots = cell[drawn] * len(values) + numbered.reshape(levels.shape)[drawn]
    votes = np.bincount(ballots, minlength=size[0] * size[1] * len(values)).reshape(*size, len(values))
    chosen = values[votes.argmax(axis=2)]
    return chosen if ignore is None else np.where(votes.any(axis=2), chosen, np.array(ignore, dtype=levels.dtype))
