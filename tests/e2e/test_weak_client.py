"""Whole runs of plain training on weak annotation: every kind, sites with nothing drawn, one site, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedmed.errors import UserError

SITES = ("phantom-00", "phantom-01", "phantom-02")
TERMS = {"loss/pce", "loss/crf", "loss/tree"}


def settings(lab: Any, *kinds: str, **changes: Any) -> dict[str, Any]:
    """Client `weak` with all its terms on three sites that are annotated so."""
    return {
        **lab.segmentation,
        "model.name": "side_unet", "model.args": {"base_width": 2, "side_width": 4}, "model.activation": "softmax",
        "client.name": "weak", "client.args": {"crf_weight": 0.1, "tree_weight": 0.1},
        "data.corruption.name": "weak_labels", "data.corruption.args": {"kind": list(kinds)},
        "federation.rounds": 2, "evaluation.central": "auto",
        **{key.replace("__", "."): value for key, value in changes.items()},
    }  # fmt: skip


def losses(record: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in record["metrics"].items() if key.startswith("loss/")}


def test_every_kind_trains_with_all_terms(lab: Any) -> None:
    out, summary = lab.run(**settings(lab, "scribble", "point", "block"))
    trained = lab.history(out, phase="train", status="ok")
    assert [record["site"] for record in trained] == [*SITES, *SITES]
    assert all(set(losses(record)) == TERMS and min(losses(record).values()) > 0 for record in trained)
    assert {site: truth["label_kind"] for site, truth in summary["truth"].items()} == dict(
        zip(SITES, ("scribble", "point", "block"), strict=True)
    )
    assert "test/global/dice" in summary["central"]["last"]


@pytest.mark.parametrize("mode", ["separate", "after"])
@pytest.mark.parametrize("kind", ["none", "image"])
def test_a_site_without_labels_is_heard_and_not_summed(
    lab: Any, kind: str, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    out, _ = lab.run(**settings(lab, "scribble", kind, "mask", evaluation__mode=mode))
    records = lab.history(out, phase="train")
    assert [(r["site"], r["status"]) for r in records] == [
        *zip(SITES, ("ok", "empty", "ok"), strict=True), *zip(SITES, ("ok", "empty", "ok"), strict=True)
    ]  # fmt: skip
    assert all(record["num_examples"] == 0 for record in records if record["site"] == SITES[1])
    said = [r.getMessage() for r in caplog.records if "has a labelled pixel" in r.getMessage()]
    assert len(said) == 1 and SITES[1] in said[0]
    full = [losses(record) for record in records if record["site"] == SITES[2]]
    assert all(one["loss/tree"] == 0 and one["loss/pce"] > 0 for one in full)
    scored = {r["site"] for r in lab.history(out, phase="evaluate", status="ok") if "test/global/dice" in r["metrics"]}
    assert scored == set(SITES)


def test_the_others_are_averaged_as_if_it_were_not_there(lab: Any) -> None:
    """Same seed and same sites but for the middle one, which adds nothing in either run."""

    def lost(call: Any) -> None:
        call()
        raise RuntimeError("connection lost")

    empty, _ = lab.run(**settings(lab, "scribble", "none", "point", federation__rounds=1))
    away, _ = lab.run(
        **settings(lab, "scribble", "mask", "point", federation__rounds=1), options={"intercept": lab.fault(lost, 1)}
    )
    first, second = lab.state(empty), lab.state(away)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_one_site(lab: Any) -> None:
    one = {"num_sites": 1, "images_per_site": 20, "image_size": 32}
    out, _ = lab.run(**settings(lab, "scribble", data__phantom=one, federation__min_sites=1))
    assert [r["status"] for r in lab.history(out, phase="train")] == ["ok", "ok"]
    before, _ = lab.run(**settings(lab, "none", data__phantom=one, federation__min_sites=1))
    assert [r["status"] for r in lab.history(before, phase="train")] == ["empty", "empty"]
    first, second = lab.state(before), lab.state(out)
    assert not any(torch.equal(first[name], second[name]) for name in first if name.endswith("weight"))


def test_any_rule_and_add_on_goes_with_it(lab: Any) -> None:
    out, _ = lab.run(**settings(lab, "scribble", "block", strategy__name="fedavgm", client__prox={"enabled": True}))
    trained = lab.history(out, phase="train", status="ok")
    assert len(trained) == 6 and all(set(losses(record)) == {*TERMS, "loss/prox"} for record in trained)


def test_the_loss_of_the_drawn_pixels_falls(lab: Any) -> None:
    out, _ = lab.run(**settings(lab, "scribble", federation__rounds=4, training__epochs=3))
    first, last = (
        sum(r["metrics"]["loss/pce"] for r in lab.history(out, phase="train", round=number)) for number in (1, 4)
    )
    assert last < 0.8 * first


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__activation": "sigmoid"}, r"client 'weak' reads softmax outputs, not sigmoid"),
        ({"model__name": "unet", "model__args": {"base_width": 4}}, r"side outputs, .* set model\.name=side_unet"),
        (
            {"client__name": "supervised", "client__args": {}},
            r"scribble annotation leaves pixels open, .*; set client\.name=weak client\.args=null model\.activation=softmax \(",
        ),
        ({"client__args": {"crf_weight": -1.0}}, r"client\.args: a finite crf_weight >= 0 expected, got -1"),
    ],
)
def test_refusals(lab: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        lab.run(**settings(lab, "scribble", **changes))


def test_what_supervised_advises_runs(lab: Any) -> None:
    """client.name=weak client.args=null model.activation=softmax, with the model as it was."""
    model = {"model.name": "unet", "model.args": {"base_width": 4}}
    out, _ = lab.run(**{**settings(lab, "scribble", "box"), **model, "client.args": None})
    trained = lab.history(out, phase="train", status="ok")
    assert len(trained) == 6 and all(set(losses(record)) == {"loss/pce"} for record in trained)
