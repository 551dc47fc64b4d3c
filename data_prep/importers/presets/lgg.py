"""LGG segmentation set: brain MRI of 110 patients from five institutions, abnormality drawn on FLAIR (doi:10.1016/j.compbiomed.2019.05.002).

Folder: `kaggle_3m/TCGA_<institution>_<patient>_<date>/` with <case>_<slice>.tif (three contrasts as colours) and <case>_<slice>_mask.tif.
Site = institution, group = case. In ten cases a contrast that was missing had been replaced by FLAIR; `modality_present` says where, found by
equality of all pixels of a case. The table data.csv is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_prep.importers.base import Entry, Header, Row, Skipped
from data_prep.importers.fit import fit_image
from data_prep.importers.presets._folders import files, find_root, subfolders
from data_prep.importers.presets._pixels import MaskedShape, Size, colour, fit_area
from fedmed.data.formats.limits import BadFile
from fedmed.data.formats.pictures import read_levels

CHANNELS = ("T1 pre-contrast", "FLAIR", "T1 post-contrast")
FLAIR = 1
BRAIN = 20  # grey level above which a pixel shows something
WANTED = "folders TCGA_<institution>_<patient>_<date> of slices .tif"
_CASE = re.compile(r"TCGA_([A-Z0-9]{2})_\w+")


@dataclass(frozen=True)
class LggParams(MaskedShape):
    """Which slices are taken and how they are made smaller. Without `--size`: 128 x 128, as in the reference file."""

    tumour_slices: int | None = None  # with abnormality, of a case, evenly spaced, >= 0; null: all (reference: 8)
    empty_slices: int | None = None  # without, showing brain, from both ends, >= 0; null: all (reference: 2)
    brain_fraction: float = 0.1  # brain: more than this share of FLAIR is above 20 of 255, 0..1, our choice

    def __post_init__(self) -> None:
        """Check words and ranges."""
        super().__post_init__()
        for name in ("tumour_slices", "empty_slices"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}: expected null (all) or a number >= 0, got {getattr(self, name)}")
        if not 0.0 <= self.brain_fraction <= 1.0:
            raise ValueError(f"brain_fraction: expected 0..1, got {self.brain_fraction}")


class Lgg:
    """Importer of the LGG segmentation set; an entry is a case, because contrasts are judged by all of its slices. See the module."""

    Params: ClassVar[type[LggParams]] = LggParams

    def __init__(self, source: Path, params: LggParams, size: Size | None) -> None:
        self.source, self.params, self.size = source, params, size or (128, 128)

    def scan(self, skipped: Skipped) -> tuple[Header, Sequence[Entry]]:
        """Entries of all cases; slices without a mask are left out."""
        root = find_root(self.source, lambda folder: bool(_cases(folder)), "lgg", WANTED)
        entries = []
        for folder in _cases(root):
            slices = _slices(folder, skipped)
            if slices:
                paths = tuple(path for number in sorted(slices) for path in slices[number])
                site = f"TCGA-{_CASE.fullmatch(folder.name)[1]}"  # type: ignore[index]
                entries.append(Entry(site, folder.name, folder.name, paths, rows=self._expected(len(slices))))
        return _HEADER, sorted(entries, key=lambda entry: (entry.site, entry.group))

    def read(self, entry: Entry) -> Sequence[Row]:
        """Rows of the slices: image, mask, slice_no and modality_present (3,)."""
        numbers = [_number(path) for path in entry.files[::2]]
        images = [colour(path) for path in entry.files[::2]]
        masks = [read_levels(path) for path in entry.files[1::2]]
        if any(image.shape[:2] != mask.shape for image, mask in zip(images, masks, strict=True)):
            raise BadFile("image and mask of a slice differ in size")
        present = np.array([_differs(images, channel) for channel in range(3)], dtype=np.uint8)
        return [
            Row(
                {
                    "image": fit_image(images[i], self.size, self.params.fit, self.params.filter),
                    "mask": fit_area(masks[i], self.size, self.params.fit, self.params.threshold),
                },
                {"slice_no": np.int32(numbers[i]), "modality_present": present},
                place=numbers[i],
            )
            for i in self._chosen(images, masks)
        ]

    def _expected(self, slices: int) -> int:
        most = [self.params.tumour_slices, self.params.empty_slices]
        return slices if None in most else min(slices, sum(number or 0 for number in most))

    def _chosen(self, images: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> list[int]:
        """Indices of the slices that are taken, ascending."""
        tumour = [i for i, mask in enumerate(masks) if mask.any()]
        empty = [i for i, mask in enumerate(masks) if not mask.any()]
        if self.params.tumour_slices is not None and tumour:
            even = np.linspace(0, len(tumour) - 1, min(self.params.tumour_slices, len(tumour)))
            tumour = [tumour[i] for i in np.rint(even).astype(int)]
        if self.params.empty_slices is not None:
            brain = [i for i in empty if (images[i][..., FLAIR] > BRAIN).mean() > self.params.brain_fraction]
            inwards = [brain[i // 2 if i % 2 == 0 else -1 - i // 2] for i in range(len(brain))]
            empty = inwards[: self.params.empty_slices]
        return sorted(tumour + empty)


_HEADER = Header(
    "segmentation",
    ("background", "FLAIR abnormality (lower-grade glioma)"),
    CHANNELS,
    {
        "name": "LGG segmentation",
        "modality": "brain MRI, 3 contrasts as channels",
        "source": "LGG Segmentation Dataset (Kaggle mateuszbuda/lgg-mri-segmentation), images of The Cancer Imaging Archive, TCGA-LGG",
        "citation": "Association of genomic subtypes of lower-grade gliomas with shape features automatically extracted by a deep learning "
        "algorithm. Computers in Biology and Medicine 109:218-225 (2019), doi:10.1016/j.compbiomed.2019.05.002; TCIA "
        "doi:10.7937/K9/TCIA.2016.L4LTD3TK",
    },
)


def _differs(images: Sequence[np.ndarray], channel: int) -> bool:
    """Whether a contrast is one of its own: FLAIR, or different from FLAIR anywhere in the case."""
    return channel == FLAIR or any(not np.array_equal(image[..., channel], image[..., FLAIR]) for image in images)


def _cases(folder: Path) -> list[Path]:
    return [child for child in subfolders(folder) if _CASE.fullmatch(child.name)]


def _number(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def _slices(folder: Path, skipped: Skipped) -> Mapping[int, tuple[Path, Path]]:
    """Image and mask by the number of the slice."""
    found = {}
    for path in files(folder):
        if re.fullmatch(re.escape(folder.name) + r"_\d+\.tiff?", path.name):
            mask = path.with_name(f"{path.stem}_mask{path.suffix}")
            if mask.is_file():
                found[_number(path)] = (path, mask)
            else:
                skipped.add(path, "no mask")
    return found
