"""Images and masks that stay in their file: views of a memory map, rows gathered from a table of places, rows read through HDF5.

Letters: N items of a site, B of a batch. All of them look like the NumPy array they stand for as long as items are asked for (an int, a
slice, an index array); only what is asked for is read.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from fedmed.errors import UserError

LOADS = ("auto", "memory", "map")
AUTO_SHARE = 4  # "auto" reads a site into memory while it takes at most this part of what is available
_CGROUPS = Path("/sys/fs/cgroup")


class FileRows(ABC):
    """An array (N, ...) whose rows lie in a file where no strided view reaches them."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype, self.ndim = shape, dtype, len(shape)

    @abstractmethod
    def take(self, rows: np.ndarray) -> np.ndarray:
        """The rows (B,) int64, each in 0..N-1, repetition allowed, as a new array (B, ...)."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        first, rest = (key[0], key[1:]) if isinstance(key, tuple) and key else (key, ())
        if first is Ellipsis:
            return self.take(np.arange(len(self)))[key]
        found: np.ndarray
        if isinstance(first, (int, np.integer)):
            found = self.take(np.array([range(len(self))[first]]))[0]
            return found[rest] if rest else found
        return self.take(np.arange(len(self))[first])[(slice(None), *rest)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.take(np.arange(len(self))), dtype=dtype)


class ScatteredRows(FileRows):
    """Rows copied from a memory map: `places` (N,) int64 are byte positions in the file."""

    def __init__(self, memory: mmap.mmap, places: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> None:
        super().__init__(shape, dtype)
        self._bytes, self._places = np.frombuffer(memory, np.uint8), places

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The rows as a new array."""
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        if out.size:
            flat = out.reshape(len(rows), -1).view(np.uint8)
            for row, place in zip(flat, self._places[rows].tolist(), strict=True):
                row[:] = self._bytes[place : place + row.size]
        return out


class StoredRows(FileRows):
    """Rows read through HDF5 when asked for, for compressed data: the file stays open as long as this lives."""

    def __init__(self, path: Path, dataset: h5py.Dataset) -> None:
        super().__init__(dataset.shape, dataset.dtype)
        block = int(np.prod(dataset.chunks or (1,))) * dataset.dtype.itemsize
        file = h5py.File(path, "r", rdcc_nbytes=max(1 << 20, 2 * block))  # the cache holds a whole chunk
        self._dataset = file[dataset.name]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The rows as a new array; in the order of the file, so that a chunk is unpacked once."""
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        order = np.argsort(rows, kind="stable")
        runs = np.split(order, np.flatnonzero(np.diff(rows[order]) != 1) + 1)
        for run in runs:
            if len(run):
                out[run] = self._dataset[int(rows[run[0]]) : int(rows[run[-1]]) + 1]
        return out


def open_rows(dataset: h5py.Dataset, path: Path) -> np.ndarray | FileRows:
    """The rows of a dataset (N, ...) without reading them. `path`: its file.

    Uncompressed rows at a regular distance become a read-only strided view of the mapped file; rows elsewhere in the map are found by
    a table; compressed ones, and types that are not the machine's own, are read through HDF5. Raises UserError for a file cut short.
    """
    if not dataset.size:
        return np.zeros(dataset.shape, dataset.dtype)
    places = row_places(dataset)
    if places is None:
        return StoredRows(path, dataset)
    # the descriptor of the open file: a file of the same name that takes its place meanwhile is another one
    memory = mmap.mmap(dataset.file.id.get_vfd_handle(), 0, access=mmap.ACCESS_READ)
    width = _row_bytes(dataset)
    if places.min() < 0 or places.max() + width > len(memory):
        raise UserError(f"{path}: {dataset.name} reaches beyond the end of the file. Copy or export it again.")
    return _arrange(memory, places, dataset.shape, dataset.dtype, width)


def _arrange(
    memory: mmap.mmap, places: np.ndarray, shape: tuple[int, ...], dtype: np.dtype, width: int
) -> np.ndarray | FileRows:
    """A view where one is possible, else a table of places."""
    step = int(places[1] - places[0]) if len(places) > 1 else width
    regular = step >= width and bool((np.diff(places) == step).all())
    if regular and step % dtype.itemsize == 0 and places[0] % dtype.itemsize == 0:
        inner = np.cumprod([dtype.itemsize, *shape[:1:-1]])[::-1]
        return np.ndarray(shape, dtype, memory, int(places[0]), (step, *inner.tolist()))
    return ScatteredRows(memory, places, shape, dtype)


def _row_bytes(dataset: h5py.Dataset) -> int:
    return int(np.prod(dataset.shape[1:])) * dataset.dtype.itemsize


def row_places(dataset: h5py.Dataset) -> np.ndarray | None:
    """Byte positions (N,) int64 of the rows of a dataset in its file; None where bytes and values are not the same thing."""
    properties = dataset.id.get_create_plist()
    own = dataset.dtype.kind in "uif" and dataset.id.get_type().equal(
        h5py.h5t.py_create(dataset.dtype.newbyteorder("="))
    )
    if not own or dataset.file.driver != "sec2" or dataset.file.userblock_size or properties.get_nfilters():
        return None
    count, width = len(dataset), _row_bytes(dataset)
    if properties.get_layout() == h5py.h5d.CONTIGUOUS:
        start = dataset.id.get_offset()
        if start is None or properties.get_external_count():
            return None
        return start + width * np.arange(count, dtype=np.int64)
    if properties.get_layout() != h5py.h5d.CHUNKED or not hasattr(dataset.id, "chunk_iter"):
        return None
    return _chunk_places(dataset, count, width)


def _chunk_places(dataset: h5py.Dataset, count: int, width: int) -> np.ndarray | None:
    """Places of the rows where every chunk holds whole rows and every chunk was written; else None."""
    per_chunk = dataset.chunks[0]
    if dataset.chunks[1:] != dataset.shape[1:]:
        return None
    chunks = np.full(-(-count // per_chunk), -1, dtype=np.int64)

    def note(chunk: Any) -> None:
        if chunk.size == per_chunk * width:
            chunks[chunk.chunk_offset[0] // per_chunk] = chunk.byte_offset

    dataset.id.chunk_iter(note)
    if (chunks < 0).any():
        return None
    rows = np.arange(count, dtype=np.int64)
    return chunks[rows // per_chunk] + rows % per_chunk * width


class HostRows:
    """What a split uses of a tensor (`device`, `index_select`), for rows that stay in the file: a batch is gathered on the host, then moved.

    rows: images (N,H,W) or (N,H,W,C), gathered as (B,C,H,W); or masks (N,H,W), gathered as (B,H,W) of type `dtype`.
    """

    def __init__(self, rows: np.ndarray | FileRows, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self._rows, self.device, self._dtype = rows, device, dtype

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """The rows at `index` (B,) int64 on `device`, in new memory; `dim` is 0."""
        part = self._rows[index.cpu().numpy()]
        if self._dtype is not None:
            return torch.from_numpy(part).to(self.device, self._dtype)
        if part.dtype == np.uint16:  # torch gathers int16; the decoder restores the sign bit
            part = part.view(np.int16)
        planes = torch.from_numpy(part)
        planes = planes[:, None] if planes.ndim == 3 else planes.permute(0, 3, 1, 2).contiguous()
        return planes.to(self.device)


def stays_in_file(load: str, num_bytes: int) -> bool:
    """Whether images and masks of `num_bytes` stay in the file: as `load` says, or for "auto", when they take more than a quarter of
    the memory that is available. Raises UserError for another word.
    """
    if load not in LOADS:
        raise UserError(f"data.load: expected one of {', '.join(LOADS)}, got {load!r}.")
    if load != "auto":
        return load == "map"
    available = available_memory()
    return available is not None and num_bytes > available // AUTO_SHARE


def available_memory() -> int | None:
    """Bytes a process can still get: what the machine has, or what a limit on its container (control groups, version 2) leaves, the
    smaller; None: not known (not Linux).
    """
    try:
        facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        left = [1024 * int(facts["MemAvailable"].split()[0])]
        group = Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
    except (OSError, KeyError, ValueError):
        return None
    leaf = _CGROUPS / group
    for folder in (leaf, *leaf.parents):
        if folder == _CGROUPS.parent:
            break
        left += _left_of(folder)
    return max(0, min(left))


def _left_of(group: Path) -> list[int]:
    """What the limit of a control group leaves, without the file cache, which gives way; [] where there is no limit."""
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["file"]
        return [] if limit == "max" else [int(limit) - int(used) + int(cache)]
    except (OSError, KeyError, ValueError):
        return []
