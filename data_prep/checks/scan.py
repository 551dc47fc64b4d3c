"""One pass over the values of a site, in blocks: what is in memory does not grow with the images (16 bytes of each stay).

Letters: N images, H W pixels, C channels, L classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import h5py
import numpy as np

from data_prep.checks.layout import Frame, Root, own_dataset

BLOCK_BYTES = 8 * 2**20  # read at once; more where a chunk of the file is larger
_KINDS = "biu"  # dtypes of annotations that are whole numbers


@dataclass
class ImageFacts:
    """Of the images of a site. dtype: name; low, high: smallest and largest finite value (0 where there is none); not_finite,
    outside, constant (N,) bool: images with NaN or infinities, floats outside 0..1, one value in every channel; flat (N, C) bool:
    channels with one value; digest (N, 2) uint64: 128-bit hash of the pixels; unreadable: images whose bytes are damaged.
    """

    dtype: str
    low: float
    high: float
    not_finite: np.ndarray
    outside: np.ndarray
    constant: np.ndarray
    flat: np.ndarray
    digest: np.ndarray
    unreadable: int = 0


@dataclass
class RasterFacts:
    """Of one annotation (N, H, W). present (N, L) bool: classes an image shows; open (N,) bool: nothing drawn; wrong (N,) bool: holds a
    value that is no class; worst: such a value; drawn (N,): share of pixels that are not left open; unreadable: damaged images;
    integer: False for floats, whose values are not looked at.
    """

    ignore: int | None
    present: np.ndarray
    open: np.ndarray
    wrong: np.ndarray
    drawn: np.ndarray
    worst: int | None = None
    unreadable: int = 0
    integer: bool = True


@dataclass
class SiteFacts:
    """A frame with what its values say. label: as stored, None without a usable one; ids: item_id and group_id as strings, as far as
    they are there and of length N; lengths: how long ids of another length are; flags: modality_present, active_classes, slice_no.
    """

    frame: Frame
    image: ImageFacts
    rasters: dict[str, RasterFacts] = field(default_factory=dict)
    label: np.ndarray | None = None
    ids: dict[str, np.ndarray] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    flags: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The site's name."""
        return self.frame.name


def read_site(file: h5py.File, frame: Frame, root: Root) -> SiteFacts:
    """Read every value of a site once."""
    node = file[frame.group] if frame.group else file
    facts = SiteFacts(frame, _scan_images(node["image"]))
    for name in frame.annotations:
        dataset = node[name]
        if name == "label":
            facts.label = dataset[...]
        elif root.classes is not None and dataset.shape == node["image"].shape[:3]:
            ignore = _ignore_value(file, node, name, len(root.classes))
            facts.rasters[name] = _scan_raster(dataset, len(root.classes), ignore)
    for key in ("item_id", "group_id"):
        dataset = own_dataset(node, key)
        if dataset is not None and len(dataset) == frame.size and dataset.ndim == 1:
            facts.ids[key] = np.array([v.decode() if isinstance(v, bytes) else str(v) for v in dataset[...].tolist()])
        elif dataset is not None:
            facts.lengths[key] = len(dataset) if dataset.ndim else 1
    for key in ("modality_present", "active_classes", "slice_no"):
        dataset = own_dataset(node, key)
        if dataset is not None:
            facts.flags[key] = dataset[...]
        elif key == "active_classes" and key in node.attrs:
            facts.flags[key] = np.asarray(node.attrs[key])
    return facts


def blocks(dataset: h5py.Dataset, size: int) -> Iterator[tuple[slice, np.ndarray | None]]:
    """Rows of a dataset, about `size` bytes at a time and whole chunks, so that none is unpacked twice; None: they cannot be read."""
    count = int(dataset.shape[0])
    row = max(1, int(np.prod(dataset.shape[1:], dtype=np.int64)) * dataset.dtype.itemsize)
    chunk = int(dataset.chunks[0]) if dataset.chunks else 1
    step = max(1, size // row // chunk) * chunk
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        try:
            yield rows, dataset[rows]
        except OSError:  # HDF5's word for a chunk that does not unpack
            yield rows, None


def _scan_images(dataset: h5py.Dataset) -> ImageFacts:
    count, channels = int(dataset.shape[0]), int(dataset.shape[3]) if dataset.ndim == 4 else 1
    low, high = np.full((count, channels), np.nan), np.full((count, channels), np.nan)
    digest, unreadable = np.zeros((count, 2), dtype=np.uint64), 0
    for rows, values in blocks(dataset, BLOCK_BYTES):
        if values is None:
            unreadable += rows.stop - rows.start
            continue
        planes = values.reshape(len(values), -1, channels)
        if planes.shape[1]:
            low[rows], high[rows] = planes.min(axis=1), planes.max(axis=1)  # NaN and infinities come through
        for place, image in enumerate(np.ascontiguousarray(values), start=rows.start):
            digest[place] = np.frombuffer(hashlib.blake2b(image, digest_size=16).digest(), dtype=np.uint64)
    floating = dataset.dtype.kind == "f"
    finite = np.isfinite(low) & np.isfinite(high)
    flat = finite & (low == high)
    read = np.ones(count, dtype=bool) if not unreadable else ~(digest == 0).all(axis=1)
    return ImageFacts(
        dtype=dataset.dtype.name,
        low=float(low[finite].min()) if finite.any() else 0.0,
        high=float(high[finite].max()) if finite.any() else 0.0,
        not_finite=read & ~finite.all(axis=1),
        outside=read & (finite & ((low < 0) | (high > 1))).any(axis=1) & floating,
        constant=flat.all(axis=1),
        flat=flat,
        digest=digest,
        unreadable=unreadable,
    )


def _scan_raster(dataset: h5py.Dataset, num_classes: int, ignore: int | None) -> RasterFacts:
    count, pixels = int(dataset.shape[0]), max(1, int(np.prod(dataset.shape[1:], dtype=np.int64)))
    facts = RasterFacts(
        ignore,
        present=np.zeros((count, num_classes), dtype=bool),
        open=np.zeros(count, dtype=bool),
        wrong=np.zeros(count, dtype=bool),
        drawn=np.zeros(count),
        integer=dataset.dtype.kind in _KINDS,
    )
    if not facts.integer:
        return facts
    undrawn, strange = num_classes, num_classes + 1
    for rows, values in blocks(dataset, BLOCK_BYTES // 8):  # counted as 8-byte numbers
        if values is None:
            facts.unreadable += rows.stop - rows.start
            continue
        wide = values.astype(np.int64)
        kind = np.where((wide >= 0) & (wide < num_classes), wide, strange)
        if ignore is not None:
            kind[wide == ignore] = undrawn
        place = kind.reshape(len(kind), -1) + np.arange(len(kind))[:, None] * (num_classes + 2)
        counts = np.bincount(place.ravel(), minlength=len(kind) * (num_classes + 2)).reshape(len(kind), -1)
        facts.present[rows] = counts[:, :num_classes] > 0
        facts.open[rows] = counts[:, undrawn] == pixels
        facts.wrong[rows] = counts[:, strange] > 0
        facts.drawn[rows] = 1 - counts[:, undrawn] / pixels
        if facts.worst is None and facts.wrong[rows].any():
            facts.worst = int(wide[kind == strange][0])
    return facts


def _ignore_value(file: h5py.File, node: h5py.Group, name: str, num_classes: int) -> int | None:
    """Value that means "not annotated", by the reader's order: of the site or the file, for this annotation or for all."""
    for key in (f"ignore_value_in_{name}", "ignore_value"):
        for holder in (node, file):
            if key in holder.attrs:
                value = holder.attrs[key]
                return int(value) if isinstance(value, (int, np.integer)) else None  # anything else is an error already
    return None if name == "mask" else num_classes  # weak annotation leaves pixels open even where nobody says so
