"""The script behind docs/results.md: which runs a comparison has, and its tables from stored runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from fedmed.config import load_config

_PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "results.py"
_spec = importlib.util.spec_from_file_location("benchmark_results", _PATH)
assert _spec is not None and _spec.loader is not None
results = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(results)

COMPARISON: dict[str, Any] = {
    "base": "fedavg", "overrides": ["a=1"], "metrics": ["dice"], "last_rounds": 2,
    "arms": {"fedavg": ["b=1"], "mine": []},
    "settings": {"easy": {"title": "Easy", "overrides": []}, "told": {"title": "Told", "overrides": ["c=1"], "arms": ["mine"], "against": "easy", "seeds": 1}},
}  # fmt: skip


def store(folder: Path, values: list[float | None], notes: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    lines = [{"phase": "central", "metrics": {"test/global/dice": v}} for v in values]
    (folder / "history.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    summary = {"noisy_sites": {"precision": 0.5, "recall": None}, "notes": notes}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_runs_of_a_comparison(tmp_path: Path) -> None:
    jobs = results.jobs_of(COMPARISON, "x.h5", 2, tmp_path)
    assert list(jobs) == [
        ("easy", "fedavg", 0),
        ("easy", "fedavg", 1),
        ("easy", "mine", 0),
        ("easy", "mine", 1),
        ("told", "mine", 0),
    ]
    assert jobs["told", "mine", 0] == ["a=1", "c=1", "data.path=x.h5", "seed=0", f"out={tmp_path / 'told' / 'mine-0'}"]


def test_tables(tmp_path: Path) -> None:
    notes = {"groups": {"clean": 3, "noisy": 0}, "largest_weight": 0.25}
    for seed, (base, mine) in enumerate([(0.5, 0.7), (0.6, 0.6)]):
        store(tmp_path / "easy" / f"fedavg-{seed}", [0.0, base, base], {})
        store(tmp_path / "easy" / f"mine-{seed}", [0.0, mine, None], notes)
    store(tmp_path / "told" / "mine-0", [0.9, 0.9], notes)
    text = results.tables(COMPARISON, list(results.jobs_of(COMPARISON, "x.h5", 2, tmp_path)), tmp_path)
    assert "| fedavg | 0.550 ± 0.071 |" in text
    assert "| difference | 0.100 ± 0.141 |" in text
    assert "| 0 | +0.200 | 0.50 | – | 3 clean | 0.25 |" in text
    assert "| 0 | +0.400 |" in text  # told: against the baseline of the setting it names


@pytest.mark.parametrize("name", ["fednoro", "feda3i"])
def test_stored_comparisons_are_valid_experiments(name: str, tmp_path: Path) -> None:
    comparison = results.load_comparison(name)
    for words in results.jobs_of(comparison, "x.h5", 1, tmp_path).values():
        load_config(comparison["base"], words)
