"""One site as it is used: images, annotation, splits on a device. Read by `fedmed.data.site_file`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import torch

from fedmed.config import nearest
from fedmed.data.mapped import FileRows, HostRows
from fedmed.data.site_checks import SPLITS, open_hdf5
from fedmed.data.split import BATCH_EXTRAS, Batch, Split, Store, make_decoder
from fedmed.errors import UserError


@dataclass(eq=False)
class SiteData:
    """One site, in the types of the file: in memory, or with images and masks that stay in the file (`mapped`).

    image (N,H,W) or (N,H,W,C); target: what training reads, (N,) int, (N,L) 0/1 or (N,H,W) class ids; eval_target: what
    validation and test are scored against (mask or label; None: `target`); splits: name -> (n,) int32; extras: per-item
    arrays (N, ...) and active_classes (L,); label_kind: kind of annotation in `target`; ignore_value: pixel value that
    means "not annotated"; mean, std: normalisation on the 0..1 scale. Mapped images and masks are read-only; an int, a
    slice or an index array reads those items and no others.
    """

    name: str
    task: str
    classes: tuple[str, ...]
    channels: tuple[str, ...]
    image_size: tuple[int, int]
    label_kind: str
    image: np.ndarray | FileRows
    target: np.ndarray | FileRows
    item_id: list[str]
    group_id: list[str]
    splits: dict[str, np.ndarray]
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    eval_target: np.ndarray | FileRows | None = None
    ignore_value: int | None = None
    origin: tuple[Path, str] | None = None  # file and group, for `read`
    mapped: bool = False
    _stores: dict[torch.device, Store] = field(default_factory=dict, init=False, repr=False)
    _splits: dict[tuple[str, torch.device], Split] = field(default_factory=dict, init=False, repr=False)
    _labels: dict[tuple[bool, torch.device], torch.Tensor | HostRows] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        unsigned16 = self.image.dtype == np.uint16
        self._decode = make_decoder(self.mean, self.std, len(self.channels), unsigned16)

    @property
    def num_classes(self) -> int:
        """Number of classes, background included."""
        return len(self.classes)

    @property
    def active_classes(self) -> np.ndarray:
        """Classes the site annotates (in at least one training image, or any where it has none), (L,) bool; all of them
        when the file does not say.
        """
        flags = self.extras.get("active_classes")
        if flags is None:
            return np.ones(self.num_classes, dtype=bool)
        rows = self.splits.get("train", ())
        kept = flags[rows] if flags.ndim == 2 and len(rows) else flags
        return np.asarray(kept != 0) if kept.ndim == 1 else np.asarray((kept != 0).any(axis=0))

    def annotated(self, batch: Batch) -> torch.Tensor | None:
        """Which classes each item of a batch is annotated for, (B, L) bool (a 0 of another class says nothing); None
        when the file does not say.
        """
        flags = batch.extras.get("active_classes")
        if flags is None and "active_classes" in self.extras:  # said of the site as a whole
            whole = torch.from_numpy(self.active_classes).to(batch.targets.device)
            return whole.expand(len(batch), -1)
        return None if flags is None else flags != 0

    def num_examples(self, split: str) -> int:
        """Number of images in a split."""
        return len(self.splits.get(split, ()))

    def read(self, name: str) -> np.ndarray:
        """Dataset `name` of the site (kept in `extras` from then on); large ones such as further masks are only read
        when asked for here.
        """
        if name not in self.extras:
            if self.origin is None:
                raise UserError(f"Site {self.name!r} has no dataset {name!r}{nearest(name, self.extras)}")
            path, group = self.origin
            with open_hdf5(path) as file:
                node = file[group] if group else file
                names = [key for key in node if isinstance(node[key], h5py.Dataset)]
                if name not in names:
                    raise UserError(f"{path}, site {self.name!r}: no dataset {name!r}{nearest(name, names)}")
                self.extras[name] = node[name][...]
        return self.extras[name]

    def split(self, name: str, device: str | torch.device = "cpu") -> Split:
        """Split train, val or test on `device`; images are moved there once and shared by all splits (mapped ones batch
        by batch). train reads `target`, the others `eval_target`.
        """
        if name not in SPLITS:
            raise UserError(f"Unknown split {name!r}{nearest(name, SPLITS)}")
        place = torch.device(device)
        if (name, place) not in self._splits:
            rows = torch.from_numpy(np.asarray(self.splits.get(name, ()), dtype=np.int64))
            labels = self._labels_on(place, training=name == "train" or self.eval_target is None)
            self._splits[name, place] = Split(self._store_on(place), rows, labels, of_site=True)
        return self._splits[name, place]

    def _store_on(self, place: torch.device) -> Store:
        if place not in self._stores:
            extras = {
                key: torch.from_numpy(np.ascontiguousarray(self.extras[key])).to(place)
                for key in BATCH_EXTRAS
                if key in self.extras and self.extras[key].ndim >= 2
            }
            images = HostRows(self.image, place) if self.mapped else self._image_tensor().to(place)
            self._stores[place] = Store(images, extras, self._decode, self.task, self.num_classes, self.ignore_value)
        return self._stores[place]

    def _image_tensor(self) -> torch.Tensor:
        image = np.asarray(self.image)
        planes = image[:, None] if image.ndim == 3 else np.moveaxis(image, -1, 1)
        planes = np.ascontiguousarray(planes)  # no copy when loaded from a file
        return torch.from_numpy(planes.view(np.int16) if planes.dtype == np.uint16 else planes)  # as HostRows does

    def _labels_on(self, place: torch.device, training: bool) -> torch.Tensor | HostRows:
        if (training, place) not in self._labels:
            values = self.target if training or self.eval_target is None else self.eval_target
            if self.mapped and values.ndim >= 3:
                self._labels[training, place] = HostRows(values, place, torch.uint8)
            else:
                kind = np.int64 if self.task == "classification" else np.uint8
                self._labels[training, place] = torch.from_numpy(np.ascontiguousarray(values, dtype=kind)).to(place)
        return self._labels[training, place]
