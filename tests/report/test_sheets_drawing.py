"""What is drawn on the tiles of a contact sheet, and that only the shown rows are read."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from fedmed.data.writer import SiteArrays, write_site_file
from fedmed.report.sheets import contact_sheet
from fedmed.report.tiles import (
    COLOURS,
    class_colour,
    draw_boxes,
    draw_labels,
    draw_outlines,
    enlarge_labels,
    tile_image,
)

BLACK = np.zeros((4, 4, 3), dtype=np.uint8)


def painted(tile: np.ndarray) -> np.ndarray:
    """Class of each pixel of a black tile by its colour, -1 for black."""
    out = np.full(tile.shape[:2], -1)
    for index, colour in enumerate(COLOURS):
        out[(tile == colour).all(axis=2)] = index
    return out


def test_outlines_are_the_inner_border() -> None:
    labels = np.zeros((4, 4), dtype=np.uint8)
    labels[:3, :3] = 1
    expected = np.full((4, 4), -1)
    expected[:3, 2] = expected[2, :3] = 1  # the image's edge is no border
    np.testing.assert_array_equal(painted(draw_outlines(BLACK, labels, 2)), expected)


def test_labels_leave_open_pixels_alone() -> None:
    labels = np.full((4, 4), 2)
    labels[0, 0], labels[3, 1] = 0, 1
    found = painted(draw_labels(BLACK, labels, 2))
    assert found[0, 0] == 0 and found[3, 1] == 1 and (found == -1).sum() == 14


def test_boxes() -> None:
    boxes = np.array([[0, 0, 0, 0], [1, 4, 0, 3]])  # rows 1..3, columns 0..2
    expected = np.full((4, 4), -1)
    expected[1:4, :3] = 1
    expected[2, 1] = -1
    np.testing.assert_array_equal(painted(draw_boxes(BLACK, boxes, (4, 4))), expected)


def test_thin_strokes_survive_shrinking() -> None:
    labels = np.full((8, 8), 2)
    labels[3, 3] = 1
    small = enlarge_labels(labels, 4, 2)
    assert small.shape == (4, 4) and small[1, 1] == 1 and (small == 2).sum() == 15
    large = enlarge_labels(labels, 16, 2)
    assert (large == 1).sum() == 4 and large[6, 6] == 1


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32"])
def test_every_type_is_a_picture(dtype: str) -> None:
    ramp = np.tile(np.linspace(0, 200 if dtype == "uint8" else 1000, 8), (4, 1)).astype(dtype)
    tile = tile_image(ramp, 16)
    assert tile.shape == (16, 16, 3) and tile.dtype == np.uint8
    assert (tile[8:] == 255).all() and tile[0, 0, 0] < 10 < 190 < tile[0, 15, 0]  # aspect kept, white below
    assert tile_image(np.full((4, 4), np.nan, np.float32), 8).max() == 0


def test_colours_repeat_without_background() -> None:
    assert class_colour(0) == COLOURS[0] and class_colour(len(COLOURS)) == COLOURS[1]


def weak_file(path: Path) -> Path:
    """Two sites with masks, scribbles, boxes around classes and a chunk per image."""
    sites = []
    for name in ("north", "south"):
        mask = np.zeros((20, 16, 16), dtype=np.uint8)
        mask[:, 4:10, 4:10] = 1
        scribble = np.where(mask == 1, 1, 2).astype(np.uint8)
        boxes = np.tile(np.array([[0, 0, 0, 0], [4, 10, 4, 10]], dtype=np.int16), (20, 1, 1))
        image = np.arange(20, dtype=np.uint8)[:, None, None] * np.ones((1, 16, 16), np.uint8)
        splits = {"train": np.arange(14), "test": np.arange(14, 20)}
        sites.append(
            SiteArrays(name, image, {"mask": mask, "scribble": scribble}, splits, extras={"class_boxes": boxes})
        )
    meta = {"task": "segmentation", "classes": ["background", "organ"], "channels": ["MR"], "image_size": [16, 16]}
    return write_site_file(path, meta, sites, compression=0)


def test_a_sheet_has_a_tile_per_annotation_and_reads_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rows = weak_file(tmp_path / "weak.h5"), list[object]()
    original = h5py.Dataset.__getitem__

    def counted(self: h5py.Dataset, key: object, *rest: object) -> object:
        if self.ndim >= 3:
            rows.append(key)
        return original(self, key, *rest)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", counted)
    with Image.open(contact_sheet(path, tmp_path / "sheet.png", per_site=3, tile=32)) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert rows and all(isinstance(key, int) for key in rows)
    assert len(rows) == 2 * 3 * 4  # image, mask, scribble, class_boxes of three images at two sites
    assert pixels.shape[1] > 3 * 4 * 32
    for colour in (COLOURS[0], COLOURS[1]):
        assert (pixels == colour).all(axis=2).any()  # exact, in the legend at least


def test_same_seed_same_picture(tmp_path: Path) -> None:
    path = weak_file(tmp_path / "weak.h5")
    one, two, other = (contact_sheet(path, tmp_path / f"{i}.png", 2, 1, 32, seed) for i, seed in enumerate((1, 1, 2)))
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()
