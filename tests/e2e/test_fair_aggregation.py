"""The rules for fairness between sites, in whole runs: what travels, what is noted, resume, and equality with FedAvg."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedmed.errors import UserError

SMALL = {"num_sites": 4, "images_per_site": 20, "image_size": 16}
LOSS, ACCURACY = {"client.name": "loss_probe"}, {"client.name": "accuracy_probe"}
RULES: dict[str, dict[str, Any]] = {
    "qfedavg": {"strategy.name": "qfedavg", "strategy.args": {"q": 1.0, "lipschitz": 0.1}, **LOSS},
    "qfedavg models": {"strategy.name": "qfedavg", "strategy.args": {"q": 200.0, "rule": "models"}, **LOSS},
    "agnostic": {"strategy.name": "agnostic", **LOSS},
    "agnostic step": {"strategy.name": "agnostic", "strategy.args": {"step": 0.5}, **LOSS},
    "fairfed": {"strategy.name": "fairfed", **ACCURACY},
    "fedga": {"strategy.name": "fedga", "strategy.args": {"step": 0.5}, **LOSS},
}


@pytest.mark.parametrize("rule", RULES)
def test_run(lab: Any, rule: str) -> None:
    out, summary = lab.run(**RULES[rule])
    name = "bacc_received" if rule == "fairfed" else "loss_received"
    sent = [r["metrics"][name] for r in lab.history(out, phase="train")]
    assert len(sent) == 9 and all(math.isfinite(value) for value in sent)
    assert all(value.isfinite().all() for value in lab.state(out).values() if value.is_floating_point())
    weights = summary["notes"]["weights"]
    assert set(weights) == {f"phantom-0{k}" for k in range(3)}
    assert sum(weights.values()) == pytest.approx(1.0) and min(weights.values()) >= 0
    assert summary["notes"]["largest_weight"] == pytest.approx(max(weights.values()))


@pytest.mark.parametrize("rule", RULES)
def test_stopped_after_every_round_with_half_of_the_sites(lab: Any, rule: str) -> None:
    settings = {**RULES[rule], "data.phantom": SMALL, "federation.fraction": 0.5, "federation.rounds": 4}
    whole, summary = lab.run(**settings)
    parts = lab.new()
    for number in range(1, 5):
        lab.stopped(parts, number, resume=number > 1, **settings)
    _, again = lab.run(parts, options={"resume": True}, **settings)
    assert lab.model(whole) == lab.model(parts)
    assert lab.history(whole) == lab.history(parts)
    assert summary["notes"] == again["notes"]


def test_fedga_resumes_with_its_number_of_rounds_only(lab: Any) -> None:
    out = lab.new()
    lab.stopped(out, 1, **RULES["fedga"])
    with pytest.raises(UserError, match="another configuration"):
        lab.run(out, options={"resume": True}, **RULES["fedga"], **{"federation.rounds": 5})


@pytest.mark.parametrize(
    "neutral",
    [
        {**RULES["fairfed"], "strategy.args": {"beta": 0.0}},
        {**RULES["qfedavg models"], "strategy.args": {"q": 0.0, "rule": "models"}},
        {**RULES["qfedavg"], "strategy.args": {"q": 0.0}},
    ],
    ids=["fairfed", "qfedavg models", "qfedavg"],
)
def test_switched_off_it_is_fedavg(lab: Any, neutral: dict[str, Any]) -> None:
    """Sites are of equal size, so that the uniform mean is the mean by examples."""
    expected, found = lab.state(lab.run()[0]), lab.state(lab.run(**neutral)[0])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_lost_site_does_not_stop_the_rule(lab: Any) -> None:
    def fail(call: Any) -> None:
        raise RuntimeError("no power")

    for rule in ("agnostic step", "fairfed", "fedga"):
        out, summary = lab.run(options={"intercept": lab.fault(fail, 2)}, **RULES[rule])
        assert set(summary["notes"]["weights"]) == {"phantom-00", "phantom-01", "phantom-02"}
        assert len(lab.history(out, phase="train", status="ok")) == 8


def test_fairfed_is_for_classification(lab: Any) -> None:
    with pytest.raises(UserError, match="classification"):
        lab.run(**lab.segmentation, **RULES["fairfed"])


def test_segmentation_with_a_loss(lab: Any) -> None:
    _, summary = lab.run(**lab.segmentation, **RULES["fedga"])
    assert sum(summary["notes"]["weights"].values()) == pytest.approx(1.0)
