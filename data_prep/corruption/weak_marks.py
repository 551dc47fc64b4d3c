"""Weak labels of one image from its full mask: points, scribbles, blocks, boxes, image tags.

FedICRA (arXiv 2304.05635) and FedLPPA (arXiv 2402.17502) train on points, scribbles, noisy scribbles, blocks and boxes,
FedMix (arXiv 2205.01840) on boxes, image tags and nothing. Only the boxes of FedMix come with a published generator; all
other rules and sizes are our choice.
In: mask (H, W) integer class ids, 0 background, 1..C-1 objects; ids from C on are not annotated, they are never marked.
Out: (H, W) uint8, a class id where something is drawn, C where nothing is; boxes leave nothing open. With points,
scribbles and blocks every drawn pixel is right and every component (8-connected region of one class) has a mark.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from data_prep.corruption.weak_draw import (
    SMALL,
    background_line,
    background_places,
    box_around,
    centre_line,
    components,
    disc,
    interior_pixel,
    largest_rectangle,
    shaken,
    shrunk,
)
from data_prep.seeding import Rng, integers

Box = tuple[slice, slice]


def point_marks(
    mask: np.ndarray, num_classes: int, rng: Rng, points: int = 1, radius: float = 1.0, background: int = 4
) -> np.ndarray:
    """Discs at the most interior pixel of each component, at points - 1 further ones drawn evenly, and on background."""
    marks = np.full(mask.shape, num_classes, dtype=np.uint8)
    for label, frame, region in components(mask, num_classes):
        view, middle = marks[frame], interior_pixel(region)
        if region.sum() < SMALL:
            view[middle] = label
            continue
        places = np.argwhere(region)
        more = places[rng.permutation(len(places))[: points - 1]] if points > 1 else places[:0]
        for row, column in (middle, *more):
            view[disc((int(row), int(column)), radius, region.shape) & region] = label
    for row, column in background_places(mask, background, rng):
        marks[disc((int(row), int(column)), radius, mask.shape) & (mask == 0)] = 0
    return marks


def scribble_marks(
    mask: np.ndarray, num_classes: int, rng: Rng, fraction: float = 0.8, width: int = 1, shake: float = 0.0
) -> np.ndarray:
    """A stroke along the middle of each component, and one around the objects on background.

    fraction of the line is drawn, one piece, whose place is drawn evenly; width in pixels, odd. shake > 0: strokes are
    displaced by up to so many pixels and may leave their class (a noisy scribble); a class drawn later covers earlier
    ones.
    """
    marks = np.full(mask.shape, num_classes, dtype=np.uint8)
    lines = [(0, background_line(mask), mask == 0)]
    for label, frame, region in components(mask, num_classes):
        corner = (frame[0].start, frame[1].start)
        whole = np.zeros(mask.shape, dtype=bool)
        whole[frame] = region
        lines.append((label, centre_line(region) + corner, whole))
    for label, line, region in lines:
        piece = _piece(line, fraction, rng)
        if shake > 0 and len(piece):
            moved = shaken(piece, shake, rng)
            piece = moved[((moved >= 0) & (moved < mask.shape)).all(axis=1)]
            region = mask < num_classes
        marks[_stroke(piece, width, mask.shape) & region] = label
    return marks


def _piece(line: np.ndarray, fraction: float, rng: Rng) -> np.ndarray:
    """A run of round(fraction * n) pixels of a line (n, 2), at least one, from a random start."""
    kept = min(len(line), max(1, round(fraction * len(line))))
    first = int(integers(rng, len(line) - kept + 1))
    return line[first : first + kept]


def _stroke(path: np.ndarray, width: int, shape: tuple[int, ...]) -> np.ndarray:
    """Pixels less than width / 2 from a path, (H, W) bool."""
    line = np.zeros(shape, dtype=bool)
    line[path[:, 0], path[:, 1]] = True
    if width <= 1:
        return line
    reach = width // 2
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    wide: np.ndarray = ndimage.binary_dilation(line, rows**2 + columns**2 <= (width / 2) ** 2)
    return wide


def block_marks(mask: np.ndarray, num_classes: int, rng: Rng, share: float = 0.5) -> np.ndarray:
    """The largest rectangle inside each component, shrunk to `share` of each side, and a square on background.

    The square has about the mean area of the others, without any an eighth of the image's shorter side; it lies at a
    place drawn as for points and is cut to the background.
    """
    marks = np.full(mask.shape, num_classes, dtype=np.uint8)
    areas = []
    for label, frame, region in components(mask, num_classes):
        view = marks[frame]
        if region.sum() < SMALL:
            view[interior_pixel(region)] = label
            areas.append(1)
            continue
        rectangle = shrunk(largest_rectangle(region), share)
        view[rectangle] = label
        areas.append(view[rectangle].size)
    side = max(1, round(float(np.sqrt(np.mean(areas))))) if areas else max(1, min(mask.shape) // 8)
    for row, column in background_places(mask, 1, rng):
        top, left = max(0, row - side // 2), max(0, column - side // 2)
        square = (slice(top, row - side // 2 + side), slice(left, column - side // 2 + side))
        marks[square][mask[square] == 0] = 0
    return marks


def drawn_boxes(
    mask: np.ndarray, num_classes: int, rng: Rng, per: str = "component", margin: tuple[int, int] = (0, 0)
) -> list[tuple[int, Box]]:
    """Class and box (slices of rows and columns) around each component, or around all of a class, in the order of classes.

    Each side lies margin[0]..margin[1] pixels, drawn evenly, outside the object; a box ends at the border of the image.
    """
    boxes = []
    if per == "class":
        found = [(label, mask == label) for label in range(1, num_classes) if (mask == label).any()]
    else:
        found = []
        for label, frame, region in components(mask, num_classes):
            whole = np.zeros(mask.shape, dtype=bool)
            whole[frame] = region
            found.append((label, whole))
    for label, region in found:
        top, bottom, left, right = (margin[0] + int(integers(rng, margin[1] - margin[0] + 1)) for _ in range(4))
        boxes.append((label, box_around(region, (top, bottom + 1, left, right + 1))))
    return boxes


def filled_boxes(mask: np.ndarray, num_classes: int, boxes: Sequence[tuple[int, Box]]) -> np.ndarray:
    """Boxes as labels: their class inside, background outside, C where the mask is not annotated (ids from C on).

    Smaller boxes cover larger ones, so that nested classes stay visible.
    """
    filled = np.zeros(mask.shape, dtype=np.uint8)
    for label, box in sorted(boxes, key=lambda entry: -filled[entry[1]].size):
        filled[box] = label
    filled[mask >= num_classes] = num_classes
    return filled


def box_labels(
    mask: np.ndarray, num_classes: int, rng: Rng, per: str = "component", margin: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """Filled boxes (`filled_boxes`) as they are drawn (`drawn_boxes`)."""
    return filled_boxes(mask, num_classes, drawn_boxes(mask, num_classes, rng, per, margin))


def class_boxes(boxes: Sequence[tuple[int, Box]], num_classes: int) -> np.ndarray:
    """The box around all boxes of each class, (C, 4) int16: top, bottom, left, right, ends exclusive; absent: zeros.

    Unlike filled boxes, those of different classes may overlap. Row 0, background, is not used.
    """
    around = np.zeros((num_classes, 4), dtype=np.int16)
    for label in {label for label, _ in boxes}:
        rows, columns = zip(*(box for found, box in boxes if found == label), strict=True)
        around[label] = [limit for side in (rows, columns) for limit in _extent(side)]
    return around


def _extent(sides: Sequence[slice]) -> tuple[int, int]:
    """First and last end of some slices."""
    return min(side.start for side in sides), max(side.stop for side in sides)


def class_tags(masks: np.ndarray, num_classes: int) -> np.ndarray:
    """Which classes each image shows, (n, C) uint8 of 0/1 with background first. In: masks (n, H, W)."""
    shown = [(masks == label).any(axis=(1, 2)) for label in range(num_classes)]
    return np.stack(shown, axis=1).astype(np.uint8)
