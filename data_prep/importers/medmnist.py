"""Format `medmnist`: one .npz file with train, validation and test images and labels, as MedMNIST publishes its 2-D sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_prep.importers.base import Entry, Header, Row, Skipped
from data_prep.importers.fit import FitImage, fit_image
from data_prep.importers.labels import check_classes
from fedmed.data.formats.archive import read_npz
from fedmed.data.formats.limits import GIB, BadFile, Limits
from fedmed.data.site_checks import SPLITS
from fedmed.errors import UserError


@dataclass(frozen=True)
class MedMnistParams(FitImage):
    """Names of the classes, and how images come to the size of `--size`."""

    classes: tuple[str, ...] = ()  # names in the order of ids or columns; else numbered
    max_gib: int = 4  # the arrays are held in memory; larger ones are refused, 1..1024

    def __post_init__(self) -> None:
        """Check words and range."""
        super().__post_init__()
        if not 1 <= self.max_gib <= 1024:
            raise ValueError(f"max_gib: expected 1..1024, got {self.max_gib}")


class MedMNIST:
    """The images of one .npz file; one entry per image, each a group of its own."""

    Params: ClassVar[type[MedMnistParams]] = MedMnistParams

    def __init__(self, source: Path, params: MedMnistParams, size: tuple[int, int] | None) -> None:
        """source: the file, or a folder that holds one; size: (H, W) that all images get, None: as they are."""
        self._source, self._params, self._size = source, params, size
        self._images: dict[str, np.ndarray] = {}
        self._labels: dict[str, np.ndarray] = {}

    def scan(self, skipped: Skipped) -> tuple[Header, Sequence[Entry]]:
        """Load the arrays; task and number of classes follow from the labels."""
        path = self._file()
        names = [f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels")]
        try:
            arrays = read_npz(path, names, Limits(max_bytes=self._params.max_gib * GIB))
        except BadFile as error:
            raise UserError(f"{path}: {error}. Expected a .npz file with {', '.join(names)}.") from error
        for split in SPLITS:
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
            self._check(images, labels, split, path)
            self._images[split], self._labels[split] = images, labels.reshape(len(labels), -1)
        columns = self._labels["train"].shape[1]
        if any(labels.shape[1] != columns for labels in self._labels.values()):
            raise UserError(f"{path}: the splits have labels of different widths")
        top = max(int(labels.max(initial=0)) for labels in self._labels.values())
        task = "classification" if columns == 1 else "multilabel"
        count = top + 1 if columns == 1 else columns
        classes = check_classes(self._params.classes or tuple(str(number) for number in range(count)))
        if len(classes) < count:
            raise UserError(f"{path}: classes names {len(classes)} classes, the labels have {count}")
        channels = ("R", "G", "B") if self._images["train"].ndim == 4 else ("grey",)
        entries = [
            Entry("", f"{split}/{number:07d}", f"{split}/{number:07d}", (path,), split)
            for split in SPLITS
            for number in range(len(self._images[split]))
        ]
        remark = "the file names no patients: each image is a group of its own"
        return Header(task, classes, channels, remarks=(remark,)), entries

    def look(self, entry: Entry) -> tuple[int, int]:
        """Size of the images of a split."""
        height, width = self._images[entry.split].shape[1:3]
        return height, width

    def read(self, entry: Entry) -> list[Row]:
        """One image and its label."""
        number = int(entry.item.rpartition("/")[2])
        image, label = self._images[entry.split][number], self._labels[entry.split][number]
        if self._size is not None:
            image = fit_image(image, self._size, self._params.fit, self._params.filter)
        return [Row({"image": image}, {"label": np.int64(label[0]) if len(label) == 1 else label.astype(np.uint8)})]

    def _file(self) -> Path:
        if not self._source.is_dir():
            return self._source
        found = sorted(self._source.glob("*.npz"))
        if len(found) != 1:
            raise UserError(f"{self._source}: expected one .npz file, found {len(found)}. Give the file itself.")
        return found[0]

    def _check(self, images: np.ndarray, labels: np.ndarray, split: str, path: Path) -> None:
        """Raise UserError unless the arrays are 2-D images and their labels."""
        flat = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
        if images.dtype != np.uint8 or not flat:
            raise UserError(
                f"{path}: {split}_images is {images.dtype} of {images.shape}; expected uint8 images (N, H, W) or (N, H, W, 3). "
                "Volumes are not read."
            )
        if labels.dtype.kind not in "iu" or labels.ndim not in (1, 2) or len(labels) != len(images):
            raise UserError(
                f"{path}: {split}_labels is {labels.dtype} of {labels.shape}, expected {len(images)} whole numbers"
            )
