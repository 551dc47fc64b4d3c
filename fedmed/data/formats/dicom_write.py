"""Masks as DICOM Segmentation objects beside the images they were made from, by highdicom (extra `dicom`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import generate_uid

from fedmed.data.formats.dicom import Series
from fedmed.data.formats.dicom_file import open_stream, read_header
from fedmed.data.formats.limits import BadFile, bad_file, write_beside
from fedmed.errors import UserError
from fedmed.version import __version__

_PATIENT = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
)
_LINKS = """SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID PositionReferenceIndicator Modality InstanceNumber Rows Columns
NumberOfFrames ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness SpacingBetweenSlices SharedFunctionalGroupsSequence
PerFrameFunctionalGroupsSequence DimensionIndexSequence DimensionOrganizationSequence ImageType"""
_LABEL = 64  # characters of a segment label


def write_mask_like(
    series: Series,
    labels: np.ndarray,
    class_names: Sequence[str],
    path: str | Path,
    with_patient: bool = False,
) -> Path:
    """Write a binary DICOM Segmentation with a segment per foreground class, in the frame of reference and geometry of `series`.

    labels (n, H, W): class of every pixel, slices in the order of `series`; class_names: background first. The segmentation points to the study and images
    by their UIDs; name, birth date, sex, accession number, dates and physician stay blank unless `with_patient`. Atomic. Raises UserError (shape, classes,
    highdicom missing) and `BadFile` (the images can no longer be read, or lack what a segmentation needs).
    """
    path, labels = Path(path), np.asarray(labels)
    _check(series, labels, class_names, path)
    try:
        import highdicom
    except ImportError as error:
        raise UserError(
            f"Cannot write {path.name}: a DICOM Segmentation needs highdicom; pip install 'fedmed[dicom]'."
        ) from error
    logging.getLogger("highdicom").setLevel(logging.CRITICAL)  # it quotes names it finds odd
    sources = _sources(series, with_patient)
    if len(sources) == 1:
        ordered = np.empty_like(labels)
        ordered[[frame.number for frame in series.frames]] = labels
        labels = ordered
    try:
        segmentation = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=labels.astype(np.uint8),
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=_segments(highdicom, class_names),
            series_instance_uid=generate_uid(),
            series_number=1,
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer="FedMed",
            manufacturer_model_name="fedmed",
            software_versions=__version__,
            device_serial_number="0",
            series_description="Predicted segmentation",
        )
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise BadFile(
            "a series without what a DICOM Segmentation needs (study, frame of reference, place of every slice)"
        ) from error
    return write_beside(path, segmentation.save_as)


def _check(series: Series, labels: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    expected = (len(series), *series.size)
    if labels.shape != expected or labels.dtype.kind not in "iub":
        raise UserError(
            f"Cannot write {path.name}: labels must be whole numbers of shape {expected}, got {labels.dtype} {labels.shape}."
        )
    count = len(class_names)
    if not 2 <= count <= 256 or labels.min() < 0 or labels.max() >= count:
        raise UserError(
            f"Cannot write {path.name}: labels must lie in 0..{count - 1} for {count} class names (2 to 256, background first)."
        )


def _sources(series: Series, with_patient: bool) -> list[Dataset]:
    """Headers of the images in the order of the slices, stripped to what links and places a segmentation."""
    words = (*_LINKS.split(), *(_PATIENT if with_patient else ()))
    tags = [Tag(word) for word in words]
    found: dict[int, Dataset] = {}
    with bad_file("DICOM file"):
        for number in dict.fromkeys(frame.file for frame in series.frames):
            with open_stream(series.images[number].path, series.limits) as (stream, size):
                header = read_header(stream, size, tags).header
            for word in _PATIENT:
                value = header.get(word)
                setattr(header, word, str(value) if value is not None else "")
            header.SpecificCharacterSet = "ISO_IR 192"  # the texts above are now plain strings
            found[number] = header
    return list(found.values())


def _segments(highdicom: Any, class_names: Sequence[str]) -> list[Any]:
    from pydicom.sr.codedict import codes

    algorithm = highdicom.AlgorithmIdentificationSequence("FedMed", codes.DCM.ArtificialIntelligence, __version__)
    return [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:_LABEL],
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(class_names[1:], start=1)
    ]
