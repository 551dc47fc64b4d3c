"""Masks lie where their source lies: the network is replaced by a threshold, so every pixel of a mask is known."""

from __future__ import annotations

import csv
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from fedmed.data.formats.dicom import find_series
from fedmed.errors import UserError

RNG = np.random.default_rng(3)
Go = Callable[..., tuple[Path, str]]
SPREAD = np.diag([0.7, -0.8, 2.5, 1.0])  # left-handed, anisotropic
NIFTI = {"format": "nifti", "size": [32, 32]}


def halves(shape: tuple[int, ...], dtype: Any = np.uint8) -> np.ndarray:
    """Random values of which none is near the middle of the range of 8 bits."""
    return (RNG.integers(0, 2, shape) * 200 + RNG.integers(0, 40, shape)).astype(dtype)


def test_pictures_keep_format_and_place(grey_run: Path, threshold: None, go: Go, tmp_path: Path) -> None:
    source = tmp_path / "in"
    (source / "sub").mkdir(parents=True)
    same, odd = halves((32, 32)), halves((16, 32))
    Image.fromarray(same).save(source / "same.png")
    Image.fromarray(odd).save(source / "sub" / "odd.tif")
    Image.fromarray(np.full((60, 50), 255, np.uint8)).save(source / "white.jpg")
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(source / "same.bmp")
    (source / "broken.png").write_bytes(b"\x89PNG nothing")
    (source / "notes.txt").write_text("hello")
    out, said = go(grey_run, source, fit="pad", probabilities=True)
    made = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    masks = {"same_png_mask.png", "same_bmp_mask.png", "sub/odd_mask.tif", "white_mask.png"}
    shares = {name.replace("mask", "probability_1").replace(".tif", ".png") for name in masks}
    assert made == {*masks, *shares, "contact.png"}
    assert np.array_equal(np.asarray(Image.open(out / "same_png_mask.png")), np.where(same > 127, 255, 0))
    assert np.array_equal(
        np.asarray(Image.open(out / "sub" / "odd_mask.tif")), np.where(odd > 127, 255, 0)
    )  # padded, cut again
    white = np.asarray(Image.open(out / "white_mask.png"))
    assert white.shape == (60, 50) and (white == 255).mean() > 0.9
    share = np.asarray(Image.open(out / "sub" / "odd_probability_1.png"))
    assert share.dtype == np.uint16 and np.array_equal(share, np.rint(odd / np.float32(255) * 65535).astype(np.uint16))
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert "masks of 2 JPEG or BMP pictures are PNG" in said and "255 for 1 in pictures" in said
    assert "2 skipped" in said and "broken" not in said and "of a file type that is not read here" in said


def test_outside_of_a_crop_is_background(grey_run: Path, threshold: None, go: Go, tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 64), 255, np.uint8)).save(tmp_path / "wide.png")
    out, _ = go(grey_run, tmp_path / "wide.png", fit="crop")
    mask = np.asarray(Image.open(out / "wide_mask.png"))
    assert mask[:, 16:48].all() and not mask[:, :16].any() and not mask[:, 48:].any()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_volumes_keep_their_geometry(
    runs: Any, grey_run: Path, threshold: None, go: Go, tmp_path: Path, axis: int, ending: str
) -> None:
    arguments = {"axis": axis, "scale": "window", "window": [127.5, 255], "fit": "pad"}
    folder = runs.like(grey_run, preprocessing={**NIFTI, "arguments": arguments})
    shape = tuple(np.insert([32, 24], axis, 5))
    values = halves(shape, np.int16)
    affine = SPREAD.copy()
    affine[:3, 3] = [10, -20, 30]
    image = nibabel.Nifti1Image(values, affine)
    image.set_qform(affine, 1)
    nibabel.save(image, tmp_path / f"scan{ending}")
    out, said = go(folder, tmp_path / f"scan{ending}", probabilities=True, batch_size=2)
    mask, share = nibabel.load(out / f"scan_mask{ending}"), nibabel.load(out / f"scan_probability{ending}")
    assert mask.get_data_dtype() == np.uint8 and share.get_data_dtype() == np.float32
    assert np.array_equal(np.asarray(mask.dataobj), (values > 127).astype(np.uint8))
    assert np.allclose(np.asarray(share.dataobj)[..., 0], values / 255, atol=1e-6) and share.shape == (*shape, 1)
    stored = nibabel.load(tmp_path / f"scan{ending}").affine
    assert np.array_equal(mask.affine, stored) and np.array_equal(share.affine, stored)
    assert (int(mask.header["qform_code"]), int(mask.header["sform_code"])) == (1, 2)
    assert "1 volume (5 images)" in said


def test_contrasts_make_a_case(runs: Any, threshold: None, go: Go, tmp_path: Path) -> None:
    colour = runs.train(data__phantom={"num_sites": 2, "images_per_site": 12, "image_size": 32, "channels": 3})
    arguments = {"contrasts": ["_b", "_a", "_bb"], "scale": "none"}
    folder = runs.like(colour, preprocessing={**NIFTI, "arguments": arguments})
    values = {name: halves((32, 32, 2)) for name in ("_a", "_b", "_bb")}
    for name, one in values.items():
        nibabel.save(nibabel.Nifti1Image(one, SPREAD), tmp_path / f"case{name}.nii.gz")
    nibabel.save(nibabel.Nifti1Image(values["_a"], SPREAD), tmp_path / "other_a.nii.gz")
    out, said = go(folder, tmp_path)
    assert np.array_equal(
        np.asarray(nibabel.load(out / "case_mask.nii.gz").dataobj), values["_b"] > 127
    )  # the first channel
    assert "a case without all contrasts" in said and not list(out.glob("other*"))
    nibabel.save(nibabel.Nifti1Image(values["_a"], np.eye(4)), tmp_path / "case_a.nii.gz")
    with pytest.raises(UserError, match="lie differently in space"):
        go(folder, tmp_path, force=True)


def test_series_become_segmentations(
    runs: Any, grey_run: Path, threshold: None, go: Go, tmp_path: Path, write_dicom: Any
) -> None:
    highdicom = pytest.importorskip("highdicom")
    folder = runs.like(
        grey_run, preprocessing={"format": "dicom", "size": [32, 32], "arguments": {"window": "128,256", "fit": "pad"}}
    )
    values = halves((3, 24, 32), np.uint16)
    values[1] = 0  # a slice without foreground
    for k in range(3):  # names run against the places
        write_dicom(
            tmp_path / "in" / f"{3 - k}.dcm",
            values[k],
            ImagePositionPatient=[0, 0, 2.5 * k],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        )
    out, said = go(folder, tmp_path / "in", probabilities=True)
    assert "1 DICOM series (3 images) -> masks (.dcm)" in said
    (series,) = find_series(tmp_path / "in")
    found = highdicom.seg.segread(out / "in_mask.dcm")
    import pydicom

    uids = [pydicom.dcmread(path, specific_tags=["SOPInstanceUID"]).SOPInstanceUID for path in series.files]
    read = found.get_pixels_by_source_instance(uids, combine_segments=True, assert_missing_frames_are_empty=True)
    assert np.array_equal(read, values > 127)
    assert not str(found.PatientName) and not found.PatientID
    with np.load(out / "in_probability.npz") as arrays:
        assert arrays["probability"].shape == (3, 1, 24, 32) and arrays["classes"].tolist() == ["lesion"]
    go(folder, tmp_path / "in", force=True, with_patient=True)
    assert str(pydicom.dcmread(out / "in_mask.dcm").PatientName) == "Doe^Jane"


def test_a_series_without_a_place(grey_run: Path, threshold: None, go: Go, tmp_path: Path, write_dicom: Any) -> None:
    pytest.importorskip("highdicom")
    write_dicom(tmp_path / "in" / "a.dcm", halves((32, 32), np.uint16), FrameOfReferenceUID=None)
    with pytest.raises(UserError, match=r"without what a DICOM Segmentation needs.*convert it to NIfTI"):
        go(grey_run, tmp_path / "in")
    assert not (tmp_path / "out").exists()


def test_labels_go_into_a_table(class_run: Path, go: Go, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in ("b", "a"):
        Image.fromarray(RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(source / f"{name}.png")
    nibabel.save(nibabel.Nifti1Image(RNG.normal(0, 1, (16, 16, 4, 3)).astype(np.float32), np.eye(4)), source / "c.nii")
    out, said = go(class_run, source, batch_size=3)
    assert sorted(path.name for path in out.iterdir()) == ["contact.png", "predictions.csv"]
    assert stat.S_IMODE((out / "predictions.csv").stat().st_mode) == 0o600
    with (out / "predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["file"], row["slice"]) for row in rows] == [
        ("a.png", ""), ("b.png", ""), *(("c.nii", str(i)) for i in range(4)), ("c.nii", "mean"),
    ]  # fmt: skip
    names = [key for key in rows[0] if key.startswith("prob ")]
    table = np.array([[float(row[name]) for name in names] for row in rows])
    assert list(rows[0])[:3] == ["file", "slice", "predicted"] and np.allclose(table.sum(axis=1), 1, atol=1e-4)
    assert np.allclose(table[-1], table[2:6].mean(axis=0), atol=1e-5)
    assert [row["predicted"] for row in rows] == [names[i].removeprefix("prob ") for i in table.argmax(axis=1)]
    assert "2 pictures -> predictions.csv" in said and "values:" not in said


def test_what_is_refused(grey_run: Path, go: Go, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="nothing to predict"):
        go(grey_run, empty)
    with pytest.raises(UserError, match="no file or folder at"):
        go(grey_run, tmp_path / "nowhere")
    picture = tmp_path / "in" / "a.png"
    picture.parent.mkdir()
    Image.fromarray(halves((32, 32, 3))).save(picture)
    with pytest.raises(UserError, match=r"nothing could be predicted:\n  1  in colour, the model reads grey"):
        go(grey_run, picture)
    assert not (tmp_path / "out").exists()
    Image.fromarray(halves((32, 32))).save(picture)
    go(grey_run, picture)
    with pytest.raises(UserError, match="is not empty; --force"):
        go(grey_run, picture)
    for place in (picture.parent, tmp_path / "in" / ".." / "in"):
        with pytest.raises(UserError, match="is the folder of an input"):
            go(grey_run, picture, out=str(place), force=True)
    with pytest.raises(UserError, match="expected a folder, found a file"):
        go(grey_run, picture, out=str(picture))
    with pytest.raises(UserError, match="batch-size"):
        go(grey_run, picture, batch_size=0)
