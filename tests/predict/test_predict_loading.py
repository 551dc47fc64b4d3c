"""`fedmed.load`: the same answers as in the run's own evaluation, for everybody's model and for a site's own."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import fedmed
from fedmed.config import from_yaml
from fedmed.data.site_file import SiteFile
from fedmed.engines.prepare import site_file
from fedmed.errors import UserError
from fedmed.metrics.segmentation import dice_scores

FCA: dict[str, Any] = {
    "model__name": "two_heads", "model__args": {"name": "small_cnn", "args": {"widths": [4, 4]}}, "client__name": "fca",
    "federation__rounds": 2,
}  # fmt: skip


def test_set(folder: Path, site: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images, reference and names of a site's test items."""
    config = from_yaml((folder / "config.yaml").read_text())
    with SiteFile.open(site_file(config)) as file:
        data = file.site(site)
    rows = data.splits["test"]
    return np.asarray(data.image)[rows], np.asarray(data.target)[rows], [data.item_id[row] for row in rows]


test_set.__test__ = False  # type: ignore[attr-defined]


def cases(folder: Path, site: str, view: str) -> dict[str, dict[str, str]]:
    """Records of the last evaluation of a site, by item."""
    with (folder / "sites" / site / "cases.csv").open() as stream:
        return {row["item"]: row for row in csv.DictReader(stream) if row["view"] == view and row["split"] == "test"}


def test_the_common_model_scores_as_in_the_run(grey_run: Path) -> None:
    trained = fedmed.load(grey_run)
    assert (trained.view, trained.site, trained.task, trained.channels) == ("global", "", "segmentation", ("grey",))
    images, truth, names = test_set(grey_run, "phantom-00")
    prob = trained.predict(images, batch_size=2)
    assert prob.shape == (len(images), 1, 32, 32) and prob.dtype == np.float32
    labels = torch.from_numpy(trained.predict_labels(images))
    dice = dice_scores(labels, torch.from_numpy(truth.astype(np.int64)), 2)[:, 0].tolist()
    known = cases(grey_run, "phantom-00", "global")
    assert dice == pytest.approx([float(known[name]["dice"] or "nan") for name in names], abs=1e-6, nan_ok=True)
    assert trained.predict(images[:0]).shape[0] == 0


def test_a_site_has_its_own_answer(runs: Any) -> None:
    folder = runs.train(runs.classification, **FCA)
    common, own = fedmed.load(folder), fedmed.load(folder, site="phantom-01")
    assert (own.view, own.site, own.client.site_index) == ("personal", "phantom-01", 1)
    images, _, names = test_set(folder, "phantom-01")
    answers = {}
    for view, trained in (("global", common), ("personal", own)):
        answers[view] = trained.predict(images)
        known = cases(folder, "phantom-01", view)
        assert trained.predict_labels(images).tolist() == [int(float(known[name]["predicted"])) for name in names]
    assert np.abs(answers["global"] - answers["personal"]).max() > 1e-4
    assert np.abs(fedmed.load(folder, site="phantom-00").predict(images) - answers["personal"]).max() > 1e-4
    # a state folder kept elsewhere
    away = runs.new()
    shutil.copytree(folder, away)
    shutil.move(away / "sites" / "phantom-01", away / "kept")
    with pytest.raises(UserError, match=r"no own model of site 'phantom-01'.*--state"):
        fedmed.load(away, site="phantom-01")
    again = fedmed.load(away, site="phantom-01", state=away / "kept")
    assert np.array_equal(again.predict(images), answers["personal"])
    with pytest.raises(UserError, match="say which with --site"):
        fedmed.load(away, state=away / "kept")


def test_the_round_the_server_took_is_loaded(runs: Any) -> None:
    folder = runs.train(runs.classification, **FCA)
    kept = folder / "sites" / "phantom-00" / "personal"
    images, _, _ = test_set(folder, "phantom-00")
    before = fedmed.load(folder, site="phantom-00").predict(images)
    refused = kept / "round-00009"  # trained, but its reply was never taken
    shutil.copytree(folder / "sites" / "phantom-01" / "personal" / "round-00002", refused)
    assert np.array_equal(fedmed.load(folder, site="phantom-00").predict(images), before)
    shutil.rmtree(folder / "checkpoint")  # then the newest is the best guess
    assert not np.array_equal(fedmed.load(folder, site="phantom-00").predict(images), before)
    with pytest.raises(UserError, match=r"no site 'phantom-0'.*did you mean 'phantom-0"):
        fedmed.load(folder, site="phantom-0")


def test_every_site_alone(runs: Any) -> None:
    folder = runs.train(federation__local_only=True)
    with pytest.raises(UserError, match=r"no common model.*phantom-00, phantom-01"):
        fedmed.load(folder)
    images, truth, names = test_set(folder, "phantom-01")
    trained = fedmed.load(folder, site="phantom-01")
    labels = torch.from_numpy(trained.predict_labels(images))
    dice = dice_scores(labels, torch.from_numpy(truth.astype(np.int64)), 2)[:, 0].tolist()
    known = cases(folder, "phantom-01", "personal")
    assert dice == pytest.approx([float(known[name]["dice"] or "nan") for name in names], abs=1e-6, nan_ok=True)


def test_a_site_of_a_method_without_own_models(grey_run: Path) -> None:
    trained = fedmed.load(grey_run, site="phantom-01")
    assert (trained.view, trained.client.site_index) == ("global", 1)


def test_missing_channels_are_told(runs: Any) -> None:
    folder = runs.train(
        {}, data__path="phantom:multimodal", data__phantom={"num_sites": 2, "images_per_site": 10, "image_size": 32},
        model__name="multi_encoder_unet", model__args={"base_width": 4},
    )  # fmt: skip
    trained = fedmed.load(folder)
    images, _, _ = test_set(folder, "phantom-00")
    count = len(trained.channels)
    full = trained.predict(images)
    assert np.array_equal(full, trained.predict(images, modality_present=np.ones((len(images), count), np.uint8)))
    some = np.ones((len(images), count), np.uint8)
    some[:, 0] = 0
    assert not np.array_equal(full, trained.predict(images, modality_present=some))
    with pytest.raises(UserError, match="modality_present: expected shape"):
        trained.predict(images, modality_present=some[:, :1])


def test_what_is_refused(grey_run: Path, runs: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is it a run folder"):
        fedmed.load(tmp_path)
    with pytest.raises(UserError, match="expected last or selected"):
        fedmed.load(grey_run, which="best")
    with pytest.raises(UserError, match=r"evaluation\.select"):
        fedmed.load(grey_run, which="selected")
    trained = fedmed.load(grey_run)
    with pytest.raises(UserError, match="1 channels"):
        trained.predict(np.zeros((2, 32, 32, 3), np.uint8))
    other = runs.like(grey_run)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("base_width: 4", "base_width: 6"))
    with pytest.raises(UserError, match="does not fit the model"):
        fedmed.load(other)


def test_the_run_says_how_its_images_were_prepared(runs: Any, grey_run: Path) -> None:
    facts = json.loads((grey_run / "model.json").read_text())
    assert facts["preprocessing"] is None and facts["stored_size"] == [32, 32]
    assert facts["annotation_kinds"] == {"phantom-00": "mask", "phantom-01": "mask"}
    from data_prep.tools import phantom_file

    made = runs.new().with_suffix(".h5")
    phantom_file("segmentation", str(made), ["num_sites=2", "images_per_site=10", "image_size=64", "channels=1"], force=False,
                 say=lambda text: None, quiet=True)  # fmt: skip
    for text, expected in (('{"format": "images"}', {"format": "images"}), ("by hand", None), ("[1]", None)):
        with h5py.File(made, "r+") as file:
            file.attrs["preprocessing"] = text
        folder = runs.train(data__path=str(made), data__phantom={}, data__resize=32)
        facts = json.loads((folder / "model.json").read_text())
        assert (facts["preprocessing"], facts["stored_size"], facts["image_size"]) == (expected, [64, 64], [32, 32])


def test_a_network_that_is_told_its_site(runs: Any, tmp_path: Path) -> None:
    folder = runs.train(
        model__name="site_unet", model__args={"base_width": 4, "num_sites": 2}, model__activation="softmax", client__name="fedicra",
        federation__rounds=2,
    )  # fmt: skip
    images, truth, names = test_set(folder, "phantom-01")
    common, own = fedmed.load(folder).predict(images), fedmed.load(folder, site="phantom-01")
    prob = own.predict(images)
    assert prob.shape == (len(images), 2, 32, 32) and np.abs(prob - common).max() > 1e-6
    dice = dice_scores(torch.from_numpy(own.predict_labels(images)), torch.from_numpy(truth.astype(np.int64)), 2)[:, 0]
    known = cases(folder, "phantom-01", "personal")
    assert dice.tolist() == pytest.approx(
        [float(known[name]["dice"] or "nan") for name in names], abs=1e-6, nan_ok=True
    )
    copied = tmp_path / "copied"  # a run folder that lost its list of sites
    copied.mkdir()
    for name in ("config.yaml", "model.json", "model.safetensors"):
        shutil.copy(folder / name, copied / name)
    with pytest.raises(UserError, match="told the place of the site"):
        fedmed.load(copied, site="phantom-01", state=folder / "sites" / "phantom-01")
    shutil.copy(folder / "summary.json", copied / "summary.json")  # sorted names stand for the places
    again = fedmed.load(copied, site="phantom-01", state=folder / "sites" / "phantom-01")
    assert np.array_equal(again.predict(images), prob)
    shutil.copy(folder / "model.safetensors", folder / "model-selected.safetensors")
    with pytest.raises(UserError, match="last round only"):
        fedmed.load(folder, which="selected", site="phantom-01")
    assert np.array_equal(fedmed.load(folder, which="selected").predict(images), common)
