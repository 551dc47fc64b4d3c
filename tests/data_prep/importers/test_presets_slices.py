"""LGG, ACDC and CHASE_DB1 folders made of a few pixels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from data_prep.importers.base import Entry, Header, Importer, Skipped
from data_prep.importers.presets.acdc import AcdcParams, AcdcScribbles
from data_prep.importers.presets.chase import Chase, ChaseParams
from data_prep.importers.presets.lgg import Lgg, LggParams
from fedmed.data.formats.limits import BadFile
from fedmed.errors import UserError


def scan(importer: Importer) -> tuple[Header, list[Entry], Mapping[str, int]]:
    """Header, entries and reasons."""
    skipped = Skipped()
    header, entries = importer.scan(skipped)
    return header, list(entries), skipped.reasons


def lgg_case(root: Path, case: str, equal: tuple[int, ...], tumour: tuple[int, ...], slices: int = 4) -> Path:
    """A case of 4 x 4 slices 1, 2, ...; contrasts in `equal` are copies of FLAIR except, of T1 pre, one pixel of the last slice."""
    folder = root / case
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for number in range(1, slices + 1):
        image = rng.integers(100, 255, (4, 4, 3)).astype(np.uint8)
        for channel in equal:
            image[..., channel] = image[..., 1]
        mask = np.full((4, 4), 255 if number in tumour else 0, np.uint8)
        Image.fromarray(image).save(folder / f"{case}_{number}.tif")
        Image.fromarray(mask).save(folder / f"{case}_{number}_mask.tif")
    return folder


def lgg(root: Path, **values: Any) -> Lgg:
    """An importer of 4 x 4 images."""
    return Lgg(root, LggParams(**values), (4, 4))


def test_lgg_contrasts_are_judged_by_the_whole_case(tmp_path: Path) -> None:
    root = tmp_path / "kaggle_3m"
    lgg_case(root, "TCGA_CS_0001_19960909", (), (2,))
    lgg_case(root, "TCGA_HT_0002_19980826", (0, 2), (2,), slices=12)
    almost = lgg_case(root, "TCGA_HT_0003_19980826", (0, 2), (2,))
    path = almost / f"{almost.name}_4.tif"
    pixels = np.array(Image.open(path))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)
    (root / "data.csv").write_text("Patient;RNASeqCluster\n")
    importer = lgg(tmp_path)
    header, entries, reasons = scan(importer)
    assert header.channels == ("T1 pre-contrast", "FLAIR", "T1 post-contrast") and not reasons
    assert [(entry.site, entry.group[:12], entry.rows) for entry in entries] == [
        ("TCGA-CS", "TCGA_CS_0001", 4), ("TCGA-HT", "TCGA_HT_0002", 12), ("TCGA-HT", "TCGA_HT_0003", 4),
    ]  # fmt: skip
    rows = [importer.read(entry) for entry in entries]
    present = [{tuple(row.values["modality_present"].tolist()) for row in case} for case in rows]
    assert present == [{(1, 1, 1)}, {(0, 1, 0)}, {(1, 1, 0)}]
    assert [row.place for row in rows[1]] == [int(row.values["slice_no"]) for row in rows[1]] == list(range(1, 13))
    assert [bool(row.arrays["mask"].any()) for row in rows[0]] == [False, True, False, False]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"tumour_slices": 2}, [1, 2, 3, 6, 7, 8]),
        ({"tumour_slices": 3, "empty_slices": 2}, [1, 3, 5, 6, 8]),  # places 0, 1.5 to the even 2, 3
        ({"tumour_slices": 0, "empty_slices": 3}, [1, 2, 8]),
        ({"tumour_slices": 0, "empty_slices": 0}, []),
        ({"tumour_slices": 9, "empty_slices": 9}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"tumour_slices": 1, "empty_slices": 9, "brain_fraction": 1.0}, [3]),
    ],
)
def test_lgg_slices(tmp_path: Path, values: dict[str, Any], expected: list[int]) -> None:
    lgg_case(tmp_path, "TCGA_CS_0001_19960909", (), (3, 4, 5, 6), slices=8)
    importer = lgg(tmp_path, **values)
    _, (entry,), _ = scan(importer)
    assert [row.place for row in importer.read(entry)] == expected


def test_lgg_slices_without_mask_and_odd_sizes(tmp_path: Path) -> None:
    folder = lgg_case(tmp_path, "TCGA_CS_0001_19960909", (), (2,))
    (folder / f"{folder.name}_3_mask.tif").unlink()
    (folder / "notes.tif").touch()
    (tmp_path / "TCGA_DU_0002_19960909").mkdir()
    importer = lgg(tmp_path)
    _, (entry,), reasons = scan(importer)
    assert reasons == {"no mask": 1} and len(importer.read(entry)) == 3
    Image.fromarray(np.zeros((5, 4), np.uint8)).save(folder / f"{folder.name}_2_mask.tif")
    with pytest.raises(BadFile, match="differ in size"):
        importer.read(entry)
    with pytest.raises(UserError, match="lgg: expected folders TCGA_"):
        scan(lgg(folder))
    with pytest.raises(ValueError, match="empty_slices"):
        LggParams(empty_slices=-1)


def acdc_slice(root: Path, name: str, **changed: np.ndarray) -> None:
    """A slice of 2 x 4 pixels, with what is changed of it."""
    root.mkdir(parents=True, exist_ok=True)
    arrays = {
        "image": np.array([[0, 0.5, 1, 0.25]] * 2, np.float32),
        "label": np.array([[0, 1, 2, 3]] * 2, np.uint8),
        "scribble": np.array([[0, 4, 2, 4]] * 2, np.uint16),
    }
    with h5py.File(root / f"{name}.h5", "w") as file:
        for key, array in {**arrays, **changed}.items():
            file[key] = array


def test_acdc_sites_and_rows(tmp_path: Path) -> None:
    for name in ("patient001_frame01_slice_0", "patient020_frame12_slice_10", "patient021_frame01_slice_0", "other"):
        acdc_slice(tmp_path / "ACDC_training_slices", name)
    importer = AcdcScribbles(tmp_path, AcdcParams(), (4, 4))
    header, entries, _ = scan(importer)
    assert header.attrs["ignore_value_in_scribble"] == 4 and header.attrs["natural_site"] is False
    assert [(entry.site, entry.group) for entry in entries] == [
        ("ACDC patients 001-020", "patient001"), ("ACDC patients 001-020", "patient020"), ("ACDC patients 021-040", "patient021"),
    ]  # fmt: skip
    (row,) = importer.read(entries[0])
    assert row.arrays["image"].tolist() == [
        [0] * 4,
        [0, 128, 255, 64],
        [0, 128, 255, 64],
        [0] * 4,
    ]  # 63.75, 127.5 to even
    assert row.arrays["mask"].tolist() == [[0] * 4, [0, 1, 2, 3], [0, 1, 2, 3], [0] * 4]
    assert row.arrays["scribble"].tolist() == [[4] * 4, [0, 4, 2, 4], [0, 4, 2, 4], [4] * 4]
    assert {entry.site for entry in scan(AcdcScribbles(tmp_path, AcdcParams(patients_per_site=0), None))[1]} == {""}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"image": np.full((2, 4), np.nan, np.float32)}, "float in 0..1"),
        ({"image": np.full((2, 4), 255, np.uint8)}, "float in 0..1"),
        ({"image": np.zeros((1, 2, 4), np.float32)}, "slices of one size"),
        ({"scribble": np.zeros((2, 3), np.uint16)}, "slices of one size"),
        ({"label": np.full((2, 4), 4, np.uint8)}, "label is not of whole numbers 0..3"),
        ({"scribble": np.full((2, 4), 300, np.uint16)}, "scribble is not of whole numbers 0..4"),
    ],
)
def test_acdc_slices_that_are_none(tmp_path: Path, changed: dict[str, np.ndarray], reason: str) -> None:
    acdc_slice(tmp_path, "patient001_frame01_slice_0", **changed)
    importer = AcdcScribbles(tmp_path, AcdcParams(), None)
    _, (entry,), _ = scan(importer)
    with pytest.raises(BadFile, match=reason):
        importer.read(entry)


def test_acdc_faults_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"acdc: expected slices patient001_frame01_slice_0.h5"):
        scan(AcdcScribbles(tmp_path, AcdcParams(), None))
    with pytest.raises(ValueError, match="patients_per_site"):
        AcdcParams(patients_per_site=-1)


def test_chase_children_crop_and_second_observer(tmp_path: Path) -> None:
    for name in ("Image_01L", "Image_01R", "Image_02L"):
        image = np.zeros((4, 7, 3), np.uint8)
        image[:, 1:5] = 200  # what a crop of the centre keeps: three columns more are cut, the odd one on the right
        Image.fromarray(image).save(tmp_path / f"{name}.jpg", quality=100, subsampling=0)
        left = np.zeros((4, 7), bool)
        left[:, 1:3] = True
        Image.fromarray(left).save(tmp_path / f"{name}_1stHO.png")
        if name != "Image_02L":
            Image.fromarray(~left).save(tmp_path / f"{name}_2ndHO.png")
    importer = Chase(tmp_path, ChaseParams(), (4, 4))
    header, entries, reasons = scan(importer)
    assert header.classes == ("background", "vessel") and reasons == {"no mask of observer 2": 1}
    assert [(entry.group, entry.item) for entry in entries] == [("01", "Image_01L"), ("01", "Image_01R")]
    (row,) = importer.read(entries[0])
    assert int(row.arrays["image"].min()) > 100
    assert row.arrays["mask"].tolist() == [[1, 1, 0, 0]] * 4
    assert row.arrays["mask_rater2"].tolist() == [[0, 0, 1, 1]] * 4
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    with pytest.raises(UserError, match="chase: expected photographs"):
        scan(Chase(nothing, ChaseParams(), None))
