"""Resampling rules of the presets on a few pixels, and finding the folder that was meant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.importers.base import Skipped
from data_prep.importers.presets._folders import find_root, pictures, tally
from data_prep.importers.presets._pixels import MaskedShape, colour, drawn_cells, fit_area, grey, masked_picture
from fedmed.data.formats.limits import BadFile
from fedmed.errors import UserError


def save(path: Path, array: np.ndarray) -> Path:
    """Write a picture, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def test_half_covered_counts_as_foreground_and_thresholds_are_strict() -> None:
    """2 x 8 to 1 x 4: cells with 0, 1, 2 and 3 of 4 pixels; two of four round to 128."""
    levels = np.array([[0, 0, 255, 0, 255, 0, 255, 255], [0, 0, 0, 0, 0, 255, 255, 0]], dtype=np.uint8)
    assert fit_area(levels, (1, 4), "stretch", 0.5).tolist() == [[0, 0, 1, 1]]
    assert fit_area(levels, (1, 4), "stretch", 128 / 255).tolist() == [[0, 0, 0, 1]]
    assert fit_area(levels, (1, 4), "stretch", 0.0).tolist() == [[0, 1, 1, 1]]
    assert fit_area(levels, (1, 4), "stretch", 0.2).tolist() == [[0, 1, 1, 1]]  # 64 > 51


def test_levels_of_0_and_1_are_a_mask_too() -> None:
    levels = np.array([[0, 1], [1, 1]], dtype=np.uint8)
    assert fit_area(levels, (2, 2), "stretch", 0.5).tolist() == [[0, 1], [1, 1]]
    assert fit_area(np.zeros((2, 2), np.uint8), (2, 2), "stretch", 0.5).sum() == 0


def test_drawn_cells_take_the_most_frequent_mark_and_leave_the_rest_open() -> None:
    """Four cells of 2 x 2: two marks against one; a tie, to the lowest; nothing drawn; drawn background."""
    marks = np.array([[3, 1, 2, 1], [3, 4, 4, 4], [4, 4, 4, 0], [4, 4, 4, 4]], dtype=np.uint8)
    assert drawn_cells(marks, (2, 2), 4).tolist() == [[3, 1], [4, 0]]


def test_drawn_cells_go_by_the_corner_of_a_pixel() -> None:
    """3 pixels to 2 cells: corners 0, 2/3 and 4/3, so the middle pixel, whose middle is at 1, is of the first cell."""
    assert drawn_cells(np.array([[4, 1, 4]], dtype=np.uint8), (1, 2), 4).tolist() == [[1, 4]]


@pytest.mark.parametrize("size", [(3, 3), (1, 6), (5, 2)])
def test_drawn_cells_against_a_loop(size: tuple[int, int]) -> None:
    marks = np.random.default_rng(0).integers(0, 5, (5, 6)).astype(np.uint8)
    expected = np.full(size, 4, dtype=np.uint8)
    for row in range(size[0]):
        for column in range(size[1]):
            inside = [
                int(marks[i, j])
                for i in range(5)
                for j in range(6)
                if i * size[0] // 5 == row and j * size[1] // 6 == column and marks[i, j] != 4
            ]
            if inside:
                expected[row, column] = min(set(inside), key=lambda value: (-inside.count(value), value))
    assert np.array_equal(drawn_cells(marks, size, 4), expected)


def test_nothing_drawn_and_larger_than_stored() -> None:
    assert drawn_cells(np.full((2, 2), 4, np.uint8), (1, 1), 4).tolist() == [[4]]
    assert drawn_cells(np.array([[0, 4]], np.uint8), (1, 4), 4).tolist() == [[0, 0, 4, 4]]


def test_grey_and_colour(tmp_path: Path) -> None:
    levels = np.array([[0, 100], [200, 255]], dtype=np.uint8)
    alpha = np.stack([levels, levels, levels, np.full_like(levels, 7)], axis=-1)
    for name, array in {"grey": levels, "rgb": alpha[..., :3], "rgba": alpha}.items():
        path = save(tmp_path / f"{name}.png", array)
        assert np.array_equal(grey(path), levels)
        assert np.array_equal(colour(path), alpha[..., :3])
    deep = save(tmp_path / "deep.png", levels.astype(np.uint16))
    with pytest.raises(BadFile, match="8 bits"):
        grey(deep)


def test_a_mask_of_other_proportions_is_refused_one_of_another_size_is_not(tmp_path: Path) -> None:
    image = save(tmp_path / "image.png", np.zeros((4, 6, 3), np.uint8))
    larger = save(tmp_path / "larger.png", np.full((8, 12), 255, np.uint8))
    turned = save(tmp_path / "turned.png", np.full((6, 4), 255, np.uint8))
    arrays = masked_picture(image, {"mask": larger}, (2, 2), MaskedShape())
    assert arrays["image"].shape == (2, 2, 3) and arrays["mask"].tolist() == [[1, 1], [1, 1]]
    with pytest.raises(BadFile, match="proportions"):
        masked_picture(image, {"mask": turned}, (2, 2), MaskedShape())


@pytest.mark.parametrize("values", [{"threshold": 1.0}, {"threshold": -0.1}, {"fit": "squeeze"}, {"filter": "lanczos"}])
def test_ranges(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        MaskedShape(**values)  # type: ignore[arg-type]


def is_root(folder: Path) -> bool:
    """A folder with a file called mark."""
    return (folder / "mark").is_file()


def mark(folder: Path) -> Path:
    """Make a folder that is a root."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mark").touch()
    return folder


def test_the_folder_itself_its_parent_or_two_levels_above(tmp_path: Path) -> None:
    root = mark(tmp_path / "a" / "b" / "c")
    mark(root / "copy")  # what lies below a root is its own business
    for source in (root, root.parent, root.parent.parent):
        assert find_root(source, is_root, "ham10000", "a mark") == root
    with pytest.raises(UserError, match=r"expected a mark in .* found 1 folder, 0 files"):
        find_root(tmp_path, is_root, "ham10000", "a mark")


def test_what_was_looked_for_and_found_is_said_without_names(tmp_path: Path) -> None:
    save(tmp_path / "DOE_JANE.png", np.zeros((2, 2), np.uint8))
    (tmp_path / "SMITH").mkdir()
    with pytest.raises(UserError, match=r"^lgg: expected slices in .* found 1 folder, 1 file \(.png 1\)") as caught:
        find_root(tmp_path, is_root, "lgg", "slices")
    assert "DOE" not in str(caught.value) and "SMITH" not in str(caught.value)
    with pytest.raises(UserError, match="expected a folder with slices, found a file"):
        find_root(tmp_path / "DOE_JANE.png", is_root, "lgg", "slices")
    with pytest.raises(UserError, match="found nothing"):
        find_root(tmp_path / "no", is_root, "lgg", "slices")


def test_two_folders_on_one_level_are_no_choice_of_ours(tmp_path: Path) -> None:
    mark(tmp_path / "one")
    mark(tmp_path / "two")
    with pytest.raises(UserError, match=r"2 folders in .* hold a mark. Give one of them"):
        find_root(tmp_path, is_root, "acdc", "a mark")


def test_pictures_by_name_hidden_ones_left_out_and_second_ones_counted(tmp_path: Path) -> None:
    one = np.zeros((2, 2), np.uint8)
    first = save(tmp_path / "part_1" / "x" / "A.JPG", one)
    save(tmp_path / "part_2" / "A.jpg", one)
    for junk in ("part_1/._B.jpg", "part_1/.git/C.jpg", "part_1/__MACOSX/D.jpg"):
        save(tmp_path / junk, one)
    (tmp_path / "part_1" / "notes.txt").touch()
    skipped = Skipped()
    assert pictures([tmp_path / "part_1", tmp_path / "part_2"], (".jpg",), skipped) == {"A": first}
    assert skipped.reasons == {"image found twice; the first by path is taken": 1}
    assert tally(tmp_path) == "2 folders, 0 files"
