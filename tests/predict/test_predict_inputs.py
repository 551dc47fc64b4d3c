"""Files and folders become sources with names of their own."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedmed.errors import UserError
from fedmed.predict.inputs import PICTURE, SERIES, SITE_FILE, VOLUME, Source, find_sources


def touched(root: Path, *names: str, content: bytes = b"x") -> Path:
    """Files in a folder."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def named(sources: list[Source]) -> list[tuple[str, str]]:
    return [(source.kind, source.name) for source in sources]


def test_kinds_by_content_and_ending(tmp_path: Path) -> None:
    root = touched(
        tmp_path / "in",
        "b.PNG",
        "sub/a.tiff",
        "v.nii",
        "w.NII.GZ",
        "notes.txt",
        ".hidden.png",
        "Thumbs.db",
        ".git/x.png",
    )
    touched(root, "data.bin", content=b"\x89HDF\r\n\x1a\n")
    skipped: Counter[str] = Counter()
    assert named(find_sources([root], skipped)) == [
        (PICTURE, "b"), (SITE_FILE, "data"), (PICTURE, "sub/a"), (VOLUME, "v"), (VOLUME, "w"),
    ]  # fmt: skip
    assert skipped == {"of a file type that is not read here": 1}
    assert named(find_sources([root / "b.PNG"], skipped)) == [(PICTURE, "b")]
    assert [source.shown for source in find_sources([root / "sub"], skipped)] == ["a.tiff"]
    assert named(find_sources([root], skipped, leave_out=root / "sub"))[2][0] == VOLUME
    with pytest.raises(UserError, match="no file or folder at"):
        find_sources([root / "gone"], skipped)


def test_no_two_sources_have_one_name(tmp_path: Path) -> None:
    one = touched(tmp_path / "one", "a.png", "a.jpg", "A.bmp", "a_png.png", "v.nii", "v.nii.gz")
    names = [source.name for source in find_sources([one], Counter())]
    assert len({name.casefold() for name in names}) == len(names) == 6
    assert {"a_jpg", "A_bmp", "a_png", "v_nii", "v_nii_gz"} <= set(names)
    two = touched(tmp_path / "two", "a.png")
    assert {"one/a_png", "two/a"} <= {source.name for source in find_sources([one, two], Counter())}
    single = find_sources([one / "a.png", two / "a.png"], Counter())
    assert len({source.name for source in single}) == 2


def test_cases_of_contrasts(tmp_path: Path) -> None:
    root = touched(
        tmp_path / "in", "x/x_t1.nii", "x/x_t1ce.nii", "y/y_t1.nii", "z_seg.nii", "_t1.nii.gz", "_t1ce.nii.gz"
    )
    skipped: Counter[str] = Counter()
    found = find_sources([root], skipped, (("_t1ce", "-t1c"), ("_t1", "-t1n")))
    names = {source.name: [path.name if path else None for path in source.files] for source in found}
    assert names == {"x/x": ["x_t1ce.nii", "x_t1.nii"], "_t1ce": ["_t1ce.nii.gz", "_t1.nii.gz"]}
    assert skipped == {
        "a case without all contrasts": 1,
        "a volume whose name ends with none of the contrasts _t1ce, _t1": 1,
    }
    found = find_sources([root], Counter(), (("_t1ce",), ("_t1",)), takes_missing=True)
    assert [source.files[0] for source in found if source.name == "y/y"] == [None]


def test_series_are_named_after_their_folder(tmp_path: Path, write_dicom: Any) -> None:
    import numpy as np

    pixels = np.zeros((4, 4), np.uint16)
    for folder, uid, count in (("ct", "1.2.1", 2), ("two", "1.2.2", 1), ("two", "1.2.3", 2)):
        for number in range(count):
            write_dicom(tmp_path / "in" / folder / f"{uid[-1]}-{number}", pixels, SeriesInstanceUID=uid)
    touched(tmp_path / "in", "ct/readme.txt")
    skipped: Counter[str] = Counter()
    found = find_sources([tmp_path / "in"], skipped)
    assert named(found) == [(SERIES, "ct"), (SERIES, "two/2-0"), (SERIES, "two/3-0")]
    assert skipped == {"of a file type that is not read here": 1}
    assert named(find_sources([tmp_path / "in" / "ct"], skipped)) == [(SERIES, "ct")]
    assert named(find_sources([tmp_path / "in" / "two" / "2-0"], skipped)) == [(SERIES, "2-0")]


def test_names_that_are_no_unicode_can_stand_in_a_table(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Path(os.fsdecode(bytes(tmp_path / "in") + b"/M\xfcller.png")).write_bytes(b"x")
    (found,) = find_sources([tmp_path / "in"], Counter())
    assert found.shown == "M\\udcfcller.png" and found.files[0] is not None and found.files[0].exists()


def test_an_empty_name_is_not_this_folder() -> None:
    with pytest.raises(UserError, match="the name of an input is empty"):
        find_sources([""], Counter())
