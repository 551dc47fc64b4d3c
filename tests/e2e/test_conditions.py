"""Central test items under conditions: scored beside the clean ones, reported as fairness, and judging nothing."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedmed.federation.central
import fedmed.server_app
from fedmed.data.phantom import make_phantom
from fedmed.data.site_file import SiteFile
from fedmed.data.writer import SiteArrays, write_site_file
from fedmed.files import read_history
from fedmed.report import tables
from fedmed.report.write import write_report


def arrays(file: SiteFile, name: str, truth: dict[str, Any]) -> SiteArrays:
    """A site of a file, ready to be written again."""
    data = file.site(name)
    return SiteArrays(data.name, data.image, {"label": data.target}, data.splits, data.item_id, truth=truth)


def make_file(folder: Path, with_conditions: bool = True, name_of_second: str = "second") -> Path:
    """Two sites, the second called corrupted by its truth; central items clean, the same again, and without an image."""
    source = make_phantom(
        folder / "source.h5", "classification", num_sites=3, images_per_site=30, image_size=16, seed=2
    )
    with SiteFile.open(source) as file:
        first, second, pooled = (arrays(file, info.name, {"is_noisy": k == 1}) for k, info in enumerate(file.sites))
        meta = file.meta
    count = len(pooled.image)
    splits = {"val": np.arange(10), "test": np.arange(10, count)}
    central = dataclasses.replace(pooled, name="central", splits=splits, truth={})
    conditions = {
        "same": dataclasses.replace(central, name="central_same"),
        "blank": dataclasses.replace(central, name="central_blank", image=np.zeros_like(central.image)),
    }
    sites = [dataclasses.replace(first, name="first"), dataclasses.replace(second, name=name_of_second)]
    path = folder / ("conditions.h5" if with_conditions else "plain.h5")
    return write_site_file(path, meta, sites, central, conditions=conditions if with_conditions else None)


def test_conditions_are_scored_and_change_nothing_else(lab: Any, tmp_path: Path) -> None:
    settings = {"data.phantom": {}, "evaluation.central": "auto", "evaluation.select": "acc"}
    out, summary = lab.run(**settings, **{"data.path": str(make_file(tmp_path))})
    plain, _ = lab.run(**settings, **{"data.path": str(make_file(tmp_path, with_conditions=False))})
    assert lab.model(out) == lab.model(plain)
    with SiteFile.open(tmp_path / "conditions.h5") as file:
        central = file.site("central")
    kinds = len(np.unique(central.target[central.splits["test"]]))
    records = lab.history(out, phase="central")
    assert [r["round"] for r in records] == [1, 2, 3]
    for record, without in zip(records, lab.history(plain, phase="central"), strict=True):
        metrics, clean = record["metrics"], without["metrics"]
        assert {k: v for k, v in metrics.items() if not k.startswith(("test-", "n/test-"))} == clean
        degraded = {k.split("/", 1)[0] for k in metrics if not k.startswith("n/")} - {"val", "test"}
        assert degraded == {"test-blank", "test-same"}  # test items alone, although a round is chosen on validation
        assert metrics["n/test-blank"] == metrics["n/test"] == record["num_examples"] == 20
        assert {k.removeprefix("test-same/"): v for k, v in metrics.items() if k.startswith("test-same/")} == {
            k.removeprefix("test/"): v for k, v in clean.items() if k.startswith("test/")
        }
        assert metrics["test-blank/global/bacc"] == pytest.approx(1 / kinds)  # one answer to all images
    assert summary["selected"]["value"] == max(r["metrics"]["val/global/acc"] for r in records)


def test_fairness_of_a_run(lab: Any, tmp_path: Path) -> None:
    path = make_file(tmp_path)
    out, summary = lab.run(**{"data.path": str(path), "data.phantom": {}, "evaluation.central": "auto"})
    assert summary["judged_by"] == "test/global" and summary["main_metric"] == "bacc"
    found = lab.summary(out)["fairness"]
    central = [r["metrics"] for r in lab.history(out, phase="central")]
    names = {"clean": "test", "blank": "test-blank", "same": "test-same"}
    for which, records in ((found, central[-1:]), (found["tail"], central)):
        expected = {n: np.mean([m[f"{split}/global/bacc"] for m in records]) for n, split in names.items()}
        assert which["by_condition"] == pytest.approx(expected)
        assert which["mean"] == pytest.approx(sum(expected.values()) / 3)
        assert which["gap"] == pytest.approx(max(expected.values()) - min(expected.values()))
    assert found["tail"]["last_rounds"] == 3
    sites = {s: r["bacc"] for s, r in summary["sites"].items()}
    assert found["sites"]["by_group"] == {"clean": sites["first"], "corrupted": sites["second"]}
    assert found["sites"]["worst_site"] == min(sites, key=lambda s: (sites[s], s))
    text = tables.render(summary)
    assert "fairness (bacc)" in text and "worst site: " in text
    assert "| fairness (bacc) | clean | blank | same | corrupted |" in write_report(out).read_text()
    assert summary["examples"] == {r["site"]: r["num_examples"] for r in read_history(out) if r["phase"] == "train"}


def test_one_network_and_every_group_read_once(lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_file(tmp_path)
    built: list[str] = []
    read: list[str] = []
    make_model, site = fedmed.server_app.make_model, SiteFile.site
    for module in (fedmed.server_app, fedmed.federation.central):
        monkeypatch.setattr(module, "make_model", lambda *a, **k: built.append("") or make_model(*a, **k))
    monkeypatch.setattr(SiteFile, "site", lambda self, name, *a, **k: read.append(name) or site(self, name, *a, **k))
    lab.run(**{"data.path": str(path), "data.phantom": {}, "evaluation.central": "auto", "evaluation.sites": False})
    assert len(built) == 2  # the exchanged model, and the one that is scored
    assert sorted(n for n in read if n.startswith("central")) == ["central", "central_blank", "central_same"]


def test_a_file_of_the_coordinators_own_has_no_conditions(lab: Any, tmp_path: Path) -> None:
    path = make_file(tmp_path)
    out, summary = lab.run(**{"evaluation.central": str(path), "federation.rounds": 1})
    assert not any(k.startswith("test-") for k in lab.history(out, phase="central")[0]["metrics"])
    assert list(summary["fairness"]["by_condition"]) == ["clean"] and math.isnan(summary["fairness"]["gap"])


def test_a_site_may_have_the_name_of_a_condition(lab: Any, tmp_path: Path) -> None:
    path = make_file(tmp_path, name_of_second="blank")
    _, summary = lab.run(**{"data.path": str(path), "data.phantom": {}, "federation.rounds": 1})
    assert set(summary["sites"]) == {"first", "blank"}
