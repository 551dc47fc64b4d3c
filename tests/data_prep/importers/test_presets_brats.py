"""BraTS folders of small generated NIfTI volumes: names old and new, labels, scaling, slices, missing contrasts, sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from data_prep.importers.base import Entry, Header, Skipped
from data_prep.importers.presets.brats import Brats, BratsParams, scale
from fedmed.data.formats.limits import BadFile
from fedmed.errors import UserError

OLD = ("_flair", "_t1", "_t1ce", "_t2", "_seg")
NEW = ("-t2f", "-t1n", "-t1c", "-t2w", "-seg")


def volume(brain: Sequence[int] = (1, 2, 3)) -> np.ndarray:
    """(4, 4, 5): brain of values 1..4 in some slices, one column left at 0."""
    values = np.zeros((4, 4, 5), np.float32)
    for i in brain:
        values[:, :3, i] = np.arange(1, 5)[:, None]
    return values


def labels(values: Sequence[int] = (0, 1, 2, 4), slices: Sequence[int] = (2, 3)) -> np.ndarray:
    """(4, 4, 5): the given labels, one per row, in some slices."""
    found = np.zeros((4, 4, 5), np.uint8)
    for i in slices:
        found[:, :, i] = np.array(values)[:, None]
    return found


def case(
    folder: Path, endings: Sequence[str] = OLD, segmentation: np.ndarray | None = None, suffix: str = ".nii.gz"
) -> Path:
    """Write a case; contrast number c has the values of `volume` times 10 ** c."""
    folder.mkdir(parents=True)
    for power, ending in enumerate(endings):
        array = volume() * 10.0**power
        if ending.endswith("seg"):
            array = labels() if segmentation is None else segmentation
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / f"{folder.name}{ending}{suffix}")
    return folder


def scan(root: Path, **values: Any) -> tuple[Header, list[Entry], Mapping[str, int], Brats]:
    """Header, entries, reasons and importer of 4 x 4 images."""
    skipped = Skipped()
    importer = Brats(root, BratsParams(**values), (4, 4))
    header, entries = importer.scan(skipped)
    return header, list(entries), skipped.reasons, importer


def test_scale_by_hand() -> None:
    """Brain 1..5: percentiles 0 and 100 are 1 and 5; 25 and 75 are 2 and 4; outside stays 0."""
    values = np.array([0, 1, 2, 3, 4, 5], np.float32).reshape(1, 1, 6)
    assert scale(values, 0, 100).tolist() == [[[0, 0, 64, 128, 191, 255]]]  # 63.75, 127.5 to even, 191.25
    assert scale(values, 25, 75).tolist() == [[[0, 0, 0, 128, 255, 255]]]
    assert scale(np.zeros((1, 1, 2)), 0, 100).tolist() == [[[0, 0]]]
    assert scale(np.array([[[0.0, 7.0, 7.0]]]), 0, 100).tolist() == [[[0, 255, 255]]]
    with pytest.raises(BadFile, match="no numbers"):
        scale(np.array([[[1.0, np.nan]]]), 0, 100)


@pytest.mark.parametrize(("endings", "suffix", "four"), [(OLD, ".nii.gz", 4), (OLD, ".nii", 3), (NEW, ".nii.gz", 3)])
def test_entries_and_rows(tmp_path: Path, endings: Sequence[str], suffix: str, four: int) -> None:
    case(tmp_path / "set" / "Case_1", endings, labels((0, 1, 2, four)), suffix)
    header, (entry,), reasons, importer = scan(tmp_path, low=0, high=100)
    assert (header.channels, len(header.classes), reasons) == (("flair", "t1", "t1ce", "t2"), 4, {})
    rows = importer.read(entry)
    assert [row.place for row in rows] == [int(row.values["slice_no"]) for row in rows] == [1, 2, 3]
    first, second = rows[0], rows[1]
    assert first.arrays["image"].shape == (4, 4, 4) and first.arrays["image"].dtype == np.uint8
    for channel in range(4):  # the same after scaling, though contrasts differ by factors of ten
        assert first.arrays["image"][..., channel].tolist() == [[v, v, v, 0] for v in (0, 85, 170, 255)]
    assert not first.arrays["mask"].any() and second.arrays["mask"].tolist() == [[i] * 4 for i in range(4)]
    assert first.values["modality_present"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"slices": "tumour"}, [2, 3]),
        ({"slices": "all"}, [0, 1, 2, 3, 4]),
        ({"slices": "all", "step": 2}, [0, 2, 4]),
        ({"slices": "brain", "step": 2}, [1, 3]),
        ({"slices": "brain", "min_pixels": 12}, [1, 2, 3]),
        ({"slices": "brain", "min_pixels": 13}, []),
        ({"slices": "tumour", "min_pixels": 13}, []),
    ],
)
def test_slices(tmp_path: Path, values: dict[str, Any], expected: list[int]) -> None:
    case(tmp_path / "Case_1")
    _, (entry,), _, importer = scan(tmp_path, **values)
    assert [row.place for row in importer.read(entry)] == expected


def test_one_channel_is_grey(tmp_path: Path) -> None:
    case(tmp_path / "Case_1", ("_t1ce", "_seg"))
    header, (entry,), _, importer = scan(tmp_path, channels=("t1ce",))
    assert header.channels == ("t1ce",) and importer.read(entry)[0].arrays["image"].shape == (4, 4)


def test_what_is_missing(tmp_path: Path) -> None:
    case(tmp_path / "Case_1")
    case(tmp_path / "Case_2", ("_flair", "_t2", "_seg"))
    case(tmp_path / "Case_3", OLD[:4])
    _, entries, reasons, _ = scan(tmp_path)
    assert [entry.item for entry in entries] == ["Case_1"]
    assert reasons == {"a contrast is missing": 1, "no segmentation": 1}
    _, entries, reasons, importer = scan(tmp_path, missing="zeros", low=0, high=100)
    assert [entry.item for entry in entries] == ["Case_1", "Case_2"] and reasons == {"no segmentation": 1}
    row = importer.read(entries[1])[0]
    assert row.values["modality_present"].tolist() == [1, 0, 0, 1]
    assert not row.arrays["image"][..., 1:3].any() and row.arrays["image"][..., 3].any()


@pytest.mark.parametrize(
    ("endings", "found", "reason"),
    [
        (OLD, (0, 1, 2, 5), "labels other than"),
        (OLD, (0, 2, 3, 4), "labels other than"),
        (NEW, (0, 1, 2, 4), "label 4 in a set"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, endings: Sequence[str], found: Sequence[int], reason: str) -> None:
    case(tmp_path / "Case_1", endings, labels(found))
    _, (entry,), _, importer = scan(tmp_path)
    with pytest.raises(BadFile, match=reason):
        importer.read(entry)


def test_volumes_of_different_shapes(tmp_path: Path) -> None:
    case(tmp_path / "Case_1", segmentation=labels()[:3])
    _, (entry,), _, importer = scan(tmp_path)
    with pytest.raises(BadFile, match="differ in shape"):
        importer.read(entry)
    case(tmp_path / "Case_2", segmentation=np.stack([labels()] * 2, axis=-1))
    _, (_, entry), _, importer = scan(tmp_path)
    with pytest.raises(BadFile, match="no single volume"):
        importer.read(entry)


def test_grades_time_points_and_sites(tmp_path: Path) -> None:
    case(tmp_path / "HGG" / "Brats18_A")
    case(tmp_path / "LGG" / "Brats18_B")
    case(tmp_path / "BraTS-GLI-00001-000", NEW)
    case(tmp_path / "BraTS-GLI-00001-001", NEW)
    _, entries, _, _ = scan(tmp_path)
    assert [entry.group for entry in entries] == ["BraTS-GLI-00001", "BraTS-GLI-00001", "Brats18_A", "Brats18_B"]
    (tmp_path / "partitioning_1.csv").write_text("Partition_ID,Subject_ID\n1,Brats18_A\n2,Brats18_B\n2,absent\n")
    _, entries, reasons, _ = scan(tmp_path, partition="partitioning_1.csv")
    assert [(entry.site, entry.item) for entry in entries] == [
        ("institution 1", "Brats18_A"),
        ("institution 2", "Brats18_B"),
    ]
    assert reasons == {"no row in the partition table": 2}


def test_faults_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="brats: expected folders <case>"):
        scan(tmp_path)
    case(tmp_path / "Case_1")
    with pytest.raises(UserError, match="partition table"):
        scan(tmp_path, partition="none.csv")
    (tmp_path / "empty.csv").write_text("Partition_ID,Subject_ID\n")
    with pytest.raises(UserError, match="lists no case"):
        scan(tmp_path, partition="empty.csv")


@pytest.mark.parametrize(
    "values",
    [
        {"channels": ("flair", "dwi")},
        {"channels": ("flair", "flair")},
        {"channels": ()},
        {"missing": "guess"},
        {"low": 60, "high": 50},
        {"high": 101},
        {"slices": "some"},
        {"min_pixels": 0},
        {"step": 0},
    ],
)
def test_ranges(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=list(values)[-1]):
        BratsParams(**values)
