"""Shrinking by area: images by area mean, masks by the class that covers most of a cell, scribbles by what is drawn."""

from __future__ import annotations

import numpy as np

from fedmed.errors import UserError

_BLOCK = 64  # images at a time, bounds the float copy


def overlap(size: int, new_size: int) -> np.ndarray:
    """Share of each new cell taken by each old pixel along one axis: (new_size, size) float64, rows sum to 1.

    new_size may divide size or not; UserError when it is larger (area averaging only shrinks).
    """
    if not 0 < new_size <= size:
        raise UserError(f"data.resize: images are {size} pixels wide or high, so expected 1..{size}, got {new_size}.")
    edges = np.arange(new_size + 1) * (size / new_size)
    low = np.maximum(edges[:-1, None], np.arange(size)[None, :])
    high = np.minimum(edges[1:, None], np.arange(1, size + 1)[None, :])
    shares: np.ndarray = np.clip(high - low, 0.0, None) * (new_size / size)
    return shares


def area_mean(values: np.ndarray, new_size: int) -> np.ndarray:
    """Area mean of a stack: (N, H, W) or (N, H, W, channels), any real dtype -> float32 of new_size x new_size."""
    rows, columns = (overlap(size, new_size).astype(np.float32) for size in values.shape[1:3])
    stack = values.reshape(*values.shape[:3], -1).astype(np.float32)
    shrunk: np.ndarray = np.einsum("rh,nhwc,qw->nrqc", rows, stack, columns, optimize=True)
    return shrunk.reshape(len(values), new_size, new_size, *values.shape[3:])


def resize_images(images: np.ndarray, new_size: int) -> np.ndarray:
    """Area mean in the dtype of the input (integers rounded): (N, H, W[, channels]) -> (N, new, new[, channels])."""
    out = np.empty((len(images), new_size, new_size, *images.shape[3:]), dtype=images.dtype)
    for first in range(0, len(images), _BLOCK):
        mean = area_mean(images[first : first + _BLOCK], new_size)
        out[first : first + _BLOCK] = np.rint(mean) if np.issubdtype(images.dtype, np.integer) else mean
    return out


def resize_classes(masks: np.ndarray, new_size: int, ignore: int | None = None) -> np.ndarray:
    """Class with the largest share of each cell; ties go to the lowest id (binary: foreground needs more than half).

    In: masks (N, H, W) integer class ids; ignore: a value that counts only where nothing else is drawn (scribbles).
    Out: (N, new, new), same dtype.
    """
    out = np.empty((len(masks), new_size, new_size), dtype=masks.dtype)
    labels = np.unique(masks)
    drawn = labels if ignore is None else labels[labels != ignore]
    for first in range(0, len(masks), _BLOCK):
        block = masks[first : first + _BLOCK]
        best = np.full(out[first : first + _BLOCK].shape, 1e-6, dtype=np.float32)  # above float noise, below any pixel
        winner = np.full(best.shape, 0 if ignore is None else ignore, dtype=masks.dtype)
        for label in drawn:
            share = area_mean(block == label, new_size)
            better = share > best + 1e-6
            winner[better], best[better] = label, share[better]
        out[first : first + _BLOCK] = winner
    return out
