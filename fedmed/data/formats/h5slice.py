"""Arrays of an HDF5 file that nobody vouches for: only data inside of it, of known size, through known filters.

HDF5 can point elsewhere (external links, virtual data sets, external storage), load code (filters by plug-in) and unpack a few bytes into gigabytes; all
of that is refused before anything is read.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from fedmed.data.formats.archive import KINDS
from fedmed.data.formats.limits import DEFAULT_LIMITS, BadFile, Limits, bad_file, file_size

_MAX_HOPS = 8  # soft links that are followed
_LZF = 32000
_PACKERS = {
    h5py.h5z.FILTER_DEFLATE: 1032,
    _LZF: 100,
    h5py.h5z.FILTER_SZIP: 0,
}  # bytes at most for one stored byte; 0: declared in the stream
_FILTERS = {*_PACKERS, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
_CHECKSUM = 64  # bytes, more than a checksum before packing takes
_UNCHECKED = 64 << 20  # bytes that a chunk may unpack to without being looked at first


def read_h5(path: str | Path, names: Sequence[str], limits: Limits = DEFAULT_LIMITS) -> dict[str, np.ndarray]:
    """The named datasets ("image" or "group/image"), whole; others are not touched. `limits.max_bytes` holds for each.

    Raises `BadFile`: no HDF5 file, a name that is missing or lies outside of the file, objects or strings of varying length, other filters than gzip, lzf,
    szip, shuffle and checksums, chunks that unpack to more than they declare.
    """
    with bad_file("HDF5 file"):
        file_size(path, None)  # of a large file only the named parts are read
        if not h5py.is_hdf5(path):
            raise BadFile("not an HDF5 file")
        with h5py.File(path, "r", locking=False) as file:
            return {name: _read(_find(file, name), limits) for name in names}


def _find(file: h5py.File, name: str) -> h5py.Dataset:
    """The dataset of a name, by links that stay in the file."""
    node: h5py.Group = file
    parts, hops = [part for part in name.split("/") if part], 0
    while parts:
        part = parts.pop(0)
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
        if link is None:
            raise BadFile(f"no dataset {name!r}")
        if isinstance(link, h5py.ExternalLink):
            raise BadFile("a link to another file")
        if isinstance(link, h5py.SoftLink):
            hops += 1
            if hops > _MAX_HOPS:
                raise BadFile("links that lead in a circle")
            target = link.path
            node = file if target.startswith("/") else node
            parts[:0] = [step for step in target.split("/") if step and step != "."]
        else:
            node = node[part]
    if not isinstance(node, h5py.Dataset):
        raise BadFile(f"no dataset {name!r}")
    return node


def _read(dataset: h5py.Dataset, limits: Limits) -> np.ndarray:
    if dataset.is_virtual or dataset.external:
        raise BadFile("data in another file")
    dtype = dataset.dtype
    if dtype.hasobject or dtype.kind not in KINDS or dataset.shape is None:
        raise BadFile("an array of objects, numbers are needed")
    size = limits.check_bytes(dataset.shape, dtype.itemsize)
    if dataset.chunks is not None:
        _check_chunks(dataset, limits)
    return dataset[()] if size else np.zeros(dataset.shape, dtype)


def _check_chunks(dataset: h5py.Dataset, limits: Limits) -> None:
    """Refuse unknown filters and chunks that would unpack to more than a chunk holds."""
    pipeline = dataset.id.get_create_plist()
    filters = [pipeline.get_filter(i)[0] for i in range(pipeline.get_nfilters())]
    if not set(filters) <= _FILTERS:
        raise BadFile("an HDF5 filter that is not read")
    nominal = limits.check_bytes(dataset.chunks, dataset.dtype.itemsize)
    packers = [place for place, code in enumerate(filters) if code in _PACKERS]
    if len(packers) > 1:
        raise BadFile("an HDF5 chunk that is packed twice")
    if not packers or not dataset.size:
        return
    place, packer = packers[0], filters[packers[0]]
    for offset, mask, stored in _chunks(dataset.id):
        if stored > nominal + (nominal >> 3) + 1024:
            raise BadFile("an HDF5 chunk that is larger than it declares")
        if mask >> place & 1:  # this chunk was stored as it is
            continue
        if packer == _LZF:
            limits.check_bytes((stored,), _PACKERS[_LZF])
        elif packer == h5py.h5z.FILTER_SZIP or stored * _PACKERS[packer] > max(_UNCHECKED, nominal):
            _check_packed(dataset, offset, packer, nominal + _CHECKSUM)


def _chunks(dataset: h5py.h5d.DatasetID) -> list[tuple[tuple[int, ...], int, int]]:
    """Place, mask of filters left out and stored bytes of every chunk."""
    found: list[tuple[tuple[int, ...], int, int]] = []
    dataset.chunk_iter(lambda chunk: found.append((chunk.chunk_offset, chunk.filter_mask, chunk.size)))
    return found


def _check_packed(dataset: h5py.Dataset, offset: tuple[int, ...], packer: int, most: int) -> None:
    """Hold what one chunk unpacks to against what it should; HDF5 itself would go on to the end of the stream."""
    _, data = dataset.id.read_direct_chunk(offset)
    if packer == h5py.h5z.FILTER_SZIP:
        unpacked = int.from_bytes(data[:4], "little")
    else:
        inflater, unpacked, rest = zlib.decompressobj(), 0, data
        while rest and unpacked <= most and not inflater.eof:
            unpacked += len(inflater.decompress(rest, 1 << 20))
            rest = inflater.unconsumed_tail
    if unpacked > most:
        raise BadFile("an HDF5 chunk that unpacks to more than it declares")
