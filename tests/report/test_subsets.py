from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fedmed.report import fairness as fair
from fedmed.report import subsets as sub
from fedmed.report import tables
from fedmed.report.summary import build_summary, judged_prefix

NAN = math.nan


def scores(metric: str = "dice", **values: float | None) -> dict[str, Any]:
    """Metrics of one evaluation, a value per subset ("A__B" stands for A+B); None: no item has anything of it."""
    found: dict[str, Any] = {"n/test": 5}
    for name, value in values.items():
        split = f"test-with+{name.replace('__', '+')}"
        found[f"n/{split}"] = 0 if value is None else 4
        if value is not None:
            found |= {f"{split}/global/{metric}": value, f"{split}/global/missed_fraction": 0.5}
    return found


def record(phase: str, site: str | None, round: int, metrics: dict[str, Any]) -> dict[str, Any]:
    return {"round": round, "phase": phase, "site": site, "status": "ok", "num_examples": 5, "metrics": metrics}


def test_values_by_subset() -> None:
    metrics = {"test/global/dice": 0.9, "test-dark/global/dice": 0.1, **scores(B=0.25, A=0.5, A__B=0.75, C=None)}
    found = sub.by_subset(metrics, "dice")
    assert list(found) == ["B", "A", "A+B", "C"]  # as scored
    assert {k: v for k, v in found.items() if k != "C"} == {"B": 0.25, "A": 0.5, "A+B": 0.75} and math.isnan(found["C"])
    assert sub.by_subset(metrics, "auc") == sub.by_subset({}, "dice") == sub.by_subset(metrics, "") == {}
    # Written as null, an undefined value is undefined again.
    assert math.isnan(sub.by_subset({"n/test-with+A": 1, "test-with+A/global/dice": None}, "dice")["A"])


@pytest.mark.parametrize(
    ("values", "mean", "spread", "worst", "whose"),
    [
        ({"A": 0.25, "B": 0.5, "A+B": 0.75}, 0.5, 0.5, 0.25, "A"),
        ({"A": 0.5, "B": 0.5}, 0.5, 0.0, 0.5, "A"),  # the first of equals
        ({"A": NAN, "B": 0.5}, 0.5, 0.0, 0.5, "B"),
        ({"A": NAN}, NAN, NAN, NAN, None),
        ({}, NAN, NAN, NAN, None),
    ],
)
def test_over_subsets_by_hand(
    values: dict[str, float], mean: float, spread: float, worst: float, whose: str | None
) -> None:
    found = sub.over_subsets("dice", values)
    assert [found[k] for k in ("mean", "spread", "worst")] == pytest.approx([mean, spread, worst], nan_ok=True)
    assert found["worst_subset"] == whose and found["metric"] == "dice"
    assert sub.over_subsets("hd95", {"A": 1.0, "B": 3.0})["worst_subset"] == "B"  # a distance: the largest is the worst


def test_sites_count_once_and_only_where_they_have_the_subset() -> None:
    sites = [{"A": 0.25, "B": NAN}, {"A": 0.75, "B": 0.5, "A+B": 1.0}]
    assert sub.mean_over_sites(sites) == {"A": 0.5, "B": 0.5, "A+B": 1.0}
    assert sub.mean_over_sites(reversed(sites)) == {"A": 0.5, "B": 0.5, "A+B": 1.0}
    assert sub.mean_over_sites([]) == {} and math.isnan(sub.mean_over_sites([{"A": NAN}])["A"])


def test_the_last_round_and_the_central_set_first() -> None:
    history = [
        record("evaluate", "a", 2, scores(A=0.25, B=None)),
        record("evaluate", "b", 2, scores(A=0.75, B=0.5)),
        record("evaluate", "b", 1, scores(A=0.0, B=0.0)),
    ]
    found = sub.subsets(history, "dice")
    assert found == {"from": "sites", "round": 2, "metric": "dice", "by_subset": {"A": 0.5, "B": 0.5},
                     "mean": 0.5, "spread": 0.0, "worst": 0.5, "worst_subset": "A"}  # fmt: skip
    history += [record("central", None, 1, scores(A=0.125)), record("central", None, 2, {"test/global/dice": 1.0})]
    found = sub.subsets(history, "dice")
    assert (found["from"], found["round"], found["by_subset"]) == ("central", 1, {"A": 0.125})
    assert sub.subsets([], "dice") == sub.subsets(history, None) == sub.subsets(history, "auc") == {}
    failed = {**history[0], "status": "failed"}
    assert sub.subsets([failed], "dice") == {}


def test_subsets_are_no_conditions_and_judge_nothing() -> None:
    plain = [record("central", None, r, {"test/global/dice": 0.1 * r, "test-dark/global/dice": 0.05}) for r in (1, 2)]
    more = [{**r, "metrics": {**scores(A=0.01, A__B=0.99), **r["metrics"]}} for r in plain]
    assert sub.is_subset("test-with+A/global/dice") and not fair.is_condition("test-with+A/global/dice")
    assert not sub.is_subset("test-dark") and not sub.is_subset("n/test-with+A") and fair.is_condition("test-without")
    assert list(fair.condition_keys(more[0]["metrics"], "dice")) == ["clean", "dark"]
    assert str(fair.fairness(more, "dice", {}, {})) == str(fair.fairness(plain, "dice", {}, {}))  # NaN is not itself
    assert judged_prefix(more, "dice") == "test/global"
    assert judged_prefix([record("central", None, 1, scores(A=0.5))], "dice") is None


def test_summary_and_tables(tmp_path: Path, made_up: Any) -> None:
    history = made_up.make_history(3, rounds=2)
    before = build_summary(tmp_path, history, made_up.make_config())
    assert before["subsets"] == {} and tables.subset_table(before)[1] == []
    assert "modalities" not in tables.render(before)
    last = [r for r in history if r["phase"] == "central"][-1]
    last["metrics"] = {**last["metrics"], **scores(T1=0.25, FLAIR=None, FLAIR__T1=0.75)}
    summary = build_summary(tmp_path, history, made_up.make_config())
    assert all(str(summary[k]) == str(before[k]) for k in ("fairness", "judged_by", "mean", "sites", "personal"))
    header, rows = tables.subset_table(summary)
    assert header == ["modalities", "dice (central test)"]
    assert rows == [["T1", "0.250"], ["FLAIR", "-"], ["FLAIR+T1", "0.750"],
                    ["mean", "0.500"], ["worst", "0.250"], ["spread", "0.500"]]  # fmt: skip
    assert "modalities  dice (central test)" in tables.render(summary)
    assert tables.subset_table({})[1] == []  # summaries of old
