"""HAM10000: dermatoscopic images of seven diagnoses from four sources, with lesion masks (doi:10.1038/sdata.2018.161).

Folder, as published: `HAM10000_images_part_1/` and `_part_2/` with ISIC_*.jpg, optionally `HAM10000_segmentations_lesion_tschandl/` with
ISIC_*_segmentation.png, and the table `HAM10000_metadata` (with or without .csv or .tab). Site = its column `dataset` (one site where the copy
has none), group = lesion: the set names no patients.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_prep.importers.base import Entry, Header, Row, Skipped
from data_prep.importers.fit import choose
from data_prep.importers.presets._folders import files, find_root, pictures, subfolders
from data_prep.importers.presets._pixels import MaskedShape, Size, masked_picture
from data_prep.importers.tables import read_table
from fedmed.data.formats.pictures import PICTURE_SUFFIXES
from fedmed.errors import UserError

DIAGNOSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
WANTED = "the table HAM10000_metadata and folders HAM10000_images_part_1, HAM10000_images_part_2"
_TABLES = ("ham10000_metadata", "ham10000_metadata.csv", "ham10000_metadata.tab")


@dataclass(frozen=True)
class Ham10000Params(MaskedShape):
    """What is taken of HAM10000. Without `--size`: 128 x 128 with masks, 64 x 64 with labels, as in the reference files."""

    task: str = "segmentation"  # "segmentation" (masks of the lesion, value dx) or "classification" (label = diagnosis)
    shared_lesions: str = "drop"  # lesions listed at two sites (9 of the public set): "drop" or "keep"
    per_lesion: int = 0  # images of one lesion that are taken, the first by name, >= 0; 0: all

    def __post_init__(self) -> None:
        """Check words and ranges."""
        super().__post_init__()
        choose("task", self.task, ("segmentation", "classification"))
        choose("shared_lesions", self.shared_lesions, ("drop", "keep"))
        if self.per_lesion < 0:
            raise ValueError(f"per_lesion: expected 0 (all) or more, got {self.per_lesion}")


class Ham10000:
    """Importer of HAM10000; see the module."""

    Params: ClassVar[type[Ham10000Params]] = Ham10000Params

    def __init__(self, source: Path, params: Ham10000Params, size: Size | None) -> None:
        self.source, self.params = source, params
        self.size = size or ((128, 128) if params.task == "segmentation" else (64, 64))

    def scan(self, skipped: Skipped) -> tuple[Header, Sequence[Entry]]:
        """Entries of all images that have a row in the table, and a mask where the task is segmentation."""
        root = find_root(self.source, _is_root, "ham10000", WANTED)
        images = pictures(_named(root, "image"), PICTURE_SUFFIXES, skipped)
        masks: dict[str, Path] = {}
        if self.params.task == "segmentation":
            masks = pictures(_named(root, "segmentation"), PICTURE_SUFFIXES, skipped, "_segmentation")
            if not masks:
                raise UserError(
                    f"ham10000: no masks *_segmentation.png in a folder HAM10000_segmentations* of {root}. "
                    "Put them there, or set task=classification."
                )
        entries = self._entries(root, images, masks, skipped)
        entries = self._apart(entries, skipped)
        return self._header(), sorted(entries, key=lambda entry: (entry.site, entry.group, entry.item))

    def read(self, entry: Entry) -> Sequence[Row]:
        """One row: image, mask or label, and dx (-1: a diagnosis that is none of the seven)."""
        masks = {"mask": entry.files[1]} if self.params.task == "segmentation" else {}
        return [Row(masked_picture(entry.files[0], masks, self.size, self.params), entry.values)]

    def _entries(self, root: Path, images: dict[str, Path], masks: dict[str, Path], skipped: Skipped) -> list[Entry]:
        rows = _rows(root)
        segmentation = self.params.task == "segmentation"
        entries = []
        for name, path in images.items():
            if name not in rows:
                skipped.add(path, "no row in the metadata")
                continue
            lesion, diagnosis, site = rows[name]
            dx = DIAGNOSES.index(diagnosis) if diagnosis in DIAGNOSES else -1
            if site == "":
                skipped.add(path, "no source in the column dataset")
            elif segmentation and name not in masks:
                skipped.add(path, "no mask")
            elif not segmentation and dx < 0:
                skipped.add(path, "diagnosis that is none of the seven")
            else:
                found = (path, masks[name]) if segmentation else (path,)
                values = {"dx" if segmentation else "label": np.int64(dx)}
                entries.append(Entry(site or "", name, lesion or name, found, values=values))
        return entries

    def _apart(self, entries: list[Entry], skipped: Skipped) -> list[Entry]:
        """Entries without lesions of two sites, and with so many of a lesion as are asked for."""
        sites: dict[str, set[str]] = defaultdict(set)
        for entry in entries:
            sites[entry.group].add(entry.site)
        taken: Counter[str] = Counter()
        kept = []
        for entry in sorted(entries, key=lambda entry: entry.item):
            taken[entry.group] += 1
            if self.params.shared_lesions == "drop" and len(sites[entry.group]) > 1:
                skipped.add(entry.files[0], "lesion listed at two sites")
            elif 0 < self.params.per_lesion < taken[entry.group]:
                skipped.add(entry.files[0], "further image of a lesion")
            else:
                kept.append(entry)
        return kept

    def _header(self) -> Header:
        segmentation = self.params.task == "segmentation"
        attrs: dict[str, str | list[str]] = {
            "name": "HAM10000",
            "modality": "dermatoscopy (RGB)",
            "source": "HAM10000, Harvard Dataverse doi:10.7910/DVN/DBW86T",
            "citation": "The HAM10000 dataset, a large collection of multi-source dermatoscopic images of common pigmented skin lesions. "
            "Scientific Data 5:180161 (2018), doi:10.1038/sdata.2018.161",
        }
        if segmentation:
            attrs["dx_classes"] = list(DIAGNOSES)
        return Header(self.params.task, ("background", "lesion") if segmentation else DIAGNOSES, ("R", "G", "B"), attrs)


def _is_root(folder: Path) -> bool:
    return _metadata(folder) is not None and bool(_named(folder, "image"))


def _metadata(folder: Path) -> Path | None:
    return next((path for path in files(folder) if path.name.lower() in _TABLES), None)


def _named(folder: Path, what: str) -> list[Path]:
    """Folders HAM10000_images* or HAM10000_segmentations*, whatever their case."""
    return [child for child in subfolders(folder) if child.name.lower().startswith(f"ham10000_{what}")]


def _rows(root: Path) -> dict[str, tuple[str, str, str | None]]:
    """Image -> lesion, diagnosis in lower case, site (None: the table has no column for it); the first row of an image counts."""
    path = _metadata(root)
    assert path is not None
    table = read_table(path, "metadata")
    image, lesion, dx = (table.column(name) for name in ("image_id", "lesion_id", "dx"))
    has_site = any(name.lower() == "dataset" for name in table.columns)
    site: Sequence[str | None] = table.column("dataset") if has_site else [None] * len(image)
    rows: dict[str, tuple[str, str, str | None]] = {}
    for name, group, diagnosis, source in zip(image, lesion, dx, site, strict=True):
        rows.setdefault(name.removesuffix(".jpg"), (group, diagnosis.lower(), source))
    return rows
