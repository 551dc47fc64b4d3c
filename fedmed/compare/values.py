"""What a metric of a comparison means: one number per run, and where sites were scored one per site.

A metric is a name on the pooled clean test items ("bacc"), on those under a condition ("test-corrupted/bacc"), or has a word
before a colon, a key of `KINDS` ("S:bacc"). Without pooled items a plain name means the mean over the sites. A run that has not
finished has no number (NaN).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedmed.config import load_config, nearest
from fedmed.errors import UserError
from fedmed.files import read_history, read_json
from fedmed.report.fairness import over_conditions
from fedmed.report.personal import personal_view
from fedmed.report.run_folder import RunFolder
from fedmed.report.values import Record, curve, mean, number, of_phase, tail
from fedmed.schema import lower_is_better

_OF_SUBSETS = ("mean", "spread", "worst")  # what may follow "subsets:"


def split_metric(metric: str) -> tuple[str, str]:
    """Give the word before the colon ("" where there is none) and the rest of a metric: "S:bacc" -> ("S", "bacc").

    Raises `UserError` for a word that is no kind, and for a rest that this kind cannot have in any run.
    """
    kind, _, name = metric.rpartition(":")
    if kind not in KINDS:
        words = [word for word in KINDS if word]
        raise UserError(f"metrics: {metric!r} begins with {kind!r}, which is no kind of metric{nearest(kind, words)}")
    if kind == "rare" and not (name.isdecimal() and int(name) > 0):
        raise UserError(f"metrics: {metric!r} needs a number of classes > 0 after the colon, as in 'rare:3'")
    if kind == "subsets" and name not in _OF_SUBSETS:
        raise UserError(f"metrics: {metric!r} asks for {name!r} of the subsets{nearest(name, _OF_SUBSETS)}")
    return kind, name


def smaller_is_better(metric: str) -> bool:
    """Whether small values of a metric are good: distances and losses, and how far conditions or subsets lie apart."""
    kind, name = split_metric(metric)
    return kind == "gap" or (kind, name) == ("subsets", "spread") or lower_is_better(name)


def value_of(folder: Path, metric: str, last: int) -> float:
    """Give the number of a run: the mean of a metric over its last `last` evaluations, undefined ones left out.

    G, S and subsets are those of the last round, as the run's summary has them. NaN for a folder without a finished run.
    """
    kind, name = split_metric(metric)
    return KINDS[kind](folder, name, last) if finished(folder) else math.nan


def site_values(folder: Path, metric: str, last: int) -> dict[str, float]:
    """Give the same for each site on its own test items: site -> value (NaN where undefined), sites by name.

    A plain name and `global:` take the global view, `S:` and `personal:` the personal one. {} where sites were not scored in
    this way (evaluation.sites=false, conditions, subsets, means over conditions) and for a folder without a finished run.
    """
    kind, name = split_metric(metric)
    scores = SITES.get(kind)
    return scores(folder, name, last) if scores is not None and finished(folder) else {}


def finished(folder: Path) -> bool:
    """Whether a folder holds a run that came to its end: the summary is written last."""
    files = RunFolder(folder)
    return files.summary.is_file() and files.history.is_file()


def check_known(metrics: Iterable[str], folders: Sequence[Path], complete: bool) -> None:
    """Raise `UserError` for a metric that none of the finished runs was scored by, naming the nearest one that is.

    While some runs are missing (`complete` false) only the last part of a name is judged: a run to come may have the view or
    condition that the others lack.
    """
    known = {metric for folder in folders if finished(folder) for metric in known_metrics(folder)}
    bases = {re.split("[:/]", metric)[-1] for metric in known}
    for metric in metrics:
        good = metric in known if complete else re.split("[:/]", metric)[-1] in bases
        if known and not good and split_metric(metric)[0] not in ("rare", "subsets"):
            raise UserError(f"metrics: no run of the comparison was scored by {metric!r}{nearest(metric, known)}")


def known_metrics(folder: Path) -> set[str]:
    """Metrics a finished run was scored by, in the words of a comparison; without those of single classes."""
    found: set[str] = set()
    pooled_items = bool(of_phase(history(folder), "central"))
    for phase in ("central", "evaluate"):
        for key in {key for record in of_phase(history(folder), phase) for key in record.get("metrics", {})}:
            match = re.fullmatch(r"(test[^/]*)/(global|personal)/(.+)", key)
            if match is None or re.search(r"_\d+$", key):
                continue
            split, view, name = match.groups()
            found |= {f"G:{name}", f"S:{name}"}
            if phase == "evaluate":
                found.add(f"{view}:{name}")
            if phase == "central" or (view == "global" and not pooled_items):
                found |= {f"mean:{name}", f"gap:{name}", name if split == "test" else f"{split}/{name}"}
    return found


def history(folder: Path) -> Sequence[Record]:
    """Records of a run, kept for the next question about the same folder while the file does not change."""
    path = RunFolder(folder).history
    state = path.stat()
    return _read(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=2)
def _read(path: Path, changed: int, size: int) -> Sequence[Record]:
    return read_history(path)


def _summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(RunFolder(folder).summary)
    return found


def _key(name: str, view: str = "global") -> str:
    """Full name in the history: "bacc" -> "test/global/bacc", "test-corrupted/bacc" -> "test-corrupted/global/bacc"."""
    split, _, short = name.rpartition("/")
    return f"{split or 'test'}/{view}/{short}"


def _tails(folder: Path, key: str, phase: str, last: int) -> dict[str, float]:
    """Mean of a metric over the last evaluations of a phase, by site ("central" for the pooled items); {} without it."""
    records = history(folder)
    rounds = sorted({int(r["round"]) for r in of_phase(records, phase)})[-last:]
    lines = curve(records, key, phase)
    return {site: mean(line.get(r, math.nan) for r in rounds) for site, line in sorted(lines.items())}


def pooled(folder: Path, name: str, last: int) -> float:
    """Of the global model on the pooled test items, clean or under the condition the name begins with.

    Where the coordinator has no test items (real sites) it is the mean over the sites, as `global:` gives it.
    """
    if not of_phase(history(folder), "central"):
        return view_mean("global")(folder, name, last)
    return _tails(folder, _key(name), "central", last).get("central", math.nan)


def conditions_mean(folder: Path, name: str, last: int) -> float:
    """Mean over the clean items and all conditions, after averaging over rounds; NaN while one is undefined."""
    return number(over_conditions(history(folder), name, last)["mean"])


def conditions_gap(folder: Path, name: str, last: int) -> float:
    """Best minus worst of the clean items and all conditions, >= 0; NaN for fewer than two."""
    return number(over_conditions(history(folder), name, last)["gap"])


def rare_recall(folder: Path, count: str, last: int) -> float:
    """Mean recall of the `count` classes with the fewest training items at all sites together, on the pooled test items.

    NaN over real sites, whose counts stay with them.
    """
    from fedmed.data.site_file import SiteFile
    from fedmed.engines.prepare import site_file

    config = load_config(RunFolder(folder).config)
    if not config.data.path:
        return math.nan
    with SiteFile.open(site_file(config)) as file:
        splits = [file.site(info.name, allow_empty_train=True).split("train") for info in file.sites]
        counts: Any = sum(split.class_counts() for split in splits)
    return mean(pooled(folder, f"recall_{c}", last) for c in counts.argsort(kind="stable")[: int(count)])


def generalisation(folder: Path, name: str, last: int) -> float:
    """G of a run with personal models; of a run without: its global model on the pooled test items, last round."""
    pairs = _summary(folder).get("personal") or {}
    return number(pairs[name]["G"]) if name in pairs else pooled(folder, name, 1)


def specialisation(folder: Path, name: str, last: int) -> float:
    """S of a run with personal models; of a run without: the mean of its sites' own scores of the global model."""
    pairs = _summary(folder).get("personal") or {}
    return number(pairs[name]["S"]) if name in pairs else mean(own_scores(folder, name, last).values())


def own_scores(folder: Path, name: str, last: int) -> dict[str, float]:
    """Scores of which S is the mean. The summary pairs only metrics of which more is better; the records have all of them."""
    found = _summary(folder)
    pairs = found.get("personal") or {}
    if name in pairs:
        return {site: number(views.get("personal")) for site, views in pairs[name].get("sites", {}).items()}
    mode = load_config(RunFolder(folder).config).evaluation.mode if pairs else ""
    own = personal_view(history(folder), name, mode) if pairs else {}
    return own or {site: number(scores[name]) for site, scores in found.get("sites", {}).items() if name in scores}


def global_scores(folder: Path, name: str, last: int) -> dict[str, float]:
    """Scores of the global model at the sites in the last round, those that belong to G."""
    return _tails(folder, _key(name), "evaluate", 1)


def view_mean(view: str) -> Callable[[Path, str, int], float]:
    """Mean over the last evaluations of the mean over the sites of their own scores of one view; NaN without the view.

    Runs of evaluation.mode=separate. An arm with federation.local_only=true has the view personal only: what its sites reach
    alone.
    """
    return lambda folder, name, last: mean(tail(history(folder), _key(name, view), "evaluate", last))


def view_scores(view: str) -> Callable[[Path, str, int], dict[str, float]]:
    """Scores of the sites in one view, each the mean over the last evaluations."""
    return lambda folder, name, last: _tails(folder, _key(name, view), "evaluate", last)


def subset_score(folder: Path, which: str, last: int) -> float:
    """mean, spread or worst over the subsets of the modalities, last round; NaN for a run that was not scored on them."""
    return number((_summary(folder).get("subsets") or {}).get(which))


# Word before the colon -> function of (run folder, what follows the colon, last evaluations) that gives the value of a run.
KINDS: dict[str, Callable[[Path, str, int], float]] = {
    "": pooled,
    "mean": conditions_mean,
    "gap": conditions_gap,
    "rare": rare_recall,
    "G": generalisation,
    "S": specialisation,
    "global": view_mean("global"),
    "personal": view_mean("personal"),
    "subsets": subset_score,
}

# The same for the values of the sites, where there are any.
SITES: dict[str, Callable[[Path, str, int], dict[str, float]]] = {
    "": view_scores("global"),
    "G": global_scores,
    "S": own_scores,
    "global": view_scores("global"),
    "personal": view_scores("personal"),
}
