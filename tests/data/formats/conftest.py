"""Small DICOM files made by hand, for the tests of the readers and for the damaged copies of the fuzz test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

STUDY, SERIES, FRAME_OF_REFERENCE = "1.2.3.1", "1.2.3.2", "1.2.3.3"


def dicom_dataset(pixels: np.ndarray, **elements: Any) -> Dataset:
    """An image of (H, W), (H, W, 3) or (n, H, W) values with the elements given (None leaves one out); stack=True: (n, H, 3) are n frames."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = elements.pop("syntax", ExplicitVRLittleEndian)
    frames = elements.pop("stack", pixels.ndim == 3 and pixels.shape[-1] != 3)
    colour = pixels.ndim == 3 and not frames
    bits = 8 * pixels.dtype.itemsize
    values: dict[str, Any] = {
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": generate_uid(),
        "StudyInstanceUID": STUDY,
        "SeriesInstanceUID": SERIES,
        "FrameOfReferenceUID": FRAME_OF_REFERENCE,
        "PositionReferenceIndicator": "",
        "Modality": "CT",
        "PatientID": "pat-17",
        "PatientName": "Doe^Jane",
        "PatientBirthDate": "19500102",
        "PatientSex": "F",
        "AccessionNumber": "A-99",
        "StudyID": "S-1",
        "StudyDate": "20200304",
        "StudyTime": "101112",
        "ReferringPhysicianName": "House^G",
        "Rows": pixels.shape[1 if frames else 0],
        "Columns": pixels.shape[2 if frames else 1],
        "SamplesPerPixel": 3 if colour else 1,
        "PhotometricInterpretation": "RGB" if colour else "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
    }
    if colour:
        values["PlanarConfiguration"] = 0
    if frames:
        values["NumberOfFrames"] = len(pixels)
    for name, value in {**values, **elements}.items():
        if value is not None:
            setattr(dataset, name, value)
    if "PixelData" not in dataset:
        dataset.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    dataset["PixelData"].VR = "OB" if bits == 8 else "OW"
    return dataset


@pytest.fixture
def write_dicom() -> Callable[..., Path]:
    """Function (path, pixels, **elements) -> path that writes `dicom_dataset` as a file."""

    def write(path: Path, pixels: np.ndarray, **elements: Any) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        dicom_dataset(pixels, **elements).save_as(path, enforce_file_format=True)
        return path

    return write
