from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep.protocol import derive, describe
from fedmed.config import DataConfig, StepConfig, load_config
from fedmed.data.site_file import SiteFile, read_truth
from fedmed.data.writer import SiteArrays, write_site_file
from fedmed.errors import UserError

NO_STEP = StepConfig()
FEDNORO = StepConfig("fednoro", {"num_clients": 5, "p_class": 0.9, "alpha": 2.0})
LABELS = StepConfig("label_noise", {"kind": "instance"})
FEDISM = StepConfig("fedism", {"num_clients": 4, "num_corrupted": 2})
POOR = StepConfig("image_quality", {"kind": "contrast", "num_corrupted": 2})
CONTOURS = StepConfig("contour_noise", {"mean_low": 2.0, "mean_high": 4.0, "std": 1.0, "num_shrinkers": 1})


def config(path: Path, partition: StepConfig = NO_STEP, corruption: StepConfig = NO_STEP, **rest: object) -> DataConfig:
    return DataConfig(path=str(path), partition=partition, corruption=corruption, **rest)  # type: ignore[arg-type]


def split_thirds(size: int) -> dict[str, np.ndarray]:
    rows = np.arange(size)
    return {"train": rows[rows % 5 < 3], "val": rows[rows % 5 == 3], "test": rows[rows % 5 == 4]}


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    sites = []
    for index, size in enumerate((60, 40)):
        label = rng.integers(0, 3, size)
        image = rng.integers(0, 80, (size, 16, 16, 3)).astype(np.uint8)
        image[np.arange(size), :, :, label] += 50
        ids = [f"{index}-{item}" for item in range(size)]
        extras = {"age": rng.integers(20, 90, size)}
        sites.append(SiteArrays(f"hospital {index}", image, {"label": label}, split_thirds(size), ids, ids, extras))
    meta = {"task": "classification", "classes": ["a", "b", "c"], "channels": ["R", "G", "B"], "image_size": [16, 16]}
    return write_site_file(tmp_path / "labels.h5", {**meta, "licence": "none"}, sites)


@pytest.fixture
def outlined(tmp_path: Path) -> Path:
    rows, columns = np.mgrid[:64, :64] - 32
    sites = []
    for index, size in enumerate((20, 15)):
        radius = 16 + (np.arange(size) % 6)
        mask = (rows**2 + columns**2 <= radius[:, None, None] ** 2).astype(np.uint8)
        scribble = np.where(rows == 0, mask, 2).astype(np.uint8)
        sites.append(SiteArrays(f"site {index}", mask * 200, {"mask": mask, "scribble": scribble}, split_thirds(size)))
    meta = {"task": "segmentation", "classes": ["background", "disc"], "channels": ["grey"], "image_size": [64, 64]}
    return write_site_file(tmp_path / "masks.h5", meta, sites)


def test_without_a_recipe_the_source_is_returned_untouched(labelled, tmp_path):
    before = hashlib.sha256(labelled.read_bytes()).hexdigest()
    assert derive(config(labelled), 0, tmp_path / "cache") == labelled
    assert hashlib.sha256(labelled.read_bytes()).hexdigest() == before
    assert not (tmp_path / "cache").exists() and describe(labelled) == []


def test_every_item_goes_to_one_client_and_keeps_its_split(labelled, tmp_path):
    path = derive(config(labelled, FEDNORO), 3, tmp_path)
    found: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    with SiteFile.open(path) as file, h5py.File(labelled) as source:
        assert [site.name for site in file.sites] == [f"client_{index:02d}" for index in range(5)]
        for site in file.sites:
            data = file.site(site.name, allow_empty_train=True)
            for split, rows in data.splits.items():
                found[split] += [data.item_id[row] for row in rows]
            for row, item in enumerate(data.item_id):  # image, label and extras travel together
                group, position = item.split("-")
                original = source[f"site_0{group}"]
                assert np.array_equal(data.image[row], original["image"][int(position)])
                assert data.target[row] == original["label"][int(position)]
                assert data.extras["age"][row] == original["age"][int(position)]
        expected = {
            split: sorted(f"{g}-{i}" for g, size in enumerate((60, 40)) for i in split_thirds(size)[split])
            for split in found
        }
        assert {split: sorted(ids) for split, ids in found.items()} == expected
        central = file.site("central", allow_empty_train=True)
        for split in ("val", "test"):
            assert sorted(central.item_id[row] for row in central.splits[split]) == expected[split]
        assert central.num_examples("train") == 0
        sizes = [site.n_test for site in file.sites]
        assert max(sizes) - min(sizes) <= 1
    assert read_truth(path) == {}


def test_label_noise_touches_training_labels_only_and_says_how_much(labelled, tmp_path):
    path = derive(config(labelled, FEDNORO, LABELS), 1, tmp_path)
    truth = read_truth(path)
    with h5py.File(path) as file, SiteFile.open(path) as sites:
        assert "reference" not in file["central"]
        for info in sites.sites:
            node = file[info.group]
            changed = node["label"][:] != node["reference/label"][:]
            train = node.attrs["train_idx"]
            assert not np.delete(changed, train).any()
            rate = changed[train].mean() if len(train) else 0.0
            assert truth[info.name]["noise_rate"] == pytest.approx(rate)
            assert truth[info.name]["is_noisy"] == (rate > 0)
    assert 0 < sum(entry["is_noisy"] for entry in truth.values()) <= 2
    table = describe(path)
    assert [row["site"] for row in table] == list(truth)
    assert [row["noise_rate"] for row in table] == [entry["noise_rate"] for entry in truth.values()]


def test_natural_sites_keep_names_and_all_else(labelled, tmp_path):
    path = derive(config(labelled, StepConfig("natural"), LABELS), 1, tmp_path)
    with SiteFile.open(path) as file:
        assert [site.name for site in file.sites] == ["hospital 0", "hospital 1"]
        assert file.meta["licence"] == "none" and file.central
    cut = derive(config(labelled, StepConfig("natural", {"clients_per_site": [2, 1]})), 1, tmp_path)
    with SiteFile.open(cut) as file:
        assert [site.n for site in file.sites] == [30, 30, 40]
        origin = [{item.split("-")[0] for item in file.site(site.name).item_id} for site in file.sites]
        assert origin == [{"0"}, {"0"}, {"1"}]


def test_contours_after_resize(outlined, tmp_path):
    data = config(outlined, StepConfig("iid", {"num_clients": 3}), CONTOURS, resize=48)
    path = derive(data, 0, tmp_path)
    with SiteFile.open(path) as file, h5py.File(path) as raw:
        assert file.image_size == (48, 48)
        for site in file.sites:
            node = raw[site.group]
            train, clean = node.attrs["train_idx"], node["reference/mask"][:]
            assert node["image"].shape[1:] == node["mask"].shape[1:] == node["scribble"].shape[1:] == (48, 48)
            assert set(np.unique(node["mask"][:])) == {0, 1} and set(np.unique(node["scribble"][:])) <= {0, 1, 2}
            assert np.array_equal(np.delete(node["mask"][:], train, 0), np.delete(clean, train, 0))
            larger = node["mask"][:][train].sum() > clean[train].sum()
            assert larger == (node["reference"].attrs["mu"] > 0)
    rows = describe(path)
    assert sum(row["direction"] == "shrinkage" for row in rows) == 1
    assert all(row["noise_rate"] == pytest.approx(1 - row["mean_dice"]) and row["sigma"] <= 1 for row in rows)


def test_all_images_of_a_corrupted_client_are_degraded_and_nothing_else(labelled, tmp_path):
    clean, poor = (derive(config(labelled, FEDISM, step), 1, tmp_path) for step in (NO_STEP, POOR))
    with h5py.File(clean) as before, h5py.File(poor) as after:
        for index in range(4):
            old, new = before[f"site_0{index}"], after[f"site_0{index}"]
            assert all(np.array_equal(old[key][:], new[key][:]) for key in old if key != "image")
            changed = (old["image"][:] != new["image"][:]).reshape(len(old["image"]), -1).any(axis=1)
            assert changed.all() if index >= 2 else not changed.any()  # train, val and test alike
            assert ("image" in new["reference"]) == (index >= 2)
            if index >= 2:
                assert np.array_equal(new["reference/image"][:], old["image"][:])
    truth = read_truth(poor)
    assert [truth[f"client_0{index}"]["is_noisy"] for index in range(4)] == [False, False, True, True]
    assert [row["severity"] for row in describe(poor)] == [0, 0, 3, 3]
    assert all(0.02 < row["mean_abs_error"] < 0.5 for row in describe(poor)[2:])


def test_central_items_exist_clean_and_degraded(labelled, tmp_path):
    clean, poor = (derive(config(labelled, FEDISM, step), 1, tmp_path) for step in (NO_STEP, POOR))
    with h5py.File(clean) as before, h5py.File(poor) as after, SiteFile.open(poor) as file:
        assert file.conditions == ("corrupted",) and SiteFile.open(clean).conditions == ()
        for key in before["central"]:
            assert np.array_equal(before["central"][key][:], after["central"][key][:])
        central, other = (file.site(name, allow_empty_train=True) for name in ("central", "central_corrupted"))
        assert other.item_id == central.item_id and np.array_equal(other.target, central.target)
        for split in ("train", "val", "test"):
            assert np.array_equal(other.splits[split], central.splits[split])
        assert (other.image != central.image).reshape(len(other.image), -1).any(axis=1).all()
        assert "reference" not in after["central"] and "reference" not in after["central_corrupted"]
        assert len(file.sites) == 4 and other.name == "central_corrupted"


@pytest.mark.parametrize("source", ["labelled", "outlined"])
def test_image_quality_fits_natural_sites_and_any_task(request, source, tmp_path):
    step = StepConfig("image_quality", {"kind": "resolution", "num_corrupted": 1, "which": [0]})
    path = derive(config(request.getfixturevalue(source), corruption=step), 0, tmp_path)
    again = derive(config(path, StepConfig("iid", {"num_clients": 2}), step), 0, tmp_path)  # of a derived file
    for file in (path, again):
        assert [row["is_noisy"] for row in describe(file)] == [True, False]


def test_empty_clients_and_a_source_without_central_items(labelled, tmp_path):
    with h5py.File(labelled, "r+") as file:
        for site in file.values():
            site.attrs["train_idx"] = np.arange(2)
            for split in ("val_idx", "test_idx"):
                site.attrs[split] = np.arange(0)
    partition = StepConfig("fedism", {"num_clients": 12, "num_corrupted": 6})
    path = derive(config(labelled, partition, StepConfig("image_quality", {"num_corrupted": 6})), 0, tmp_path)
    rows = describe(path)
    assert len(rows) == 12 and any(row["n_train"] == 0 for row in rows[6:])
    assert [row["is_noisy"] for row in rows] == [index >= 6 and row["n_train"] > 0 for index, row in enumerate(rows)]
    with SiteFile.open(path) as file:
        assert not file.central and file.conditions == ()


def test_the_name_depends_on_content_recipe_and_seed_only(labelled, tmp_path):
    first = derive(config(labelled, FEDNORO, LABELS), 0, tmp_path)
    content = first.read_bytes()
    assert derive(config(labelled, FEDNORO, LABELS), 0, tmp_path) == first
    spelled = StepConfig("fednoro", {**FEDNORO.args, "seed": None})
    assert derive(config(labelled, spelled, LABELS), 0, tmp_path) == first
    others = {
        derive(config(labelled, FEDNORO, LABELS), 1, tmp_path),
        derive(config(labelled, FEDNORO), 0, tmp_path),
        derive(config(labelled, FEDNORO, LABELS, resize=8), 0, tmp_path),
    }
    assert len({first, *others}) == 4
    first.unlink()
    assert derive(config(labelled, FEDNORO, LABELS), 0, tmp_path).read_bytes() == content  # rebuilt alike
    with h5py.File(labelled, "r+") as file:
        file["site_00/image"][0, 0, 0] = 255
    assert derive(config(labelled, FEDNORO, LABELS), 0, tmp_path) != first


def test_a_fixed_seed_does_not_move_with_the_run(labelled, tmp_path):
    partition = StepConfig("fednoro", {**FEDNORO.args, "seed": 100})
    corruption = StepConfig("label_noise", {"kind": "instance", "seed": 0})
    paths = [derive(config(labelled, partition, corruption), seed, tmp_path) for seed in (0, 1)]
    with h5py.File(paths[0]) as one, h5py.File(paths[1]) as two:
        for group in one:
            assert np.array_equal(one[group]["item_id"][:], two[group]["item_id"][:])
            assert np.array_equal(one[group]["label"][:], two[group]["label"][:])


def test_two_at_once_do_not_clash(labelled, tmp_path):
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(derive(config(labelled, FEDNORO), 0, tmp_path / "new")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 2
    assert [path.name for path in (tmp_path / "new").iterdir()] == [found[0].name]
    assert len(describe(found[0])) == 5


def test_sites_that_annotate_other_classes_can_be_pooled(labelled, tmp_path):
    with h5py.File(labelled, "r+") as file:
        file["site_01"].attrs["active_classes"] = np.array([1, 0, 1], dtype=np.uint8)
    path = derive(config(labelled, StepConfig("iid", {"num_clients": 2})), 0, tmp_path)
    with SiteFile.open(path) as file:
        data = file.site("client_00")
        rows = data.extras["active_classes"].tolist()
        flags = {item.split("-")[0]: row for item, row in zip(data.item_id, rows, strict=True)}
        assert flags == {"0": [1, 1, 1], "1": [1, 0, 1]}


@pytest.mark.parametrize(
    ("source", "kwargs", "word"),
    [
        ("labelled", {"partition": StepConfig("fednora")}, "fednoro"),
        ("labelled", {"partition": StepConfig("iid", {"clients": 3})}, "num_clients"),
        ("labelled", {"partition": StepConfig(None, {"num_clients": 3})}, r"data\.partition\.name"),
        ("labelled", {"corruption": CONTOURS}, "segmentation"),
        ("labelled", {"resize": 32}, r"1\.\.16"),
        ("labelled", {"partition": StepConfig("iid", {"seed": -1})}, "seed"),
        ("outlined", {"corruption": LABELS}, "classification"),
        ("outlined", {"partition": FEDISM}, "no single class"),
        ("labelled", {"corruption": StepConfig("image_quality", {"num_corrupted": 3})}, "num_corrupted <= 2"),
        ("labelled", {"corruption": StepConfig("image_quality", {"kind": "blur"})}, "gaussian_blur"),
        ("outlined", {"partition": FEDNORO}, "no single class"),
        ("outlined", {"corruption": CONTOURS, "annotation": "scribble"}, "scribble"),
    ],
)
def test_errors(request, tmp_path, source, kwargs, word):
    with pytest.raises(UserError, match=word):
        derive(config(request.getfixturevalue(source), **kwargs), 0, tmp_path)


def test_a_missing_source_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"absent\.h5"):
        derive(config(tmp_path / "absent.h5", FEDNORO), 0, tmp_path)


def test_phantom_is_made_once_per_arguments(tmp_path):
    small = {"num_sites": 2, "images_per_site": 20, "image_size": 32}
    path = derive(config("phantom:classification", phantom=small), 0, tmp_path)
    assert path.name.startswith("phantom-classification-")
    stamp = path.stat().st_mtime_ns
    assert derive(config("phantom:classification", phantom=small), 5, tmp_path) == path
    assert path.stat().st_mtime_ns == stamp
    assert derive(config("phantom:classification", phantom={**small, "seed": 1}), 0, tmp_path) != path
    noisy = derive(
        config("phantom:classification", StepConfig("iid", {"num_clients": 4}), LABELS, phantom=small), 0, tmp_path
    )
    assert len(describe(noisy)) == 4 and sum(row["is_noisy"] for row in describe(noisy)) == 1
    with pytest.raises(UserError, match="image_size"):
        derive(config("phantom:classification", phantom={"imagesize": 3}), 0, tmp_path)


@pytest.mark.parametrize("name", ["fednoro_instance", "fednoro_symmetric"])
def test_label_protocol_examples(name, labelled, tmp_path):
    data = load_config(f"data/{name}", [f"data.path={labelled}"]).data
    path = derive(data, 0, tmp_path)
    with SiteFile.open(path) as file:
        assert len(file.sites) == 12 and json.loads(json.dumps(file.recipe)) == file.recipe


def test_image_quality_example(labelled, tmp_path):
    data = load_config("data/image_quality", [f"data.path={labelled}"]).data
    assert [row["severity"] for row in describe(derive(data, 0, tmp_path))] == [0] * 8 + [3] * 4


@pytest.mark.parametrize(("name", "clients"), [("contour_bounded", 12), ("contour_official", 50)])
def test_contour_protocol_examples(name, clients, outlined, tmp_path):
    data = load_config(f"data/{name}", [f"data.path={outlined}"]).data
    assert len(describe(derive(data, 0, tmp_path))) == clients
