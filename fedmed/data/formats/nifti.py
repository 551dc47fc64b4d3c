"""NIfTI volumes, .nii and .nii.gz in one file, read by nibabel's header classes within `Limits`.

Nothing is reoriented: slices come as stored, `orientation` says how that lies in the patient. Extensions and free-text fields of the header, which may hold
names, are neither read nor copied.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import BinaryIO

import nibabel
import numpy as np
from nibabel.arrayproxy import ArrayProxy

from fedmed.data.formats import nifti_header as header_of
from fedmed.data.formats.limits import DEFAULT_LIMITS, BadFile, Limits, bad_file, file_size, write_beside
from fedmed.errors import UserError

NIFTI_SUFFIXES = (".nii", ".nii.gz")
_PIECE = 1 << 20
_GZIP_GAIN = 1032  # deflate gives at most this many bytes for one
_GEOMETRY = (
    "qform_code",
    "sform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
    "qoffset_z",
    "srow_x",
    "srow_y",
    "srow_z",
)


@dataclass(eq=False, repr=False)
class Nifti:
    """A volume whose header was checked; voxels are read when asked for, all at once from .nii.gz and slice by slice from .nii.

    shape: (X, Y, Z) or (X, Y, Z, C) as stored, further axes of one dropped; spacing: mm along X, Y, Z; affine (4, 4) in the units of the file;
    orientation such as "RAS" (where X, Y, Z lead); dtype: what `slice` and `volume` give.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, float, float]
    affine: np.ndarray
    orientation: str
    dtype: np.dtype
    header: header_of.Header = field(repr=False)
    path: Path = field(repr=False)
    limits: Limits = field(repr=False)
    _voxels: np.ndarray | None = field(default=None, init=False, repr=False)

    def __repr__(self) -> str:
        return f"Nifti({' x '.join(map(str, self.shape))} {self.dtype}, {self.orientation})"

    @classmethod
    def open(cls, path: str | Path, limits: Limits = DEFAULT_LIMITS) -> Nifti:
        """Read and check the header. Raises `BadFile`: not a NIfTI file in one piece, not 3-D or 4-D, larger than `limits`, or fewer bytes than it declares."""
        path = Path(path)
        if not path.name.lower().endswith(NIFTI_SUFFIXES):
            raise BadFile("not a .nii or .nii.gz file")
        with bad_file("NIfTI file"):
            size = file_size(path, limits)
            with _stream(path) as stream:
                header = header_of.read_header(stream)
            shape, dtype = header_of.shape(header, limits), header_of.dtype(header)
            limits.check_bytes(shape, dtype.itemsize)
            needed = int(header["vox_offset"]) + limits.check_bytes(shape, header.get_data_dtype().itemsize)
            if needed > (size if path.suffix.lower() == ".nii" else size * _GZIP_GAIN):
                raise BadFile("truncated")
            affine = np.asarray(header.get_best_affine(), dtype=np.float64)
            return cls(
                shape,
                header_of.spacing(header, affine),
                affine,
                header_of.orientation(affine),
                dtype,
                header,
                path,
                limits,
            )

    @property
    def channels(self) -> int:
        """1 for 3-D, else the length of the last axis."""
        return 1 if len(self.shape) == 3 else self.shape[3]

    def num_slices(self, axis: int = 2) -> int:
        """Number of slices along a spatial axis (0, 1 or 2)."""
        return self.shape[_checked_axis(axis)]

    def slice(self, index: int, axis: int = 2) -> np.ndarray:
        """Slice (H, W) or (H, W, C): the two other axes in stored order; axis 2 gives (X, Y).

        float32 of slope x value + intercept, or integers where the file scales nothing. NaN comes through. Raises `BadFile`; IndexError for the place.
        """
        count = self.num_slices(axis)
        if not 0 <= index < count:
            raise IndexError(f"slice {index} of {count} along axis {axis}")
        place = (slice(None),) * axis + (index,)
        with bad_file("NIfTI file"):
            return self._finish(np.asarray(self._source()[place]))

    def volume(self) -> np.ndarray:
        """All voxels in the shape of the file, of the same values as `slice`. Raises `BadFile`."""
        with bad_file("NIfTI file"):
            voxels = self._source()
            out = np.empty(self.shape, self.dtype, order="F")
            for index in range(self.shape[2]):  # slice by slice: scaling in float64 then needs little memory
                out[:, :, index] = self._finish(np.asarray(voxels[:, :, index]))
            return out

    def _source(self) -> np.ndarray | _Unscaled:
        if self.path.suffix.lower() == ".nii":
            return _Unscaled(self)
        if self._voxels is None:
            with _stream(self.path) as stream:
                self._voxels = _inflate(stream, self)
        return self._voxels

    def _finish(self, raw: np.ndarray) -> np.ndarray:
        slope, intercept = header_of.scaling(self.header)
        if (slope, intercept) != (1.0, 0.0):
            raw = raw * np.float64(slope) + np.float64(intercept)
        return np.ascontiguousarray(raw, dtype=self.dtype)


class _Unscaled:
    """Voxels of a .nii file, of which nibabel reads the pieces that are asked for."""

    def __init__(self, nifti: Nifti) -> None:
        header = nifti.header
        spec = (nifti.shape, header.get_data_dtype(), int(header["vox_offset"]), 1.0, 0.0)
        self._proxy = ArrayProxy(nifti.path, spec, mmap=False)

    def __getitem__(self, place: tuple[slice | int, ...]) -> np.ndarray:
        return self._proxy[place]


def write_nifti_like(
    path: str | Path, source: Nifti, array: np.ndarray, dtype: np.dtype | type | str | None = None
) -> Path:
    """Write an array of the spatial shape of `source`, (X, Y, Z) or with channels, where `source` lies: same affines and their codes, voxel size, units.

    dtype: of the file (default that of `array`; bool becomes uint8). Nothing else of the source's header is copied. Atomic. Raises UserError for another
    shape, suffix or type.
    """
    path, array = Path(path), np.asarray(array)
    kind = np.dtype(dtype if dtype is not None else array.dtype)
    array = array.astype(np.uint8 if kind.kind == "b" else kind, copy=False)
    if not path.name.lower().endswith(NIFTI_SUFFIXES):
        raise UserError(f"Cannot write {path.name}: the name must end with .nii or .nii.gz.")
    if array.ndim not in (3, 4) or array.shape[:3] != source.shape[:3]:
        raise UserError(
            f"Cannot write {path.name}: the array must be {source.shape[:3]} (and channels), got {array.shape}."
        )
    header = type(source.header)()
    try:
        header.set_data_dtype(array.dtype)
    except nibabel.spatialimages.HeaderDataError as error:
        raise UserError(f"Cannot write {path.name}: NIfTI has no type {array.dtype}.") from error
    header.set_data_shape(array.shape)
    header["pixdim"][:4] = source.header["pixdim"][:4]
    header["xyzt_units"] = source.header["xyzt_units"] & 7  # of space; what a fourth axis is, is not known
    for name in _GEOMETRY:
        header[name] = source.header[name]
    image = (nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image)(
        array, None, header
    )
    for name in ("pixdim", *_GEOMETRY):  # nibabel may renew the codes for an image without an affine
        image.header[name] = header[name]

    def write(partial: Path) -> None:
        with partial.open("wb") as plain:
            if path.suffix.lower() == ".nii":
                image.to_stream(plain)
                return
            with gzip.GzipFile("", "wb", 6, plain, mtime=0) as packed:  # without name and time of writing
                image.to_stream(packed)

    return write_beside(path, write)


@contextmanager
def _stream(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as plain:
        if path.suffix.lower() == ".nii":
            yield plain
            return
        if plain.read(2) != b"\x1f\x8b":
            raise BadFile("not a gzip file")
        plain.seek(0)
        with gzip.GzipFile(fileobj=plain, mode="rb") as packed:
            yield packed  # type: ignore[misc]


def _checked_axis(axis: int) -> int:
    if axis not in (0, 1, 2):
        raise ValueError(f"axis must be 0, 1 or 2, got {axis!r}")
    return axis


def _inflate(stream: BinaryIO, nifti: Nifti) -> np.ndarray:
    """All voxels of a compressed file; reads to the end of the stream, where gzip checks its sum, but not far beyond what the header declares."""
    stored = nifti.header.get_data_dtype()
    start = int(nifti.header["vox_offset"])
    while start > 0:  # in pieces: seeking would do the same
        start -= len(stream.read(min(start, _PIECE))) or start
    flat = np.empty(prod(nifti.shape) * stored.itemsize, np.uint8)
    done = 0
    while done < len(flat):
        part = stream.readinto(flat[done : done + _PIECE])  # type: ignore[attr-defined]
        if not part:
            raise BadFile("truncated")
        done += part
    if len(stream.read(_PIECE)) == _PIECE:
        raise BadFile("more bytes than its header says")
    return flat.view(stored).reshape(nifti.shape, order="F")
