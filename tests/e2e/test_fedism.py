"""Whole runs of FedISM and FedISM+: weights that follow from what was sent, absent and broken sites, resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import MetricRecord, RecordDict

from fedmed.errors import UserError
from fedmed.federation.checkpoint import CheckpointStore
from strategies.sharpness_matching import growing_radius, sharpness, sharpness_weights

FEDISM: dict[str, Any] = {"strategy.name": "fedism", "client.name": "fedism", "strategy.args": {"q": 2.0}}
PLUS: dict[str, Any] = {**FEDISM, "strategy.name": "fedism_plus"}
SITES = ("phantom-00", "phantom-01", "phantom-02")


def server(out: Path) -> dict[str, float]:
    found = CheckpointStore(out / "checkpoint").read()
    assert found is not None
    weights: dict[str, float] = found.strategy["weights"]
    return weights


def losses(lab: Any, out: Path, number: int) -> dict[str, tuple[float, float]]:
    """What the sites sent in a round: (L, L̂) by site."""
    records = lab.history(out, phase="train", round=number, status="ok")
    return {r["site"]: (r["metrics"]["loss_base"], r["metrics"]["loss_perturbed"]) for r in records}


def noted(lab: Any, out: Path, key: str) -> dict[int, Any]:
    """A note of the server by round."""
    records = lab.history(out, phase="server")
    return {r["round"]: r["metrics"][key] for r in records if key in r["metrics"]}


def replay(lab: Any, out: Path, rounds: int, q: float = 2.0) -> dict[str, float]:
    """Weights after `rounds`, from the losses in the history."""
    weights: dict[str, float] = {}
    for number in range(1, rounds + 1):
        sent = losses(lab, out, number)
        table = np.array(list(sent.values()))
        previous = np.array([weights.get(site, math.nan) for site in sent])
        found = sharpness_weights(sharpness(table[:, 0], table[:, 1]), q, 0.5, previous)
        weights |= dict(zip(sent, found.tolist(), strict=True))
    return weights


def test_weights_follow_from_the_two_losses(lab: Any) -> None:
    out, summary = lab.run(**FEDISM)
    for record in lab.history(out, phase="train"):
        own = set(record["metrics"]) - {"train_loss", "loss/logit_adjusted_ce"}
        assert own == {"loss_base", "loss_perturbed"}
        assert 0 < record["metrics"]["loss_base"] < record["metrics"]["loss_perturbed"]
    assert server(out) == pytest.approx(replay(lab, out, 3), rel=1e-9)
    notes = summary["notes"]
    assert notes["weights"] == pytest.approx(server(out)) and sum(notes["weights"].values()) == pytest.approx(1.0)
    assert notes["largest_weight"] == max(notes["weights"].values())
    assert set(notes["sharpness"]) == set(SITES) and notes["rho"] == 0.05


def test_the_radius_grows(lab: Any) -> None:
    out, _ = lab.run(**PLUS)
    assert noted(lab, out, "rho") == pytest.approx({r: growing_radius(0.05, r, 3) for r in (1, 2, 3)})


def fails(call: Any) -> None:
    """The site gives an error in place of a model."""
    raise RuntimeError("power cut")


def test_a_site_that_is_away_keeps_its_weight(lab: Any) -> None:
    out, _ = lab.run(options={"intercept": lab.fault(fails, 2)}, **FEDISM, **{"federation.quorum": 0.5})
    assert set(losses(lab, out, 2)) == {"phantom-00", "phantom-02"} and set(losses(lab, out, 3)) == set(SITES)
    assert set(noted(lab, out, "weights")[2]) == {"phantom-00", "phantom-02"}
    assert server(out) == pytest.approx(replay(lab, out, 3), rel=1e-9)


def without_number(content: RecordDict) -> None:
    """The reply arrives with a loss that is not a number."""
    metrics = content["metrics"]
    assert isinstance(metrics, MetricRecord)
    content["metrics"] = MetricRecord({**metrics, "loss_perturbed": math.nan})


def test_a_site_without_a_finite_loss_has_no_weight_and_the_run_goes_on(lab: Any) -> None:
    fault = lab.fault(lab.tampered(without_number), 2, 3, partition=2)
    out, summary = lab.run(options={"intercept": fault}, **FEDISM)
    weights = noted(lab, out, "weights")
    assert weights[1]["phantom-02"] > 0 and weights[2]["phantom-02"] == weights[3]["phantom-02"] == 0.0
    assert summary["notes"]["sharpness"]["phantom-02"] == 0.0 and math.isfinite(summary["mean"])
    assert all(value.isfinite().all() for value in lab.state(out).values())


@pytest.mark.parametrize("settings", [FEDISM, PLUS], ids=["fedism", "fedism_plus"])
def test_stopped_and_resumed_is_never_stopped(lab: Any, settings: dict[str, Any]) -> None:
    whole, summary = lab.run(**settings)
    parts = lab.new()
    lab.stopped(parts, 1, **settings)
    lab.stopped(parts, 2, resume=True, **settings)
    _, again = lab.run(parts, options={"resume": True}, **settings)
    assert lab.model(whole) == lab.model(parts) and lab.history(whole) == lab.history(parts)
    assert server(whole) == server(parts) and summary["notes"] == again["notes"]


def test_only_the_growing_radius_ties_a_run_to_its_number_of_rounds(lab: Any) -> None:
    for settings, refused in ((FEDISM, False), (PLUS, True)):
        out = lab.new()
        lab.stopped(out, 1, **settings)
        longer = {**settings, "federation.rounds": 4}
        if refused:
            with pytest.raises(UserError, match="another configuration"):
                lab.run(out, options={"resume": True}, **longer)
        else:
            assert lab.run(out, options={"resume": True}, **longer)[1]["rounds"] == 4


def test_halves_that_do_not_belong_together(lab: Any) -> None:
    with pytest.raises(UserError, match="needs loss_base, loss_perturbed from the sites"):
        lab.run(**{"strategy.name": "fedism"})
    with pytest.raises(UserError, match="needs a radius rho"):
        lab.run(**{"client.name": "fedism"})
