"""What does not belong together is refused before the first round, by one clear error, and nothing is written."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from fedmed.data.phantom import make_phantom
from fedmed.errors import UserError

SEG = {"data.path": "phantom:segmentation", "data.phantom": {"num_sites": 2, "images_per_site": 10, "image_size": 32}}
UNET = {"model.name": "unet", "model.args": {"base_width": 4}}

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rule without its client": (
        {"strategy.name": "fednoro"},
        r"strategy 'fednoro' needs class_loss from the sites, which client 'supervised' does not send; use the client of",
    ),
    "rule for another task": (
        {**SEG, **UNET, "strategy.name": "fednoro", "client.name": "fednoro"},
        "strategy 'fednoro' is for classification, the sites have a segmentation task",
    ),
    "client for another task": (
        {"client.name": "feda3i"},
        "client 'feda3i' is for segmentation, the sites have a classification task",
    ),
    "client for another task, Flower's rule": (
        {"client.name": "feda3i", "strategy.name": "flwr:FedAvg"},
        "client 'feda3i' is for segmentation",
    ),
    "model for another task": (SEG, "made for classification, multilabel, but the data's task is segmentation"),
    "unknown rule": ({"strategy.name": "fedavgg"}, "no strategy is called 'fedavgg'; did you mean 'fedavg"),
    "unknown client": ({"client.name": "supervized"}, "no client is called 'supervized'; did you mean 'supervised'"),
    "unknown model": ({"model.name": "small_cn"}, "no model is called 'small_cn'; did you mean 'small_cnn'"),
    "unknown model argument": ({"model.args": {"width": [4]}}, "model.args.width: .*'widths'"),
    "unknown rule argument": (
        {"strategy.name": "fedadam", "strategy.args": {"beta": 0.9}},
        "unknown key 'strategy.args.beta'; did you mean 'beta",
    ),
    "rule argument out of range": (
        {"strategy.name": "fednoro", "client.name": "fednoro", "strategy.args": {"kd_cap": 2.0}},
        "strategy.args: a value is outside its range",
    ),
    "unknown client argument": ({"client.args": {"los": "ce"}}, "unknown key 'client.args.los'; did you mean 'loss'"),
    "unknown add-on argument": ({"client.prox": {"muu": 1.0}}, "unknown key 'client.prox.muu'; did you mean 'mu'"),
    "loss for another task": (
        {"client.args": {"loss": "bce_dice"}},
        r"client\.args\.loss: 'bce_dice' does not fit classification .* \(all 3 sites answered this in round 1, training\)",
    ),
    "unknown augmentation": ({"data.augment": ["hflipp"]}, "'hflipp'; did you mean 'hflip'"),
    "unknown device": ({"engine.device": "tpu"}, "engine.device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
    "no such metric": ({"evaluation.select": "bac"}, "classification is not scored by 'bac' every round; did you mean 'bacc'"),
    "metric of the last round only": ({**SEG, **UNET, "evaluation.select": "hd95"}, "segmentation is not scored by 'hd95'"),
    "no validation score to choose by": (
        {"evaluation.select": "bacc", "evaluation.mode": "before"},
        "evaluation.select needs scores of the global model on validation items",
    ),
    "too few sites": ({"federation.min_sites": 4}, r"federation\.min_sites is 4, but .* holds 3 sites"),
    "no data": ({"data.path": ""}, "data.path is empty"),
    "unknown phantom": ({"data.path": "phantom:classificatoin"}, "'classificatoin'; did you mean 'classification'"),
    "no file": ({"data.path": "/nowhere/x.h5"}, "/nowhere/x.h5"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_one_clear_error(lab: Any, case: str) -> None:
    settings, message = WRONG[case]
    out = lab.new()
    with pytest.raises(UserError, match=message) as caught:
        lab.run(out, **settings)
    assert len(str(caught.value).splitlines()) <= 2
    # A loss is only tried by the sites; everything else is known before anything is written.
    assert case == "loss for another task" or not out.exists() or not any(out.iterdir())


# ---------------------------------------------------------------------- sites that do not fit together


def with_other(lab: Any, tmp_path: Path, kind: str, **phantom: Any) -> Any:
    """Run with a third node that holds a site of another file."""
    mine = make_phantom(tmp_path / "mine.h5", "classification", num_sites=3, images_per_site=10, image_size=16)
    other = make_phantom(tmp_path / "other.h5", kind, num_sites=1, images_per_site=10, **{"image_size": 16, **phantom})
    with h5py.File(other, "r+") as file:
        file["site_00"].attrs["site_name"] = "other"
    nodes = [{"data-path": str(mine), "site": f"phantom-0{i}"} for i in range(2)] + [
        {"data-path": str(other), "site": "other"}
    ]
    return lab.run(**{"data.path": str(mine)}, options={"node_configs": nodes})


def test_nodes_with_files_of_their_own(lab: Any, tmp_path: Path) -> None:
    out, _ = with_other(lab, tmp_path, "classification")
    names = {r["site"] for r in lab.history(out, phase="train", status="ok")}
    assert names == {"phantom-00", "phantom-01", "other"}
    assert not (out / "sites").exists()  # a node with a file of its own names its state folder itself, or has none


@pytest.mark.parametrize(
    ("kind", "phantom", "message"),
    [
        (
            "segmentation",
            {"image_size": 32},
            r"sites differ in task: 'phantom-00' has classification, 'other' has segmentation",
        ),
        (
            "classification",
            {"image_size": 32},
            r"sites differ in image_size: .* has \[16, 16\], 'other' has \[32, 32\]",
        ),
        ("multilabel", {}, "sites differ in task"),
    ],
)
def test_sites_of_other_files_must_agree(
    lab: Any, tmp_path: Path, kind: str, phantom: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        with_other(lab, tmp_path, kind, **phantom)


@pytest.mark.parametrize(
    ("key", "value"), [("classes", '["a", "b", "c", "d", "e", "f"]'), ("channels", '["X", "Y", "Z"]')]
)
def test_classes_and_channels_must_agree(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str
) -> None:
    original = make_phantom

    def renamed(path: Path, *args: Any, **kwargs: Any) -> Path:
        made = original(path, *args, **kwargs)
        if path.name == "other.h5":
            with h5py.File(made, "r+") as file:
                file.attrs[key] = value
        return made

    monkeypatch.setitem(globals(), "make_phantom", renamed)
    with pytest.raises(UserError, match=f"sites differ in {key}: .*, 'other' has .*; all sites of a run must agree"):
        with_other(lab, tmp_path, "classification")


# ---------------------------------------------------------------------- broken files


def drop_mask_rows(file: h5py.File) -> None:
    masks = file["site_01/mask"][...]
    del file["site_01/mask"]
    file["site_01/mask"] = masks[:, :16]


def drop_images(file: h5py.File) -> None:
    images = file["site_01/image"][...]
    del file["site_01/image"]
    file["site_01/image"] = images[:5]


def no_training(file: h5py.File) -> None:
    file["site_01"].attrs["train_idx"] = np.zeros(0, dtype=np.int32)


def impossible_class(file: h5py.File) -> None:
    file["site_01/mask"][0, 0, 0] = 9


BROKEN: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "mask shape": (drop_mask_rows, r"mask has shape \(10, 16, 32\).*expected mask of \(10, 32, 32\)"),
    "number of images": (drop_images, r"site 'phantom-01': .*image"),
    "empty train split": (no_training, "the train split of phantom-01 is empty; every site needs training items"),
    "class out of range": (impossible_class, r"site 'phantom-01': mask of image 0 contains 9"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("at", ["simulation", "node"])
def test_broken_site_file(lab: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str, at: str) -> None:
    edit, message = BROKEN[case]
    path = make_phantom(tmp_path / "a.h5", "segmentation", num_sites=2, images_per_site=10, image_size=32)
    broken = make_phantom(tmp_path / "b.h5", "segmentation", num_sites=2, images_per_site=10, image_size=32)
    with h5py.File(broken, "r+") as file:
        edit(file)
    nodes = [{"data-path": str(f), "site": f"phantom-0{i}"} for i, f in enumerate((path, broken))]
    options = {} if at == "simulation" else {"node_configs": nodes}
    if (
        at == "node" and case == "empty train split"
    ):  # a hospital may have nothing to train on yet, and is heard all the same
        out, _ = lab.run(**UNET, **{"data.path": str(path)}, options=options)
        assert {r["site"] for r in lab.history(out, phase="train", status="empty")} == {"phantom-01"}
        return
    shown = message if at == "simulation" else "the data file of this site does not suit the run"
    with pytest.raises(UserError, match=shown) as caught, caplog.at_level(logging.ERROR, "fedmed.site"):
        lab.run(**UNET, **{"data.path": str(broken if at == "simulation" else path)}, options=options)
    assert len(str(caught.value).splitlines()) <= 2
    if at == "node":  # what a hospital's file holds is said in its own log only
        assert re.search(message, caplog.text) and not re.search(message, str(caught.value))


@pytest.mark.parametrize(("key", "kind"), [("client.name", "client"), ("strategy.name", "strategy")])
def test_an_import_path_must_lead_to_a_class_of_its_kind(lab: Any, key: str, kind: str) -> None:
    with pytest.raises(UserError, match=f"'subprocess:Popen' is no {kind}: expected a class that builds on fedmed"):
        lab.run(**{key: "subprocess:Popen"})
