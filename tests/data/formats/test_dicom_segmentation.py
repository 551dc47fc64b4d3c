"""DICOM Segmentation objects: geometry, classes, links to the images, blank patient."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import EnhancedCTImageStorage

from fedmed.data.formats.dicom import Series, find_series
from fedmed.data.formats.dicom_write import write_mask_like
from fedmed.data.formats.limits import BadFile
from fedmed.errors import UserError

highdicom = pytest.importorskip("highdicom")
Write = Callable[..., Path]
CLASSES = ["background", "liver", "tumour"]
AXIAL = [1, 0, 0, 0, 1, 0]
LABELS = np.zeros((3, 4, 5), dtype=np.uint8)
LABELS[0, 1, 1:4] = 1
LABELS[1, 2, 2] = 2
LABELS[2, 0] = [0, 1, 2, 1, 0]


@pytest.fixture
def series(tmp_path: Path, write_dicom: Write) -> Series:
    """Three slices whose file names run against their places."""
    for name, z in (("c", 0.0), ("b", 2.5), ("a", 5.0)):
        write_dicom(
            tmp_path / "images" / name,
            np.zeros((4, 5), np.uint16),
            ImagePositionPatient=[-10, 20, z],
            ImageOrientationPatient=AXIAL,
            PixelSpacing=[0.5, 0.25],
            SliceThickness=2.5,
            InstanceNumber=ord(name),
        )
    return find_series(tmp_path / "images")[0]


def read_back(path: Path, series: Series) -> np.ndarray:
    """Class of every pixel, slices in the order of `series`, by highdicom's reader."""
    segmentation = highdicom.seg.segread(path)
    uids = [pydicom.dcmread(file, specific_tags=["SOPInstanceUID"]).SOPInstanceUID for file in series.files]
    return segmentation.get_pixels_by_source_instance(uids, combine_segments=True, assert_missing_frames_are_empty=True)


def test_the_labels_come_back_slice_by_slice(tmp_path: Path, series: Series) -> None:
    path = write_mask_like(series, LABELS, CLASSES, tmp_path / "new" / "seg.dcm")
    assert np.array_equal(read_back(path, series), LABELS)
    assert [p.name for p in path.parent.iterdir()] == ["seg.dcm"]


def test_places_and_frame_of_reference_are_those_of_the_images(tmp_path: Path, series: Series) -> None:
    written = pydicom.dcmread(write_mask_like(series, LABELS, CLASSES, tmp_path / "seg.dcm"))
    source = pydicom.dcmread(series.files[0])
    assert written.FrameOfReferenceUID == source.FrameOfReferenceUID
    assert written.StudyInstanceUID == source.StudyInstanceUID
    assert written.SeriesInstanceUID != source.SeriesInstanceUID
    assert (written.Rows, written.Columns, written.SegmentationType) == (4, 5, "BINARY")
    shared = written.SharedFunctionalGroupsSequence[0]
    assert list(shared.PixelMeasuresSequence[0].PixelSpacing) == [0.5, 0.25]
    assert list(shared.PlaneOrientationSequence[0].ImageOrientationPatient) == AXIAL
    frames = {
        (
            int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber),
            float(group.PlanePositionSequence[0].ImagePositionPatient[2]),
        )
        for group in written.PerFrameFunctionalGroupsSequence
    }
    assert frames == {(1, 0.0), (2, 2.5), (1, 5.0), (2, 5.0)}  # empty frames are left out
    assert [(item.SegmentNumber, item.SegmentLabel) for item in written.SegmentSequence] == [
        (1, "liver"),
        (2, "tumour"),
    ]
    assert {item.SegmentAlgorithmType for item in written.SegmentSequence} == {"AUTOMATIC"}


def test_the_patient_stays_blank_unless_asked_for(tmp_path: Path, series: Series) -> None:
    secrets = ("pat-17", "Doe", "19500102", "A-99", "S-1", "20200304", "101112", "House")
    path = write_mask_like(series, LABELS, CLASSES, tmp_path / "seg.dcm")
    blank = pydicom.dcmread(path)
    for word in (
        "PatientID",
        "PatientName",
        "PatientBirthDate",
        "PatientSex",
        "AccessionNumber",
        "StudyID",
        "StudyDate",
        "ReferringPhysicianName",
    ):
        assert word in blank
        assert not blank[word].value
    assert not [secret for secret in secrets if secret.encode() in path.read_bytes()]
    named = pydicom.dcmread(write_mask_like(series, LABELS, CLASSES, path, with_patient=True))
    assert (named.PatientID, str(named.PatientName), named.PatientBirthDate, named.PatientSex) == (
        "pat-17",
        "Doe^Jane",
        "19500102",
        "F",
    )
    assert named.AccessionNumber == "A-99"


def test_names_beyond_ascii(tmp_path: Path, write_dicom: Write) -> None:
    write_dicom(tmp_path / "a", np.zeros((4, 5), np.uint16), SpecificCharacterSet="ISO_IR 100", PatientName="Müller^Jörg",
                ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=AXIAL, PixelSpacing=[1, 1], SliceThickness=1)  # fmt: skip
    series = find_series(tmp_path)[0]
    written = pydicom.dcmread(
        write_mask_like(series, LABELS[:1], ["ground", "Läsion " + "x" * 90], tmp_path / "seg.dcm", with_patient=True)
    )
    assert str(written.PatientName) == "Müller^Jörg"
    assert written.SegmentSequence[0].SegmentLabel == ("Läsion " + "x" * 90)[:64]


def test_an_empty_mask_and_a_single_class(tmp_path: Path, series: Series) -> None:
    path = write_mask_like(series, np.zeros_like(LABELS, dtype=bool), CLASSES[:2], tmp_path / "seg.dcm")
    assert pydicom.dcmread(path).NumberOfFrames >= 1
    assert not read_back(path, series).any()


def test_frames_of_an_enhanced_file_keep_their_places(tmp_path: Path, write_dicom: Write) -> None:
    groups = []
    for index, z in enumerate((5.0, 0.0, 2.5)):
        group, position, content = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [0, 0, z]
        content.DimensionIndexValues = [index + 1]
        group.PlanePositionSequence, group.FrameContentSequence = [position], [content]
        groups.append(group)
    shared, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = AXIAL
    measures.PixelSpacing, measures.SliceThickness = [1, 1], 2.5
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    path = write_dicom(
        tmp_path / "a",
        np.zeros((3, 4, 5), np.uint16),
        SOPClassUID=EnhancedCTImageStorage,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=groups,
    )
    series = find_series(path)[0]
    assert [frame.number for frame in series.frames] == [1, 2, 0]
    written = pydicom.dcmread(write_mask_like(series, LABELS, CLASSES, tmp_path / "seg.dcm"))
    frames = {
        (
            int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber),
            float(group.PlanePositionSequence[0].ImagePositionPatient[2]),
        )
        for group in written.PerFrameFunctionalGroupsSequence
    }
    assert frames == {(1, 0.0), (2, 2.5), (1, 5.0), (2, 5.0)}


@pytest.mark.parametrize(
    ("labels", "classes", "reason"),
    [
        (LABELS[:2], CLASSES, r"shape \(3, 4, 5\), got uint8 \(2, 4, 5\)"),
        (LABELS.astype(float), CLASSES, "whole numbers"),
        (LABELS, CLASSES[:2], r"in 0\.\.1"),
        (LABELS.astype(int) - 1, CLASSES, r"in 0\.\.2"),
        (LABELS * 0, CLASSES[:1], "2 to 256"),
    ],
)
def test_arguments_are_checked(
    tmp_path: Path, series: Series, labels: np.ndarray, classes: list[str], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        write_mask_like(series, labels, classes, tmp_path / "out" / "seg.dcm")
    assert not (tmp_path / "out").exists()


def test_a_series_without_places_says_what_is_missing(tmp_path: Path, write_dicom: Write) -> None:
    write_dicom(tmp_path / "images" / "a", np.zeros((4, 5), np.uint16), StudyInstanceUID=None)
    series = find_series(tmp_path / "images")[0]
    with pytest.raises(BadFile, match="without what a DICOM Segmentation needs"):
        write_mask_like(series, LABELS[:1], CLASSES, tmp_path / "seg.dcm")
    assert not (tmp_path / "seg.dcm").exists()


def test_without_highdicom_it_says_what_to_install(
    tmp_path: Path, series: Series, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(UserError, match=r"pip install 'fedmed\[dicom\]'"):
        write_mask_like(series, LABELS, CLASSES, tmp_path / "seg.dcm")
