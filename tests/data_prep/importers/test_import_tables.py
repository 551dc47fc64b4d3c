"""Label tables, labels, patterns of files and mask levels, each on a few values."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.importers.base import Skipped
from data_prep.importers.folders import by_key, level_of, list_files, matcher, split_of, spread, stem
from data_prep.importers.labels import NO_LABEL, NO_ROW, ImageTable, from_column, from_columns, from_folders, in_order
from data_prep.importers.levels import check_values, default_classes, lookup, to_classes, to_scribble
from data_prep.importers.scaling import as_they_are, percentiles, scaled
from data_prep.importers.tables import is_absent, numbers, read_table
from fedmed.data.formats.limits import BadFile
from fedmed.errors import UserError


def table(tmp_path: Path, text: str, images: list[str], column: str = "image") -> ImageTable:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    return ImageTable(path, column, images)


@pytest.mark.parametrize(
    "content",
    [
        b"image,label\na.png,1\nb.png,0\n",
        b"\xef\xbb\xbfimage;label\r\na.png;1\r\nb.png;0",
        b'"image"\t"label"\na.png\t1\n\n"b.png"\t 0 \n',
        "image,label\na.png,1\nb.png,0\n".encode("utf-16"),
        b"\n\nimage , label,\na.png,1,x,y\n,,\nb.png,0\n",
    ],
)
def test_tables_of_every_make(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    found = read_table(path)
    assert found.column("image") == ["a.png", "b.png"] and found.column("LABEL") == ["1", "0"]


def test_quoted_cells_keep_separators_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes('image,"size[w,h]",label\na,"1,\n2",\xe4\n'.encode("cp1252"))
    found = read_table(path)
    assert found.columns == ("image", "size[w,h]", "label") and found.rows == (("a", "1,\n2", "ä"),)


@pytest.mark.parametrize("content", [b"", b" \n \n", b"\x00\x01\x02,\n", b"PNG\x00\n1", b",,\n,,\n"])
def test_what_is_no_table_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match="expected CSV text with a header line"):
        read_table(path)


def test_a_missing_column_is_named_without_quoting_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("DOE_JANE,1\nROE_RICHARD,0\n")
    with pytest.raises(UserError, match="none of the 2 columns in its first line is called 'label'") as error:
        read_table(path).index("label")
    assert "DOE" not in str(error.value)
    with pytest.raises(UserError, match="cannot read"):
        read_table(tmp_path / "nothing.csv")


def test_columns_of_one_name_and_cells_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("image,label,Label,LABEL\na,0,1,1\n")
    assert read_table(path).column("label") == ["0"]
    with pytest.raises(UserError, match="3 columns are called 'lAbel'; rename"):
        read_table(path).index("lAbel")
    path.write_text("image,label\na,0\nb," + "x" * 200_000 + "\n")
    with pytest.raises(UserError, match=r"from line 3 on: .* a cell of more than 131072 characters"):
        read_table(path)


def test_cells_that_say_nothing_and_numbers() -> None:
    assert all(is_absent(cell) for cell in ("", " ", "NA", "nan", "Null"))
    assert not any(is_absent(cell) for cell in ("0", "none", "-"))
    assert numbers(["1", "0,5"]) == [1.0, 0.5] and numbers(["1", "x"]) is None


def test_rows_are_found_by_path_or_name(tmp_path: Path) -> None:
    images = ["a/x.png", "b/x.png", "c/y.png", "z.tar.png"]
    found = table(tmp_path, "image,label\na/x.png,0\n.\\b\\x,1\ny,2\nz.tar.png,3\nx,9\n", images)
    assert [found.cell(image, "label") for image in images] == ["0", "1", "2", "3"]
    assert table(tmp_path, "image,label\nx,9\n", images).rows("a/x.png") == []  # x stands for two images


def test_labels_of_one_column(tmp_path: Path) -> None:
    images = ["a", "b", "c", "d", "e"]
    found = table(tmp_path, "image,label\na,nv\nb,mel\nc,NA\nd,nv\nd,mel\n", images)
    named = from_column(found, images, "label", "auto", None, "|", "none")
    assert named.task == "classification" and named.classes == ("mel", "nv")
    assert named.labels == {"a": 1, "b": 0, "c": NO_LABEL, "d": NO_LABEL, "e": NO_ROW}
    given = from_column(found, images[:2], "label", "auto", ["nv", "bcc"], "|", "none")
    assert given.labels == {"a": 0, "b": "label that is none of the classes"}


def test_joined_labels(tmp_path: Path) -> None:
    images = ["a", "b", "c"]
    found = table(tmp_path, "image,label\na,Mass|Edema\nb,No Finding\nc,Mass\n", images)
    named = from_column(found, images, "label", "auto", None, "|", "No Finding")
    assert named.task == "multilabel" and named.classes == ("Edema", "Mass")
    assert [named.labels[image].tolist() for image in images] == [[1, 1], [0, 0], [0, 1]]  # type: ignore[union-attr]


def test_columns_of_0_and_1(tmp_path: Path) -> None:
    images = ["a", "b", "c", "d"]
    found = table(tmp_path, "image,p,q\na,1.0,0.0\nb,0,1\nc,-1,0\n", images)
    one = from_columns(found, images, ["p", "q"], "auto", None)
    assert one.task == "classification" and one.classes == ("p", "q")
    assert one.labels == {"a": 0, "b": 1, "c": "label that is neither 0 nor 1", "d": NO_ROW}
    both = from_columns(
        table(tmp_path, "image,p,q\na,1,1\nb,0,1\n", images), images[:2], ["p", "q"], "auto", ["P", "Q"]
    )
    assert both.task == "multilabel" and both.labels["a"].tolist() == [1, 1]  # type: ignore[union-attr]
    with pytest.raises(UserError, match="classes names 1 classes, label_columns 2"):
        from_columns(found, images, ["p", "q"], "auto", ["P"])


def test_labels_that_cannot_be_meant(tmp_path: Path) -> None:
    images = [str(number) for number in range(300)]
    found = table(tmp_path, "image,label\n" + "".join(f"{image},name {image}\n" for image in images), images)
    with pytest.raises(UserError, match="300 different labels were found, at most 200"):
        from_column(found, images, "label", "auto", None, "|", "")
    with pytest.raises(UserError, match="has a label for none of the 1 images"):
        from_column(found, ["x"], "label", "auto", None, "|", "")
    with pytest.raises(UserError, match="a name stands there twice"):
        from_folders({"a": "p"}, ["p", "p"])


def test_classes_are_sorted_as_numbers_where_they_are() -> None:
    assert in_order({"10", "9", "1"}) == ("1", "9", "10") and in_order({"b", "a", "10"}) == ("10", "a", "b")


def test_files_are_listed_without_what_systems_leave(tmp_path: Path) -> None:
    for name in ("b/x.png", "a.png", ".hidden/x.png", "__MACOSX/x.png", "b/._x.png", "b/Thumbs.db"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    assert list_files(tmp_path) == ["a.png", "b/x.png"]
    with pytest.raises(UserError, match="is no folder"):
        list_files(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("spec", "suffix", "path", "key"),
    [
        ("images", "", "images/x.png", ("x",)),
        ("images", "", "site/train/images/p/x.1.png", ("site", "train", "p", "x.1")),
        ("images", "", "x.png", None),
        ("images", "", "my_images/x.png", None),
        ("masks", "_m", "masks/x_m.png", ("x",)),
        ("masks", "_m", "masks/x.png", None),
        ("*/photo/*.png", "", "s/photo/x.png", ("s", "x")),
        ("*/photo/*.png", "", "s/t/photo/x.png", None),
        ("**/*_seg.tif", "", "s/t/x_seg.tif", ("s", "t", "x")),
        ("img?.png", "", "img7.png", ("7",)),
        (".", "", "a/b/x.nii.gz", ("a", "b", "x")),
        ("scans/mr", "", "p/scans/mr/x.nii", ("p", "x")),
    ],
)
def test_patterns(spec: str, suffix: str, path: str, key: tuple[str, ...] | None) -> None:
    assert matcher(spec, suffix)(path) == key


def test_files_of_a_pattern_by_key() -> None:
    skipped = Skipped()
    found = by_key(
        Path("s"), ["i/a.png", "i/a.jpg", "i/b.txt", "o/c.png"], matcher("i"), (".png", ".jpg"), skipped, "image"
    )
    assert found == {("a",): "i/a.png"}
    assert [file for file, _ in skipped.files] == ["s/i/a.jpg", "s/i/b.txt"]
    assert skipped.reasons == {"image of the same name as another": 1, "image of a file type that is not read here": 1}


def test_what_folders_say() -> None:
    assert [split_of(path) for path in ("Train/a", "x/validation/a", "testing/a", "a/test.png", "tests/a")] == [
        "train", "val", "test", "", "",
    ]  # fmt: skip
    assert [level_of("s/t/a.png", level) for level in (1, 2, 3)] == ["s", "t", ""]
    assert stem("a.b/c.nii.gz") == "c" and stem(".x") == ".x" and stem("a/x") == "x"
    assert spread([1, 2, 3, 4, 5], 2) == [1, 4] and spread([], 3) == [] and spread([1], 5) == [1]


def test_mask_levels_to_classes() -> None:
    binary = np.array([[0, 255]], dtype=np.uint8)
    assert to_classes(binary, 2, None, None).tolist() == [[0, 1]] == to_classes(binary // 255, 2, None, None).tolist()
    assert to_classes(np.array([[0, 100, 130]]), 2, None, 128).tolist() == [[0, 0, 1]]
    assert to_classes(np.array([[0, 128, 255]]), 3, {"0": 2, "128": 1, "255": 0}, None).tolist() == [[2, 1, 0]]
    assert to_classes(np.array([[0, 2, 1]]), 3, None, None).tolist() == [[0, 2, 1]]
    for levels, number, values in (([0, 1, 255], 2, None), ([0, 254], 2, None), ([3], 3, None), ([7], 2, {"0": 0})):
        with pytest.raises(BadFile, match="mask with"):
            to_classes(np.array([levels]), number, values, None)


def test_scribble_levels_to_classes() -> None:
    assert to_scribble(np.array([[0, 2, 3, 255]]), 3, None).tolist() == [[0, 2, 3, 3]]
    assert to_scribble(np.array([[0, 128, 255]]), 2, {"128": 0, "255": 1}).tolist() == [[2, 0, 1]]
    assert lookup(np.array([[300]], dtype=np.uint16), {300: 1}, 2).tolist() == [[1]]


def test_values_are_checked() -> None:
    check_values("mask_values", {"0": 0, "65535": 253})
    for wrong in ({"-1": 0}, {"70000": 0}, {"0": 254}, {"a": 0}):
        with pytest.raises(ValueError, match="mask_values: expected"):
            check_values("mask_values", wrong)


def test_default_classes_look_into_masks(tmp_path: Path) -> None:
    path = tmp_path / "m.png"
    Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).save(path)
    assert default_classes([path, tmp_path / "gone.png"], None, None) == ("background", "foreground")
    assert default_classes([], {"0": 0, "9": 2}, None) == ("background", "class 1", "class 2")
    Image.fromarray(np.array([[0, 7, 255]], dtype=np.uint8)).save(path)
    with pytest.raises(UserError, match="Give classes=background,a,b"):
        default_classes([path], None, None)
    assert default_classes([path], None, 100) == ("background", "foreground")


def test_intensities() -> None:
    values = np.array([-10.0, 0.0, 5.0, 10.0, np.nan])
    assert scaled(values, 0, 10, "uint8").tolist() == [0, 0, 128, 255, 0]
    assert scaled(values, 0, 10, "uint16").tolist() == [0, 0, 32768, 65535, 0]
    assert scaled(values, 0, 10, "float16").tolist() == [0, 0, 0.5, 1, 0]
    assert scaled(values, 5, 5, "uint8").tolist() == [0] * 5
    assert percentiles(np.arange(101.0), (10, 90)) == (10, 90)
    assert percentiles(np.array([np.nan, np.inf]), (1, 99)) == (0, 0) and percentiles(np.array([]), (1, 99)) == (0, 0)
    assert as_they_are(np.array([0, 65535]), "uint16").tolist() == [0, 65535]
    assert as_they_are(np.array([-1024.0, 0.5]), "float16").tolist() == [-1024, 0.5]
    for wrong, dtype in (
        ([256], "uint8"),
        ([-1], "uint16"),
        ([0.5], "uint8"),
        ([np.nan], "float16"),
        ([7e4], "float16"),
    ):
        with pytest.raises(BadFile, match="values"):
            as_they_are(np.array(wrong), dtype)
