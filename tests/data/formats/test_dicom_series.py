"""DICOM: grouping, order, values, windows, colour, compressed frames, and what is refused, on files made by hand."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    RLELossless,
)

from fedmed.data.formats import dicom_file
from fedmed.data.formats.dicom import Series, find_series
from fedmed.data.formats.dicom_pixels import apply_window, stretch
from fedmed.data.formats.limits import BadFile, Limits
from fedmed.errors import UserError

Write = Callable[..., Path]
STORED = np.array([[0, 1, 2], [1000, 2000, 4095]], dtype=np.uint16)
AXIAL = [1, 0, 0, 0, 1, 0]


def only(path: Path, limits: Limits | None = None) -> Series:
    """The one series of a folder or file; whatever is left out fails the test."""
    found = find_series(
        path, *([limits] if limits else []), on_bad=lambda file, reason: pytest.fail(f"{file.name}: {reason}")
    )
    assert len(found) == 1
    return found[0]


def reasons(folder: Path, limits: Limits | None = None) -> Counter[str]:
    """Why files of a folder were left out; none may be usable."""
    found: Counter[str] = Counter()
    assert find_series(folder, *([limits] if limits else []), on_bad=lambda _, reason: found.update([reason])) == []
    return found


# Order and groups


def test_slices_are_sorted_along_the_normal_not_by_name_or_number(tmp_path: Path, write_dicom: Write) -> None:
    for name, number, z in (("a", 1, 5.0), ("b", 2, -10.0), ("c", 3, 0.0), ("d", 4, -5.0)):
        pixels = np.full((2, 3), int(z + 10), dtype=np.uint16)
        write_dicom(
            tmp_path / name,
            pixels,
            InstanceNumber=number,
            ImagePositionPatient=[7, 8, z],
            ImageOrientationPatient=AXIAL,
            PixelSpacing=[0.5, 0.25],
        )
    series = only(tmp_path)
    assert [file.name for file in series.files] == ["b", "d", "c", "a"]
    assert [int(series.read(i)[0, 0]) for i in range(4)] == [0, 5, 10, 15]
    assert series.spacing == (5.0, 0.5, 0.25)
    assert (len(series), series.size, series.channels, series.modality) == (4, (2, 3), 1, "CT")


def test_the_normal_may_point_anywhere(tmp_path: Path, write_dicom: Write) -> None:
    sagittal = [0, 1, 0, 0, 0, -1]  # normal (-1, 0, 0)
    for name, x in (("a", 0.0), ("b", 3.0), ("c", 6.0)):
        write_dicom(tmp_path / name, STORED, ImagePositionPatient=[x, 0, 0], ImageOrientationPatient=sagittal)
    series = only(tmp_path)
    assert [file.name for file in series.files] == ["c", "b", "a"]
    assert series.spacing == (3.0, 1.0, 1.0)


def test_without_places_the_instance_number_decides_then_the_name(tmp_path: Path, write_dicom: Write) -> None:
    for name, number in (("a", 3), ("b", None), ("c", 1), ("d", None), ("e", 2)):
        write_dicom(tmp_path / name, STORED, InstanceNumber=number, SliceThickness="2.5")
    series = only(tmp_path)
    assert [file.name for file in series.files] == ["c", "e", "a", "b", "d"]
    assert series.spacing == (2.5, 1.0, 1.0)


def test_one_place_seen_twice_goes_by_instance_number(tmp_path: Path, write_dicom: Write) -> None:
    for name, number, z in (("a", 4, 1), ("b", 3, 0), ("c", 2, 1), ("d", 1, 0)):
        write_dicom(
            tmp_path / name,
            STORED,
            InstanceNumber=number,
            ImagePositionPatient=[0, 0, z],
            ImageOrientationPatient=AXIAL,
        )
    assert [file.name for file in only(tmp_path).files] == ["d", "b", "c", "a"]


def test_series_sizes_orientations_and_patients_are_kept_apart(tmp_path: Path, write_dicom: Write) -> None:
    write_dicom(tmp_path / "a", STORED)
    write_dicom(tmp_path / "b", STORED.T.copy())
    write_dicom(tmp_path / "c", STORED, SeriesInstanceUID="1.2.9")
    write_dicom(tmp_path / "d", STORED, ImageOrientationPatient=AXIAL, ImagePositionPatient=[0, 0, 0])
    write_dicom(tmp_path / "e", STORED, PatientID="pat-18")
    write_dicom(tmp_path / "deep" / "er" / "f", STORED)
    groups = [[file.name for file in series.files] for series in find_series(tmp_path)]
    assert sorted(groups) == [["a", "f"], ["b"], ["c"], ["d"], ["e"]]


def test_files_without_a_series_stand_alone(tmp_path: Path, write_dicom: Write) -> None:
    for name in "ab":
        write_dicom(tmp_path / name, STORED, SeriesInstanceUID=None)
    assert [len(series) for series in find_series(tmp_path)] == [1, 1]


def test_what_is_left_out_is_reported(tmp_path: Path, write_dicom: Write) -> None:
    first = write_dicom(tmp_path / "a", STORED)
    (tmp_path / "copy").write_bytes(first.read_bytes())
    (tmp_path / "DICOMDIR.txt").write_text("no image")
    (tmp_path / "empty").touch()
    write_dicom(tmp_path / "seg", STORED, Modality="SEG")
    write_dicom(tmp_path / "report", STORED, Modality="SR")
    write_dicom(tmp_path / "headless", STORED, Rows=None)
    found: dict[str, str] = {}
    assert len(find_series(tmp_path, on_bad=lambda file, reason: found.update({file.name: reason}))) == 1
    assert found == {
        "copy": "a second copy of an image",
        "DICOMDIR.txt": "not a DICOM file",
        "empty": "empty file",
        "seg": "not an image (SEG)",
        "report": "not an image (SR)",
        "headless": "no image in it",
    }


def test_a_folder_must_exist_and_may_be_empty(tmp_path: Path) -> None:
    assert find_series(tmp_path) == []
    with pytest.raises(UserError, match="does not exist"):
        find_series(tmp_path / "none")


# Values


def test_rescale_gives_hounsfield_units(tmp_path: Path, write_dicom: Write) -> None:
    path = write_dicom(tmp_path / "a", STORED, RescaleSlope="2", RescaleIntercept="-1024", BitsStored=12, HighBit=11)
    found = only(path).read(0)
    assert found.dtype == np.float32
    assert np.array_equal(found, STORED * 2.0 - 1024)


def test_signed_values_of_12_bits(tmp_path: Path, write_dicom: Write) -> None:
    stored = np.array([[-2048, -1], [0, 2047]], dtype=np.int16)
    path = write_dicom(tmp_path / "a", stored, BitsStored=12, HighBit=11)
    assert np.array_equal(only(path).read(0), stored)


def test_monochrome1_is_turned_round_within_what_can_be_stored(tmp_path: Path, write_dicom: Write) -> None:
    inverted: dict[str, Any] = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11}
    plain = only(write_dicom(tmp_path / "a", STORED, **inverted))
    assert np.array_equal(plain.read(0), 4095.0 - STORED)
    rescaled = only(write_dicom(tmp_path / "b", STORED, **inverted, RescaleSlope=2, RescaleIntercept=-10))
    assert np.array_equal(rescaled.read(0), 2 * (4095.0 - STORED) - 10)
    signed = only(write_dicom(tmp_path / "c", np.array([[-2048, 2047]], np.int16), **inverted))
    assert signed.read(0).tolist() == [[2047, -2048]]
    assert np.array_equal(plain.read(0, (2047.5, 4096)), 255 - apply_window(STORED.astype(float), 2047.5, 4096))


def test_a_modality_table(tmp_path: Path, write_dicom: Write) -> None:
    table = Dataset()
    table.LUTDescriptor = [3, 1, 16]
    table["LUTDescriptor"].VR = "US"
    table.add_new("LUTData", "OW", np.array([100, 200, 900], "<u2").tobytes())
    table.ModalityLUTType = "OD"
    stored = np.array([[0, 1, 2, 3, 9]], dtype=np.uint16)
    for syntax in (pydicom.uid.ExplicitVRLittleEndian, ImplicitVRLittleEndian):
        series = only(write_dicom(tmp_path / "a", stored, ModalityLUTSequence=[table], syntax=syntax))
        assert series.read(0).tolist() == [[100, 100, 200, 900, 900]]


def test_windows_by_hand() -> None:
    values = np.array([[-1000, 40, 39.5, 240, 1000]])
    assert apply_window(values, 40, 401)[0] == pytest.approx([0, 127.5 + 0.5 / 400 * 255, 127.5, 255, 255])
    assert apply_window(values, 40, 400, "LINEAR_EXACT")[0] == pytest.approx(
        [0, 127.5, 127.5 - 0.5 / 400 * 255, 255, 255]
    )
    assert apply_window(values, 40, 1).tolist() == [[0, 255, 0, 255, 255]]  # a threshold at 39.5
    sigmoid = apply_window(values, 40, 400, "SIGMOID")
    assert sigmoid[0, 1] == 127.5
    assert sigmoid[0, 3] == pytest.approx(255 / (1 + np.exp(-2)))
    assert np.isfinite(apply_window(np.array([1e30, -1e30]), 0, 1e-6, "SIGMOID")).all()
    assert stretch(np.array([[2.0, 3, 4]])).tolist() == [[0, 127.5, 255]]
    assert stretch(np.array([[7.0, 7]])).tolist() == [[0, 0]]


def test_windows_of_a_file(tmp_path: Path, write_dicom: Write) -> None:
    series = only(write_dicom(tmp_path / "a", STORED, WindowCenter=[1000, 5], WindowWidth=[501, 5]))
    assert np.array_equal(series.read(0, "auto"), apply_window(STORED.astype(float), 1000, 501))  # the first of two
    assert np.array_equal(series.read(0, (2000, 1001)), apply_window(STORED.astype(float), 2000, 1001))
    exact = only(
        write_dicom(tmp_path / "b", STORED, WindowCenter="1000", WindowWidth="500", VOILUTFunction="LINEAR_EXACT")
    )
    assert np.array_equal(exact.read(0, "auto"), apply_window(STORED.astype(float), 1000, 500, "LINEAR_EXACT"))
    for centre, width in ((None, None), ("1000", "0"), ("1000", None)):
        without = only(write_dicom(tmp_path / "c", STORED, WindowCenter=centre, WindowWidth=width))
        assert np.array_equal(without.read(0, "auto"), stretch(STORED.astype(np.float32)))


def test_arguments_of_read_are_checked(tmp_path: Path, write_dicom: Write) -> None:
    series = only(write_dicom(tmp_path / "a", STORED))
    for window in ("lung", (40, 0.5), (np.nan, 10)):
        with pytest.raises(ValueError, match="window"):
            series.read(0, window)
    with pytest.raises(IndexError):
        series.read(1)


def test_colour(tmp_path: Path, write_dicom: Write) -> None:
    rgb = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [10, 20, 30]]], dtype=np.uint8)
    series = only(write_dicom(tmp_path / "rgb" / "a", rgb))
    assert series.channels == 3
    for window in (None, "auto", (40, 400)):
        assert np.array_equal(series.read(0, window), rgb)
    planes = only(
        write_dicom(tmp_path / "planes" / "a", rgb, PlanarConfiguration=1, PixelData=np.moveaxis(rgb, -1, 0).tobytes())
    )
    assert np.array_equal(planes.read(0), rgb)
    grey = np.array([[[50, 128, 128], [200, 128, 128]]], dtype=np.uint8)
    ybr = only(write_dicom(tmp_path / "ybr" / "a", grey, PhotometricInterpretation="YBR_FULL"))
    assert ybr.read(0)[0, :, 0].tolist() == [50, 200]
    wide = only(write_dicom(tmp_path / "wide" / "a", rgb.astype(np.uint16) * 257))
    assert np.array_equal(wide.read(0), rgb * 257.0)
    assert np.allclose(wide.read(0, "auto"), rgb)


def test_a_palette_becomes_colour(tmp_path: Path, write_dicom: Write) -> None:
    tables = {}
    for name, entries in (("Red", [0, 257 * 10]), ("Green", [0, 257 * 20]), ("Blue", [0, 257 * 255])):
        tables[f"{name}PaletteColorLookupTableDescriptor"] = [2, 0, 16]
        tables[f"{name}PaletteColorLookupTableData"] = np.array(entries, "<u2").tobytes()
    stored = np.array([[0, 1]], dtype=np.uint8)
    series = only(write_dicom(tmp_path / "a", stored, PhotometricInterpretation="PALETTE COLOR", **tables))
    assert series.channels == 3
    assert np.allclose(series.read(0, "auto"), [[[0, 0, 0], [10, 20, 255]]])


# Frames and transfer syntaxes


def frame_groups(places: list[float], slopes: list[float]) -> list[Dataset]:
    groups = []
    for place, slope in zip(places, slopes, strict=True):
        group, position, rescale = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [0, 0, place]
        rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = slope, 1, "US"
        group.PlanePositionSequence, group.PixelValueTransformationSequence = [position], [rescale]
        groups.append(group)
    return groups


def test_frames_of_an_enhanced_file_are_slices(tmp_path: Path, write_dicom: Write) -> None:
    frames = np.stack([np.full((2, 3), value, np.uint16) for value in (10, 20, 30)])
    shared, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = AXIAL
    measures.PixelSpacing, measures.SliceThickness = [0.5, 0.75], 9
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    window = Dataset()
    window.WindowCenter, window.WindowWidth = 40, 401
    shared.FrameVOILUTSequence = [window]
    elements = {
        "SharedFunctionalGroupsSequence": [shared],
        "PerFrameFunctionalGroupsSequence": frame_groups([4, 0, 2], [1, 2, 3]),
    }
    for syntax in (pydicom.uid.ExplicitVRLittleEndian, ImplicitVRLittleEndian):
        series = only(write_dicom(tmp_path / "a", frames, stack=True, **elements, syntax=syntax))
        assert len(series) == 3
        assert [path.name for path in series.files] == ["a"]
        assert [series.read(i)[0, 0] for i in range(3)] == [41, 91, 11]  # 20 x 2 + 1, 30 x 3 + 1, 10 x 1 + 1
        assert series.spacing == (2.0, 0.5, 0.75)
        assert series.read(0, "auto")[0, 0] == apply_window(np.array(41.0), 40, 401)


def test_a_loop_in_time_keeps_its_order(tmp_path: Path, write_dicom: Write) -> None:
    frames = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
    series = only(
        write_dicom(
            tmp_path / "a",
            frames,
            stack=True,
            Modality="US",
            ImagePositionPatient=[0, 0, 0],
            ImageOrientationPatient=AXIAL,
        )
    )
    assert np.array_equal(np.stack([series.read(i) for i in range(4)]), frames)


def test_frames_must_match_their_groups(tmp_path: Path, write_dicom: Write) -> None:
    write_dicom(
        tmp_path / "a", np.zeros((3, 2, 2), np.uint8), PerFrameFunctionalGroupsSequence=frame_groups([0, 1], [1, 1])
    )
    assert reasons(tmp_path) == {"another number of frames than its header says": 1}


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_uncompressed_syntaxes(tmp_path: Path, write_dicom: Write, syntax: str) -> None:
    pixels = STORED.astype(">u2") if syntax == ExplicitVRBigEndian else STORED
    path = write_dicom(
        tmp_path / "a", STORED, syntax=syntax, PixelData=pixels.tobytes(), RescaleSlope=1, RescaleIntercept=-5
    )
    assert np.array_equal(only(path).read(0), STORED - 5.0)


def test_rle_frames(tmp_path: Path, write_dicom: Write) -> None:
    path = write_dicom(tmp_path / "a", np.stack([STORED, STORED + 1]), stack=True)
    dataset = pydicom.dcmread(path)
    dataset.compress(RLELossless, generate_instance_uid=False)
    dataset.save_as(path)
    series = only(path)
    assert np.array_equal(series.read(1), STORED + 1.0)


@pytest.mark.parametrize(
    "name",
    [
        "CT_small.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "SC_rgb_dcmtk_+eb+cr.dcm",
        "J2K_pixelrep_mismatch.dcm",
        "SC_rgb_rle_2frame.dcm",
    ],
)
def test_agrees_with_pydicom_on_its_own_samples(name: str) -> None:
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip("this pydicom comes without the sample")
    if "jpeg_ls" in name:
        pytest.importorskip("jpeg_ls")
    dataset = pydicom.dcmread(path)
    expected = np.asarray(dataset.pixel_array, np.float64)
    if dataset.SamplesPerPixel == 1:
        expected = expected * float(dataset.get("RescaleSlope", 1)) + float(dataset.get("RescaleIntercept", 0))
    series = only(Path(path))
    found = np.stack([series.read(i) for i in range(len(series))])
    assert np.array_equal(found if len(series) > 1 else found[0], expected)


def test_a_syntax_without_a_decoder_is_named(
    tmp_path: Path, write_dicom: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, syntax, bits in (("a", JPEGLosslessSV1, 16), ("b", JPEGExtended12Bit, 12)):
        dataset = pydicom.dcmread(write_dicom(tmp_path / name, STORED, BitsStored=bits, HighBit=bits - 1))
        dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(tmp_path / name)
    from fedmed.data.formats import dicom_header

    real = dicom_header.get_decoder

    def without_plugins(syntax: str) -> Any:
        decoder = real(syntax)
        return type("Decoder", (), {"available_plugins": tuple(p for p in decoder.available_plugins if p == "pillow")})

    monkeypatch.setattr(dicom_header, "get_decoder", without_plugins)  # whatever else is installed here
    found = reasons(tmp_path)
    assert sum(found.values()) == 2
    assert all("which no installed decoder reads" in reason for reason in found)
    assert any("JPEG Lossless" in reason for reason in found)


# What is refused


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"Rows": 65_535, "Columns": 65_535}, "65535 x 65535 pixels, at most 65500 along an edge are read"),
        ({"Rows": 40_000, "Columns": 40_000}, "40000 x 40000 pixels, at most 100000000 are read"),
        ({"NumberOfFrames": 2_000_000_000}, "2000000000 pages, at most 65536 are read"),
        (
            {"NumberOfFrames": 60_000, "Rows": 900, "Columns": 900},
            "60000 x 900 x 900 x 1 values of 2 bytes, at most 2147483648 bytes are read",
        ),
        ({"NumberOfFrames": 2}, "truncated"),
        ({"Rows": 9}, "truncated"),
        ({"NumberOfFrames": -1}, "a DICOM pixel format that is not read"),
        ({"SamplesPerPixel": 4}, "a DICOM pixel format that is not read"),
        ({"BitsAllocated": 24}, "a DICOM pixel format that is not read"),
        ({"BitsStored": 0}, "damaged DICOM file"),
        ({"PhotometricInterpretation": "HSV"}, "a DICOM photometric interpretation that is not read"),
        ({"PhotometricInterpretation": None}, "damaged DICOM file"),
        ({"BitsAllocated": None}, "damaged DICOM file"),
    ],
)
def test_headers_that_cannot_be_read(tmp_path: Path, write_dicom: Write, elements: dict[str, Any], reason: str) -> None:
    write_dicom(tmp_path / "a", STORED, **elements)
    assert reasons(tmp_path) == {reason: 1}


def test_limits_hold(tmp_path: Path, write_dicom: Write) -> None:
    path = write_dicom(tmp_path / "a", np.zeros((40, 50), np.uint16))
    for limits in (Limits(max_side=49), Limits(max_pixels=1999), Limits(max_bytes=3999)):
        assert sum(reasons(path, limits).values()) == 1
    assert only(path, Limits(max_bytes=path.stat().st_size)).size == (40, 50)


def test_a_deflated_file_is_inflated_within_a_bound(
    tmp_path: Path, write_dicom: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_dicom(tmp_path / "a", np.zeros((200, 200), np.uint16), syntax=DeflatedExplicitVRLittleEndian)
    assert path.stat().st_size < 2000
    monkeypatch.setattr(dicom_file, "MAX_INFLATED", 50_000)
    assert reasons(path) == {"inflates to more than 50000 bytes": 1}


def test_a_frame_larger_than_its_header_says_is_not_decoded(tmp_path: Path, write_dicom: Write) -> None:
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.new("L", (300, 200)).save(stream, "JPEG")
    dataset = pydicom.dcmread(write_dicom(tmp_path / "a", np.zeros((2, 3), np.uint8)))
    dataset.PixelData = pydicom.encaps.encapsulate([stream.getvalue()])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    dataset.save_as(tmp_path / "a")
    with pytest.raises(BadFile, match="a frame of another size than its header says"):
        only(tmp_path / "a").read(0)


def test_a_header_of_a_million_items_is_refused(
    tmp_path: Path, write_dicom: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicom_file, "MAX_READS", 1000)
    many = [Dataset() for _ in range(2000)]
    write_dicom(tmp_path / "a", STORED, PerFrameFunctionalGroupsSequence=many)
    assert reasons(tmp_path) == {"a DICOM header that is too large": 1}


def test_a_file_that_changed_is_not_read_at_old_places(tmp_path: Path, write_dicom: Write) -> None:
    series = only(write_dicom(tmp_path / "a", STORED))
    write_dicom(tmp_path / "a", STORED, StudyID="longer than before")
    with pytest.raises(BadFile, match="changed since"):
        series.read(0)
    (tmp_path / "a").unlink()
    with pytest.raises(BadFile, match="no such file"):
        series.read(0)


# Privacy


def test_nothing_of_the_patient_is_shown(tmp_path: Path, write_dicom: Write, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = write_dicom(tmp_path / "Doe_Jane" / "a", STORED, PatientID="x" * 70)
        caught.clear()
        caplog.clear()
        series = only(path)
        series.read(0, "auto")
    assert (series.patient, series.study, series.uid) == ("x" * 70, "1.2.3.1", "1.2.3.2")
    shown = repr(series) + str(series) + caplog.text + "".join(str(w.message) for w in caught)
    assert "Series(CT, 1 x 2 x 3)" in shown
    for secret in ("Doe", "x" * 10, "1950", str(tmp_path)):
        assert secret not in shown
    held = repr(vars(series.images[0])) + repr(series.frames)
    for secret in ("Doe^Jane", "19500102", "A-99", "House"):
        assert secret not in held
