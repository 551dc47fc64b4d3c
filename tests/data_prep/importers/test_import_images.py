"""Folders of pictures: masks, scribbles, tables, class folders, splits, sites, patients, sizes, colour, and bad files among good ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedmed.data.site_file import SiteFile
from fedmed.errors import UserError

Run = Callable[..., Any]
JANE = "DOE_JANE_19700101"


def picture(path: Path, value: int = 50, size: tuple[int, ...] = (6, 8), dtype: type = np.uint8) -> Path:
    """Write a picture of one value, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, dtype)).save(path)
    return path


def mask(path: Path, high: int = 255, size: tuple[int, int] = (6, 8), column: int = 4) -> Path:
    """Write a mask whose columns from `column` on are foreground."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.zeros(size, np.uint8)
    levels[:, column:] = high
    Image.fromarray(levels).save(path)
    return path


def pairs(root: Path, count: int = 10, name: str = "p{:02d}.png", **of_mask: Any) -> Path:
    """images/ and masks/ with `count` pairs; image i has the value i."""
    for number in range(count):
        picture(root / "images" / name.format(number), number)
        mask(root / "masks" / name.format(number), **of_mask)
    return root


def test_images_and_masks(tmp_path: Path, importing: Run) -> None:
    outcome = importing("images", pairs(tmp_path / "src"))
    with SiteFile.open(outcome.out) as file:
        assert (file.task, file.classes, file.channels, file.image_size) == (
            "segmentation", ("background", "foreground"), ("grey",), (6, 8),
        )  # fmt: skip
        data = file.site("out")
    assert data.image[:, 0, 0].tolist() == list(range(10)) and data.image.dtype == np.uint8
    assert (data.target == [0, 0, 0, 0, 1, 1, 1, 1]).all()
    assert "note: each image counts as a patient of its own; group= says whose it is" in outcome.noted
    assert outcome.said[-1] == f"wrote {outcome.out}" and "skipped" not in outcome.text


def test_bytes_do_not_depend_on_workers(tmp_path: Path, importing: Run) -> None:
    source = pairs(tmp_path / "src", 20)
    one = importing("images", source, name="a/x.h5", workers=1)
    four = importing("images", source, name="b/x.h5", workers=4)
    assert one.out.read_bytes() == four.out.read_bytes()


def test_names_of_patients_stay_out(tmp_path: Path, importing: Run) -> None:
    source = tmp_path / "src"
    table = ["image,label,patient,age"]
    for number in range(8):
        picture(source / "images" / f"{JANE}_{number}.png", number)
        table.append(f"{JANE}_{number},{'ab'[number % 2]},{JANE}_{number // 2},{JANE}")
    (source / "images" / f"{JANE}_broken.png").write_bytes(b"\x89PNG\r\n")
    table.append(f"{JANE}_broken,a,{JANE}_9,x")
    (source / f"{JANE}.csv").write_text("\n".join(table))
    words = (f"labels={JANE}.csv", "group=patient", "image_column=image")
    outcome = importing("images", source, *words, trace=str(tmp_path / "trace.csv"))
    content = outcome.out.read_bytes()
    for word in (JANE, "DOE", "JANE", "19700101", str(tmp_path)):
        assert word.encode() not in content
        assert word not in outcome.text.replace(str(outcome.out), "").replace(str(tmp_path / "trace.csv"), "").replace(
            str(tmp_path / "config"), ""
        )
    assert JANE in (tmp_path / "trace.csv").read_text()
    assert len(set(outcome.read("group_id")[0])) == 4 and all(len(s) == 1 for s in outcome.split_of().values())


def test_masks_beside_images_with_an_ending(tmp_path: Path, importing: Run) -> None:
    for number in range(4):
        picture(tmp_path / "src" / f"case{number}" / "a.jpg", number, (6, 8, 3))
        mask(tmp_path / "src" / f"case{number}" / "a_segmentation.png")
    outcome = importing("images", tmp_path / "src", "masks=.", "mask_suffix=_segmentation", r"group=^(case\d+)/")
    assert outcome.read("mask")[0].sum() == 4 * 24 and len(set(outcome.read("group_id")[0])) == 4
    assert outcome.said[-2] == "segmentation, classes: background, foreground"


def test_folders_for_sites_and_splits(tmp_path: Path, importing: Run) -> None:
    for domain in ("Domain1", "Domain2"):
        for split, count in (("train", 3), ("test", 2)):
            for number in range(count):
                picture(tmp_path / "src" / domain / split / "imgs" / f"{split}{number}.png", number)
                mask(tmp_path / "src" / domain / split / "mask" / f"{split}{number}.png")
    outcome = importing("images", tmp_path / "src", "images=imgs", "masks=mask", "site=1")
    with SiteFile.open(outcome.out) as file:
        assert [(s.name, s.n_train, s.n_val, s.n_test) for s in file.sites] == [
            ("Domain1", 3, 0, 2),
            ("Domain2", 3, 0, 2),
        ]
    first, second = (outcome.read("item_id", group=f"site_0{index}")[0] for index in (0, 1))
    assert not set(first) & set(second)


def test_folders_whose_names_are_no_unicode(tmp_path: Path, importing: Run) -> None:
    for site in (b"caf\xe9", b"north"):
        pairs(tmp_path / "src" / os.fsdecode(site), 3, name=os.fsdecode(b"\xff") + "{}.png")
    outcome = importing("images", tmp_path / "src", "site=1", trace=str(tmp_path / "trace.csv"))
    with SiteFile.open(outcome.out) as file:
        assert [(site.name, site.n) for site in file.sites] == [("caf?", 3), ("north", 3)]


def test_patients_of_a_pattern_are_apart_by_folder_of_the_site(tmp_path: Path, importing: Run) -> None:
    for site in ("a", "b"):
        for number in range(4):
            picture(tmp_path / "src" / site / "images" / f"{number // 2}_{number}.png")
            mask(tmp_path / "src" / site / "masks" / f"{number // 2}_{number}.png")
    outcome = importing("images", tmp_path / "src", "site=1", r"group=([0-9])_[^/]*$")
    first, second = (set(outcome.read("group_id", group=f"site_0{index}")[0]) for index in (0, 1))
    assert len(first) == len(second) == 2 and not first & second


def test_several_classes_and_values(tmp_path: Path, importing: Run) -> None:
    source = tmp_path / "src"
    for number in range(4):
        picture(source / "images" / f"{number}.png")
        (source / "masks").mkdir(exist_ok=True)
        Image.fromarray(np.repeat([[0, 128, 255]], 6, axis=0).astype(np.uint8)).resize((8, 6), 0).save(
            source / "masks" / f"{number}.png"
        )
    with pytest.raises(UserError, match="Give classes=background"):
        importing("images", source)
    outcome = importing("images", source, "classes=background,cup,disc", "mask_values={0: 1, 128: 2, 255: 0}")
    assert outcome.read("mask")[0][0, 0].tolist() == [1, 1, 1, 2, 2, 0, 0, 0]
    assert json.loads(outcome.attrs()["classes"]) == ["background", "cup", "disc"]
    plain = importing("images", source, "mask_threshold=100", name="b.h5")
    assert plain.read("mask")[0][0, 0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


def test_scribbles(tmp_path: Path, importing: Run) -> None:
    source = pairs(tmp_path / "src", 4)
    for number in range(4):
        levels = np.full((6, 8), 255, np.uint8)
        levels[0, :2], levels[0, 6:] = 0, 1
        (source / "drawn").mkdir(exist_ok=True)
        Image.fromarray(levels).save(source / "drawn" / f"p{number:02d}.png")
    outcome = importing("images", source, "scribbles=drawn", size="12x16")
    scribble = outcome.read("scribble")[0]
    assert scribble[0, 0].tolist() == [0] * 4 + [2] * 8 + [1] * 4 and (scribble[:, 2:] == 2).all()
    assert outcome.attrs()["ignore_value_in_scribble"] == 2
    (source / "masks").rename(source / "elsewhere")
    alone = importing("images", source, "scribbles=drawn", name="b.h5")
    with SiteFile.open(alone.out) as file:
        assert file.site("b").label_kind == "scribble"
    swapped = importing("images", source, "scribbles=drawn", "scribble_values={255: 0}", name="c.h5")
    assert swapped.read("scribble")[0][0, 0].tolist() == [2, 2, 0, 0, 0, 0, 2, 2]


def test_label_tables(tmp_path: Path, importing: Run) -> None:
    source = tmp_path / "src"
    for number in range(10):
        picture(source / f"{number}.png", number)
    lines = [
        f'"{n}.png";{"nv" if n % 2 else "mel"};{n // 2};{"val" if n == 9 else "Train" if n < 8 else "test"}'
        for n in range(10)
    ]
    (source / "labels.csv").write_text("\ufefffile;dx;patient;part\n" + "\n".join(lines[:9]))
    outcome = importing(
        "images",
        source,
        "labels=labels.csv",
        "image_column=file",
        "label_column=dx",
        "group=patient",
        "split_column=part",
    )
    assert outcome.read("label")[0].tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert json.loads(outcome.attrs()["classes"]) == ["mel", "nv"]
    assert outcome.attrs()["test_idx"].tolist() == [8] and len(outcome.attrs()["train_idx"]) == 8
    assert outcome.noted[-2:] == ["1 file skipped (--trace FILE lists which):", "  1  no row in the label table"]


def test_a_torn_patient_goes_to_train(tmp_path: Path, importing: Run) -> None:
    source = tmp_path / "src"
    for split, patient, number in (("train", "p1", 0), ("test", "p1", 1), ("test", "p2", 2), ("train", "p3", 3)):
        picture(source / split / "images" / f"{patient}_{number}.png")
        mask(source / split / "masks" / f"{patient}_{number}.png")
    outcome = importing("images", source, "group=(p[0-9])_")
    assert "note: 1 groups lie in more than one split of the source; all of their images go to train" in outcome.noted
    assert sorted(map(sorted, outcome.split_of().values())) == [["test"], ["train"], ["train"]]


def test_one_hot_columns_and_joined_labels(tmp_path: Path, importing: Run) -> None:
    source = tmp_path / "src"
    for number in range(6):
        picture(source / "images" / f"{number}.png")
    (source / "t.csv").write_text("image,A,B,both\n" + "".join(f"{n},{n % 2},{1 - n % 2},A|B\n" for n in range(6)))
    hot = importing("images", source, "labels=t.csv", "label_columns=A,B")
    assert hot.read("label")[0].tolist() == [1, 0] * 3 and hot.said[-2] == "classification, classes: A, B"
    many = importing("images", source, "labels=t.csv", "label_columns=A,B", "task=multilabel", name="m.h5")
    assert many.read("label")[0].tolist() == [[0, 1], [1, 0]] * 3 and many.attrs()["task"] == "multilabel"
    joined = importing("images", source, "labels=t.csv", "label_column=both", name="j.h5")
    assert joined.read("label")[0].tolist() == [[1, 1]] * 6


def test_class_folders_are_asked_for(tmp_path: Path, importing: Run) -> None:
    for split in ("train", "test"):
        for name in ("benign", JANE):
            for number in range(2):
                picture(tmp_path / "src" / split / name / f"{number}.png")
    picture(tmp_path / "src" / "train" / "loose.png")
    with pytest.raises(UserError, match=r"no annotation\. Give masks=FOLDER") as error:
        importing("images", tmp_path / "src")
    assert JANE not in str(error.value)
    outcome = importing("images", tmp_path / "src", "labels=folder", "classes=benign,malignant")
    assert outcome.read("label")[0].tolist() == [0, 0, 0, 0] and JANE.encode() not in outcome.out.read_bytes()
    assert outcome.noted[-1] == "  5  in no folder of a class"
    both = importing("images", tmp_path / "src", "labels=folder", name="b.h5")
    assert both.read("label")[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]  # capitals come first


@pytest.mark.parametrize(("fit", "expected"), [("stretch", (4, 4)), ("pad", (2, 4)), ("crop", (4, 3))])
def test_sizes(tmp_path: Path, importing: Run, fit: str, expected: tuple[int, int]) -> None:
    """Images of 8 x 16 and 16 x 32, right half foreground, come to 8 x 8: rows with pixels, columns of foreground."""
    source = tmp_path / "src"
    for number, scale in enumerate((1, 2)):
        picture(source / "images" / f"{number}.png", 200, (8 * scale, 16 * scale))
        mask(source / "masks" / f"{number}.png", size=(16, 32), column=16 if fit != "crop" else 18)
    images, masks = importing("images", source, f"fit={fit}", size="8").read("image", "mask")
    assert images.shape == masks.shape == (2, 8, 8)
    rows = (images[1] > 100).any(axis=1).sum()
    assert (rows // 2, masks[1].any(axis=0).sum()) == (expected[0], expected[1])


def test_mixed_sizes_without_size(tmp_path: Path, importing: Run) -> None:
    source = pairs(tmp_path / "src", 6)
    picture(source / "images" / "p00.png", size=(9, 9))
    mask(source / "masks" / "p01.png", size=(9, 9))
    mask(source / "masks" / "p00.png", size=(9, 9))
    outcome = importing("images", source)
    assert outcome.read("image")[0].shape == (4, 6, 8)
    assert outcome.noted[-2:] == [
        "  1  another size than most images (--size brings all to one)",
        "  1  mask and image differ in size (--size brings both to one)",
    ]
    fitted = importing("images", source, size="8", name="b.h5")
    assert fitted.noted[-1] == "  1  mask and image differ in shape" and len(fitted.read("image")[0]) == 5


def test_grey_and_colour(tmp_path: Path, importing: Run) -> None:
    source = pairs(tmp_path / "src", 18)
    picture(source / "images" / "p01.png", 7, (6, 8, 3))  # equal channels are grey
    tinted = np.zeros((6, 8, 3), np.uint8)
    tinted[..., 1] = 100
    Image.fromarray(tinted).save(source / "images" / "p17.png")
    grey = importing("images", source)
    assert grey.read("image")[0].shape == (17, 6, 8) and grey.read("image")[0][1, 0, 0] == 7
    assert grey.noted[-1] == "  1  colour among grey images (colour=rgb or colour=grey takes both)"
    colour = importing("images", source, "colour=rgb", name="rgb.h5").read("image")[0]
    assert colour.shape == (18, 6, 8, 3) and colour[17, 0, 0].tolist() == [0, 100, 0] and (colour[3] == 3).all()
    luma = importing("images", source, "colour=grey", name="grey.h5").read("image")[0]
    assert luma.shape == (18, 6, 8) and luma[17, 0, 0] == 59


def test_16_bit_images_stay_16_bit(tmp_path: Path, importing: Run) -> None:
    source = pairs(tmp_path / "src", 4)
    for number in range(3):
        picture(source / "images" / f"p{number:02d}.png", 40_000 + number, dtype=np.uint16)
    outcome = importing("images", source)
    assert outcome.read("image")[0].dtype == np.uint16 and outcome.read("image")[0][2, 0, 0] == 40_002
    assert outcome.noted[-1] == "  1  pixels of type uint8, those before are uint16"


def test_bad_files_among_good_ones(tmp_path: Path, importing: Run) -> None:
    source = pairs(tmp_path / "src", 12)
    images, masks = source / "images", source / "masks"
    (images / "p00.png").write_bytes(b"")
    (images / "p01.png").write_bytes((images / "p02.png").read_bytes()[:40])
    (images / "p03.png").write_bytes(b"no picture at all")
    (masks / "p04.png").unlink()
    (images / "p05.png").unlink()
    mask(masks / "p06.png", high=77)
    (images / "notes.txt").write_text("x")
    picture(images / "p07.bmp")
    outcome = importing("images", source)
    assert len(outcome.read("image")[0]) == 6
    reasons = {line.strip().split("  ", 1)[1] for line in outcome.noted[-8:]}
    assert reasons >= {
        "empty file", "image without a mask", "mask without an image", "mask with other values than 0 and 1, or 0 and 255",
        "image of a file type that is not read here", "image of the same name as another",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["masks=nowhere"], "no mask lies where masks=nowhere says"),
        (["images=nowhere"], "no picture"),
        (["mask_suffix=_x"], "with names that end in _x"),
        (["scribbles=nowhere"], "no scribble lies where scribbles=nowhere says"),
        (["task=classification"], "no annotation"),
        (["group=patient"], "give the table too"),
        (["labels=nowhere.csv", "task=classification"], "cannot read the label table"),
        (["group=(a)(b)"], "one \\(...\\), got 2"),
        (["group=(a"], "no valid pattern"),
        (["fit=squash"], "stretch or pad or crop"),
        (["mask_threshold=-1"], "mask_threshold"),
        (["colour=blue"], "colour: expected"),
        (["mask_value={0: 1}"], "did you mean 'mask_values'"),
    ],
)
def test_wrong_arguments(tmp_path: Path, importing: Run, words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        importing("images", pairs(tmp_path / "src", 3), *words)
    assert not (tmp_path / "made").exists()


def test_an_empty_folder_and_a_file(tmp_path: Path, importing: Run) -> None:
    (tmp_path / "src").mkdir()
    with pytest.raises(UserError, match="no picture"):
        importing("images", tmp_path / "src")
    with pytest.raises(UserError, match="is no folder"):
        importing("images", picture(tmp_path / "x.png"))
