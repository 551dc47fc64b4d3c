"""Run a comparison of experiments/compare/ on real data, several seeds, and print its tables as Markdown.

    python benchmarks/results.py fednoro --data ham10000_cls.h5 --seeds 5 --jobs 2 --out results/fednoro

Each (setting, arm, seed) is one ordinary run folder below --out; a finished one is not run again, so the command can be stopped and repeated.
The value of a run is the mean over its last rounds on the pooled test items, clean unless the metric names a condition.

A comparison file says: base and overrides of all runs; arms (name -> overrides, the first is the baseline); settings (title, overrides, and if
wanted seeds, arms, and `against`: the setting whose baseline is used); metrics ("bacc", "test-corrupted/bacc", "mean:bacc", "rare:3", "S:bacc",
"personal:bacc", "subsets:mean", ...; words before a colon are the keys of KINDS); seed_metrics (those of the table by seed, default all);
last_rounds; findings (keys of FINDINGS, default [noisy]).
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from fedmed.files import read_history, read_json
from fedmed.report.fairness import balance, condition_keys
from fedmed.report.values import mean, number, of_phase, tail, train_examples


def load_comparison(name: str) -> dict[str, Any]:
    """Read a comparison file by name."""
    from omegaconf import OmegaConf

    path = Path(__file__).resolve().parent.parent / "experiments" / "compare" / f"{name}.yaml"
    found: Any = OmegaConf.to_container(OmegaConf.load(path))
    return found


def jobs_of(comparison: dict[str, Any], data: str, seeds: int, out: Path) -> dict[tuple[str, str, int], list[str]]:
    """All runs of a comparison: (setting, arm, seed) -> overrides."""
    jobs: dict[tuple[str, str, int], list[str]] = {}
    for setting, content in comparison["settings"].items():
        for arm in content.get("arms", comparison["arms"]):
            for seed in range(min(seeds, content.get("seeds", seeds))):
                folder = out / setting / f"{arm}-{seed}"
                words = [*comparison["overrides"], *content["overrides"], *comparison["arms"][arm]]
                jobs[setting, arm, seed] = [*words, f"data.path={data}", f"seed={seed}", f"out={folder}"]
    return jobs


def run_one(base: str, words: list[str]) -> float:
    """Run one experiment unless its folder holds a summary; gives the seconds it took."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from fedmed.config import load_config
    from fedmed.engines import run

    config = load_config(base, words)
    if (Path(config.out) / "summary.json").is_file():
        return 0.0
    return float(run(config)["seconds"])


def full_name(metric: str) -> str:
    """The name a metric has in the history: "bacc" -> "test/global/bacc", "test-corrupted/bacc" -> "test-corrupted/global/bacc"."""
    split, _, name = metric.rpartition("/")
    return f"{split or 'test'}/global/{name}"


def tail_mean(records: list[dict[str, Any]], key: str, last: int) -> float:
    """Mean of a metric over the last evaluations, undefined ones left out."""
    known = [v for v in [r["metrics"].get(key) for r in records][-last:] if v is not None]
    return statistics.fmean(known) if known else float("nan")


def value_of(folder: Path, metric: str, last: int) -> float:
    """One value of a run: the mean of a metric over its last rounds, on the pooled test items.

    "bacc" is that of the clean items, "test-corrupted/bacc" of the items under a condition; a word before a colon names one of KINDS.
    """
    kind, _, name = metric.rpartition(":")
    if kind:
        return KINDS[kind](folder, name, last)
    return tail_mean(central_records(folder), full_name(metric), last)


def central_records(folder: Path) -> list[dict[str, Any]]:
    """The evaluations on pooled test items."""
    return [r for r in read_history(folder) if r["phase"] == "central"]


def over_conditions(folder: Path, name: str, last: int) -> tuple[float, float]:
    """Mean over, and gap between, the clean items and all conditions, after averaging over rounds."""
    records = central_records(folder)
    keys = condition_keys((key for r in records for key in r["metrics"]), name)
    return balance({condition: tail_mean(records, key, last) for condition, key in keys.items()})


def rare_recall(folder: Path, number: str, last: int) -> float:
    """Mean recall of the `number` classes with the fewest training items."""
    from fedmed.config import load_config
    from fedmed.data.site_file import SiteFile
    from fedmed.engines.prepare import site_file

    with SiteFile.open(site_file(load_config(folder / "config.yaml"))) as file:
        splits = [file.site(info.name, allow_empty_train=True).split("train") for info in file.sites]
        counts = sum(split.class_counts() for split in splits)
    records = central_records(folder)
    return mean(
        tail_mean(records, f"test/global/recall_{c}", last) for c in counts.argsort(kind="stable")[: int(number)]
    )


def of_personal(folder: Path, name: str, which: str) -> float:
    """G or S of a run with personal models, last round; S of a run without: its sites' own scores of the global model."""
    found = read_json(folder / "summary.json")
    pairs = found.get("personal") or {}
    if name in pairs:
        return number(pairs[name][which])
    scores = [number(site.get(name)) for site in found["sites"].values()]
    return mean(scores) if which == "S" else tail_mean(central_records(folder), full_name(name), 1)


def of_sites(folder: Path, view: str, name: str, last: int) -> float:
    """Mean over the last evaluations of the sites' own scores of one view, each site counting once; NaN without the view.

    An arm with federation.local_only=true has the view personal only: what its sites reach alone. Runs of evaluation.mode=separate.
    """
    return mean(tail(read_history(folder), f"test/{view}/{name}", "evaluate", last))


def of_subsets(folder: Path, which: str, last: int) -> float:
    """mean, spread or worst over the subsets of the modalities, last round."""
    return number(read_json(folder / "summary.json").get("subsets", {}).get(which))


# What a word before the colon of a metric means: function of (folder, what follows, last rounds).
KINDS: dict[str, Callable[[Path, str, int], float]] = {
    "mean": lambda folder, name, last: over_conditions(folder, name, last)[0],
    "gap": lambda folder, name, last: over_conditions(folder, name, last)[1],
    "rare": rare_recall,
    "G": lambda folder, name, last: of_personal(folder, name, "G"),
    "S": lambda folder, name, last: of_personal(folder, name, "S"),
    "global": lambda folder, name, last: of_sites(folder, "global", name, last),
    "personal": lambda folder, name, last: of_sites(folder, "personal", name, last),
    "subsets": of_subsets,
}


def spread(values: list[float]) -> str:
    """mean ± sample standard deviation of the defined values, and how many there are if some are not."""
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return "–"
    text = f"{statistics.fmean(known):.3f} ± {statistics.stdev(known) if len(known) > 1 else 0.0:.3f}"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


Values = dict[str, dict[str, list[float]]]  # arm -> metric -> one value a seed


def tables(comparison: dict[str, Any], keys: list[tuple[str, str, int]], out: Path) -> str:
    """The Markdown tables of all settings. The first arm of the comparison is the baseline of every table."""
    metrics, last = comparison["metrics"], comparison["last_rounds"]
    base, *others = comparison["arms"]
    found = [FINDINGS[name] for name in comparison.get("findings", ["noisy"])]
    text = []
    for setting, content in comparison["settings"].items():
        seeds = sorted({seed for s, _, seed in keys if s == setting})
        arms = [base, *(arm for arm in others if arm in content.get("arms", others))]
        folders = {}
        for arm in arms:
            where = setting if (setting, arm, 0) in keys else content.get("against", setting)
            folders[arm] = [out / where / f"{arm}-{seed}" for seed in seeds]
        values = {arm: {m: [value_of(f, m, last) for f in folders[arm]] for m in metrics} for arm in arms}
        gains = {
            arm: {m: [b - a for a, b in zip(values[base][m], values[arm][m], strict=True)] for m in metrics}
            for arm in arms[1:]
        }
        text += [f"### {content['title']}", "", *arm_rows(values, gains), ""]
        by_seed = comparison.get("seed_metrics", metrics)
        few = {arm: {m: gain[m] for m in by_seed} for arm, gain in gains.items()}
        text += [*seed_rows(seeds, few, folders, found), ""]
    return "\n".join(text)


def arm_rows(values: Values, gains: Values) -> list[str]:
    """One row per arm, then one per difference from the baseline, paired by seed."""
    metrics = list(next(iter(values.values())))
    label = "difference" if len(gains) == 1 else "difference, {}"
    shown = {**values, **{label.format(arm): gain for arm, gain in gains.items()}}
    rows = [[name, *(spread(row[m]) for m in metrics)] for name, row in shown.items()]
    return ["| arm | " + " | ".join(metrics) + " |", "|---|" + "---|" * len(metrics), *map(line, rows)]


def seed_rows(seeds: list[int], gains: Values, folders: dict[str, list[Path]], found: list[Finding]) -> list[str]:
    """Difference from the baseline and findings, one row per seed; with several arms they are named."""
    named = ["arm"] if len(gains) > 1 else []
    metrics = [f"Δ {m}" for m in next(iter(gains.values()), {})]
    header = [*named, "seed", *metrics, *(name for finding in found for name in finding.columns)]
    rows = []
    for arm, gain in gains.items():
        for i, seed in enumerate(seeds):
            cells = [cell for finding in found for cell in finding.cells(folders[arm][i])]
            rows.append([*([arm] if named else []), str(seed), *(signed(row[i]) for row in gain.values()), *cells])
    return [line(header), "|" + "---|" * len(header), *map(line, rows)]


def line(cells: list[str]) -> str:
    """One row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


# ---------------------------------------------------------------------- findings: what a method saw, beside the truth


class Finding(NamedTuple):
    """Columns of the table per seed, and how their cells come out of a run folder."""

    columns: tuple[str, ...]
    cells: Callable[[Path], list[str]]


def shown(value: float | None) -> str:
    """A number with two digits, a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.2f}"


def signed(value: float) -> str:
    """A difference with its sign and three digits, a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:+.3f}"


def of_run(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Notes of a run, and truth by site."""
    summary = read_json(folder / "summary.json")
    return summary["notes"], summary.get("truth", {})


def noted(folder: Path, key: str) -> dict[str, float]:
    """A note that has one number per site; undefined ones left out."""
    return {site: float(v) for site, v in of_run(folder)[0].get(key, {}).items() if v is not None}


def share_of(values: dict[str, float], sites: set[str]) -> float:
    """The part of a sum that comes from some sites; NaN when it is 0."""
    total = math.fsum(values.values())
    return math.fsum(v for site, v in values.items() if site in sites) / total if total else math.nan


def ranks(values: list[float]) -> list[float]:
    """Ranks from 0, equal values share the mean of theirs."""
    return [sum(v < w for v in values) + (sum(v == w for v in values) - 1) / 2 for w in values]


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's correlation; NaN for fewer than two pairs, or where one side is constant."""
    if min(len(set(first)), len(set(second))) < 2:
        return math.nan
    return statistics.correlation(ranks(first), ranks(second))


def noisy(folder: Path) -> list[str]:
    """Precision and recall of the sites believed noisy, group sizes and the largest weight."""
    summary = read_json(folder / "summary.json")
    judged, notes = summary["noisy_sites"], summary["notes"]
    groups = ", ".join(f"{v} {k}" for k, v in sorted(notes.get("groups", {}).items()) if v)
    return [shown(judged["precision"]), shown(judged["recall"]), groups or "–", shown(notes.get("largest_weight"))]


def weight_on_corrupted(folder: Path) -> list[str]:
    """Weight of the last round on the truly corrupted sites, and what they would have by their number of examples."""
    corrupted = {site for site, info in of_run(folder)[1].items() if info.get("is_noisy")}
    examples = {site: float(n) for site, n in train_examples(read_history(folder)).items()}
    return [shown(share_of(noted(folder, "weights"), corrupted)), shown(share_of(examples, corrupted))]


def sharpness_ratio(folder: Path) -> list[str]:
    """Mean sharpness of the corrupted sites over that of the clean ones, in the last round."""
    truth, sharpness = of_run(folder)[1], noted(folder, "sharpness")
    means = [
        mean(v for site, v in sharpness.items() if truth.get(site, {}).get("is_noisy") == state)
        for state in (True, False)
    ]
    return [shown(means[0] / means[1] if means[1] else None)]


def worst_site(folder: Path) -> list[str]:
    """Value and name of the worst site in the last evaluation."""
    sites = read_json(folder / "summary.json").get("fairness", {}).get("sites", {})
    return ["–" if sites.get("worst_site") is None else f"{shown(sites['worst'])} ({sites['worst_site']})"]


def completeness_rank(folder: Path) -> list[str]:
    """Rank correlation between estimated and true completeness of the sites' annotations."""
    truth, estimated = of_run(folder)[1], noted(folder, "completeness")
    pairs = [(v, truth[site]["completeness"]) for site, v in estimated.items() if "completeness" in truth.get(site, {})]
    return [shown(rank_correlation([a for a, _ in pairs], [b for _, b in pairs]))]


def corrected(folder: Path) -> list[str]:
    """Sites that changed pixels of their masks, and how many pixels: the sites report what they have changed so far."""
    changed: dict[str, int] = {}
    for record in of_phase(read_history(folder), "train"):
        site, pixels = str(record["site"]), record["metrics"].get("n_corrected_pixels") or 0
        changed[site] = max(changed.get(site, 0), int(pixels))
    counts = [n for n in changed.values() if n]
    return [str(len(counts)), str(sum(counts))]


def tags(folder: Path) -> list[str]:
    """FedMLP's pseudo-labels against the reference: share of true ones among the positive and the negative tags, beside that of chance."""
    pairs = [pair for path in sorted(folder.glob("sites/*/personal")) for pair in site_tags(folder, path)]
    if not pairs:
        return ["–"] * 4
    positive, negative = ([truth for tag, truth in pairs if tag == kind] for kind in (2, 1))
    chance = mean(float(truth) for _, truth in pairs)
    right = mean(map(float, positive)), 1.0 - mean(map(float, negative))
    return [
        f"{shown(right[0])} of {len(positive)}",
        shown(chance),
        f"{shown(right[1])} of {len(negative)}",
        shown(1.0 - chance),
    ]


def site_tags(folder: Path, personal: Path) -> list[tuple[int, int]]:
    """(tag, true label) of every training item and class a site does not annotate; 0 no tag, 1 negative, 2 positive."""
    import h5py

    from clients.missing_classes import TAGS
    from fedmed.config import folder_name, load_config
    from fedmed.data.site_file import SiteFile
    from fedmed.engines.prepare import site_file
    from fedmed.federation.checkpoint import read_safetensors

    kept = read_safetensors(max(personal.glob("round-*")) / "personal.safetensors").get(TAGS)
    if kept is None:
        return []
    path = site_file(load_config(folder / "config.yaml"))
    with SiteFile.open(path) as file, h5py.File(path, "r") as raw:
        info = next(i for i in file.sites if folder_name(i.name) == personal.parent.name)
        group, rows = raw[info.group], file.site(info.name).split("train").index.numpy()
        missing = group["active_classes"][()][rows] == 0
        truth = group["reference"]["label"][()][rows]
    return list(zip(kept.numpy()[missing].tolist(), truth[missing].tolist(), strict=True))


FINDINGS = {
    "noisy": Finding(("precision", "recall", "groups", "largest weight"), noisy),
    "weight_on_corrupted": Finding(("weight on corrupted", "their share of examples"), weight_on_corrupted),
    "sharpness_ratio": Finding(("sharpness corrupted / clean",), sharpness_ratio),
    "worst_site": Finding(("worst site",), worst_site),
    "completeness_rank": Finding(("rank correlation of completeness",), completeness_rank),
    "tags": Finding(("positive tags right", "chance", "negative tags right", "chance"), tags),
    "corrected": Finding(("sites that corrected", "pixels"), corrected),
}


def main() -> int:
    """Run the comparison and write `tables.md` into --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a file of experiments/compare, without .yaml")
    parser.add_argument("--data", required=True, help="site file")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = (options.out or Path("results") / options.name).resolve()
    comparison = load_comparison(options.name)
    jobs = jobs_of(comparison, str(Path(options.data).resolve()), options.seeds, out)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run_one, comparison["base"], words): key for key, words in jobs.items()}
        for done, future in enumerate(as_completed(futures), 1):
            print(
                f"{done}/{len(futures)} {' '.join(map(str, futures[future]))}: {future.result():.0f} s",
                file=sys.stderr,
                flush=True,
            )
    text = tables(comparison, list(jobs), out)
    (out / "tables.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
