"""Predictions of a site file: the rows of a split, with the site's own model where it has one."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import fedmed
from fedmed.config import from_yaml
from fedmed.data.site_file import SiteFile
from fedmed.engines.prepare import site_file
from fedmed.errors import UserError

Go = Callable[..., tuple[Path, str]]


def data_of(folder: Path) -> Path:
    """The site file a run was trained on."""
    return site_file(from_yaml((folder / "config.yaml").read_text()))


def test_masks_of_a_split(grey_run: Path, go: Go) -> None:
    path = data_of(grey_run)
    out, said = go(grey_run, path, probabilities=True)
    trained = fedmed.load(grey_run)
    with h5py.File(out / f"{path.stem}_mask.h5") as made, h5py.File(path) as stored, SiteFile.open(path) as sites:
        assert [made[site.group].attrs["site_name"] for site in sites.sites] == ["phantom-00", "phantom-01"]
        assert made.attrs["classes"].tolist() == ["background", "lesion"] and made.attrs["split"] == "test"
        for site in sites.sites:
            group, rows = made[site.group], stored[site.group].attrs["test_idx"]
            assert group["row"][...].tolist() == sorted(rows)
            images = stored[site.group]["image"][...][group["row"][...]]
            assert np.array_equal(group["prediction"][...], trained.predict_labels(images))
            assert np.allclose(group["probability"][...], trained.predict(images), atol=1e-6)
            ids = stored[site.group]["item_id"].asstr()[...][group["row"][...]]
            assert group["item_id"].asstr()[...].tolist() == ids.tolist()
    assert f"1 site file ({len(rows) * 2} images)" in said and (out / "contact.png").is_file()
    go(grey_run, path, split="all", force=True)
    with h5py.File(out / f"{path.stem}_mask.h5") as made:
        assert len(made["site_00"]["prediction"]) == 12 and "probability" not in made["site_00"]


def test_a_site_with_its_own_model(runs: Any, go: Go) -> None:
    folder = runs.train(client__name="ditto", federation__rounds=2, client__args={"lam": 0.01})
    path = data_of(folder)
    out, _ = go(folder, path, site="phantom-01", probabilities=True)
    with h5py.File(out / f"{path.stem}_mask.h5") as made, h5py.File(path) as stored:
        assert set(made) == {"site_01"}
        group = made["site_01"]
        images = stored["site_01"]["image"][...][group["row"][...]]
        own = fedmed.load(folder, site="phantom-01").predict(images)
        assert np.allclose(group["probability"][...], own, atol=1e-6)
        assert np.abs(own - fedmed.load(folder).predict(images)).max() > 1e-4


def test_labels_of_a_file_of_one_site(class_run: Path, go: Go, runs: Any) -> None:
    path = data_of(class_run)
    out, _ = go(class_run, path, site="phantom-01")
    with (out / "predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    with SiteFile.open(path) as file:
        data = file.site("phantom-01")
    test = sorted(data.splits["test"].tolist())
    assert [(row["site"], int(row["row"]), row["item_id"]) for row in rows] == [
        ("phantom-01", i, data.item_id[i]) for i in test
    ]
    labels = fedmed.load(class_run).predict_labels(np.asarray(data.image)[test])
    assert [row["predicted"] for row in rows] == [data.classes[label] for label in labels]
    alone = runs.new().with_suffix(".h5")  # a hospital's file has one site, whatever it calls itself
    with h5py.File(path) as stored, h5py.File(alone, "w") as file:
        for key, value in stored.attrs.items():
            file.attrs[key] = value
        for key, item in stored["site_00"].items():
            stored.copy(item, file, key)
        for key, value in stored["site_00"].attrs.items():
            file.attrs[key] = value
    out, said = go(class_run, alone, site="phantom-01", force=True, split="val")
    assert "site file" in said


def test_images_of_another_size_are_prepared(
    runs: Any, grey_run: Path, threshold: None, go: Go, tmp_path: Path
) -> None:
    large = runs.train(
        data__phantom={"num_sites": 2, "images_per_site": 12, "image_size": 64, "channels": 1}, data__resize=32
    )
    source = tmp_path / "source.h5"
    with h5py.File(data_of(large)) as stored, h5py.File(source, "w") as file:
        for key in stored.attrs:
            file.attrs[key] = stored.attrs[key]
        file.attrs["image_size"] = "[64, 64]"
        group = file.create_group("site_00")
        for key in stored["site_00"].attrs:
            group.attrs[key] = stored["site_00"].attrs[key]
        small = stored["site_00"]["image"][...]
        group["image"] = np.repeat(np.repeat(small, 2, axis=1), 2, axis=2)
        group["mask"] = np.zeros((len(small), 64, 64), np.uint8)
    out, _ = go(large, source)
    with h5py.File(out / "source_mask.h5") as made:
        mask = made["site_00"]["prediction"][...]
        assert mask.shape[1:] == (64, 64)
        expected = small[made["site_00"]["row"][...]] > 127
        assert (mask[:, ::2, ::2] == expected).mean() > 0.95


def test_what_is_refused(grey_run: Path, class_run: Path, go: Go, tmp_path: Path) -> None:
    path = data_of(grey_run)
    with pytest.raises(UserError, match=r"channels \(grey\), the model reads 3"):
        go(class_run, path)
    with pytest.raises(UserError, match=r"--split: expected train, val, test, all, got 'tset'; did you mean 'test'"):
        go(grey_run, path, split="tset")
    with pytest.raises(UserError, match=r"no site 'phantom_01'; did you mean 'phantom-01'"):
        go(grey_run, path, site="phantom_01")
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["x"] = 1
    with pytest.raises(UserError):
        go(grey_run, other)
    out, said = go(grey_run, other, path)  # among others it is counted
    assert "1  an HDF5 file that is no site file for this model" in said
    assert [item.name for item in out.iterdir() if item.suffix == ".h5"] == [f"{path.stem}_mask.h5"]
