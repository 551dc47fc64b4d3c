"""Compact views on one split of a site, and the batches decoded from them.

Letters: N images of a site, n of a split, B of a batch, C channels, L classes, H W pixels. Images and labels stay in
the type of the file (usually uint8) until a batch is asked for; all splits and subsets of a site share one image
tensor.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmed.errors import UserError

Decoder = Callable[[Tensor], Tensor]
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


def make_decoder(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int, unsigned16: bool = False
) -> Callable[[Tensor], Tensor]:
    """Build the function that turns stored images (B,C,H,W) into float32.

    uint8 is divided by 255, uint16 (held as int16 bit patterns when `unsigned16`) by 65535, floats are taken as they
    are; then (x - mean) / std with mean, std of length C or 1, on the scale after the division. Raises UserError for a
    wrong length or std <= 0.
    """
    centre = _per_channel("data.mean", mean, channels)
    scale = _per_channel("data.std", std, channels)
    if scale is not None and not bool((scale > 0).all()):
        raise UserError(
            f"data.std must be positive in every channel, got {list(std or [])}. Leave it out to skip the scaling."
        )
    placed: dict[torch.device, tuple[Tensor | None, Tensor | None]] = {}

    def decode(raw: Tensor) -> Tensor:
        """Stored images to float32."""
        if raw.dtype == torch.uint8:
            images = raw.to(torch.float32).div_(255.0)
        elif unsigned16:
            images = raw.to(torch.int32).bitwise_and_(0xFFFF).to(torch.float32).div_(65535.0)
        else:
            images = raw.to(torch.float32, copy=True)
        if centre is None and scale is None:
            return images
        if raw.device not in placed:
            placed[raw.device] = tuple(None if x is None else x.to(raw.device) for x in (centre, scale))  # type: ignore[assignment]
        shift, divisor = placed[raw.device]
        if shift is not None:
            images.sub_(shift)
        return images if divisor is None else images.div_(divisor)

    return decode


def _per_channel(key: str, values: Sequence[float] | None, channels: int) -> Tensor | None:
    if values is None:
        return None
    if len(values) not in (1, channels):
        raise UserError(
            f"{key} needs one number or one per channel ({channels}), got {len(values)}: {list(values)}. Fix {key}."
        )
    return torch.tensor([float(v) for v in values], dtype=torch.float32).view(-1, 1, 1)


@dataclass(frozen=True)
class Store:
    """What all splits of a site share: images (N,C,H,W) in the file's type on one device, per-item extras (N, ...), the
    decoder.
    """

    images: Tensor
    extras: dict[str, Tensor]
    decode: Decoder
    task: str
    num_classes: int
    ignore_value: int | None


class Split:
    """Ordered view on n items of one site; cheap to cut (`subset`) and to relabel (`with_targets`).

    In: rows (n,) int64 places in the site; labels, compact, (N, ...) over the site when `label_rows` is `rows`, or (n,
    ...) when it is None.
    """

    def __init__(self, store: Store, rows: Tensor, labels: Tensor, label_rows: Tensor | None) -> None:
        self._store = store
        self._rows = rows
        self._labels = labels
        self._label_rows = label_rows

    def __len__(self) -> int:
        return int(self._rows.numel())

    @property
    def index(self) -> Tensor:
        """Positions of the items in the site, (n,) int64."""
        return self._rows

    @property
    def device(self) -> torch.device:
        """Where images and labels lie."""
        return self._store.images.device

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
        """Labels of the n items in their compact type: (n,) int64, (n,L) uint8 or (n,H,W) uint8."""
        return self._labels if self._label_rows is None else self._labels.index_select(0, self._label_rows)

    def raw(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Undecoded images (B,C,H,W), compact targets and site positions (B,) of the items at `positions` (B,) int64 in
        the split.
        """
        rows = self._rows.index_select(0, positions)
        images = self._store.images.index_select(0, rows)
        labels = self._labels.index_select(0, positions if self._label_rows is None else rows)
        return images, labels, rows

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
        positions = positions.to(self.device)
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
        keep = keep.to(self.device)
        rows = self._rows.index_select(0, keep)
        if self._label_rows is None:
            return Split(self._store, rows, self._labels.index_select(0, keep), None)
        return Split(self._store, rows, self._labels, rows)

    def with_targets(self, targets: Tensor) -> Split:
        """Split with the same images and new labels (n, ...): integers (compact types are kept) or floats (soft
        targets).
        """
        if targets.shape[0] != len(self):
            raise ValueError(f"with_targets on a split of {len(self)} items got {targets.shape[0]} targets")
        if targets.dtype == torch.float64:
            targets = targets.float()
        return Split(self._store, self._rows, targets.to(self.device), None)

    def class_counts(self) -> np.ndarray:
        """Items (classification), positives (multilabel) or pixels (segmentation; ignored ones left out) per class,
        (L,) int64.

        Soft targets count their mass, rounded. An empty split counts zero everywhere.
        """
        classes, targets = self.num_classes, self.targets
        if self.task == "multilabel" or targets.is_floating_point():
            if targets.ndim == 4:  # soft masks (n, L, H, W)
                targets = targets.sum(dim=(2, 3))
            return np.rint(targets.double().sum(dim=0).cpu().numpy()).astype(np.int64)
        counts = torch.zeros(classes + 1, dtype=torch.int64)
        for part in targets.split(64):  # bounded memory: bincount widens to int64
            values = part.flatten().to(torch.int64)
            values = torch.where((values < 0) | (values >= classes), classes, values)
            counts += torch.bincount(values, minlength=classes + 1).cpu()
        return counts[:classes].numpy()


def fingerprint(split: Split, *more: np.ndarray) -> Tensor:
    """Checksum (1,) int64 of which items a split holds, how they are annotated, and further arrays: what kept labels belong to."""
    code = 0
    for part in (split.index.cpu().numpy(), split.targets.cpu().numpy(), *more):
        code = zlib.crc32(np.ascontiguousarray(part).data, code)
    return torch.tensor([code], dtype=torch.int64)
