"""Images and masks that stay in the file: where rows lie, what is read of them, and that training gives the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from fedmed.config import from_tree
from fedmed.data import mapped
from fedmed.data.augment import Augment
from fedmed.data.label_checks import blocks, check_labels
from fedmed.data.loader import batches
from fedmed.data.mapped import ScatteredRows, StoredRows, open_rows, row_places, stays_in_file
from fedmed.data.site_data import SiteData
from fedmed.data.site_file import SiteFile
from fedmed.data.site_writer import SiteWriter
from fedmed.data.split import fingerprint
from fedmed.errors import UserError
from fedmed.federation.messages import pack
from fedmed.federation.records import decode_state
from fedmed.federation.site import Place, Workshop, answer
from fedmed.federation.state import clone_state

COUNT = 23
CHANNELS = {1: ["grey"], 3: ["R", "G", "B"]}
MASKS: dict[str, Any] = {"task": "segmentation", "classes": ["background", "lesion"], "image_size": [16, 16]}


def write_masks(
    path: Path, dtype: type = np.uint8, channels: int = 1, capacity: int = COUNT, compression: int = 0
) -> Path:
    """A segmentation site `a` of 23 random images of 16 x 16: 15 train in no order, 3 validation, 5 test."""
    rng = np.random.default_rng(4)
    shape = (16, 16, channels) if channels > 1 else (16, 16)
    order = rng.permutation(COUNT)
    with SiteWriter(path, {**MASKS, "channels": CHANNELS[channels]}, compression) as writer:
        site = writer.site("a", capacity)
        for number in range(COUNT):
            image = rng.integers(0, 256, shape).astype(dtype)
            mask = rng.integers(0, 2, (16, 16), dtype=np.uint8)
            site.append({"image": image, "mask": mask}, f"i{number}", f"g{number}")
        site.finish({"train": order[:15].tolist(), "val": order[15:18].tolist(), "test": order[18:].tolist()})
    return path


FILES: dict[str, tuple[dict[str, Any], type]] = {
    "grey": ({}, np.ndarray),
    "colour": ({"channels": 3}, np.ndarray),
    "in turns": ({"capacity": 0, "dtype": np.uint16}, np.ndarray),
    "floats": ({"dtype": np.float32, "channels": 3, "capacity": 0}, np.ndarray),
    "scattered": ({"capacity": 5}, ScatteredRows),
    "scattered colour": ({"capacity": 5, "dtype": np.uint16, "channels": 3}, ScatteredRows),
    "packed": ({"compression": 1}, StoredRows),
    "packed colour": ({"compression": 1, "channels": 3, "dtype": np.uint16}, StoredRows),
}


@pytest.fixture(params=FILES)
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[SiteData, SiteData]:
    """One site in memory and mapped, of a file of each kind; the mapped one is of the kind that is meant."""
    how, kind = FILES[request.param]
    path = write_masks(tmp_path / "a.h5", **how)
    with SiteFile.open(path) as file:
        whole, lazy = (file.site("a", mean=[0.4], std=[0.3], load=load) for load in ("memory", "map"))
    assert type(lazy.image) is kind and type(lazy.target) is kind and lazy.mapped and not whole.mapped
    return whole, lazy


# ---------------------------------------------------------------------- where rows lie


def _contiguous(group: h5py.Group, values: np.ndarray) -> None:
    group["x"] = values


def _chunked(rows: int, **more: Any) -> Callable[[h5py.Group, np.ndarray], None]:
    def make(group: h5py.Group, values: np.ndarray) -> None:
        group.create_dataset("x", data=values, chunks=(rows, *values.shape[1:]), **more)

    return make


PLAIN: dict[str, Callable[[h5py.Group, np.ndarray], None]] = {
    "contiguous": _contiguous,
    "one row a chunk": _chunked(1),
    "four rows a chunk": _chunked(4),
    "chunks that grew": _chunked(3, maxshape=(None, 5, 6)),
}


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_bytes_at_the_places_are_the_rows(tmp_path: Path, kind: str, dtype: type) -> None:
    values = np.random.default_rng(0).integers(0, 99, (11, 5, 6)).astype(dtype)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["before"] = np.zeros(3, np.uint8)
        PLAIN[kind](file, values)
    content = path.read_bytes()
    with h5py.File(path) as file:
        places = row_places(file["x"])
        rows = open_rows(file["x"], path)
    assert places is not None
    size = values[0].nbytes
    assert [content[place : place + size] for place in places.tolist()] == [row.tobytes() for row in values]
    np.testing.assert_array_equal(rows[:], values)
    assert isinstance(rows, (np.ndarray, ScatteredRows))


OPAQUE: dict[str, Callable[[h5py.File, np.ndarray], None]] = {
    "compressed": _chunked(1, compression="gzip"),
    "shuffled bytes": _chunked(1, shuffle=True),
    "cut rows": lambda file, values: file.create_dataset("x", data=values, chunks=(1, 5, 3)),
    "flags": lambda file, values: file.create_dataset("x", data=values > 50),
    "other byte order": lambda file, values: file.create_dataset("x", data=values.astype(">i2")),
    "a row never written": lambda file, values: file.create_dataset(
        "x", values.shape, values.dtype, chunks=(1, 5, 6)
    ).write_direct(values[:9].copy(), dest_sel=np.s_[:9]),
    "never written": lambda file, values: file.create_dataset("x", values.shape, values.dtype) and None,
    "outside": lambda file, values: (
        file.create_dataset("x", data=values, external=[(file.filename + ".raw", 0, h5py.h5f.UNLIMITED)]) and None
    ),
}


@pytest.mark.parametrize("kind", OPAQUE)
def test_other_rows_are_read_through_hdf5(tmp_path: Path, kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 99, (11, 5, 6), dtype=np.int16)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        OPAQUE[kind](file, values)
        expected = file["x"][...]
    with h5py.File(path) as file:
        assert row_places(file["x"]) is None
        rows = open_rows(file["x"], path)
    assert isinstance(rows, StoredRows)
    np.testing.assert_array_equal(rows[[3, 10, 3, 0]], expected[[3, 10, 3, 0]])


def test_a_file_with_a_block_before_it_is_read_through_hdf5(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=512) as file:
        file["x"] = values
    with h5py.File(tmp_path / "a.h5") as file:
        assert row_places(file["x"]) is None
        np.testing.assert_array_equal(open_rows(file["x"], tmp_path / "a.h5")[:], values)


def test_wide_types_at_odd_places_are_copied(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint16).reshape(6, 2, 2)
    odd = 0
    for length in range(1, 9):
        path = tmp_path / f"{length}.h5"
        with h5py.File(path, "w", libver="latest") as file:
            file["before"] = np.zeros(length, np.uint8)
            file["x"] = values
        with h5py.File(path) as file:
            rows, places = open_rows(file["x"], path), row_places(file["x"])
        np.testing.assert_array_equal(rows[[5, 0]], values[[5, 0]])
        assert places is not None and isinstance(rows, ScatteredRows) == bool(places[0] % 2)
        odd += isinstance(rows, ScatteredRows)
    assert odd, "HDF5 put no rows at an odd place"


def test_no_rows(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.zeros((0, 4, 4), np.uint8)
        assert open_rows(file["x"], tmp_path / "a.h5").shape == (0, 4, 4)


def test_a_map_is_read_only_and_outlives_file_and_name(tmp_path: Path) -> None:
    path = write_masks(tmp_path / "a.h5")
    with SiteFile.open(path) as file:
        data = file.site("a", load="map")
    before = np.array(data.image)
    with pytest.raises(ValueError, match="read-only"):
        data.image[0] = 0  # type: ignore[index]
    with SiteWriter(path, {**MASKS, "channels": ["grey"]}) as writer:  # takes the place of the file
        site = writer.site("a")
        site.append({"image": np.zeros((16, 16), np.uint8), "mask": np.zeros((16, 16), np.uint8)}, "i", "g")
        site.finish({"train": [0]})
    np.testing.assert_array_equal(np.array(data.image), before)


def test_places_beyond_the_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_masks(tmp_path / "a.h5")
    size = path.stat().st_size
    monkeypatch.setattr(mapped, "row_places", lambda dataset: size - 256 * np.arange(COUNT)[::-1])
    with SiteFile.open(path) as file, pytest.raises(UserError, match="reaches beyond the end of the file"):
        file.site("a", load="map")


# ---------------------------------------------------------------------- what is read of them

KEYS: list[Any] = [
    0, -1, np.int64(5), slice(None), slice(3, 9, 2), slice(9, 3, -1), [4, 4, 1], np.array([22, -23]), np.arange(0),
    np.arange(COUNT) % 3 == 0, (3, slice(2), 1), (slice(2, 4), 0), ([5, 2], slice(None), 3), Ellipsis, (Ellipsis, 0),
]  # fmt: skip


def test_indexing_is_that_of_the_array(both: tuple[SiteData, SiteData]) -> None:
    whole, lazy = both
    for one, other in ((whole.image, lazy.image), (whole.target, lazy.target)):
        assert (len(one), one.shape, one.dtype, one.ndim) == (len(other), other.shape, other.dtype, other.ndim)
        for key in KEYS:
            np.testing.assert_array_equal(one[key], other[key], err_msg=str(key))
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
        for wrong in (COUNT, -COUNT - 1, [0, COUNT]):
            with pytest.raises(IndexError):
                other[wrong]


def equal_batches(one: Any, other: Any, augment: Augment | None = None) -> None:
    """Two splits give the same batches, shuffled and in order, to the bit and with the same strides."""
    for seed in (None, 7):
        rng = [None if seed is None else torch.Generator().manual_seed(seed) for _ in range(2)]
        pairs = zip(
            batches(one, 4, rng[0], augment if seed else None),
            batches(other, 4, rng[1], augment if seed else None),
            strict=True,
        )
        for a, b in pairs:
            assert torch.equal(a.images, b.images) and a.images.stride() == b.images.stride()
            assert torch.equal(a.targets, b.targets) and a.targets.dtype == b.targets.dtype
            assert torch.equal(a.index, b.index) and torch.equal(a.source, b.source)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_batches_are_equal(both: tuple[SiteData, SiteData], split: str) -> None:
    one, other = (data.split(split) for data in both)
    equal_batches(one, other)
    equal_batches(one, other, Augment(["hflip", "transpose", "shift2", "intensity"]))


def test_cut_and_relabelled_splits_are_equal(both: tuple[SiteData, SiteData]) -> None:
    one, other = (data.split("train") for data in both)
    assert one.class_counts().tolist() == other.class_counts().tolist()
    assert torch.equal(one.targets, other.targets) and torch.equal(one.index, other.index)
    assert torch.equal(torch.cat(list(other.target_blocks(4))), one.targets)
    assert torch.equal(fingerprint(one), fingerprint(other)) and other.home == other.device
    keep = torch.tensor([14, 3, 3, 0])
    equal_batches(one.subset(keep), other.subset(keep))
    labels = 1 - one.targets
    fresh = [split.with_targets(labels).subset(keep) for split in (one, other)]
    assert torch.equal(fresh[1].targets, labels[keep]) and len(fresh[1].subset(torch.zeros(4, dtype=torch.bool))) == 0
    equal_batches(*fresh)


def test_only_batches_are_moved_to_another_device(both: tuple[SiteData, SiteData]) -> None:
    whole, lazy = (data.split("train", "meta") for data in both)  # a device that keeps shapes and no values
    assert (whole.home.type, lazy.home.type, lazy.device.type) == ("meta", "cpu", "meta")
    assert lazy.index.device.type == "meta" and lazy._rows.device.type == "cpu"
    raw, labels, rows = lazy.raw(torch.tensor([3, 1]))
    assert {part.device.type for part in (raw, labels, rows)} == {"meta"} and raw.shape[0] == len(labels) == 2
    for one, other in zip(batches(whole, 4), batches(lazy, 4), strict=True):
        assert one.images.shape == other.images.shape and one.images.dtype == other.images.dtype
        assert one.targets.shape == other.targets.shape and other.targets.device.type == "meta"
    with pytest.raises((NotImplementedError, RuntimeError)):
        lazy.subset(torch.zeros(2, dtype=torch.int64, device="meta"))  # positions come back to the host to be looked up


def test_wide_masks_and_scored_masks(tmp_path: Path) -> None:
    path = write_masks(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        site = file["site_00"]
        scribble = np.full((COUNT, 16, 16), 2, np.int64)
        scribble[:, 2] = site["mask"][:, 2]
        site["scribble"] = scribble
        site.attrs["annotation"] = "scribble"
    with SiteFile.open(path) as file:
        whole, lazy = (file.site("a", load=load) for load in ("memory", "map"))
    assert lazy.target.dtype == np.int64 and lazy.split("train").targets.dtype == torch.uint8
    for split in ("train", "test"):
        equal_batches(whole.split(split), lazy.split(split))
    assert lazy.split("train").class_counts().sum() == 15 * 16


# ---------------------------------------------------------------------- checks, block by block


@pytest.mark.parametrize("load", ["memory", "map"])
def test_a_wrong_value_far_into_the_file_is_found(tmp_path: Path, load: str) -> None:
    path = write_masks(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file["site_00/mask"][20, 3, 3] = 9
    with SiteFile.open(path) as file, pytest.raises(UserError, match="mask of image 20 contains 9"):
        file.site("a", load=load)


def test_blocks_and_the_value_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.zeros((5, 2), np.int16)
    assert [(start, len(part)) for start, part in blocks(values, 8)] == [(0, 2), (2, 2), (4, 1)]
    assert [len(part) for _, part in blocks(values, 1)] == [1] * 5
    monkeypatch.setattr("fedmed.data.label_checks.blocks", lambda rows: blocks(rows, 4))
    values[1], values[2, 1], values[4, 0] = 255, 7, 9

    def said(ignore: int | None) -> str:
        with pytest.raises(UserError) as caught:
            check_labels(values, "mask", "here", "segmentation", 3, ignore)
        return str(caught.value)

    assert "image 1 contains 255, expected class ids 0 .. 2." in said(None)
    assert "image 4 contains 9, expected class ids 0 .. 2 (or 255 = not annotated)" in said(255)
    values[3, 1] = -2
    assert "image 3 contains -2" in said(255)
    values[2:] = 2
    check_labels(values, "mask", "here", "segmentation", 3, 255)
    check_labels(values[:0], "mask", "here", "segmentation", 3, None)


@pytest.mark.parametrize("load", ["memory", "map"])
def test_an_ignore_value_that_masks_cannot_hold(tmp_path: Path, load: str) -> None:
    path = write_masks(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["ignore_value"] = 255
    with SiteFile.open(path) as file:
        assert file.site("a", load=load).ignore_value == 255
    with h5py.File(path, "r+") as file:
        file.attrs["ignore_value"] = 256
    with SiteFile.open(path) as file, pytest.raises(UserError, match="ignore value 256 of mask is above 255"):
        file.site("a", load=load)
    many = np.zeros((1, 2, 2), np.int32)
    with pytest.raises(UserError, match="class id 256 of mask is above 255"):
        check_labels(many, "mask", "here", "segmentation", 257, None)
    check_labels(many, "label", "here", "classification", 257, 300)


def test_withheld_masks_are_refused_alike(tmp_path: Path) -> None:
    path = write_masks(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        site = file["site_00"]
        site.attrs["ignore_value"] = 255
        train = np.sort(site.attrs["train_idx"])
        masks = site["mask"][...]
        masks[train] = 255
        site["mask"][...] = masks
    with SiteFile.open(path) as file, pytest.raises(UserError, match="masks of its training images are withheld"):
        file.site("a", load="map")
    with h5py.File(path, "r+") as file:
        file["site_00/mask"][int(train[-1]), 7, 7] = 1
    with SiteFile.open(path) as file:
        assert file.site("a", load="map").split("train").class_counts().tolist() == [0, 1]


# ---------------------------------------------------------------------- when to map


def test_auto_maps_what_takes_more_than_a_quarter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = COUNT * 16 * 16 * 2  # image and mask
    path = write_masks(tmp_path / "a.h5")
    with SiteFile.open(path) as file:
        for available, expected in ((4 * size, False), (4 * size - 1, True), (0, True), (None, False)):
            monkeypatch.setattr(mapped, "available_memory", lambda known=available: known)
            assert file.site("a").mapped is expected
        assert not file.site("a", load="memory").mapped and file.site("a", load="map").mapped
        with pytest.raises(UserError, match=r"data\.load: expected one of auto, memory, map, got 'disk'"):
            file.site("a", load="disk")


def test_labels_are_in_memory_and_count_little(cls_file: Path) -> None:
    with SiteFile.open(cls_file) as file:
        whole, lazy = (file.site("clinic", load=load) for load in ("memory", "map"))
    assert lazy.mapped and isinstance(lazy.split("train").targets, torch.Tensor)
    assert lazy.split("train").class_counts().tolist() == whole.split("train").class_counts().tolist()
    equal_batches(whole.split("train"), lazy.split("train"))


def test_memory_that_is_left_by_machine_and_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        pytest.skip("no /proc/meminfo")
    total = 1024 * int(meminfo.read_text().split("MemTotal:")[1].split()[0])
    available = mapped.available_memory()
    assert available is not None and 0 < available <= total
    assert stays_in_file("auto", total) and not stays_in_file("auto", 1)
    monkeypatch.setattr(mapped, "_CGROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 1\nfile 500000\n")
    assert mapped._left_of(tmp_path) == [800_000]  # the file cache gives way
    assert mapped.available_memory() == 800_000
    (tmp_path / "memory.max").write_text("max\n")
    assert mapped._left_of(tmp_path) == [] == mapped._left_of(tmp_path / "nowhere")


# ---------------------------------------------------------------------- training


def trained(path: Path, load: str, **sections: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The model after a round of a few steps at the only site of a file, and what it and an evaluation reported."""
    config = from_tree(
        {
            "data": {"load": load, "augment": ["hflip", "shift1"], "mean": [0.5], "std": [0.25]},
            "training": {"batch_size": 4, "epochs": 2},
            "engine": {"device": "cpu"},
            "evaluation": {"select": "dice"},
            **sections,
        }
    )
    workshop, place = Workshop(config), Place(path, partition=0)
    env = workshop.env(workshop.data(place))
    assert env.data.mapped == (load == "map")
    state = clone_state(env.layout.exchanged_state(env.model))
    head = {"round": 1, "rounds": 2, "personal_round": 0, "durable_round": 0}
    reply = answer("train", workshop, place, pack(arrays=state, config=head))
    model = decode_state(reply.array_records["arrays"])
    score = answer("evaluate", workshop, place, pack(arrays=model, config=head))
    reports = [dict(content.metric_records["metrics"]) for content in (reply, score)]
    for report in reports:
        report.pop("seconds", None)
    return model, reports


@pytest.mark.parametrize("kind", ["colour", "scattered", "packed"])
def test_training_gives_the_same_bits(tmp_path: Path, kind: str) -> None:
    path = write_masks(tmp_path / "a.h5", **FILES[kind][0])
    network = {"model": {"name": "unet", "args": {"base_width": 4}, "activation": "sigmoid"}}
    (one, said), (other, also) = (trained(path, load, **network) for load in ("memory", "map"))
    assert all(torch.equal(one[name], other[name]) for name in one) and said == also
    assert "test/global/dice" in said[1] and said[0]["train_loss"] > 0


def sparse_file(path: Path, count: int, size: int, channels: int, masks: bool) -> int:
    """A site file with room for `count` images of which none is written: all zeros, hardly any disk. Gives the bytes of images and masks."""
    row = (size, size, channels) if channels > 1 else (size, size)
    shapes = {"image": row, **({"mask": row[:2]} if masks else {})}
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(path, "w", libver="v110") as file:
        file.attrs.update(task="segmentation" if masks else "classification", layout_version="fedmed-data-1")
        names = {"classes": ["background", "lesion"], "channels": [f"c{k}" for k in range(channels)]}
        for key, value in {**names, "image_size": [size, size]}.items():
            file.attrs[key] = json.dumps(value)
        for name, shape in shapes.items():
            file.create_dataset(name, (count, *shape), np.uint8, chunks=(1, *shape), dcpl=properties)
        if not masks:
            file["label"] = np.arange(count) % 2
        for name, rows in {"train": range(count - 20), "test": range(count - 20, count)}.items():
            keeper = file if len(rows) > 10_000 else file.attrs
            keeper[f"{name}_idx"] = np.array(rows, dtype=np.int32)
    return sum(count * int(np.prod(shape)) for shape in shapes.values())


def test_a_mapped_site_takes_no_memory_for_its_images(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    size = sparse_file(path, 400, 256, 1, masks=True)

    def peak(load: str) -> int:
        tracemalloc.start()
        try:
            with SiteFile.open(path) as file:
                split = file.site("a", load=load).split("train")
            rng = torch.Generator().manual_seed(0)
            for batch, _ in zip(batches(split, 8, rng, Augment(["hflip"])), range(5), strict=False):
                assert len(batch) == 8
            assert split.class_counts().tolist() == [380 * 256 * 256, 0]
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak("map") < size / 4 and peak("memory") > size


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from test_mapped import trained
from fedmed.errors import UserError

path, load, model, limit = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
sections = {{
    "model": {{"name": model, "args": {{"base_width": 4}} if model == "unet" else {{"widths": [4, 4]}}, "activation": sys.argv[5]}},
    "training": {{"batch_size": 4, "max_steps": 3}}, "evaluation": {{}}, "data": {{"load": load}},
}}
used = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
model, reports = trained(path, load, **sections)
print(reports[0]["num-examples"], reports[1]["n/test"])
"""


def limited(path: Path, load: str, model: str, activation: str, limit: int) -> subprocess.CompletedProcess[str]:
    """Train three steps and evaluate in a process that may take `limit` bytes of private memory more than its libraries."""
    script = LIMITED.format(folder=str(Path(__file__).parent))
    command = [sys.executable, "-c", script, str(path), load, model, str(limit), activation]
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=200)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of private memory as Linux has them")
def test_a_file_larger_than_memory_trains_and_is_scored(tmp_path: Path) -> None:
    path, limit = tmp_path / "labels.h5", 400 << 20
    size = sparse_file(path, 20_000, 512, 3, masks=False)
    assert size > 30 * limit and path.stat().st_blocks * 512 < 50 << 20
    done = limited(path, "map", "small_cnn", "softmax", limit)
    assert done.returncode == 0 and done.stdout.split() == ["19980", "20"], done.stderr
    whole = limited(path, "memory", "small_cnn", "softmax", limit)
    assert whole.returncode != 0 and "MemoryError" in whole.stderr  # the limit is one

    path = tmp_path / "masks.h5"
    size = sparse_file(path, 12_000, 256, 3, masks=True)
    assert size > 7 * limit
    done = limited(path, "map", "unet", "sigmoid", limit)
    assert done.returncode == 0 and done.stdout.split() == ["11980", "20"], done.stderr
