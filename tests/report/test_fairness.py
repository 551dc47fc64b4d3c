from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fedmed.report import fairness as fair
from fedmed.report.summary import build_summary, judged_prefix

NAN = math.nan


def central(round: int, **splits: float | None) -> dict[str, Any]:
    """A central record with one bacc per split; `__` stands for the dash before a condition."""
    metrics = {f"{split.replace('__', '-')}/global/bacc": value for split, value in splits.items()}
    return {"round": round, "phase": "central", "site": None, "status": "ok", "metrics": metrics}


def test_conditions_by_name() -> None:
    names = ["test-dark/global/auc", "test-dark/global/bacc", "val/global/bacc", "n/test", "n/test-dark"]
    names += ["test-blur/global/bacc", "test/global/bacc", "test/personal/bacc", "sites/test/global/bacc"]
    assert list(fair.condition_keys(names, "bacc").items()) == [
        ("clean", "test/global/bacc"),
        ("blur", "test-blur/global/bacc"),
        ("dark", "test-dark/global/bacc"),
    ]
    assert fair.condition_keys(names, "auc") == {"dark": "test-dark/global/auc"}
    assert fair.condition_keys(names, "acc") == fair.condition_keys([], "bacc") == fair.condition_keys(names, "") == {}
    assert fair.is_condition("test-dark/global/bacc") and fair.is_condition("test-dark")
    assert not any(fair.is_condition(n) for n in ("test/global/bacc", "val", "n/test-dark"))


@pytest.mark.parametrize(
    ("values", "middle", "gap"),
    [
        ([0.75, 0.5], 0.625, 0.25),
        ([0.5, 0.75], 0.625, 0.25),
        ([0.75, 0.5, 0.25], 0.5, 0.5),
        ([0.5, 0.5], 0.5, 0.0),
        ([0.5], 0.5, NAN),
        ([], NAN, NAN),
        ([0.75, NAN], NAN, NAN),
    ],
)
def test_mean_and_gap_by_hand(values: list[float], middle: float, gap: float) -> None:
    assert fair.balance(dict(zip("abc", values, strict=False))) == pytest.approx((middle, gap), nan_ok=True)


def test_sites_by_hand() -> None:
    truth = {"a": {"is_noisy": False}, "b": {"is_noisy": True}, "c": {"is_noisy": True}, "d": {}}
    values = {"d": 1.0, "c": 0.25, "b": 0.5, "a": 0.75, "e": NAN}
    found = fair.over_sites("bacc", values, truth)
    assert (found["mean"], found["worst"], found["worst_site"], found["spread"]) == (0.625, 0.25, "c", 0.75)
    assert found["std"] == pytest.approx(math.sqrt((0.375**2 + 0.125**2) / 2))
    assert found["by_group"] == {"clean": 0.75, "corrupted": 0.375} and found["group_gap"] == 0.375
    assert fair.over_sites("bacc", dict(reversed(values.items())), truth) == found  # any order of sites
    assert fair.over_sites("hd95", values, truth)["worst_site"] == "d"  # a distance: the largest is the worst


def test_sites_without_truth_equal_single_or_none() -> None:
    alone = fair.over_sites("bacc", {"a": 0.5}, {})
    assert alone["worst_site"] == "a" and alone["spread"] == alone["std"] == 0.0
    assert math.isnan(alone["group_gap"]) and all(math.isnan(v) for v in alone["by_group"].values())
    equal = fair.over_sites("bacc", {"b": 0.5, "a": 0.5}, {"a": {"is_noisy": True}})
    assert equal["worst_site"] == "a" and equal["spread"] == equal["std"] == 0.0
    assert equal["by_group"]["corrupted"] == 0.5 and math.isnan(equal["by_group"]["clean"])
    for nobody in ({}, {"a": NAN}):
        found = fair.over_sites("bacc", nobody, {})
        assert found["worst_site"] is None
        assert all(math.isnan(found[key]) for key in ("mean", "worst", "spread", "std", "group_gap"))


def test_last_round_and_tail() -> None:
    history = [central(r, test=0.1 * r, test__corrupted=0.05 * r) for r in range(1, 8)]
    found = fair.fairness(history, "bacc", {}, {})
    assert found["by_condition"] == pytest.approx({"clean": 0.7, "corrupted": 0.35})
    assert (found["mean"], found["gap"]) == pytest.approx((0.525, 0.35))
    assert found["tail"]["last_rounds"] == 5  # rounds 3 to 7
    assert found["tail"]["by_condition"] == pytest.approx({"clean": 0.5, "corrupted": 0.25})
    assert (found["tail"]["mean"], found["tail"]["gap"]) == pytest.approx((0.375, 0.25))
    assert fair.fairness(history[:2], "bacc", {}, {})["tail"]["last_rounds"] == 2
    assert fair.fairness(history, "bacc", {}, {}, last=1)["tail"] == {
        "last_rounds": 1,
        **{key: found[key] for key in ("by_condition", "mean", "gap")},
    }


def test_undefined_rounds_and_conditions() -> None:
    history = [central(1, test=0.5, test__corrupted=0.25), central(2, test=0.5, test__corrupted=None)]
    found = fair.fairness(history, "bacc", {}, {})
    assert math.isnan(found["by_condition"]["corrupted"]) and math.isnan(found["mean"]) and math.isnan(found["gap"])
    assert found["tail"]["by_condition"] == {"clean": 0.5, "corrupted": 0.25} and found["tail"]["gap"] == 0.25
    clean = fair.fairness([central(1, test=0.5)], "bacc", {}, {})
    assert clean["by_condition"] == {"clean": 0.5} and clean["mean"] == 0.5 and math.isnan(clean["gap"])
    for empty in (fair.fairness([], "bacc", {}, {}), fair.fairness(history, None, {}, {})):
        assert empty["by_condition"] == {} and math.isnan(empty["mean"]) and math.isnan(empty["gap"])
    assert fair.fairness([], None, {}, {})["tail"]["last_rounds"] == 0


def test_degraded_items_never_judge() -> None:
    history = [central(1, test__blur=0.1, val=0.2), central(2, test__blur=0.1, test=0.3)]
    assert judged_prefix(history[:1], "bacc") == "val/global"
    assert judged_prefix(history, "bacc") == "test/global"
    assert judged_prefix([central(1, test__blur=0.1)], "bacc") is None


def test_summary_has_fairness_and_training_items(tmp_path: Path, made_up: Any) -> None:
    history = made_up.make_history(3, rounds=6)
    truth = {"site_00": {"is_noisy": True}, "site_01": {"is_noisy": False}, "site_02": {"is_noisy": False}}
    summary = build_summary(tmp_path, history, made_up.make_config(), truth)
    found = summary["fairness"]
    assert found["metric"] == "dice" and list(found["by_condition"]) == ["clean"] and math.isnan(found["gap"])
    assert found["by_condition"]["clean"] == summary["central"]["last"]["test/global/dice"]
    assert [found["sites"][k] for k in ("mean", "worst", "spread")] == [summary[k] for k in ("mean", "worst", "spread")]
    assert found["sites"]["by_group"]["corrupted"] == summary["sites"]["site_00"]["dice"]
    assert summary["examples"] == {"site_00": 40, "site_01": 41, "site_02": 42}
