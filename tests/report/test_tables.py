from __future__ import annotations

import math
from typing import Any

import pytest

from fedmed.report import tables


def summary(values: dict[str, float | None], **other: Any) -> dict[str, Any]:
    """Smallest summary the tables accept."""
    return {
        "name": "x",
        "main_metric": "dice",
        "judged_by": "test/global",
        "sites": {site: {"n": 5, "round": 3, "dice": value} for site, value in values.items()},
        "central": {"last": {}, "selected": {}},
        "noisy_sites": {},
        "failures": [],
        "rounds": 3,
        "seconds": 65.0,
        **other,
    }


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (math.nan, "-"), (3, "3"), (0.12345, "0.123"), ("a", "a"), (1.0, "1.000")]
)
def test_show(value: Any, text: str) -> None:
    assert tables.show(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(8.12, "8.1 s"), (65, "1:05"), (3600 + 62, "1:01:02"), (math.nan, "-")])
def test_clock(seconds: float, text: str) -> None:
    assert tables.clock(seconds) == text


def test_text_table_is_aligned() -> None:
    assert tables.text_table(["a", "n"], [["site_b", "1"], ["mean", "10"]], rules=(1,)).splitlines() == [
        "a        n",
        "------  --",
        "site_b   1",
        "------  --",
        "mean    10",
    ]


def test_site_table_rows_and_marks() -> None:
    noisy = {"believed": ["b"], "true": ["a", "b"], "precision": 1.0, "recall": 0.5}
    header, rows, count = tables.site_table(summary({"a": 0.5, "b": None, "c": 0.75}, noisy_sites=noisy))
    assert header == ["site", "n", "dice", "noisy"] and count == 3
    assert rows[0] == ["a", "5", "0.500", "true"]
    assert rows[1] == ["b", "5", "-", "true + believed"]
    assert [r[2] for r in rows[3:]] == ["0.625", "0.500", "0.250"]


def test_render_says_what_failed_and_what_was_found() -> None:
    noisy = {"believed": ["b"], "true": ["a", "b"], "precision": 1.0, "recall": 0.5}
    failures = [{"round": 2, "phase": "train", "site": "b", "reason": "too late"}]
    central = {"last": {"round": 3, "test/global/dice": 0.6}, "selected": {}}
    text = tables.render(summary({"a": 0.5}, noisy_sites=noisy, failures=failures, central=central))
    assert "precision 1.00, recall 0.50" in text
    assert "failed answers: 1; the last: round 2, train, b: too late" in text
    assert "central test, last round (3): dice 0.600" in text
    assert text.endswith("3 rounds in 1:05")
    assert "no site took part" in tables.render(summary({}))


def test_a_method_that_does_not_judge_believes_nothing() -> None:
    noisy = {"believed": [], "true": ["a"], "precision": None, "recall": None}
    assert tables.facts(summary({"a": 0.5}, noisy_sites=noisy))[0] == "truly noisy: a"
    judged = {**noisy, "recall": 0.0}
    text = tables.facts(summary({"a": 0.5}, noisy_sites=judged, notes={"believed_noisy": []}))[0]
    assert text == "believed noisy: none; truly noisy: a; precision -, recall 0.00"


def test_markdown_escapes_bars() -> None:
    assert tables.markdown_table(["a|b", "n"], [["x", "1"]]) == "| a\\|b | n |\n| :-- | --: |\n| x | 1 |"


def with_central(value: float | None, sites: float, metric: str = "dice") -> dict[str, Any]:
    """Summary of an arm with one site and, if given, a central value."""
    result = summary({"a": sites}, main_metric=metric)
    result["sites"] = {"a": {"n": 1, metric: sites}}
    if value is not None:
        result["central"] = {"last": {"round": 3, f"test/global/{metric}": value}}
    return result


def scores(*values: float | None, central: bool = True, metric: str = "dice") -> list[dict[str, Any]]:
    """Evaluation records of one arm, one per round."""
    place = {"phase": "central", "site": None} if central else {"phase": "evaluate", "site": "a"}
    return [{"round": r, **place, "metrics": {f"test/global/{metric}": v}} for r, v in enumerate(values, start=1)]


def test_verdict_is_the_mean_of_the_last_evaluations() -> None:
    text = tables.verdict({"base": scores(0.9, 0.5, 0.5, 0.5), "new": scores(0.1, 0.6, 0.6, 0.6)}, "test/global/dice")
    assert text.startswith("In dice on the central test set, averaged over the last 3 evaluations: ")
    assert "new is better than base by 0.100." in text and "One seed each" in text
    mixed = tables.verdict({"base": scores(0.5, 0.5, 0.5), "new": scores(0.4, 0.4, 0.6)}, "test/global/dice")
    assert "new is worse than base by 0.033, but not in each of these evaluations." in mixed


def test_verdict_falls_back_to_the_sites_and_knows_distances() -> None:
    arms = {"base": scores(0.5), "new": scores(0.4, central=False)}
    arms["base"] += scores(0.5, central=False)
    assert "In dice (mean of sites), averaged over the last 1 evaluations: new is worse" in tables.verdict(
        arms, "test/global/dice"
    )
    distances = {"base": scores(9.0, metric="hd95"), "new": scores(5.0, metric="hd95")}
    assert "new is better than base by 4.000" in tables.verdict(distances, "test/global/hd95")


def test_verdict_without_a_difference_or_a_value() -> None:
    assert "equals base" in tables.verdict({"base": scores(0.5), "new": scores(0.5001)}, "test/global/dice")
    assert "cannot be compared" in tables.verdict({"base": scores(0.5), "new": scores(None)}, "test/global/dice")
    assert "nothing to compare" in tables.verdict({"base": scores(0.5)}, "test/global/dice")
    assert "nothing to compare" in tables.verdict({"base": [], "new": []}, None)
    assert "cannot be compared" in tables.verdict({"base": [], "new": []}, "test/global/dice")


def test_comparison_table() -> None:
    header, rows = tables.comparison_table({"base": with_central(0.5, 0.9), "new": with_central(None, 0.1)})
    assert header[1] == "dice (mean of sites)"
    assert rows[0] == ["base", "0.900", "0.900", "0.000", "0.500", "3", "1:05"]
    assert rows[1][4] == "-"


def fair(**by_condition: float) -> dict[str, Any]:
    """Entry `fairness` of a summary with two conditions, and sites without a worst one."""
    values = list(by_condition.values())
    gap = max(values) - min(values) if len(values) > 1 else math.nan
    now = {"by_condition": by_condition, "mean": sum(values) / len(values), "gap": gap}
    sites = {"by_group": {"clean": math.nan, "corrupted": math.nan}, "worst_site": "b", "worst": 0.25}
    return {"metric": "dice", **now, "tail": {**now, "last_rounds": 5}, "sites": sites}


def test_fairness_block() -> None:
    found = fair(clean=0.75, corrupted=0.5)
    run = summary({"a": 0.5, "b": 0.25}, fairness=found, truth={"b": {"is_noisy": True}})
    header, rows = tables.fairness_table(run)
    assert header == ["fairness (dice)", "clean", "corrupted", "mean", "gap"]
    assert rows == [
        ["central test, last round", "0.750", "0.500", "0.625", "0.250"],
        ["central test, last 5 evaluations", "0.750", "0.500", "0.625", "0.250"],
    ]
    assert tables.render(run).endswith("worst site: b (0.250, corrupted)")
    found["sites"]["by_group"] = {"clean": 0.5, "corrupted": 0.25}
    assert tables.fairness_table(run)[1][2] == ["sites, by their training data", "0.500", "0.250", "0.375", "0.250"]
    found["tail"]["last_rounds"] = 1
    assert len(tables.fairness_table(run)[1]) == 2


def test_fairness_block_with_other_conditions_and_with_none() -> None:
    found = fair(clean=0.75, blur=0.5, dark=math.nan)
    found["sites"]["by_group"] = {"clean": 0.5, "corrupted": 0.25}
    header, rows = tables.fairness_table(summary({"a": 0.5}, fairness=found))
    assert header[1:] == ["clean", "blur", "dark", "corrupted", "mean", "gap"]
    assert rows[0][1:5] == ["0.750", "0.500", "-", "-"] and rows[2][1:5] == ["0.500", "-", "-", "0.250"]
    for nothing in ({}, {"fairness": fair(clean=0.5)}):
        assert tables.fairness_table(summary({"a": 0.5}, **nothing))[1] == []
        assert "fairness" not in tables.render(summary({"a": 0.5}, **nothing))
    assert tables.worst_site(summary({})) == "-"


def test_null_in_a_stored_summary_is_undefined() -> None:
    found = fair(clean=0.75, corrupted=0.5)
    found["by_condition"]["corrupted"] = found["mean"] = found["gap"] = None
    found["sites"].update(by_group={"clean": None, "corrupted": None}, worst_site=None, worst=None)
    _, rows = tables.fairness_table(summary({"a": 0.5}, fairness=found))
    assert rows[0] == ["central test, last round", "0.750", "-", "-", "-"] and len(rows) == 2


def test_weights_beside_the_shares_of_the_items() -> None:
    notes, truth = {"weights": {"a": 0.75, "b": 0.25}}, {"b": {"is_noisy": True}}
    run = summary({}, notes=notes, examples={"a": 10, "b": 30}, truth=truth)
    assert tables.weight_table(run)[1] == [["a", "0.750", "0.250", ""], ["b", "0.250", "0.750", "true"]]
    assert tables.weight_table(summary({}, notes=notes))[1][0] == ["a", "0.750", "-", ""]
    assert tables.weight_table(summary({}))[1] == tables.weight_table(summary({}, notes={"weights": 1.0}))[1] == []


def test_comparison_table_with_conditions() -> None:
    base, new = with_central(0.5, 0.9), with_central(0.75, 0.25)
    new["fairness"] = fair(clean=0.75, corrupted=0.5)
    header, rows = tables.comparison_table({"base": base, "new": new})
    assert header[2:7] == ["worst site", "spread", "central test", "corrupted test", "gap"]
    assert rows[0][2:7] == ["-", "0.000", "0.500", "-", "-"]
    assert rows[1][2:7] == ["b (0.250)", "0.000", "0.750", "0.500", "0.250"]
    assert all(len(row) == len(header) for row in rows)
