"""FedNPR as whole runs: on which methods it rides, what stays at the site, lost replies, stop and resume to the bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import Tensor

from fedmed.data.phantom import make_phantom
from fedmed.errors import UserError
from fedmed.federation.messages import ARRAYS, EXTRAS, arrays_of
from fedmed.federation.personal import PersonalStore

SITES = ("phantom-00", "phantom-01", "phantom-02")
PROTOTYPES, VALID = "npr/prototypes", "npr/valid"
ON = {"client.npr": {"enabled": True}}
NPR: dict[str, Any] = {
    **ON, "client.args": {"loss": "logit_adjusted_ce", "prior_eps": 1e-9}, "optimizer.persist": True,
    "optimizer.schedule": "multistep", "optimizer.milestones": [3],
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "fednpr": NPR,
    "fednpr_per": {**NPR, "client.name": "personal_head"},
    "random assignment, valid classes": {"client.npr": {"enabled": True, "assignment": "random", "valid_classes_only": True}},
    "fedprox": {**ON, "client.prox": {"enabled": True, "mu": 0.1}},
    "fedism": {**ON, "strategy.name": "fedism", "client.name": "fedism"},
    "fednoro": {
        **ON, "strategy.name": "fednoro", "client.name": "fednoro", "federation.rounds": 4,
        "strategy.args": {"warmup_rounds": 2, "ramp_begin": 2, "ramp_end": 3, "num_votes": 3},
    },
}  # fmt: skip


def kept(out: Path, site: str, number: int) -> dict[str, Tensor]:
    """What a site keeps of a round."""
    found = PersonalStore(out / "sites" / site / "personal").read(number)
    assert found is not None
    return found


@pytest.mark.parametrize("method", METHODS)
def test_stopped_after_every_round(lab: Any, method: str) -> None:
    settings = METHODS[method]
    whole, summary = lab.run(**settings)
    parts = lab.new()
    for number in range(1, summary["rounds"] + 1):
        lab.stopped(parts, number, resume=number > 1, **settings)
    lab.run(parts, options={"resume": True}, **settings)
    assert lab.model(whole) == lab.model(parts) and lab.history(whole) == lab.history(parts)
    for site in SITES:
        first, second = kept(whole, site, summary["rounds"]), kept(parts, site, summary["rounds"])
        assert set(first) == set(second) and all(torch.equal(first[k], second[k]) for k in first)
        assert {PROTOTYPES, VALID} <= set(first) and bool(first[PROTOTYPES].isfinite().all())
    terms = [r["metrics"]["loss/npr"] for r in lab.history(whole, phase="train", status="ok")]
    assert len(terms) == 3 * summary["rounds"] and all(math.isfinite(v) and v > 0 for v in terms)


def test_it_changes_what_is_learnt(lab: Any) -> None:
    plain, _ = lab.run()
    for settings in ({**ON}, {"client.npr": {"enabled": True, "lam": 1.0}}):
        with_it, _ = lab.run(**settings)
        assert lab.model(plain) != lab.model(with_it)
    off, _ = lab.run(**{"client.npr": {"enabled": False}})
    assert lab.model(plain) == lab.model(off)


def test_a_lost_reply_takes_the_prototypes_back(lab: Any) -> None:
    """The second site's reply of round 2 is lost: in round 3 its prototypes go on from round 1."""

    def lose(call: Any) -> None:
        call()
        raise RuntimeError("connection lost")

    def absent(call: Any) -> None:
        raise RuntimeError("unreachable")

    lost, _ = lab.run(options={"intercept": lab.fault(lose, 2)}, **NPR)
    away, _ = lab.run(options={"intercept": lab.fault(absent, 2)}, **NPR)
    assert lab.model(lost) == lab.model(away)
    for site in SITES:
        first, second = kept(lost, site, 3), kept(away, site, 3)
        assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("client", ["supervised", "personal_head"])
def test_neither_prototypes_nor_a_personal_classifier_travel(lab: Any, client: str) -> None:
    names: set[str] = set()

    def watch(message: Message, call: Any) -> Message:
        reply: Message = call()
        for content in (message.content, reply.content):
            names.update({*arrays_of(content, ARRAYS), *arrays_of(content, EXTRAS)})
        return reply

    lab.run(options={"intercept": watch}, **{**NPR, "client.name": client, "federation.rounds": 2})
    assert names and not any("npr" in name for name in names)
    assert any(name.startswith("head") for name in names) == (client == "supervised")


def test_personal_classifiers_go_their_own_ways_from_one_start(lab: Any) -> None:
    settings = {**NPR, "client.name": "personal_head", "evaluation.select": "bacc"}
    out, summary = lab.run(**settings)
    heads = [kept(out, site, 3)["head.weight"] for site in SITES]
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])
    start = lab.state(out)["head.weight"]  # the server never sees a trained one: it has that of the run's seed
    distances = [float((head - start).norm()) for head in heads]
    assert all(0 < distance < float(start.norm()) for distance in distances)
    assert "entries stay at the sites" in summary["notes"]["personal_entries"]
    for record in lab.history(out, phase="evaluate", status="ok"):
        assert "test/personal/bacc" in record["metrics"] and "test/global/bacc" not in record["metrics"]


def test_sites_that_lack_classes(lab: Any, tmp_path: Path) -> None:
    """One site with a single class, one with a class of one item: absent classes keep their random prototypes."""
    path = make_phantom(tmp_path / "sites.h5", "classification", num_sites=3, images_per_site=20, image_size=16)
    with h5py.File(path, "r+") as file:
        first, second = file["site_00/label"], file["site_01/label"]
        first[...] = np.zeros_like(first[...])
        labels = np.zeros_like(second[...])
        labels[int(file["site_01"].attrs["train_idx"][0])] = 4
        second[...] = labels
    for valid_only in (False, True):
        npr = {"enabled": True, "valid_classes_only": valid_only}
        out, _ = lab.run(**{**NPR, "client.npr": npr, "data.path": str(path), "data.phantom": {}})
        for site in SITES[:2]:
            state = kept(out, site, 3)
            assert state[VALID].tolist() == [True] + [False] * 5
            norms = state[PROTOTYPES].norm(dim=-1)
            assert bool((norms[1:] < 0.5).all()) and float(norms[0].max()) == pytest.approx(1.0)
        last = {r["site"]: r["metrics"]["loss/npr"] for r in lab.history(out, phase="train", round=3)}
        assert all(math.isfinite(v) for v in last.values()) and (last[SITES[0]] == 0.0) == valid_only


def test_another_task_is_refused(lab: Any) -> None:
    with pytest.raises(UserError, match="add-on npr needs one class per image"):
        lab.run(**lab.segmentation, **ON)
