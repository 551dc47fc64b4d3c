"""What a compressed DICOM frame itself declares, held against the header before a decoder takes memory for it."""

from __future__ import annotations

from io import BytesIO

from PIL import Image, Jpeg2KImagePlugin
from pydicom.uid import UID, JPEG2000TransferSyntaxes, JPEGLSTransferSyntaxes, JPEGTransferSyntaxes, RLELossless

from fedmed.data.formats.limits import BadFile

_END_OF_JPEG = b"\xff\xd9"
_NOT_FRAMES = (0xC4, 0xC8, 0xCC)  # markers among those of frame headers that are none: tables and reserved
_JPEG_LS_FRAME = 0xF7
_RLE_GAIN = 64  # two bytes of run-length code give 128 at most
_UNCOUNTED = 64 << 20  # bytes that a run-length coded frame may give without being counted first


def check_frame(frame: bytes, syntax: UID, rows: int, columns: int) -> None:
    """Raise `BadFile` when a frame would decode to another size than (rows, columns), or is cut short where its decoder would not stop."""
    if syntax == RLELossless:
        _check_runs(frame, rows * columns)
        return
    if syntax in JPEGLSTransferSyntaxes:
        if _END_OF_JPEG not in frame[-16:]:
            raise BadFile("truncated")  # CharLS would go on for many seconds behind the end of its data
        size = _jpeg_size(frame)
    elif syntax in JPEGTransferSyntaxes:
        size = _jpeg_size(frame)
    elif syntax in JPEG2000TransferSyntaxes:
        with Image.open(BytesIO(frame), formats=(Jpeg2KImagePlugin.Jpeg2KImageFile.format,)) as image:
            size = image.size
    else:
        return
    if size != (columns, rows):
        raise BadFile("a frame of another size than its header says")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """(width, height) in the frame header of a JPEG or JPEG-LS stream; raises `BadFile` where there is none."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if (0xC0 <= marker <= 0xCF and marker not in _NOT_FRAMES) or marker == _JPEG_LS_FRAME:
            height, width = data[place + 5 : place + 7], data[place + 7 : place + 9]
            return int.from_bytes(width, "big"), int.from_bytes(height, "big")
        place += 1 if marker == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    raise BadFile("damaged DICOM file")


def _check_runs(frame: bytes, pixels: int) -> None:
    """Refuse a run-length coded frame of which a segment (one byte of every pixel) gives more than twice its bytes."""
    if len(frame) * _RLE_GAIN <= _UNCOUNTED:
        return
    count = min(int.from_bytes(frame[:4], "little"), 15)  # of segments, their offsets follow
    offsets = [int.from_bytes(frame[4 * i : 4 * i + 4], "little") for i in range(1, count + 1)]
    for start, end in zip(offsets, [*offsets[1:], len(frame)], strict=True):
        given, place, end = 0, start, min(end, len(frame))
        while place < end and given <= 2 * pixels + 1024:
            head = frame[place]
            if head < 128:
                given += head + 1
                place += head + 2
            elif head > 128:
                given += 257 - head
                place += 2
            else:
                place += 1
        if given > 2 * pixels + 1024:
            raise BadFile("a frame of another size than its header says")
