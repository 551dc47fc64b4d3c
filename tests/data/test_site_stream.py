"""Writing a site row by row: what is read back, where rows lie, what is refused, and that nothing half-written stays."""

from __future__ import annotations

import threading
import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from fedmed.data.mapped import row_places
from fedmed.data.site_file import SiteFile
from fedmed.data.site_writer import SiteRows, SiteWriter
from fedmed.data.writer import SiteArrays, write_site_file
from fedmed.errors import UserError

META = {"task": "segmentation", "classes": ["background", "lesion"], "channels": ["grey"], "image_size": [6, 5]}
SPLITS = {"train": [0, 2, 3], "val": [1], "test": [4, 5]}
Row = dict[str, np.ndarray]


def make_rows(count: int = 6, seed: int = 0, shape: tuple[int, ...] = (6, 5)) -> list[Row]:
    """Random images and masks."""
    rng = np.random.default_rng(seed)
    return [
        {"image": rng.integers(0, 256, shape, dtype=np.uint8), "mask": rng.integers(0, 2, shape[:2], dtype=np.uint8)}
        for _ in range(count)
    ]


def fill(site: SiteRows, rows: list[Row], splits: Any = SPLITS) -> None:
    """Append rows with ids, a slice number and flags, and finish."""
    for number, row in enumerate(rows):
        values = {"slice_no": number, "modality_present": np.array([1], np.uint8)}
        assert site.append(row, f"i{number}", f"Fälle{number // 2}", values) == number
    assert len(site) == len(rows)
    site.finish(splits)


def places(path: Path, name: str, group: str = "site_00") -> np.ndarray:
    """Byte positions of the rows of a dataset."""
    with h5py.File(path) as file:
        found = row_places(file[group][name])
    assert found is not None
    return found


def test_what_is_written_reads_as_from_the_other_writer(tmp_path: Path) -> None:
    rows = make_rows()
    attrs = {"natural_site": True, "note": None, "contrasts": ["a"]}
    with SiteWriter(tmp_path / "deep" / "a.h5", {**META, "name": "trial"}, recipe={"seed": 3}) as writer:
        fill(writer.site("ward 7", attrs=attrs), rows)
        fill(writer.site("ward 8", capacity=6), make_rows(seed=1))
    arrays = SiteArrays(
        name="ward 7",
        image=np.stack([row["image"] for row in rows]),
        annotations={"mask": np.stack([row["mask"] for row in rows])},
        splits={name: np.array(values) for name, values in SPLITS.items()},
        item_id=[f"i{k}" for k in range(6)],
        group_id=[f"Fälle{k // 2}" for k in range(6)],
        extras={"slice_no": np.arange(6), "modality_present": np.ones((6, 1), np.uint8)},
        attrs=attrs,
    )
    write_site_file(tmp_path / "b.h5", {**META, "name": "trial"}, [arrays], recipe={"seed": 3})
    with h5py.File(tmp_path / "deep" / "a.h5") as ours, h5py.File(tmp_path / "b.h5") as theirs:
        assert list(ours) == ["site_00", "site_01"] and ours.attrs["n_sites"] == 2
        assert {**ours.attrs, "n_sites": 1} == dict(theirs.attrs)
        site, other = ours["site_00"], theirs["site_00"]
        assert set(site) == set(other)
        for name in other:
            assert site[name].dtype == other[name].dtype
            np.testing.assert_array_equal(site[name][...], other[name][...])
        assert set(site.attrs) == set(other.attrs)
        for name in other.attrs:
            np.testing.assert_array_equal(site.attrs[name], other.attrs[name])
    with SiteFile.open(tmp_path / "deep" / "a.h5") as file:
        assert [site.name for site in file.sites] == ["ward 7", "ward 8"]
        assert file.site("ward 7").group_id[3] == "Fälle1"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("capacity", [0, 40])
def test_rows_lie_at_a_regular_distance(tmp_path: Path, capacity: int, dtype: type) -> None:
    rows = make_rows(40)
    with SiteWriter(tmp_path / "a.h5", META) as writer:
        fill(writer.site("a", capacity), [{**row, "image": row["image"].astype(dtype)} for row in rows])
    image, mask = places(tmp_path / "a.h5", "image"), places(tmp_path / "a.h5", "mask")
    assert len(set(np.diff(image))) == 1 and len(set(np.diff(mask))) == 1
    assert (image % 16 == 0).all() and (mask % 16 == 0).all()
    if capacity:
        assert image[-1] < mask[0] or mask[-1] < image[0]  # one dataset after the other
    content = (tmp_path / "a.h5").read_bytes()
    start = int(mask[7])
    assert content[start : start + 30] == rows[7]["mask"].tobytes()


@pytest.mark.parametrize(("capacity", "count"), [(4, 50), (60, 50), (0, 1), (1, 3)])
def test_more_or_fewer_rows_than_expected(tmp_path: Path, capacity: int, count: int) -> None:
    rows = make_rows(count)
    with SiteWriter(tmp_path / "a.h5", META) as writer:
        fill(writer.site("a", capacity), rows, {"train": range(count)})
    with SiteFile.open(tmp_path / "a.h5") as file:
        data = file.site("a")
    assert data.image.shape == (count, 6, 5) and data.extras["slice_no"].tolist() == list(range(count))
    for number, row in enumerate(rows):
        np.testing.assert_array_equal(data.image[number], row["image"])
        np.testing.assert_array_equal(data.target[number], row["mask"])


def test_compressed_rows(tmp_path: Path) -> None:
    rows = [{"image": np.full((6, 5), k, np.uint16), "mask": np.zeros((6, 5), bool)} for k in range(6)]
    with SiteWriter(tmp_path / "a.h5", META, compression=4) as writer:
        fill(writer.site("a", capacity=9), rows)
    with h5py.File(tmp_path / "a.h5") as file:
        image = file["site_00/image"]
        assert image.compression == "gzip" and image.compression_opts == 4 and image.chunks == (1, 6, 5)
        assert image.shape == (6, 6, 5) and row_places(image) is None
        assert image[:, 2, 2].tolist() == list(range(6)) and file["site_00/mask"].dtype == np.uint8


def test_colour_label_text_and_foreign_byte_order(tmp_path: Path) -> None:
    meta = {"task": "classification", "classes": ["a", "b"], "channels": ["R", "G", "B"], "image_size": [4, 3]}
    image = np.arange(36).reshape(4, 3, 3).astype(">u2")
    with SiteWriter(tmp_path / "a.h5", meta, root=True) as writer:
        site = writer.site("clinic")
        site.append({"image": image}, "x", "y", {"label": 0, "view": "AP"})
        site.append({"image": image.astype("<u2")[::-1, ::-1]}, "x2", "y", {"label": 1, "view": "lateral"})
        site.finish({"train": [0], "test": [1]})
    with SiteFile.open(tmp_path / "a.h5") as file:
        assert [(site.group, site.name) for site in file.sites] == [("", "clinic")]
        data = file.site("clinic")
    assert data.target.tolist() == [0, 1] and data.image.dtype == np.uint16
    np.testing.assert_array_equal(data.image[0], image)
    np.testing.assert_array_equal(data.image[1], image[::-1, ::-1])
    assert data.read("view").tolist() == [b"AP", b"lateral"]


UNLIKE: dict[str, tuple[Row, str]] = {
    "other size": ({"image": np.zeros((5, 6), np.uint8)}, r"image is uint8 of \(5, 6\), expected uint8 of \(6, 5\)"),
    "other type": ({"image": np.zeros((6, 5), np.uint16)}, r"row 1: image is uint16 of \(6, 5\), expected uint8"),
    "another array": ({"scribble": np.zeros((6, 5), np.uint8)}, "scribble is new, the first row lacks it"),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_a_row_unlike_the_first_is_left_out_alone(tmp_path: Path, case: str) -> None:
    first, second = make_rows(2)
    change, message = UNLIKE[case]
    with SiteWriter(tmp_path / "a.h5", META) as writer:
        site = writer.site("a", 3)
        site.append(first, "i0", "g0", {"slice_no": 0})
        with pytest.raises(UserError, match=message):
            site.append({**second, **change}, "i1", "g0", {"slice_no": 1})
        with pytest.raises(UserError, match="slice_no is missing"):
            site.append(second, "i1", "g0")
        assert site.append(second, "i2", "g0", {"slice_no": 2}) == 1
        site.finish({"train": [0, 1]})
    with SiteFile.open(tmp_path / "a.h5") as file:
        data = file.site("a")
    assert data.item_id == ["i0", "i2"] and data.extras["slice_no"].tolist() == [0, 2]
    np.testing.assert_array_equal(data.image[1], second["image"])


FIRST: dict[str, tuple[Row, str]] = {
    "size of the file": ({"image": np.zeros((5, 5), np.uint8)}, r"expected \(6, 5, 1\) or \(6, 5\)"),
    "type": ({"image": np.zeros((6, 5))}, "image is float64"),
    "colour": ({"image": np.zeros((6, 5, 3), np.uint8)}, r"image is uint8 of \(6, 5, 3\)"),
    "mask": ({"mask": np.zeros((6, 6), np.uint8)}, r"mask is of \(6, 6\), expected \(6, 5\)"),
}


@pytest.mark.parametrize("case", FIRST)
def test_the_first_row_must_fit_the_file(tmp_path: Path, case: str) -> None:
    change, message = FIRST[case]
    with pytest.raises(UserError, match=message), SiteWriter(tmp_path / "a.h5", META) as writer:
        writer.site("a").append({**make_rows(1)[0], **change}, "i", "g")
    assert list(tmp_path.iterdir()) == []


def test_a_first_row_without_image_or_annotation(tmp_path: Path) -> None:
    row = make_rows(1)[0]
    with SiteWriter(tmp_path / "a.h5", META) as writer:
        site = writer.site("a")
        with pytest.raises(UserError, match="image is object"):
            site.append({"mask": row["mask"]}, "i", "g")
        with pytest.raises(UserError, match="no annotation; expected at least one of mask"):
            site.append({"image": row["image"]}, "i", "g")
        site.append(row, "i", "g")
        site.finish({"train": [0]})


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": [0, 6]}, "train_idx contains 6, but the site has 6 images"),
        ({"train": [0, 1], "test": [1]}, "image 1 is in both train_idx and test_idx"),
    ],
)
def test_wrong_splits_are_refused_and_the_old_file_stays(tmp_path: Path, splits: Any, message: str) -> None:
    path = tmp_path / "a.h5"
    with SiteWriter(path, META) as writer:
        fill(writer.site("a"), make_rows())
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"a.h5, site 'b': {message}"), SiteWriter(path, META) as writer:
        fill(writer.site("b"), make_rows(seed=1), splits)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.h5"]


def test_labels_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="label of image 1 contains 2"), SiteWriter(tmp_path / "a.h5", META) as writer:
        site = writer.site("a")
        for number in range(2):
            site.append({"image": np.zeros((6, 5), np.uint8)}, "i", "g", {"label": 2 * number})
        site.finish({"train": [0]})


def test_wrong_use(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with pytest.raises(UserError, match="classes, channels"):
        SiteWriter(path, {"task": "segmentation", "image_size": [6, 5]})
    with pytest.raises(ValueError, match="is not open"):
        SiteWriter(path, META).site("a")
    with pytest.raises(ValueError, match=r"unfinished sites \['a'\]"), SiteWriter(path, META) as writer:
        writer.site("a").append(make_rows(1)[0], "i", "g")
    with pytest.raises(ValueError, match="without any"), SiteWriter(path, META):
        pass
    with pytest.raises(UserError, match="no image"), SiteWriter(path, META) as writer:
        writer.site("a").finish({})
    with pytest.raises(UserError, match="two sites are called 'a'"), SiteWriter(path, META) as writer:
        fill(writer.site("a"), make_rows())
        writer.site("a")
    with pytest.raises(ValueError, match="holds one site"), SiteWriter(path, META, root=True) as writer:
        fill(writer.site("a"), make_rows())
        writer.site("b")
    with pytest.raises(ValueError, match="append after finish"), SiteWriter(path, META) as writer:
        site = writer.site("a")
        fill(site, make_rows())
        site.append(make_rows(1)[0], "i", "g")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write"), SiteWriter(tmp_path / "file" / "a.h5", META):
        pass


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    meta = {**META, "image_size": [64, 64]}
    with pytest.raises(UserError, match=r"Cannot write .*a\.h5: .*Check the free space") as caught:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, old[1]))
        try:
            with SiteWriter(tmp_path / "a.h5", meta) as writer:
                fill(writer.site("a"), make_rows(1000, shape=(64, 64)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_two_threads_write_one_name_and_one_of_them_wins(tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=20)

    def write(seed: int) -> None:
        with SiteWriter(tmp_path / "a.h5", META) as writer:
            site = writer.site(f"s{seed}")
            both.wait()
            fill(site, make_rows(seed=seed))
            both.wait()

    threads = [threading.Thread(target=write, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]
    with SiteFile.open(tmp_path / "a.h5") as file:
        name = file.sites[0].name
        np.testing.assert_array_equal(file.site(name).image[0], make_rows(1, int(name[1]))[0]["image"])


def test_sites_may_be_filled_in_turns(tmp_path: Path) -> None:
    one, two = make_rows(5, 1), make_rows(5, 2)
    with SiteWriter(tmp_path / "a.h5", META) as writer:
        sites = writer.site("one"), writer.site("two")
        for number, pair in enumerate(zip(one, two, strict=True)):
            for site, row in zip(sites, pair, strict=True):
                site.append(row, f"i{number}", "g")
        for site in reversed(sites):
            site.finish({"train": range(5)})
    with SiteFile.open(tmp_path / "a.h5") as file:
        for name, rows in (("one", one), ("two", two)):
            np.testing.assert_array_equal(file.site(name).target[3], rows[3]["mask"])


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    row = {"image": np.zeros((256, 256), np.uint8), "mask": np.zeros((256, 256), np.uint8)}
    tracemalloc.start()
    try:
        with SiteWriter(tmp_path / "a.h5", {**META, "image_size": [256, 256]}) as writer:
            fill(writer.site("a"), [row] * 200)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2e6 < (tmp_path / "a.h5").stat().st_size / 10
