"""FCA as whole runs: the second head stays where it is, both views are scored, stop and resume, and the report of the pair."""

from __future__ import annotations

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
from fedmed.federation.checkpoint import read_safetensors

FCA: dict[str, Any] = {
    "model.name": "two_heads", "model.args": {"name": "small_cnn", "args": {"widths": [4, 4]}}, "client.name": "fca",
    "optimizer.persist": True, "optimizer.weight_decay": 5e-4, "federation.rounds": 2,
}  # fmt: skip
HEAD = ("personal_head.weight", "personal_head.bias")
SITES = ("phantom-00", "phantom-01", "phantom-02")


def run(lab: Any, out: Path | None = None, *, options: Any = None, **changes: Any) -> tuple[Path, dict[str, Any]]:
    found: tuple[Path, dict[str, Any]] = lab.run(out, options=options, **settings(**changes))
    return found


def settings(**changes: Any) -> dict[str, Any]:
    return {**FCA, **{key.replace("__", "."): value for key, value in changes.items()}}


def kept(out: Path, site: str) -> dict[str, Tensor]:
    """What a site keeps, of the newest round."""
    newest = max((out / "sites" / site / "personal").glob("round-*"))
    return read_safetensors(newest / "personal.safetensors")


class Listener:
    """Hears every message and its reply; notes the names of all arrays and metrics."""

    def __init__(self) -> None:
        self.names: dict[str, set[str]] = {}

    def __call__(self, message: Message, call: Any) -> Message | None:
        reply = call()
        kind = message.metadata.message_type
        for one in (message, reply):
            for record in one.content.values():
                self.names.setdefault(kind, set()).update(str(key) for key in record)
        return reply


def test_the_second_head_never_travels(lab: Any) -> None:
    ear = Listener()
    out, summary = run(lab, options={"intercept": ear}, evaluation__mode="before")
    assert {kind.split(".")[0] for kind in ear.names} >= {"train", "evaluate"}
    heard = set().union(*ear.names.values())
    assert "base.head.weight" in heard and {"loss/fed", "loss/per", "loss/con"} <= heard
    assert not any("personal_head" in name for name in heard)
    own = [kept(out, site) for site in SITES]
    assert all(set(HEAD) <= set(one) and f"optimizer/{HEAD[0]}/exp_avg" in one for one in own)
    assert not torch.equal(own[0][HEAD[0]], own[1][HEAD[0]])
    assert summary["notes"]["personal_entries"].startswith("2 entries stay at the sites")
    first, _ = run(lab, federation__rounds=1)
    assert all(torch.equal(lab.state(out)[name], lab.state(first)[name]) for name in HEAD)  # the seed's, in the file


@pytest.mark.parametrize("mode", ["separate", "before", "after"])
def test_both_views_and_the_pair(lab: Any, mode: str) -> None:
    out, summary = run(lab, evaluation__mode=mode)
    records = lab.history(out, phase="evaluate")
    assert all({"test/global/bacc", "test/personal/bacc"} <= set(r["metrics"]) for r in records)
    assert len(records) == {"separate": 6, "before": 9, "after": 9}[mode]
    assert summary["judged_by"] == "test/global"
    pair = summary["personal"]["bacc"]
    last = [r["metrics"] for r in records if r["round"] == 2]
    assert pair["G"] == pytest.approx(np.mean([m["test/global/bacc"] for m in last[-3:]]))
    assert pair["S"] == pytest.approx(np.mean([m["test/personal/bacc"] for m in last[:3]]))
    assert pair["G_from"] == "sites" and pair["S_from"] == ("trained" if mode == "after" else "received")
    total, product = pair["G"] + pair["S"], pair["G"] * pair["S"]
    assert pair["mean"] == pytest.approx(total / 2) and pair["harmonic"] == pytest.approx(2 * product / total)
    assert list(pair["sites"]) == list(SITES) and {"bacc", "auc", "acc", "f1"} <= set(summary["personal"])


def test_a_central_test_set_gives_generalisation(lab: Any) -> None:
    changes = {"data__partition__name": "dirichlet", "data__partition__args": {"num_clients": 3}}
    _, summary = run(lab, evaluation__central="auto", **changes)
    pair = summary["personal"]["bacc"]
    assert pair["G_from"] == "central" and pair["G"] == summary["central"]["last"]["test/global/bacc"]


@pytest.mark.parametrize("mode", ["separate", "after"])
def test_stopped_after_every_round(lab: Any, mode: str) -> None:
    changed = settings(evaluation__mode=mode)
    whole, summary = run(lab, evaluation__mode=mode)
    parts = lab.new()
    for number in (1, 2):
        lab.stopped(parts, number, resume=number > 1, **changed)
    _, again = run(lab, parts, options={"resume": True}, evaluation__mode=mode)
    assert lab.model(whole) == lab.model(parts) and lab.history(whole) == lab.history(parts)
    assert repr(summary["personal"]) == repr(again["personal"])
    for site in SITES:
        torch.testing.assert_close(kept(whole, site), kept(parts, site), rtol=0, atol=0)


def test_a_lost_reply_rolls_the_head_back(lab: Any) -> None:
    def lost(call: Any) -> None:
        call()
        raise RuntimeError("connection lost")

    def absent(call: Any) -> None:
        raise RuntimeError("not there")

    first, _ = run(lab, options={"intercept": lab.fault(lost, 2)}, federation__rounds=3)
    second, _ = run(lab, options={"intercept": lab.fault(absent, 2)}, federation__rounds=3)
    assert lab.model(first) == lab.model(second)
    torch.testing.assert_close(kept(first, SITES[1]), kept(second, SITES[1]), rtol=0, atol=0)


def test_sites_with_one_class_and_without_test_items(
    lab: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_phantom(tmp_path / "sites.h5", "classification", num_sites=3, images_per_site=20, image_size=16)
    with h5py.File(path, "r+") as file:
        groups: dict[str, Any] = {}
        file.visititems(lambda _, item: groups.update({str(item.attrs.get("site_name")): item}))
        labels = groups[SITES[0]]["label"]
        labels[...] = np.zeros_like(labels[...])
        groups[SITES[1]].attrs["test_idx"] = groups[SITES[1]].attrs["test_idx"][:0]
    _, summary = run(lab, data__path=str(path), data__phantom={})
    assert caplog.text.count("all training items are of one class") == 1 and SITES[0] in caplog.text
    bacc = summary["personal"]["bacc"]
    assert list(bacc["sites"]) == [SITES[0], SITES[2]]
    assert bacc["S"] == pytest.approx(np.mean([one["personal"] for one in bacc["sites"].values()]))
    auc = summary["personal"]["auc"]  # one class: undefined at the first site, and left out
    assert auc["S"] == auc["sites"][SITES[2]]["personal"] and np.isnan(auc["sites"][SITES[0]]["personal"])


@pytest.mark.parametrize(
    ("client", "has_global"), [({"client.name": "ditto"}, True), ({"client.name": "local_norm"}, False)]
)
def test_the_pair_of_other_personal_methods(lab: Any, client: dict[str, Any], has_global: bool) -> None:
    _, summary = lab.run(**client, **{"federation.rounds": 1})
    pair = summary["personal"]["bacc"]
    assert pair["S"] > 0 and pair["S_from"] == "received"
    assert pair["G_from"] == ("sites" if has_global else None) and np.isnan(pair["G"]) != has_global
    assert lab.run(**{"federation.rounds": 1})[1]["personal"] == {}


def test_another_model_is_refused(lab: Any) -> None:
    with pytest.raises(UserError, match=r"FCA trains two heads, model 'small_cnn' has one"):
        lab.run(**{"client.name": "fca"})
