"""HDF5 of unknown origin: plain data is read; links elsewhere, virtual data, objects, foreign filters and bombs are refused."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from fedmed.data.formats.h5slice import read_h5
from fedmed.data.formats.limits import BadFile, Limits

ARRAY = np.arange(200, dtype=np.uint16).reshape(10, 20)


def make(path: Path, fill: Callable[[h5py.File], object]) -> Path:
    with h5py.File(path, "w") as file:
        fill(file)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunks": (4, 7)},
        {"compression": "gzip", "shuffle": True, "chunks": (4, 7)},
        {"compression": "lzf"},
        {"compression": "gzip", "fletcher32": True},
    ],
)
def test_plain_data_is_read(tmp_path: Path, options: dict[str, Any]) -> None:
    path = make(tmp_path / "a.h5", lambda file: file.create_dataset("group/image", data=ARRAY, **options))
    found = read_h5(path, ["group/image"])["group/image"]
    assert found.dtype == np.uint16
    assert np.array_equal(found, ARRAY)


@pytest.mark.skipif("szip" not in h5py.filters.encode, reason="this h5py cannot write szip")
def test_szip_is_read(tmp_path: Path) -> None:
    path = make(tmp_path / "a.h5", lambda file: file.create_dataset("image", data=ARRAY, compression="szip"))
    assert np.array_equal(read_h5(path, ["image"])["image"], ARRAY)


def test_numbers_strings_of_fixed_length_and_nothing(tmp_path: Path) -> None:
    def fill(file: h5py.File) -> None:
        file["number"] = np.float32(2.5)
        file["flags"] = np.array([True, False])
        file["words"] = np.array([b"ab", b"c"])
        file["none"] = np.zeros((0, 4), np.int8)

    found = read_h5(make(tmp_path / "a.h5", fill), ["number", "flags", "words", "none"])
    assert found["number"][()] == 2.5
    assert found["flags"].tolist() == [True, False]
    assert found["words"].tolist() == [b"ab", b"c"]
    assert found["none"].shape == (0, 4)


def test_soft_links_inside_are_followed_and_others_refused(tmp_path: Path) -> None:
    make(tmp_path / "secret.h5", lambda file: file.create_dataset("image", data=ARRAY))

    def fill(file: h5py.File) -> None:
        file["deep/data"] = ARRAY
        file["inside"] = h5py.SoftLink("/deep/data")
        file["deep/beside"] = h5py.SoftLink("./data")
        file["dangling"] = h5py.SoftLink("/nowhere")
        file["a"] = h5py.SoftLink("/b")
        file["b"] = h5py.SoftLink("/a")
        file["outside"] = h5py.ExternalLink("secret.h5", "/image")
        file["folder"] = h5py.ExternalLink("secret.h5", "/")
        file["through"] = h5py.SoftLink("/folder/image")

    path = make(tmp_path / "a.h5", fill)
    for name in ("inside", "deep/beside"):
        assert np.array_equal(read_h5(path, [name])[name], ARRAY)
    for name, reason in {
        "outside": "a link to another file",
        "folder/image": "a link to another file",
        "through": "a link to another file",
        "dangling": "no dataset 'dangling'",
        "a": "links that lead in a circle",
        "deep": "no dataset 'deep'",
        "deep/data/more": "no dataset",
        "": "no dataset",
    }.items():
        with pytest.raises(BadFile, match=reason):
            read_h5(path, [name])


def test_data_in_other_files_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "secret.h5", lambda file: file.create_dataset("image", data=ARRAY))
    (tmp_path / "raw.bin").write_bytes(ARRAY.tobytes())

    def fill(file: h5py.File) -> None:
        layout = h5py.VirtualLayout((10, 20), np.uint16)
        layout[:] = h5py.VirtualSource("secret.h5", "image", (10, 20))
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset(
            "external", (10, 20), np.uint16, external=[(str(tmp_path / "raw.bin"), 0, h5py.h5f.UNLIMITED)]
        )

    path = make(tmp_path / "a.h5", fill)
    with h5py.File(path) as file:
        assert np.array_equal(file["virtual"][()], ARRAY)  # HDF5 itself would read them
        assert np.array_equal(file["external"][()], ARRAY)
    for name in ("virtual", "external"):
        with pytest.raises(BadFile, match="data in another file"):
            read_h5(path, [name])


def test_objects_and_odd_types_are_refused(tmp_path: Path) -> None:
    def fill(file: h5py.File) -> None:
        file["words"] = ["a", "bcd"]
        file.create_dataset("ragged", (2,), h5py.vlen_dtype(np.int32))
        file.create_dataset("reference", (2,), h5py.ref_dtype)
        file["record"] = np.zeros(2, [("a", "i4")])
        file["complex"] = np.zeros(2, complex)
        file["null"] = h5py.Empty("f")

    path = make(tmp_path / "a.h5", fill)
    for name in ("words", "ragged", "reference", "record", "complex", "null"):
        with pytest.raises(BadFile, match="an array of objects"):
            read_h5(path, [name])


def test_size_is_checked_before_reading(tmp_path: Path) -> None:
    path = make(tmp_path / "a.h5", lambda file: file.create_dataset("image", (10**6, 10**6), np.uint8, chunks=(64, 64)))
    with pytest.raises(BadFile, match="1000000 x 1000000 values of 1 bytes"):
        read_h5(path, ["image"])
    small = make(
        tmp_path / "b.h5",
        lambda file: file.create_dataset("image", data=np.zeros(100_000, np.uint8), compression="gzip"),
    )
    assert read_h5(small, ["image"], Limits(max_bytes=100_000))["image"].shape == (100_000,)
    with pytest.raises(BadFile, match="at most 99999 bytes"):
        read_h5(small, ["image"], Limits(max_bytes=99_999))


def test_a_chunk_larger_than_allowed_is_refused(tmp_path: Path) -> None:
    path = make(
        tmp_path / "a.h5",
        lambda file: file.create_dataset("image", (2,), np.uint8, chunks=(10_000_000,), maxshape=(None,)),
    )
    with pytest.raises(BadFile, match="10000000 values"):
        read_h5(path, ["image"], Limits(max_bytes=1_000_000))


def test_other_filters_are_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "a.h5", lambda file: file.create_dataset("image", data=ARRAY, scaleoffset=0, chunks=(5, 5)))
    with pytest.raises(BadFile, match="an HDF5 filter that is not read"):
        read_h5(path, ["image"])
    twice = tmp_path / "b.h5"
    with h5py.File(twice, "w") as file:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((5, 5))
        plan.set_deflate(1)
        plan.set_deflate(1)
        h5py.h5d.create(file.id, b"image", h5py.h5t.NATIVE_UINT16, h5py.h5s.create_simple((5, 5)), plan)
    with pytest.raises(BadFile, match="packed twice"):
        read_h5(twice, ["image"])


def bomb(path: Path, unpacked: int, filter_mask: int = 0, shuffle: bool = True) -> Path:
    """A chunk of 64 x 64 bytes whose stored stream unpacks to `unpacked` bytes."""
    with h5py.File(path, "w") as file:
        image = file.create_dataset("image", (64, 64), np.uint8, chunks=(64, 64), compression="gzip", shuffle=shuffle)
        image.id.write_direct_chunk((0, 0), zlib.compress(b"\0" * unpacked, 9), filter_mask)
    return path


def test_a_chunk_whose_stored_bytes_exceed_it_is_refused(tmp_path: Path) -> None:
    assert read_h5(bomb(tmp_path / "a.h5", 64 * 64), ["image"])["image"].shape == (64, 64)
    with pytest.raises(BadFile, match="chunk that is larger than it declares"):
        read_h5(bomb(tmp_path / "b.h5", 64 << 20), ["image"])


@pytest.mark.parametrize("mask", [0, 1])
def test_a_chunk_that_unpacks_to_more_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: int) -> None:
    from fedmed.data.formats import h5slice

    monkeypatch.setattr(
        h5slice, "_UNCHECKED", 1 << 20
    )  # 4 KiB of stream could otherwise give only 4 MiB, which is let pass
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda *_: pytest.fail("was read"))
    with pytest.raises(BadFile, match="unpacks to more than it declares"):
        read_h5(bomb(tmp_path / "a.h5", 3 << 20, filter_mask=mask), ["image"])


def test_what_is_no_hdf5_file(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(BadFile, match="not an HDF5 file"):
        read_h5(path, ["image"])
    with pytest.raises(BadFile, match="no such file"):
        read_h5(tmp_path / "none.h5", ["image"])
