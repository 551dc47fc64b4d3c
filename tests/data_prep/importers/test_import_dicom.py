"""DICOM series with a label table: slices, windows, patients, spacing, and series that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from fedmed.data.site_file import SiteFile
from fedmed.errors import UserError

Run = Callable[..., Any]
JANE = "DOE_JANE_19700101"


def save(path: Path, pixels: np.ndarray, series: str, **tags: Any) -> Path:
    """Write one slice, (H, W) or (H, W, 3), of a series whose tags hold a name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    bits = 8 * pixels.dtype.itemsize
    values = {
        "SOPClassUID": CTImageStorage, "SOPInstanceUID": generate_uid(), "SeriesInstanceUID": series, "StudyInstanceUID": "1.2.3",
        "Modality": "CT", "PatientID": f"{JANE}_1", "PatientName": JANE, "PatientBirthDate": "19700101", "StudyDate": "19991231",
        "StudyDescription": JANE, "SeriesDescription": JANE, "Rows": pixels.shape[0], "Columns": pixels.shape[1],
        "SamplesPerPixel": 3 if pixels.ndim == 3 else 1, "PhotometricInterpretation": "RGB" if pixels.ndim == 3 else "MONOCHROME2",
        "BitsAllocated": bits, "BitsStored": bits, "HighBit": bits - 1, "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelSpacing": [0.5, 0.75],
    }  # fmt: skip
    if pixels.ndim == 3:
        values["PlanarConfiguration"] = 0
    for name, value in {**values, **tags}.items():
        if value is not None:
            setattr(data, name, value)
    data.PixelData = pixels.tobytes()
    data["PixelData"].VR = "OW" if bits == 16 else "OB"
    data.save_as(path, enforce_file_format=True)
    return path


def volume(folder: Path, number: int, slices: int = 3, **tags: Any) -> Path:
    """A series of 4 x 6 slices; slice k has the values 100 k - 1000 after the rescale. File names run against the places."""
    uid = generate_uid()
    for k in range(slices):
        save(
            folder / f"{JANE}_{slices - k}.dcm", np.full((4, 6), 100 * k, np.int16), uid,
            **{
                "ImagePositionPatient": [0, 0, 2.5 * k], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "RescaleIntercept": -1000,
                "RescaleSlope": 1, "PatientID": f"{JANE}_{number // 2}", **tags,
            },
        )  # fmt: skip
    return folder


def study(root: Path, count: int = 4) -> Path:
    """`count` series, two of a patient, in folders, and their table."""
    lines = ["series;finding;reader"]
    for number in range(count):
        volume(root / f"{JANE}_{number}", number)
        lines.append(f"{JANE}_{number};{('bleeding', 'none')[number % 2]};{JANE}")
    (root / "labels.csv").write_text("\n".join(lines))
    return root


WORDS = ("labels=labels.csv", "image_column=series", "label_column=finding")


def test_slices_of_series(tmp_path: Path, importing: Run) -> None:
    outcome = importing("dicom", study(tmp_path / "src"), *WORDS, "window=-900,200")
    with SiteFile.open(outcome.out) as file:
        assert (file.task, file.classes, file.channels) == ("classification", ("bleeding", "none"), ("CT",))
        data = file.site("out")
    assert data.image.shape == (12, 4, 6) and data.image[:3, 0, 0].tolist() == [0, 128, 255]
    slices, spacing, labels, groups = outcome.read("slice_no", "spacing", "label", "group_id")
    assert slices.tolist() == [0, 1, 2] * 4 and spacing[0].tolist() == [0.5, 0.75]
    assert sorted(labels.tolist()) == [0] * 6 + [1] * 6 and len(set(groups)) == 2
    assert all(len(splits) == 1 for splits in outcome.split_of().values())
    assert outcome.attrs()["modality"] == "CT" and "skipped" not in outcome.text


def test_no_tag_reaches_file_or_terminal(tmp_path: Path, importing: Run, capfd: Any) -> None:
    source = study(tmp_path / "src")
    volume(source / f"{JANE}_3", 3, StudyTime=JANE, ContentDate=JANE, InstanceNumber="1")
    (source / f"{JANE}.txt").write_text(JANE)
    outcome = importing("dicom", source, *WORDS)
    content = outcome.out.read_bytes()
    captured = capfd.readouterr()
    text = outcome.text + captured.out + captured.err  # libraries warn of the date and the number, and quote them
    for word in ("DOE", "JANE", "19700101", "19991231", "1.2.3", str(source)):
        assert word.encode() not in content and word not in text
    assert outcome.noted[-2].startswith("1 file skipped")


def test_bytes_do_not_depend_on_workers(tmp_path: Path, importing: Run) -> None:
    source = study(tmp_path / "src")
    one, four = (importing("dicom", source, *WORDS, name=f"{n}/x.h5", workers=n) for n in (1, 4))
    assert one.out.read_bytes() == four.out.read_bytes()


def test_windows_and_types(tmp_path: Path, importing: Run) -> None:
    source = study(tmp_path / "src", 2)
    auto = importing("dicom", source, *WORDS, "dtype=uint16", name="a.h5").read("image")[0]
    assert auto.dtype == np.uint16 and auto[0].max() in (0, 32768)  # constant slices have no range of their own
    plain = importing("dicom", source, *WORDS, "window=none", "dtype=float16", name="n.h5").read("image")[0]
    assert plain[:3, 0, 0].tolist() == [-1000, -900, -800]
    with pytest.raises(UserError, match="values that are no whole numbers in 0"):
        importing("dicom", source, *WORDS, "window=none", name="x.h5")
    small = importing("dicom", source, *WORDS, "window=-900,200", size="8x12", name="s.h5")
    assert small.read("image")[0].shape == (6, 8, 12) and small.read("spacing")[0][0].tolist() == [0.25, 0.375]


def test_single_images_are_labelled_by_file(tmp_path: Path, importing: Run) -> None:
    source = tmp_path / "src"
    lines = ["image,label"]
    for number in range(5):
        pixels = np.full((4, 6), 40 * number, np.uint16)
        pixels[0, 0] = 255
        save(
            source / f"x{number}", pixels, generate_uid(), Modality="CR", PatientID=None if number == 4 else f"{number}"
        )
        lines.append(f"x{number},{'a|b' if number % 2 else 'No Finding'}")
    (source / "t.csv").write_text("\n".join(lines[:5]) + "\nx4,b\n")
    outcome = importing("dicom", source, "labels=t.csv", "window=none", "modality=CR")
    image, label = outcome.read("image", "label")
    order = np.argsort(image[:, 1, 1])
    assert label[order].tolist() == [[0, 0], [1, 1], [0, 0], [1, 1], [0, 1]]
    assert outcome.attrs()["task"] == "multilabel"
    assert "note: 1 series name no patient; each counts as one of its own" in outcome.noted


def test_series_that_cannot_be_used(tmp_path: Path, importing: Run) -> None:
    source = study(tmp_path / "src", 4)
    volume(source / "unlabelled", 9)
    volume(source / "mr", 9, Modality="MR")
    volume(source / "scout", 9, slices=1)
    volume(source / "two", 9)
    for k in range(2):
        save(source / "two" / f"other{k}", np.zeros((4, 6), np.int16), "1.2.3.4", InstanceNumber=k)
    (source / "broken").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 40)
    words = (*WORDS, "modality=CT", "min_slices=2")
    outcome = importing("dicom", source, *words, trace=str(tmp_path / "trace.csv"))
    assert len(outcome.read("image")[0]) == 12
    reasons = {line.strip().split("  ", 1)[1]: int(line.split()[0]) for line in outcome.noted[-5:]}
    assert reasons.pop("series of another modality") == 1 and reasons.pop("series of too few slices") == 1
    assert reasons.pop("several series in one folder; give each its own, or modality= and min_slices=") == 2
    assert reasons.pop("no row in the label table") == 1 and len(reasons) == 1
    with pytest.raises(UserError, match="series of another modality"):
        importing("dicom", source, *WORDS, "modality=US", name="b.h5")


def test_a_damaged_slice_is_left_out(tmp_path: Path, importing: Run) -> None:
    source = study(tmp_path / "src", 4)
    path = source / f"{JANE}_2" / f"{JANE}_2.dcm"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 20])
    outcome = importing("dicom", source, *WORDS)
    assert len(outcome.read("image")[0]) == 11 and outcome.noted[-1] == "  1  truncated"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "dicom: a site file needs an annotation; give labels=FILE.csv"),
        (("labels=gone.csv",), "cannot read the label table"),
        ((*WORDS, "window=wide"), "window: expected auto, none, or centre,width"),
        ((*WORDS, "window=10,0"), "window: expected"),
        ((*WORDS, "min_slices=0"), "min_slices: expected 1"),
        ((*WORDS[:2], "label_column=gone"), "is called 'gone'"),
    ],
)
def test_wrong_arguments(tmp_path: Path, importing: Run, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        importing("dicom", study(tmp_path / "src", 1), *words)


def test_ids_stay_when_other_series_come(tmp_path: Path, importing: Run) -> None:
    source = study(tmp_path / "src")
    first = importing("dicom", source, *WORDS)
    volume(source / "AAA_new", 8)
    with (source / "labels.csv").open("a") as table:
        table.write("\nAAA_new;none;x\n")
    ids = set(first.read("item_id")[0].tolist())
    second = importing("dicom", source, *WORDS, name="again.h5")
    assert ids < set(second.read("item_id")[0].tolist())
