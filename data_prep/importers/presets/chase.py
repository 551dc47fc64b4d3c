"""CHASE_DB1: retinal photographs of 14 children, vessels drawn by two observers (doi:10.1109/TBME.2012.2205687).

Folder: Image_<nn><L|R>.jpg with _1stHO.png (`mask`) and _2ndHO.png (`mask_rater2`) beside. One site, group = child (both eyes).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from data_prep.importers.base import Entry, Header, Row, Skipped
from data_prep.importers.presets._folders import files, find_root
from data_prep.importers.presets._pixels import MaskedShape, Size, masked_picture

WANTED = "photographs Image_01L.jpg with Image_01L_1stHO.png and Image_01L_2ndHO.png"
_PHOTOGRAPH = re.compile(r"(Image_(\d+)[LR])\.jpe?g", re.IGNORECASE)


@dataclass(frozen=True)
class ChaseParams(MaskedShape):
    """How the photographs are made smaller. Without `--size`: 256 x 256, as in the reference file."""

    fit: str = "crop"  # "crop" (the centre), "stretch" (aspect ratio not kept) or "pad" (zeros around)
    threshold: float = 96 / 255  # share of a pixel's area above which it is vessel, 0..1; low keeps thin ones


class Chase:
    """Importer of CHASE_DB1; see the module."""

    Params: ClassVar[type[ChaseParams]] = ChaseParams

    def __init__(self, source: Path, params: ChaseParams, size: Size | None) -> None:
        self.source, self.params, self.size = source, params, size or (256, 256)

    def scan(self, skipped: Skipped) -> tuple[Header, Sequence[Entry]]:
        """Entries of all photographs that both observers drew."""
        root = find_root(self.source, lambda folder: bool(_photographs(folder)), "chase", WANTED)
        entries = []
        for path, name, child in _photographs(root):
            masks = [path.with_name(f"{name}_{observer}.png") for observer in ("1stHO", "2ndHO")]
            missing = [number for number, mask in enumerate(masks, start=1) if not mask.is_file()]
            if missing:
                skipped.add(path, f"no mask of observer {missing[0]}")
            else:
                entries.append(Entry("", name, child, (path, *masks)))
        header = Header(
            "segmentation",
            ("background", "vessel"),
            ("R", "G", "B"),
            {
                "name": "CHASE_DB1",
                "modality": "retinal fundus photograph (RGB)",
                "source": "CHASE_DB1, Kingston University",
                "citation": "An ensemble classification-based approach applied to retinal blood vessel segmentation. "
                "IEEE TBME 59(9):2538-2548 (2012), doi:10.1109/TBME.2012.2205687",
            },
        )
        return header, sorted(entries, key=lambda entry: (entry.group, entry.item))

    def read(self, entry: Entry) -> Sequence[Row]:
        """One row: image, mask and mask_rater2."""
        image, first, second = entry.files
        return [Row(masked_picture(image, {"mask": first, "mask_rater2": second}, self.size, self.params))]


def _photographs(folder: Path) -> list[tuple[Path, str, str]]:
    """Path, name and child of each photograph in a folder."""
    matches = ((path, _PHOTOGRAPH.fullmatch(path.name)) for path in files(folder))
    return [(path, match[1], match[2]) for path, match in matches if match]
