"""Compact views on one split of a site, and the batches decoded from them.

Letters: N images of a site, n of a split, B of a batch, C channels, L classes, H W pixels. Images and labels stay in
the type of the file (usually uint8) until a batch is asked for; all splits and subsets of a site share one image
tensor, or one way to the images in the file.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmed.data.decode import Decoder, make_decoder
from fedmed.data.mapped import HostRows

__all__ = ["BATCH_EXTRAS", "Batch", "Split", "Store", "fingerprint", "make_decoder"]
BATCH_EXTRAS = ("modality_present", "active_classes")  # per-item extras that ride on every batch


class _Lazy:
    """A dataclass field that may be handed a function, which is called once, when the field is first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.slot = f"_{name}"

    def __get__(self, batch: Any, owner: type | None = None) -> Any:
        if batch is None:
            return None  # the default of the field
        value = batch.__dict__[self.slot]
        if value is None:
            return batch.images
        if not isinstance(value, Tensor):
            value = batch.__dict__[self.slot] = value()
        return value

    def __set__(self, batch: Any, value: Any) -> None:
        batch.__dict__[self.slot] = value


@dataclass(eq=False)
class Batch:
    """Decoded items of one step.

    images (B,C,H,W) float32; targets (B,) int64, (B,L) float32 or (B,H,W) int64 (float32 when they were replaced by
    soft targets); index (B,) int64 positions in the site; source (B,C,H,W) float32, the images before augmentation
    (`images` itself when there was none, decoded on first reading otherwise); extras name -> (B, ...) tensors.
    """

    images: Tensor
    targets: Tensor
    index: Tensor
    source: Any = _Lazy()
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.images.shape[0])


@dataclass(frozen=True)
class Store:
    """What all splits of a site share: images (N,C,H,W) in the file's type on one device (or gathered from the file and
    moved there), per-item extras (N, ...), the decoder.
    """

    images: Tensor | HostRows
    extras: dict[str, Tensor]
    decode: Decoder
    task: str
    num_classes: int
    ignore_value: int | None


class Split:
    """Ordered view on n items of one site; cheap to cut (`subset`) and to relabel (`with_targets`).

    In: rows (n,) int64 places in the site; labels, compact, (N, ...) over the site when `of_site`, else (n, ...) of the
    items themselves.
    """

    def __init__(self, store: Store, rows: Tensor, labels: Tensor | HostRows, of_site: bool) -> None:
        self._store = store
        self._rows = rows.to(self.home)
        self._labels = labels
        self._of_site = of_site

    def __len__(self) -> int:
        return int(self._rows.numel())

    @property
    def index(self) -> Tensor:
        """Positions of the items in the site, (n,) int64."""
        return self._rows.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where batches are made."""
        return self._store.images.device

    @property
    def home(self) -> torch.device:
        """Where positions are looked up: `device`, or the host for images that stay in the file. Positions of `raw` lie best here."""
        return torch.device("cpu") if isinstance(self._store.images, HostRows) else self.device

    @property
    def task(self) -> str:
        """segmentation, classification or multilabel."""
        return self._store.task

    @property
    def num_classes(self) -> int:
        """Number of classes of the site file, background included."""
        return self._store.num_classes

    @property
    def ignore_value(self) -> int | None:
        """Pixel value that means "not annotated", or None when masks are complete."""
        return self._store.ignore_value

    @property
    def targets(self) -> Tensor:
        """Labels of the n items in their compact type: (n,) int64, (n,L) uint8 or (n,H,W) uint8.

        Masks that stay in the file are all read for it; `target_blocks` needs no such memory.
        """
        if not self._of_site and isinstance(self._labels, Tensor):
            return self._labels
        return self._labels_at(torch.arange(len(self)))

    def target_blocks(self, size: int = 64) -> Iterator[Tensor]:
        """`targets` in blocks of at most `size` items, one after the other."""
        for positions in torch.arange(len(self)).split(size):
            yield self._labels_at(positions)

    def _labels_at(self, positions: Tensor) -> Tensor:
        return _select(self._labels, _select(self._rows, positions) if self._of_site else positions)

    def raw(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Undecoded images (B,C,H,W), compact targets and site positions (B,) of the items at `positions` (B,) int64 in
        the split.
        """
        rows = _select(self._rows, positions)
        labels = _select(self._labels, rows if self._of_site else positions)
        return _select(self._store.images, rows), labels, rows.to(self.device)

    def decode(self, raw: Tensor) -> Tensor:
        """Stored images to float32 with the site's normalisation, (B,C,H,W)."""
        return self._store.decode(raw)

    def decode_targets(self, labels: Tensor) -> Tensor:
        """Compact labels to what a loss reads: floats stay float32 (soft), multilabel float32, else int64."""
        if labels.is_floating_point() or self._store.task == "multilabel":
            return labels.to(torch.float32)
        return labels.to(torch.int64)

    def extras_at(self, rows: Tensor) -> dict[str, Tensor]:
        """Per-item extras of the items at site positions `rows`."""
        return {name: values.index_select(0, rows) for name, values in self._store.extras.items()}

    def batch(self, positions: Tensor) -> Batch:
        """Decode the items at `positions` ((B,) int64 in 0..n-1, repetition allowed), without augmentation."""
        raw, labels, rows = self.raw(positions)
        return Batch(self.decode(raw), self.decode_targets(labels), rows, extras=self.extras_at(rows))

    def subset(self, keep: Tensor) -> Split:
        """Split of the items at `keep`: positions (m,) int64 in this split, in the order given, or a mask (n,) bool.
        Shares the images.
        """
        if keep.dtype == torch.bool:
            if keep.numel() != len(self):
                raise ValueError(f"subset of a split of {len(self)} items: the mask has {keep.numel()} entries")
            keep = keep.nonzero().flatten()
        labels = self._labels if self._of_site else self._labels_at(keep)
        return Split(self._store, _select(self._rows, keep), labels, self._of_site)

    def with_targets(self, targets: Tensor) -> Split:
        """Split with the same images and new labels (n, ...): integers (compact types are kept) or floats (soft
        targets).
        """
        if targets.shape[0] != len(self):
            raise ValueError(f"with_targets on a split of {len(self)} items got {targets.shape[0]} targets")
        if targets.dtype == torch.float64:
            targets = targets.float()
        return Split(self._store, self._rows, targets.to(self.device), of_site=False)

    def class_counts(self) -> np.ndarray:
        """Items (classification), positives (multilabel) or pixels (segmentation; ignored ones left out) per class,
        (L,) int64.

        Soft targets count their mass, rounded. An empty split counts zero everywhere.
        """
        classes = self.num_classes
        counts = torch.zeros(classes + 1, dtype=torch.int64)
        mass = torch.zeros(classes, dtype=torch.float64)
        for part in self.target_blocks():  # bounded memory: bincount widens to int64
            if self.task == "multilabel" or part.is_floating_point():
                part = part.sum(dim=(2, 3)) if part.ndim == 4 else part  # soft masks (n, L, H, W)
                mass += part.double().sum(dim=0).cpu()
                continue
            values = part.flatten().to(torch.int64)
            values = torch.where((values < 0) | (values >= classes), classes, values)
            counts += torch.bincount(values, minlength=classes + 1).cpu()
        return counts[:classes].numpy() + np.rint(mass.numpy()).astype(np.int64)


def _select(source: Tensor | HostRows, index: Tensor) -> Tensor:
    return source.index_select(0, index if isinstance(source, HostRows) else index.to(source.device))


def fingerprint(split: Split, *more: np.ndarray) -> Tensor:
    """Checksum (1,) int64 of which items a split holds, how they are annotated, and further arrays: what kept labels belong to."""
    code = 0
    targets = (block.cpu().numpy() for block in split.target_blocks())
    for part in (split.index.cpu().numpy(), *targets, *more):
        code = zlib.crc32(np.ascontiguousarray(part).data, code)
    return torch.tensor([code], dtype=torch.int64)
