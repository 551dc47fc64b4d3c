"""Weak annotation in whole runs: what a site trains on never equals its full masks, scores are against full masks."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from clients.supervised import Supervised
from fedmed.data.split import Batch
from fedmed.federation.client import Output
from fedmed.losses.partial import partial_cross_entropy

WEAK = {"data.corruption.name": "weak_labels", "model.activation": "softmax", "federation.rounds": 2}


def kinds(*names: str) -> dict[str, Any]:
    return {"data.corruption.args": {"kind": list(names)}}


class SparseLabels(Supervised):
    """Reads drawn pixels only."""

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Full masks would have no open pixel."""
        assert self.train_set.ignore_value == 2
        assert self.data.label_kind == "box" or (self.train_set.targets == 2).any()

    def loss(self, output: Output, batch: Batch, step: int) -> dict[str, Tensor]:
        """Cross-entropy of the drawn pixels."""
        return {"ce": partial_cross_entropy(output.logits, batch.targets)}


def scores(lab: Any, **settings: Any) -> list[dict[str, float]]:
    """Metrics of every evaluation of a run."""
    out, _ = lab.run(**settings)
    trained = lab.history(out, phase="train", status="ok")
    assert len(trained) == 6 and all(record["metrics"]["loss/ce"] > 0 for record in trained)
    return [record["metrics"] for record in lab.history(out) if record["phase"] != "train"]


def test_sites_are_scored_on_full_masks_whatever_they_train_on(lab: Any) -> None:
    """With steps too small to matter, all that differs between two kinds is what is scored against; it must not."""
    settings = {
        **lab.segmentation,
        **WEAK,
        "evaluation.central": "auto",
        "optimizer.name": "sgd",
        "optimizer.lr": 1e-30,
    }
    full = scores(lab, **{**settings, "client.name": "supervised", "client.args": {"loss": "ce"}, **kinds("mask")})
    weak = scores(lab, **{**settings, "client.name": f"{__name__}:SparseLabels", **kinds("scribble", "point", "box")})
    assert any("dice" in key for record in full for key in record)
    losses = [{key for key in record if "loss" in key} for record in full]
    for one, two, left_out in zip(full, weak, losses, strict=True):
        assert {k: v for k, v in one.items() if k not in left_out} == pytest.approx(
            {k: v for k, v in two.items() if k not in left_out}, nan_ok=True
        )


def test_supervised_refuses_weak_sites_only(lab: Any) -> None:
    out, _ = lab.run(**{**lab.segmentation, **WEAK, **kinds("mask", "box")})
    trained = {record["site"] for record in lab.history(out, phase="train", status="ok")}
    assert trained == {"phantom-00", "phantom-02"}
