"""Site files: what opens, what is read, and how wrong files are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from fedmed.data.site_file import SiteFile, read_truth
from fedmed.data.writer import SiteArrays, write_site_file
from fedmed.errors import UserError

Broken = Callable[[Callable[[h5py.File], None]], Path]


def test_header_is_read_without_pixels(seg_file: Path) -> None:
    with SiteFile.open(seg_file) as file:
        assert (file.task, file.classes, file.channels) == ("segmentation", ("background", "lesion"), ("R", "G", "B"))
        assert file.image_size == (8, 8) and file.recipe is None and not file.central
        first = file.sites[0]
        assert (first.group, first.name, first.n, first.n_train, first.n_val, first.n_test) == (
            "site_00",
            "alpha",
            10,
            6,
            1,
            3,
        )


def test_site_is_found_by_name_and_by_group_and_outlives_the_file(seg_file: Path) -> None:
    with SiteFile.open(seg_file) as file:
        by_name, by_group = file.site("beta"), file.site("site_01")
    np.testing.assert_array_equal(by_name.image, by_group.image)
    assert by_name.image.shape == (10, 8, 8, 3) and by_name.image.dtype == np.uint8
    assert by_name.num_examples("train") == 6 and by_name.label_kind == "mask"
    assert by_name.item_id[2] == "beta:2"


def test_site_at_the_root(cls_file: Path) -> None:
    with SiteFile.open(cls_file) as file:
        assert file.sites[0].group == "" and file.sites[0].name == "clinic"
        split = file.site("clinic").split("train")
    assert split.batch(torch.arange(2)).images.shape == (2, 1, 8, 8)
    assert split.class_counts().tolist() == [2, 2, 1]


def test_labels_are_not_read_on_opening(broken: Broken) -> None:
    path = broken(lambda file: file["site_00/mask"].write_direct(np.full((10, 8, 8), 9, np.uint8)))
    with SiteFile.open(path) as file:
        file.site("beta")
        with pytest.raises(UserError, match=r"'alpha': mask of image 0 contains 9, expected class ids 0 .. 1"):
            file.site("alpha")


def _drop(key: str) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        del file[key]

    return edit


def _attr(key: str, value: Any, group: str = "/") -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        file[group].attrs[key] = value

    return edit


def _replace(key: str, array: np.ndarray) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        del file[key]
        file[key] = array

    return edit


WRONG = {
    "masks of another size": (_replace("site_00/mask", np.zeros((10, 4, 4), np.uint8)), r"mask has shape \(10, 4, 4\)"),
    "fewer masks": (_replace("site_00/mask", np.zeros((9, 8, 8), np.uint8)), "mask has 9 entries, image has 10"),
    "index too large": (_attr("test_idx", [8, 10], "site_00"), r"test_idx contains 10, but the site has 10 images"),
    "negative index": (_attr("val_idx", [-1], "site_00"), "val_idx contains -1"),
    "overlap": (_attr("test_idx", [5, 9], "site_00"), "image 5 is in both train_idx and test_idx"),
    "listed twice": (_attr("test_idx", [9, 9], "site_00"), "test_idx lists an image twice"),
    "indices are floats": (_attr("test_idx", [8.0, 9.0], "site_00"), "expected integers"),
    "no image": (_drop("site_00/image"), "dataset image is missing"),
    "no annotation": (_drop("site_00/mask"), "no annotation"),
    "image of doubles": (_replace("site_00/image", np.zeros((10, 8, 8, 3))), "image is float64"),
    "image too flat": (_replace("site_00/image", np.zeros((10, 8), np.uint8)), r"image has shape \(10, 8\)"),
    "other size": (_attr("image_size", "[16, 16]"), "image is 8 x 8, image_size says 16 x 16"),
    "other channels": (_attr("channels", '["grey"]'), "image has 3 channels, the attribute channels names 1"),
    "unknown task": (_attr("task", "segmentaton"), "did you mean 'segmentation'"),
    "other layout": (_attr("layout_version", "fedmed-data-9"), "layout_version must be 'fedmed-data-1'"),
    "classes not JSON": (_attr("classes", "background, lesion"), "must hold JSON"),
    "image size of one number": (_attr("image_size", "8"), "image_size must be a JSON list"),
    "same name twice": (_attr("site_name", "alpha", "site_01"), "two groups have the site_name 'alpha'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_inconsistent_files_are_refused_on_opening(broken: Broken, case: str) -> None:
    edit, message = WRONG[case]
    path = broken(edit)
    with pytest.raises(UserError, match=message) as caught:
        SiteFile.open(path)
    text = str(caught.value)
    assert path.name in text and text.count("\n") < 2


def test_missing_attribute_and_missing_split(broken: Broken) -> None:
    def edit(file: h5py.File) -> None:
        del file["site_00"].attrs["train_idx"]

    with pytest.raises(UserError, match="train_idx is missing"):
        SiteFile.open(broken(edit))


def test_val_split_may_be_absent(broken: Broken) -> None:
    def edit(file: h5py.File) -> None:
        del file["site_00"].attrs["val_idx"]

    with SiteFile.open(broken(edit)) as file:
        assert file.sites[0].n_val == 0 and len(file.site("alpha").split("val")) == 0


def test_things_that_are_no_site_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No site file at"):
        SiteFile.open(tmp_path / "nowhere.h5")
    text = tmp_path / "table.csv"
    text.write_text("a,b\n")
    with pytest.raises(UserError, match="is not an HDF5 file"):
        SiteFile.open(text)
    with pytest.raises(UserError, match="is a folder"):
        SiteFile.open(tmp_path)
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["weights"] = np.zeros(3)
    with pytest.raises(UserError, match="HDF5 but not a site file"):
        SiteFile.open(other)
    cut = tmp_path / "cut.h5"
    cut.write_bytes(other.read_bytes()[:600])
    with pytest.raises(UserError, match="cannot be read as HDF5"):
        SiteFile.open(cut)


def test_unknown_site_names_the_nearest(seg_file: Path) -> None:
    with SiteFile.open(seg_file) as file:
        with pytest.raises(UserError, match="no site 'alpa'; did you mean 'alpha'"):
            file.site("alpa")
        with pytest.raises(UserError, match="no site 'site_02'; did you mean 'site_0"):
            file.site("site_02")


def test_empty_train_split(broken: Broken) -> None:
    path = broken(_attr("train_idx", np.zeros(0, np.int32), "site_00"))
    with SiteFile.open(path) as file:
        with pytest.raises(UserError, match="'alpha': the train split is empty"):
            file.site("alpha")
        data = file.site("alpha", allow_empty_train=True)
    assert len(data.split("train")) == 0 and data.split("train").class_counts().tolist() == [0, 0]


def test_classification_and_multilabel_ranges(cls_file: Path) -> None:
    with h5py.File(cls_file, "r+") as file:
        file["label"][4] = 3
    with SiteFile.open(cls_file) as file, pytest.raises(UserError, match=r"label of image 4 contains 3.*0 .. 2"):
        file.site("clinic")
    with h5py.File(cls_file, "r+") as file:
        file.attrs["task"] = "multilabel"
        del file["label"]
        file["label"] = np.eye(9, 3, dtype=np.int64) * 2
    with SiteFile.open(cls_file) as file, pytest.raises(UserError, match="contains 2, expected 0/1 per class"):
        file.site("clinic")
    with h5py.File(cls_file, "r+") as file:
        del file["label"]
        file["label"] = np.zeros((9, 2), np.int64)
    with pytest.raises(UserError, match=r"label has shape \(9, 2\), expected \(9, 3\)"):
        SiteFile.open(cls_file)
    with h5py.File(cls_file, "r+") as file:
        del file["label"]
        file["label"] = np.eye(9, 3, dtype=np.int64)
    with SiteFile.open(cls_file) as file:
        batch = file.site("clinic").split("train").batch(torch.tensor([0, 4]))
    assert batch.targets.dtype == torch.float32 and batch.targets.tolist() == [[1, 0, 0], [0, 0, 0]]


def test_scribbles_train_and_masks_score(broken: Broken) -> None:
    def edit(file: h5py.File) -> None:
        scribble = np.full((10, 8, 8), 2, np.uint8)
        scribble[:, 0, :3], scribble[:, 1, :2] = 0, 1
        file["site_00/scribble"] = scribble
        file["site_00"].attrs["label_kind"] = "point"

    path = broken(edit)
    with SiteFile.open(path) as file:
        full, weak = file.site("alpha"), file.site("alpha", annotation="scribble")
    assert full.ignore_value is None and full.label_kind == "point" and weak.label_kind == "scribble"
    assert weak.ignore_value == 2
    assert weak.split("train").class_counts().tolist() == [6 * 3, 6 * 2]  # pixels not drawn are in no class
    np.testing.assert_array_equal(weak.split("test").targets.numpy(), full.split("test").targets.numpy())
    np.testing.assert_array_equal(full.read("scribble"), weak.target)


def test_auto_follows_the_attribute_of_the_group(broken: Broken) -> None:
    def edit(file: h5py.File) -> None:
        file["site_00/scribble"] = np.full((10, 8, 8), 2, np.uint8)
        file["site_00"].attrs.update({"annotation": "scribble", "label_kind": "block"})

    with SiteFile.open(broken(edit)) as file:
        data = file.site("alpha")
        assert data.label_kind == "block" and (data.target == 2).all()
        assert file.site("alpha", annotation="mask").target.max() == 1


def test_declared_ignore_value_and_values_beyond_it(broken: Broken) -> None:
    def edit(file: h5py.File) -> None:
        file.attrs["ignore_value_in_scribble"] = np.int64(255)
        scribble = np.full((10, 8, 8), 255, np.uint8)
        scribble[3, 0, 0] = 7
        file["site_00/scribble"] = scribble

    with SiteFile.open(broken(edit)) as file, pytest.raises(UserError, match="255 = not annotated"):
        file.site("alpha", annotation="scribble")


def test_annotation_that_does_not_fit(seg_file: Path) -> None:
    with SiteFile.open(seg_file) as file:
        with pytest.raises(UserError, match=r"finds no 'masc'.*did you mean 'mask'"):
            file.site("alpha", annotation="masc")
        with pytest.raises(UserError, match=r"finds no 'box'.*known: mask"):
            file.site("alpha", annotation="box")
        with pytest.raises(UserError, match="cannot train segmentation"):
            file.site("alpha", annotation="image")


def test_extras_flags_and_large_datasets(broken: Broken) -> None:
    def edit(file: h5py.File) -> None:
        site = file["site_00"]
        site["modality_present"] = np.tile(np.array([1, 0, 1], np.uint8), (10, 1))
        site["slice_no"] = np.arange(10, dtype=np.int32)
        site["mask_rater2"] = np.ones((10, 8, 8), np.uint8)
        site.attrs["active_classes"] = np.array([1, 0])

    with SiteFile.open(broken(edit)) as file:
        data, other = file.site("alpha"), file.site("beta")
    assert sorted(data.extras) == ["active_classes", "modality_present", "slice_no"]
    assert data.active_classes.tolist() == [True, False] and other.active_classes.all()
    batch = data.split("train").batch(torch.tensor([1, 1]))
    assert batch.extras["modality_present"].tolist() == [[1, 0, 1]] * 2 and "active_classes" not in batch.extras
    assert data.read("mask_rater2").sum() == 640
    with pytest.raises(UserError, match="no dataset 'mask_rater3'; did you mean 'mask_rater2'"):
        data.read("mask_rater3")


def test_wrong_flags(broken: Broken) -> None:
    path = broken(lambda file: file["site_00"].create_dataset("modality_present", data=np.ones((10, 2), np.uint8)))
    with SiteFile.open(path) as file, pytest.raises(UserError, match=r"modality_present has shape \(10, 2\)"):
        file.site("alpha")


def test_central_group_truth_and_recipe(tmp_path: Path, make_site: Callable[..., Any], meta: dict[str, object]) -> None:
    noisy = make_site("alpha")
    noisy.reference = {"mask": noisy.annotations["mask"]}
    noisy.truth = {"is_noisy": True, "noise_rate": 0.25}
    central = make_site("central", 5)
    central.splits = {"test": np.arange(10)}
    path = write_site_file(tmp_path / "d.h5", meta, [noisy, make_site("beta", 1)], central, {"seed": 3})
    with SiteFile.open(path) as file:
        assert file.central and file.recipe == {"seed": 3} and [s.name for s in file.sites] == ["alpha", "beta"]
        assert len(file.site("central").split("test")) == 10
        assert "reference" not in file.site("alpha").extras
    assert read_truth(path) == {"alpha": {"is_noisy": True, "noise_rate": 0.25}}


def test_public_files_open_unchanged(public_folder: Path) -> None:
    tasks = {}
    for path in sorted(public_folder.glob("*.h5")):
        with SiteFile.open(path) as file:
            tasks[path.stem] = file.task
            for info in file.sites:
                data = file.site(info.name)
                split = data.split("train")
                batch = split.batch(torch.arange(2))
                assert batch.images.shape == (2, len(file.channels), *file.image_size)
                assert float(batch.images.min()) >= 0 and float(batch.images.max()) <= 1
                assert len(split) == info.n_train and split.class_counts().sum() > 0
                assert len(data.item_id) == len(data.group_id) == info.n
                assert not set(np.array(data.group_id)[data.splits["train"]]) & set(
                    np.array(data.group_id)[data.splits["test"]]
                )
    assert {"segmentation", "classification", "multilabel"} >= set(tasks.values())


def test_public_scribbles_keep_their_ignore_value(public_folder: Path) -> None:
    path = public_folder / "acdc_scribble.h5"
    if not path.exists():
        pytest.skip("no scribble file")
    with SiteFile.open(path) as file:
        data = file.site("site_00", annotation="scribble")
    drawn = data.split("train").class_counts()
    assert data.ignore_value == 4 and data.target.max() == 4
    assert 0.005 < drawn.sum() / data.split("train").targets.numel() < 0.05
    assert data.split("test").targets.max() <= 3


def test_names_that_would_write_on_a_terminal_are_refused(tmp_path: Path) -> None:
    meta = {"task": "classification", "classes": ["a", "b\x1b[2J"], "channels": ["grey"], "image_size": [8, 8]}
    site = SiteArrays(
        "s", np.zeros((4, 8, 8), np.uint8), {"label": np.array([0, 1, 0, 1])}, {"train": [0, 1], "test": [2, 3]}
    )
    path = write_site_file(tmp_path / "odd.h5", meta, [site])
    with pytest.raises(UserError, match=r"control characters: 'b\\x1b\[2J'"):
        SiteFile.open(path)
