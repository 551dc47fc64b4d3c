"""FedMLP as whole runs: stages, what is kept, stop and resume, lost replies; and how good its pseudo-labels are.

| seeds | claim, written down before the first run with them |
|--|--|
| 1, 2 | share of true ones among the positive pseudo-labels, mean over the sites: at least .1 above that of all entries a site does not annotate |
| 1, 2 | the same for the negative ones: at least .05 above |
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from clients.missing_classes import SOURCE, TAGS
from fedmed.data.phantom import make_phantom
from fedmed.federation.checkpoint import CheckpointStore
from fedmed.federation.personal import PersonalStore

SITES = [f"phantom-0{i}" for i in range(3)]
ROUNDS, WARMUP = 5, 2
FEDMLP = {
    "strategy.name": "fedmlp", "client.name": "fedmlp", "strategy.args": {"warmup_rounds": WARMUP},
    "client.args": {"negative_fraction": 0.2, "positive_fraction": 0.3, "min_count": 1}, "data.augment": ["hflip"],
    "federation.rounds": ROUNDS, "evaluation.every": ROUNDS,
}  # fmt: skip


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sites of six findings; each annotates two of them in training, the labels of the others are 0."""
    path = tmp_path_factory.mktemp("missing") / "sites.h5"
    make_phantom(path, "multilabel", num_sites=3, images_per_site=30, image_size=16)
    with h5py.File(path, "r+") as file:
        for i, name in enumerate(sorted(file)):
            group, rows = file[name], np.asarray(file[name].attrs["train_idx"])
            labels = group["label"][()]
            active = np.ones(labels.shape, dtype=np.uint8)
            active[rows] = 0
            active[rows, 2 * i] = active[rows, 2 * i + 1] = 1
            group.create_dataset("reference/label", data=labels)
            group["label"][...] = labels * active
            group["active_classes"] = active
    return path


def settings(sites: Path, **changes: Any) -> dict[str, Any]:
    """Overrides for `lab.run`."""
    more = {key.replace("__", "."): value for key, value in changes.items()}
    return {**FEDMLP, "data.path": str(sites), **more}


def reported(lab: Any, out: Path, metric: str) -> dict[str, dict[int, float]]:
    """Values of a metric by site and round."""
    found: dict[str, dict[int, float]] = {site: {} for site in SITES}
    for record in lab.history(out, phase="train", status="ok"):
        if metric in record["metrics"]:
            found[record["site"]][record["round"]] = record["metrics"][metric]
    return found


def test_a_course(lab: Any, sites: Path) -> None:
    out, summary = lab.run(**settings(sites))
    positive, negative = reported(lab, out, "n_pseudo_pos"), reported(lab, out, "n_pseudo_neg")
    for site in SITES:
        numbers = [positive[site][r] + negative[site][r] for r in range(1, ROUNDS + 1)]
        assert numbers[:WARMUP] == [0, 0] and 0 < numbers[2] < numbers[3] <= numbers[4]
        personal = PersonalStore(out / "sites" / site / "personal").read(ROUNDS)
        assert personal is not None and set(personal) == {TAGS, SOURCE}
        assert int((personal[TAGS] != 0).sum()) == numbers[-1]
    for round_number, term in ((WARMUP, "loss/consistency"), (WARMUP + 1, "loss/distilled")):
        assert all(round_number in row for row in reported(lab, out, term).values())
    notes = summary["notes"]
    assert notes["classes_without_prototypes"] == [] and len(notes["learning_degree"]) == 6
    assert notes["n_pseudo_pos"] == {site: positive[site][ROUNDS] for site in SITES}
    assert sum(notes["weights"].values()) == pytest.approx(1.0)
    kept = CheckpointStore(out / "checkpoint").read()
    assert kept is not None and kept.strategy["proto"].shape == (12, 4) and kept.strategy["proto_valid"] == [1] * 12


def test_a_run_within_the_warm_up(lab: Any, sites: Path) -> None:
    out, _ = lab.run(**settings(sites, federation__rounds=1))
    kept = CheckpointStore(out / "checkpoint").read()
    assert kept is not None and kept.strategy["proto_valid"] == []


def test_stopped_after_every_round(lab: Any, sites: Path) -> None:
    whole, summary = lab.run(**settings(sites))
    parts = lab.new()
    for number in range(1, ROUNDS + 1):
        lab.stopped(parts, number, resume=number > 1, **settings(sites))
    _, resumed = lab.run(parts, options={"resume": True}, **settings(sites))
    assert lab.model(whole) == lab.model(parts) and lab.history(whole) == lab.history(parts)
    assert summary["notes"] == resumed["notes"]


def test_stopped_while_sites_tag(lab: Any, sites: Path) -> None:
    """Interrupted in round 4 after the second site has tagged: as if the round had not begun."""
    whole, _ = lab.run(**settings(sites))

    def interrupt(call: Any) -> None:
        call()
        raise KeyboardInterrupt

    parts = lab.new()
    with pytest.raises(KeyboardInterrupt):
        lab.run(parts, options={"intercept": lab.fault(interrupt, 4)}, **settings(sites))
    lab.run(parts, options={"resume": True}, **settings(sites))
    assert lab.model(whole) == lab.model(parts) and lab.history(whole) == lab.history(parts)


def test_away_when_the_first_prototypes_are_collected(lab: Any, sites: Path) -> None:
    """The second site alone knows classes 2 and 3: they have prototypes, and tags elsewhere, one round later."""

    def lose(call: Any) -> None:
        call()
        raise RuntimeError("connection lost")

    out, summary = lab.run(options={"intercept": lab.fault(lose, WARMUP)}, **settings(sites))
    notes = [r["metrics"]["classes_without_prototypes"] for r in lab.history(out, phase="server")
             if "classes_without_prototypes" in r["metrics"]]  # fmt: skip
    classes = list(summary["notes"]["learning_degree"])
    assert notes == [classes[2:4], [], [], []]
    whole, _ = lab.run(**settings(sites))
    here, there = (reported(lab, o, "n_pseudo_neg")[SITES[0]][WARMUP + 1] for o in (out, whole))
    assert here < there


def test_a_lost_folder_is_noticed(lab: Any, sites: Path) -> None:
    out = lab.new()

    def forget(call: Any) -> Any:
        shutil.rmtree(out / "sites" / SITES[1] / "personal")
        return call()

    lab.run(out, options={"intercept": lab.fault(forget, ROUNDS)}, **settings(sites))
    assert reported(lab, out, "personal_fresh") == {SITES[0]: {}, SITES[1]: {ROUNDS: 1}, SITES[2]: {}}
    row = reported(lab, out, "n_pseudo_neg")[SITES[1]]
    assert 0 < row[ROUNDS] < row[ROUNDS - 1]
