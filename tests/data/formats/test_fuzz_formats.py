"""Damaged and hostile files of every format: each ends in an array or in `BadFile`, and takes no more memory than it may.

Damage: cut short, bytes changed, another format under the name. Bombs, which declare or unpack to far more than they hold, are read in a process of its own
that may take 300 MB more than it has after its imports; what plain library calls do there shows that the bombs are real.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless

from fedmed.data.formats.archive import read_npz
from fedmed.data.formats.dicom import find_series
from fedmed.data.formats.h5slice import read_h5
from fedmed.data.formats.limits import BadFile
from fedmed.data.formats.nifti import Nifti
from fedmed.data.formats.pictures import picture_size, read_levels, read_pages, read_picture

CHANGED, CUTS = 120, 20  # damaged copies of every sample
GREY = np.random.default_rng(0).integers(0, 256, (24, 21), dtype=np.uint8)
RGB = np.stack([GREY, GREY[::-1], GREY], axis=-1)
ZEROS = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
MEGABYTE = ZEROS.compress(bytes(1 << 20)) + ZEROS.flush(zlib.Z_FULL_FLUSH)  # deflated zeros that may be repeated


def read_any_picture(path: Path) -> None:
    picture_size(path)
    read_pages(path)
    try:
        read_levels(path)
    except BadFile:
        read_picture(path)


def read_any_nifti(path: Path) -> None:
    volume = Nifti.open(path)
    volume.slice(0)
    volume.slice(0, axis=1)
    volume.volume()


def read_any_dicom(path: Path) -> None:
    """Read every slice; raise what was the matter with a file that was left out."""

    def left_out(_: Path, reason: str) -> None:
        raise BadFile(reason)

    for series in find_series(path, on_bad=left_out):
        for index in range(len(series)):
            series.read(index, "auto")


def read_any_npz(path: Path) -> None:
    read_npz(path, ["image", "mask"])


def read_any_h5(path: Path) -> None:
    read_h5(path, ["image", "group/mask"])


READERS: dict[str, Callable[[Path], None]] = {
    ".png": read_any_picture,
    ".jpg": read_any_picture,
    ".tif": read_any_picture,
    ".bmp": read_any_picture,
    ".nii": read_any_nifti,
    ".nii.gz": read_any_nifti,
    ".npz": read_any_npz,
    ".h5": read_any_h5,
    ".dcm": read_any_dicom,
}


def suffix_of(name: str) -> str:
    return next(suffix for suffix in (".nii.gz", Path(name).suffix) if name.endswith(suffix))


def make_samples(folder: Path, write_dicom: Callable[..., Path]) -> None:
    """One small valid file of every kind."""
    grey, rgb = Image.fromarray(GREY), Image.fromarray(RGB)
    exif = Image.Exif()
    exif[274] = 6
    grey.save(folder / "grey.png")
    grey.convert("P").save(folder / "palette.png", save_all=True, append_images=[grey.convert("P").rotate(90)])
    rgb.save(folder / "exif.jpg", exif=exif)
    rgb.save(folder / "lzw.tif", compression="tiff_lzw")
    grey.save(folder / "pages.tif", save_all=True, append_images=[grey, grey])
    rgb.save(folder / "colour.bmp")
    volume = nibabel.Nifti1Image(GREY.reshape(4, 6, 21).astype(np.int16), np.eye(4))
    volume.header.set_slope_inter(2, 1)
    for name in ("volume.nii", "volume.nii.gz"):
        nibabel.save(volume, folder / name)
    np.savez(folder / "plain.npz", image=GREY, mask=RGB)
    np.savez_compressed(folder / "packed.npz", image=GREY, mask=RGB)
    for name, options in (("plain.h5", {}), ("packed.h5", {"compression": "gzip", "shuffle": True, "chunks": (8, 8)})):
        with h5py.File(folder / name, "w") as file:
            file.create_dataset("image", data=GREY, **options)
            file["group/mask"] = GREY
    write_dicom(
        folder / "plain.dcm",
        GREY.astype(np.uint16),
        WindowCenter=100,
        WindowWidth=50,
        RescaleSlope=1,
        RescaleIntercept=-3,
    )
    dataset = pydicom.dcmread(write_dicom(folder / "rle.dcm", np.stack([GREY, GREY])))
    dataset.compress(RLELossless, generate_instance_uid=False)
    dataset.save_as(folder / "rle.dcm")
    with (folder / "frame.jpg").open("w+b") as stream:
        grey.save(stream, "JPEG")
        stream.seek(0)
        frame = stream.read()
    dataset = pydicom.dcmread(write_dicom(folder / "jpeg.dcm", GREY))
    dataset.PixelData = pydicom.encaps.encapsulate([frame])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.save_as(folder / "jpeg.dcm")
    write_dicom(folder / "deflated.dcm", GREY, syntax=DeflatedExplicitVRLittleEndian)


SAMPLES = """grey.png palette.png exif.jpg lzw.tif pages.tif colour.bmp volume.nii volume.nii.gz plain.npz packed.npz plain.h5 packed.h5
plain.dcm rle.dcm jpeg.dcm deflated.dcm""".split()  # noqa: SIM905


def damaged(data: bytes, seed: str) -> Iterator[bytes]:
    """Copies cut at many places, then copies with some bytes changed, most of them near the front where headers are."""
    for i in range(CUTS):
        yield data[: i * len(data) // CUTS]
    chance = random.Random(seed)
    for _ in range(CHANGED):
        copy = bytearray(data)
        front = min(len(copy), 1000) if chance.random() < 0.6 else len(copy)
        for _ in range(chance.choice((1, 1, 2, 4, 16))):
            place = chance.randrange(front)
            copy[place] = chance.choice(
                (0, 255, 127, 128, chance.randrange(256), copy[place] ^ 1 << chance.randrange(8))
            )
        yield bytes(copy)


@pytest.mark.parametrize("name", SAMPLES)
def test_damage_ends_in_an_array_or_in_bad_file(tmp_path: Path, write_dicom: Callable[..., Path], name: str) -> None:
    make_samples(tmp_path, write_dicom)
    read = READERS[suffix_of(name)]
    read(tmp_path / name)  # the valid one
    data, path = (tmp_path / name).read_bytes(), tmp_path / f"damaged{suffix_of(name)}"
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for copy in damaged(data, name):
            path.write_bytes(copy)
            try:
                read(path)
            except BadFile as error:
                refused += 1
                assert 0 < len(str(error)) < 160
                assert str(tmp_path) not in str(error)
    assert refused >= CUTS // 2


@pytest.mark.parametrize("suffix", READERS)
def test_wrong_types_are_refused(tmp_path: Path, write_dicom: Callable[..., Path], suffix: str) -> None:
    make_samples(tmp_path, write_dicom)
    read, path = READERS[suffix], tmp_path / f"wrong{suffix}"
    pictures = {".png", ".jpg", ".tif", ".bmp"}
    for name in SAMPLES:
        kind = suffix_of(name)
        if kind != suffix and not {kind, suffix} <= pictures:
            path.write_bytes((tmp_path / name).read_bytes())
            with pytest.raises(BadFile):
                read(path)
    for content in (
        b"",
        b"\0",
        b"Dear Dr House",
        b"\x1f\x8b" + bytes(20),
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xd9",
        bytes(2000),
    ):
        path.write_bytes(content)
        with pytest.raises(BadFile):
            read(path)


@pytest.mark.parametrize("suffix", READERS)
def test_folders_and_pipes_are_not_opened(tmp_path: Path, suffix: str) -> None:
    read, path = READERS[suffix], tmp_path / f"folder{suffix}"
    path.mkdir()
    if suffix != ".dcm":  # there it is a place to look for files
        with pytest.raises(BadFile, match="not a regular file"):
            read(path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(path / f"pipe{suffix}")  # opening it would wait for ever
        with pytest.raises(BadFile, match="not a regular file"):
            read(path if suffix == ".dcm" else path / f"pipe{suffix}")


# Bombs


def zeros(megabytes: int, wrap: str = "raw") -> bytes:
    """A stream that inflates to so many megabytes of zeros: raw deflate, zlib or gzip (with a wrong sum, which only shows at its end)."""
    body = MEGABYTE * megabytes + b"\x03\x00"
    return {"raw": body, "zlib": b"\x78\xda" + body + bytes(4), "gzip": b"\x1f\x8b\x08" + bytes(7) + body + bytes(8)}[
        wrap
    ]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *before: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")
    )


def nifti(shape: tuple[int, ...], offset: int = 352) -> bytes:
    header = nibabel.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.uint8)
    header["vox_offset"], header["magic"] = offset, b"n+1"
    return bytes(header.binaryblock) + bytes(4)


def nifti_gz(header: bytes, megabytes: int) -> bytes:
    """Gzip of a header and zeros behind it."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    front = packer.compress(header) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08" + bytes(7) + front + zeros(megabytes) + bytes(8)


def npz(path: Path, start: bytes, megabytes: int) -> None:
    """An entry of `start` and zeros."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("image.npy", "w") as stream,
    ):
        stream.write(start)
        for _ in range(megabytes):
            stream.write(bytes(1 << 20))


def npy_header(shape: tuple[int, ...]) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


class Bombs(dict[str, str]):
    """Files of a folder that declare or unpack to too much: name -> what the refusal must say, parts of it separated by |."""

    def __init__(self, folder: Path, write_dicom: Callable[..., Path]) -> None:
        super().__init__()
        self.folder, self.write_dicom = folder, write_dicom
        for fill in (self.pictures, self.volumes, self.arrays, self.dicom):
            fill()

    def put(self, name: str, reason: str, data: bytes | None = None) -> Path:
        """Note a bomb and write its bytes, where given."""
        self[name] = reason
        if data is not None:
            (self.folder / name).write_bytes(data)
        return self.folder / name

    def pictures(self) -> None:
        """Sides, texts and tags that are too large."""
        self.put("sides.png", "70000 x 1000 pixels, at most 65500 along an edge", png(70_000, 1_000))
        self.put("pixels.png", "13000 x 13000 pixels, at most 100000000 are read", png(13_000, 13_000))
        self.put("more.png", "more than 100000000 pixels", png(70_000, 70_000))  # refused by Pillow itself
        self.put("short.png", "truncated", png(9_000, 9_000))
        self.put("icc.png", "damaged picture", png(9, 1, chunk(b"iCCP", b"name\0\0" + zeros(600, "zlib"))))
        self.put("text.png", "damaged picture", png(9, 1, chunk(b"zTXt", b"name\0\0" + zeros(600, "zlib"))))
        frame = b"\xff\xc0\x00\x0b\x08" + struct.pack(">HH", 65_500, 65_500) + b"\x01\x01\x11\x00"
        self.put("sides.jpg", "more than 100000000 pixels", b"\xff\xd8" + frame + b"\xff\xd9")
        Image.fromarray(GREY).save(self.put("tags.tif", "damaged picture"), compression="tiff_adobe_deflate")
        data = bytearray((self.folder / "tags.tif").read_bytes())
        ifd = struct.unpack("<I", data[4:8])[0]
        data[ifd + 2 + 12 : ifd + 2 + 24] = struct.pack("<HHII", 257, 12, 2**28, 8)  # a height of 2**28 doubles
        self.put("tags.tif", "picture|truncated|not a", bytes(data))

    def volumes(self) -> None:
        """NIfTI headers and streams that do not fit each other."""
        self.put("volume.nii", "truncated", nifti((4_000, 4_000, 60)))
        self.put("huge.nii.gz", "at most 2147483648 bytes", nifti_gz(nifti((9_000, 9_000, 9_000)), 1))
        self.put("little.nii.gz", "more bytes than its header says", nifti_gz(nifti((4, 4, 4)), 1_000))
        self.put("much.nii.gz", "truncated", nifti_gz(nifti((1_000, 1_000, 1_000)), 1))
        self.put(
            "extension.nii.gz",
            "truncated",
            nifti_gz(nifti((4, 4, 4), 40 << 20)[:348] + struct.pack("<BBBBII", 1, 0, 0, 0, 2**31 - 16, 4), 20),
        )
        self.put("offset.nii.gz", "do not begin behind the header", nifti_gz(nifti((4, 4, 4), 1_500_000_000), 1_000))

    def arrays(self) -> None:
        """Entries of archives and chunks of HDF5."""
        npz(self.put("more.npz", "another number of bytes"), npy_header((10, 10)), 400)
        npz(
            self.put("header.npz", "npz archive|objects|version"),
            b"\x93NUMPY\x02\x00" + struct.pack("<I", 400 << 20),
            400,
        )
        npz(self.put("declared.npz", "at most 2147483648 bytes"), npy_header((100_000, 100_000)), 1)

        with h5py.File(self.put("unwritten.h5", "1000000 x 1000000 values"), "w") as file:
            file.create_dataset("image", (10**6, 10**6), np.uint8, chunks=(64, 64))
        with h5py.File(self.put("chunk.h5", "larger than it declares"), "w") as file:
            image = file.create_dataset("image", (64, 64), np.uint8, chunks=(64, 64), compression="gzip")
            image.id.write_direct_chunk((0, 0), zeros(1_000, "zlib"))
        with h5py.File(self.put("wide.h5", "unpacks to more than it declares"), "w") as file:
            image = file.create_dataset("image", (1 << 20,), np.uint8, chunks=(1 << 20,), compression="gzip")
            image.id.write_direct_chunk((0,), zeros(1_000, "zlib"))

    def dicom(self) -> None:
        """Sizes, deflated files, runs and elements."""
        self.write_dicom(
            self.put("pixels.dcm", "at most 2147483648 bytes"), GREY, NumberOfFrames=60_000, Rows=900, Columns=900
        )
        small = self.write_dicom(
            self.put("deflated.dcm", "inflates to more than"), GREY, syntax=DeflatedExplicitVRLittleEndian
        ).read_bytes()
        with (self.folder / "deflated.dcm").open("rb") as stream:
            pydicom.filereader.read_preamble(stream, force=False)
            pydicom.filereader.read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
            meta = small[: stream.tell()]
        self.put("deflated.dcm", "inflates to more than", meta + zeros(1_000))
        rle = pydicom.dcmread(self.write_dicom(self.put("rle.dcm", "a frame of another size"), GREY))
        rle.PixelData = pydicom.encaps.encapsulate([struct.pack("<16L", 1, 64, *[0] * 14) + b"\x81\0" * 4_000_000])
        rle["PixelData"].is_undefined_length = True
        rle.file_meta.TransferSyntaxUID = RLELossless
        rle.save_as(self.folder / "rle.dcm")
        plain = self.write_dicom(self.put("element.dcm", "no image in it|truncated|too large"), GREY).read_bytes()
        at = plain.index(struct.pack("<HH2s", 0x0028, 0x0010, b"US"))
        self.put(
            "element.dcm",
            self["element.dcm"],
            plain[:at] + struct.pack("<HH2sHL", 0x0020, 0x9116, b"SQ", 0, 2**32 - 16) + plain[at:],
        )


CHILD = """
import json, pathlib, resource, sys, warnings
sys.path.insert(0, {here!r})
warnings.simplefilter("ignore")
import test_fuzz_formats as fuzz
extra, folder, how = {extra} << 20, pathlib.Path({folder!r}), {how!r}
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + extra,) * 2)
out = {{}}
for path in sorted(folder.iterdir()):
    read = fuzz.READERS[fuzz.suffix_of(path.name)] if how == "fedmed" else fuzz.PLAIN.get(path.name)
    if read is None:
        continue
    try:
        read(path)
        out[path.name] = "was read"
    except Exception as error:
        out[path.name] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps(out))
"""

PLAIN: dict[str, Callable[[Path], object]] = {  # how a library reads some of the bombs when nothing holds it back
    "little.nii.gz": lambda path: gzip.decompress(path.read_bytes()),
    "header.npz": lambda path: np.load(path)["image"],
    "more.npz": lambda path: zipfile.ZipFile(path).read("image.npy"),
    "wide.h5": lambda path: h5py.File(path)["image"][()],
    "deflated.dcm": lambda path: pydicom.dcmread(path),
}


def in_child(folder: Path, how: str) -> dict[str, str]:
    """What became of every bomb in a process that may take 300 MB more than it has after its imports."""
    code = CHILD.format(here=str(Path(__file__).parent), extra=300, folder=str(folder), how=how)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to know how much memory a process has")
def test_bombs_are_refused_in_little_memory(tmp_path: Path, write_dicom: Callable[..., Path]) -> None:
    expected = Bombs(tmp_path, write_dicom)
    found = in_child(tmp_path, "fedmed")
    assert set(found) == set(expected)
    for name, reason in expected.items():
        assert found[name].startswith("BadFile: "), (name, found[name])
        assert any(part in found[name] for part in reason.split("|")), (name, found[name], reason)
        assert "memory" not in found[name], (name, found[name])
    plain = in_child(tmp_path, "plain")
    assert set(plain) == set(PLAIN)
    for name, outcome in plain.items():
        assert outcome.startswith(("MemoryError", "OSError")), (name, outcome)


def test_the_repeated_stream_is_what_it_claims() -> None:
    assert zlib.decompress(zeros(3), -zlib.MAX_WBITS) == bytes(3 << 20)
    assert len(MEGABYTE) < 2_000
