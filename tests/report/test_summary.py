from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedmed.files import write_json
from fedmed.report import summary as sm


def evaluation(round: int, site: str | None, n: int = 0, **metrics: Any) -> dict[str, Any]:
    """One evaluation record; `__` in a name stands for a slash."""
    named = {key.replace("__", "/"): value for key, value in metrics.items()}
    phase = "evaluate" if site else "central"
    return {"round": round, "phase": phase, "site": site, "status": "ok", "num_examples": n, "metrics": named}


def test_mean_worst_spread_by_hand() -> None:
    values = [0.5, 0.75, math.nan, 1.0]
    assert sm.mean(values) == 0.75
    assert sm.worst("dice", values) == 0.5
    assert sm.worst("test/global/hd95", values) == 1.0
    assert sm.spread(values) == 0.5
    for empty in ([], [math.nan]):
        assert math.isnan(sm.mean(empty)) and math.isnan(sm.worst("dice", empty)) and math.isnan(sm.spread(empty))


def test_main_metric_and_the_view_that_judges(made_up) -> None:
    assert sm.infer_main_metric([]) is None
    assert sm.judged_prefix([], None) is None
    history = [evaluation(1, "a", val__personal__bacc=0.1, test__personal__bacc=0.2, test__global__bacc=0.3)]
    assert sm.infer_main_metric(history) == "bacc"
    assert sm.judged_prefix(history, "bacc") == "test/personal"  # the first view a site names
    assert sm.judged_prefix([evaluation(1, "a", val__global__auc=0.1)], "auc") == "val/global"
    assert sm.infer_main_metric(made_up.make_history(2)) == "dice"


def test_selection_uses_validation_only() -> None:
    history = [
        evaluation(1, "a", val__global__auc=0.9, test__global__auc=0.1),
        evaluation(1, "b", val__global__auc=0.5, test__global__auc=0.1),
        evaluation(2, "a", val__global__auc=0.6, test__global__auc=0.9),
        evaluation(2, "b", val__global__auc=0.8, test__global__auc=0.9),
        evaluation(3, "a", val__global__auc=None, test__global__auc=1.0),
    ]
    assert sm.select_round(history, "auc") == 1  # means .7 and .7: the first of equals; round 3 is undefined
    assert sm.select_round(history, "test/global/auc") == 3  # only when spelled out
    assert sm.select_round(history, "hd95") is None
    assert sm.select_round(history, None) is None
    lower = [evaluation(r, "a", val__global__hd95=v) for r, v in ((1, 5.0), (2, 3.0), (3, 4.0))]
    assert sm.select_round(lower, "hd95") == 2


def test_noisy_sites_precision_and_recall() -> None:
    truth = {"a": {"is_noisy": True}, "b": {"is_noisy": True}, "c": {"is_noisy": False}}
    found = sm.noisy_sites({"believed_noisy": ["c", "a", "d"]}, truth)
    assert found == {"believed": ["a", "c", "d"], "true": ["a", "b"], "precision": 1 / 3, "recall": 1 / 2}
    # Nothing believed: precision is 0/0, recall 0. Nothing said or nothing known: neither exists.
    assert sm.noisy_sites({"believed_noisy": []}, truth)["precision"] is None
    assert sm.noisy_sites({"believed_noisy": []}, truth)["recall"] == 0.0
    for notes, known in (({}, truth), ({"believed_noisy": ["a"]}, {}), ({"believed_noisy": ["a"]}, {"a": {}})):
        result = sm.noisy_sites(notes, known)
        assert result["precision"] is None and result["recall"] is None
    clean = sm.noisy_sites({"believed_noisy": ["a"]}, {"a": {"is_noisy": False}})
    assert clean["precision"] == 0.0 and clean["recall"] is None


def test_build_summary_of_a_run(tmp_path: Path, made_up) -> None:
    history = made_up.make_run(tmp_path, made_up.make_history(3, rounds=6))
    config = made_up.make_config(select="dice")
    truth = {"site_00": {"is_noisy": True, "noise_rate": 0.3}, "site_01": {"is_noisy": False}}
    result = sm.build_summary(tmp_path, None, config, truth, seconds=12.5)
    assert result == sm.build_summary(tmp_path, history, config, truth, seconds=12.5)
    assert result["rounds"] == 6 and result["main_metric"] == "dice" and result["judged_by"] == "test/global"
    assert result["seconds"] == 12.5
    last = [r["metrics"]["test/global/dice"] for r in history if r["phase"] == "evaluate" and r["round"] == 6]
    assert [site["dice"] for site in result["sites"].values()] == last
    assert [site["n"] for site in result["sites"].values()] == [10, 11, 12]
    assert result["mean"] == pytest.approx(sum(last) / 3)
    assert result["worst"] == min(last)
    assert result["spread"] == pytest.approx(max(last) - min(last))
    assert result["central"]["last"]["round"] == 6 and 1 <= result["central"]["selected"]["round"] <= 6
    assert result["notes"]["believed_noisy"] == ["site_00", "site_02"]
    assert result["noisy_sites"]["precision"] == 0.5 and result["noisy_sites"]["recall"] == 1.0
    assert result["failures"] == [
        {"round": 3, "phase": "train", "site": "site_01", "reason": "non-finite value in 'out.weight'"}
    ]
    assert "python" in result["versions"]


def test_summary_of_an_empty_run_is_written_with_null(tmp_path: Path, made_up) -> None:
    result = sm.build_summary(tmp_path, [], made_up.make_config())
    write_json(tmp_path / "summary.json", result)
    stored = json.loads((tmp_path / "summary.json").read_text())
    assert stored["mean"] is None and stored["worst"] is None and stored["main_metric"] is None
    assert stored["sites"] == {} and stored["central"] == {"last": {}, "selected": {}} and stored["rounds"] == 0


def test_null_and_missing_metrics_are_undefined() -> None:
    history = [evaluation(2, "a", n=4, test__global__auc=None), evaluation(2, "b", n=6, test__global__auc=0.5)]
    lines = sm.curve(history, "test/global/auc")
    assert math.isnan(lines["a"][2]) and lines["b"] == {2: 0.5}
    assert sm.mean_curve(lines) == {2: 0.5}
    failed = {**evaluation(3, "a", test__global__auc=0.9), "status": "failed"}
    assert sm.curve([failed], "test/global/auc") == {}


def test_summary_is_the_same_in_any_order_of_sites(tmp_path: Path, made_up) -> None:
    history = made_up.make_history(4, rounds=3)
    shuffled = sorted(history, key=lambda r: (r["round"], str(r["site"])[::-1]))
    config = made_up.make_config()
    first, second = (sm.build_summary(tmp_path, h, config, seconds=1.0) for h in (history, shuffled))
    assert first["mean"] == second["mean"] and set(first["sites"]) == set(second["sites"])
    assert list(second["sites"]) == sorted(second["sites"])
