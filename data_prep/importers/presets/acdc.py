"""ACDC cardiac MRI slices with scribbles people drew (doi:10.1109/TMI.2018.2837502; scribbles arXiv:2007.01152).

Folder: `ACDC_training_slices/patient<nnn>_frame<nn>_slice_<n>.h5` (as WSL4MIS ships them) with image float [0, 1], label 0..3 and scribble,
where 4 is not drawn and 0 is drawn background. Group = patient. All come from one hospital; sites are blocks of patient numbers, by which
diagnoses differ.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_prep.importers.base import Entry, Header, Row, Skipped
from data_prep.importers.fit import fit_image, fit_mask, frame
from data_prep.importers.presets._folders import files, find_root
from data_prep.importers.presets._pixels import Shape, Size, drawn_cells
from fedmed.data.formats.h5slice import read_h5
from fedmed.data.formats.limits import BadFile

CLASSES = ("background", "right ventricle cavity", "myocardium", "left ventricle cavity")
NOT_DRAWN = 4
WANTED = "slices patient001_frame01_slice_0.h5"
_SLICE = re.compile(r"(patient(\d+))_frame\d+_slice_\d+\.h5", re.IGNORECASE)


@dataclass(frozen=True)
class AcdcParams(Shape):
    """How the slices are made smaller and dealt to sites. Without `--size`: 128 x 128, as in the reference file."""

    fit: str = "pad"  # "pad" (zeros around, nothing drawn there), "stretch" or "crop" (the centre)
    patients_per_site: int = 20  # block of patient numbers that makes a site, >= 0; 0: one site

    def __post_init__(self) -> None:
        """Check words and range."""
        super().__post_init__()
        if self.patients_per_site < 0:
            raise ValueError(f"patients_per_site: expected 0 (one site) or more, got {self.patients_per_site}")


class AcdcScribbles:
    """Importer of ACDC slices with scribbles; see the module."""

    Params: ClassVar[type[AcdcParams]] = AcdcParams

    def __init__(self, source: Path, params: AcdcParams, size: Size | None) -> None:
        self.source, self.params, self.size = source, params, size or (128, 128)

    def scan(self, skipped: Skipped) -> tuple[Header, Sequence[Entry]]:
        """Entries of all slices."""
        root = find_root(self.source, lambda folder: bool(_slices(folder)), "acdc", WANTED)
        entries = [
            Entry(self._site(int(number)), path.stem, patient, (path,)) for path, patient, number in _slices(root)
        ]
        header = Header(
            "segmentation",
            CLASSES,
            ("MR",),
            {
                "name": "ACDC with scribbles",
                "natural_site": False,  # blocks of patients of one hospital
                "modality": "cardiac cine MRI, short axis, ED and ES",
                "source": "ACDC (MICCAI 2017) training cases with human scribbles, slices as in github HiLab-git/WSL4MIS",
                "citation": "Deep Learning Techniques for Automatic MRI Cardiac Multi-structures Segmentation and Diagnosis: Is the Problem "
                "Solved? IEEE TMI 37(11):2514-2525 (2018), doi:10.1109/TMI.2018.2837502; scribbles: Learning to Segment from Scribbles using "
                "Multi-scale Adversarial Attention Gates. IEEE TMI 40(8) (2021), arXiv:2007.01152",
                "ignore_value_in_scribble": NOT_DRAWN,
            },
        )
        return header, sorted(entries, key=lambda entry: (entry.site, entry.group, entry.item))

    def read(self, entry: Entry) -> Sequence[Row]:
        """One row: image (8 bits), mask and scribble."""
        stored = read_h5(entry.files[0], ("image", "label", "scribble"))
        image, label, scribble = (stored[name] for name in ("image", "label", "scribble"))
        _check(image, label, scribble)
        pixels = np.rint(image * image.dtype.type(255)).astype(np.uint8)
        marks = frame(scribble.astype(np.uint8), self.size, self.params.fit, fill=NOT_DRAWN)
        return [
            Row(
                {
                    "image": fit_image(pixels, self.size, self.params.fit, self.params.filter),
                    "mask": fit_mask(label.astype(np.uint8), self.size, self.params.fit, "nearest"),
                    "scribble": drawn_cells(marks, self.size, NOT_DRAWN),
                }
            )
        ]

    def _site(self, number: int) -> str:
        block = self.params.patients_per_site
        if block == 0:
            return ""
        first = (max(number, 1) - 1) // block * block + 1
        return f"ACDC patients {first:03d}-{first + block - 1:03d}"


def _check(image: np.ndarray, label: np.ndarray, scribble: np.ndarray) -> None:
    """Raise BadFile unless the three are one slice: equal shapes, image in 0..1, classes 0..3, marks 0..4."""
    if image.ndim != 2 or image.shape != label.shape or image.shape != scribble.shape or not image.size:
        raise BadFile("image, label and scribble are not slices of one size")
    if image.dtype.kind != "f" or not (image.min() >= 0 and image.max() <= 1):  # NaN fails too
        raise BadFile("image is not a float in 0..1")
    for name, values, largest in (("label", label, len(CLASSES) - 1), ("scribble", scribble, NOT_DRAWN)):
        if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > largest:
            raise BadFile(f"{name} is not of whole numbers 0..{largest}")


def _slices(folder: Path) -> list[tuple[Path, str, str]]:
    """Path, patient and number of the patient of each slice in a folder."""
    matches = ((path, _SLICE.fullmatch(path.name)) for path in files(folder))
    return [(path, match[1], match[2]) for path, match in matches if match]
