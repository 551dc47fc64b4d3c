"""ChestX-ray14 folders made of a few pixels: the table as published, findings, lists of splits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.importers.base import Entry, Header, Skipped
from data_prep.importers.presets.chestxray14 import FINDINGS, ChestXray14, ChestXray14Params
from fedmed.errors import UserError

# the first line of the table as published: commas inside the brackets, and one at the end
COLUMNS = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)
ROWS = {
    "00000001_000.png": "Mass|Hernia,0,1,58,M,PA",
    "00000001_001.png": "No Finding,1,1,58,M,AP",
    "00000002_000.png": "Pleural_Thickening,0,2,81,F,LL",
    "00000003_000.png": "Scoliosis|Mass,0,3,81,F,PA",
    "00000004_000.png": ",0,4,81,F,PA",
    "00000009_000.png": "Mass,0,9,81,F,PA",
}


def chest(root: Path, folders: tuple[str, ...] = ("images",)) -> Path:
    """A folder with five of the six images of the table, and one the table does not know."""
    names = [*list(ROWS)[:5], "00000005_000.png"]
    for number, name in enumerate(names):
        folder = root / folders[number % len(folders)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 4), 40 + number, np.uint8)).save(folder / name)  # RGBA
    lines = [COLUMNS, *(f"{name},{cells},2500,2048,0.168,0.168," for name, cells in ROWS.items())]
    (root / "Data_Entry_2017.csv").write_text("\n".join(lines) + "\n")
    return root


def scan(root: Path, **values: Any) -> tuple[Header, list[Entry], Mapping[str, int], ChestXray14]:
    """Header, entries, reasons and importer."""
    skipped = Skipped()
    importer = ChestXray14(root, ChestXray14Params(**values), None)
    header, entries = importer.scan(skipped)
    return header, list(entries), skipped.reasons, importer


@pytest.mark.parametrize("folders", [("images",), ("images_001/images", "images_002/images")])
def test_entries_and_rows(tmp_path: Path, folders: tuple[str, ...]) -> None:
    header, entries, reasons, importer = scan(chest(tmp_path / "nih", folders).parent)
    assert (header.task, header.classes, len(FINDINGS)) == ("multilabel", FINDINGS, 14)
    assert [(entry.site, entry.group, entry.item, entry.split) for entry in entries] == [
        ("", "1", "00000001_000", ""), ("", "1", "00000001_001", ""), ("", "2", "00000002_000", ""),
    ]  # fmt: skip
    assert reasons == {"finding that is none of the fourteen": 1, "no finding given": 1, "no row in the table": 1}
    rows = [importer.read(entry)[0] for entry in entries]
    findings = [[FINDINGS[i] for i in np.flatnonzero(row.values["label"])] for row in rows]
    assert findings == [["Mass", "Hernia"], [], ["Pleural_Thickening"]]
    assert [int(row.values["view_position"]) for row in rows] == [0, 1, 255]
    assert rows[0].arrays["image"].shape == (64, 64) and (rows[0].arrays["image"] == 40).all()


def test_lists_are_the_splits_and_some_patients_validate(tmp_path: Path) -> None:
    root = chest(tmp_path)
    (root / "train_val_list.txt").write_text("00000001_000.png\n00000001_001.png\n")
    assert {entry.split for entry in scan(root)[1]} == {""}  # one list alone is no split
    (root / "test_list.txt").write_text("00000002_000.png\n")
    assert [entry.split for entry in scan(root, val_fraction=0.0)[1]] == ["train", "train", "test"]
    assert [entry.split for entry in scan(root, val_fraction=0.999999)[1]] == ["val", "val", "test"]
    assert {entry.split for entry in scan(root, official_split=False)[1]} == {""}


def test_share_of_patients_that_validate() -> None:
    importer = ChestXray14(Path(), ChestXray14Params(val_fraction=0.25), None)
    splits = [importer._split("train", str(number)) for number in range(2000)]
    assert 0.2 < splits.count("val") / 2000 < 0.3
    assert importer._split("test", "1") == "test" and importer._split("", "1") == ""


def test_faults_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"chestxray14: expected the table Data_Entry_2017.csv .* found 0 folders"):
        scan(tmp_path)
    root = chest(tmp_path)
    (root / "Data_Entry_2017.csv").write_text("Name,Finding\nJane,Mass\n")
    with pytest.raises(UserError, match="Image Index") as caught:
        scan(root)
    assert "Jane" not in str(caught.value)
    with pytest.raises(ValueError, match="val_fraction"):
        ChestXray14Params(val_fraction=1.0)
