"""ISIC challenges: dermatoscopic images with lesion masks (2018, task 1) or a diagnosis as one-hot table (2018, task 3, and 2019).

Folder: `*_Input/` with ISIC_*.jpg, and `*_GroundTruth/` with ISIC_*_segmentation.png, or `*GroundTruth*.csv` with a column `image` and one of 0/1
per diagnosis, in that folder or above. A table named `*Metadata*` or `*LesionGroupings*` may give `lesion_id` (group) and sites. Training,
Validation and Test in the names are the splits, where Training and Test are both there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_prep.importers.base import Entry, Header, Row, Skipped
from data_prep.importers.fit import choose
from data_prep.importers.presets._folders import files, find_root, pictures, subfolders
from data_prep.importers.presets._pixels import MaskedShape, Size, masked_picture
from data_prep.importers.tables import is_absent, numbers, read_table
from fedmed.data.formats.pictures import PICTURE_SUFFIXES
from fedmed.errors import UserError

WANTED = "folders *_Input and *_GroundTruth, or a table *GroundTruth*.csv"
Note = Path | int | str  # mask, class, or the reason there is none
_SPLITS = {"training": "train", "validation": "val", "test": "test"}
_OTHER_TASK = {"segmentation": "task3", "classification": "task1"}


@dataclass(frozen=True)
class IsicParams(MaskedShape):
    """What is taken of an ISIC challenge. Without `--size`: 128 x 128 with masks, 64 x 64 with labels, our choice."""

    task: str = "segmentation"  # "segmentation" (2018 task 1) or "classification" (2018 task 3, 2019)
    site: str = ""  # empty: one; "lesion": letters that begin lesion_id (BCN, HAM, MSK); or a column of the metadata
    official_split: bool = True  # keep to Training, Validation and Test where the first and the last are there

    def __post_init__(self) -> None:
        """Check words and ranges."""
        super().__post_init__()
        choose("task", self.task, ("segmentation", "classification"))


class Isic:
    """Importer of ISIC challenges; see the module."""

    Params: ClassVar[type[IsicParams]] = IsicParams

    def __init__(self, source: Path, params: IsicParams, size: Size | None) -> None:
        self.source, self.params = source, params
        self.size = size or ((128, 128) if params.task == "segmentation" else (64, 64))

    def scan(self, skipped: Skipped) -> tuple[Header, Sequence[Entry]]:
        """Entries of all images that have a mask or a diagnosis, and a site where sites are asked for."""
        root = find_root(self.source, lambda folder: bool(_ending(folder, "_input")), "isic", WANTED)
        images = pictures(self._of_task(_ending(root, "_input")), PICTURE_SUFFIXES, skipped)
        classes: tuple[str, ...] = ("background", "lesion")
        notes: Mapping[str, Note]
        if self.params.task == "segmentation":
            notes = _masks(root, skipped)
        else:
            classes, notes = self._diagnoses(root)
        lesions, sites = self._metadata(root)
        entries = []
        for name, path in images.items():
            note, site = notes.get(name), sites.get(name, "")
            if note is None:
                skipped.add(
                    path, "no mask" if self.params.task == "segmentation" else "no row in the table of diagnoses"
                )
            elif isinstance(note, str):
                skipped.add(path, note)
            elif self.params.site and not site:
                skipped.add(path, "no site in the metadata")
            else:
                found = (path, note) if isinstance(note, Path) else (path,)
                values = {} if isinstance(note, Path) else {"label": np.int64(note)}
                entries.append(Entry(site, name, lesions.get(name, name), found, _part(path, root), values))
        parts = {entry.split for entry in entries}
        if not (self.params.official_split and {"train", "test"} <= parts):
            entries = [Entry(e.site, e.item, e.group, e.files, "", e.values) for e in entries]
        attrs = {
            "name": "ISIC",
            "modality": "dermatoscopy (RGB)",
            "source": "ISIC challenge (challenge.isic-archive.com)",
            "citation": "Skin Lesion Analysis Toward Melanoma Detection 2018. arXiv:1902.03368; HAM10000, doi:10.1038/sdata.2018.161; 2019 also "
            "BCN20000, arXiv:1908.02288",
        }
        header = Header(self.params.task, classes, ("R", "G", "B"), attrs)
        return header, sorted(entries, key=lambda entry: (entry.site, entry.group, entry.item))

    def read(self, entry: Entry) -> Sequence[Row]:
        """One row: image, and mask or label."""
        masks = {"mask": entry.files[1]} if self.params.task == "segmentation" else {}
        return [Row(masked_picture(entry.files[0], masks, self.size, self.params), entry.values)]

    def _of_task(self, folders: list[Path]) -> list[Path]:
        """Folders without those of the other task, when tasks lie side by side."""
        other = _OTHER_TASK[self.params.task]
        return [folder for folder in folders if other not in folder.name.lower()] or folders

    def _diagnoses(self, root: Path) -> tuple[tuple[str, ...], dict[str, int | str]]:
        """Classes, and the class of each image, or why it has none."""
        tables = [read_table(path, "table of diagnoses") for path in self._of_task(_tables(root, ("groundtruth",)))]
        if not tables:
            raise UserError(
                f"isic: no table *GroundTruth*.csv in {root} or its *_GroundTruth folders. Put it there, or set task=segmentation."
            )
        columns = [
            tuple(c for c in table.columns if c.lower() != "image" and "weight" not in c.lower()) for table in tables
        ]
        if len(set(columns)) > 1 or len(columns[0]) < 2:
            raise UserError(
                f"isic: the {len(tables)} tables of diagnoses in {root} do not name the same classes. Keep those of one challenge."
            )
        found: dict[str, int | str] = {}
        for table in tables:
            flags = zip(*(table.column(name) for name in columns[0]), strict=True)
            for name, cells in zip(table.column("image"), flags, strict=True):
                values = numbers(cells)
                one = values is not None and sorted(values) == [0.0] * (len(values) - 1) + [1.0]
                found.setdefault(name, values.index(1.0) if one and values else "not one diagnosis in the table")
        unknown = len(columns[0]) - 1  # ISIC 2019 has a last column UNK that no training image uses
        unused = columns[0][unknown].upper() == "UNK" and unknown not in found.values()
        return columns[0][:unknown] if unused else columns[0], found

    def _metadata(self, root: Path) -> tuple[dict[str, str], dict[str, str]]:
        """Lesion and site of each image, as far as tables say."""
        lesions: dict[str, str] = {}
        sites: dict[str, str] = {}
        for path in _tables(root, ("metadata", "lesiongroupings")):
            table = read_table(path, "metadata")
            columns = {name.lower() for name in table.columns}
            images = table.column("image")
            if "lesion_id" in columns:
                lesion = table.column("lesion_id")
                lesions |= {name: cell for name, cell in zip(images, lesion, strict=True) if not is_absent(cell)}
            if self.params.site not in ("", "lesion") and self.params.site.lower() in columns:
                cells = table.column(self.params.site)
                sites |= {name: cell for name, cell in zip(images, cells, strict=True) if not is_absent(cell)}
        if self.params.site == "lesion":
            heads = {name: re.match(r"[A-Za-z]+", lesion) for name, lesion in lesions.items()}
            sites = {name: match[0].upper() for name, match in heads.items() if match}
        if self.params.site and not sites:
            raise UserError(
                f"isic: site={self.params.site} finds no sites; no table *Metadata*.csv of {root} has that column."
            )
        return lesions, sites


def _masks(root: Path, skipped: Skipped) -> dict[str, Path]:
    masks = pictures(_ending(root, "_groundtruth"), PICTURE_SUFFIXES, skipped, "_segmentation")
    if not masks:
        raise UserError(
            f"isic: no masks *_segmentation.png in a folder *_GroundTruth of {root}. Put them there, or set task=classification."
        )
    return masks


def _ending(folder: Path, ending: str) -> list[Path]:
    return [child for child in subfolders(folder) if child.name.lower().endswith(ending)]


def _tables(root: Path, words: tuple[str, ...]) -> list[Path]:
    """CSV files with a word in their name, in the folder and in its folders *_GroundTruth."""
    places = (root, *_ending(root, "_groundtruth"))
    return [
        path
        for place in places
        for path in files(place)
        if path.suffix.lower() == ".csv" and any(w in path.name.lower() for w in words)
    ]


def _part(path: Path, root: Path) -> str:
    """Split that the folder of an image is named for, "" where none is."""
    words = re.split(r"[_-]", path.relative_to(root).parts[0].lower())
    return next((split for word, split in _SPLITS.items() if word in words), "")
