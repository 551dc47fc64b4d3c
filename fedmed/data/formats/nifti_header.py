"""The header of a NIfTI file: size and type of the voxels, scaling and place, checked before any voxel is read."""

from __future__ import annotations

import logging
from typing import BinaryIO

import nibabel
import numpy as np

from fedmed.data.formats.limits import BadFile, Limits

Header = nibabel.Nifti1Header | nibabel.Nifti2Header
_MAX_EXTENSIONS = 64 << 20  # bytes between header and voxels, which are skipped
_MM = {"meter": 1000.0, "mm": 1.0, "micron": 0.001}
_QUIET = logging.getLogger(__name__)
_QUIET.addHandler(logging.NullHandler())
_QUIET.propagate = False  # nibabel reports what it mended in a header; that is of no use to a reader


def read_header(stream: BinaryIO) -> Header:
    """Header in either version and byte order, mended where nibabel knows how; the voxels must be in the same file."""
    start = stream.read(540)
    kind: type[Header] | None = None
    for size, header_class in ((348, nibabel.Nifti1Header), (540, nibabel.Nifti2Header)):
        if start[:4] in (size.to_bytes(4, "little"), size.to_bytes(4, "big")):
            kind = header_class
            start = start[:size]
    if kind is None:
        raise BadFile("not a NIfTI file")
    if len(start) < kind.sizeof_hdr:
        raise BadFile("truncated")
    header = kind(start, check=False)
    if header["magic"].tobytes()[:3] != (b"n+1" if kind is nibabel.Nifti1Header else b"n+2"):
        raise BadFile("not a NIfTI file in one piece")
    header.check_fix(logger=_QUIET, error_level=40)
    offset = float(header["vox_offset"])
    if not kind.sizeof_hdr <= offset <= kind.sizeof_hdr + _MAX_EXTENSIONS:
        raise BadFile("voxels that do not begin behind the header")
    return header


def shape(header: Header, limits: Limits) -> tuple[int, ...]:
    """Lengths of the 3 or 4 axes, further ones of one dropped. Raises `BadFile` for any other number of axes, and beyond `limits`."""
    sides = tuple(int(side) for side in header.get_data_shape())
    while len(sides) > 3 and sides[-1] == 1:
        sides = sides[:-1]
    if min(sides, default=0) < 1:
        raise BadFile("no voxels")
    if len(sides) not in (3, 4):
        raise BadFile(f"{len(sides)} axes, 3 or 4 are read")
    for plane in (sides[:2], sides[1:3], (sides[0], sides[2])):
        limits.check_plane(*plane)
    limits.check_pages(max(sides))
    return sides


def dtype(header: Header) -> np.dtype:
    """Type of what is read: float32, or the integer type of a file that scales nothing, in native byte order."""
    stored = header.get_data_dtype()
    if stored.kind not in "iuf" or stored.itemsize > 8:
        raise BadFile("voxels that are neither whole nor real numbers")
    whole = stored.kind in "iu" and scaling(header) == (1.0, 0.0)
    return stored.newbyteorder("=") if whole else np.dtype(np.float32)


def scaling(header: Header) -> tuple[float, float]:
    """Slope and intercept, (1, 0) where the file scales nothing."""
    slope, intercept = header.get_slope_inter()
    return (1.0 if slope is None else float(slope)), (0.0 if intercept is None else float(intercept))


def spacing(header: Header, affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel size in mm by the affine, else by the header's zooms; 1.0 where neither gives a positive number."""
    unit = _MM.get(header.get_xyzt_units()[0], 1.0)
    by_affine = nibabel.affines.voxel_sizes(affine)
    by_zooms = np.array([abs(float(zoom)) for zoom in header.get_zooms()[:3]])
    known = np.isfinite(by_affine) & (by_affine > 0)
    sizes = np.where(known, by_affine, by_zooms) * unit
    x, y, z = (float(size) if np.isfinite(size) and size > 0 else 1.0 for size in sizes)
    return x, y, z


def orientation(affine: np.ndarray) -> str:
    """Letters of nibabel's axis codes, "?" for an axis that leads nowhere."""
    if not np.isfinite(affine).all():
        return "???"
    return "".join(code or "?" for code in nibabel.aff2axcodes(affine))
