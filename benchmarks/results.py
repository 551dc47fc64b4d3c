"""Run a comparison of experiments/compare/ on real data, several seeds, and print its tables as Markdown.

    python benchmarks/results.py fednoro --data ham10000_cls.h5 --seeds 5 --jobs 2 --out results/fednoro

Each (setting, arm, seed) is one ordinary run folder below --out; a finished one is not run again, so the command can be stopped and repeated.
The value of a run is the mean over its last rounds on the pooled clean test items.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fedmed.files import read_history, read_json


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


def value_of(folder: Path, metric: str, last: int) -> float:
    """Mean of a metric over the last rounds of a run, on the pooled clean test items."""
    values = [r["metrics"].get(f"test/global/{metric}") for r in read_history(folder) if r["phase"] == "central"]
    known = [v for v in values[-last:] if v is not None]
    return statistics.fmean(known) if known else float("nan")


def spread(values: list[float]) -> str:
    """mean ± sample standard deviation."""
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"


def tables(comparison: dict[str, Any], keys: list[tuple[str, str, int]], out: Path) -> str:
    """The Markdown tables of all settings."""
    metrics, last = comparison["metrics"], comparison["last_rounds"]
    arms = list(comparison["arms"])
    text = []
    for setting, content in comparison["settings"].items():
        seeds = sorted({seed for s, _, seed in keys if s == setting})
        rows = {}
        for arm in arms:
            where = setting if (setting, arm, 0) in keys else content.get("against", setting)
            rows[arm] = {m: [value_of(out / where / f"{arm}-{seed}", m, last) for seed in seeds] for m in metrics}
        text += [
            f"### {content['title']}",
            "",
            "| arm | " + " | ".join(metrics) + " |",
            "|---|" + "---|" * len(metrics),
        ]
        text += ["| " + " | ".join([arm, *(spread(rows[arm][m]) for m in metrics)]) + " |" for arm in arms]
        pairs = {m: [b - a for a, b in zip(rows[arms[0]][m], rows[arms[1]][m], strict=True)] for m in metrics}
        text += ["| difference | " + " | ".join(spread(pairs[m]) for m in metrics) + " |", ""]
        text += [
            "| seed | " + " | ".join(f"Δ {m}" for m in metrics) + " | precision | recall | groups | largest weight |",
            "|---|" + "---|" * (len(metrics) + 4),
        ]
        for i, seed in enumerate(seeds):
            text.append(
                f"| {seed} | "
                + " | ".join(f"{pairs[m][i]:+.3f}" for m in metrics)
                + " | "
                + " | ".join(findings(out / setting / f"{arms[1]}-{seed}"))
                + " |"
            )
        text.append("")
    return "\n".join(text)


def findings(folder: Path) -> list[str]:
    """Precision and recall of the sites believed noisy, group sizes and the largest weight, as table cells."""
    summary = read_json(folder / "summary.json")
    noisy, notes = summary["noisy_sites"], summary["notes"]
    shown = ["–" if noisy[k] is None else f"{noisy[k]:.2f}" for k in ("precision", "recall")]
    groups = ", ".join(f"{v} {k}" for k, v in sorted(notes.get("groups", {}).items()) if v)
    return [*shown, groups or "–", f"{notes['largest_weight']:.2f}" if "largest_weight" in notes else "–"]


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
