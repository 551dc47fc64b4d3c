"""Tables for the terminal and for Markdown, from the summary of a run. Text in, text out; nothing is read or written
here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedmed.report.fairness import CLEAN, CORRUPTED, balance
from fedmed.report.values import mean, number, spread, tail, worst
from fedmed.schema import lower_is_better

Rows = list[list[str]]

_NO_METRIC = ("n", "round", "both_empty")  # counts that have no better or worse
_MAX_METRICS = 5  # columns beyond these make a terminal line wrap


def show(value: Any, digits: int = 3) -> str:
    """Format a number for a table: fixed digits, integers plain, "-" for undefined or absent."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def clock(seconds: float) -> str:
    """Format seconds as "8.1 s", "4:05" (minutes) or "1:02:30" (hours)."""
    if math.isnan(seconds):
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], rules: Sequence[int] = ()) -> str:
    """Align a table for the terminal: first column left, the others right; a rule under the header and before each row
    in `rules`.
    """
    widths = [max(len(str(line[i])) for line in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (str(c) for c in cells)
        return "  ".join(
            [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
        ).rstrip()

    rule = "  ".join("-" * w for w in widths)
    lines = [line(header), rule]
    for index, row in enumerate(rows):
        lines += [rule] if index in rules else []
        lines.append(line(row))
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format the same table for Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"

    align = "|" + "|".join([" :-- ", *[" --: "] * (len(header) - 1)]) + "|"
    return "\n".join([line(header), align, *(line(row) for row in rows)])


def _metric_columns(summary: Mapping[str, Any]) -> list[str]:
    """Short metric names of the sites, the main one first; full names (other views) and per-class ones come only if
    there is room.
    """
    seen = dict.fromkeys(
        key
        for result in summary["sites"].values()
        for key, value in result.items()
        if key not in _NO_METRIC and "/" not in key and isinstance(value, (int, float, type(None)))
    )
    main = summary.get("main_metric")
    others = [name for name in seen if name != main and not re.search(r"[_.]\d+$", name)]
    return ([main] if main in seen else []) + others[: _MAX_METRICS - 1]


def site_table(summary: Mapping[str, Any]) -> tuple[list[str], Rows, int]:
    """Give header, rows and the number of site rows: one row per site with n and its metrics, then mean, worst and
    spread.

    A site known to be corrupted or believed noisy gets a mark column when there is anything to mark.
    """
    metrics = _metric_columns(summary)
    noisy = summary.get("noisy_sites", {})
    believed, true = set(noisy.get("believed", ())), set(noisy.get("true", ()))
    marked = bool(believed or true)
    header = ["site", "n", *metrics, *(["noisy"] if marked else [])]
    rows: Rows = []
    for site, result in summary["sites"].items():
        row = [site, show(result.get("n")), *(show(number(result.get(m)) if m in result else None) for m in metrics)]
        words = [word for word, group in (("true", true), ("believed", believed)) if site in group]
        rows.append(row + ([" + ".join(words)] if marked else []))
    for label, rule in (("mean", lambda _, v: mean(v)), ("worst", worst), ("spread", lambda _, v: spread(v))):
        row = [label, ""]
        row += [show(rule(m, [number(r.get(m)) for r in summary["sites"].values()])) for m in metrics]
        rows.append(row + ([""] if marked else []))
    return header, rows, len(summary["sites"])


def facts(summary: Mapping[str, Any]) -> list[str]:
    """Lines that belong under the table: central result, noisy sites found, failures, time."""
    lines: list[str] = []
    metric, prefix = summary.get("main_metric"), summary.get("judged_by")
    central = summary.get("central", {})
    for which, label in (
        ("last", "central test, last round"),
        ("selected", "central test, round chosen on validation"),
    ):
        values = central.get(which) or {}
        key = f"{prefix}/{metric}"
        if key in values:
            lines.append(f"{label} ({show(values.get('round'))}): {metric} {show(number(values[key]))}")
    noisy = summary.get("noisy_sites", {})
    words: list[str] = []
    if noisy.get("believed") or "believed_noisy" in summary.get("notes", {}):  # a method that never judges says nothing
        words.append(f"believed noisy: {', '.join(noisy.get('believed', ())) or 'none'}")
    if noisy.get("true"):
        words.append(f"truly noisy: {', '.join(noisy['true'])}")
    if noisy.get("precision") is not None or noisy.get("recall") is not None:
        words.append(f"precision {show(noisy['precision'], 2)}, recall {show(noisy['recall'], 2)}")
    if words:
        lines.append("; ".join(words))
    failed = summary.get("failures", [])
    if failed:
        last = failed[-1]
        lines.append(
            f"failed answers: {len(failed)}; the last: round {last['round']}, {last['phase']}, "
            f"{last['site']}: {last['reason']}"
        )
    lines.append(f"{summary.get('rounds', 0)} rounds in {clock(number(summary.get('seconds')))}")
    return lines


def _conditions(summary: Mapping[str, Any]) -> list[str]:
    """Names of the conditions the central items were scored under, without the clean one; [] for summaries of old."""
    return [name for name in summary.get("fairness", {}).get("by_condition", {}) if name != CLEAN]


def fairness_table(summary: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """Give header and rows on clean and degraded test items, and on sites with clean and corrupted training data.

    No rows when there is nothing to show: no condition was scored, and no truth that has both kinds of sites.
    """
    found = summary.get("fairness", {})
    groups = {name: number(v) for name, v in found.get("sites", {}).get("by_group", {}).items()}
    grouped = bool(groups) and not any(math.isnan(v) for v in groups.values())
    rows: list[tuple[str, Mapping[str, Any], Any, Any]] = []
    if _conditions(summary):
        later = found["tail"]
        rows.append(("central test, last round", found["by_condition"], found["mean"], found["gap"]))
        if later["last_rounds"] > 1:
            label = f"central test, last {later['last_rounds']} evaluations"
            rows.append((label, later["by_condition"], later["mean"], later["gap"]))
    if grouped:
        rows.append(("sites, by their training data", groups, *balance(groups)))
    columns = list(dict.fromkeys([CLEAN, *_conditions(summary), *([CORRUPTED] if grouped else [])]))
    header = [f"fairness ({summary.get('main_metric')})", *columns, "mean", "gap"]
    return header, [
        [label, *(show(number(values.get(c))) for c in columns), show(number(middle)), show(number(gap))]
        for label, values, middle, gap in rows
    ]


def worst_site(summary: Mapping[str, Any]) -> str:
    """Name and value of the worst site, and whether its training data are corrupted; "-" without one."""
    sites = summary.get("fairness", {}).get("sites", {})
    name = sites.get("worst_site")
    if name is None:
        return "-"
    corrupted = bool(summary.get("truth", {}).get(name, {}).get("is_noisy"))
    return f"{name} ({show(number(sites['worst']))}{', ' + CORRUPTED if corrupted else ''})"


def subset_table(summary: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """Give header and rows of the scores on the subsets of the modalities, their mean, worst and spread; no rows without any."""
    found = summary.get("subsets") or {}
    origin = {"central": "central test", "sites": "mean of sites"}.get(found.get("from", ""), "")
    rows = [[name, show(number(value))] for name, value in found.get("by_subset", {}).items()]
    if rows:
        rows += [[label, show(number(found[label]))] for label in ("mean", "worst", "spread")]
    return ["modalities", f"{found.get('metric')} ({origin})"], rows


def weight_table(summary: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """Give header and rows of the weights in the last round beside the shares of the training items; no rows without
    weights in the notes.
    """
    weights = summary.get("notes", {}).get("weights")
    header = ["site", "weight", "share of items", "noisy"]
    if not isinstance(weights, Mapping):
        return header, []
    examples = {site: number(n) for site, n in summary.get("examples", {}).items()}
    total = math.fsum(examples.values())
    truth = summary.get("truth", {})
    rows: Rows = []
    for site, weight in weights.items():
        share = examples.get(site, math.nan) / total if total else math.nan
        mark = "true" if truth.get(site, {}).get("is_noisy") else ""
        rows.append([str(site), show(number(weight)), show(share), mark])
    return header, rows


_ORIGINS = {
    "central": "central test set",
    "sites": "mean of sites",
    "trained": "models just trained",
    "received": "received model and what each site keeps",
    "alone": "each trained alone",
}


def pair_table(summary: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """Give header and rows of generalisation G, specialisation S and their means, a row per metric, the main one first.

    With L of the sites trained alone where it is known. No rows for a method without a personal view.
    """
    found = summary.get("personal", {})
    main = summary.get("main_metric")
    names = sorted(found, key=lambda name: name != main)  # stable: the others as reported
    alone = {"L": "L (local-only)"} if any("L" in scores for scores in found.values()) else {}
    columns = {"G": "G (global)", "S": "S (personal)", **alone, "mean": "mean", "harmonic": "harmonic mean"}
    rows = [[name, *(show(number(found[name][key])) for key in columns)] for name in names]
    return ["personalised", *columns.values()], rows


def personal_table(summary: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """Give header and rows of the views at each site, in the main metric; no rows without a personal view.

    Global, personal, and where it is known what the site reaches alone.
    """
    metric = summary.get("main_metric")
    found = summary.get("personal", {}).get(metric, {})
    columns = {"global": "global", "personal": "personal"} | ({"local": "local-only"} if "L" in found else {})
    rows = [
        [site, *(show(number(values[view])) for view in columns)] for site, values in found.get("sites", {}).items()
    ]
    return [f"site ({metric})", *columns.values()], rows


def personal_origin(summary: Mapping[str, Any]) -> str:
    """Say what G, S and L were scored on; "" for a method without a personal view."""
    found = summary.get("personal", {})
    if not found:
        return ""
    first = found.get(summary.get("main_metric")) or next(iter(found.values()))
    where = _ORIGINS.get(first["G_from"], "no global view was scored")
    beside = f"; L: mean of sites, {_ORIGINS['alone']}" if "L" in first else ""
    return f"G: {where}; S: mean of sites, {_ORIGINS[first['S_from']]}{beside}"


def render(summary: Mapping[str, Any]) -> str:
    """Give the closing text of a run for the terminal: per-site table, the facts under it, fairness, and both views."""
    if not summary["sites"]:
        return "\n".join(["no site took part", *facts(summary)])
    header, rows, num_sites = site_table(summary)
    judged = f" ({summary['judged_by']})" if summary.get("judged_by") else ""
    parts = [f"{summary['name']}{judged}", text_table(header, rows, rules=(num_sites,)), *facts(summary)]
    header, rows = fairness_table(summary)
    if rows:
        parts += [text_table(header, rows), f"worst site: {worst_site(summary)}"]
    header, rows = subset_table(summary)
    parts += [text_table(header, rows, rules=(len(rows) - 3,))] if rows else []
    for table in (pair_table, personal_table):
        header, rows = table(summary)
        parts += [text_table(header, rows)] if rows else []
    parts += [personal_origin(summary)] if personal_origin(summary) else []
    return "\n".join(parts)


def _central_value(summary: Mapping[str, Any], metric: str) -> float:
    return number((summary.get("central", {}).get("last") or {}).get(f"{summary.get('judged_by')}/{metric}"))


def comparison_table(summaries: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], Rows]:
    """Give header and rows that compare arms on the main metric of the first: sites, central test set, time.

    Where an arm was scored under conditions there is a column for each, one for the gap, and the worst site has a name.
    """
    metric = next(iter(summaries.values())).get("main_metric") or "metric"
    conditions = list(dict.fromkeys(name for summary in summaries.values() for name in _conditions(summary)))
    extra = [f"{name} test" for name in conditions] + (["gap"] if conditions else [])
    header = ["arm", f"{metric} (mean of sites)", "worst site", "spread", "central test", *extra, "rounds", "time"]
    rows: Rows = []
    for name, summary in summaries.items():
        values = [number(result.get(metric)) for result in summary["sites"].values()]
        lowest = worst_site(summary) if conditions else show(worst(metric, values))
        cells = [show(mean(values)), lowest, show(spread(values)), show(_central_value(summary, metric))]
        if conditions:
            found = summary.get("fairness", {})
            shown = [*(found.get("by_condition", {}).get(c) for c in conditions), found.get("gap")]
            cells += [show(number(v)) for v in shown]
        rows.append([name, *cells, show(summary.get("rounds")), clock(number(summary.get("seconds")))])
    return header, rows


def _compare(name: str, values: Sequence[float], base: str, base_values: Sequence[float], metric: str) -> str:
    """Say how the last evaluations of an arm compare with those of the baseline, and whether they agree with one
    another.
    """
    gains = [a - b for a, b in zip(values, base_values, strict=False)]
    gain = math.fsum(gains) / len(gains) if gains else math.nan
    if math.isnan(gain):
        return f"{name} cannot be compared with {base}: undefined values"
    if round(abs(gain), 3) == 0:
        return f"{name} equals {base} to three digits"
    better = (gain < 0) == lower_is_better(metric)
    mixed = min(gains) < 0 < max(gains)
    words = f"{name} is {'better' if better else 'worse'} than {base} by {abs(gain):.3f}"
    return words + (", but not in each of these evaluations" if mixed else "")


def verdict(histories: Mapping[str, Sequence[Mapping[str, Any]]], key: str | None, last: int = 3) -> str:
    """Say in two sentences what a comparison of arms shows, and how little one run shows; the first arm is the
    baseline.

    `key` is the full name of the metric ("test/global/dice"). What counts is its mean over the last evaluations, which
    moves less than the last value alone, on the central test set where every arm has one, else averaged over sites.
    """
    names = list(histories)
    if len(names) < 2:
        return "One arm only: nothing to compare."
    if key is None:
        return "Nothing was evaluated: nothing to compare."
    central = all(tail(history, key, "central") for history in histories.values())
    tails = {
        name: tail(history, key, "central" if central else "evaluate", last) for name, history in histories.items()
    }
    count = max(len(values) for values in tails.values())
    what = f"{key.rsplit('/', 1)[-1]} {'on the central test set' if central else '(mean of sites)'}"
    base = names[0]
    parts = [_compare(name, tails[name], base, tails[base], key) for name in names[1:]]
    return (
        f"In {what}, averaged over the last {count} evaluations: {'; '.join(parts)}. "
        "One seed each, so this can be chance: repeat it with other seeds before believing it."
    )
