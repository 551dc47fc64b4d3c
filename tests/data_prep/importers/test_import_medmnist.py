"""MedMNIST archives: both tasks, both colours, splits as they are, and archives that are something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmed.data.site_file import SiteFile
from fedmed.errors import UserError

Run = Callable[..., Any]


def archive(path: Path, labels: int = 1, channels: tuple[int, ...] = (), **changed: np.ndarray) -> Path:
    """An archive of 6 + 2 + 3 images of 28 x 28; image i has the value i, label i % 3 (or 0/1 columns)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    first = 0
    for split, count in (("train", 6), ("val", 2), ("test", 3)):
        numbers = np.arange(first, first + count)
        first += count
        shape = (count, *[1] * (2 + len(channels)))
        arrays[f"{split}_images"] = np.broadcast_to(numbers.reshape(shape), (count, 28, 28, *channels)).astype(np.uint8)
        columns = numbers[:, None] % 3 if labels == 1 else (numbers[:, None] >> np.arange(labels)) & 1
        arrays[f"{split}_labels"] = columns.astype(np.uint8)
    np.savez_compressed(path, **{**arrays, **changed})
    return path


def test_single_label(tmp_path: Path, importing: Run) -> None:
    outcome = importing("medmnist", archive(tmp_path / "x.npz"), site="mnist")
    with SiteFile.open(outcome.out) as file:
        assert (file.task, file.classes, file.channels) == ("classification", ("0", "1", "2"), ("grey",))
        data = file.site("mnist")
    assert data.splits["train"].size == 6 and data.splits["val"].size == 2 and data.splits["test"].size == 3
    value = data.image[:, 0, 0].astype(int)
    assert sorted(value.tolist()) == list(range(11)) and (data.target == value % 3).all()
    assert set(value[data.splits["val"]]) == {6, 7} and len(set(data.group_id)) == 11
    assert "note: the file names no patients: each image is a group of its own" in outcome.noted


def test_several_labels_in_colour_and_another_size(tmp_path: Path, importing: Run) -> None:
    source = archive(tmp_path / "src" / "x.npz", 4, (3,))
    outcome = importing("medmnist", source.parent, "classes=a,b,c,d", size="14")
    image, label = outcome.read("image", "label")
    assert image.shape == (11, 14, 14, 3) and label.shape == (11, 4) and outcome.attrs()["task"] == "multilabel"
    assert (label @ [1, 2, 4, 8] == image[:, 0, 0, 0]).all()


def test_bytes_do_not_depend_on_workers(tmp_path: Path, importing: Run) -> None:
    source = archive(tmp_path / "x.npz")
    one, four = (importing("medmnist", source, name=f"{n}/x.h5", workers=n) for n in (1, 4))
    assert one.out.read_bytes() == four.out.read_bytes()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"val_images": np.zeros((2, 28, 28, 28), np.uint8)}, "Volumes are not read"),
        ({"val_images": np.zeros((2, 28, 28), np.float32)}, "val_images is float32"),
        ({"val_labels": np.zeros((9, 1), np.uint8)}, "val_labels is uint8 of \\(9, 1\\)"),
        ({"val_labels": np.zeros((2, 5), np.uint8)}, "labels of different widths"),
        ({"val_labels": np.zeros((2, 1), np.float64)}, "whole numbers"),
    ],
)
def test_archives_of_another_kind(tmp_path: Path, importing: Run, changed: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(UserError, match=said):
        importing("medmnist", archive(tmp_path / "x.npz", **changed))


def test_what_is_no_archive(tmp_path: Path, importing: Run) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK no")
    with pytest.raises(UserError, match=r"Expected a \.npz file with train_images"):
        importing("medmnist", tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", images=np.zeros(3))
    with pytest.raises(UserError, match="no array 'train_images'"):
        importing("medmnist", tmp_path / "x.npz")
    with pytest.raises(UserError, match=r"expected one \.npz file, found 0"):
        (tmp_path / "empty").mkdir()
        importing("medmnist", tmp_path / "empty")
    with pytest.raises(UserError, match="classes names 2 classes, the labels have 3"):
        importing("medmnist", archive(tmp_path / "y.npz"), "classes=a,b")
