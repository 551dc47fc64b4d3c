"""Scores on every subset of the modalities: who is scored, on what, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmed.data.phantom import make_phantom
from fedmed.data.site_file import SiteFile
from fedmed.data.split import Batch
from fedmed.federation.messages import BASE_LEAVES
from fedmed.federation.rounds import _split_scores
from fedmed.federation.subsets import modality_subsets, restrict, safe_names, take_away
from fedmed.report.write import write_report

CHANNELS = ["T1", "FLAIR", "T1 contrast"]
ALL = ["T1", "FLAIR", "T1_contrast", "T1+FLAIR", "T1+T1_contrast", "FLAIR+T1_contrast", "T1+FLAIR+T1_contrast"]
SETTINGS: dict[str, Any] = {
    "data.path": "phantom:multimodal",
    "data.phantom": {"num_sites": 3, "images_per_site": 40, "image_size": 16, "seed": 3},
    "model.name": "multi_encoder_unet",
    "model.args": {"base_width": 2, "depth": 2},
    "federation.rounds": 2,
    "training.max_steps": 2,
}  # fmt: skip


def names_of(channels: list[str]) -> list[str]:
    return [name.removeprefix("test-with+") for name in modality_subsets(channels)]


def test_names_of_subsets() -> None:
    assert names_of(CHANNELS) == ALL
    assert modality_subsets(["a", "b"]) == {"test-with+a": (0,), "test-with+b": (1,), "test-with+a+b": (0, 1)}
    assert len(modality_subsets("abcdef")) == 63
    assert names_of(list("abcdefg")) == [*"abcdefg", "a+b+c+d+e+f+g"]  # too many: each alone, and all
    assert safe_names(["T1 c/e", "T2-w", "x+y", ""]) == ["T1_c_e", "T2-w", "x_y", "_"]
    assert safe_names(["a b", "a/b", "a"]) == ["a_b_1", "a_b_2", "a"]


def test_what_is_left_of_items_and_batches(tmp_path: Path) -> None:
    path = make_phantom(tmp_path / "m.h5", "multimodal", num_sites=2, images_per_site=40, image_size=16, seed=3)
    with SiteFile.open(path) as file:
        split = file.site(file.sites[1].name).split("test")
        channels = list(file.channels)
    present = split.extras_at(split.index)["modality_present"].bool()
    lacking = int((~present.all(dim=0)).nonzero()[0])  # a contrast this site lacks at least once
    alone = restrict(split, (lacking,))
    assert len(alone) == int(present[:, lacking].sum()) < len(split) == len(restrict(split, range(len(channels))))
    batch = split.batch(torch.arange(len(split)))
    left = take_away(batch, (0, lacking))
    shown = left.extras["modality_present"].bool()
    kept = torch.tensor([m in (0, lacking) for m in range(len(channels))])
    assert torch.equal(shown, present & kept)
    assert left.images[~shown].count_nonzero() == 0 and torch.equal(left.images[shown], batch.images[shown])
    assert torch.equal(left.targets, batch.targets) and torch.equal(left.index, batch.index)
    # Data that do not say what is missing have everything.
    bare = take_away(Batch(batch.images, batch.targets, batch.index), (1,))
    assert bare.extras["modality_present"].tolist() == [[0, 1, 0]] * len(split)


@pytest.fixture
def central(tmp_path: Path) -> Path:
    """Items of the coordinator: one site, complete."""
    return make_phantom(tmp_path / "c.h5", "multimodal", num_sites=1, images_per_site=40, image_size=16, seed=9)


def splits_of(metrics: dict[str, Any]) -> list[str]:
    return [k.removeprefix("n/test-with+") for k in metrics if k.startswith("n/test-with+")]


@pytest.mark.parametrize(("choice", "rounds"), [("none", []), ("last", [2]), ("every", [1, 2])])
def test_when_subsets_are_scored(lab: Any, central: Path, choice: str, rounds: list[int]) -> None:
    settings = {**SETTINGS, "evaluation.central": str(central), "evaluation.modality_subsets": choice}
    out, summary = lab.run(**settings)
    scored = [r for r in lab.history(out, phase="central") if splits_of(r["metrics"])]
    assert [r["round"] for r in scored] == rounds and all(splits_of(r["metrics"]) == ALL for r in scored)
    at_sites = [r for r in lab.history(out, phase="evaluate") if splits_of(r["metrics"])]
    assert {r["round"] for r in at_sites} == ({2} if rounds else set()) and len(at_sites) == (3 if rounds else 0)
    assert bool(summary["subsets"]) == bool(rounds)
    assert summary["judged_by"] == "test/global" and list(summary["fairness"]["by_condition"]) == ["clean"]


def test_scores_of_subsets(lab: Any, central: Path) -> None:
    out, summary = lab.run(**SETTINGS, **{"evaluation.central": str(central)})
    plain, before = lab.run(**SETTINGS, **{"evaluation.central": str(central), "evaluation.modality_subsets": "none"})
    assert lab.model(out) == lab.model(plain)
    assert {k: str(v) for k, v in summary["fairness"].items()} == {k: str(v) for k, v in before["fairness"].items()}
    for phase in ("central", "evaluate"):  # nothing but additions
        for record, without in zip(lab.history(out, phase=phase), lab.history(plain, phase=phase), strict=True):
            rest = {k: v for k, v in record["metrics"].items() if "test-with+" not in k}
            assert {**record, "metrics": rest} == without
    (last,) = [r["metrics"] for r in lab.history(out, phase="central", round=2)]
    everything = f"test-with+{ALL[-1]}"
    assert last[f"n/{everything}"] == last["n/test"]
    for metric in ("dice", "missed_fraction", "both_empty"):
        assert last[f"{everything}/global/{metric}"] == last[f"test/global/{metric}"]
    found = lab.summary(out)["subsets"]
    assert found["by_subset"] == {name: last[f"test-with+{name}/global/dice"] for name in ALL}
    values = list(found["by_subset"].values())
    assert len(set(values)) > 1 and found["from"] == "central" and found["round"] == 2
    assert found["mean"] == pytest.approx(np.mean(values)) and found["worst"] == min(values)
    assert found["spread"] == pytest.approx(max(values) - min(values))
    assert "| modalities | dice (central test) |" in write_report(out).read_text()
    cases = (out / "cases.csv").read_text()
    assert "test-with" not in cases and cases.count("\n") == 1 + sum(r["n"] for r in summary["sites"].values())


def test_sites_score_what_their_items_have(lab: Any, tmp_path: Path) -> None:
    path = make_phantom(tmp_path / "m.h5", "multimodal", num_sites=3, images_per_site=40, image_size=16, seed=3)
    out, summary = lab.run(**{**SETTINGS, "data.path": str(path), "data.phantom": {}})
    with SiteFile.open(path) as file:
        present = {i.name: file.site(i.name).split("test") for i in file.sites}
        have = {name: s.extras_at(s.index)["modality_present"].bool() for name, s in present.items()}
    for record in lab.history(out, phase="evaluate", round=2):
        own, metrics = have[record["site"]], record["metrics"]
        for name, places in modality_subsets(CHANNELS).items():
            count = int(own[:, list(places)].any(dim=1).sum())
            assert metrics[f"n/{name}"] == count and (f"{name}/global/dice" in metrics) == bool(count)
    assert summary["subsets"]["from"] == "sites" and list(summary["subsets"]["by_subset"]) == ALL


def test_scores_under_a_condition_may_leave_a_site_and_are_scores() -> None:
    scores = {"test/global/dice": 1.0, "test-with+T1/global/dice": 0.5, "test-dark/global/dice": 0.5, "n/test-dark": 3}
    assert _split_scores({"train_loss": 2.0, "tested": 1.0, **scores}) == ({"train_loss": 2.0, "tested": 1.0}, scores)
    assert all(any(leaf.covers(name) for leaf in BASE_LEAVES) for name in scores)


def test_who_has_no_subsets(lab: Any, central: Path) -> None:
    plain = {**SETTINGS, "model.name": "unet", "model.args": {"base_width": 2}, "federation.rounds": 1}
    out, summary = lab.run(**plain, **{"evaluation.central": str(central)})  # cannot be told what is missing
    assert not any(splits_of(r["metrics"]) for r in lab.history(out)) and summary["subsets"] == {}
    own = {**SETTINGS, "federation.rounds": 1, "client.name": "local_norm"}  # a view of the site's own only
    out, summary = lab.run(**own, **{"evaluation.central": str(central)})
    assert not any(splits_of(r["metrics"]) for r in lab.history(out)) and summary["subsets"] == {}
    single = {**SETTINGS, **lab.segmentation, "model.name": "multi_encoder_unet", "federation.rounds": 1,
              "model.args": {"base_width": 2, "depth": 2}}  # fmt: skip
    single["data.phantom"] = {"num_sites": 2, "images_per_site": 20, "image_size": 16, "channels": 1}
    out, summary = lab.run(**single)  # one modality
    assert not any(splits_of(r["metrics"]) for r in lab.history(out)) and summary["subsets"] == {}
