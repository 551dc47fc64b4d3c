"""ISIC folders made of a few pixels: both tasks, splits by name, lesions and sites in the metadata, wrong folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.importers.base import Entry, Header, Skipped
from data_prep.importers.presets.isic import Isic, IsicParams
from fedmed.errors import UserError


def picture(path: Path, value: int = 9, size: tuple[int, int] = (6, 8)) -> None:
    """Write a picture of one colour, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def mask(path: Path) -> None:
    """Write a mask of 12 x 16 whose left half is lesion."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.zeros((12, 16), np.uint8)
    levels[:, :8] = 255
    Image.fromarray(levels).save(path)


def isic2018(root: Path, parts: Sequence[str] = ("Training", "Validation", "Test")) -> Path:
    """Folders of ISIC 2018, both tasks, one image of each part, plus one without mask and diagnosis."""
    classes = "MEL,NV,BCC,AKIEC,BKL,DF,VASC"
    for number, part in enumerate(parts):
        picture(root / f"ISIC2018_Task1-2_{part}_Input" / f"ISIC_{number}.jpg")
        mask(root / f"ISIC2018_Task1_{part}_GroundTruth" / f"ISIC_{number}_segmentation.png")
        picture(root / f"ISIC2018_Task3_{part}_Input" / f"ISIC_3{number}.jpg")
        truth = root / f"ISIC2018_Task3_{part}_GroundTruth" / f"ISIC2018_Task3_{part}_GroundTruth.csv"
        truth.parent.mkdir(parents=True)
        flags = ",".join("1.0" if i == number else "0.0" for i in range(7))
        truth.write_text(f"image,{classes}\nISIC_3{number},{flags}\nISIC_gone,{flags}\n")
    picture(root / f"ISIC2018_Task1-2_{parts[0]}_Input" / "ISIC_9.jpg")
    picture(root / f"ISIC2018_Task3_{parts[0]}_Input" / "ISIC_39.jpg")
    return root


def scan_isic(root: Path, **values: Any) -> tuple[Header, list[Entry], Mapping[str, int], Isic]:
    """Header, entries, reasons and importer."""
    skipped = Skipped()
    importer = Isic(root, IsicParams(**values), None)
    header, entries = importer.scan(skipped)
    return header, list(entries), skipped.reasons, importer


def test_isic_2018_masks(tmp_path: Path) -> None:
    header, entries, reasons, importer = scan_isic(isic2018(tmp_path / "isic").parent)
    assert header.classes == ("background", "lesion") and reasons == {"no mask": 1}
    assert [(entry.item, entry.split, entry.site) for entry in entries] == [
        ("ISIC_0", "train", ""), ("ISIC_1", "val", ""), ("ISIC_2", "test", ""),
    ]  # fmt: skip
    (row,) = importer.read(entries[0])
    assert row.arrays["image"].shape == (128, 128, 3) and row.arrays["mask"].mean() == 0.5


def test_isic_2018_diagnoses(tmp_path: Path) -> None:
    header, entries, reasons, importer = scan_isic(isic2018(tmp_path), task="classification")
    assert header.classes == ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
    assert reasons == {"no row in the table of diagnoses": 1}
    assert [(entry.item, entry.split, int(entry.values["label"])) for entry in entries] == [
        ("ISIC_30", "train", 0), ("ISIC_31", "val", 1), ("ISIC_32", "test", 2),
    ]  # fmt: skip
    (row,) = importer.read(entries[2])
    assert row.arrays["image"].shape == (64, 64, 3) and int(row.values["label"]) == 2


def test_isic_splits_need_training_and_test(tmp_path: Path) -> None:
    root = isic2018(tmp_path / "two", ("Training", "Validation"))
    assert {entry.split for entry in scan_isic(root)[1]} == {""}
    assert {entry.split for entry in scan_isic(isic2018(tmp_path / "all"), official_split=False)[1]} == {""}


def isic2019(root: Path) -> Path:
    """Folders of ISIC 2019 as unpacked: a folder inside one of the same name, lesions and sites in the metadata."""
    rows = ["ISIC_0,1,0,0", "ISIC_1_downsampled,0,1,0", "ISIC_2,1,1,0", "ISIC_3,0,0,0", "ISIC_4,0,1,0"]
    for row in rows:
        picture(root / "ISIC_2019_Training_Input" / "ISIC_2019_Training_Input" / f"{row.split(',')[0]}.jpg")
    (root / "ISIC_2019_Training_GroundTruth.csv").write_text("\n".join(["image,MEL,NV,UNK", *rows]) + "\n")
    metadata = ["ISIC_0;45;lower;BCN_01;male", "ISIC_1_downsampled;50;;HAM_02;", "ISIC_4;50;head;;male"]
    text = "\n".join(["image;age_approx;anatom_site_general;lesion_id;sex", *metadata])
    (root / "ISIC_2019_Training_Metadata.csv").write_text(text)
    return root


def test_isic_2019_lesions_sites_and_the_unused_class(tmp_path: Path) -> None:
    header, entries, reasons, _ = scan_isic(isic2019(tmp_path), task="classification")
    assert header.classes == ("MEL", "NV") and reasons == {"not one diagnosis in the table": 2}
    groups = [(entry.item, entry.group, entry.site, entry.split) for entry in entries]
    assert groups == [
        ("ISIC_0", "BCN_01", "", ""), ("ISIC_1_downsampled", "HAM_02", "", ""), ("ISIC_4", "ISIC_4", "", ""),
    ]  # fmt: skip
    _, entries, reasons, _ = scan_isic(tmp_path, task="classification", site="lesion")
    assert [(entry.item, entry.site) for entry in entries] == [("ISIC_0", "BCN"), ("ISIC_1_downsampled", "HAM")]
    assert reasons["no site in the metadata"] == 1
    _, entries, _, _ = scan_isic(tmp_path, task="classification", site="anatom_site_general")
    assert [(entry.item, entry.site) for entry in entries] == [("ISIC_4", "head"), ("ISIC_0", "lower")]


def test_isic_faults_of_the_user(tmp_path: Path) -> None:
    root = isic2019(tmp_path)
    with pytest.raises(UserError, match=r"no masks \*_segmentation.png .* task=classification"):
        scan_isic(root)
    with pytest.raises(UserError, match="site=hospital finds no sites"):
        scan_isic(root, task="classification", site="hospital")
    (root / "Second_GroundTruth.csv").write_text("image,MEL,NV,BCC\n")
    with pytest.raises(UserError, match="do not name the same classes"):
        scan_isic(root, task="classification")
    for path in root.glob("*GroundTruth.csv"):
        path.unlink()
    with pytest.raises(UserError, match="no table"):
        scan_isic(root, task="classification")
    with pytest.raises(UserError, match=r"isic: expected folders \*_Input"):
        scan_isic(root / "ISIC_2019_Training_Input" / "ISIC_2019_Training_Input")
