"""BraTS: brain tumours in four MRI contrasts, as slices of the volumes (2018-2021, FeTS, and 2023 glioma; arXiv:2107.02314).

Folder: `<case>/<case>_flair.nii.gz`, `_t1`, `_t1ce`, `_t2`, `_seg`, or the newer `<case>-t2f`, `-t1n`, `-t1c`, `-t2w`, `-seg`; .nii too; cases may
lie in HGG/ and LGG/. Group = patient (of BraTS-GLI-00001-000: BraTS-GLI-00001). One site, or those of a FeTS partition table. Labels become
1 necrosis and non-enhancing tumour, 2 oedema, 3 enhancing tumour (4 in the older sets).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_prep.importers.base import Entry, Header, Row, Skipped
from data_prep.importers.fit import choose, fit_image, fit_mask
from data_prep.importers.presets._folders import find_root, subfolders
from data_prep.importers.presets._pixels import Shape, Size
from data_prep.importers.tables import read_table
from fedmed.data.formats.limits import BadFile
from fedmed.data.formats.nifti import Nifti
from fedmed.errors import UserError

CLASSES = ("background", "necrotic and non-enhancing tumour", "oedema", "enhancing tumour")
NAMES = {"flair": ("_flair", "-t2f"), "t1": ("_t1", "-t1n"), "t1ce": ("_t1ce", "-t1c"), "t2": ("_t2", "-t2w")}
SEGMENTATION = ("_seg", "-seg")
WANTED = "folders <case> of volumes <case>_flair.nii.gz (or <case>-t2f.nii.gz)"
_SLICES = {"all": 155, "brain": 140, "tumour": 66}  # of a case, about


@dataclass(frozen=True)
class BratsParams(Shape):
    """Which contrasts and slices are taken and how they are scaled. Without `--size`: 128 x 128, our choice (stored: 240 x 240)."""

    channels: tuple[str, ...] = ("flair", "t1", "t1ce", "t2")  # some of these four, in the order of the channels
    missing: str = "skip"  # a case without one of them: "skip", or "zeros" with modality_present 0
    low: float = 0.5  # percentile of the brain's values that becomes 0, 0 <= low < high
    high: float = 99.5  # percentile of the brain's values that becomes 255, <= 100, our choice
    slices: str = "brain"  # those that show "brain" or "tumour", or "all"
    min_pixels: int = 1  # pixels of brain or tumour, as stored, that a slice needs, >= 1
    step: int = 1  # of those, every step-th, >= 1
    partition: str = ""  # FeTS table beside the cases whose Partition_ID are the sites; empty: one site

    def __post_init__(self) -> None:
        """Check words and ranges."""
        super().__post_init__()
        for channel in self.channels:
            choose("channels", channel, tuple(NAMES))
        if not self.channels or len(set(self.channels)) < len(self.channels):
            raise ValueError(f"channels: expected one or more, each once, got {self.channels}")
        choose("missing", self.missing, ("skip", "zeros"))
        choose("slices", self.slices, ("brain", "tumour", "all"))
        if not 0 <= self.low < self.high <= 100:
            raise ValueError(f"low, high: expected 0 <= low < high <= 100, got {self.low} and {self.high}")
        if min(self.min_pixels, self.step) < 1:
            raise ValueError(f"min_pixels, step: expected 1 or more, got {self.min_pixels} and {self.step}")


class Brats:
    """Importer of BraTS; an entry is a case. See the module."""

    Params: ClassVar[type[BratsParams]] = BratsParams

    def __init__(self, source: Path, params: BratsParams, size: Size | None) -> None:
        self.source, self.params, self.size = source, params, size or (128, 128)

    def scan(self, skipped: Skipped) -> tuple[Header, Sequence[Entry]]:
        """Entries of all cases with a segmentation, and with all contrasts unless zeros may stand for one."""
        root = find_root(self.source, lambda folder: bool(_cases(folder)), "brats", WANTED)
        sites = self._sites(root)
        entries = []
        for folder in _cases(root):
            volumes = [_volume(folder, NAMES[channel]) for channel in self.params.channels]
            segmentation = _volume(folder, SEGMENTATION)
            if segmentation is None:
                skipped.add(folder, "no segmentation")
            elif not any(volumes) or (self.params.missing == "skip" and None in volumes):
                skipped.add(folder, "a contrast is missing")
            elif sites and folder.name not in sites:
                skipped.add(folder, "no row in the partition table")
            else:
                found = (segmentation, *(path for path in volumes if path is not None))
                patient = re.sub(r"^(BraTS-\w+-\d+)-\d+$", r"\1", folder.name)
                entries.append(
                    Entry(
                        sites.get(folder.name, ""),
                        folder.name,
                        patient,
                        found,
                        rows=_SLICES[self.params.slices] // self.params.step,
                    )
                )
        attrs = {
            "name": "BraTS",
            "modality": "brain MRI, contrasts as channels",
            "source": "BraTS challenge",
            "citation": "The RSNA-ASNR-MICCAI BraTS 2021 Benchmark on Brain Tumor Segmentation and Radiogenomic Classification. arXiv:2107.02314",
        }
        header = Header("segmentation", CLASSES, self.params.channels, attrs)
        return header, sorted(entries, key=lambda entry: (entry.site, entry.group, entry.item))

    def read(self, entry: Entry) -> Sequence[Row]:
        """Rows of the slices: image (h, w, channels) uint8, mask, slice_no and modality_present (channels,)."""
        folder = entry.files[0].parent
        labels = _labels(Nifti.open(entry.files[0]).volume(), newer=entry.files[0].name.startswith(f"{folder.name}-"))
        paths = [_volume(folder, NAMES[channel]) for channel in self.params.channels]
        present = np.array([path is not None for path in paths], dtype=np.uint8)
        volume = np.zeros((*labels.shape, len(paths)), dtype=np.uint8)
        brain = np.zeros(labels.shape, dtype=bool)
        for channel, path in enumerate(paths):
            if path is None:
                continue
            values = Nifti.open(path).volume()
            if values.shape != labels.shape:
                raise BadFile("a contrast and the segmentation differ in shape")
            brain |= values != 0
            volume[..., channel] = scale(values, self.params.low, self.params.high)
        image = volume[..., 0] if len(paths) == 1 else volume
        return [
            Row(
                {
                    "image": fit_image(image[:, :, i], self.size, self.params.fit, self.params.filter),
                    "mask": fit_mask(labels[:, :, i], self.size, self.params.fit, "classes"),
                },
                {"slice_no": np.int32(i), "modality_present": present},
                place=i,
            )
            for i in self._chosen(brain, labels)
        ]

    def _chosen(self, brain: np.ndarray, labels: np.ndarray) -> list[int]:
        """Numbers of the slices that are taken."""
        shown = {"brain": brain, "tumour": labels != 0}.get(self.params.slices)
        if shown is None:
            return list(range(labels.shape[2]))[:: self.params.step]
        kept = np.flatnonzero(shown.sum(axis=(0, 1)) >= self.params.min_pixels)
        return [int(i) for i in kept[:: self.params.step]]

    def _sites(self, root: Path) -> dict[str, str]:
        """Site of each case by the partition table; empty where none is named."""
        if not self.params.partition:
            return {}
        table = read_table(root / self.params.partition, "partition table")
        pairs = zip(table.column("Subject_ID"), table.column("Partition_ID"), strict=True)
        sites = {case: f"institution {number}" for case, number in pairs if case and number}
        if not sites:
            raise UserError(
                f"brats: partition={self.params.partition} lists no case. Give a table of Partition_ID and Subject_ID."
            )
        return sites


def scale(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values of a volume as uint8: percentiles `low` and `high` of those that are not 0 become 0 and 255, the others lie between; 0 stays 0.

    In: (X, Y, Z), 0 outside of the brain. A brain of one value becomes 255. Raises BadFile for values that are no numbers.
    """
    inside = values != 0
    if not np.isfinite(values).all():
        raise BadFile("values that are infinite or no numbers")
    if not inside.any():
        return np.zeros(values.shape, dtype=np.uint8)
    bottom, top = np.percentile(values[inside], (low, high)).tolist()
    if top > bottom:
        spread = np.clip((values.astype(np.float32) - bottom) * (255.0 / (top - bottom)), 0, 255)
    else:
        spread = np.full(values.shape, 255.0, dtype=np.float32)
    return np.where(inside, np.rint(spread), 0).astype(np.uint8)


def _labels(values: np.ndarray, newer: bool) -> np.ndarray:
    """Classes 0..3 from labels 0, 1, 2 and 4 or 3: uint8, the same shape. Raises BadFile for others."""
    if values.ndim != 3:
        raise BadFile("a segmentation that is no single volume")
    found = set(np.unique(values).tolist())
    if not found <= {0, 1, 2, 3, 4} or {3, 4} <= found:
        raise BadFile("a segmentation with labels other than 0, 1, 2 and 4 (or 3)")
    if newer and 4 in found:  # in sets after treatment 4 is the resection cavity
        raise BadFile("label 4 in a set whose enhancing tumour is 3")
    return np.array([0, 1, 2, 3, 3], dtype=np.uint8)[values.astype(np.uint8)]


def _volume(folder: Path, endings: Sequence[str]) -> Path | None:
    candidates = (folder / f"{folder.name}{ending}{suffix}" for ending in endings for suffix in (".nii.gz", ".nii"))
    return next((path for path in candidates if path.is_file()), None)


def _cases(folder: Path) -> list[Path]:
    """Folders of cases, also those in HGG and LGG."""
    places = [folder, *(child for child in subfolders(folder) if child.name in ("HGG", "LGG"))]
    return [
        case for place in places for case in subfolders(place) if any(_volume(case, names) for names in NAMES.values())
    ]
