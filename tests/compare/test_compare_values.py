"""What the metrics of a comparison read out of stored runs, and the numbers of a whole plan."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedmed.compare.results import results, win_tie_loss
from fedmed.compare.values import check_known, known_metrics, site_values, smaller_is_better, split_metric, value_of
from fedmed.errors import UserError

Records = list[dict[str, Any]]


def central(*rounds: dict[str, float | None]) -> Records:
    """Evaluations on pooled items, one per round."""
    return [{"phase": "central", "round": number, "metrics": metrics} for number, metrics in enumerate(rounds, 1)]


def at_sites(view: str, name: str, *rounds: tuple[float | None, ...]) -> Records:
    """Evaluations at the sites a, b, ... in one view, one tuple per round."""
    return [
        {"phase": "evaluate", "round": number, "site": site, "metrics": {f"test/{view}/{name}": value}}
        for number, values in enumerate(rounds, 1)
        for site, value in zip("abc", values, strict=False)
    ]


def write_run(folder: Path, records: Records, **summary: Any) -> Path:
    """A finished run folder with these records."""
    folder.mkdir(parents=True)
    (folder / "history.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "summary.json").write_text(json.dumps({"sites": {}, "notes": {}, "truth": {}, **summary}))
    return folder


def scores(clean: float | None, corrupted: float | None) -> dict[str, float | None]:
    return {"test/global/bacc": clean, "test-corrupted/global/bacc": corrupted, "test/personal/bacc": 0.0}


def test_pooled_items_and_conditions(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", central(scores(0.0, 1.0), scores(0.75, 0.5), scores(0.75, 0.25)))
    found = {m: value_of(folder, m, 2) for m in ("bacc", "test-corrupted/bacc", "mean:bacc", "gap:bacc")}
    assert found == {"bacc": 0.75, "test-corrupted/bacc": 0.375, "mean:bacc": 0.5625, "gap:bacc": 0.375}
    assert site_values(folder, "bacc", 2) == site_values(folder, "gap:bacc", 2) == {}
    undefined = write_run(tmp_path / "b", central(scores(0.5, None), scores(None, None), scores(1.0, None)))
    assert value_of(undefined, "bacc", 2) == 1.0 and value_of(undefined, "bacc", 3) == 0.75
    assert all(math.isnan(value_of(undefined, m, 2)) for m in ("gap:bacc", "mean:bacc", "auc"))
    plain = write_run(tmp_path / "c", central({"test/global/bacc": 0.5}))
    assert value_of(plain, "mean:bacc", 2) == 0.5 and math.isnan(value_of(plain, "gap:bacc", 2))


def test_views_at_the_sites(tmp_path: Path) -> None:
    """Mean over the sites, then over the last evaluations; an arm of sites trained alone has the personal view only."""
    both = [
        *at_sites("global", "dice", (0.0, 0.0), (0.25, 0.75)),
        *at_sites("personal", "dice", (0.5, 1.0), (0.25, None), (1.0, 0.5)),
    ]
    summary = {
        "personal": {"dice": {"G": None, "S": 0.625, "sites": {"a": {"personal": 0.5}, "b": {"personal": 0.75}}}}
    }
    mine = write_run(tmp_path / "mine", both, **summary)
    alone = write_run(tmp_path / "alone", at_sites("personal", "dice", (0.25, 0.5), (0.5, 0.75)), **summary)
    assert value_of(mine, "personal:dice", 2) == 0.5  # .25 of one site, .75 of two
    assert site_values(mine, "personal:dice", 2) == {"a": 0.625, "b": 0.5}
    assert value_of(mine, "global:dice", 1) == 0.5
    assert value_of(alone, "personal:dice", 2) == 0.5 and value_of(alone, "S:dice", 2) == 0.625
    assert site_values(alone, "S:dice", 2) == {"a": 0.5, "b": 0.75}
    for metric in ("global:dice", "G:dice", "dice", "mean:dice"):
        assert math.isnan(value_of(alone, metric, 2))
    assert site_values(alone, "global:dice", 2) == {}


def test_without_pooled_items_a_plain_name_is_the_mean_over_the_sites(tmp_path: Path) -> None:
    records = at_sites("global", "bacc", (0.0, 0.0), (0.25, 0.75), (0.5, 1.0))
    folder = write_run(tmp_path / "a", records)
    assert value_of(folder, "bacc", 2) == 0.625 and site_values(folder, "bacc", 2) == {"a": 0.375, "b": 0.875}
    assert math.isnan(value_of(folder, "test-corrupted/bacc", 2))
    pooled = write_run(tmp_path / "b", [*records, *central({"test/global/bacc": 0.125})])
    assert value_of(pooled, "bacc", 2) == 0.125 and site_values(pooled, "bacc", 2) == {"a": 0.375, "b": 0.875}


def test_generalisation_specialisation_and_subsets(tmp_path: Path) -> None:
    rounds = central({"test/global/bacc": 0.25}, {"test/global/bacc": 0.5})
    summary = {"sites": {"a": {"bacc": 0.25}, "b": {"bacc": None}}, "subsets": {"mean": 0.75, "spread": None}}
    plain = write_run(tmp_path / "a", rounds, **summary)
    assert value_of(plain, "S:bacc", 2) == 0.25  # no personal models: the sites' own scores
    found = site_values(plain, "S:bacc", 2)
    assert found["a"] == 0.25 and math.isnan(found["b"])
    assert value_of(plain, "G:bacc", 2) == 0.5 and value_of(plain, "subsets:mean", 2) == 0.75
    assert math.isnan(value_of(plain, "subsets:spread", 2)) and site_values(plain, "subsets:mean", 2) == {}
    own = write_run(tmp_path / "b", rounds, **summary, personal={"bacc": {"G": 0.125, "S": 0.875}})
    assert (value_of(own, "G:bacc", 2), value_of(own, "S:bacc", 2)) == (0.125, 0.875)
    bare = write_run(tmp_path / "c", rounds)
    assert math.isnan(value_of(bare, "subsets:worst", 1)) and math.isnan(value_of(bare, "S:bacc", 1))


@pytest.mark.parametrize(("mode", "expected"), [("separate", {"a": 0.25, "b": 0.75}), ("after", {"a": 0.5, "b": 0.0})])
def test_specialisation_of_a_metric_that_the_summary_does_not_pair(
    tmp_path: Path, mode: str, expected: dict[str, float]
) -> None:
    """Small missed fractions are good, so `personal` of a summary lacks them: the records have the view all the same."""
    key = "missed_fraction"
    trained = [{"phase": "train", "round": 1, "site": site, "metrics": {}} for site in "ab"]
    records = [*trained, *at_sites("personal", key, (0.5, 0.0)), *at_sites("personal", key, (0.25, 0.75))]
    summary = {"sites": {"a": {key: 1.0}, "b": {key: 1.0}}, "personal": {"dice": {"G": 0.5, "S": 0.5}}}
    folder = write_run(tmp_path / "a", records, **summary)
    (folder / "config.yaml").write_text(f"evaluation: {{mode: {mode}}}\n")
    assert site_values(folder, f"S:{key}", 1) == expected
    assert value_of(folder, f"S:{key}", 1) == sum(expected.values()) / 2
    assert value_of(folder, "S:both_empty", 1) != value_of(folder, "S:both_empty", 1)  # in neither
    plain = write_run(tmp_path / "b", records, sites=summary["sites"])  # no personal models: those of the global one
    assert value_of(plain, f"S:{key}", 1) == 1.0


def test_a_run_that_has_not_finished_has_no_number(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", central({"test/global/bacc": 0.5}))
    (folder / "summary.json").unlink()
    for metric in ("bacc", "S:bacc", "rare:3", "subsets:mean", "gap:bacc"):
        assert math.isnan(value_of(folder, metric, 1)) and math.isnan(value_of(tmp_path / "gone", metric, 1))
        assert site_values(folder, metric, 1) == {}


def test_a_history_that_grows_is_read_again(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", central({"test/global/bacc": 0.5}))
    assert value_of(folder, "bacc", 1) == 0.5
    (folder / "history.jsonl").write_text("\n".join(map(json.dumps, central({}, {"test/global/bacc": 0.75}))))
    assert value_of(folder, "bacc", 1) == 0.75


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("gaps:bacc", "'gaps', which is no kind of metric; did you mean 'gap'"),
        ("rare:few", "'rare:few' needs a number of classes"),
        ("rare:0", "needs a number"),
        ("subsets:wurst", "did you mean 'worst'"),
    ],
)
def test_impossible_metrics(metric: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        split_metric(metric)


def test_direction_of_metrics() -> None:
    small = ["gap:bacc", "subsets:spread", "S:missed_fraction", "hd95", "test-corrupted/loss"]
    assert all(map(smaller_is_better, small))
    assert not any(map(smaller_is_better, ["bacc", "mean:bacc", "rare:3", "subsets:worst", "test-corrupted/auc"]))


def test_known_metrics_and_typos(tmp_path: Path) -> None:
    metrics: dict[str, float | None] = {
        "test/global/bacc": 0.5,
        "test/global/recall_3": 0.5,
        "test-blur/global/auc": 1,
        "n/test": 4,
    }
    folder = write_run(tmp_path / "a", [*central(metrics), *at_sites("personal", "bacc", (0.5,))])
    words = {"bacc", "test-blur/auc", "personal:bacc"} | {
        f"{k}:{m}" for k in ("G", "S", "mean", "gap") for m in ("bacc", "auc")
    }
    assert known_metrics(folder) == words
    folders = [folder, tmp_path / "not yet"]
    check_known(["gap:bacc", "rare:3", "subsets:mean", "global:auc", "test-fog/auc"], folders, complete=False)
    with pytest.raises(UserError, match="'test-blurr/auc'; did you mean 'test-blur/auc'"):
        check_known(["test-blurr/auc"], folders, complete=True)
    with pytest.raises(UserError, match="'bac'; did you mean 'bacc'"):
        check_known(["bac"], folders, complete=False)
    check_known(["bac"], [tmp_path / "not yet"], complete=False)  # nothing to judge by


# ---------------------------------------------------------------------- a whole plan


def made_plan(root: Path, **changed: Any) -> Any:
    """Two settings; the second borrows the baseline of the first."""

    def folder(setting: str, arm: str, seed: int) -> Path:
        return root / ("easy" if arm == "fedavg" else setting) / f"{arm}-{seed}"

    settings = (
        SimpleNamespace(name="easy", arms=("fedavg", "mine"), seeds=(0, 1)),
        SimpleNamespace(name="told", arms=("mine",), seeds=(0,)),
    )
    basis = {"metrics": ("dice",), "last_rounds": 2, "baseline": "fedavg", "findings": ("worst_site",)}
    return SimpleNamespace(**{**basis, "settings": settings, "folder": folder, **changed})


def test_results_of_a_plan(tmp_path: Path) -> None:
    plan = made_plan(tmp_path)
    for seed, (base, mine) in enumerate([(0.5, 0.75), (0.625, 0.625)]):
        sites = at_sites("global", "dice", (base, base))
        write_run(tmp_path / "easy" / f"fedavg-{seed}", [*central({"test/global/dice": base}), *sites])
        fairness = {"sites": {"worst_site": "b", "worst": 0.125}}
        rounds = central({"test/global/dice": mine}, {"test/global/dice": None})
        write_run(tmp_path / "easy" / f"mine-{seed}", rounds, fairness=fairness)
    found = results(plan)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    rows = {(r["setting"], r["arm"]): r for r in found["results"]}
    assert list(rows) == [("easy", "fedavg"), ("easy", "mine"), ("told", "fedavg"), ("told", "mine")]
    assert rows["easy", "fedavg"]["sites"] == {"0": {"a": 0.5, "b": 0.5}, "1": {"a": 0.625, "b": 0.625}}
    mine = rows["easy", "mine"]
    assert mine["values"] == {"0": 0.75, "1": 0.625} and mine["sites"] == {} and mine["best"]
    assert (mine["difference"]["mean"], mine["difference"]["per"], mine["difference"]["pairs"]) == (0.125, "seed", 2)
    told = rows["told", "mine"]
    assert told["values"] == {"0": None} and told["mean"] is None and told["difference"]["missing"] == 1
    assert rows["told", "fedavg"]["values"] == {"0": 0.5}
    assert found["win_tie_loss"] == [{"arm": "mine", "metric": "dice", "wins": 0, "ties": 1, "losses": 0}]
    cells = {(f["setting"], f["seed"]): f["cells"] for f in found["findings"]}
    assert cells == {("easy", 0): ["0.12 (b)"], ("easy", 1): ["0.12 (b)"], ("told", 0): ["–"]}
    assert all(f["columns"] == ["worst site"] and f["arm"] == "mine" for f in found["findings"])


def test_results_name_what_does_not_exist(tmp_path: Path) -> None:
    write_run(tmp_path / "easy" / "fedavg-0", central({"test/global/dice": 0.5}))
    with pytest.raises(UserError, match="'dise'; did you mean 'dice'"):
        results(made_plan(tmp_path, metrics=("dice", "dise")))
    with pytest.raises(UserError, match="no finding is called 'worst_sight'; did you mean 'worst_site'"):
        results(made_plan(tmp_path, findings=("worst_sight",)))


def test_results_of_nothing(tmp_path: Path) -> None:
    found = results(made_plan(tmp_path, findings=()))
    assert all(row["mean"] is None and not row["best"] for row in found["results"]) and found["findings"] == []
    assert found["win_tie_loss"] == [{"arm": "mine", "metric": "dice", "wins": 0, "ties": 0, "losses": 0}]


def test_wins_ties_and_losses_over_settings() -> None:
    intervals = [(0.1, 0.2), (0.1, 0.3), (-0.1, 0.2), (None, None), (-0.2, -0.1)]
    gaps: list[Any] = [{"low": low, "high": high, "seeds": 1 if low is None else 2} for low, high in intervals]
    gaps += [{"low": None, "high": None, "seeds": 0}, None]  # nothing to compare; the baseline
    rows = [{"arm": "mine", "metric": metric, "difference": found} for found in gaps for metric in ("bacc", "hd95")]
    bacc, hd95 = win_tie_loss(rows)
    assert bacc == {"arm": "mine", "metric": "bacc", "wins": 2, "ties": 2, "losses": 1}
    assert hd95 == {"arm": "mine", "metric": "hd95", "wins": 1, "ties": 2, "losses": 2}


def test_recall_of_the_rarest_classes(tmp_path: Path) -> None:
    """Training labels 0 0 1 at one site and 0 2 2 at the other: class 1 is the rarest, class 2 the next."""
    import h5py
    import numpy as np

    path = tmp_path / "data.h5"
    with h5py.File(path, "w") as file:
        file.attrs.update(
            layout_version="fedmed-data-1",
            task="classification",
            classes='["x", "y", "z"]',
            channels='["grey"]',
            image_size="[2, 2]",
        )
        for number, labels in enumerate(([0, 0, 1, 1], [0, 2, 2, 1])):
            site = file.create_group(f"site_{number:02d}")
            site.attrs.update(site_name=f"s{number}", train_idx=[0, 1, 2], test_idx=[3])
            site["image"], site["label"] = np.zeros((4, 2, 2), np.uint8), np.array(labels)
    metrics: dict[str, float | None] = {f"test/global/recall_{c}": v for c, v in enumerate((1.0, 0.25, 0.75))}
    folder = write_run(tmp_path / "run", central(metrics))
    (folder / "config.yaml").write_text(f"data:\n  path: {path}\n")
    assert [value_of(folder, f"rare:{n}", 1) for n in (1, 2)] == [0.25, 0.5]
    (folder / "config.yaml").write_text("name: over_real_sites\n")
    assert math.isnan(value_of(folder, "rare:1", 1))
