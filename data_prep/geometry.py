"""Raster geometry: external border, local normals, polygon filling, overlap. Coordinates are (row, column)."""

from __future__ import annotations

import numpy as np

# The eight neighbours, counter-clockwise on the screen (rows grow downwards), from the east.
_TURNS = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))
_WEST = 4


def external_border(mask: np.ndarray) -> np.ndarray:
    """Outer border of the 8-connected object that owns the first set pixel in reading order.

    In: mask (H, W), non-zero = object. Out: (L, 2) int64 (row, column), every border pixel, from the first set pixel
    counter-clockwise on the screen; thin parts are visited once per side. Empty mask: (0, 2); single pixel: (1, 2).
    Border following of Suzuki and Abe (1985), outer border only.
    """
    height, width = mask.shape
    padded = np.zeros((height + 2, width + 2), dtype=np.uint8)
    padded[1:-1, 1:-1] = mask != 0
    pixels, stride = padded.tobytes(), width + 2
    start = pixels.find(1)
    if start < 0:
        return np.empty((0, 2), dtype=np.int64)
    steps = [row * stride + column for row, column in _TURNS]
    # clockwise from the west (which is background): the first neighbour found closes the loop in the end
    last_turn = next((turn % 8 for turn in range(_WEST + 7, _WEST, -1) if pixels[start + steps[turn % 8]]), None)
    if last_turn is None:
        return np.array([[start // stride - 1, start % stride - 1]], dtype=np.int64)
    last = start + steps[last_turn]
    path = []
    here, turn = start, last_turn
    while True:
        path.append(here)
        turn += 1  # counter-clockwise, from just after the pixel we came from
        while not pixels[here + steps[turn % 8]]:
            turn += 1
        following = here + steps[turn % 8]
        if following == start and here == last:
            break
        here, turn = following, (turn + 4) % 8
    flat = np.array(path, dtype=np.int64)
    return np.stack([flat // stride - 1, flat % stride - 1], axis=1)


def border_normals(border: np.ndarray, half_window: int) -> np.ndarray:
    """Unit normals of a closed border from least-squares lines through each pixel's 2w+1 cyclic neighbours.

    In: border (L, 2), L >= 1; half_window w >= 1. Out: (L, 2) float64 (row, column), side undetermined.
    kappa = d column / d row of the line (column on row; row on column and inverted with 1e-9 added where the rows
    have fewer distinct values); normal ~ (1, -1/kappa); (0, 1) where kappa = 0 or |1/kappa| >= 20 (FedA3I).
    """
    length = len(border)
    window = (np.arange(length)[:, None] + np.arange(-half_window, half_window + 1)[None, :]) % length
    rows, columns = border[window, 0].astype(np.float64), border[window, 1].astype(np.float64)
    by_column = _num_distinct(rows) < _num_distinct(columns)
    rows -= rows.mean(axis=1, keepdims=True)
    columns -= columns.mean(axis=1, keepdims=True)
    mixed = (rows * columns).sum(axis=1)
    base = np.where(by_column, (columns**2).sum(axis=1), (rows**2).sum(axis=1))
    slope = mixed / np.where(base > 0, base, 1.0)  # base 0: all neighbours are one pixel, slope 0
    slope[np.abs(slope) < 1e-12] = 0.0
    kappa = np.where(by_column, 1.0 / (slope + 1e-9), slope)
    across = np.divide(-1.0, kappa, out=np.full(length, np.inf), where=kappa != 0)
    steep = np.abs(across) >= 20
    across[steep] = 0.0
    normal: np.ndarray = np.stack([np.ones(length), across], axis=1) / np.sqrt(1.0 + across**2)[:, None]
    normal[steep] = (0.0, 1.0)
    return normal


def fill_polygon(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre lies inside a closed polygon (even-odd rule), united with its rasterised edges.

    In: points (P, 2) int (row, column) inside the image; shape (H, W). Out: (H, W) bool. P = 0: nothing.
    """
    height, width = shape
    crossings = np.zeros((height, width + 1), dtype=np.int64)
    following = np.roll(points, -1, axis=0)
    downwards = (points[:, 0] <= following[:, 0])[:, None]
    top, bottom = np.where(downwards, points, following), np.where(downwards, following, points)
    spans = bottom[:, 0] - top[:, 0]  # an edge crosses the rows [top, bottom), so that a shared corner counts once
    edge, step = _repeat_steps(spans)
    if len(edge):
        column = top[edge, 1] + step * (bottom[edge, 1] - top[edge, 1]) / spans[edge]
        np.add.at(crossings, (top[edge, 0] + step, np.ceil(column).astype(np.int64)), 1)
    inside: np.ndarray = (np.cumsum(crossings[:, :width], axis=1) % 2).astype(bool)
    pixels = np.abs(following - points).max(axis=1, initial=0)
    edge, step = _repeat_steps(np.maximum(pixels, 1))
    outline = points[edge] + step[:, None] * (following - points)[edge] / np.maximum(pixels, 1)[edge, None]
    rows, columns = np.floor(outline + 0.5).astype(np.int64).T
    inside[rows, columns] = True
    return inside


def mask_dice(first: np.ndarray, second: np.ndarray) -> float:
    """Mean Dice over the foreground classes found in either mask (H, W): 0..1; two empty masks: 1."""
    labels = np.union1d(np.unique(first), np.unique(second))
    scores = []
    for label in labels[labels != 0]:
        one, two = first == label, second == label
        scores.append(2.0 * (one & two).sum() / (one.sum() + two.sum()))
    return float(np.mean(scores)) if scores else 1.0


def _repeat_steps(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For counts (3, 1): indices 0 0 0 1 and steps 0 1 2 0."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)


def _num_distinct(values: np.ndarray) -> np.ndarray:
    """Distinct values in each row of (L, M): (L,)."""
    count: np.ndarray = 1 + (np.diff(np.sort(values, axis=1), axis=1) != 0).sum(axis=1)
    return count
