"""NIH ChestX-ray14: frontal chest radiographs with fourteen findings, read from reports by a program and so really noisy (arXiv:1705.02315).

Folder: `images/` or `images_001/images/`, ... with <patient 8 digits>_<follow-up 3 digits>.png, the table `Data_Entry_2017*.csv`, optionally
`train_val_list.txt` and `test_list.txt`. One site, group = patient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_prep.importers.base import Entry, Header, Row, Skipped
from data_prep.importers.fit import fit_image
from data_prep.importers.presets._folders import files, find_root, pictures, subfolders
from data_prep.importers.presets._pixels import Shape, Size, grey
from data_prep.importers.tables import Table, read_table
from fedmed.data.formats.pictures import PICTURE_SUFFIXES
from fedmed.errors import UserError

FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"),
    *("Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"),
)
VIEWS = {"PA": 0, "AP": 1}
OTHER_VIEW = 255
WANTED = "the table Data_Entry_2017.csv and a folder images (or images_001, images_002, ...)"
_NONE = "No Finding"
_LISTS = {"train_val_list.txt": "train", "test_list.txt": "test"}


@dataclass(frozen=True)
class ChestXray14Params(Shape):
    """How the radiographs are made smaller and split. Without `--size`: 64 x 64, as in the reference file."""

    official_split: bool = True  # keep to train_val_list.txt and test_list.txt where both lie beside the table
    val_fraction: float = 0.125  # then: share of the patients of train_val_list.txt that validate, [0, 1)

    def __post_init__(self) -> None:
        """Check words and range."""
        super().__post_init__()
        if not 0.0 <= self.val_fraction < 1.0:
            raise ValueError(f"val_fraction: expected 0 <= val_fraction < 1, got {self.val_fraction}")


class ChestXray14:
    """Importer of ChestX-ray14; see the module."""

    Params: ClassVar[type[ChestXray14Params]] = ChestXray14Params

    def __init__(self, source: Path, params: ChestXray14Params, size: Size | None) -> None:
        self.source, self.params, self.size = source, params, size or (64, 64)

    def scan(self, skipped: Skipped) -> tuple[Header, Sequence[Entry]]:
        """Entries of all radiographs in the table."""
        root = find_root(self.source, _is_root, "chestxray14", WANTED)
        table = read_table(_table(root)[0], "table of radiographs")
        split_of = _lists(root) if self.params.official_split else {}
        images = pictures(_image_folders(root), PICTURE_SUFFIXES, skipped)
        entries = []
        for cells in _cells(table):
            name, findings, patient, view = cells
            path = images.pop(name.rpartition(".")[0] or name, None)
            if path is None:  # no image, or a second row of one
                continue
            found = [finding.strip() for finding in findings.split("|") if finding.strip() != _NONE]
            if not findings or not set(found) <= set(FINDINGS):
                skipped.add(path, "no finding given" if not findings else "finding that is none of the fourteen")
                continue
            label = np.array([finding in found for finding in FINDINGS], dtype=np.int64)
            values = {"label": label, "view_position": np.uint8(VIEWS.get(view.upper(), OTHER_VIEW))}
            group = patient or path.stem.partition("_")[0]
            entries.append(
                Entry("", path.stem, group, (path,), self._split(split_of.get(path.stem, ""), group), values)
            )
        for path in images.values():
            skipped.add(path, "no row in the table")
        return _HEADER, sorted(entries, key=lambda entry: (entry.group, entry.item))

    def read(self, entry: Entry) -> Sequence[Row]:
        """One row: image in grey, label (14,) and view_position (0 PA, 1 AP, 255 other)."""
        return [
            Row(
                {"image": fit_image(grey(entry.files[0]), self.size, self.params.fit, self.params.filter)}, entry.values
            )
        ]

    def _split(self, said: str, patient: str) -> str:
        """Split of a patient: what the lists say, some of train as val."""
        if said != "train":
            return said
        draw = int.from_bytes(hashlib.sha256(f"val {patient}".encode()).digest()[:4], "big") / 2**32
        return "val" if draw < self.params.val_fraction else "train"


_HEADER = Header(
    "multilabel",
    FINDINGS,
    ("CR/DX",),
    {
        "name": "ChestX-ray14",
        "modality": "frontal chest radiograph",
        "source": "NIH ChestX-ray14",
        "citation": "ChestX-ray8: Hospital-scale Chest X-ray Database and Benchmarks on Weakly-Supervised Classification and Localization of "
        "Common Thorax Diseases. CVPR 2017, arXiv:1705.02315",
    },
)


def _is_root(folder: Path) -> bool:
    return bool(_table(folder)) and bool(_image_folders(folder))


def _table(folder: Path) -> list[Path]:
    return [path for path in files(folder) if path.match("Data_Entry_2017*.csv")]


def _image_folders(folder: Path) -> list[Path]:
    return [child for child in subfolders(folder) if child.name == "images" or child.name.startswith("images_")]


def _cells(table: Table) -> list[tuple[str, str, str, str]]:
    """File, findings, patient and view of each row; the cells behind them, whose names hold commas, are not read."""
    columns = [table.column(name) for name in ("Image Index", "Finding Labels", "Patient ID", "View Position")]
    return list(zip(*columns, strict=True))


def _lists(root: Path) -> dict[str, str]:
    """Split of each image by name, empty unless both lists are there."""
    if not all((root / name).is_file() for name in _LISTS):
        return {}
    split_of: dict[str, str] = {}
    for name, split in _LISTS.items():
        try:
            lines = (root / name).read_text(encoding="utf-8", errors="replace").split()
        except OSError as error:
            raise UserError(f"chestxray14: cannot read {root / name}: {error.strerror}") from error
        split_of |= {line.rpartition(".")[0]: split for line in lines}
    return split_of
