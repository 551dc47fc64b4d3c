"""Pictures: PNG, JPEG, TIFF and BMP, read and written by Pillow within `Limits`.

What comes out: grey (H, W) uint8 (1-bit: 0 and 255) or uint16, 32-bit float TIFF (H, W) float32, colour (H, W, 3) uint8. Palettes, EXIF orientation,
CMYK and YCbCr are resolved; alpha is dropped, not composited. Colour with 16 bits per channel keeps its high byte only (Pillow).
"""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import (
    BmpImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
)

from fedmed.data.formats.limits import DEFAULT_LIMITS, BadFile, Limits, bad_file, file_size, write_beside
from fedmed.errors import UserError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
# Named by their plugins, which are thereby loaded: for an unknown name Pillow would load all of its forty.
FORMATS = tuple(
    plugin.format
    for plugin in (
        PngImagePlugin.PngImageFile,
        JpegImagePlugin.JpegImageFile,
        TiffImagePlugin.TiffImageFile,
        BmpImagePlugin.BmpImageFile,
    )
)
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"BM")
_IN_MEMORY = 64 << 20  # bytes of a file that are read in one piece; larger ones are left on the disk
_NOT_A_PICTURE = "not a PNG, JPEG, TIFF or BMP image"
_GREY = ("L", "1", "I;16", "I;16B", "I;16L", "I;16N", "I", "F", "LA", "La")
# LZMA, Zstandard and WebP are left out: their streams name the memory that decoding takes, whatever the size of the picture.
_TIFF_COMPRESSION = frozenset(
    (
        "raw",
        "packbits",
        "tiff_lzw",
        "tiff_deflate",
        "tiff_adobe_deflate",
        "jpeg",
        "tiff_jpeg",
        "tiff_ccitt",
        "group3",
        "group4",
        "tiff_raw_16",
    )
)
_TILE_WIDTH, _TILE_LENGTH, _PHOTOMETRIC, _ORIENTATION = 322, 323, 262, 274
_EXTRA_TILE = 1024  # pixels by which a tile may be wider or higher than the picture
_SAVE_AS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}

# `Limits` takes the place of this warning, which Pillow gives between 89 and 179 million pixels.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_picture(path: str | Path, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """First picture of a file, (H, W) or (H, W, 3), uint8, uint16 or float32; it may be read-only.

    A palette of greys gives (H, W), any other (H, W, 3); RGB with equal channels stays (H, W, 3). Raises `BadFile`.
    """
    with bad_file("picture"), _open(path, limits) as image:
        return _pixels(_loaded(image))


def read_levels(path: str | Path, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """Grey levels of a mask, (H, W) uint8 or uint16; 1-bit masks have 0 and 255.

    Palettes are looked up (their indices may be the other way round), RGB(A) with equal channels becomes grey, whole numbers stored as float become
    integers. Raises `BadFile`, also for a mask in colour, whose levels are not defined.
    """
    with bad_file("picture"), _open(path, limits) as image:
        pixels = _pixels(_loaded(image))
        if pixels.ndim == 3:
            first = pixels[..., 0]
            if not (np.array_equal(first, pixels[..., 1]) and np.array_equal(first, pixels[..., 2])):
                raise BadFile("a mask in colour, grey levels are needed")
            pixels = np.ascontiguousarray(first)
        return _whole(pixels) if pixels.dtype == np.float32 else pixels


def picture_size(path: str | Path, limits: Limits = DEFAULT_LIMITS) -> tuple[int, int]:
    """(H, W) of the first picture as `read_picture` gives it, from the header; raises `BadFile`."""
    with bad_file("picture"), _open(path, limits) as image:
        width, height = image.size
        return (width, height) if _turned(image) > 4 else (height, width)


def read_pages(path: str | Path, limits: Limits = DEFAULT_LIMITS) -> list[np.ndarray]:
    """All pages of a TIFF, or the first picture of another file, each as `read_picture` gives it.

    `limits.max_bytes` holds for all pages together, `limits.max_pages` for their number. Raises `BadFile`.
    """
    with bad_file("picture"), _open(path, limits) as image:
        pages = [_pixels(_loaded(image))]
        size = pages[0].nbytes
        while image.format == "TIFF":
            try:
                image.seek(len(pages))
            except EOFError:
                break
            limits.check_pages(len(pages) + 1)
            _check(image, limits)
            pages.append(_pixels(_loaded(image)))
            size += pages[-1].nbytes
            limits.check_bytes((size,), 1)
        return pages


def write_picture(path: str | Path, array: np.ndarray) -> Path:
    """Write (H, W) or (H, W, 3) as PNG, TIFF or JPEG, by the suffix of `path`; a reader sees the old file or all of the new.

    uint8 and bool (0 and 255) fit all of them, grey uint16 PNG and TIFF, grey float32 TIFF. Raises UserError for anything else.
    """
    path = Path(path)
    kind = _SAVE_AS.get(path.suffix.lower())
    if kind is None:
        raise UserError(
            f"Cannot write {path.name}: the suffix must be one of {', '.join(_SAVE_AS)}, got {path.suffix!r}."
        )
    image = _image(np.asarray(array), kind)
    return write_beside(path, lambda partial: image.save(partial, format=kind))


def _open(path: str | Path, limits: Limits) -> Image.Image:
    size = file_size(path, limits)
    whole = size <= _IN_MEMORY
    with open(path, "rb") as stream:  # noqa: PTH123 - on the path of every picture
        data = stream.read(size if whole else len(_MAGIC[0]))
    try:  # from memory no length that a header declares can ask for more than the file has
        image = Image.open(BytesIO(data) if whole else path, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadFile(f"more than {limits.max_pixels} pixels") from error
    except UnidentifiedImageError as error:
        raise BadFile("damaged picture" if data.startswith(_MAGIC) else _NOT_A_PICTURE) from error
    try:
        _check(image, limits)
    except BaseException:
        image.close()
        raise
    return image


def _check(image: Image.Image, limits: Limits) -> None:
    width, height = image.size
    limits.check_plane(height, width)
    limits.check_bytes((height, width), 4)  # Pillow holds a pixel in four bytes at most
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        if image.info.get("compression") not in _TIFF_COMPRESSION:
            raise BadFile("a TIFF compression that is not read")
        tile = image.tag_v2.get(_TILE_WIDTH, 0), image.tag_v2.get(_TILE_LENGTH, 0)
        if max(tile) > max(width, height) + _EXTRA_TILE:
            raise BadFile("tiles that are larger than the picture")


def _turned(image: Image.Image) -> int:
    """EXIF orientation 1 to 8 that is still to be applied; Pillow does it itself for TIFF."""
    if image.format == "TIFF" or "exif" not in image.info:
        return 1
    value = image.getexif().get(_ORIENTATION, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _loaded(image: Image.Image) -> Image.Image:
    """The decoded picture, upright."""
    turned = _turned(image)
    inverted = (
        image.mode.startswith("I;16")
        and isinstance(image, TiffImagePlugin.TiffImageFile)
        and image.tag_v2.get(_PHOTOMETRIC) == 0
    )
    image.load()
    if inverted:  # "white is zero": Pillow turns 8-bit values round, but not 16-bit ones
        return Image.fromarray(65535 - np.asarray(image, dtype=np.int32))
    return image if turned == 1 else ImageOps.exif_transpose(image)


def _pixels(image: Image.Image) -> np.ndarray:
    mode = image.mode
    if mode in ("L", "RGB"):
        return np.asarray(image)
    if mode == "1":
        return np.asarray(image.convert("L"))
    if mode == "F":
        return np.asarray(image, dtype=np.float32)
    if mode in ("LA", "La"):
        return np.asarray(image.getchannel(0))
    if mode in _GREY:  # 16 and 32-bit integers
        return _unsigned16(np.asarray(image))
    if mode in ("P", "PA") and _grey_palette(image):
        return np.asarray(image.convert("L"))  # exact: the weights of red, green and blue add up to one
    return np.asarray(image.convert("RGB"))


def _grey_palette(image: Image.Image) -> bool:
    colours = np.asarray(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())


def _unsigned16(values: np.ndarray) -> np.ndarray:
    if values.dtype.itemsize > 2 and values.size and (values.min() < 0 or values.max() > 65535):
        raise BadFile("whole numbers outside 0..65535")
    return values.astype(np.uint16, copy=False)


def _whole(values: np.ndarray) -> np.ndarray:
    """Levels stored as float32 in the smallest unsigned type."""
    if not np.isfinite(values).all() or (values != np.round(values)).any() or values.min() < 0 or values.max() > 65535:
        raise BadFile("a mask of fractions, whole numbers in 0..65535 are needed")
    return values.astype(np.uint8 if values.max() <= 255 else np.uint16)


def _image(array: np.ndarray, kind: str) -> Image.Image:
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    grey = array.ndim == 2
    fits = grey or (array.ndim == 3 and array.shape[2] == 3)
    if fits and array.size and array.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(array))
    if fits and array.size and grey and array.dtype == np.uint16 and kind != "JPEG":
        return Image.frombytes("I;16", (array.shape[1], array.shape[0]), array.astype("<u2").tobytes())
    if fits and array.size and grey and array.dtype == np.float32 and kind == "TIFF":
        return Image.fromarray(np.ascontiguousarray(array))
    raise UserError(
        f"Cannot write {array.dtype} of shape {array.shape} as {kind}. Give (H, W) or (H, W, 3) uint8; grey may also be uint16 (PNG, TIFF) or float32 (TIFF)."
    )
