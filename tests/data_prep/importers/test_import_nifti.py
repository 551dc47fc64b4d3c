"""NIfTI volumes: pairs by folder and ending, contrasts, axes, scaling, slices, spacing, and volumes that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from fedmed.data.site_file import SiteFile
from fedmed.errors import UserError

Run = Callable[..., Any]
JANE = "DOE_JANE_19700101"
SHAPE = (8, 10, 4)


def save(
    path: Path, array: np.ndarray, spacing: tuple[float, float, float] = (0.5, 0.75, 3.0), shift: float = 0.0
) -> Path:
    """Write a volume with its folder and a description that holds a name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = shift
    image = nibabel.Nifti1Image(array, affine)
    image.header["descrip"] = JANE.encode()
    nibabel.save(image, path)
    return path


def ramp(top: float = 100.0) -> np.ndarray:
    """(8, 10, 4): slice k has the values k, and top in one corner."""
    volume = np.broadcast_to(np.arange(4.0), SHAPE).astype(np.float32).copy()
    volume[0, 0] = top
    return volume


def lesion(slices: tuple[int, ...] = (1, 2), value: int = 1) -> np.ndarray:
    """(8, 10, 4): the first three rows of some slices."""
    volume = np.zeros(SHAPE, np.uint8)
    volume[:3, :, list(slices)] = value
    return volume


def cases(root: Path, count: int = 3) -> Path:
    """images/ and masks/ with `count` volumes."""
    for number in range(count):
        save(root / "images" / f"{JANE}_{number}.nii.gz", ramp())
        save(root / "masks" / f"{JANE}_{number}.nii.gz", lesion())
    return root


def test_slices_of_volumes(tmp_path: Path, importing: Run) -> None:
    outcome = importing("nifti", cases(tmp_path / "src"), "scale=window", "window=50,100", "modality=MR")
    with SiteFile.open(outcome.out) as file:
        assert (file.task, file.channels, file.image_size) == ("segmentation", ("MR",), (8, 10))
        data = file.site("out")
    assert data.image.shape == (12, 8, 10) and data.image[:4, 5, 5].tolist() == [0, 3, 5, 8]  # k * 2.55
    assert (data.image[:, 0, 0] == 255).all() and (data.target.sum(axis=(1, 2)) == [0, 30, 30, 0] * 3).all()
    slices, spacing, items, groups = outcome.read("slice_no", "spacing", "item_id", "group_id")
    assert slices.tolist() == [0, 1, 2, 3] * 3 and spacing.dtype == np.float32 and spacing[0].tolist() == [0.5, 0.75]
    assert len(set(items)) == 12 and len(set(groups)) == 3
    for word in (JANE, "DOE", str(tmp_path)):
        assert word.encode() not in outcome.out.read_bytes()


def test_bytes_do_not_depend_on_workers(tmp_path: Path, importing: Run) -> None:
    source = cases(tmp_path / "src", 5)
    one, four = (importing("nifti", source, name=f"{n}/x.h5", workers=n) for n in (1, 4))
    assert one.out.read_bytes() == four.out.read_bytes()


def test_contrasts_are_channels(tmp_path: Path, importing: Run) -> None:
    for number in range(2):
        folder = tmp_path / "src" / f"case{number}"
        for factor, ending in enumerate(("t1", "flair"), 1):
            save(folder / f"case{number}_{ending}.nii", ramp() * factor)
        save(folder / f"case{number}_seg.nii", lesion(value=4))
    save(tmp_path / "src" / "case9" / "case9_t1.nii", ramp())
    words = (
        "masks=.",
        "mask_suffix=_seg",
        "contrasts=_flair,_t1",
        "mask_values={0: 0, 4: 1}",
        "scale=none",
        "dtype=float16",
    )
    outcome = importing("nifti", tmp_path / "src", *words, "group=(case[0-9])")
    images, masks = outcome.read("image", "mask")
    assert images.shape == (8, 8, 10, 2) and images[3, 5, 5].tolist() == [6, 3] and masks.max() == 1
    assert outcome.attrs()["channels"] == '["flair", "t1"]'
    assert outcome.noted[-1] == "  1  case without all contrasts"


def test_a_fourth_axis_is_channels(tmp_path: Path, importing: Run) -> None:
    for number in range(2):
        save(tmp_path / "src" / "imagesTr" / f"{number}.nii.gz", np.stack([ramp(), ramp(50)], axis=-1))
        save(tmp_path / "src" / "labelsTr" / f"{number}.nii.gz", lesion().astype(np.float32))
    words = ("images=imagesTr", "masks=labelsTr")
    outcome = importing("nifti", tmp_path / "src", *words, "scale=none", "dtype=uint8")
    assert outcome.read("image")[0].shape == (8, 8, 10, 2) and outcome.read("image")[0][0, 0, 0].tolist() == [100, 50]
    assert outcome.attrs()["channels"] == '["intensity 0", "intensity 1"]'


@pytest.mark.parametrize(("axis", "count", "size", "spacing"), [(0, 8, (10, 4), (0.75, 3)), (1, 10, (8, 4), (0.5, 3))])
def test_other_axes(
    tmp_path: Path, importing: Run, axis: int, count: int, size: tuple[int, int], spacing: tuple[float, float]
) -> None:
    outcome = importing("nifti", cases(tmp_path / "src", 1), f"axis={axis}", "scale=none")
    images, masks, found = outcome.read("image", "mask", "spacing")
    assert images.shape == (count, *size) and found[0].tolist() == list(spacing)
    expected = np.moveaxis(np.stack([ramp(), lesion()]), axis + 1, 1)
    assert np.array_equal(images, expected[0]) and np.array_equal(masks, expected[1])


def test_percentiles_are_those_of_the_volume(tmp_path: Path, importing: Run) -> None:
    image = importing("nifti", cases(tmp_path / "src", 1), "percentiles=[0, 100]", "dtype=uint16").read("image")[0]
    assert image[:, 5, 5].tolist() == [0, 655, 1311, 1966] and image[0, 0, 0] == 65535
    clipped = importing("nifti", cases(tmp_path / "src", 1), name="b.h5").read("image")[0]
    assert clipped[3, 5, 5] > 0 and clipped.dtype == np.uint8


def test_slices_are_chosen(tmp_path: Path, importing: Run) -> None:
    volume = ramp()
    volume[..., 3] = 7
    save(tmp_path / "src" / "images" / "a.nii", volume)
    save(tmp_path / "src" / "masks" / "a.nii", lesion())
    for slices, expected in (("mask", [1, 2]), ("image", [0, 1, 2]), ("all", [0, 1, 2, 3])):
        outcome = importing("nifti", tmp_path / "src", f"slices={slices}", name=f"{slices}.h5")
        assert outcome.read("slice_no")[0].tolist() == expected
    assert "note: all images are of one group at all, so all of them are in train" in outcome.noted


def test_size_changes_pixels_and_spacing(tmp_path: Path, importing: Run) -> None:
    outcome = importing("nifti", cases(tmp_path / "src", 2), "scale=none", "filter=nearest", size="16x20")
    images, masks, spacing = outcome.read("image", "mask", "spacing")
    assert images.shape == masks.shape == (8, 16, 20) and masks[1].sum() == 120
    assert spacing[0].tolist() == [0.25, 0.375]


def test_volumes_that_cannot_be_used(tmp_path: Path, importing: Run) -> None:
    source = cases(tmp_path / "src", 2)
    images, masks = source / "images", source / "masks"
    for name in ("shape", "space", "empty", "cut", "values", "half", "wide"):
        save(images / f"{name}.nii.gz", ramp())
        save(masks / f"{name}.nii.gz", lesion())
    save(images / "alone.nii.gz", ramp())
    save(masks / "lone.nii.gz", lesion())
    save(masks / "shape.nii.gz", lesion()[:4])
    save(masks / "space.nii.gz", lesion(), shift=5.0)
    (images / "empty.nii.gz").write_bytes(b"")
    (images / "cut.nii.gz").write_bytes((images / "half.nii.gz").read_bytes()[:80])
    save(masks / "values.nii.gz", lesion(value=3))
    save(masks / "half.nii.gz", lesion() * np.float32(0.5))
    save(images / "wide.nii.gz", np.zeros((9, 10, 4), np.float32))
    save(masks / "wide.nii.gz", np.zeros((9, 10, 4), np.uint8))
    (images / "readme.txt").write_text("x")
    outcome = importing("nifti", source)
    assert len(outcome.read("image")[0]) == 8
    reasons = {line.strip().split("  ", 1)[1] for line in outcome.noted if line.startswith("  1")}
    assert reasons >= {
        "volume without a mask", "mask without a volume", "volume and mask, or two contrasts, differ in shape",
        "volume and mask, or two contrasts, lie differently in space (same_space=false takes them)", "empty file",
        "mask with values that are no class (mask_values= maps them)", "values that are no whole numbers in 0..65535",
        "another size than most images (--size brings all to one)", "volume of a file type that is not read here",
    }  # fmt: skip
    loose = importing("nifti", source, "same_space=false", name="loose.h5")
    assert len(loose.read("image")[0]) == 12


def test_sites_and_splits_by_folder(tmp_path: Path, importing: Run) -> None:
    for site in ("north", "south"):
        for split in ("train", "test"):
            save(tmp_path / "src" / site / split / "images" / "1.nii", ramp())
            save(tmp_path / "src" / site / split / "masks" / "1.nii", lesion())
    outcome = importing("nifti", tmp_path / "src", "site=1")
    with SiteFile.open(outcome.out) as file:
        assert [(s.name, s.n_train, s.n_test) for s in file.sites] == [("north", 4, 4), ("south", 4, 4)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["masks=nowhere"], "a site file needs masks"),
        (["images=nowhere"], "no volume"),
        (["axis=3"], "axis: expected 0, 1 or 2"),
        (["scale=window"], "belong together"),
        (["window=[1, 2]"], "belong together"),
        (["scale=window", "window=[1, 0]"], "width > 0"),
        (["percentiles=[50, 5]"], "percentiles: expected"),
        (["dtype=int8"], "dtype: expected"),
        (["classes=a"], "classes: expected 2"),
        (["group=x"], "one \\(...\\)"),
        (["group=(x"], "no valid pattern"),
    ],
)
def test_wrong_arguments(tmp_path: Path, importing: Run, words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        importing("nifti", cases(tmp_path / "src", 1), *words)
