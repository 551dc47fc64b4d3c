"""Limits, the one error, and writing beside."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest

from fedmed.data.formats.limits import DEFAULT_LIMITS, BadFile, Limits, bad_file, file_size, write_beside
from fedmed.errors import UserError


def test_a_plane_is_held_against_side_and_pixels() -> None:
    limits = Limits(max_side=10, max_pixels=50)
    limits.check_plane(5, 10)
    for height, width, reason in (
        (11, 1, "at most 10 along an edge"),
        (6, 10, "10 x 6 pixels, at most 50 are read"),
        (0, 4, "4 x 0 pixels"),
    ):
        with pytest.raises(BadFile, match=reason):
            limits.check_plane(height, width)


def test_bytes_and_pages_are_bounded() -> None:
    limits = Limits(max_bytes=24, max_pages=3)
    assert limits.check_bytes((2, 3), 4) == 24
    assert limits.check_bytes((), 8) == 8
    with pytest.raises(BadFile, match="2 x 3 values of 8 bytes, at most 24 bytes are read"):
        limits.check_bytes((2, 3), 8)
    with pytest.raises(BadFile):
        limits.check_bytes((-1, 3), 1)
    limits.check_pages(3)
    with pytest.raises(BadFile, match="4 pages, at most 3"):
        limits.check_pages(4)


def test_many_sides_do_not_overflow() -> None:
    with pytest.raises(BadFile):
        DEFAULT_LIMITS.check_bytes((2**62, 2**62), 8)  # zero modulo 2**64


@pytest.mark.parametrize("values", [{"max_side": 0}, {"max_pixels": -1}, {"max_bytes": 1.5}, {"max_pages": True}])
def test_limits_are_whole_and_positive(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="whole number of at least 1"):
        Limits(**values)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (EOFError("x"), "truncated"),
        (OSError("image file is truncated (3 bytes not processed)"), "truncated"),
        (FileNotFoundError("/home/doe/scan.png"), "no such file"),
        (PermissionError("/home/doe"), "no permission to read the file"),
        (MemoryError(), "not enough memory for this scan"),
        (zlib.error("Error -3"), "damaged scan"),
        (struct.error("unpack"), "damaged scan"),
        (SyntaxError("broken PNG"), "damaged scan"),
        (RecursionError(), "damaged scan"),
        (KeyError("Doe^Jane"), "damaged scan"),
    ],
)
def test_every_failure_becomes_a_short_reason(error: Exception, reason: str) -> None:
    with pytest.raises(BadFile) as caught, bad_file("scan"):
        raise error
    assert str(caught.value) == reason
    assert caught.value.__cause__ is error


def test_a_reason_that_a_library_covers_up_comes_through() -> None:
    with pytest.raises(BadFile, match="too large"), bad_file("scan"):
        try:
            raise BadFile("too large")
        except BaseException:
            raise OSError("no tag to read")  # noqa: B904 - as pydicom does


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), UserError("install it"), BadFile("as it is")])
def test_what_is_no_fault_of_the_file_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, bad_file("scan"):
        raise error
    assert caught.value is error


def test_only_regular_files_of_fair_size(tmp_path: Path) -> None:
    empty, some = tmp_path / "empty", tmp_path / "some"
    empty.touch()
    some.write_bytes(b"abc")
    assert file_size(some, DEFAULT_LIMITS) == 3
    for path, reason in ((empty, "empty file"), (tmp_path, "not a regular file")):
        with pytest.raises(BadFile, match=reason):
            file_size(path, DEFAULT_LIMITS)
    with pytest.raises(BadFile, match="file of 3 bytes, at most 2 are read"):
        file_size(some, Limits(max_bytes=2))
    assert file_size(some, None) == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer for ever
    with pytest.raises(BadFile, match="not a regular file"):
        file_size(tmp_path / "pipe", DEFAULT_LIMITS)


def test_writing_beside_replaces_or_leaves_the_old(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    assert write_beside(path, lambda partial: partial.write_text("one")) == path

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_beside(path, fail)
    assert [(p.name, p.read_text()) for p in path.parent.iterdir()] == [("a.txt", "one")]
