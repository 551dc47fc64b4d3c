"""Masks and scribbles from stored grey levels to class ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_prep.importers.folders import spread
from fedmed.data.formats.limits import BadFile
from fedmed.data.formats.pictures import read_levels
from fedmed.errors import UserError

_LOOKED_AT = 16  # masks read to find out whether they are binary
_HIGHEST_ID = 31  # levels up to this are rather class ids than damage


def to_classes(
    levels: np.ndarray, num_classes: int, values: Mapping[str, int] | None, threshold: int | None
) -> np.ndarray:
    """Class ids of a mask, (H, W) uint8, from its stored levels (H, W).

    values: level -> class id, all others are an error; threshold: foreground is what is higher; neither: 0/1 and 0/255 are binary where there
    are two classes, else levels are the ids. Raises `BadFile`.
    """
    if threshold is not None:
        return (levels > threshold).astype(np.uint8)
    if values is not None:
        return lookup(levels, {int(level): number for level, number in values.items()}, None)
    top = int(levels.max(initial=0))
    if num_classes == 2 and top > 1:
        foreground = levels == 255
        if np.count_nonzero(foreground) != np.count_nonzero(levels):
            raise BadFile("mask with other values than 0 and 1, or 0 and 255")
        return foreground.view(np.uint8)
    if top >= num_classes:
        raise BadFile("mask with values that are no class")
    return levels.astype(np.uint8, copy=False)


def to_scribble(levels: np.ndarray, num_classes: int, values: Mapping[str, int] | None) -> np.ndarray:
    """Class ids of a scribble, the number of classes where nothing is drawn, (H, W) uint8.

    values: level -> class id, all others are not drawn; None: levels are the ids, from the number of classes on not drawn.
    """
    if values is not None:
        return lookup(levels, {int(level): number for level, number in values.items()}, num_classes)
    return np.minimum(levels, num_classes).astype(np.uint8)


def lookup(levels: np.ndarray, values: Mapping[int, int], other: int | None) -> np.ndarray:
    """Levels looked up in `values`; others become `other`, or are an error (`BadFile`) where that is None."""
    top = max(int(levels.max(initial=0)), max(values, default=0))
    table = np.full(top + 1, -1 if other is None else other, dtype=np.int32)
    for level, number in values.items():
        table[level] = number
    found = table[levels]
    if other is None and (found < 0).any():
        raise BadFile("mask with values that mask_values does not name")
    return found.astype(np.uint8)


def check_values(name: str, values: Mapping[str, int] | None) -> None:
    """Raise ValueError unless keys are levels 0..65535 and values class ids 0..253."""
    for level, number in (values or {}).items():
        if not level.isdecimal() or int(level) > 65535 or not 0 <= number <= 253:
            raise ValueError(
                f"{name}: expected {{level: class id, ...}} with levels 0..65535 and ids 0..253, got {level}: {number}"
            )


def default_classes(masks: Sequence[Path], values: Mapping[str, int] | None, threshold: int | None) -> tuple[str, ...]:
    """Names of classes where the user gives none: background and foreground, or numbered ones by `values`.

    Looks into some masks; UserError where one has class ids beyond 1, or most are not binary: other masks would be left out one by one.
    """
    if values is not None:
        top = max(values.values(), default=0)
        return ("background", "foreground") if top <= 1 else ("background", *(f"class {i}" for i in range(1, top + 1)))
    kinds = Counter(_kind(path) for path in spread(masks, _LOOKED_AT)) if threshold is None else Counter[str]()
    if kinds["ids"] or kinds["other"] > kinds["binary"]:
        raise UserError(
            "the masks have other values than 0 and 1, or 0 and 255. Give classes=background,a,b,... in the order of the "
            "values, and mask_values={0: 0, 85: 1, ...} where the values are no class ids"
        )
    return ("background", "foreground")


def _kind(path: Path) -> str:
    """What the levels of a mask look like: "binary", "ids" (up to 31), "other", or "" where it cannot be read."""
    try:
        levels = read_levels(path)
    except BadFile:
        return ""
    try:
        to_classes(levels, 2, None, None)
    except BadFile:
        return "ids" if int(levels.max(initial=0)) <= _HIGHEST_ID else "other"
    return "binary"
