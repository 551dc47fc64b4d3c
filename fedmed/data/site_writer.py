"""Writing site files row by row, for sites that do not fit into memory.

Images, masks and other arrays of two or more axes go to the file at once, one image per chunk; ids and small values are kept until the
site is finished. Uncompressed rows lie at a regular distance in the file, so that a reader maps them (`fedmed.data.mapped`).
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from fedmed.data.label_checks import check_labels
from fedmed.data.site_checks import ANNOTATIONS, IMAGE_TYPES, check_header, read_splits
from fedmed.data.writer import (
    check_meta,
    group_name,
    published,
    refused,
    write_head,
    write_site_attrs,
    write_strings,
)
from fedmed.errors import UserError

# Chunk tables and other metadata are taken from reserves of this size, so that they do not come to lie between the rows.
METADATA_RESERVE = 1 << 20
ALIGNMENT = 16  # bytes: rows of every type can be read in place
_GROWTH = 16  # rows at least by which a dataset grows
_Kinds = dict[str, tuple[tuple[int, ...], np.dtype]]


class SiteWriter:
    """Writes a site file row by row, atomically, without holding it in memory.

    Use as a context manager: leaving it without an exception publishes the file, with one nothing is left behind. `meta`: root
    attributes, as in `write_site_file`; compression: gzip level 0-9 of images and masks (compressed ones cannot be mapped); recipe: how
    the file came about (JSON); root: one site at the root of the file. Sites may be filled in any order, by one thread at a time.
    Raises UserError when `meta` is incomplete or the file cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        meta: Mapping[str, Any],
        compression: int = 0,
        recipe: Mapping[str, Any] | None = None,
        root: bool = False,
    ) -> None:
        self.path, self.meta = Path(path), dict(meta)
        check_meta(self.path, meta)
        self._compression, self._recipe, self._root = compression, recipe, root
        self._sites: list[SiteRows] = []
        self._stack = ExitStack()
        self._file: h5py.File | None = None

    def __enter__(self) -> SiteWriter:
        try:
            partial = self._stack.enter_context(published(self.path))
            file = h5py.File(
                partial, "w", libver=("v110", "v110"), meta_block_size=METADATA_RESERVE,
                alignment_threshold=1, alignment_interval=ALIGNMENT,
            )  # fmt: skip
            self._file = self._stack.enter_context(file)
        except OSError as error:
            self._stack.__exit__(*sys.exc_info())
            raise refused(self.path, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            try:
                if kind is None:
                    self._complete()
            except BaseException:
                self._stack.__exit__(*sys.exc_info())
                raise
            self._stack.__exit__(kind, error, trace)
        except (OSError, RuntimeError) as failure:  # h5py raises either when the disk is full
            raise refused(self.path, failure) from failure
        finally:
            self._file = None

    def site(self, name: str, capacity: int = 0, attrs: Mapping[str, Any] | None = None) -> SiteRows:
        """Begin a site; groups are site_00, site_01, ... in the order of these calls.

        `capacity`: expected number of rows, for which room is made at the first row; fewer or more may come. `attrs`: attributes of the
        group (natural_site, annotation, label_kind, ...). Raises UserError for a second site of one name.
        """
        if self._file is None:
            raise ValueError("SiteWriter is not open: use `with SiteWriter(...) as writer:`")
        if self._root and self._sites:
            raise ValueError("SiteWriter(root=True) holds one site")
        if name in [site.name for site in self._sites]:
            raise UserError(f"Cannot write {self.path}: two sites are called {name!r}. Site names must differ.")
        node = self._file if self._root else self._file.create_group(group_name(len(self._sites)))
        self._sites.append(SiteRows(self, node, name, capacity, dict(attrs or {}), self._compression))
        return self._sites[-1]

    def _complete(self) -> None:
        unfinished = [site.name for site in self._sites if not site.finished]
        if unfinished or not self._sites:
            raise ValueError(f"SiteWriter was left with unfinished sites {unfinished}, or without any")
        assert self._file is not None
        write_head(self._file, self.meta, len(self._sites), self._recipe)


class SiteRows:
    """The rows of one site, made by `SiteWriter.site`. The first row fixes names, shapes and types of all."""

    def __init__(
        self, writer: SiteWriter, node: h5py.Group, name: str, capacity: int, attrs: dict[str, Any], compression: int
    ) -> None:
        self.name, self.finished = name, False
        self._path, self._meta, self._node = writer.path, writer.meta, node
        self._attrs, self._capacity = attrs, capacity
        self._where = f"{writer.path}, site {name!r}"
        self._compression = compression
        self._kinds: _Kinds = {}
        self._data: dict[str, h5py.Dataset] = {}
        self._room: dict[str, int] = {}  # rows each has space for; asking HDF5 costs more than a small row
        self._small: dict[str, list[np.ndarray]] = {}
        self._items: list[str] = []
        self._groups: list[str] = []

    def __len__(self) -> int:
        return len(self._items)

    def append(
        self, arrays: Mapping[str, np.ndarray], item_id: str, group_id: str, values: Mapping[str, Any] | None = None
    ) -> int:
        """Add an image with all that belongs to it, and give the number of its row.

        arrays: `image` (H,W) or (H,W,C), and annotations or further arrays (mask (H,W), ...); values: numbers or short vectors of the
        item (label, slice_no, modality_present, ...); ids are stored as given. Raises UserError for a row unlike the first one or unlike
        `meta`; the row is then left out, others may follow.
        """
        if self.finished:
            raise ValueError(f"{self._where}: append after finish")
        row = {name: np.asarray(array) for name, array in {**arrays, **(values or {})}.items()}
        kinds = {name: (array.shape, array.dtype.newbyteorder("=")) for name, array in row.items()}
        self._check(kinds)
        if not self._kinds:
            self._begin(kinds)
        number = len(self)
        try:
            for name in self._data:
                self._store(name, row[name], number)
        except OSError as error:
            raise refused(self._path, error) from error
        for name, column in self._small.items():
            column.append(row[name])
        self._items.append(item_id)
        self._groups.append(group_id)
        return number

    def finish(self, splits: Mapping[str, Sequence[int]]) -> None:
        """Write ids, values and splits: train, val, test -> row numbers, disjoint (missing: empty). The site is then complete.

        Raises UserError where a reader would refuse the site; values of masks are looked at by readers only.
        """
        if not self._kinds:
            raise UserError(f"{self._where}: no image. Leave the site out.")
        count = len(self)
        for dataset in self._data.values():
            dataset.resize(count, axis=0)
        for name, column in self._small.items():
            values = np.stack(column)
            if values.dtype.kind == "U":
                write_strings(self._node, name, values.tolist())
            else:
                self._node[name] = values
        write_strings(self._node, "item_id", self._items)
        write_strings(self._node, "group_id", self._groups)
        write_site_attrs(self._node, self.name, count, splits, self._attrs)
        meta, task = self._meta, self._meta["task"]
        check_header(self._node, self._where, task, len(meta["classes"]), self._size, len(meta["channels"]))
        read_splits(self._node, self._where, count)
        if "label" in self._small:
            check_labels(self._node["label"][...], "label", self._where, task, len(meta["classes"]), None)
        self.finished = True

    @property
    def _size(self) -> tuple[int, int]:
        height, width = self._meta["image_size"]
        return int(height), int(width)

    def _check(self, kinds: _Kinds) -> None:
        """Refuse a row unlike the first; the first: one whose image and masks are not of the size of the file."""
        where = f"{self._where}, row {len(self)}"
        for name in sorted({*kinds, *self._kinds} if self._kinds else ()):
            if name not in kinds or name not in self._kinds:
                said = "is missing, the first row has it" if name in self._kinds else "is new, the first row lacks it"
                raise UserError(f"{where}: {name} {said}. Give every row of a site the same arrays and values.")
            (shape, dtype), (first, kind) = kinds[name], self._kinds[name]
            if shape != first or (dtype != kind and name in self._data):
                raise UserError(
                    f"{where}: {name} is {dtype} of {shape}, expected {kind} of {first} as in the first row."
                )
        if not self._kinds:
            channels = len(self._meta["channels"])
            shapes = [(*self._size, channels)] + ([self._size] if channels == 1 else [])
            shape, dtype = kinds.get("image", ((), np.dtype("O")))
            if shape not in shapes or dtype.name not in IMAGE_TYPES:
                raise UserError(
                    f"{where}: image is {dtype} of {shape}, expected {' or '.join(map(str, shapes))} of {', '.join(IMAGE_TYPES)}."
                )
            given = [name for name in ANNOTATIONS if name in kinds]
            if not given:
                raise UserError(f"{where}: no annotation; expected at least one of {', '.join(ANNOTATIONS)}.")
            for name in {"mask", "scribble"} & {*given}:
                if kinds[name][0] != self._size:
                    raise UserError(f"{where}: {name} is of {kinds[name][0]}, expected {self._size} like the image.")

    def _begin(self, kinds: _Kinds) -> None:
        """Make the datasets, with room for `capacity` rows where that is known."""
        for name, (shape, dtype) in kinds.items():
            if len(shape) < 2:
                self._small[name] = []
                continue
            properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # every row is written
            if self._capacity and not self._compression:
                properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            packing = {"compression": "gzip", "compression_opts": self._compression} if self._compression else {}
            self._data[name] = self._node.create_dataset(
                name, (self._capacity, *shape), np.uint8 if dtype == np.bool_ else dtype, chunks=(1, *shape),
                maxshape=(None, *shape), dcpl=properties, **packing,
            )  # fmt: skip
            self._room[name] = self._capacity
        self._kinds = kinds

    def _store(self, name: str, array: np.ndarray, number: int) -> None:
        """Write a row as one chunk, past the filters and conversions of HDF5: the bytes are those of the type already."""
        dataset = self._data[name]
        if number >= self._room[name]:
            self._room[name] = number + max(_GROWTH, number // 8)
            dataset.resize(self._room[name], axis=0)
        data: Any = np.ascontiguousarray(array, dtype=dataset.dtype)
        if self._compression:
            data = zlib.compress(data, self._compression)
        dataset.id.write_direct_chunk((number, *(0 for _ in array.shape)), data)
