"""The check of a site file: every fault, planted once, is found and nothing else; a file without faults gives nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from data_prep.checks import WITH_ERRORS, check_file, examine
from data_prep.checks import scan as scanning
from fedmed.data.phantom import PHANTOM_KINDS, make_phantom
from fedmed.data.site_file import SiteFile
from fedmed.data.writer import SiteArrays, write_site_file
from fedmed.errors import UserError

SPLIT = {"train": np.arange(6), "val": np.arange(6, 8), "test": np.arange(8, 10)}
META = {"channels": ["grey"], "image_size": [8, 8]}


def build(path: Path, task: str = "segmentation", **more: Any) -> Path:
    """Two sites of ten images, two of each patient, without a fault."""
    sites = []
    for index, name in enumerate(("north", "south")):
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (10, 8, 8), dtype=np.uint8)
        mask = np.zeros((10, 8, 8), dtype=np.uint8)
        mask[:, 2:5, 2:6] = 1
        label = (np.arange(10) % 2).astype(np.int64)
        findings = np.stack([label, 1 - label], axis=1)
        annotations = {
            "segmentation": {"mask": mask},
            "classification": {"label": label},
            "multilabel": {"label": findings},
        }
        group = [f"{name}-{row // 2}" for row in range(10)]
        items = [f"{name}-{row // 2}-{row % 2}" for row in range(10)]
        extras = {key: values.copy() for key, values in more.items()}
        sites.append(SiteArrays(name, image, annotations[task], SPLIT, items, group, extras))
    return write_site_file(path, {**META, "task": task, "classes": ["background", "lesion"]}, sites)


def found(path: Path, *severities: str) -> list[tuple[str, str]]:
    """(severity, code) of what is found, without notes unless asked for."""
    kept = severities or ("error", "warning")
    return sorted((f.severity, f.code) for f in examine(path)[2].found if f.severity in kept)


@pytest.mark.parametrize("task", ["segmentation", "classification", "multilabel"])
def test_a_good_file_gives_nothing(tmp_path: Path, task: str) -> None:
    path = build(tmp_path / "good.h5", task, slice_no=np.arange(10) % 2, modality_present=np.ones((10, 1), np.uint8))
    said: list[str] = []
    assert check_file(path, say=said.append) == 0
    assert examine(path)[2].found == []
    assert (
        "20 images of 2 sites" in said[0]
        and "6 (60 %)" in said[0]
        and said[0].endswith("0 errors, 0 warnings, 0 notes")
    )


@pytest.mark.parametrize("kind", PHANTOM_KINDS)
def test_phantoms_have_no_errors(tmp_path: Path, kind: str) -> None:
    path = make_phantom(tmp_path / "phantom.h5", kind, num_sites=2, images_per_site=40, image_size=16)
    assert found(path, "error") == []


Plant = Callable[[h5py.File], object]


def _set(site: str, key: str, row: Any, value: Any) -> Plant:
    """A plant that overwrites rows of a dataset."""

    def plant(file: h5py.File) -> None:
        values = file[site][key][...]
        values[row] = value
        del file[site][key]
        file[site][key] = values

    return plant


def _replace(site: str, key: str, change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    """A plant that puts another array in the place of a dataset (or of nothing)."""

    def plant(file: h5py.File) -> None:
        values = file[site][key][...] if key in file[site] else np.empty(0)
        if key in file[site]:
            del file[site][key]
        file[site][key] = change(values)

    return plant


def _attr(site: str, key: str, value: Any) -> Plant:
    """A plant that sets an attribute, or deletes it (None)."""

    def plant(file: h5py.File) -> None:
        node = file[site] if site else file
        if value is None:
            del node.attrs[key]
        else:
            node.attrs[key] = value

    return plant


def _copy_image(source: tuple[str, int], target: tuple[str, int]) -> Plant:
    def plant(file: h5py.File) -> None:
        file[target[0]]["image"][target[1]] = file[source[0]]["image"][source[1]]

    return plant


def _as_float(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32) / 255


def _poisoned(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        floats = _as_float(values)
        floats[3, 0, 0] = value
        return floats

    return change


def _renamed(row: int, name: str) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        names = values.tolist()
        names[row] = name.encode()
        return np.array(names, dtype=bytes)

    return change


SEGMENTATION: dict[str, tuple[Plant, list[tuple[str, str]]]] = {
    "version": (_attr("", "layout_version", "old"), [("error", "root")]),
    "task": (_attr("", "task", "segmentatio"), [("error", "root")]),
    "no classes": (_attr("", "classes", None), [("error", "root")]),
    "size": (_attr("", "image_size", "[8]"), [("error", "root")]),
    "class twice": (_attr("", "classes", '["a", "a"]'), [("error", "root")]),
    "recipe": (_attr("", "recipe", "{"), [("error", "root")]),
    "site name": (_attr("site_01", "site_name", "north"), [("error", "site_name")]),
    "channels": (_attr("", "channels", '["a", "b"]'), [("error", "layout"), ("error", "layout")]),
    "image type": (_replace("site_00", "image", lambda v: v.astype(np.int32)), [("error", "layout")]),
    "mask shape": (_replace("site_00", "mask", lambda v: v[:, :4]), [("error", "layout")]),
    "mask type": (_replace("site_00", "mask", lambda v: v.astype(np.float32)), [("error", "label_type")]),
    "mask value": (_set("site_00", "mask", (4, 0, 0), 7), [("error", "label_value")]),
    "split out of range": (_attr("site_00", "test_idx", [8, 12]), [("error", "splits"), ("warning", "unused")]),
    "two splits": (_attr("site_00", "val_idx", [5, 6, 7]), [("error", "splits")]),
    "unused": (_attr("site_00", "train_idx", [0, 1, 2, 3]), [("warning", "unused")]),
    "no train": (_attr("site_00", "train_idx", np.zeros(0, int)), [("error", "no_train"), ("warning", "unused")]),
    "no test": (_attr("site_00", "test_idx", np.zeros(0, int)), [("warning", "no_test"), ("warning", "unused")]),
    "annotation": (_attr("site_00", "annotation", "scribble"), [("error", "annotation")]),
    "ignore value": (_attr("site_00", "ignore_value", "none"), [("error", "attribute")]),
    "label kind": (_attr("site_00", "label_kind", [1, 2]), [("error", "attribute")]),
    "site name is no text": (_attr("site_00", "site_name", [1, 2]), [("error", "site_name")]),
    "single value": (_replace("site_00", "slice_no", lambda v: np.int64(3)), [("error", "layout")]),
    "NaN": (_replace("site_00", "image", _poisoned(np.nan)), [("error", "not_finite")]),
    "infinite": (_replace("site_00", "image", _poisoned(np.inf)), [("error", "not_finite")]),
    "float range": (_replace("site_00", "image", _poisoned(40.0)), [("warning", "outside")]),
    "constant": (_set("site_00", "image", 3, 9), [("warning", "constant")]),
    "dark": (_replace("site_00", "image", lambda v: v.astype(np.uint16)), [("warning", "dark")]),
    "all empty": (_set("site_00", "mask", slice(0, 6), 0), [("warning", "empty_masks")]),
    "train = test": (_copy_image(("site_00", 2), ("site_00", 9)), [("error", "train_test_duplicates")]),
    "train = test of another": (_copy_image(("site_00", 2), ("site_01", 9)), [("error", "train_test_duplicates")]),
    "train = train": (_copy_image(("site_00", 2), ("site_00", 3)), [("warning", "duplicates")]),
    "train = val": (_copy_image(("site_00", 2), ("site_00", 7)), [("warning", "duplicates")]),
    "two sites": (_copy_image(("site_00", 2), ("site_01", 3)), [("warning", "site_duplicates")]),
    "patient": (_replace("site_00", "group_id", _renamed(9, "north-0")), [("error", "group_leak")]),
    "patient elsewhere": (_replace("site_00", "group_id", _renamed(9, "south-0")), [("warning", "group_at_sites")]),
    "no patient": (_replace("site_00", "group_id", _renamed(0, "")), [("warning", "no_groups")]),
    "item twice": (_replace("site_00", "item_id", _renamed(9, "north-0-0")), [("warning", "item_twice")]),
    "ids": (_replace("site_00", "item_id", lambda v: v[:4]), [("error", "layout")]),
    "present": (_replace("site_00", "modality_present", lambda v: np.ones((10, 2))), [("error", "modality_present")]),
    "active": (_replace("site_00", "active_classes", lambda v: np.full(2, 3)), [("error", "active_classes")]),
    "date": (_replace("site_00", "item_id", _renamed(0, "scan_20190412_a")), [("warning", "identifiers")]),
    "UID": (_replace("site_00", "group_id", _renamed(0, "1.2.840.113619.2.5")), [("warning", "identifiers")]),
    "name": (_replace("site_00", "item_id", _renamed(0, "Muster_Erika_3")), [("warning", "identifiers")]),
}  # fmt: skip


@pytest.mark.parametrize("fault", SEGMENTATION)
def test_a_planted_fault_is_found_and_nothing_else(tmp_path: Path, fault: str) -> None:
    plant, expected = SEGMENTATION[fault]
    path = build(tmp_path / "bad.h5")
    with h5py.File(path, "r+") as file:
        plant(file)
    assert found(path) == sorted(expected)
    said: list[str] = []
    code = WITH_ERRORS if any(severity == "error" for severity, _ in expected) else 0
    assert check_file(path, say=said.append, quiet=True) == code
    for secret in ("north-0", "south-0", "Erika", "20190412", "1.2.840"):
        assert secret not in said[0]


def test_what_the_check_passes_the_reader_opens(tmp_path: Path) -> None:
    """Wherever the reader stops, the check has an error; and it finds two faults of two sites at once."""
    for fault, (plant, expected) in SEGMENTATION.items():
        path = build(tmp_path / "bad.h5")
        with h5py.File(path, "r+") as file:
            plant(file)
        try:
            with SiteFile.open(path) as sites:
                for info in sites.sites:
                    sites.site(info.name)
        except (UserError, ValueError, TypeError):
            assert any(severity == "error" for severity, _ in expected), fault
    path = build(tmp_path / "bad.h5")
    with h5py.File(path, "r+") as file:
        SEGMENTATION["mask shape"][0](file)
        _set("site_01", "mask", (4, 0, 0), 7)(file)
    assert found(path) == [("error", "label_value"), ("error", "layout")]


LABELS: dict[str, tuple[str, Plant, list[tuple[str, str]]]] = {
    "class": ("classification", _set("site_00", "label", 1, 5), [("error", "label_value")]),
    "negative": ("classification", _set("site_00", "label", 1, -1), [("error", "label_value")]),
    "float": ("classification", _replace("site_00", "label", lambda v: v.astype(float)), [("error", "label_type")]),
    "columns": ("multilabel", _replace("site_00", "label", lambda v: v[:, :1]), [("error", "layout")]),
    "two": ("multilabel", _set("site_00", "label", (1, 0), 2), [("error", "label_value")]),
    "not annotated": (
        "multilabel",
        _replace("site_00", "active_classes", lambda v: np.array([1, 0])),
        [("warning", "active_classes")],
    ),
}


@pytest.mark.parametrize("fault", LABELS)
def test_a_planted_label_fault_is_found(tmp_path: Path, fault: str) -> None:
    task, plant, expected = LABELS[fault]
    path = build(tmp_path / "bad.h5", task)
    with h5py.File(path, "r+") as file:
        plant(file)
    assert found(path) == expected


def test_volumes_keep_their_slices_together(tmp_path: Path) -> None:
    path = build(tmp_path / "bad.h5", slice_no=np.arange(10) % 2)
    with h5py.File(path, "r+") as file:
        SEGMENTATION["patient"][0](file)
    assert found(path) == [("error", "volume_leak")]
    assert "1 volume (3 slices)" in examine(path)[2].found[0].text


def test_classes_without_images(tmp_path: Path) -> None:
    path = build(tmp_path / "bad.h5", "classification")
    with h5py.File(path, "r+") as file:
        _set("site_00", "label", slice(0, 6), 0)(file)  # at one site: a note
    assert found(path) == []
    assert found(path, "note") == [("note", "class_without_train")]
    with h5py.File(path, "r+") as file:
        _set("site_01", "label", slice(0, 6), 0)(file)  # anywhere: a warning
    assert found(path) == [("warning", "class_without_train")]
    _, records, _ = examine(path)
    assert records[0]["classes"] == {
        "background": {"train": 6, "val": 1, "test": 1},
        "lesion": {"train": 0, "val": 1, "test": 1},
    }


def test_empty_masks_are_counted_by_split(tmp_path: Path) -> None:
    path = build(tmp_path / "some.h5")
    with h5py.File(path, "r+") as file:
        _set("site_00", "mask", [0, 1, 8], 0)(file)
    _, records, findings = examine(path)
    assert records[0]["empty_masks"] == {"train": 2, "val": 0, "test": 1} and records[1]["empty_masks"]["train"] == 0
    assert [(f.severity, f.text) for f in findings.found] == [
        ("note", "empty masks (background only): train 2 of 6, test 1 of 2")
    ]


def test_weak_annotation(tmp_path: Path) -> None:
    """A scribble may hold its ignore value; an image without any stroke is a warning, withheld masks are an error only where they are read."""
    scribble = np.full((10, 8, 8), 2, dtype=np.uint8)
    scribble[:, 0, :4] = 0
    path = build(tmp_path / "weak.h5", scribble=scribble)
    with h5py.File(path, "r+") as file:
        for site in ("site_00", "site_01"):
            file[site].attrs.update({"annotation": "scribble", "label_kind": "scribble", "ignore_value_in_mask": 2})
            _set(site, "mask", slice(0, 6), 2)(file)
    assert found(path) == [("warning", "class_without_train")]  # no stroke of a lesion anywhere
    with h5py.File(path, "r+") as file:
        _set("site_00", "scribble", (slice(None), 1, 1), 1)(file)
    assert found(path) == []
    _, records, _ = examine(path)
    assert records[0]["drawn_share"] == round(5 / 64, 4) and records[0]["label_kind"] == "scribble"
    with h5py.File(path, "r+") as file:
        _set("site_00", "scribble", 2, 2)(file)
        file["site_01"].attrs["annotation"] = "mask"
    assert found(path) == [("error", "withheld"), ("warning", "nothing_drawn")]


def test_a_channel_that_should_be_there(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (10, 8, 8, 2), dtype=np.uint8)
    image[[1, 2], ..., 1] = 0
    present = np.ones((10, 2), np.uint8)
    present[2, 1] = 0
    label = {"label": np.arange(10) % 2}
    site = SiteArrays("north", image, label, SPLIT, extras={"modality_present": present})
    meta = {"task": "classification", "classes": ["a", "b"], "channels": ["T1", "T2"], "image_size": [8, 8]}
    findings = examine(write_site_file(tmp_path / "two.h5", meta, [site]))[2].found
    assert [(f.code, f.rows) for f in findings] == [("modality_present", (("north", 1),))]


def test_pixels_in_another_file(tmp_path: Path) -> None:
    path, other = build(tmp_path / "bad.h5"), build(tmp_path / "other.h5")
    with h5py.File(path, "r+") as file:
        del file["site_00"]["image"]
        file["site_00"]["image"] = h5py.ExternalLink(other.name, "site_00/image")
    assert ("error", "elsewhere") in found(path)


def test_a_damaged_chunk(tmp_path: Path) -> None:
    path = build(tmp_path / "bad.h5")
    with h5py.File(path, "r+") as file:
        place = file["site_00"]["image"].id.get_chunk_info(0)
    with path.open("r+b") as stream:
        stream.seek(place.byte_offset)
        stream.write(b"\0" * place.size)
    assert found(path, "error") == [("error", "damaged")]


def test_duplicates_name_rows(tmp_path: Path) -> None:
    path = build(tmp_path / "bad.h5")
    with h5py.File(path, "r+") as file:
        _copy_image(("site_00", 2), ("site_01", 9))(file)
        _set("site_00", "image", [4, 5], 0)(file)  # constant images are no duplicates
    finding = next(f for f in examine(path)[2].found if f.code == "train_test_duplicates")
    assert finding.text == "1 set of images with equal pixels in train and in test: 'north' row 2 = 'south' row 9"
    assert finding.count == 2 and finding.rows == (("north", 2), ("south", 9))


def test_blocks_are_whole_chunks_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come in order, each once; a block holds few rows, and the result does not depend on its size."""
    path = build(tmp_path / "good.h5")
    with h5py.File(path) as file:
        dataset = file["site_00"]["image"]  # 64 bytes a row, 8 rows a chunk
        assert [rows for rows, _ in scanning.blocks(dataset, 64)] == [slice(0, 8), slice(8, 10)]
        assert [rows for rows, _ in scanning.blocks(dataset, 10**6)] == [slice(0, 10)]
        parts = [values for _, values in scanning.blocks(dataset, 1)]
        np.testing.assert_array_equal(np.concatenate(parts), dataset[...])
    whole = examine(path)[1]
    monkeypatch.setattr(scanning, "BLOCK_BYTES", 1)
    assert examine(path)[1] == whole


@pytest.mark.parametrize(
    ("name", "expected"),
    [("DOE^JANE", 1), ("Doe 12.04.1961", 1), ("Basal_Cell Carcinoma", 0), ("TCGA-CS", 0), ("North 2019", 0)],
)
def test_names_of_sites_and_classes(tmp_path: Path, name: str, expected: int) -> None:
    path = build(tmp_path / "names.h5")
    with h5py.File(path, "r+") as file:
        file["site_00"].attrs["site_name"] = name
        file.attrs["classes"] = json.dumps([*json.loads(file.attrs["classes"])[:-1], name])
    hits = [finding for finding in examine(path)[2].found if finding.code == "names"]
    assert len(hits) == 2 * expected and all(f.count == 1 and name not in f.text for f in hits)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a1b2c3d4e5f620190412", 0),  # a hash
        ("00000013_000", 0), ("ISIC_0024310", 0), ("patient002_frame01_slice_0", 0), ("20191345", 0),
        ("TCGA_CS_4941_19960909", 1), ("x-2019-04-12", 1), ("12.04.2019", 1), ("20190412123456", 1), ("DOE^JANE", 1),
        ("phantom-00/case00001", 0), ("Image_01L", 0),
    ],
)  # fmt: skip
def test_identifiers(tmp_path: Path, text: str, expected: int) -> None:
    path = build(tmp_path / "ids.h5")
    with h5py.File(path, "r+") as file:
        _replace("site_00", "item_id", _renamed(0, text))(file)
    hits = [f.count for f in examine(path)[2].found if f.code == "identifiers"]
    assert hits == [1] * expected


def test_json(tmp_path: Path) -> None:
    path = build(tmp_path / "bad.h5")
    with h5py.File(path, "r+") as file:
        SEGMENTATION["patient"][0](file)
    assert check_file(path, say=lambda _: None, json=tmp_path / "found.json") == WITH_ERRORS
    text = (tmp_path / "found.json").read_text()
    content = json.loads(text)
    assert content["errors"] == 1 and content["findings"][0]["code"] == "group_leak" and content["sites"][0]["n"] == 10
    assert "north-0" not in text and str(tmp_path) not in text
    with pytest.raises(UserError, match="expected the name of a file"):
        check_file(path, say=lambda _: None, json=path)
    assert SiteFile.open(path).sites[0].n == 10


def test_what_is_no_site_file(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("no")
    with h5py.File(tmp_path / "empty.h5", "w"):
        pass
    for name in ("text.h5", "empty.h5", "absent.h5"):
        with pytest.raises(UserError):
            examine(tmp_path / name)


def test_a_site_at_the_root(tmp_path: Path) -> None:
    whole, path = build(tmp_path / "good.h5"), tmp_path / "root.h5"
    with h5py.File(whole) as file, h5py.File(path, "w") as own:
        own.attrs.update(file.attrs)
        for key in file["site_00"]:
            file["site_00"].copy(key, own)
        own.attrs.update(file["site_00"].attrs)
    assert examine(path)[2].found == [] and examine(path)[1][0]["site"] == "north"


SAMPLES = Path(os.environ.get("FEDMED_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no real site files: set FEDMED_DATA")
@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.h5")) or [SAMPLES], ids=lambda path: path.stem)
def test_real_samples_have_no_errors(path: Path) -> None:
    assert found(path, "error") == []
    assert not any(f.code.endswith("duplicates") for f in examine(path)[2].found)
