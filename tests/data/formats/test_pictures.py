"""Pictures: every mode of Pillow that a medical set may hold, by hand-made arrays of a few pixels."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from fedmed.data.formats import pictures
from fedmed.data.formats.limits import BadFile, Limits
from fedmed.data.formats.pictures import picture_size, read_levels, read_pages, read_picture, write_picture
from fedmed.errors import UserError

GREY = np.array([[0, 50, 100], [150, 200, 255]], dtype=np.uint8)
RGB = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)
MASKS = (
    Path(__file__).resolve().parents[4] / "shared" / "data" / "raw_ham10000" / "HAM10000_segmentations_lesion_tschandl"
)


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Equal shape, type and values."""
    return found.dtype == expected.dtype and np.array_equal(found, expected)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_grey_and_colour_come_as_they_are(tmp_path: Path, suffix: str) -> None:
    for array in (GREY, RGB):
        path = save(Image.fromarray(array), tmp_path / f"a{suffix}")
        assert same(read_picture(path), array)
        assert picture_size(path) == (2, 3)


def test_equal_channels_stay_colour_but_become_grey_levels(tmp_path: Path) -> None:
    path = save(Image.fromarray(np.stack([GREY] * 3, axis=-1)), tmp_path / "a.png")
    assert read_picture(path).shape == (2, 3, 3)
    assert same(read_levels(path), GREY)


def test_levels_of_a_colour_picture_are_refused(tmp_path: Path) -> None:
    path = save(Image.fromarray(RGB), tmp_path / "a.png")
    with pytest.raises(BadFile, match="a mask in colour"):
        read_levels(path)


def test_one_bit_becomes_0_and_255(tmp_path: Path) -> None:
    path = save(Image.fromarray(GREY > 120).convert("1"), tmp_path / "a.png")
    expected = np.array([[0, 0, 0], [255, 255, 255]], dtype=np.uint8)
    assert same(read_picture(path), expected)
    assert same(read_levels(path), expected)


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_alpha_is_dropped_not_composited(tmp_path: Path, alpha: int) -> None:
    plane = np.full_like(GREY, alpha)
    grey = save(Image.fromarray(np.stack([GREY, plane], axis=-1)), tmp_path / "la.png")
    colour = save(Image.fromarray(np.dstack([RGB, plane])), tmp_path / "rgba.png")
    same_channels = save(Image.fromarray(np.dstack([GREY] * 3 + [plane])), tmp_path / "grey.png")
    assert same(read_picture(grey), GREY)
    assert same(read_picture(colour), RGB)
    assert same(read_levels(same_channels), GREY)


def palette_picture(indices: list[list[int]], colours: list[int]) -> Image.Image:
    array = np.array(indices, dtype=np.uint8)
    image = Image.frombytes("P", array.shape[::-1], array.tobytes())
    image.putpalette(colours)
    return image


def test_an_inverted_palette_is_looked_up(tmp_path: Path) -> None:
    path = save(palette_picture([[0, 1], [1, 0]], [255, 255, 255, 0, 0, 0]), tmp_path / "a.png")
    expected = np.array([[255, 0], [0, 255]], dtype=np.uint8)
    assert same(read_levels(path), expected)
    assert same(read_picture(path), expected)


def test_a_palette_of_colours_gives_rgb(tmp_path: Path) -> None:
    path = save(palette_picture([[0, 1], [2, 0]], [0, 0, 0, 10, 20, 30, 7, 7, 7]), tmp_path / "a.png")
    expected = np.array([[[0, 0, 0], [10, 20, 30]], [[7, 7, 7], [0, 0, 0]]], dtype=np.uint8)
    assert same(read_picture(path), expected)
    with pytest.raises(BadFile, match="a mask in colour"):
        read_levels(path)


def test_levels_look_only_at_colours_in_use(tmp_path: Path) -> None:
    path = save(palette_picture([[0, 2], [2, 0]], [0, 0, 0, 10, 20, 30, 7, 7, 7]), tmp_path / "a.png")
    assert same(read_levels(path), np.array([[0, 7], [7, 0]], dtype=np.uint8))


@pytest.mark.skipif(not MASKS.is_dir(), reason="no sample of HAM10000 beside the checkout")
def test_the_palette_masks_of_ham10000_keep_their_polarity() -> None:
    palettes = [path for path in sorted(MASKS.glob("*.png")) if Image.open(path).mode == "P"]
    assert len(palettes) == 3
    for path in palettes:
        levels, indices = read_levels(path), np.asarray(Image.open(path))
        assert set(np.unique(levels)) == {0, 255}
        assert ((levels == 255) == (indices == 0)).all()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_stay(tmp_path: Path, suffix: str) -> None:
    array = GREY.astype(np.uint16) * 257
    path = write_picture(tmp_path / f"a{suffix}", array)
    assert same(read_picture(path), array)
    assert same(read_levels(path), array)


def tiff(
    path: Path, pixels: bytes, bits: int, photometric: int, sample_format: int = 1, order: str = "<", **tags: int
) -> Path:
    """A bare TIFF of 3 x 2 pixels in one strip."""
    entries = {
        256: 3,
        257: 2,
        258: bits,
        259: 1,
        262: photometric,
        273: 0,
        277: 1,
        278: 2,
        279: len(pixels),
        339: sample_format,
    }
    entries.update({int(key[1:]): value for key, value in tags.items()})
    entries[273] = 8 + 2 + 12 * len(entries) + 4
    body = struct.pack(f"{order}H", len(entries))
    for tag, value in sorted(entries.items()):
        body += struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", value)
    mark = b"II" if order == "<" else b"MM"
    path.write_bytes(mark + struct.pack(f"{order}HI", 42, 8) + body + b"\0" * 4 + pixels)
    return path


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_of_16_bits_in_both_byte_orders(tmp_path: Path, order: str) -> None:
    values = np.array([[0, 1, 2], [300, 40000, 65535]], dtype=np.uint16)
    path = tiff(tmp_path / "a.tif", values.astype(f"{order}u2").tobytes(), 16, photometric=1, order=order)
    assert same(read_picture(path), values)


def test_tiff_of_16_bits_with_white_as_zero_is_turned_round(tmp_path: Path) -> None:
    values = np.array([[0, 1, 2], [300, 40000, 65535]], dtype=np.uint16)
    path = tiff(tmp_path / "a.tif", values.astype("<u2").tobytes(), 16, photometric=0)
    assert same(read_picture(path), 65535 - values)
    eight = tiff(tmp_path / "b.tif", GREY.tobytes(), 8, photometric=0)
    assert same(read_picture(eight), 255 - GREY)


def test_whole_numbers_of_32_bits_must_fit_16(tmp_path: Path) -> None:
    fits = np.array([[0, 1, 2], [300, 40000, 65535]], dtype=np.int32)
    assert same(read_picture(tiff(tmp_path / "a.tif", fits.tobytes(), 32, 1, sample_format=2)), fits.astype(np.uint16))
    for wrong in (65536, -1):
        path = tiff(tmp_path / "b.tif", (fits * 0 + wrong).astype(np.int32).tobytes(), 32, 1, sample_format=2)
        with pytest.raises(BadFile, match=r"outside 0\.\.65535"):
            read_picture(path)


def test_float_tiff_stays_float_and_its_whole_levels_become_integers(tmp_path: Path) -> None:
    values = np.array([[0, 1, 2], [3, 4, 300]], dtype=np.float32)
    path = write_picture(tmp_path / "a.tif", values)
    assert same(read_picture(path), values)
    assert same(read_levels(path), values.astype(np.uint16))
    for wrong in (0.5, np.nan, -1, 70000):
        path = write_picture(tmp_path / "b.tif", np.full((2, 2), wrong, np.float32))
        with pytest.raises(BadFile, match="a mask of fractions"):
            read_levels(path)


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    ink = np.zeros((2, 2, 4), dtype=np.uint8)
    ink[0, 0] = (255, 0, 0, 0)  # cyan takes the red away
    ink[1, 1] = (0, 0, 0, 255)
    path = save(Image.frombytes("CMYK", (2, 2), ink.tobytes()), tmp_path / "a.tif")
    expected = np.full((2, 2, 3), 255, dtype=np.uint8)
    expected[0, 0, 0] = 0
    expected[1, 1] = 0
    assert same(read_picture(path), expected)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.T),
        (6, lambda a: a[::-1].T),
        (7, lambda a: a[::-1, ::-1].T),
        (8, lambda a: a.T[::-1]),
        (99, lambda a: a),
    ],
)
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, upright: Any) -> None:
    blocks = np.kron(np.array([[0, 100, 200], [255, 150, 50]], dtype=np.uint8), np.ones((16, 16), dtype=np.uint8))
    exif = Image.Exif()
    exif[274] = orientation
    for suffix, options in ((".jpg", {"quality": 100}), (".png", {}), (".tif", {})):
        path = save(Image.fromarray(blocks), tmp_path / f"a{suffix}", exif=exif, **options)
        found = read_picture(path)
        expected = upright(blocks)
        assert found.shape == expected.shape == picture_size(path), suffix
        assert np.abs(found.astype(int) - expected).max() <= 3, suffix


def test_pages_of_a_tiff(tmp_path: Path) -> None:
    second = 255 - GREY[:, :2]
    path = save(
        Image.fromarray(GREY),
        tmp_path / "a.tif",
        save_all=True,
        append_images=[Image.fromarray(second), Image.fromarray(RGB)],
    )
    assert same(read_picture(path), GREY)
    pages = read_pages(path)
    assert [page.shape for page in pages] == [(2, 3), (2, 2), (2, 3, 3)]
    assert same(pages[1], second)
    assert same(pages[2], RGB)
    with pytest.raises(BadFile, match="3 pages, at most 2"):
        read_pages(path, Limits(max_pages=2))


def test_bytes_of_all_pages_are_bounded(tmp_path: Path) -> None:
    pages = [Image.new("L", (20, 20))] * 5
    path = save(pages[0], tmp_path / "a.tif", save_all=True, append_images=pages[1:], compression="tiff_adobe_deflate")
    assert path.stat().st_size < 1700
    assert len(read_pages(path, Limits(max_bytes=2000))) == 5
    with pytest.raises(BadFile, match="at most 1700 bytes"):
        read_pages(path, Limits(max_bytes=1700))


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    path = save(Image.fromarray(GREY), tmp_path / "a.png", save_all=True, append_images=[Image.fromarray(255 - GREY)])
    assert same(read_picture(path), GREY)
    assert len(read_pages(path)) == 1


def test_only_the_named_formats_are_reachable(tmp_path: Path) -> None:
    for kind in ("GIF", "PPM", "WEBP", "TGA", "ICO"):
        path = tmp_path / "a.png"
        Image.fromarray(GREY).save(path, format=kind)
        with pytest.raises(BadFile, match="not a PNG, JPEG, TIFF or BMP image"):
            read_picture(path)


def test_what_is_no_picture_says_so_without_its_name(tmp_path: Path) -> None:
    path = tmp_path / "Doe_Jane.png"
    path.write_text("Dear Dr House")
    with pytest.raises(BadFile) as caught:
        read_picture(path)
    assert str(caught.value) == "not a PNG, JPEG, TIFF or BMP image"
    for wrong, reason in ((path.with_name("Doe.png"), "no such file"), (tmp_path, "not a regular file")):
        with pytest.raises(BadFile, match=reason) as caught:
            picture_size(wrong)
        assert "Doe" not in str(caught.value)


def test_size_is_checked_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(Image.new("L", (300, 200)), tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for limits in (Limits(max_side=299), Limits(max_pixels=59_999), Limits(max_bytes=239_999)):
        for read in (read_picture, read_levels, picture_size, read_pages):
            with pytest.raises(BadFile, match="300"):
                read(path, limits)


def test_a_tiff_compression_or_tile_that_asks_for_memory_is_refused(tmp_path: Path) -> None:
    path = tiff(tmp_path / "a.tif", GREY.tobytes(), 8, 1, t322=40_000, t323=40_000)
    with pytest.raises(BadFile, match="tiles that are larger"):
        read_picture(path)
    for name in ("lzma", "zstd"):
        try:
            path = save(Image.fromarray(GREY), tmp_path / "b.tif", compression=name)
        except OSError:
            continue  # this Pillow was built without it
        with pytest.raises(BadFile, match="a TIFF compression that is not read"):
            read_picture(path)


@pytest.mark.parametrize("name", ["raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate"])
def test_the_usual_tiff_compressions_are_read(tmp_path: Path, name: str) -> None:
    assert name in pictures._TIFF_COMPRESSION
    assert set(pictures._TIFF_COMPRESSION) - {"raw"} <= set(TiffImagePlugin.COMPRESSION_INFO.values())
    for array in (GREY, RGB):
        assert same(read_picture(save(Image.fromarray(array), tmp_path / "a.tif", compression=name)), array)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("a.png", GREY),
        ("a.PNG", RGB),
        ("a.tiff", RGB),
        ("a.png", GREY > 99),
        ("a.tif", GREY / np.float32(3)),
        ("a.tif", GREY.astype(np.uint16) * 200),
    ],
)
def test_what_is_written_is_read_back(tmp_path: Path, name: str, array: np.ndarray) -> None:
    path = write_picture(tmp_path / "new" / name, array)
    expected = array.astype(np.uint8) * 255 if array.dtype == bool else array
    assert same(read_picture(path), expected)
    assert [p.name for p in path.parent.iterdir()] == [name]


def test_a_large_file_stays_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = save(Image.fromarray(RGB), tmp_path / "a.png")
    monkeypatch.setattr(pictures, "_IN_MEMORY", small.stat().st_size - 1)
    monkeypatch.setattr(pictures, "BytesIO", lambda data: pytest.fail("read in one piece"))
    assert same(read_picture(small), RGB)
    path = tmp_path / "b.png"
    path.write_bytes(b"x" * 1000)
    with pytest.raises(BadFile, match="not a PNG"):
        read_picture(path)


def test_a_jpeg_is_written(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.jpg", np.full((8, 8, 3), 77, np.uint8))
    assert path.read_bytes()[:3] == b"\xff\xd8\xff"
    assert np.abs(read_picture(path).astype(int) - 77).max() <= 1


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("a.gif", GREY),
        ("a", GREY),
        ("a.jpg", GREY.astype(np.uint16)),
        ("a.png", GREY.astype(np.float32)),
        ("a.png", GREY.astype(np.int64)),
        ("a.png", np.zeros((2, 2, 4), np.uint8)),
        ("a.png", np.zeros((0, 2), np.uint8)),
    ],
)
def test_what_cannot_be_written_is_the_users_fault_and_leaves_nothing(
    tmp_path: Path, name: str, array: np.ndarray
) -> None:
    with pytest.raises(UserError, match="Cannot write"):
        write_picture(tmp_path / name, array)
    assert list(tmp_path.iterdir()) == []
