"""HAM10000 folders made of a few pixels: tables of every kind, what is missing, what is there twice, wrong folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.importers.base import Entry, Header, Skipped
from data_prep.importers.presets.ham10000 import DIAGNOSES, Ham10000, Ham10000Params
from fedmed.errors import UserError

HAM_COLUMNS = "lesion_id,image_id,dx,dx_type,age,sex,localization,dataset"
ROWS = [
    "HAM_1,ISIC_1,nv,histo,60.0,male,back,rosendahl",
    "HAM_2,ISIC_2,mel,histo,,female,back,rosendahl",
    "HAM_3,ISIC_3,bcc,histo,50.0,male,face,vidir_modern",
    "HAM_3,ISIC_4,BCC,histo,50.0,male,face,vidir_modern",
]


def picture(path: Path, value: int = 9, size: tuple[int, int] = (6, 8)) -> None:
    """Write a picture of one colour, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def mask(path: Path, palette: bool = False) -> None:
    """Write a mask of 12 x 16 whose left half is lesion; with a palette: as indices that are the other way round."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.zeros((12, 16), np.uint8)
    levels[:, :8] = 255
    image = Image.fromarray(levels)
    if palette:
        image = Image.fromarray((255 - levels) // 255)
        image = image.convert("P")
        image.putdata((255 - levels).ravel().tolist())
        image.putpalette([255 - i for i in range(256) for _ in range(3)])
    image.save(path)


def ham(root: Path, rows: Sequence[str] = ROWS, name: str = "HAM10000_metadata", separator: str = ",") -> Path:
    """A HAM10000 folder with four images; ISIC_4 lies in part 2."""
    for number in (1, 2, 3, 4):
        picture(root / f"HAM10000_images_part_{1 + number // 4}" / f"ISIC_{number}.jpg", value=10 * number)
        mask(root / "HAM10000_segmentations_lesion_tschandl" / f"ISIC_{number}_segmentation.png", palette=number == 2)
    (root / name).write_text("\n".join([HAM_COLUMNS, *rows]).replace(",", separator) + "\n", encoding="utf-8")
    return root


def scan_ham(root: Path, **values: Any) -> tuple[Header, list[Entry], Mapping[str, int], Ham10000]:
    """Header, entries, reasons and importer."""
    skipped = Skipped()
    importer = Ham10000(root, Ham10000Params(**values), None)
    header, entries = importer.scan(skipped)
    return header, list(entries), skipped.reasons, importer


def test_ham_entries_and_rows(tmp_path: Path) -> None:
    header, entries, reasons, importer = scan_ham(ham(tmp_path))
    assert (header.task, header.classes, header.channels) == ("segmentation", ("background", "lesion"), ("R", "G", "B"))
    found = [(entry.site, entry.group, entry.item, int(entry.values["dx"])) for entry in entries]
    assert found == [
        ("rosendahl", "HAM_1", "ISIC_1", 5),
        ("rosendahl", "HAM_2", "ISIC_2", 4),
        ("vidir_modern", "HAM_3", "ISIC_3", 1),
        ("vidir_modern", "HAM_3", "ISIC_4", 1),
    ]
    assert not reasons
    for entry in entries[:2]:  # the second has a palette that is the other way round
        (row,) = importer.read(entry)
        assert row.arrays["image"].shape == (128, 128, 3) and row.arrays["mask"].dtype == np.uint8
        assert row.arrays["mask"][:, :64].all() and not row.arrays["mask"][:, 64:].any()


def test_ham_classification(tmp_path: Path) -> None:
    header, entries, _, importer = scan_ham(ham(tmp_path), task="classification")
    assert (header.task, header.classes) == ("classification", DIAGNOSES)
    (row,) = importer.read(entries[0])
    assert set(row.arrays) == {"image"} and row.arrays["image"].shape == (64, 64, 3)
    assert int(row.values["label"]) == 5


@pytest.mark.parametrize(
    ("name", "separator"), [("HAM10000_metadata.csv", ";"), ("HAM10000_metadata.tab", "\t"), ("ham10000_metadata", ",")]
)
def test_ham_tables(tmp_path: Path, name: str, separator: str) -> None:
    _, entries, _, _ = scan_ham(ham(tmp_path / "raw", name=name, separator=separator).parent)
    assert len(entries) == 4


def test_ham_what_is_missing_or_unknown_is_counted(tmp_path: Path) -> None:
    rows = [
        "HAM_1,ISIC_1,nv,histo,60.0,male,back,rosendahl",
        "HAM_2,ISIC_2,odd,histo,,female,back,rosendahl",
        "HAM_4,ISIC_4,mel,histo,,female,back,",
        "HAM_9,ISIC_9,mel,histo,,female,back,rosendahl",
    ]
    root = ham(tmp_path, rows)
    picture(root / "HAM10000_images_part_2" / "ISIC_1.jpg")
    _, entries, reasons, _ = scan_ham(root)
    assert [(entry.item, int(entry.values["dx"])) for entry in entries] == [("ISIC_1", 5), ("ISIC_2", -1)]
    assert entries[0].files[0].parent.name == "HAM10000_images_part_1"
    assert reasons == {
        "no row in the metadata": 1,
        "no source in the column dataset": 1,
        "image found twice; the first by path is taken": 1,
    }
    (root / "HAM10000_segmentations_lesion_tschandl" / "ISIC_1_segmentation.png").unlink()
    assert scan_ham(root)[2]["no mask"] == 1
    _, entries, reasons, _ = scan_ham(root, task="classification")
    assert [entry.item for entry in entries] == ["ISIC_1"]
    assert reasons["diagnosis that is none of the seven"] == 1


def test_ham_lesion_at_two_sites(tmp_path: Path) -> None:
    rows = [*ROWS[:3], "HAM_3,ISIC_4,bcc,histo,50.0,male,face,rosendahl"]
    root = ham(tmp_path, rows)
    _, entries, reasons, _ = scan_ham(root)
    assert [entry.item for entry in entries] == ["ISIC_1", "ISIC_2"] and reasons == {"lesion listed at two sites": 2}
    assert len(scan_ham(root, shared_lesions="keep")[1]) == 4


def test_ham_one_image_of_a_lesion(tmp_path: Path) -> None:
    _, entries, reasons, _ = scan_ham(ham(tmp_path), per_lesion=1)
    assert [entry.item for entry in entries] == ["ISIC_1", "ISIC_2", "ISIC_3"]
    assert reasons == {"further image of a lesion": 1}


def test_ham_copies_without_sources_or_masks(tmp_path: Path) -> None:
    root = ham(tmp_path, [row.rpartition(",")[0] for row in ROWS])
    table = root / "HAM10000_metadata"
    table.write_text(table.read_text().replace(",dataset", ""))
    assert {entry.site for entry in scan_ham(root)[1]} == {""}
    for path in (root / "HAM10000_segmentations_lesion_tschandl").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"no masks \*_segmentation.png .* task=classification"):
        scan_ham(root)
    assert len(scan_ham(root, task="classification")[1]) == 4


def test_ham_wrong_folder_or_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ham10000: expected the table HAM10000_metadata and folders"):
        scan_ham(tmp_path)
    root = ham(tmp_path)
    (root / "HAM10000_metadata").write_text("a,b\nJane,Doe\n")
    with pytest.raises(UserError, match="image_id") as caught:
        scan_ham(root)
    assert "Jane" not in str(caught.value)


@pytest.mark.parametrize("values", [{"task": "multilabel"}, {"shared_lesions": "move"}, {"per_lesion": -1}])
def test_ham_ranges(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Ham10000Params(**values)
