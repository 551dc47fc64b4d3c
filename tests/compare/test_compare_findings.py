"""Findings of a comparison: what a method saw beside the truth, from stored runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from fedmed.compare.findings import FINDINGS, cells_of, columns_of, finding, rank_correlation, share_of
from fedmed.compare.spec import comparison_files, read_comparison
from fedmed.compare.values import split_metric
from fedmed.errors import UserError


def write_run(folder: Path, train: list[dict[str, Any]], **summary: Any) -> Path:
    """A finished run folder with training records and a summary."""
    folder.mkdir(parents=True)
    records = [{"phase": "train", "status": "ok", "round": 1, **record} for record in train]
    (folder / "history.jsonl").write_text("\n".join(map(json.dumps, records)))
    summary = {"noisy_sites": {"precision": None, "recall": None}, "notes": {}, "truth": {}, **summary}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def all_cells(folder: Path) -> dict[str, list[str]]:
    return {name: entry.cells(folder) for name, entry in FINDINGS.items()}


def test_without_anything_to_find(tmp_path: Path) -> None:
    cells = all_cells(write_run(tmp_path / "a", [{"site": "a", "num_examples": 5, "metrics": {}}]))
    assert cells == {
        "noisy": ["–"] * 4, "weight_on_corrupted": ["–", "0.00"], "sharpness_ratio": ["–"], "worst_site": ["–"],
        "completeness_rank": ["–"], "corrected": ["0", "0"], "tags": ["–"] * 4,
    }  # fmt: skip
    for name, entry in FINDINGS.items():
        assert len(entry.columns) == len(cells[name])


def test_by_hand(tmp_path: Path) -> None:
    truth: dict[str, Any] = {
        "a": {"is_noisy": False, "completeness": 1.0}, "b": {"is_noisy": True, "completeness": 0.5},
        "c": {"is_noisy": True, "completeness": 0.25},
    }  # fmt: skip
    notes = {
        "sharpness": {"a": 0.5, "b": 1.0, "c": 2.0, "gone": 9.0}, "completeness": {"a": 0.9, "b": 0.3, "c": 0.6},
        "weights": {"a": 0.5, "b": 0.5, "c": None}, "groups": {"noisy": 1, "clean": 2, "empty": 0}, "largest_weight": 0.5,
    }  # fmt: skip
    train = [
        {"site": site, "num_examples": 10, "metrics": {"n_corrected_pixels": n}}
        for site, n in (("a", 0), ("b", 0), ("c", 7), ("b", 5), ("c", 7), ("a", None))
    ]
    judged = {"precision": 0.5, "recall": None}
    fairness = {"sites": {"worst_site": "b", "worst": 0.25}}
    cells = all_cells(write_run(tmp_path / "a", train, notes=notes, truth=truth, noisy_sites=judged, fairness=fairness))
    assert cells["noisy"] == ["0.50", "–", "2 clean, 1 noisy", "0.50"]
    assert cells["sharpness_ratio"] == ["3.00"]  # mean of 1 and 2 over .5
    assert cells["completeness_rank"] == ["0.50"]  # ranks 2 0 1 against 2 1 0
    assert cells["weight_on_corrupted"] == ["0.50", "0.67"]
    assert cells["corrected"] == ["2", "12"]
    assert cells["worst_site"] == ["0.25 (b)"]
    zero = write_run(tmp_path / "b", [], truth=truth, notes={"sharpness": {"a": 0.0, "b": 1.0}})
    assert FINDINGS["sharpness_ratio"].cells(zero) == ["–"]


def test_a_run_that_has_not_finished_has_dashes(tmp_path: Path) -> None:
    names = ["noisy", "worst_site"]
    assert columns_of(names) == ["precision", "recall", "groups", "largest weight", "worst site"]
    assert cells_of(names, tmp_path / "gone") == ["–"] * 5
    assert cells_of([], tmp_path / "gone") == columns_of([]) == []


def test_unknown_finding() -> None:
    with pytest.raises(UserError, match="no finding is called 'tag'; did you mean 'tags'"):
        finding("tag")


def test_rank_correlation() -> None:
    assert rank_correlation([1.0, 2.0, 5.0], [1.0, 8.0, 9.0]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 2.0, 5.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    # Ranks 1.5 1.5 3 against 1 2 3: covariance 3/2, variances 3/2 and 2.
    assert rank_correlation([1.0, 1.0, 5.0], [1.0, 2.0, 3.0]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))
    for first in ([], [1.0], [2.0, 2.0]):
        assert math.isnan(rank_correlation(first, [float(i) for i in range(len(first))]))


def test_share_of_nothing() -> None:
    assert share_of({"a": 1.0, "b": 3.0}, {"b", "c"}) == 0.75
    assert math.isnan(share_of({"a": 0.0}, {"a"})) and math.isnan(share_of({}, {"a"}))


def test_tags_against_the_reference(tmp_path: Path) -> None:
    """A site that annotates the first of two classes; tags of the second: two positive, of them one right, one negative, right."""
    from safetensors.torch import save_file

    path = tmp_path / "data.h5"
    with h5py.File(path, "w") as file:
        file.attrs.update(
            layout_version="fedmed-data-1",
            task="multilabel",
            classes='["x", "y"]',
            channels='["grey"]',
            image_size="[2, 2]",
        )
        site = file.create_group("site_00")
        site.attrs.update(site_name="north", train_idx=[0, 1, 2, 3], test_idx=[4])
        site["image"] = np.zeros((5, 2, 2), np.uint8)
        site["label"], site["active_classes"] = np.array([[1, 0]] * 5), np.array([[1, 0]] * 5)
        site["reference/label"] = np.array([[1, 1], [1, 0], [1, 0], [1, 0], [1, 1]])
    folder = write_run(tmp_path / "run", [])
    (folder / "config.yaml").write_text(f"data:\n  path: {path}\n")
    for number, row in ((9, [2, 2, 2, 2]), (10, [2, 2, 1, 0])):  # the last round counts
        kept = folder / "sites" / "north" / "personal" / f"round-{number:05d}"
        kept.mkdir(parents=True)
        tags = torch.tensor([[0, tag] for tag in row], dtype=torch.int8)
        save_file({"missing_classes/tags": tags}, kept / "personal.safetensors")
    assert FINDINGS["tags"].cells(folder) == ["0.50 of 2", "0.25", "1.00 of 1", "0.75"]
    (folder / "sites" / "south" / "personal").mkdir(parents=True)  # a site that keeps nothing
    assert FINDINGS["tags"].cells(folder)[1] == "0.25"


@pytest.mark.parametrize("name", sorted(comparison_files()))
def test_stored_comparisons_ask_for_what_exists(name: str) -> None:
    """Every metric and finding of the file and of its variants."""
    stored = read_comparison(comparison_files()[name])
    columns_of(stored.findings)
    for part in (stored, *stored.variants.values()):
        for metric in [*(part.metrics or []), *(part.seed_metrics or [])]:
            split_metric(metric)
