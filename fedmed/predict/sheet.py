"""A contact sheet of predictions: a few images with the outlines that were predicted, or with label and probability."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedmed.predict.predictor import Predictor, Show
from fedmed.report.sheets import Tile, compose, save
from fedmed.report.tiles import class_colour, draw_outlines, tile_image

ITEMS, SIDE = 12, 144  # images on the sheet, pixels a side of each


class Sheet:
    """Takes the planes that are shown while sources are predicted; what it keeps are tiles, not images."""

    def __init__(self, predictor: Predictor, sources: int) -> None:
        """sources: how many will come; the sheet takes evenly spaced ones, and of few sources several planes."""
        self._predictor = predictor
        chosen = np.unique(np.linspace(0, max(0, sources - 1), min(ITEMS, max(1, sources))).round().astype(int))
        self._quota = max(1, ITEMS // max(1, len(chosen)))
        self._chosen = set(chosen.tolist())
        self._items: list[list[Tile]] = []

    def taker(self, source: int, name: str) -> Callable[[str, int], Show | None]:
        """For source number `source`: a function of a word for the caption and the number of planes that gives what takes them."""

        def of_planes(word: str, count: int) -> Show | None:
            if source not in self._chosen or not count or len(self._items) >= ITEMS:
                return None
            quota = min(count, self._quota)
            wanted = {(2 * place + 1) * count // (2 * quota) for place in range(quota)}

            def show(place: int, plane: np.ndarray, found: np.ndarray) -> None:
                if place in wanted and len(self._items) < ITEMS:
                    number = f" {place}" if count > 1 else ""
                    self._items.append(self._tiles(plane, found, f"{word or name}{number}"))

            return show

        return of_planes

    def write(self, path: Path) -> Path | None:
        """Draw the sheet; None when nothing was shown."""
        if not self._items:
            return None
        legend = {}
        if self._predictor.model.task == "segmentation":
            legend = {name: class_colour(number) for number, name in enumerate(self._predictor.classes) if number}
        return save(compose([("predicted", self._items)], legend, SIDE), path)

    def _tiles(self, plane: np.ndarray, found: np.ndarray, caption: str) -> list[Tile]:
        picture = plane if plane.ndim == 2 or plane.shape[2] == 3 else plane[..., 0]
        tile = tile_image(picture, SIDE)
        if self._predictor.model.task == "segmentation":
            return [Tile(tile, caption), Tile(draw_outlines(tile, found, len(self._predictor.classes)), "")]
        return [Tile(tile, f"{self._predictor.said(found) or 'none'} {found.max():.2f}")]
