"""NIfTI: values, scaling, geometry, and what a header may not ask for."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fedmed.data.formats.limits import BadFile, Limits
from fedmed.data.formats.nifti import Nifti, write_nifti_like
from fedmed.errors import UserError

VOXELS = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
AFFINE = np.array([[-2.0, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30], [0, 0, 0, 1]])
BOTH = pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])


def save(
    path: Path,
    voxels: np.ndarray = VOXELS,
    affine: np.ndarray = AFFINE,
    kind: type = nibabel.Nifti1Image,
    **fields: object,
) -> Path:
    image = kind(voxels, affine)
    for name, value in fields.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


@BOTH
def test_slices_come_as_stored_along_every_axis(tmp_path: Path, name: str) -> None:
    found = Nifti.open(save(tmp_path / name))
    assert (found.shape, found.channels, found.dtype) == ((2, 3, 4), 1, np.int16)
    assert [found.num_slices(axis) for axis in (0, 1, 2)] == [2, 3, 4]
    for axis in (0, 1, 2):
        for index in range(found.num_slices(axis)):
            part = found.slice(index, axis)
            assert part.dtype == np.int16
            assert np.array_equal(part, VOXELS.take(index, axis))
    assert np.array_equal(found.volume(), VOXELS)


@BOTH
def test_scaling_gives_float32_and_nan_comes_through(tmp_path: Path, name: str) -> None:
    image = nibabel.Nifti1Image(np.array([[[1, 2]]], dtype=np.int16), AFFINE)
    path = tmp_path / name
    nibabel.save(image, path)
    data = bytearray(gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes())
    data[112:120] = np.array([0.5, 10], dtype="<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(gzip.compress(bytes(data)) if name.endswith("gz") else bytes(data))
    found = Nifti.open(path)
    assert found.slice(1).dtype == np.float32
    assert found.volume().tolist() == [[[10.5, 11.0]]]
    floats = Nifti.open(save(tmp_path / name, np.array([[[np.nan, 2.5]]], dtype=np.float64)))
    assert floats.dtype == np.float32
    assert np.isnan(floats.slice(0)).all()
    assert floats.slice(1).tolist() == [[2.5]]


def test_four_axes_are_channels_and_axes_of_one_fall_away(tmp_path: Path) -> None:
    four = np.arange(48, dtype=np.uint8).reshape(2, 3, 4, 2)
    found = Nifti.open(save(tmp_path / "a.nii.gz", four))
    assert (found.channels, found.num_slices()) == (2, 4)
    assert np.array_equal(found.slice(3), four[:, :, 3])
    assert np.array_equal(found.slice(1, axis=0), four[1])
    assert np.array_equal(found.volume(), four)
    single = Nifti.open(save(tmp_path / "b.nii", VOXELS[..., None, None]))
    assert (single.shape, single.slice(0).shape) == ((2, 3, 4), (2, 3))


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
@BOTH
def test_both_versions_and_byte_orders(tmp_path: Path, kind: type, order: str, name: str) -> None:
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.dtype(np.int32).newbyteorder(order))
    nibabel.save(kind(VOXELS.astype(np.int32), AFFINE, header), tmp_path / name)
    found = Nifti.open(tmp_path / name)
    assert found.header.endianness == order
    assert found.dtype == np.dtype(np.int32)
    assert found.dtype.isnative
    assert np.array_equal(found.volume(), VOXELS)


DIMS, DATATYPE, PIXDIM, OFFSET, SROW_X, MAGIC = 40, 70, 76, 108, 280, 344  # places in a header of version 1


def header_bytes(path: Path, changes: dict[int, bytes]) -> bytes:
    """The file with bytes of its header changed."""
    data = bytearray(path.read_bytes())
    for place, value in changes.items():
        data[place : place + len(value)] = value
    return bytes(data)


def test_spacing_is_in_mm_and_orientation_in_letters(tmp_path: Path) -> None:
    found = Nifti.open(save(tmp_path / "a.nii"))
    assert found.spacing == (2.0, 3.0, 4.0)
    assert found.orientation == "LAS"
    assert np.array_equal(found.affine, AFFINE)
    assert Nifti.open(save(tmp_path / "b.nii", xyzt_units=1)).spacing == (2000.0, 3000.0, 4000.0)
    assert Nifti.open(save(tmp_path / "b.nii", xyzt_units=3)).spacing == pytest.approx((0.002, 0.003, 0.004))
    turned = np.eye(4)[[2, 0, 1, 3]] * 1.5  # x of the volume leads to y of the patient, ...
    turned[3, 3] = 1
    assert Nifti.open(save(tmp_path / "c.nii", affine=turned)).orientation == "ASR"


def test_spacing_without_a_sane_affine(tmp_path: Path) -> None:
    valid = save(tmp_path / "a.nii")
    nowhere, unknown, zooms = (
        np.zeros(4, "<f4").tobytes(),
        np.full(4, np.nan, "<f4").tobytes(),
        np.array([1, 0, 3, 4], "<f4").tobytes(),
    )
    path = tmp_path / "b.nii"
    for changes, spacing, orientation in (
        ({SROW_X: nowhere}, (2.0, 3.0, 4.0), "?AS"),  # by the zooms of the header
        ({SROW_X: nowhere, PIXDIM: zooms}, (1.0, 3.0, 4.0), "?AS"),
        ({SROW_X: unknown}, (2.0, 3.0, 4.0), "???"),
    ):
        path.write_bytes(header_bytes(valid, changes))
        found = Nifti.open(path)
        assert (found.spacing, found.orientation) == (spacing, orientation)


def test_places_outside_are_errors_of_the_caller(tmp_path: Path) -> None:
    found = Nifti.open(save(tmp_path / "a.nii"))
    for index in (4, -1):
        with pytest.raises(IndexError, match="of 4 along axis 2"):
            found.slice(index)
    with pytest.raises(ValueError, match="axis must be 0, 1 or 2"):
        found.slice(0, axis=3)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({DIMS: np.array([3, 30_000, 30_000, 30_000], "<i2").tobytes()}, "at most 100000000 are read"),
        ({DIMS: np.array([3, 9_000, 9_000, 9_000], "<i2").tobytes()}, "at most 2147483648 bytes"),
        ({DIMS: np.array([3, 2, 3, 5], "<i2").tobytes()}, "truncated"),
        ({DIMS: np.array([3, 2, 0, 4], "<i2").tobytes()}, "no voxels"),
        ({DIMS: np.array([3, 2, -3, 4], "<i2").tobytes()}, "no voxels"),
        ({DIMS: np.array([2, 2, 3, 4], "<i2").tobytes()}, "2 axes, 3 or 4"),
        ({DIMS: np.array([5, 1, 1, 1, 2, 2], "<i2").tobytes()}, "5 axes, 3 or 4"),
        ({DATATYPE: np.array([32, 64], "<i2").tobytes()}, "neither whole nor real"),  # complex
        ({DATATYPE: np.array([128, 24], "<i2").tobytes()}, "neither whole nor real"),  # RGB
        ({OFFSET: np.array([0], "<f4").tobytes()}, "do not begin behind the header"),
        ({OFFSET: np.array([np.nan], "<f4").tobytes()}, "do not begin behind the header"),
        ({OFFSET: np.array([2e9], "<f4").tobytes()}, "do not begin behind the header"),
        ({MAGIC: b"ni1\0"}, "not a NIfTI file in one piece"),
        ({0: b"PK\3\4"}, "not a NIfTI file"),
    ],
)
@BOTH
def test_headers_that_cannot_be_read(tmp_path: Path, name: str, changes: dict[int, bytes], reason: str) -> None:
    data = header_bytes(save(tmp_path / "valid.nii"), changes)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    if name.endswith("gz") and reason == "truncated":
        with pytest.raises(
            BadFile, match=reason
        ):  # 60 bytes could still be in the stream: it is found out when they are read
            Nifti.open(path).volume()
        return
    with pytest.raises(BadFile, match=reason):
        Nifti.open(path)


def test_bytes_after_the_voxels(tmp_path: Path) -> None:
    data = save(tmp_path / "a.nii").read_bytes()
    path = tmp_path / "b.nii.gz"
    path.write_bytes(gzip.compress(data + b"\0" * 100))
    assert np.array_equal(Nifti.open(path).volume(), VOXELS)
    path.write_bytes(gzip.compress(data + b"\0" * (2 << 20)))
    with pytest.raises(BadFile, match="more bytes than its header says"):
        Nifti.open(path).volume()


def test_a_damaged_checksum_is_found(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz")
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BadFile, match="damaged NIfTI file"):
        Nifti.open(path).slice(0)


def test_limits_hold_for_a_volume(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii")
    for limits in (Limits(max_side=3), Limits(max_pixels=11), Limits(max_pages=3), Limits(max_bytes=47)):
        with pytest.raises(BadFile):
            Nifti.open(path, limits)
    assert Nifti.open(path, Limits(max_bytes=400)).shape == (2, 3, 4)


def test_extensions_are_skipped_and_not_copied(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(VOXELS, AFFINE)
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Doe^Jane"))
    nibabel.save(image, tmp_path / "a.nii")
    source = Nifti.open(tmp_path / "a.nii")
    assert np.array_equal(source.volume(), VOXELS)
    assert b"Doe" not in write_nifti_like(tmp_path / "b.nii", source, VOXELS).read_bytes()


@BOTH
def test_a_mask_lies_where_its_image_lies(tmp_path: Path, name: str) -> None:
    image = nibabel.Nifti1Image(VOXELS, None)
    image.set_sform(AFFINE, code=4)
    image.set_qform(np.diag([2.0, 3, 4, 1]), code=1)
    image.header.set_xyzt_units("mm", "sec")
    for field in ("descrip", "db_name", "aux_file", "intent_name"):
        image.header[field] = b"Doe^Jane"
    nibabel.save(image, tmp_path / "image.nii")
    source = Nifti.open(tmp_path / "image.nii")
    path = write_nifti_like(tmp_path / "new" / name, source, VOXELS > 11)
    written = nibabel.load(path)
    assert written.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(written.dataobj), VOXELS > 11)
    assert np.array_equal(written.get_sform(), AFFINE)
    assert np.array_equal(written.get_qform(), np.diag([2.0, 3, 4, 1]))
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (4, 1)
    assert written.header.get_zooms() == (2.0, 3.0, 4.0)
    assert written.header.get_xyzt_units()[0] == "mm"
    content = path.read_bytes()
    assert b"Doe" not in (gzip.decompress(content) if name.endswith("gz") else content)
    assert [p.name for p in path.parent.iterdir()] == [name]
    again = Nifti.open(path)
    assert (again.spacing, again.orientation) == (source.spacing, source.orientation)


def test_a_header_without_codes_stays_without(tmp_path: Path) -> None:
    image = nibabel.Nifti2Image(VOXELS, None)
    image.header.set_zooms((2, 3, 4))
    nibabel.save(image, tmp_path / "a.nii")
    source = Nifti.open(tmp_path / "a.nii")
    written = nibabel.load(write_nifti_like(tmp_path / "b.nii", source, VOXELS, dtype=np.float32))
    assert isinstance(written, nibabel.Nifti2Image)
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (0, 0)
    assert np.array_equal(written.affine, source.affine)
    assert written.get_data_dtype() == np.float32


def test_the_gzip_header_names_no_file(tmp_path: Path) -> None:
    source = Nifti.open(save(tmp_path / "a.nii"))
    first = write_nifti_like(tmp_path / "Doe.nii.gz", source, VOXELS).read_bytes()
    assert b"Doe" not in first
    assert first == write_nifti_like(tmp_path / "b.nii.gz", source, VOXELS).read_bytes()  # nor the time


@pytest.mark.parametrize(
    ("name", "array", "dtype"),
    [("a.img", VOXELS, None), ("a.nii", VOXELS[:1], None), ("a.nii", VOXELS[0], None), ("a.nii", VOXELS, np.float16)],
)
def test_what_cannot_be_written_is_the_users_fault(
    tmp_path: Path, name: str, array: np.ndarray, dtype: type | None
) -> None:
    source = Nifti.open(save(tmp_path / "source.nii"))
    with pytest.raises(UserError, match="Cannot write"):
        write_nifti_like(tmp_path / "out" / name, source, array, dtype)
    assert not (tmp_path / "out").exists()


def test_only_nifti_in_one_file(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Pair(VOXELS, AFFINE), tmp_path / "a.img")
    for name, reason in (("a.hdr", "not a .nii"), ("a.img", "not a .nii"), ("none.nii", "no such file")):
        with pytest.raises(BadFile, match=reason):
            Nifti.open(tmp_path / name)
    (tmp_path / "b.nii.gz").write_bytes((tmp_path / "a.hdr").read_bytes())
    with pytest.raises(BadFile, match="not a gzip file"):
        Nifti.open(tmp_path / "b.nii.gz")


def test_its_repr_names_no_file(tmp_path: Path) -> None:
    assert repr(Nifti.open(save(tmp_path / "Doe.nii"))) == "Nifti(2 x 3 x 4 int16, LAS)"
