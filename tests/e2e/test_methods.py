"""Whole runs of the methods that judge sites, and of every way to evaluate."""

from __future__ import annotations

import csv
import math
from typing import Any

import pytest
import torch

from fedmed.federation.checkpoint import CheckpointStore, read_safetensors

NOISY = {
    "data.partition.name": "iid", "data.partition.args": {"num_clients": 4},
    "data.phantom": {"num_sites": 2, "images_per_site": 60, "image_size": 16},
    "data.corruption.name": "label_noise",
    "data.corruption.args": {"kind": "random", "noisy_fraction": 0.5, "rate_lower": 0.9, "rate_upper": 1.0},
    "strategy.name": "fednoro", "client.name": "fednoro", "evaluation.central": "auto",
    "strategy.args": {"warmup_rounds": 1, "ramp_begin": 1, "ramp_end": 2, "covariance": "diag"},
}  # fmt: skip


def test_fednoro(lab: Any) -> None:
    out, summary = lab.run(**NOISY)
    assert [(r["round"], r["metrics"]["query"]) for r in lab.history(out, phase="query")] == [(2, "class_losses")] * 4
    notes = summary["notes"]
    assert set(notes) >= {"believed_noisy", "groups", "weights", "largest_weight"}
    clients = [f"client_0{i}" for i in range(4)]
    assert set(notes["believed_noisy"]) <= set(clients)
    assert sum(notes["weights"].values()) == pytest.approx(1.0) and set(notes["weights"]) == set(clients)
    assert sum(bool(t["is_noisy"]) for t in summary["truth"].values()) == 2
    noisy = summary["noisy_sites"]
    assert noisy["believed"] == notes["believed_noisy"] and len(noisy["true"]) == 2
    if noisy["believed"]:
        hits = set(noisy["believed"]) & set(noisy["true"])
        assert noisy["precision"] == len(hits) / len(noisy["believed"]) and noisy["recall"] == len(hits) / 2
    # Stage 1 has one loss term; in stage 2 the sites believed noisy have the two of the distillation.
    terms = {
        (r["round"], r["site"]): {k for k in r["metrics"] if k.startswith("loss/")}
        for r in lab.history(out, phase="train")
    }
    for site in clients:
        assert terms[1, site] == {"loss/ce"}
        assert terms[3, site] == ({"loss/kd", "loss/nll"} if site in noisy["believed"] else {"loss/ce"})
    kept = CheckpointStore(out / "checkpoint").read()
    assert kept is not None and set(kept.strategy["roles"]) == set(clients)
    assert kept.strategy["roles"] == {s: "noisy" if s in noisy["believed"] else "clean" for s in clients}
    assert [r["round"] for r in lab.history(out, phase="central")] == [1, 2, 3]
    assert lab.summary(out)["noisy_sites"] == noisy


def test_feda3i(lab: Any) -> None:
    settings = {
        **lab.segmentation, "data.phantom": {"num_sites": 2, "images_per_site": 40, "image_size": 32},
        "data.partition.name": "iid", "data.partition.args": {"num_clients": 4},
        "data.corruption.name": "contour_noise",
        "data.corruption.args": {"mean_low": 1.0, "mean_high": 2.0, "std": 0.5, "num_shrinkers": 2, "clip": 4.0, "even_spacing": True},
        "strategy.name": "feda3i", "client.name": "feda3i", "strategy.args": {"warmup_rounds": 1}, "evaluation.central": "auto",
        "evaluation.hd95": True,
    }  # fmt: skip
    out, summary = lab.run(**settings)
    clients = {f"client_0{i}" for i in range(4)}
    asked = {(r["round"], r["site"]) for r in lab.history(out, phase="train") if "loss_in_0" in r["metrics"]}
    assert asked == {(2, site) for site in clients}
    kept = CheckpointStore(out / "checkpoint").read()
    assert kept is not None and set(kept.strategy["quality"]) == clients
    assert sum(kept.strategy["quality"].values()) == pytest.approx(1.0)
    assert set(summary["notes"]["believed_noisy"]) <= clients
    assert all("mean_dice" in truth for truth in summary["truth"].values())
    last = lab.history(out, phase="evaluate", round=3)
    assert all("test/global/hd95" in r["metrics"] for r in last) and math.isfinite(summary["mean"])
    assert not any("test/global/hd95" in r["metrics"] for r in lab.history(out, phase="evaluate", round=2))
    for site in clients:
        assert (out / "sites" / site / "cases.csv").is_file() and (out / "sites" / site / "overlay.npz").is_file()


# ---------------------------------------------------------------------- evaluation


def rounds_scored(lab: Any, out: Any) -> list[int]:
    return [r["round"] for r in lab.history(out, phase="evaluate", site="phantom-00")]


def test_the_way_to_evaluate_does_not_change_the_model(lab: Any) -> None:
    runs = {mode: lab.run(**{"evaluation.mode": mode})[0] for mode in ("separate", "before", "after")}
    assert len({lab.model(out) for out in runs.values()}) == 1
    assert rounds_scored(lab, runs["separate"]) == [1, 2, 3]
    assert rounds_scored(lab, runs["before"]) == [0, 1, 2, 3]  # the received model of round r is that of round r − 1
    assert rounds_scored(lab, runs["after"]) == [1, 2, 3, 3]  # the last one is the global model at the end
    by_round = {
        mode: {r["round"]: r["metrics"] for r in lab.history(out, phase="evaluate", site="phantom-01")}
        for mode, out in runs.items()
    }
    for number in (1, 2, 3):
        assert by_round["separate"][number] == by_round["before"][number]
    assert by_round["separate"][3] == by_round["after"][3]
    train = lab.history(runs["before"], phase="train")
    assert not any(key.startswith(("test/", "n/")) for r in train for key in r["metrics"])


def test_every_second_round_and_the_last(lab: Any) -> None:
    out, _ = lab.run(**{"evaluation.every": 2, "federation.rounds": 5})
    assert rounds_scored(lab, out) == [2, 4, 5]


def test_no_scores_at_the_sites(lab: Any) -> None:
    derived = {"data.partition.name": "iid", "data.partition.args": {"num_clients": 3}}
    out, summary = lab.run(**derived, **{"evaluation.sites": False, "evaluation.central": "auto"})
    assert lab.history(out, phase="evaluate") == [] and not (out / "sites").exists()
    assert [r["round"] for r in lab.history(out, phase="central")] == [1, 2, 3]
    assert summary["central"]["last"]["n/test"] == 12


def test_a_file_of_the_coordinators_own(lab: Any, tmp_path: Any) -> None:
    from fedmed.data.phantom import make_phantom

    path = make_phantom(tmp_path / "own.h5", "classification", num_sites=1, images_per_site=50, image_size=16, seed=4)
    out, summary = lab.run(**{"evaluation.central": str(path)})
    assert summary["central"]["last"]["n/test"] == 10
    assert len(lab.history(out, phase="central")) == 3


def test_personal_models_have_no_central_score(lab: Any) -> None:
    derived = {"data.partition.name": "iid", "data.partition.args": {"num_clients": 3}}
    out, summary = lab.run(**derived, **{"client.name": "local_norm", "evaluation.central": "auto"})
    assert lab.history(out, phase="central") == [] and summary["central"]["last"] == {}
    scores = lab.history(out, phase="evaluate")
    assert all(any(k.startswith("test/personal/") for k in r["metrics"]) for r in scores)
    assert not any(k.startswith("test/global/") for r in scores for k in r["metrics"])
    assert "entries stay at the sites" in summary["notes"]["personal_entries"]
    # The file holds the run seed's values for what never travels.
    assert lab.state(out)["block1.norm.weight"].unique().tolist() == [1.0]


@pytest.mark.parametrize("central", [True, False])
def test_selection_by_validation(lab: Any, central: bool) -> None:
    """The model of the best validation round is kept beside the last one, and the summary says which round that was."""
    settings = {
        "data.partition.name": "iid", "data.partition.args": {"num_clients": 3}, "evaluation.select": "acc",
        "evaluation.central": "auto" if central else "none", "federation.rounds": 4, "optimizer.lr": 0.05,
        "data.phantom": {"num_sites": 3, "images_per_site": 60, "image_size": 16},
    }  # fmt: skip
    out, summary = lab.run(**settings)
    by_round: dict[int, float] = {}
    for number in range(1, 5):
        if central:
            by_round[number] = lab.history(out, phase="central", round=number)[0]["metrics"]["val/global/acc"]
        else:
            records = [r["metrics"] for r in lab.history(out, phase="evaluate", round=number)]
            total = sum(m["n/val"] for m in records)
            by_round[number] = sum(m["n/val"] * m["val/global/acc"] for m in records) / total
    best = max(by_round, key=lambda n: (by_round[n], -n))  # the first of equals
    assert summary["selected"] == {"round": best, "value": pytest.approx(by_round[best]), "metric": "acc"}
    chosen = read_safetensors(out / "model-selected.safetensors")
    at_best, _ = lab.run(**{**settings, "federation.rounds": best})
    state = lab.state(at_best)
    assert all(torch.equal(chosen[name], state[name]) for name in state)
    if central:
        record = lab.history(out, phase="central", round=best)[0]["metrics"]
        assert summary["central"]["selected"] == {"round": best, **record}


def test_the_run_folder_of_a_run(lab: Any) -> None:
    out, summary = lab.run(name="mine", seed=5)
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint", "config.yaml", "history.jsonl", "model.json", "model.safetensors", "sites", "summary.json",
    ]  # fmt: skip
    assert (summary["name"], summary["seed"], summary["rounds"], summary["main_metric"]) == ("mine", 5, 3, "bacc")
    assert set(summary["sites"]) == {f"phantom-0{i}" for i in range(3)}
    values = [s["bacc"] for s in summary["sites"].values()]
    assert summary["mean"] == pytest.approx(sum(values) / 3) and summary["worst"] == min(values)
    with (out / "sites" / "phantom-00" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and {r["site"] for r in rows} == {"phantom-00"}
