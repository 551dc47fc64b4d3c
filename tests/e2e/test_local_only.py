"""Every site alone: nothing travels, each site ends where it would without the others, and its scores stand beside another run's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message

from fedmed.cli.main import main
from fedmed.config import to_yaml
from fedmed.errors import QuorumLost, UserError
from fedmed.federation.checkpoint import read_safetensors
from fedmed.files import write_text
from fedmed.report import tables

ALONE = {"federation.local_only": True}
SITES = ("phantom-00", "phantom-01", "phantom-02")
# 23 images, 16 of them for training: the federated mean of one site divides by a power of two, which is exact.
FIRST = {"data.phantom": {"num_sites": 1, "images_per_site": 23, "image_size": 16}, "federation.min_sites": 1}
THREE = {"data.phantom": {"num_sites": 3, "images_per_site": 23, "image_size": 16}}


def kept(out: Path, site: str) -> dict[str, torch.Tensor]:
    """What a site keeps after the last of three rounds."""
    return read_safetensors(out / "sites" / site / "personal" / "round-00003" / "personal.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Same entries, equal to the bit."""
    return set(first) == set(second) and all(torch.equal(value, second[name]) for name, value in first.items())


def seen(messages: list[Message]) -> Any:
    """Keeps every message there and back."""

    def intercept(message: Message, call: Any) -> Message:
        reply: Message = call()
        messages.extend((message, reply))
        return reply

    return intercept


@pytest.mark.parametrize("mode", ["separate", "before", "after"])
def test_nothing_travels_and_sites_differ(lab: Any, mode: str) -> None:
    messages: list[Message] = []
    out, summary = lab.run(options={"intercept": seen(messages)}, **ALONE, **{"evaluation.mode": mode})
    records = [record for message in messages for record in message.content.values()]
    assert {m.metadata.message_type for m in messages} >= {"train", "evaluate"}
    assert all(len(record) == 0 for record in records if isinstance(record, ArrayRecord))
    states = [kept(out, site) for site in SITES]
    initial = lab.state(out)
    for i, state in enumerate(states):
        assert set(state) == set(initial) and not same(state, initial)
        assert not any(same(state, other) for other in states[:i])
    assert summary["judged_by"] == "test/personal" and summary["central"]["last"] == {}
    found = summary["personal"]["bacc"]
    assert found["S_from"] == "alone" and math.isnan(found["G"]) and not math.isnan(found["S"])
    assert not [r for r in lab.history(out) if r["status"] != "ok"]
    assert not any("global" in key for r in lab.history(out) for key in r["metrics"])


@pytest.mark.parametrize("persist", [False, True])
def test_a_site_ends_where_it_would_without_the_others(lab: Any, persist: bool) -> None:
    """Seeds, order of data and moments are those of a federation of this site alone."""
    out, _ = lab.run(**ALONE, **THREE, **{"optimizer.persist": persist})
    single, _ = lab.run(**FIRST, **{"optimizer.persist": persist})
    entries = {n: v for n, v in kept(out, SITES[0]).items() if not n.startswith("optimizer/")}
    assert same(entries, lab.state(single))


def test_the_arms_see_the_same_batches(lab: Any) -> None:
    """Ditto without its pull is a site alone, beside the federated model: the same steps to the bit."""
    out, _ = lab.run(**ALONE)
    ditto, _ = lab.run(**{"client.name": "ditto", "client.args": {"lam": 0.0}})
    assert all(same(kept(out, site), kept(ditto, site)) for site in SITES)


def test_stopped_and_resumed(lab: Any) -> None:
    settings = {**ALONE, "optimizer.persist": True, "evaluation.select": "bacc"}
    whole, summary = lab.run(**settings)
    parts = lab.new()
    for number in (1, 2):
        lab.stopped(parts, number, resume=number > 1, **settings)
    _, again = lab.run(parts, options={"resume": True}, **settings)
    assert all(same(kept(whole, site), kept(parts, site)) for site in SITES)
    assert lab.history(whole) == lab.history(parts)
    assert repr(summary["personal"]) == repr(again["personal"]) and summary["selected"] == again["selected"]


def test_a_site_that_fails_goes_on_from_the_round_before(lab: Any) -> None:
    def raises(call: Any) -> Message:
        call()
        raise RuntimeError("out of memory")

    whole, _ = lab.run(**ALONE)
    out, summary = lab.run(options={"intercept": lab.fault(raises, 2)}, **ALONE)
    assert [(f["round"], f["site"]) for f in summary["failures"]] == [(2, SITES[1])]
    assert all(same(kept(whole, site), kept(out, site)) for site in (SITES[0], SITES[2]))
    assert not same(kept(whole, SITES[1]), kept(out, SITES[1]))


def test_a_model_that_diverged_is_not_kept(lab: Any) -> None:
    """The server sees no weights, so the site looks itself."""
    with pytest.raises(QuorumLost, match="holds NaN or infinite values"):
        lab.run(out := lab.new(), **ALONE, **{"optimizer.name": "sgd", "optimizer.lr": 1e30, "training.epochs": 3})
    assert not list(out.glob("sites/*/personal"))


def test_extra_arrays_stay_as_well(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from clients.supervised import Supervised

    monkeypatch.setattr(Supervised, "end_round", lambda self: ({"features": torch.ones(3)}, {"train_loss": 1.0}))
    messages: list[Message] = []
    lab.run(options={"intercept": seen(messages)}, **ALONE, **{"federation.rounds": 1})
    assert all("extras" not in message.content for message in messages)


@pytest.mark.parametrize(
    "settings",
    [{"client.name": "ditto"}, {"client.name": "scaffold", "optimizer.name": "sgd"}],
    ids=lambda s: s["client.name"],
)
def test_clients_of_a_received_model_are_refused(lab: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"works with the model the server sends, .* client\.name=supervised"):
        lab.run(**ALONE, **settings)


def test_a_teacher_is_refused(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from clients.supervised import Supervised

    monkeypatch.setattr(Supervised, "loss", lambda self, output, batch, step: {"kd": self.teacher(batch.images).logits})
    with pytest.raises(UserError, match="client 'supervised' works with the model the server sends"):
        lab.run(**ALONE)


@pytest.mark.parametrize(
    "settings",
    [
        {"client.prox": {"enabled": True, "mu": 1.0}},
        {"client.name": "local_norm"},
        {"federation.fraction": 0.5},
    ],
    ids=["prox", "local_norm", "fraction"],
)
def test_what_needs_nothing_from_the_server_works(lab: Any, settings: dict[str, Any]) -> None:
    """Without a received model the pull of FedProx is no term, and FedBN is plain training."""
    out, summary = lab.run(**ALONE, **settings)
    assert summary["rounds"] == 3 and summary["failures"] == []
    if "federation.fraction" not in settings:
        plain, _ = lab.run(**ALONE)
        assert all(same(kept(plain, site), kept(out, site)) for site in SITES)


def test_both_heads_of_fca_stay(lab: Any) -> None:
    settings = {"model.name": "two_heads", "model.args": {"name": "small_cnn", "args": {"widths": [4, 4]}}}
    out, summary = lab.run(**ALONE, **settings, **{"client.name": "fca"})
    assert any(name.startswith("personal_head") for name in kept(out, SITES[0])) and summary["failures"] == []


def test_other_rules_are_refused(lab: Any) -> None:
    with pytest.raises(UserError, match=r"strategy 'fedadam' .* set strategy\.name=fedavg strategy\.args=null"):
        lab.run(**ALONE, **{"strategy.name": "fedadam"})


@pytest.mark.slow
@pytest.mark.processes
def test_the_same_on_ray(lab: Any) -> None:
    settings = {**ALONE, "optimizer.persist": True}
    local, _ = lab.run(**settings)
    ray, _ = lab.run(**settings, **{"engine.name": "ray"})
    assert all(same(kept(local, site), kept(ray, site)) for site in SITES)
    assert lab.history(local) == lab.history(ray)


# ---------------------------------------------------------------------- side by side


def test_three_columns_at_once_or_added_later(lab: Any) -> None:
    alone, local = lab.run(**ALONE)
    ditto = {"client.name": "ditto"}
    out, summary = lab.run(**ditto, **{"evaluation.local_only": str(alone)})
    found = summary["personal"]["bacc"]
    assert found["L"] == local["personal"]["bacc"]["S"]
    for site in SITES:
        assert set(found["sites"][site]) == {"global", "personal", "local"}
        assert found["sites"][site]["local"] == local["sites"][site]["bacc"]
    assert tables.personal_table(summary)[0] == ["site (bacc)", "global", "personal", "local-only"]
    later, before = lab.run(**ditto)
    assert "L" not in before["personal"]["bacc"]
    _, after = lab.run(later, options={"resume": True}, **ditto, **{"evaluation.local_only": str(alone)})
    assert after["personal"] == summary["personal"] and lab.model(later) == lab.model(out)


def test_by_the_command_line(lab: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone, out = lab.new(), lab.new()
    path = write_text(tmp_path / "base.yaml", to_yaml(lab.config(alone)))
    assert main(["run", str(path), "federation.local_only=true", "--out", str(alone), "--quiet"]) == 0
    more = ["client.name=ditto", f"evaluation.local_only={alone}"]
    assert main(["run", str(path), *more, "--out", str(out), "--quiet"]) == 0
    assert "global  personal  local-only" in capsys.readouterr().out
    assert "| global | personal | local-only |" in (out / "report.md").read_text()


def test_wrong_folders_are_refused_before_anything_is_written(lab: Any) -> None:
    federated, _ = lab.run(**{"client.name": "ditto"})
    alone, _ = lab.run(**ALONE, **{"data.phantom": {"num_sites": 2, "images_per_site": 20, "image_size": 16}})
    masks, _ = lab.run(**{**lab.segmentation, **ALONE, "federation.rounds": 1})
    wrong = {
        lab.new(): "holds no summary.json",
        federated: "is not a local-only run",
        alone: "is of other sites",
        masks: "has no bacc",
    }
    for folder, problem in wrong.items():
        with pytest.raises(UserError, match=f"evaluation.local_only: {folder} {problem}"):
            lab.run(out := lab.new(), **{"client.name": "ditto", "evaluation.local_only": str(folder)})
        assert not out.exists() or not list(out.iterdir())
    with pytest.raises(UserError, match="client 'supervised' has no personal view"):
        lab.run(**{"evaluation.local_only": str(alone)})


def test_wrong_folders_are_refused_before_ray_starts(lab: Any) -> None:
    settings = {"client.name": "ditto", "engine.name": "ray", "evaluation.local_only": str(lab.new())}
    with pytest.raises(UserError, match="holds no summary"):
        lab.run(out := lab.new(), **settings)
    assert not out.exists()
