"""What the header of a DICOM image says: to which series it belongs, how its pixels are stored, where its slices lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.filewriter import correct_ambiguous_vr
from pydicom.pixels import as_pixel_options, get_decoder
from pydicom.tag import Tag
from pydicom.uid import JPEGExtended12Bit

from fedmed.data.formats.dicom_file import Opened, open_stream, read_header
from fedmed.data.formats.dicom_pixels import Frame, ImageFile, Window
from fedmed.data.formats.limits import BadFile, Limits

_WORDS = """SOPInstanceUID Modality PatientID StudyInstanceUID SeriesInstanceUID InstanceNumber ImagePositionPatient ImageOrientationPatient PixelSpacing
ImagerPixelSpacing NominalScannedPixelSpacing SliceThickness SpacingBetweenSlices SamplesPerPixel PhotometricInterpretation PlanarConfiguration
NumberOfFrames Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation WindowCenter WindowWidth VOILUTFunction RescaleIntercept RescaleSlope
ModalityLUTSequence RedPaletteColorLookupTableDescriptor GreenPaletteColorLookupTableDescriptor BluePaletteColorLookupTableDescriptor
RedPaletteColorLookupTableData GreenPaletteColorLookupTableData BluePaletteColorLookupTableData SegmentedRedPaletteColorLookupTableData
SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence ExtendedOffsetTable ExtendedOffsetTableLengths"""
TAGS = tuple(Tag(word) for word in _WORDS.split())
NOT_IMAGES = frozenset(
    ("SEG", "RTDOSE", "RTSTRUCT", "RTPLAN", "SR", "PR", "KO", "REG", "DOC", "ECG", "AU", "FID", "PLAN")
)
_COLOUR = frozenset(("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"))
_PALETTE, _GREY = "PALETTE COLOR", frozenset(("MONOCHROME1", "MONOCHROME2"))
_BITS = {"PixelData": (1, 8, 16, 32), "FloatPixelData": (32,), "DoubleFloatPixelData": (64,)}


@dataclass(frozen=True, repr=False)
class Group:
    """What images of one series have in common (compared), and what is known of it from its first file.

    single: path of a multi-frame file, or of one without a series; orientation: six direction cosines, two decimals; spacing (rows, columns) and
    between (slices) in mm; instance: SOP instance.
    """

    patient: str
    study: str
    uid: str
    modality: str
    size: tuple[int, int]
    channels: int
    orientation: tuple[float, ...] | None
    single: str = ""
    spacing: tuple[float, float] = field(default=(1.0, 1.0), compare=False)
    between: float = field(default=1.0, compare=False)
    instance: str = field(default="", compare=False)


def read_image_file(path: Path, limits: Limits) -> tuple[Group, ImageFile, list[Frame]]:
    """Read and check the header of one file, without pixels. Raises `BadFile` when there is no image in it or it is larger than `limits`."""
    with open_stream(path, limits) as (stream, size):
        opened = read_header(stream, size, TAGS)
        header = opened.header
        modality = str(header.get("Modality", "")).strip()
        if modality in NOT_IMAGES:
            raise BadFile(f"not an image ({modality})")
        if not opened.keyword or not header.get("Rows") or not header.get("Columns"):
            raise BadFile("no image in it")
        options = _options(opened, limits)
        if not opened.syntax.is_encapsulated and opened.start + _stored_bytes(options) > size:
            raise BadFile("truncated")
        image = _image_file(path, opened, options)
        shared = opened.first(header, "SharedFunctionalGroupsSequence")
        frames = _frames(opened, shared, int(options["number_of_frames"]))
    first = _first_groups(opened)
    uid = _text(header, "SeriesInstanceUID")
    group = Group(
        patient=_text(header, "PatientID"),
        study=_text(header, "StudyInstanceUID"),
        uid=uid,
        modality=modality if modality.isalnum() else "",
        size=(int(options["rows"]), int(options["columns"])),
        channels=1 if image.photometric in _GREY else 3,
        orientation=_orientation(opened, (first, shared)),
        single=str(path) if len(frames) > 1 or not uid else "",
        spacing=_spacing(opened, (first, shared)),
        between=_between(opened, (first, shared)),
        instance=_text(header, "SOPInstanceUID"),
    )
    return group, image, frames


def _options(opened: Opened, limits: Limits) -> dict[str, Any]:
    """Image Pixel module for pydicom's decoders, checked."""
    options = as_pixel_options(opened.header)
    frames = options["number_of_frames"] = int(options["number_of_frames"])
    rows, columns, samples, bits = (
        int(options[key]) for key in ("rows", "columns", "samples_per_pixel", "bits_allocated")
    )
    limits.check_plane(rows, columns)
    if frames < 1 or samples not in (1, 3) or bits not in _BITS[opened.keyword]:
        raise BadFile("a DICOM pixel format that is not read")
    limits.check_pages(frames)
    limits.check_bytes((frames, rows, columns, samples), math.ceil(bits / 8))
    photometric = options["photometric_interpretation"] = str(options["photometric_interpretation"]).strip()
    if photometric not in (_COLOUR if samples == 3 else _GREY | {_PALETTE}):
        raise BadFile("a DICOM photometric interpretation that is not read")
    if opened.keyword == "PixelData":
        stored = options["bits_stored"] = int(options.get("bits_stored", bits))
        if not 1 <= stored <= bits:
            raise BadFile("damaged DICOM file")
    else:
        options.setdefault("bits_stored", bits)
    options.setdefault("pixel_representation", 0)
    if samples == 3:
        options.setdefault("planar_configuration", 0)
    options.update(pixel_keyword=opened.keyword, pixel_vr=opened.vr)
    return options


def _stored_bytes(options: dict[str, Any]) -> int:
    """Bytes of all frames where they are not compressed."""
    samples = 2 if options["photometric_interpretation"] == "YBR_FULL_422" else int(options["samples_per_pixel"])
    values = int(options["number_of_frames"]) * int(options["rows"]) * int(options["columns"]) * samples
    return math.ceil(values * int(options["bits_allocated"]) / 8)


def _image_file(path: Path, opened: Opened, options: dict[str, Any]) -> ImageFile:
    syntax = opened.syntax
    try:
        decoders = set(get_decoder(syntax).available_plugins)
    except NotImplementedError:
        decoders = set()
    else:
        decoders |= {"pydicom"} if not syntax.is_encapsulated else set()
    if syntax == JPEGExtended12Bit and options["bits_stored"] > 8:
        decoders.discard("pillow")  # it reads 8 bits only
    if not decoders:
        raise BadFile(f"compressed as {syntax.name}, which no installed decoder reads")
    header, tables = opened.header, None
    if options["photometric_interpretation"] == _PALETTE or opened.items(header, "ModalityLUTSequence"):
        if "SegmentedRedPaletteColorLookupTableData" in header:
            raise BadFile("a segmented palette")
        tables = correct_ambiguous_vr(header, syntax.is_little_endian)
    status = path.stat()
    return ImageFile(path, status.st_size, status.st_mtime_ns, syntax, options, opened.start, tables)


def _frames(opened: Opened, shared: Dataset | None, count: int) -> list[Frame]:
    header = opened.header
    instance = header.get("InstanceNumber")
    number = int(instance) if instance not in (None, "") else None
    per_frame = opened.items(header, "PerFrameFunctionalGroupsSequence")
    if per_frame and len(per_frame) != count:
        raise BadFile("another number of frames than its header says")
    frames = []
    for index in range(count):
        groups = (per_frame[index] if per_frame else None, shared)
        plane = _group(opened, groups, "PlanePositionSequence")
        rescale = _group(opened, groups, "PixelValueTransformationSequence")
        slope, intercept = _number(rescale, "RescaleSlope", 1.0), _number(rescale, "RescaleIntercept", 0.0)
        position = _numbers(plane, "ImagePositionPatient", 3)
        if count > 1 and not per_frame:
            position = None  # one place for all frames: a loop in time, kept in its order
        window = _window(_group(opened, groups, "FrameVOILUTSequence"))
        frames.append(Frame(0, index, number, position, slope, intercept, window))
    return frames


def _first_groups(opened: Opened) -> Dataset | None:
    return opened.first(opened.header, "PerFrameFunctionalGroupsSequence")


def _group(opened: Opened, groups: Sequence[Dataset | None], keyword: str) -> Dataset:
    """The item of a functional group that holds for a frame: its own, else the shared one, else the header itself (single-frame files)."""
    for group in groups:
        found = opened.first(group, keyword)
        if found is not None:
            return found
    return opened.header


def _orientation(opened: Opened, groups: Sequence[Dataset | None]) -> tuple[float, ...] | None:
    """Direction cosines of rows and columns; None where they are missing or span no plane."""
    found = _numbers(_group(opened, groups, "PlaneOrientationSequence"), "ImageOrientationPatient", 6)
    if found is None:
        return None
    rows, columns = found[:3], found[3:]
    lengths = math.hypot(*rows), math.hypot(*columns)
    across = abs(sum(a * b for a, b in zip(rows, columns, strict=True)))
    if not all(0.9 < length < 1.1 for length in lengths) or across > 0.1:
        return None
    return tuple(round(value, 2) + 0.0 for value in found)  # + 0.0: no -0.0 beside 0.0


def _spacing(opened: Opened, groups: Sequence[Dataset | None]) -> tuple[float, float]:
    item = _group(opened, groups, "PixelMeasuresSequence")
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        found = _numbers(item, keyword, 2)
        if found is not None and min(found) > 0:
            return found[0], found[1]
    return 1.0, 1.0


def _between(opened: Opened, groups: Sequence[Dataset | None]) -> float:
    item = _group(opened, groups, "PixelMeasuresSequence")
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        value = abs(_number(item, keyword, 0.0))
        if value > 0:
            return value
    return 1.0


def _window(item: Dataset) -> Window | None:
    """First window of the file; None where there is none that can be applied."""
    centre, width = _numbers(item, "WindowCenter"), _numbers(item, "WindowWidth")
    function = str(item.get("VOILUTFunction") or "LINEAR").strip()
    least = 1.0 if function == "LINEAR" else 1e-6
    if not centre or not width or width[0] < least or function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        return None
    return centre[0], width[0], function


def _numbers(dataset: Dataset, keyword: str, count: int | None = None) -> tuple[float, ...] | None:
    """Finite numbers of an element; None where it is missing, not numbers or of another length."""
    value = dataset.get(keyword)
    if value is None or value == "":
        return None
    values = [value] if isinstance(value, (int, float)) else list(value)
    try:
        found = tuple(float(v) for v in values)
    except (TypeError, ValueError):
        return None
    usable = all(map(math.isfinite, found)) and (count is None or len(found) == count)
    return found if usable else None


def _number(dataset: Dataset, keyword: str, default: float) -> float:
    found = _numbers(dataset, keyword, 1)
    return default if found is None else found[0]


def _text(dataset: Dataset, keyword: str) -> str:
    return str(dataset.get(keyword) or "").strip()
