"""Checks of annotation values, block by block, so that what stays in a file is never all in memory.

Letters: N items, n of a split, H W pixels, L classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from fedmed.errors import UserError

TOP = 255  # masks are uint8 when they train


class Rows(Protocol):
    """What the checks need of an array (N, ...), in memory or in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> np.ndarray: ...


def blocks(values: Rows, num_bytes: int = 1 << 23) -> Iterator[tuple[int, np.ndarray]]:
    """Rows (N, ...) in consecutive blocks of about `num_bytes`, each with the number of its first row."""
    row_bytes = int(np.prod(values.shape[1:])) * values.dtype.itemsize
    step = max(1, num_bytes // max(1, row_bytes))
    for start in range(0, len(values), step):
        yield start, values[start : start + step]


def check_labels(values: Rows, name: str, where: str, task: str, num_classes: int, ignore_value: int | None) -> None:
    """Check that an annotation is integer and in range: 0 .. L-1 (plus the ignore value); multilabel: 0/1. Read block by block."""
    if not (np.issubdtype(values.dtype, np.integer) or values.dtype == np.bool_):
        raise UserError(
            f"{where}: {name} is {values.dtype}, expected integers (uint8 masks, int64 labels). Convert it."
        )
    top = 1 if task == "multilabel" else num_classes - 1
    if task == "segmentation" and max(top, ignore_value or 0) > TOP:
        what = f"class id {top}" if top > TOP else f"the ignore value {ignore_value}"
        raise UserError(f"{where}: {what} of {name} is above {TOP}, the largest a mask can hold. Choose a smaller one.")
    wrong, item = _worst(values, top, ignore_value)
    if item < 0:
        return
    reading = "0/1 per class" if task == "multilabel" else f"class ids 0 .. {top}"
    extra = "" if ignore_value is None else f" (or {ignore_value} = not annotated)"
    raise UserError(
        f"{where}: {name} of image {item} contains {wrong}, expected {reading}{extra}. "
        "Map the values or correct `classes`."
    )


def _worst(values: Rows, top: int, ignore_value: int | None) -> tuple[int, int]:
    """The value farthest below 0, else farthest above `top` (the ignore value aside), and the first row that holds it; row -1: none."""
    lowest, highest = (0, -1), (top, -1)
    for start, part in blocks(values):
        low, high = int(part.min()), int(part.max())
        if high == ignore_value:
            high = int(part.max(initial=0, where=part != high))
        if low < lowest[0]:
            lowest = low, start + _first(part, low)
        if high > highest[0]:
            highest = high, start + _first(part, high)
    return lowest if lowest[1] >= 0 else highest


def _first(part: np.ndarray, value: int) -> int:
    return int(np.argwhere(part == value)[0][0])


def check_not_withheld(masks: Rows, rows: np.ndarray, ignore_value: int, where: str) -> None:
    """Refuse masks (N, H, W) when no pixel of the training `rows` (n,) says anything: the site was given weak annotation instead."""
    for start in range(0, len(rows), 64):
        if (masks[rows[start : start + 64]] != ignore_value).any():
            return
    if len(rows):
        raise UserError(
            f"{where}: the masks of its training images are withheld, it has weak annotation instead. "
            "Set data.annotation=auto."
        )
