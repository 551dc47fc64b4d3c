"""Pixels of one frame of a DICOM file: decoded, rescaled, windowed, turned to colour.

Order of PS3.3 C.11: stored values -> modality (rescale slope and intercept or a table) -> window -> MONOCHROME1 turned round.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import apply_color_lut, apply_modality_lut, get_decoder
from pydicom.uid import UID

from fedmed.data.formats.dicom_file import Counted, open_stream
from fedmed.data.formats.dicom_frames import check_frame
from fedmed.data.formats.limits import BadFile, Limits

_MORE = 1 << 16  # bytes that finding a frame may read beside twice the file
Window = tuple[float, float, str]  # centre, width, function: LINEAR, LINEAR_EXACT or SIGMOID


@dataclass(frozen=True, eq=False, repr=False)
class ImageFile:
    """What of one DICOM file is needed to read its pixels.

    size, changed: bytes and time of the file when it was listed; options: Image Pixel module as pydicom's decoders take it; start: offset of the
    pixel data; tables: header with a modality table or a palette, where there is one.
    """

    path: Path
    size: int
    changed: int
    syntax: UID
    options: dict[str, Any]
    start: int
    tables: Dataset | None = None

    @property
    def photometric(self) -> str:
        """Photometric interpretation, such as MONOCHROME2."""
        return str(self.options["photometric_interpretation"])


@dataclass(frozen=True)
class Frame:
    """One slice: number of its file and frame, place in mm, rescaling and window of the file."""

    file: int
    number: int
    instance: int | None = None
    position: tuple[float, ...] | None = None
    slope: float = 1.0
    intercept: float = 0.0
    window: Window | None = field(default=None)


def read_frame(file: ImageFile, frame: Frame, window: str | Window | None, limits: Limits) -> np.ndarray:
    """(H, W) or (H, W, 3) float32: modality values, or 0..255 through a window.

    window: None, "auto" (that of the file, else from least to greatest value) or a `Window`. MONOCHROME1 is turned round, without a window within the
    range of values that can be stored. Colour is never windowed; with a window it is scaled to 0..255.
    """
    stored, photometric = _decode(file, frame.number, limits)
    if photometric == "PALETTE COLOR":
        colour = apply_color_lut(stored, file.tables)
        return _colour(colour, 8 * colour.dtype.itemsize, window is not None)
    if stored.ndim == 3:
        return _colour(stored, int(file.options["bits_stored"]), window is not None)
    values, low, high = _modality(file, frame, stored)
    inverted = photometric == "MONOCHROME1"
    if window is None:
        return np.float32(low + high) - values if inverted else values
    chosen = frame.window if window == "auto" else window
    shown = stretch(values) if chosen is None or isinstance(chosen, str) else apply_window(values, *chosen)
    return np.float32(255) - shown if inverted else shown


def apply_window(values: np.ndarray, centre: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """Values seen through a window, float32 0..255, by PS3.3 C.11.2.1.2 and C.11.2.1.3; width >= 1, or > 0 for SIGMOID and LINEAR_EXACT."""
    if function == "SIGMOID":
        return (255.0 / (1.0 + np.exp(np.clip(-4.0 * (values - centre) / width, -80, 80)))).astype(np.float32)
    exact = function == "LINEAR_EXACT"
    span = width if exact else width - 1.0
    low = centre - width / 2 if exact else centre - 0.5 - span / 2
    if span == 0:  # a threshold
        return np.where(values > low, np.float32(255), np.float32(0))
    return (np.clip((values - low) / span, 0, 1) * 255).astype(np.float32)


def stretch(values: np.ndarray) -> np.ndarray:
    """Values from least to greatest as float32 0..255; a constant image gives zeros."""
    low, high = float(values.min()), float(values.max())
    return ((values - low) * (255.0 / (high - low))).astype(np.float32) if high > low else np.zeros_like(values)


def _colour(pixels: np.ndarray, bits: int, to_bytes: bool) -> np.ndarray:
    values = pixels[..., :3].astype(np.float32)
    return values * np.float32(255 / (2**bits - 1)) if to_bytes and bits != 8 else values


def _modality(file: ImageFile, frame: Frame, stored: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Values after the modality step and the least and greatest that the file could store."""
    if file.tables is not None:
        values = apply_modality_lut(stored, file.tables).astype(np.float32)
        return values, float(values.min()), float(values.max())
    values = (stored * np.float64(frame.slope) + frame.intercept).astype(np.float32)
    if stored.dtype.kind == "f":
        return values, float(values.min()), float(values.max())
    bits = int(file.options["bits_stored"])
    least = -(2 ** (bits - 1)) if file.options["pixel_representation"] else 0
    low, high = (float(edge * frame.slope + frame.intercept) for edge in (least, least + 2**bits - 1))
    return values, low, high


def _decode(file: ImageFile, number: int, limits: Limits) -> tuple[np.ndarray, str]:
    """Stored values of a frame and their photometric interpretation, YBR turned to RGB."""
    status = file.path.stat()
    if (status.st_size, status.st_mtime_ns) != (file.size, file.changed):
        raise BadFile("changed since the folder was read")
    decoder = get_decoder(file.syntax)
    options = dict(file.options)
    with open_stream(file.path, limits) as (stream, size):
        stream.seek(file.start)
        if not file.syntax.is_encapsulated:
            pixels, found = decoder.as_array(stream, index=number, **options)
            return pixels, str(found["photometric_interpretation"])
        frame = _compressed(stream, size, number, options)
    check_frame(frame, file.syntax, int(options["rows"]), int(options["columns"]))
    options.update(number_of_frames=1)
    pixels, found = decoder.as_array(encapsulate([frame], has_bot=False), index=0, **options)
    return pixels, str(found["photometric_interpretation"])


def _compressed(stream: BinaryIO, size: int, number: int, options: dict[str, Any]) -> bytes:
    counted = Counted(stream, size, max_bytes=2 * size + _MORE)
    offsets = options.pop("extended_offsets", None)
    return get_frame(counted, number, number_of_frames=options["number_of_frames"], extended_offsets=offsets)  # type: ignore[arg-type]
