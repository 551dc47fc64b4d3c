"""Arrays of .npz archives: what is read, and what is refused."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fedmed.data.formats.archive import read_npz
from fedmed.data.formats.limits import BadFile, Limits

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


def npy(array: np.ndarray, **options: bool) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_named_arrays_are_read(tmp_path: Path, save: object) -> None:
    save(
        tmp_path / "a.npz",
        image=ARRAY,
        turned=np.asfortranarray(ARRAY),
        empty=np.zeros((0, 3)),
        number=np.int64(7),
        words=np.array(["a", "bc"]),
    )  # type: ignore[operator]
    found = read_npz(tmp_path / "a.npz", ["turned", "image", "empty", "number", "words"])
    assert list(found) == ["turned", "image", "empty", "number", "words"]
    for name in ("image", "turned"):
        assert np.array_equal(found[name], ARRAY)
        assert found[name].dtype == np.float32
    assert found["empty"].shape == (0, 3)
    assert found["number"][()] == 7
    assert found["words"].tolist() == ["a", "bc"]


def test_only_the_named_arrays_are_touched(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.npz", {"image": npy(ARRAY), "broken": b"nothing"})
    assert list(read_npz(path, ["image"])) == ["image"]
    with pytest.raises(BadFile, match="damaged npz archive"):
        read_npz(path, ["image", "broken"])
    with pytest.raises(BadFile, match="no array 'mask'"):
        read_npz(path, ["mask"])


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))

    path = archive(tmp_path / "a.npz", {"image": npy(np.array([Bomb()], dtype=object), allow_pickle=True)})
    with pytest.raises(BadFile, match="an array of objects"):
        read_npz(path, ["image"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("array", [np.zeros(2, [("a", "i4")]), np.zeros(2, complex), np.zeros(2, "M8[s]")])
def test_other_kinds_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    with pytest.raises(BadFile, match="an array of objects"):
        read_npz(archive(tmp_path / "a.npz", {"image": npy(array)}), ["image"])


def test_shape_and_bytes_must_agree(tmp_path: Path) -> None:
    data = npy(ARRAY)
    for wrong in (data[:-1], data + b"\0", data.replace(b"(2, 3)", b"(2, 4)"), data.replace(b"(2, 3)", b"(2, 2)")):
        with pytest.raises(BadFile, match="another number of bytes"):
            read_npz(archive(tmp_path / "a.npz", {"image": wrong}), ["image"])


def test_a_size_beyond_the_limit_is_refused_before_reading(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.npz", {"image": npy(ARRAY)})
    assert read_npz(path, ["image"], Limits(max_bytes=path.stat().st_size))["image"].shape == (2, 3)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (99_999, 99_999, 99)}
    )
    with pytest.raises(BadFile, match="99999 x 99999 x 99 values of 8 bytes"):
        read_npz(archive(tmp_path / "b.npz", {"image": header.getvalue()}), ["image"])


def test_a_directory_that_lies_about_the_size(tmp_path: Path) -> None:
    big = npy(np.zeros(100_000, np.uint8))
    path = archive(tmp_path / "a.npz", {"image": big})
    data = path.read_bytes()
    small = len(npy(np.zeros(10, np.uint8)))
    lied = data.replace(struct.pack("<I", len(big)), struct.pack("<I", small))
    assert lied != data
    path.write_bytes(lied)
    with pytest.raises(BadFile):
        read_npz(path, ["image"])


def test_a_damaged_checksum_is_found(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.npz", {"image": npy(ARRAY)}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[data.index(ARRAY.tobytes())] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BadFile, match="damaged npz archive"):
        read_npz(path, ["image"])


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packers_that_name_their_memory_are_refused(tmp_path: Path, compression: int) -> None:
    with pytest.raises(BadFile, match="a zip compression that is not read"):
        read_npz(archive(tmp_path / "a.npz", {"image": npy(ARRAY)}, compression), ["image"])


def test_what_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(npy(ARRAY))
    with pytest.raises(BadFile, match="not a npz archive"):
        read_npz(path, ["image"])
