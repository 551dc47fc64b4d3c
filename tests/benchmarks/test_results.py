"""The script behind docs/results.md: which runs a comparison has, and its tables from stored runs."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from fedmed.config import load_config, params_from
from fedmed.federation.client import declared_leaves
from fedmed.registry import resolve

_PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "results.py"
_spec = importlib.util.spec_from_file_location("benchmark_results", _PATH)
assert _spec is not None and _spec.loader is not None
results = importlib.util.module_from_spec(_spec)
sys.modules["benchmark_results"] = results  # where its classes look for their module
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


def test_tables_of_two_arms_to_the_letter(tmp_path: Path) -> None:
    """What docs/results.md shows for two arms: the whole text, with a second metric and undefined values."""
    comparison = {**COMPARISON, "metrics": ["dice", "auc"], "settings": {"easy": COMPARISON["settings"]["easy"]}}
    for seed, value in enumerate((0.5, 0.625)):
        store(tmp_path / "easy" / f"fedavg-{seed}", [0.5, 0.5], {})
        store(tmp_path / "easy" / f"mine-{seed}", [value, value], {"groups": {"noisy": 1, "clean": 2}} if seed else {})
        for arm in ("fedavg", "mine"):
            with (tmp_path / "easy" / f"{arm}-{seed}" / "history.jsonl").open("a") as file:
                for _ in range(2):
                    metrics = {"test/global/dice": None, "test/global/auc": 0.75}
                    file.write(
                        "\n" + json.dumps({"phase": "central", "metrics": {**metrics, "test-x/global/auc": 0.0}})
                    )
    expected = """### Easy

| arm | dice | auc |
|---|---|---|
| fedavg | – | 0.750 ± 0.000 |
| mine | – | 0.750 ± 0.000 |
| difference | – | 0.000 ± 0.000 |

| seed | Δ dice | Δ auc | precision | recall | groups | largest weight |
|---|---|---|---|---|---|---|
| 0 | – | +0.000 | 0.50 | – | – | – |
| 1 | – | +0.000 | 0.50 | – | 2 clean, 1 noisy | – |
"""
    assert results.tables(comparison, list(results.jobs_of(comparison, "x", 2, tmp_path)), tmp_path) == expected


def test_spread() -> None:
    assert results.spread([0.5, 0.7]) == "0.600 ± 0.141"
    assert results.spread([0.5, math.nan, 0.7]) == "0.600 ± 0.141 (2 of 3)"
    assert results.spread([0.5]) == "0.500 ± 0.000" and results.spread([math.nan]) == results.spread([]) == "–"


def write_run(folder: Path, central: list[dict[str, Any]], train: list[dict[str, Any]] = (), **summary: Any) -> Path:  # type: ignore[assignment]
    """A run folder with central metrics by round, training records, and a summary."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [{"phase": "train", "status": "ok", **r} for r in train]
    records += [{"phase": "central", "metrics": metrics} for metrics in central]
    (folder / "history.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    summary = {"noisy_sites": {"precision": None, "recall": None}, "notes": {}, "truth": {}, **summary}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def scores(clean: float | None, corrupted: float | None) -> dict[str, float | None]:
    return {"test/global/bacc": clean, "test-corrupted/global/bacc": corrupted, "test/personal/bacc": 0.0}


def test_values_of_conditions(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", [scores(0.0, 1.0), scores(0.75, 0.5), scores(0.75, 0.25)])
    found = {m: results.value_of(folder, m, 2) for m in ("bacc", "test-corrupted/bacc", "mean:bacc", "gap:bacc")}
    assert found == {"bacc": 0.75, "test-corrupted/bacc": 0.375, "mean:bacc": 0.5625, "gap:bacc": 0.375}
    undefined = write_run(tmp_path / "b", [scores(0.75, None)])
    assert math.isnan(results.value_of(undefined, "gap:bacc", 2)) and math.isnan(results.value_of(undefined, "auc", 2))
    assert math.isnan(results.value_of(undefined, "mean:bacc", 2))  # the clean value alone would flatter
    plain = write_run(tmp_path / "c", [{"test/global/bacc": 0.5}])
    assert results.value_of(plain, "mean:bacc", 2) == 0.5 and math.isnan(results.value_of(plain, "gap:bacc", 2))


def test_several_arms_and_findings(tmp_path: Path) -> None:
    comparison = {
        "base": "fedavg", "overrides": [], "last_rounds": 1, "findings": ["weight_on_corrupted", "worst_site"],
        "metrics": ["bacc", "test-corrupted/bacc", "gap:bacc"], "arms": {"fedavg": [], "one": [], "two": []},
        "settings": {
            "noise": {"title": "Noise", "overrides": []},
            "blur": {"title": "Blur", "overrides": [], "arms": ["fedavg", "two"], "seeds": 1},
        },
    }  # fmt: skip
    train = [{"site": "a", "num_examples": 30, "metrics": {}}, {"site": "b", "num_examples": 10, "metrics": {}}]
    notes, truth = {"weights": {"a": 0.25, "b": 0.75}}, {"a": {"is_noisy": False}, "b": {"is_noisy": True}}
    keys = list(results.jobs_of(comparison, "x", 2, tmp_path))
    assert ("blur", "one", 0) not in keys and ("blur", "two", 1) not in keys
    for setting, arm, seed in keys:
        corrupted = {"fedavg": 0.25, "one": 0.5, "two": 0.75}[arm] - 0.125 * seed
        sites = {"worst_site": "b", "worst": 0.125}
        folder = tmp_path / setting / f"{arm}-{seed}"
        write_run(folder, [scores(0.75, corrupted)], train, notes=notes, truth=truth, fairness={"sites": sites})
    first, second = results.tables(comparison, keys, tmp_path).split("### Blur")
    assert "| difference, two | 0.000 ± 0.000 | 0.500 ± 0.000 | -0.500 ± 0.000 |" in first
    assert "| fedavg | 0.750 ± 0.000 | 0.188 ± 0.088 | 0.562 ± 0.088 |" in first
    header = (
        "Δ bacc | Δ test-corrupted/bacc | Δ gap:bacc | weight on corrupted | their share of examples | worst site |"
    )
    assert f"| arm | seed | {header}" in first
    assert "| one | 1 | +0.000 | +0.250 | -0.250 | 0.75 | 0.25 | 0.12 (b) |" in first
    assert f"| seed | {header}" in second and "| arm | seed |" not in second  # one arm beside the baseline
    assert "| difference | 0.000 ± 0.000 | 0.500 ± 0.000 |" in second and "one" not in second.replace("none", "")


def test_findings_without_anything_to_find(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", [], [{"site": "a", "num_examples": 5, "metrics": {}}])
    cells = {name: finding.cells(folder) for name, finding in results.FINDINGS.items()}
    assert cells == {
        "noisy": ["–"] * 4, "weight_on_corrupted": ["–", "0.00"], "sharpness_ratio": ["–"], "worst_site": ["–"],
        "completeness_rank": ["–"], "corrected": ["0", "0"], "tags": ["–"] * 4,
    }  # fmt: skip
    for name, finding in results.FINDINGS.items():
        assert len(finding.columns) == len(cells[name])


def test_findings_by_hand(tmp_path: Path) -> None:
    truth: dict[str, Any] = {
        "a": {"is_noisy": False, "completeness": 1.0}, "b": {"is_noisy": True, "completeness": 0.5},
        "c": {"is_noisy": True, "completeness": 0.25},
    }  # fmt: skip
    notes = {
        "sharpness": {"a": 0.5, "b": 1.0, "c": 2.0, "gone": 9.0}, "completeness": {"a": 0.9, "b": 0.3, "c": 0.6},
        "weights": {"a": 0.5, "b": 0.5, "c": None},
    }  # fmt: skip
    train = [
        {"site": site, "num_examples": 10, "metrics": {"n_corrected_pixels": n}}
        for site, n in (("a", 0), ("b", 0), ("c", 7), ("b", 5), ("c", 7), ("a", None))
    ]
    folder = write_run(tmp_path / "a", [], train, notes=notes, truth=truth)
    cells = {name: finding.cells(folder) for name, finding in results.FINDINGS.items()}
    assert cells["sharpness_ratio"] == ["3.00"]  # mean of 1 and 2 over .5
    assert cells["completeness_rank"] == ["0.50"]  # ranks 2 0 1 against 2 1 0
    assert cells["weight_on_corrupted"] == ["0.50", "0.67"]
    assert cells["corrected"] == ["2", "12"]
    zero = write_run(tmp_path / "b", [], truth=truth, notes={"sharpness": {"a": 0.0, "b": 1.0}})
    assert results.FINDINGS["sharpness_ratio"].cells(zero) == ["–"]


def test_rank_correlation() -> None:
    assert results.ranks([3.0, 1.0, 3.0, 2.0]) == [2.5, 0.0, 2.5, 1.0]
    assert results.rank_correlation([1.0, 2.0, 5.0], [1.0, 8.0, 9.0]) == pytest.approx(1.0)
    assert results.rank_correlation([1.0, 2.0, 5.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    for first in ([], [1.0], [2.0, 2.0]):
        assert math.isnan(results.rank_correlation(first, [float(i) for i in range(len(first))]))


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (_PATH.parents[1] / "experiments" / "compare").glob("*.yaml"))
)
def test_stored_comparisons_are_valid_experiments(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = results.load_comparison(name)
    assert set(comparison.get("findings", [])) <= set(results.FINDINGS)
    monkeypatch.syspath_prepend(str(_PATH.parent))  # for benchmarks/oracle.py
    for words in results.jobs_of(comparison, "x.h5", 1, tmp_path).values():
        config = load_config(comparison["base"], words)
        rule, client = resolve("strategy", config.strategy.name), resolve("client", config.client.name)
        params_from(rule.Params, config.strategy.args, "strategy.args")
        params_from(client.Params, config.client.args, "client.args")
        assert set(rule.requires) <= {leaf.name for leaf in declared_leaves(client, {})}


def test_personal_and_subset_values(tmp_path: Path) -> None:
    central = [{"test/global/bacc": 0.25}, {"test/global/bacc": 0.5}]
    folder = write_run(tmp_path / "a", central, [])
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"sites": {"a": {"bacc": 0.2}, "b": {"bacc": 0.4}}, "subsets": {"mean": 0.7, "spread": None}}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert results.value_of(folder, "S:bacc", 2) == pytest.approx(0.3)  # no personal models: the sites' own scores
    assert results.value_of(folder, "G:bacc", 2) == 0.5
    assert results.value_of(folder, "subsets:mean", 2) == 0.7
    assert math.isnan(results.value_of(folder, "subsets:spread", 2)) and math.isnan(
        results.value_of(folder, "subsets:x", 2)
    )
    (folder / "summary.json").write_text(json.dumps({**summary, "personal": {"bacc": {"G": 0.1, "S": 0.9}}}))
    assert (results.value_of(folder, "G:bacc", 2), results.value_of(folder, "S:bacc", 2)) == (0.1, 0.9)


def test_values_of_one_view_at_the_sites(tmp_path: Path) -> None:
    """Mean over the sites, then over the last evaluations; an arm of sites trained alone has the personal view only."""

    def evaluations(view: str, values: list[tuple[float, float | None]]) -> list[dict[str, Any]]:
        return [
            {"phase": "evaluate", "round": number, "site": site, "metrics": {f"test/{view}/dice": value}}
            for number, pair in enumerate(values, 1)
            for site, value in zip("ab", pair, strict=True)
        ]

    both = [
        *evaluations("global", [(0.0, 0.0), (0.25, 0.75)]),
        *evaluations("personal", [(0.5, 1.0), (0.25, None), (1.0, 0.5)]),
    ]
    alone = evaluations("personal", [(0.25, 0.5), (0.5, 0.75)])
    for name, records in (("mine", both), ("alone", alone)):
        folder = write_run(tmp_path / name, [], personal={"dice": {"G": None, "S": 0.625}})
        (folder / "history.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert results.value_of(tmp_path / "mine", "personal:dice", 2) == 0.5  # .25 of one site, .75 of two
    assert results.value_of(tmp_path / "mine", "global:dice", 1) == 0.5
    assert results.value_of(tmp_path / "alone", "personal:dice", 2) == 0.5
    assert results.value_of(tmp_path / "alone", "S:dice", 2) == 0.625
    for metric in ("global:dice", "G:dice", "dice", "mean:dice"):
        assert math.isnan(results.value_of(tmp_path / "alone", metric, 2))
