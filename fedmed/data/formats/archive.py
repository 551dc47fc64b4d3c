"""Arrays of a .npz archive, each bounded by what its zip entry and its .npy header declare, without pickle."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from fedmed.data.formats.limits import DEFAULT_LIMITS, BadFile, Limits, bad_file, file_size

KINDS = "biufSU"  # numbers and strings of fixed length
_PIECE = 1 << 20
_MAX_HEADER = 1 << 14  # bytes of an entry in which its .npy header must end; numpy itself reads as many as it declares


def read_npz(path: str | Path, names: Sequence[str], limits: Limits = DEFAULT_LIMITS) -> dict[str, np.ndarray]:
    """The named arrays of an archive; others are not touched. `limits.max_bytes` holds for each array.

    Raises `BadFile`: no zip archive, a name that is missing, objects (which would have to be unpickled), more or fewer bytes than declared.
    """
    with bad_file("npz archive"):
        file_size(path, limits)
        if not zipfile.is_zipfile(path):
            raise BadFile("not a npz archive")
        with zipfile.ZipFile(path) as archive:
            return {name: _read_member(archive, name, limits) for name in names}


def _read_member(archive: zipfile.ZipFile, name: str, limits: Limits) -> np.ndarray:
    try:
        entry = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise BadFile(f"no array {name!r}") from None
    if entry.flag_bits & 1:
        raise BadFile("encrypted")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadFile("a zip compression that is not read")  # bzip2 and LZMA streams name the memory they take
    with archive.open(entry) as stream:
        start = BytesIO(stream.read(_MAX_HEADER))
        shape, fortran, dtype = _npy_header(start)
        size = limits.check_bytes(shape, dtype.itemsize)
        if start.tell() + size != entry.file_size:
            raise BadFile("another number of bytes than its header says")
        data = bytearray(start.read())  # grows with what is really there
        while len(data) < size:
            part = stream.read(min(_PIECE, size - len(data)))
            if not part:
                raise BadFile("truncated")
            data += part
        stream.read(1)  # the end of the entry, where zipfile checks its sum
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _npy_header(stream: BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type by numpy's own parser of literals, which evaluates nothing."""
    version = npy.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = npy.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran, dtype = npy.read_array_header_2_0(stream)
    else:
        raise BadFile("a npy version that is not read")
    if dtype.hasobject or dtype.kind not in KINDS:
        raise BadFile("an array of objects, numbers are needed")
    return shape, fortran, dtype
