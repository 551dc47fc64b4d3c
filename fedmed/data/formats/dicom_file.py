"""The header of a DICOM file, by pydicom, with bounds on what reading it may take, and the stream its pixels lie in.

A header can declare values of 4 GiB and a million nested sequences in a few bytes; reading goes through a stream that counts bytes and calls.
Only the elements asked for are kept, so names, dates and free text are not even held.
"""

from __future__ import annotations

import logging
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset, read_preamble, read_sequence
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from fedmed.data.formats.limits import BadFile, Limits, file_size

MAX_HEADER = 32 << 20  # bytes of a header that are read; a thousand frames take one to four megabytes
MAX_READS = 1_000_000  # read calls for them: an empty item is 8 bytes in the file and about a kilobyte in memory
MAX_INFLATED = 128 << 20  # bytes of a file with the deflated transfer syntax
_PIXEL_TAGS = {Tag(name): name for name in ("FloatPixelData", "DoubleFloatPixelData", "PixelData")}
_LONG_VRS = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"UC", b"UN", b"UR", b"UT", b"SV", b"UV"))
_PLAUSIBLE = 1 << 16  # bytes of an element that are asked for without looking at what is left

# pydicom quotes values it finds odd in warnings and logs, and they may be names or dates of a patient.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")


class Counted:
    """A binary stream of `size` bytes that ends in `BadFile` when more than `max_bytes` (`MAX_HEADER`) are read, or by more than `MAX_READS` calls."""

    def __init__(self, stream: BinaryIO, size: int, max_bytes: int | None = None) -> None:
        self._stream = stream
        self._size = size
        self._bytes = MAX_HEADER if max_bytes is None else max_bytes
        self._reads = MAX_READS
        self.seek = stream.seek
        self.tell = stream.tell

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes (-1: the rest); memory is only taken for what the file really has."""
        if not 0 <= size <= _PLAUSIBLE:  # Python takes the memory that is asked for before it looks what there is
            left = max(self._size - self._stream.tell(), 0)
            size = left if size < 0 else min(size, left)
        self._reads -= 1
        if self._reads < 0 or size > self._bytes:
            raise BadFile("a DICOM header that is too large")
        data = self._stream.read(size)
        self._bytes -= len(data)
        return data

    def over(self, data: bytes) -> Counted:
        """A stream over bytes that were read; calls go on counting, by `charge`."""
        part = Counted(BytesIO(data), len(data))
        part._reads = self._reads
        return part

    def charge(self, part: Counted) -> None:
        """Take over what was used of a stream made by `over`."""
        self._reads = part._reads


@dataclass
class Opened:
    """A header that was read. syntax: transfer syntax; keyword, vr: pixel element; start: where its value begins in the stream."""

    header: Dataset
    syntax: UID
    keyword: str
    vr: str
    start: int
    counted: Counted

    def items(self, dataset: Dataset, keyword: str) -> Sequence[Dataset]:
        """Items of a sequence in `dataset`, () where there is none, parsed within the bounds of the header."""
        tag = Tag(keyword)
        element: Any = dataset.get_item(tag)
        if element is None or not element.value:
            return ()
        if not isinstance(element, RawDataElement):
            return element.value  # of undefined length: parsed when the header was read
        part = self.counted.over(element.value)
        found = read_sequence(part, element.is_implicit_VR, element.is_little_endian, len(element.value), "iso8859")  # type: ignore[arg-type]
        self.counted.charge(part)
        dataset.add_new(tag, "SQ", found)
        return found

    def first(self, dataset: Dataset | None, keyword: str) -> Dataset | None:
        """First item of a sequence, None where there is none."""
        found = self.items(dataset, keyword) if dataset is not None else ()
        return found[0] if found else None


@contextmanager
def open_stream(path: Path, limits: Limits) -> Iterator[tuple[BinaryIO, int]]:
    """The file as a stream and its size; one with the deflated transfer syntax comes inflated, its offsets are those of the inflated stream."""
    size = file_size(path, limits)
    with path.open("rb") as stream:
        head = stream.read(132)
        if head[128:] != b"DICM":
            raise BadFile("not a DICOM file")
        counted = Counted(stream, size)  # type: ignore[arg-type]
        if _syntax(counted) != DeflatedExplicitVRLittleEndian:
            stream.seek(0)
            yield stream, size
            return
        meta_end = stream.tell()
        stream.seek(0)
        inflated = BytesIO()
        inflated.write(stream.read(meta_end))
        _inflate(stream, inflated, min(MAX_INFLATED, limits.max_bytes))
        yield inflated, inflated.tell()


def _inflate(stream: BinaryIO, out: BytesIO, bound: int) -> None:
    """Append what the rest of `stream` inflates to, `bound` bytes at most."""
    inflater, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while not inflater.eof:
        packed = inflater.unconsumed_tail or stream.read(_PLAUSIBLE)
        if not packed:
            raise BadFile("truncated")
        piece = inflater.decompress(packed, 1 << 20)
        total += len(piece)
        if total > bound:
            raise BadFile(f"inflates to more than {bound} bytes")
        out.write(piece)


def read_header(stream: BinaryIO, size: int, tags: Sequence[int | BaseTag]) -> Opened:
    """Elements `tags` of the header and where the pixels lie. Raises `BadFile` when the file ends inside of it or has no pixels."""
    counted = Counted(stream, size)
    stream.seek(0)
    read_preamble(counted, force=False)  # type: ignore[arg-type]
    syntax = _syntax(counted)
    header = read_dataset(
        counted,  # type: ignore[arg-type]
        is_implicit_VR=syntax.is_implicit_VR,
        is_little_endian=syntax.is_little_endian,
        stop_when=lambda tag, vr, length: tag in _PIXEL_TAGS or stream.tell() > size,
        specific_tags=list(tags),
    )
    keyword, vr, start = _pixel_element(stream, syntax)
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = syntax
    return Opened(header, syntax, keyword, vr, start, counted)


def _syntax(counted: Counted) -> UID:
    """Transfer syntax; leaves the stream at the first element behind the file meta information."""
    counted.seek(132)
    meta = read_dataset(counted, False, True, stop_when=lambda tag, vr, length: tag.group != 2)  # type: ignore[arg-type]
    syntax = UID(str(meta.get("TransferSyntaxUID", "")).strip("\0 "))
    if not syntax.is_transfer_syntax:
        raise BadFile("an unknown DICOM transfer syntax")
    return syntax


def _pixel_element(stream: BinaryIO, syntax: UID) -> tuple[str, str, int]:
    """Keyword and VR of the pixel element at which the stream stands, "" where there is none, and the offset of its value."""
    order = "little" if syntax.is_little_endian else "big"
    head = stream.read(8)
    number = int.from_bytes(head[:2], order) << 16 | int.from_bytes(head[2:4], order)  # type: ignore[arg-type]
    keyword = _PIXEL_TAGS.get(Tag(number), "") if len(head) == 8 else ""
    if not keyword or syntax.is_implicit_VR:
        return keyword, "OW", stream.tell()
    if head[4:6] not in _LONG_VRS:
        raise BadFile("damaged DICOM file")
    stream.read(4)
    return keyword, head[4:6].decode("ascii"), stream.tell()
