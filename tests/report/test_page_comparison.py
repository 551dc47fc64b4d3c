"""The page about a comparison, from files written by hand, and about the folder of a demo."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedmed.files import write_json
from fedmed.report.page import write_page
from fedmed.report.page.comparison_data import (
    Comparison,
    arm_curves,
    curve_keys,
    interval,
    probability,
    sentences,
    smaller_is_better,
    verdict,
)
from fedmed.report.page.comparison_page import _range, widest


def _load() -> ModuleType:
    """The module `page_fixture` (test folders are no packages, hence by path)."""
    spec = importlib.util.spec_from_file_location("page_fixture", Path(__file__).with_name("page_fixture.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


by_hand = _load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison with its runs."""
    path: Path = tmp_path_factory.mktemp("page") / "comparison"
    by_hand.make_comparison(path)
    return path


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    """Its page."""
    return write_page(folder).read_text()


@pytest.fixture(scope="module")
def page(text: str) -> Any:
    """The same, read."""
    return by_hand.Page(text)


def test_every_section_is_there(page: Any) -> None:
    assert [title for level, title in page.headings if level == 2] == [
        "Summary", "Easy & clean", "Hard", "Over all settings", "What the methods found out", "One run of each arm", "Cost",
        "Runs and commands",
    ]  # fmt: skip
    assert "Comparison, variant small: 3 arms, 2 seeds" in page.text and "Three arms by hand." in page.text


def test_references_are_whole_and_nothing_is_fetched(page: Any) -> None:
    assert len(page.ids) == len(set(page.ids))
    anchors = {value.removeprefix("#") for value in page.values("href")}
    labels = {word for value in page.values("aria-labelledby") for word in value.split()}
    assert anchors | labels <= set(page.ids) and "run-1" in anchors
    assert all(value.startswith("data:image/jpeg") for value in page.values("src"))


def test_what_a_setting_says(page: Any) -> None:
    assert "base reaches bacc 0.705." in page.text
    assert "mine 0.755: +0.050, interval +0.020 to +0.080; better." in page.text
    assert "other 0.695: -0.010, interval -0.040 to +0.020; no difference shown." in page.text


def test_tables_by_hand(page: Any) -> None:
    assert "mine 0.755 ± 0.007 best 0.755 ± 0.007 best" in page.text and "other 0.695 ± 0.007 tied" in page.text
    assert "arm bacc gap:bacc (lower is better)" in page.text
    assert "mine bacc +0.050 +0.020 to +0.080 better 6 by seed and site 4/1/1 0.080" in page.text
    assert "mine gap:bacc +0.050 +0.020 to +0.080 worse" in page.text
    assert "mine bacc 0.750 0.760" in page.text  # by seed
    assert "mine 0.705 0.655 0.100" in page.text  # fairness: mean, worst, spread
    assert "clean test corrupted test gap of conditions" in page.text
    assert "mine bacc 2 0 0" in page.text and "mine 0 0.62" in page.text
    assert "easy mine 1:00 1,200 5,000 4,000 2.5 MB 2.5 MB 1.0 GB -" in page.text


def test_failed_and_waiting_runs_are_named(page: Any, text: str) -> None:
    assert "hard/mine-1 QuorumLost: 1 of 3 sites <b>answered</b>" in page.text and "<b>answered" not in text
    assert (
        "Not run yet: hard/other-1." in page.text
        and "1 run has failed; it is named" in page.text
        and "10 of 12" in page.text
    )
    assert "0000000000000003 fedmed run fednoro seed=1 --out out/easy/mine-1" in page.text


def test_one_run_of_each_arm(page: Any) -> None:
    for arm in ("base", "mine", "other"):
        assert f"easy: {arm}, seed 0" in page.text
    assert page.text.count("truly noisy 1 0 truly clean 1 1") == 6
    assert len([v for t, n, v in page.attributes if t == "img" and n == "alt"]) == 6 * 3 * 3


def test_figures_of_each_setting(page: Any, text: str) -> None:
    roles = [tag for tag, name, value in page.attributes if name == "role" and value == "img"]
    assert len(roles) == 8  # forest, seeds, curves, sites; twice
    assert "mine +0.050, interval +0.020 to +0.080; other -0.010, interval -0.040 to +0.020." in text
    assert "base: seed 0 0.700, seed 1 0.710, mean 0.705" in text
    assert "mine: worst 0.655, mean 0.705, best 0.755" in text
    assert "Last values, mean over the seeds: base 0.700, mine 0.750, other 0.700." in text


def test_without_images_and_without_runs(folder: Path, tmp_path: Path) -> None:
    found = write_page(folder, tmp_path / "a.html", images=False).read_text()
    assert "data:image" not in found and "PATIENT" not in found and "Images are left out" in found
    by_hand.make_comparison(tmp_path / "bare", runs=False)
    bare = by_hand.Page(write_page(tmp_path / "bare").read_text())
    assert "One run of each arm" not in bare.text and "mine 0.755: +0.050" in bare.text


def test_same_bytes_twice(folder: Path, tmp_path: Path) -> None:
    first, second = (write_page(folder, tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_runs_outside_the_comparison_are_not_read(tmp_path: Path) -> None:
    content = by_hand.make_comparison(tmp_path / "c", runs=False)
    by_hand.make_run(tmp_path / "secret")
    for where in ("../secret", str(tmp_path / "secret")):
        content["cells"][0]["folder"] = where
        comparison = Comparison(tmp_path / "c", content)
        assert comparison.run_folder(content["settings"][0], "base", 0) is None


def test_the_baseline_of_another_setting(tmp_path: Path) -> None:
    content = by_hand.make_comparison(tmp_path / "c", runs=False)
    content["settings"][1].update(against="easy", arms=["mine", "other"])
    content["cells"] = [c for c in content["cells"] if (c["setting"], c["arm"]) != ("hard", "base")]
    comparison = Comparison(tmp_path / "c", content)
    assert comparison.run_folder(content["settings"][1], "base", 0) == tmp_path / "c" / "easy" / "base-0"
    (tmp_path / "c" / "comparison.json").write_text(json.dumps(content))
    assert "The baseline is that of the setting easy." in by_hand.Page(write_page(tmp_path / "c").read_text()).text


def test_nothing_has_run_yet(tmp_path: Path) -> None:
    content = by_hand.make_comparison(tmp_path / "c", runs=False)
    content.update(results=[], win_tie_loss=[], findings=[], cost=[])
    for cell in content["cells"]:
        cell.update(state="waiting", error=None, seconds=None)
    (tmp_path / "c" / "comparison.json").write_text(json.dumps(content))
    page = by_hand.Page(write_page(tmp_path / "c").read_text())
    assert page.text.count("No run of this setting has finished.") == 4 and "0 of 12" in page.text


def test_undefined_numbers(tmp_path: Path) -> None:
    content = by_hand.make_comparison(tmp_path / "c", runs=False)
    for result in content["results"]:
        result.update(mean=None, sd=None, best=False, tied=False, values={"0": None, "1": None}, sites={})
        if result["difference"]:
            result["difference"].update(mean=None, low=None, high=None, p=None, p_holm=None, pairs=0, per="seed")
    (tmp_path / "c" / "comparison.json").write_text(json.dumps(content))
    page = by_hand.Page(write_page(tmp_path / "c").read_text())
    assert "mine -: not compared." in page.text and "nan" not in page.text.lower().split()


def test_how_many_seeds_are_behind_a_mean(tmp_path: Path) -> None:
    content = by_hand.make_comparison(tmp_path / "c", runs=False)
    first = content["results"][0]
    first.update(mean=0.5, sd=None, values={"0": 0.5, "1": None})
    gap = next(r["difference"] for r in content["results"] if r["difference"])
    gap.update(mean=0.125, seeds=2, missing=3)
    (tmp_path / "c" / "comparison.json").write_text(json.dumps(content))
    text = by_hand.Page(write_page(tmp_path / "c").read_text()).text
    assert text.count("(1 of 2)") == 1 and "0.500 (1 of 2)" in text and "+0.125 (2 of 5)" in text


def test_a_broken_summary_costs_its_run_only(tmp_path: Path) -> None:
    content = by_hand.make_comparison(tmp_path / "c")
    done = next(cell for cell in content["cells"] if cell["state"] == "done")
    for broken in ("[]", "{"):
        (tmp_path / "c" / done["folder"] / "summary.json").write_text(broken)
        assert "Runs and commands" in write_page(tmp_path / "c").read_text()


# ---------------------------------------------------------------------- words and numbers


@pytest.mark.parametrize(
    ("gap", "metric", "words"),
    [
        ((0.1, 0.05, 0.15), "bacc", "better"),
        ((-0.1, -0.15, -0.05), "bacc", "worse"),
        ((0.1, 0.05, 0.15), "hd95", "worse"),
        ((-0.1, -0.15, -0.05), "gap:bacc", "better"),
        ((0.1, 0.0, 0.2), "bacc", "no difference shown"),
        ((0.1, None, None), "bacc", "one pair shows no more than a direction"),
        ((None, None, None), "bacc", ""),
    ],
)
def test_verdicts(gap: tuple[Any, Any, Any], metric: str, words: str) -> None:
    assert verdict(dict(zip(("mean", "low", "high"), gap, strict=True)), metric) == words


def test_signs_intervals_and_p() -> None:
    assert interval({"low": -0.01, "high": 0.25}) == "-0.010 to +0.250" and interval({"low": None, "high": 1}) == "-"
    assert [probability({"p": v}) for v in (0.0004, 0.0312, None)] == ["< 0.001", "0.031", "-"]
    assert probability({"p": 0.01, "p_holm": 0.03}) == "0.030"
    assert [smaller_is_better(m) for m in ("bacc", "gap:bacc", "subsets:spread", "subsets:mean", "test-corrupted/hd95")] == [
        False, True, True, False, True,
    ]  # fmt: skip


def test_where_curves_are_looked_for() -> None:
    assert curve_keys("test-corrupted/bacc")[0] == ("central", "test-corrupted/global/bacc")
    assert curve_keys("S:dice") == [("evaluate", "test/personal/dice")]
    assert curve_keys("mean:bacc")[0] == ("central", "test/global/bacc")
    assert curve_keys("rare:3") == [] and curve_keys("subsets:mean") == []


def test_every_arm_is_drawn_from_the_same_records(folder: Path) -> None:
    comparison = Comparison(folder, json.loads((folder / "comparison.json").read_text()))
    shown, curves = arm_curves(comparison, comparison.settings[0], "bacc")
    assert shown == arm_curves(comparison, comparison.settings[0], "gap:bacc")[0] == "bacc, pooled test items"
    assert set(curves) == {"base", "mine", "other"} and len(curves["base"]) == 2
    assert curves["base"]["0"][4] == pytest.approx(0.7) and curves["base"]["0"][2] == pytest.approx(0.35)
    assert widest(comparison) == pytest.approx(0.08)


def test_ranges_of_a_metric_that_should_be_small() -> None:
    assert _range("bacc", [{"a": 0.4, "b": 0.8}, {"a": 0.6, "b": 0.6}]) == pytest.approx((0.5, 0.6, 0.7))
    assert _range("hd95", [{"a": 4.0, "b": 8.0}]) == pytest.approx((8.0, 6.0, 4.0))


def test_sentences_of_an_empty_setting() -> None:
    assert sentences(Comparison(Path(), {"metrics": ["bacc"]}), {"name": "x"}) == [
        "No run of this setting has finished."
    ]


# ---------------------------------------------------------------------- demo


def test_the_folder_of_a_demo(tmp_path: Path) -> None:
    arms = {}
    for arm, level in (("plain", 0.6), ("aware", 0.8)):
        run = by_hand.make_run(tmp_path / "demo" / arm, level=level)
        arms[arm] = json.loads((run / "summary.json").read_text())
    write_json(
        tmp_path / "demo" / "summary.json", {"arms": arms, "comparison": "In bacc: better.", "not_shared": ["x: 1 | 2"]}
    )
    page = by_hand.Page(write_page(tmp_path / "demo").read_text())
    assert page.headings[0] == (1, "demo") and (2, "plain against aware") in page.headings
    assert "In bacc: better. Not shared: x: 1 | 2." in page.text
    # the mean of the last three of four evaluations: 0.6 and 0.8 times 3/4
    assert "aware 0.600: +0.150; one pair shows no more than a direction." in page.text
    assert "One seed per arm: a difference can be chance." in page.text and "demo: aware, seed 3" in page.text
