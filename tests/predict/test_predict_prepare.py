"""The same pixels as the importer gives, for every way of importing; and probabilities brought back to the source."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
from PIL import Image

from data_prep.importers.prepare import make_preparation
from data_prep.importers.run import import_data
from data_prep.resize import resize_images
from fedmed.data.formats.dicom import find_series
from fedmed.data.formats.limits import BadFile
from fedmed.errors import UserError
from fedmed.predict.inputs import find_sources

RNG = np.random.default_rng(7)
Import = Callable[..., tuple[np.ndarray, dict[str, Any]]]


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Import:
    """`imported(format, source, *words, size=None, resize=None)`: the images of the site file, and model.json of a run on it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def call(
        format: str, source: Path, *words: str, size: str | None = None, resize: int | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        out = tmp_path / "made.h5"
        import_data(
            format, str(source), str(out), words, size=size, split="70/10/20", seed=0, secret=None, trace=None, compression=0, workers=1,
            site=None, force=True, say=lambda text: None, note=lambda text: None, quiet=True,
        )  # fmt: skip
        with h5py.File(out) as file:
            images, attrs = file["image"][...], dict(file.attrs)
        stored = json.loads(attrs["image_size"])
        images = images if resize is None else resize_images(images, resize)
        return images, {
            "channels": json.loads(attrs["channels"]), "image_size": list(images.shape[1:3]), "stored_size": stored,
            "preprocessing": json.loads(attrs["preprocessing"]),
        }  # fmt: skip

    return call


def pictures(
    root: Path, colour: bool, sizes: tuple[tuple[int, int], ...] = ((20, 30), (33, 17), (24, 24), (50, 41))
) -> Path:
    """Pictures of several sizes, each with a mask."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number, size in enumerate(sizes):
        shape = (*size, 3) if colour else size
        Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8)).save(root / "images" / f"{number}.png")
        Image.fromarray(RNG.integers(0, 2, size, dtype=np.uint8)).save(root / "masks" / f"{number}.png")
    return root


@pytest.mark.parametrize(
    ("colour", "words", "resize"),
    [
        (True, (), None), (True, ("fit=pad", "filter=box"), 8), (True, ("fit=crop", "filter=bicubic"), None), (False, (), 8),
        (True, ("colour=grey",), None), (False, ("colour=rgb", "filter=nearest"), None),
    ],
)  # fmt: skip
def test_pictures(tmp_path: Path, imported: Import, colour: bool, words: tuple[str, ...], resize: int | None) -> None:
    images, facts = imported("images", pictures(tmp_path / "src", colour), *words, size="16", resize=resize)
    preparation = make_preparation(facts)
    assert (preparation.size, preparation.model_size) == ((16, 16), images.shape[1:3])
    for path, expected in zip(sorted((tmp_path / "src" / "images").iterdir()), images, strict=True):
        planes = preparation.picture(path)
        found = preparation.fitted(planes.read(0))
        assert found.dtype == expected.dtype and np.array_equal(found, expected)
        assert planes.shape == Image.open(path).size[::-1]


def test_without_a_size_images_come_to_that_of_the_file(tmp_path: Path, imported: Import) -> None:
    images, facts = imported("images", pictures(tmp_path / "src", False, ((16, 24),) * 3))
    preparation = make_preparation(facts)
    assert preparation.size == (16, 24)
    planes = preparation.picture(tmp_path / "src" / "images" / "1.png")
    assert np.array_equal(preparation.fitted(planes.read(0)), images[1])
    other = pictures(tmp_path / "other", False, ((32, 48),)) / "images" / "0.png"
    assert preparation.fitted(preparation.picture(other).read(0)).shape == (16, 24)


def test_the_channels_must_be_those_of_the_model(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "src", True, ((16, 16),)) / "images"
    facts = {"channels": ["grey"], "image_size": [16, 16]}
    with pytest.raises(BadFile, match="in colour, the model reads grey"):
        make_preparation(facts).picture(folder / "0.png")
    with pytest.raises(BadFile, match="single picture, the model reads 4 channels"):
        make_preparation({**facts, "channels": list("abcd")}).picture(folder / "0.png")
    grey = pictures(tmp_path / "grey", False, ((16, 16),)) / "images" / "0.png"
    plane = make_preparation({**facts, "channels": list("RGB")}).picture(grey).read(0)
    assert plane.shape == (16, 16, 3) and (plane[..., :1] == plane).all()


def volumes(root: Path, names: tuple[str, ...] = ("_t1", "_t2"), channels: int = 0) -> Path:
    """Two cases of 12 x 10 x 5 voxels with a mask each."""
    root.mkdir(parents=True)
    shape = (12, 10, 5, channels) if channels else (12, 10, 5)
    for case in ("a", "b"):
        for name in names:
            nibabel.save(
                nibabel.Nifti1Image(RNG.normal(50, 20, shape).astype(np.float32), np.diag([1, 2, 3, 1])),
                root / f"{case}{name}.nii.gz",
            )
        mask = RNG.integers(0, 2, shape[:3]).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(mask, np.diag([1, 2, 3, 1])), root / f"{case}_seg.nii.gz")
    return root


@pytest.mark.parametrize(
    ("words", "contrasts", "channels", "size", "resize"),
    [
        ((), ("",), 0, "16", 8), (("axis=0", "fit=pad"), ("",), 0, "12", None), (("scale=window", "window=[50,60]", "axis=1"), ("",), 0, None, None),
        (("dtype=uint16", "percentiles=[5,90]"), ("",), 3, "9x8", None), (("contrasts=_t2,_t1", "dtype=float16"), ("_t1", "_t2"), 0, None, None),
    ],
)  # fmt: skip
def test_volumes(
    tmp_path: Path,
    imported: Import,
    words: tuple[str, ...],
    contrasts: tuple[str, ...],
    channels: int,
    size: str | None,
    resize: int | None,
) -> None:
    source = volumes(tmp_path / "src", contrasts, channels)
    images, facts = imported("nifti", source, "masks=.", "mask_suffix=_seg", *words, size=size, resize=resize)
    for mask in source.glob("*_seg.nii.gz"):
        mask.unlink()
    preparation = make_preparation(facts)
    found = []
    sources = find_sources([source], skipped := Counter(), preparation.contrasts)
    assert [one.name for one in sources] == ["a", "b"] and not skipped
    for one in sources:
        planes, _ = preparation.volume(one.files)
        found += [preparation.fitted(planes.read(i)) for i in range(planes.count)]
    assert found[0].dtype == images.dtype and np.array_equal(np.stack(found), images)


def test_cases_of_brats(tmp_path: Path, imported: Import) -> None:
    for case in ("BraTS-1", "BraTS-2"):
        folder = tmp_path / "src" / case
        folder.mkdir(parents=True)
        values = np.maximum(RNG.normal(40, 60, (12, 10, 3)), 0).astype(np.float32)
        for name in ("flair", "t1", "t2"):
            nibabel.save(nibabel.Nifti1Image(values * RNG.uniform(1, 2), np.eye(4)), folder / f"{case}_{name}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(np.zeros((12, 10, 3), np.uint8), np.eye(4)), folder / f"{case}_seg.nii.gz")
    words = ("channels=flair,t1ce,t2", "missing=zeros", "slices=all")
    images, facts = imported("brats", tmp_path / "src", *words, size="16")
    preparation = make_preparation(facts)
    skipped = Counter()
    sources = find_sources([tmp_path / "src"], skipped, preparation.contrasts, preparation.takes_missing)
    assert skipped == {"a volume whose name ends with none of the contrasts _flair, _t1ce, _t2": 4}  # _t1 and _seg
    found = []
    for one in sources:
        planes, _ = preparation.volume(one.files)
        assert planes.present.tolist() == [1, 0, 1]
        found += [preparation.fitted(planes.read(i)) for i in range(planes.count)]
    assert np.array_equal(np.stack(found), images)


@pytest.mark.parametrize("words", [(), ("window=none", "dtype=float16"), ("window=500,700", "dtype=uint16")])
def test_series(tmp_path: Path, imported: Import, write_dicom: Any, words: tuple[str, ...]) -> None:
    lines = ["image,label"]
    for number in range(3):
        uid = f"1.2.{number}"
        for k in range(3):
            write_dicom(
                tmp_path / "src" / f"s{number}" / f"{9 - k}.dcm", RNG.integers(0, 1000, (12, 10)).astype(np.uint16),
                SeriesInstanceUID=uid, ImagePositionPatient=[0, 0, float(k)], ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            )  # fmt: skip
        lines.append(f"s{number},{'ab'[number % 2]}")
    (tmp_path / "src" / "labels.csv").write_text("\n".join(lines))
    images, facts = imported("dicom", tmp_path / "src", "labels=labels.csv", *words, size="16", resize=8)
    preparation = make_preparation(facts)
    found = []
    for series in find_series(tmp_path / "src"):
        planes = preparation.series(series)
        found.append(np.stack([preparation.fitted(planes.read(i)) for i in range(planes.count)]))
    assert np.array_equal(np.concatenate(found), images)  # one patient, series in the order of their UIDs


def test_probabilities_go_back() -> None:
    facts = {"channels": ["grey"], "image_size": [4, 4]}
    prob = np.arange(16, dtype=np.float32).reshape(1, 4, 4) / 16
    pad, crop, stretch = (make_preparation(facts, fit=fit) for fit in ("pad", "crop", "stretch"))
    assert np.array_equal(pad.to_source(prob, (4, 2)), prob[:, :, 1:3])  # one column was added on either side
    assert np.array_equal(pad.to_source(prob, (3, 4)), prob[:, :3])  # three rows: the added one is the last
    wide = crop.to_source(prob, (4, 6))
    assert np.array_equal(wide[:, :, 1:5], prob) and not wide[:, :, [0, 5]].any()
    both = crop.to_source(np.concatenate([1 - prob, prob]), (6, 4), background=True)
    assert (both[0, [0, 5]] == 1).all() and not both[1, [0, 5]].any() and np.array_equal(both[1, 1:5], prob[0])
    assert np.array_equal(stretch.to_source(prob, (4, 4)), prob)
    large = stretch.to_source(np.array([[[0, 1], [0, 1]]], np.float32), (2, 4))
    assert large.tolist() == [[[0, 0.25, 0.75, 1]] * 2]


def test_a_frame_goes_there_and_back() -> None:
    for fit in ("pad", "crop", "stretch"):
        preparation = make_preparation({"channels": ["grey"], "image_size": [16, 16]}, fit=fit)
        for shape in ((40, 24), (24, 40), (17, 33), (1, 5)):
            image = np.zeros(shape, np.uint8)
            image[shape[0] // 2 :, shape[1] // 2 :] = 255
            back = preparation.to_source(preparation.fitted(image)[None].astype(np.float32), shape)
            assert back.shape == (1, *shape)
            if min(shape) > 1:
                kept = back[0] > 0 if fit == "crop" else np.ones(shape, bool)
                assert np.abs(back[0] - image)[kept].mean() < 25, (fit, shape)


def test_what_the_user_asks_for_goes_first() -> None:
    facts = {
        "channels": ["grey"], "image_size": [8, 8], "stored_size": [16, 16],
        "preprocessing": {"format": "nifti", "size": [16, 16], "arguments": {"fit": "pad", "axis": 1, "gone": 3, "dtype": "uint16"}},
    }  # fmt: skip
    preparation = make_preparation(facts)
    assert (preparation.fit, preparation.nifti_params.axis, preparation.made_of) == ("pad", 1, "volume")
    asked = make_preparation(facts, size=(32, 24), fit="crop", window=(40, 80))
    assert (asked.size, asked.fit, asked.nifti_params.window, asked.dicom_params.window) == (
        (32, 24),
        "crop",
        (40, 80),
        "40,80",
    )
    assert asked.nifti_params.dtype == "uint16"
    with pytest.raises(UserError, match=r"--size 4x4: the model reads 8x8"):
        make_preparation(facts, size=(4, 4))
    with pytest.raises(UserError, match="--fit: expected stretch, pad, crop"):
        make_preparation(facts, fit="squeeze")
    named = {"format": "os:system", "arguments": {"fit": 3}}  # a name in a file is never imported
    with pytest.raises(UserError, match="--fit"):
        make_preparation({**facts, "preprocessing": named})
    assert make_preparation({**facts, "preprocessing": {**named, "arguments": {}}}).size == (16, 16)
