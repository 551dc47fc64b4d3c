"""FedMix as whole runs: every kind of supervision, sites that take nothing, absence, several classes, stop and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from flwr.app import RecordDict

from data_prep.protocol import derive
from fedmed.config import load_config
from fedmed.data.writer import SiteArrays, write_site_file
from fedmed.errors import UserError
from fedmed.federation.messages import METRICS
from fedmed.federation.personal import PersonalStore
from fedmed.federation.records import decode_metrics, encode_metrics

SITES = [f"phantom-0{i}" for i in range(3)]
FEDMIX: dict[str, Any] = {
    "data.path": "phantom:segmentation", "data.phantom": {"num_sites": 3, "images_per_site": 20, "image_size": 32},
    "data.corruption.name": "weak_labels", "data.corruption.args": {"kind": ["mask", "box", "image"], "margin_high": 2},
    "model.name": "two_networks", "model.args": {"name": "unet", "args": {"base_width": 2}}, "model.activation": "sigmoid",
    "strategy.name": "fedmix", "client.name": "fedmix", "optimizer.name": "adam", "optimizer.persist": True,
    "federation.rounds": 2, "evaluation.every": 2,
}  # fmt: skip
ALL = {"threshold": 0.0, "box_dice_min": 0.0, "reject_empty": False}  # whatever the networks say is taken
NOTHING = {"threshold": 1.0, "box_dice_min": 1.0, "reject_empty_unlabelled": True}


def settings(*kinds: str, **changes: Any) -> dict[str, Any]:
    """`kinds`: of the sites, in turn."""
    named = {"data.corruption.args": {"kind": list(kinds), "margin_high": 2}} if kinds else {}
    return {**FEDMIX, **named, **{key.replace("__", "."): value for key, value in changes.items()}}


def trained(lab: Any, out: Path, **wanted: Any) -> dict[str, dict[str, Any]]:
    """Train records of a round by site."""
    return {record["site"]: record for record in lab.history(out, phase="train", **wanted)}


def test_masks_boxes_and_tags_in_one_federation(lab: Any) -> None:
    out, summary = lab.run(**settings(strategy__args=ALL))
    notes = summary["notes"]
    assert sum(notes["weights"].values()) == pytest.approx(1.0) and set(notes["weights"]) == set(SITES)
    assert min(notes["weights"].values()) > 0 and notes["num_selected"] == dict.fromkeys(SITES, 14)
    for record in lab.history(out, phase="train"):
        metrics = record["metrics"]
        assert (
            record["status"] == "ok" and record["num_examples"] == metrics["num_selected"] == metrics["num_total"] == 14
        )
        assert {key for key in metrics if key.startswith("loss/")} == {"loss/net1", "loss/net2"}
        assert metrics["train_loss_net1"] == pytest.approx(metrics["loss/net1"]) and 0 < metrics["train_loss_net1"] < 1
    last = trained(lab, out, round=2)
    power = np.array([last[site]["metrics"]["train_loss_net1"] for site in SITES]) ** 1.5
    expected = (1 / 3 + 10 * power / power.sum()) / 11
    assert [notes["weights"][site] for site in SITES] == pytest.approx(expected.tolist())
    assert all(bool(value.isfinite().all()) for value in lab.state(out).values())
    assert {"test/global/dice"} <= set(lab.history(out, phase="evaluate")[-1]["metrics"])


def test_weak_sites_that_take_nothing_are_heard_with_0(lab: Any) -> None:
    """The labelled site carries the federation alone: its networks become the global ones, as in a run by itself."""
    kinds = ("mask", "none", "image")
    out, summary = lab.run(**settings(*kinds, strategy__args=NOTHING))
    for record in lab.history(out, phase="train"):
        weak = record["site"] != SITES[0]
        assert record["status"] == ("empty" if weak else "ok") and record["num_examples"] == (0 if weak else 14)
        assert record["metrics"]["num_selected"] == (0 if weak else 14) and record["metrics"]["num_total"] == 14
        assert ("train_loss_net1" in record["metrics"]) != weak
    assert summary["notes"]["weights"] == {SITES[0]: 1.0}
    assert not (out / "sites" / SITES[1] / "personal").exists() and (out / "sites" / SITES[0] / "personal").exists()


def test_a_federation_in_which_nobody_takes_anything_stays_as_it_is(lab: Any, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (
        lab.state(lab.run(**settings("none", "image", "none", strategy__args=NOTHING, federation__rounds=n))[0])
        for n in (1, 2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "both networks stay as they are" in caplog.text and "no site has masks" in caplog.text


def test_an_absent_labelled_site(lab: Any) -> None:
    def absent(call: Any) -> None:
        raise RuntimeError("not there")

    fault = lab.fault(absent, 1, partition=0)
    out, summary = lab.run(options={"intercept": fault}, **settings(strategy__args=ALL))
    assert {s for s, r in trained(lab, out, round=1).items() if r["status"] == "ok"} == set(SITES[1:])
    assert set(summary["notes"]["weights"]) == set(SITES)
    assert all(bool(value.isfinite().all()) for value in lab.state(out).values())


def test_one_labelled_site_alone(lab: Any) -> None:
    one = {"num_sites": 1, "images_per_site": 20, "image_size": 32}
    out, summary = lab.run(**settings("mask", data__phantom=one, federation__min_sites=1))
    assert summary["notes"]["weights"] == {SITES[0]: 1.0}
    plain, _ = lab.run(**settings("mask", data__phantom=one, federation__min_sites=1, strategy__name="fedavg"))
    torch.testing.assert_close(lab.state(out), lab.state(plain), rtol=0, atol=1e-6)


def test_lambda_zero_is_fedavg_over_what_was_taken(lab: Any) -> None:
    mix, _ = lab.run(**settings("mask", "none", "mask", strategy__args={"lambda_": 0.0}))
    plain, _ = lab.run(**settings("mask", "none", "mask", strategy__name="fedavg"))
    assert lab.model(mix) == lab.model(plain)


def test_stop_and_resume(lab: Any) -> None:
    changed = settings(
        "mask", "box", "none", strategy__args=ALL, federation__rounds=3, data__augment=["hflip", "affine"]
    )
    whole, summary = lab.run(**changed)
    parts = lab.new()
    lab.stopped(parts, 1, **changed)
    lab.stopped(parts, 2, resume=True, **changed)
    _, resumed = lab.run(parts, options={"resume": True}, **changed)
    assert lab.model(whole) == lab.model(parts) and lab.history(whole) == lab.history(parts)
    assert summary["notes"] == resumed["notes"]
    for site in SITES:
        kept, same = (PersonalStore(out / "sites" / site / "personal").read(3) for out in (whole, parts))
        assert kept is not None and same is not None
        assert {name.split("/")[1].split(".")[0] for name in kept} == {"net1", "net2"}
        torch.testing.assert_close(dict(kept), dict(same), rtol=0, atol=0)


def test_a_loss_that_is_not_finite_keeps_a_site_out(lab: Any) -> None:
    def spoil(content: RecordDict) -> None:
        metrics = decode_metrics(content[METRICS])  # type: ignore[arg-type]
        content[METRICS] = encode_metrics({**metrics, "train_loss_net1": float("nan")})

    fault = lab.fault(lab.tampered(spoil), partition=1)
    out, summary = lab.run(options={"intercept": fault}, **settings(strategy__args=ALL))
    weights = summary["notes"]["weights"]
    assert weights[SITES[1]] == 0 and weights[SITES[0]] + weights[SITES[2]] == pytest.approx(1.0)
    assert all(record["status"] == "ok" for record in lab.history(out, phase="train"))


def several_classes(folder: Path) -> Path:
    """Four sites of 16 images with squares of three classes, class 3 in every other image; site c lacks class 2."""
    sites = []
    for place, name in enumerate("abcd"):
        rng, rows = np.random.default_rng(place), np.arange(16)
        masks = np.zeros((16, 32, 32), dtype=np.uint8)
        for item, mask in enumerate(masks):
            for label in (1, 2, 3):
                top, left = rng.integers(0, 22, 2)
                if (label != 3 or item % 2) and (label != 2 or name != "c"):
                    mask[top : top + 9, left : left + 8] = label
        image = (masks * 60 + rng.integers(0, 40, masks.shape)).astype(np.uint8)
        splits = {"train": rows[:11], "val": rows[11:12], "test": rows[12:]}
        sites.append(SiteArrays(name, image, {"mask": masks}, splits))
    classes = ["background", "irf", "srf", "ped"]
    meta = {"task": "segmentation", "classes": classes, "channels": ["grey"], "image_size": [32, 32]}
    return write_site_file(folder / "classes.h5", meta, sites)


def test_several_classes_and_hidden_masks_that_are_never_read(lab: Any, tmp_path: Path) -> None:
    """Also with rubbish in the place of all that is withheld, the run is the same to the bit."""
    words = [f"data.path={several_classes(tmp_path)}", "data.corruption.name=weak_labels"]
    words.append("data.corruption.args={kind: [mask, box, image, none], margin_low: 1, margin_high: 3, box_per: class}")
    path = derive(load_config("fedavg", words).data, 0, tmp_path)
    poisoned = tmp_path / "poisoned.h5"
    poisoned.write_bytes(path.read_bytes())
    with h5py.File(poisoned, "r+") as file:
        weak = [group for group in file.values() if group.attrs.get("label_kind", "mask") in ("box", "image", "none")]
        assert len(weak) == 3
        for group in weak:
            train = np.sort(group.attrs["train_idx"])
            for node in (group["mask"], group["reference/mask"]):
                values = node[...]
                values[train] = np.random.default_rng(5).integers(0, 4, values[train].shape)
                node[...] = values
    runs = []
    for source in (path, poisoned):
        changes = {"data__path": str(source), "data__phantom": {}, "data__corruption__name": None}
        out, summary = lab.run(
            **{**settings(strategy__args=ALL, **changes), "data.corruption.args": {}, "training.batch_size": 4}
        )
        assert summary["notes"]["num_selected"] == {"a": 11, "b": 11, "c": 11, "d": 11}
        runs.append((lab.model(out), lab.history(out)))
    assert runs[0] == runs[1]


def test_another_network_or_activation_is_refused(lab: Any) -> None:
    with pytest.raises(UserError, match=r"model\.name=two_networks"):
        lab.run(**settings(model__name="unet", model__args={"base_width": 2}))
    with pytest.raises(UserError, match=r"model\.activation=sigmoid"):
        lab.run(**settings(model__activation="softmax"))


def test_a_site_of_another_kind_is_left_out(lab: Any) -> None:
    out, _ = lab.run(**settings("mask", "scribble", "box", strategy__args=ALL, federation__quorum=0.5))
    failed = [r for r in lab.history(out, phase="train") if r["status"] not in ("ok", "empty")]
    assert {record["site"] for record in failed} == {SITES[1]}
