"""FedICRA as whole runs: what travels and what stays, both views, stop and resume, lost replies, and sites with little or no labels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from fedmed.data.phantom import make_phantom
from fedmed.errors import QuorumLost, UserError
from fedmed.federation.checkpoint import read_safetensors
from fedmed.federation.site import make_model

ICRA: dict[str, Any] = {
    "data.path": "phantom:segmentation", "data.phantom": {"num_sites": 3, "images_per_site": 10, "image_size": 32},
    "data.corruption.name": "weak_labels", "data.corruption.args": {"kind": ["scribble", "point", "box"]},
    "model.name": "site_unet", "model.args": {"base_width": 2, "side_width": 4, "num_sites": 3},
    "model.activation": "softmax", "client.name": "fedicra",
    "client.args": {"warmup_rounds": 1, "body_steps": 2, "crf_radius": 1, "tree_scale": 2, "max_passes": 2},
    "optimizer.name": "adamw", "optimizer.lr": 0.01, "training.batch_size": 4, "training.epochs": 2,
    "federation.rounds": 2, "evaluation.every": 2,
}  # fmt: skip
SITES = ("phantom-00", "phantom-01", "phantom-02")
TERMS = {f"loss/{name}" for name in ("pce", "crf", "tree", "contrast")}


def settings(**changes: Any) -> dict[str, Any]:
    return {**ICRA, **{key.replace("__", "."): value for key, value in changes.items()}}


def run(lab: Any, out: Path | None = None, *, options: Any = None, **changes: Any) -> tuple[Path, dict[str, Any]]:
    found: tuple[Path, dict[str, Any]] = lab.run(out, options=options, **settings(**changes))
    return found


def kept(out: Path, site: str) -> dict[str, Tensor]:
    """What a site keeps, of the newest round."""
    newest = max((out / "sites" / site / "personal").glob("round-*"))
    return read_safetensors(newest / "personal.safetensors")


def finite(lab: Any, out: Path) -> bool:
    return all(bool(value.isfinite().all()) for value in lab.state(out).values())


def test_a_course(lab: Any) -> None:
    """Round 1 is the warm-up, from round 2 on every site merges; θ_i and W stay at the site."""
    ear: dict[str, set[str]] = {}

    def hear(message: Any, call: Any) -> Any:
        reply = call()
        for one in (message, reply):
            for record in one.content.values():
                ear.setdefault(message.metadata.message_type, set()).update(str(key) for key in record)
        return reply

    out, summary = run(lab, options={"intercept": hear})
    trained = lab.history(out, phase="train", status="ok")
    assert len(trained) == 6
    for record in trained:
        assert {key for key in record["metrics"] if key.startswith("loss/")} == TERMS
        assert 0 <= record["metrics"]["merge_weight_mean"] <= 1 and record["metrics"]["loss/contrast"] < 0
    assert all(r["metrics"]["merge_weight_mean"] == 1 for r in trained if r["round"] == 1)
    heard = set().union(*ear.values())
    assert {"decoder.out_conv.weight", "selection.site_in.weight"} <= heard
    assert not any(name.startswith("merge/") for name in heard)
    own, received = [kept(out, site) for site in SITES], lab.state(out)
    for one in own:
        assert set(received) <= set(one) and one["merge/started"] == 1 and one["merge/steps"] == 2 * 4
        shares = [value for name, value in one.items() if name.startswith("merge/decoder.")]
        assert len(shares) == 42 and all(float(w.min()) >= 0 and float(w.max()) <= 1 for w in shares)
    assert not torch.equal(own[0]["encoder.stages.0.0.weight"], own[1]["encoder.stages.0.0.weight"])
    assert finite(lab, out) and summary["judged_by"] == "test/global"


@pytest.mark.parametrize("mode", ["separate", "after"])
def test_both_views(lab: Any, mode: str) -> None:
    out, summary = run(lab, evaluation__mode=mode, evaluation__central="auto")
    records = lab.history(out, phase="evaluate")
    at_sites = [r for r in records if r["site"] in SITES]
    assert at_sites and all({"test/global/dice", "test/personal/dice"} <= set(r["metrics"]) for r in at_sites)
    pair = summary["personal"]["dice"]
    assert pair["G_from"] == "central" and pair["G"] == summary["central"]["last"]["test/global/dice"]
    assert list(pair["sites"]) == list(SITES)
    assert pair["S"] == pytest.approx(np.mean([one["personal"] for one in pair["sites"].values()]))


def test_stopped_and_resumed(lab: Any) -> None:
    """The merge of round 2 starts from what was kept in round 1, by another process as well."""
    whole, summary = run(lab, evaluation__every=1)
    parts = lab.new()
    lab.stopped(parts, 1, **settings(evaluation__every=1))
    _, again = run(lab, parts, options={"resume": True}, evaluation__every=1)
    assert lab.model(whole) == lab.model(parts) and lab.history(whole) == lab.history(parts)
    assert repr(summary["personal"]) == repr(again["personal"])
    for site in SITES:
        torch.testing.assert_close(kept(whole, site), kept(parts, site), rtol=0, atol=0)


def test_a_lost_reply_rolls_the_site_back(lab: Any) -> None:
    def lost(call: Any) -> None:
        call()
        raise RuntimeError("connection lost")

    def absent(call: Any) -> None:
        raise RuntimeError("not there")

    first, _ = run(lab, options={"intercept": lab.fault(lost, 2)}, federation__rounds=3)
    second, _ = run(lab, options={"intercept": lab.fault(absent, 2)}, federation__rounds=3)
    assert lab.model(first) == lab.model(second)
    torch.testing.assert_close(kept(first, SITES[1]), kept(second, SITES[1]), rtol=0, atol=0)


def test_scoring_changes_nothing(lab: Any) -> None:
    """Nothing is learnt at evaluation, whatever is scored when."""
    first, _ = run(lab, evaluation__every=1)
    second, _ = run(lab, evaluation__every=2, evaluation__mode="before")
    assert lab.model(first) == lab.model(second)
    torch.testing.assert_close(kept(first, SITES[0]), kept(second, SITES[0]), rtol=0, atol=0)


def test_a_site_without_labels_is_heard(lab: Any) -> None:
    out, summary = run(lab, data__corruption__args={"kind": ["scribble", "none", "mask"]})
    silent = lab.history(out, phase="train", site=SITES[1])
    assert len(silent) == 2 and all(r["status"] == "empty" for r in silent)
    assert finite(lab, out) and math.isfinite(summary["personal"]["dice"]["S"])
    assert not (out / "sites" / SITES[1] / "personal").exists()
    full = lab.history(out, phase="train", site=SITES[2])
    assert all(r["metrics"]["loss/tree"] == 0 for r in full)  # a full mask leaves nothing open


def test_a_site_with_background_only(lab: Any, tmp_path: Path) -> None:
    path = make_phantom(tmp_path / "sites.h5", "segmentation", num_sites=3, images_per_site=10, image_size=32)
    with h5py.File(path, "r+") as file:
        masks = file["site_01"]["mask"]
        masks[...] = np.zeros_like(masks[...])
    out, _ = run(lab, data__path=str(path), data__phantom={})
    assert finite(lab, out)
    trained = lab.history(out, phase="train", status="ok", site=SITES[1])
    assert len(trained) == 2 and all(math.isfinite(r["metrics"]["train_loss"]) for r in trained)


def test_one_site_alone(lab: Any) -> None:
    """No contrast, and nothing to merge: what comes back is what was sent."""
    phantom = {"num_sites": 1, "images_per_site": 10, "image_size": 32}
    out, summary = run(lab, data__phantom=phantom, federation__min_sites=1)
    trained = lab.history(out, phase="train", status="ok")
    assert len(trained) == 2 and all(r["metrics"]["loss/contrast"] == 0 for r in trained)
    assert all(r["metrics"]["merge_weight_mean"] == 1 for r in trained)
    pair = summary["personal"]["dice"]
    assert pair["sites"][SITES[0]]["personal"] == pair["sites"][SITES[0]]["global"]


def test_more_sites_than_the_model_has_room_for(lab: Any) -> None:
    with pytest.raises(QuorumLost, match=r"phantom-02 is site number 3 .* raise model\.args\.num_sites"):
        run(lab, model__args={"base_width": 2, "side_width": 4, "num_sites": 2}, federation__quorum=1.0)


def test_a_frozen_selection_never_travels(lab: Any) -> None:
    """It keeps the values of the run's seed, in the file of the model too."""
    args = {"base_width": 2, "side_width": 4, "num_sites": 3, "train_selection": False}
    out, _ = run(lab, model__args=args, federation__rounds=1)
    drawn, _ = make_model(lab.config(**settings(model__args=args)), "segmentation", 2, 3, (32, 32))
    frozen = {name: value for name, value in drawn.state_dict().items() if name.startswith("selection.")}
    own, final = kept(out, SITES[0]), lab.state(out)
    assert len(frozen) == 4 and not set(frozen) & set(own) and "decoder.out_conv.bias" in own
    assert all(torch.equal(final[name], value) for name, value in frozen.items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__activation": "sigmoid"}, "model.activation=softmax"),
        ({"model__name": "side_unet", "model__args": {"base_width": 2}}, "model.name=site_unet"),
    ],
)
def test_what_does_not_fit_is_refused(lab: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        run(lab, federation__rounds=1, federation__quorum=1.0, **changes)
