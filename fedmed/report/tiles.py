"""Pictures of single images: any stored image as RGB of one size, and what is annotated drawn on it.

Letters: H W pixels of the file, S pixels of the tile. Labels are class ids 0..L-1; L and above are left open.
"""

from __future__ import annotations

import numpy as np

Colour = tuple[int, int, int]

# Background first; hues that differ in lightness too, for readers who do not see all colours (after Okabe and Ito).
COLOURS = (
    (86, 180, 233), (255, 235, 59), (230, 75, 53), (0, 200, 140), (204, 121, 200), (255, 150, 30), (60, 110, 255), (200, 255, 120),
)  # fmt: skip


def class_colour(index: int) -> Colour:
    """Colour of a class; after the last one they begin again with the second, since the first is for background."""
    return COLOURS[index] if index < len(COLOURS) else COLOURS[1 + (index - 1) % (len(COLOURS) - 1)]


def tile_image(image: np.ndarray, side: int) -> np.ndarray:
    """An image (H,W) or (H,W,3) of any type as (S,S,3) uint8, aspect kept, white beside it.

    8-bit values are shown as they are, others between the 0.5 % and 99.5 % quantile of the image; NaN is black.
    """
    from PIL import Image

    values = np.asarray(image)
    if values.dtype != np.uint8:
        values = np.nan_to_num(values.astype(np.float32), posinf=0.0, neginf=0.0)
        low, high = np.quantile(values, (0.005, 0.995)) if values.size else (0.0, 1.0)
        values = np.clip((values - low) * (255.0 / max(float(high - low), 1e-6)), 0, 255).astype(np.uint8)
    height, width = _fitted(values.shape[:2], side)
    filter = Image.Resampling.BOX if max(values.shape[:2]) > side else Image.Resampling.NEAREST
    picture = Image.fromarray(values).resize((width, height), filter).convert("RGB")
    out = np.full((side, side, 3), 255, dtype=np.uint8)
    out[:height, :width] = np.asarray(picture)
    return out


def draw_outlines(tile: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """A copy of a tile with the inner border of every class but background in its colour. labels (H,W)."""
    wide = enlarge_labels(labels, tile.shape[0], num_classes)
    padded = np.pad(wide, 1, mode="edge")
    centre = padded[1:-1, 1:-1]
    border = np.zeros(centre.shape, dtype=bool)
    for other in (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]):
        border |= centre != other
    return _painted(tile, np.where(border & (centre > 0), centre, num_classes), num_classes)


def draw_labels(tile: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """A copy of a tile with every drawn pixel, background too, in the colour of its class. labels (H,W)."""
    return _painted(tile, enlarge_labels(labels, tile.shape[0], num_classes), num_classes)


def draw_boxes(tile: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A copy of a tile with a rectangle per class. boxes (L,4): top, bottom, left, right in pixels of (H, W), ends exclusive,
    zeros for none.
    """
    labels = np.full(_fitted(size, tile.shape[0]), len(boxes), dtype=np.int64)
    scale = (labels.shape[0] / max(1, size[0]), labels.shape[1] / max(1, size[1]))
    for index, (top, bottom, left, right) in enumerate(np.asarray(boxes, dtype=np.int64).tolist()):
        if bottom > top and right > left:
            rows = (int(top * scale[0]), min(max(int(bottom * scale[0]) - 1, 0), labels.shape[0] - 1))
            columns = (int(left * scale[1]), min(max(int(right * scale[1]) - 1, 0), labels.shape[1] - 1))
            labels[rows[0] : rows[1] + 1, list(columns)] = index
            labels[list(rows), columns[0] : columns[1] + 1] = index
    return _painted(tile, labels, len(boxes))


def enlarge_labels(labels: np.ndarray, side: int, num_classes: int) -> np.ndarray:
    """Labels (H,W) at the size of the picture inside a tile. Made smaller, no drawn pixel is lost: thin strokes stay."""
    height, width = _fitted(labels.shape, side)
    if height >= labels.shape[0]:
        rows, columns = (np.arange(n) * labels.shape[axis] // n for axis, n in enumerate((height, width)))
        return labels[rows][:, columns].astype(np.int64)
    out = np.full((height, width), num_classes, dtype=np.int64)
    for index in range(num_classes):  # a higher class lies on top of a lower one
        rows, columns = np.nonzero(labels == index)
        out[rows * height // labels.shape[0], columns * width // labels.shape[1]] = index
    return out


def _fitted(size: tuple[int, ...], side: int) -> tuple[int, int]:
    """(height, width) of an image inside a square of `side`, at least 1."""
    longest = max(size[0], size[1], 1)
    return max(1, round(size[0] * side / longest)), max(1, round(size[1] * side / longest))


def _painted(tile: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    out = tile.copy()
    part = out[: labels.shape[0], : labels.shape[1]]
    for index in range(num_classes):
        part[labels == index] = class_colour(index)
    return out
