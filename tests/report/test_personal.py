"""The pair of generalisation and specialisation: by hand, what is left out, where it is from, and how it is shown."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from fedmed.errors import UserError
from fedmed.files import write_json
from fedmed.report import personal as ps
from fedmed.report import tables
from fedmed.report.summary import build_summary
from fedmed.report.write import report_text

NAN = math.nan


def record(round: int, phase: str, site: str | None, **metrics: float | None) -> dict[str, Any]:
    """One record; `g_<metric>` and `p_<metric>` stand for the two views."""
    names = {"g": "test/global/", "p": "test/personal/"}
    named = {names[key[0]] + key[2:]: value for key, value in metrics.items()}
    return {"round": round, "phase": phase, "site": site, "status": "ok", "num_examples": 5, "metrics": named}


def scored(round: int, site: str, **metrics: float | None) -> dict[str, Any]:
    return record(round, "evaluate", site, **metrics)


def central(round: int, **metrics: float | None) -> dict[str, Any]:
    return record(round, "central", None, **metrics)


def trained(round: int, *sites: str) -> list[dict[str, Any]]:
    return [record(round, "train", site) for site in sites]


@pytest.mark.parametrize(
    ("first", "second", "mean", "harmonic"),
    [
        (0.5, 0.7, 0.6, 0.583333),
        (0.0, 0.0, 0.0, 0.0),
        (0.0, 0.8, 0.4, 0.0),
        (0.6, 0.6, 0.6, 0.6),
        (NAN, 0.7, NAN, NAN),
        (0.5, NAN, NAN, NAN),
        (NAN, NAN, NAN, NAN),
    ],
)
def test_pair_by_hand(first: float, second: float, mean: float, harmonic: float) -> None:
    found = ps.pair(first, second)
    assert list(found) == ["G", "S", "mean", "harmonic"]
    assert list(found.values()) == pytest.approx([first, second, mean, harmonic], abs=1e-6, nan_ok=True)


def test_specialisation_counts_every_site_once() -> None:
    assert ps.specialisation({"a": 0.6, "b": 0.8}) == pytest.approx(0.7)
    assert ps.specialisation({"b": 0.8, "c": NAN, "a": 0.6}) == pytest.approx(0.7)
    assert ps.specialisation({"a": 0.6}) == 0.6
    assert math.isnan(ps.specialisation({})) and math.isnan(ps.specialisation({"a": NAN}))


def test_with_a_central_test_set() -> None:
    history = [
        scored(1, "a", g_bacc=0.1, p_bacc=0.1), central(1, g_bacc=0.1),
        scored(2, "b", g_bacc=0.4, p_bacc=0.8, g_auc=0.5, p_auc=None),
        scored(2, "a", g_bacc=0.2, p_bacc=0.6, g_auc=0.5, p_auc=0.9), central(2, g_bacc=0.5, g_auc=0.6),
    ]  # fmt: skip
    found = ps.personal(history)
    assert list(found) == ["bacc", "auc"]
    bacc = found["bacc"]
    assert (bacc["G"], bacc["G_from"], bacc["S_from"]) == (0.5, "central", "received")
    assert bacc["S"] == pytest.approx(0.7) and bacc["mean"] == pytest.approx(0.6)
    assert bacc["harmonic"] == pytest.approx(0.583333, abs=1e-6)
    assert bacc["sites"] == {"a": {"global": 0.2, "personal": 0.6}, "b": {"global": 0.4, "personal": 0.8}}
    assert found["auc"]["S"] == 0.9  # the undefined one is left out
    assert repr(ps.personal([*history[::-1][1:3], history[-1]])["bacc"]) == repr(bacc)  # any order of sites


def test_without_one_the_sites_speak() -> None:
    found = ps.personal([scored(3, "a", g_bacc=0.4, p_bacc=0.6), scored(3, "b", g_bacc=0.6, p_bacc=0.8)])["bacc"]
    assert found["G"] == pytest.approx(0.5) and found["G_from"] == "sites"


def test_a_central_value_that_is_undefined_stays_so() -> None:
    found = ps.personal([scored(1, "a", g_bacc=0.4, p_bacc=0.6), central(1, g_bacc=None)])["bacc"]
    assert math.isnan(found["G"]) and found["G_from"] == "central" and math.isnan(found["mean"])


def test_a_site_without_test_items_is_left_out() -> None:
    history = [scored(1, "a", g_bacc=0.4, p_bacc=0.6), scored(1, "b")]
    found = ps.personal(history)["bacc"]
    assert found["S"] == 0.6 and found["G"] == 0.4 and list(found["sites"]) == ["a"]


def test_no_global_view() -> None:
    found = ps.personal([scored(1, "a", p_bacc=0.5), scored(1, "b", p_bacc=0.7)])["bacc"]
    assert math.isnan(found["G"]) and found["G_from"] is None and found["S"] == pytest.approx(0.6)
    assert math.isnan(found["mean"]) and math.isnan(found["harmonic"]) and math.isnan(found["sites"]["a"]["global"])


def test_no_personal_view_or_nothing_at_all() -> None:
    assert ps.personal([scored(1, "a", g_bacc=0.5), central(1, g_bacc=0.5)]) == ps.personal([]) == {}
    failed = {**scored(1, "a", p_bacc=0.5), "status": "failed"}
    assert ps.personal([failed, record(1, "evaluate", None, p_bacc=0.5)]) == {}


def test_distances_and_counts_have_no_pair() -> None:
    found = ps.personal([scored(1, "a", p_dice=0.5, p_hd95=9.0, p_missed_fraction=0.1, p_both_empty=2.0)])
    assert list(found) == ["dice"]


def test_models_just_trained() -> None:
    """Mode `after`: in each round a site speaks first as it trained, in the last round once more as it received."""
    history = [
        *trained(1, "a", "b"), scored(1, "a", g_bacc=0.9, p_bacc=0.1), scored(1, "b", g_bacc=0.9, p_bacc=0.5),
        *trained(2, "a"), scored(2, "a", g_bacc=0.9, p_bacc=0.7),
        scored(2, "a", g_bacc=0.2, p_bacc=0.3), scored(2, "b", g_bacc=0.4, p_bacc=0.4),
    ]  # fmt: skip
    received, after = ps.site_scores(history, "after")
    assert {s: m["test/personal/bacc"] for s, m in after.items()} == {"a": 0.7, "b": 0.5}
    assert {s: m["test/personal/bacc"] for s, m in received.items()} == {"a": 0.3, "b": 0.4}
    found = ps.personal(history, "after")["bacc"]
    assert found["S"] == pytest.approx(0.6) and found["S_from"] == "trained"
    assert found["G"] == pytest.approx(0.3) and found["G_from"] == "sites"  # never that of a model of one site
    assert found["sites"] == {"a": {"global": 0.2, "personal": 0.7}, "b": {"global": 0.4, "personal": 0.5}}
    for mode in ("before", "separate"):
        assert ps.personal(history, mode)["bacc"]["S"] == pytest.approx(0.35)
    alone = ps.personal(history[:3], "after")["bacc"]  # the received model was never scored
    assert math.isnan(alone["G"]) and alone["G_from"] is None and alone["S"] == 0.1


# ---------------------------------------------------------------------- beside a local-only run

HISTORY = [scored(1, "a", g_bacc=0.2, p_bacc=0.6), scored(1, "b", g_bacc=0.4, p_bacc=0.8)]


def alone_run(folder: Path, history: list[dict[str, Any]], alone: bool = True) -> Path:
    """The summary of a run with these records, which said it was local-only or not."""
    content = {"sites": {"a": {}, "b": {}, "c": {}}, "personal": ps.personal(history, alone=alone)}
    write_json(folder / "summary.json", content)
    return folder


def test_what_the_sites_reach_alone_by_hand(tmp_path: Path) -> None:
    history = [
        scored(1, "a", p_bacc=0.1),
        scored(2, "a", p_bacc=0.5, p_auc=0.7),
        scored(2, "b", p_bacc=None),
        scored(2, "c", p_bacc=0.9),
    ]
    assert {m["S_from"] for m in ps.personal(history, alone=True).values()} == {"alone"}
    local = ps.read_local(alone_run(tmp_path, history), "bacc", ["a", "b"])
    assert repr(local) == repr({"bacc": {"a": 0.5, "b": NAN, "c": 0.9}, "auc": {"a": 0.7}})
    found = ps.personal(HISTORY, local=local)["bacc"]
    assert list(found) == ["G", "S", "mean", "harmonic", "L", "G_from", "S_from", "sites"]
    assert (found["L"], found["S"]) == (0.5, pytest.approx(0.7))  # of the sites of this run that have a value
    assert found["sites"]["a"] == {"global": 0.2, "personal": 0.6, "local": 0.5}
    assert math.isnan(found["sites"]["b"]["local"]) and "c" not in found["sites"]
    other = ps.personal([scored(1, "a", p_f1=0.5)], local=local)["f1"]
    assert math.isnan(other["L"]) and math.isnan(other["sites"]["a"]["local"])
    plain = ps.personal(HISTORY)["bacc"]
    assert "L" not in plain and "local" not in plain["sites"]["a"]


@pytest.mark.parametrize(
    ("history", "alone", "metric", "sites", "problem"),
    [
        (HISTORY, False, "bacc", "a", "is not a local-only run whose sites were scored"),
        ([scored(1, "a", g_bacc=0.5)], True, "bacc", "a", "is not a local-only run whose sites were scored"),
        (HISTORY, True, "dice", "a", "has no dice (it has bacc); give a local-only run of the same task"),
        (HISTORY, True, "bacc", "ax", "is of other sites (a, b, c), x is not among them"),
    ],
)
def test_folders_that_cannot_stand_beside(
    tmp_path: Path, history: list[dict[str, Any]], alone: bool, metric: str, sites: str, problem: str
) -> None:
    with pytest.raises(UserError, match=re.escape(f"evaluation.local_only: {tmp_path} {problem}")):
        ps.read_local(alone_run(tmp_path, history, alone), metric, sites)


def test_no_folder_or_a_run_that_did_not_finish(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"holds no summary\.json; give the folder of a finished run"):
            ps.read_local(folder, "bacc", ["a"])


def test_three_columns(tmp_path: Path, made_up: Any) -> None:
    local = {"bacc": {"a": 0.5, "b": NAN}}
    result = build_summary(tmp_path, HISTORY, made_up.make_config(), seconds=1.0, local=local)
    assert tables.pair_table(result) == (
        ["personalised", "G (global)", "S (personal)", "L (local-only)", "mean", "harmonic mean"],
        [["bacc", "0.300", "0.700", "0.500", "0.500", "0.420"]],
    )
    assert tables.personal_table(result) == (
        ["site (bacc)", "global", "personal", "local-only"],
        [["a", "0.200", "0.600", "0.500"], ["b", "0.400", "0.800", "-"]],
    )
    assert tables.personal_origin(result).endswith("; L: mean of sites, each trained alone")
    assert "| site (bacc) | global | personal | local-only |" in report_text(result, [])


def test_a_local_only_run_says_so(tmp_path: Path, made_up: Any) -> None:
    config = made_up.make_config()
    config.federation.local_only = True
    result = build_summary(tmp_path, [scored(1, "a", p_bacc=0.5)], config, seconds=1.0)
    assert result["personal"]["bacc"]["S_from"] == "alone"
    assert tables.personal_origin(result) == "G: no global view was scored; S: mean of sites, each trained alone"


# ---------------------------------------------------------------------- in the summary and the report


def summary_of(tmp_path: Path, made_up: Any, history: list[dict[str, Any]], mode: str = "separate") -> dict[str, Any]:
    config = made_up.make_config()
    config.evaluation.mode = mode
    return build_summary(tmp_path, history, config, seconds=1.0)


def test_in_the_summary_and_shown(tmp_path: Path, made_up: Any) -> None:
    history = [
        scored(2, "a", g_auc=0.5, p_auc=0.9, g_bacc=0.2, p_bacc=0.6),
        scored(2, "b", g_auc=0.5, p_auc=None, g_bacc=0.4, p_bacc=0.8), central(2, g_bacc=0.5, g_auc=0.6),
    ]  # fmt: skip
    result = summary_of(tmp_path, made_up, history)
    assert result["main_metric"] == "bacc"
    header, rows = tables.pair_table(result)
    assert header[1:] == ["G (global)", "S (personal)", "mean", "harmonic mean"]
    assert rows == [
        ["bacc", "0.500", "0.700", "0.600", "0.583"],
        ["auc", "0.600", "0.900", "0.750", "0.720"],
    ]
    header, rows = tables.personal_table(result)
    assert header == ["site (bacc)", "global", "personal"]
    assert rows == [["a", "0.200", "0.600"], ["b", "0.400", "0.800"]]
    origin = "G: central test set; S: mean of sites, received model and what each site keeps"
    assert tables.personal_origin(result) == origin and tables.render(result).endswith(origin)
    page = report_text(result, [])
    assert (
        "| bacc | 0.500 | 0.700 | 0.600 | 0.583 |" in page and f"{origin}." in page and "| a | 0.200 | 0.600 |" in page
    )


def test_null_when_written(tmp_path: Path, made_up: Any) -> None:
    result = summary_of(tmp_path, made_up, [*trained(1, "a"), scored(1, "a", p_bacc=0.5)], "after")
    write_json(tmp_path / "summary.json", result)
    stored = json.loads((tmp_path / "summary.json").read_text())
    assert stored["personal"]["bacc"] == {
        "G": None, "S": 0.5, "mean": None, "harmonic": None, "G_from": None, "S_from": "trained",
        "sites": {"a": {"global": None, "personal": 0.5}},
    }  # fmt: skip
    assert tables.pair_table(stored)[1] == [["bacc", "-", "0.500", "-", "-"]]
    assert tables.personal_origin(stored) == "G: no global view was scored; S: mean of sites, models just trained"
    assert "| a | - | 0.500 |" in report_text(stored, [])


def test_nothing_is_shown_without_a_personal_view(tmp_path: Path, made_up: Any) -> None:
    result = summary_of(tmp_path, made_up, [scored(1, "a", g_bacc=0.5)])
    assert result["personal"] == {} and "personal" not in tables.render(result)
    old = {key: value for key, value in result.items() if key != "personal"}  # a summary of an earlier version
    for table in (tables.pair_table, tables.personal_table):
        assert table(result)[1] == table(old)[1] == []
    assert tables.personal_origin(old) == "" and "S (" not in report_text(old, [])
