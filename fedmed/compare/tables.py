"""Tables of a comparison, from the content of `comparison.json`: Markdown, terminal, CSV. Nothing is read or written here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedmed.compare.statistics import outcome
from fedmed.compare.values import smaller_is_better
from fedmed.report.tables import Rows, markdown_table, text_table
from fedmed.report.values import number

DASH, TIED, DOWN = "–", "†", "↓"
Comparison = Mapping[str, Any]
Result = Mapping[str, Any]
Mark = Callable[[str, bool, bool], str]  # (text, best, tied) -> cell

# Below all tables; {} is the baseline.
EXPLAINED = (
    "Differences are from {}, paired by seed, with the 95 % t-interval of their mean. p: Wilcoxon signed-rank test over the pairs, "
    "adjusted by Holm over the arms of a setting; sites of one seed share a model, so p over seed x site is too small rather than too large."
)


class Table(NamedTuple):
    """One table and the line that explains its signs ("" for none)."""

    header: list[str]
    rows: Rows
    note: str = ""


def fixed(value: Any, signed: bool = False) -> str:
    """A number with three digits after the point, two from 10 on; a dash where it is undefined."""
    value = number(value)
    if math.isnan(value):
        return DASH
    return f"{value:{'+' if signed else ''}.{2 if round(abs(value), 3) >= 10 else 3}f}"


def probability(p: float | None) -> str:
    """A p-value with three digits, "<0.001" below."""
    return DASH if p is None else "<0.001" if p < 0.0005 else f"{p:.3f}"


def interval(low: Any, high: Any) -> str:
    """An interval with signs; a dash without one."""
    return DASH if math.isnan(number(low)) else f"[{fixed(low, True)}, {fixed(high, True)}]"


def spread(result: Result) -> str:
    """Mean ± sample standard deviation of a result, and of how many seeds if some are undefined."""
    if result["mean"] is None:
        return DASH
    known = sum(v is not None for v in result["values"].values())
    text = fixed(result["mean"]) + ("" if result["sd"] is None else f" ± {fixed(result['sd'])}")
    return text if known == len(result["values"]) else f"{text} ({known} of {len(result['values'])})"


def of_setting(comparison: Comparison, setting: str) -> dict[str, dict[str, Result]]:
    """Results of a setting as arm -> metric -> result, in their order."""
    found: dict[str, dict[str, Result]] = {}
    for result in comparison["results"]:
        if result["setting"] == setting:
            found.setdefault(result["arm"], {})[result["metric"]] = result
    return found


def heading(metric: str) -> str:
    """Name of a metric above its column, with an arrow where small values are good."""
    return f"{metric} {DOWN}" if smaller_is_better(metric) else metric


def arm_table(comparison: Comparison, setting: str, mark: Mark, best: str) -> Table:
    """Arms by metrics, "mean ± sd"; `mark` sets off the best and the tied, `best` says how the best looks."""
    arms, metrics = of_setting(comparison, setting), comparison["metrics"]
    alone = len(arms) < 2  # nobody to be better than
    rows = [
        [arm, *(mark(spread(r[m]), r[m]["best"] and not alone, r[m]["tied"]) for m in metrics)]
        for arm, r in arms.items()
    ]
    several = any(result["sd"] is not None for found in arms.values() for result in found.values())
    words = ["mean ± standard deviation over seeds"] if several else []
    words += [f"{best}: best mean"] if len(arms) > 1 else []
    if any(result["tied"] for found in arms.values() for result in found.values()):
        words.append(f"{TIED}: the 95 % interval of the paired difference from the best contains 0")
    words += [f"{DOWN}: small values are good"] if any(map(smaller_is_better, metrics)) else []
    note = "; ".join(words)
    return Table(["arm", *map(heading, metrics)], rows, f"{note[0].upper()}{note[1:]}." if note else "")


def difference_table(comparison: Comparison, setting: str) -> Table:
    """Differences from the baseline, a row per arm and metric; `EXPLAINED` says what the columns are."""
    rows = []
    for arm, found in of_setting(comparison, setting).items():
        for metric in comparison["metrics"]:
            gap = found[metric]["difference"]
            if gap is None:
                continue
            pairs = f"{gap['pairs']} {gap['per']}" if gap["pairs"] else DASH
            counts = f"{gap['wins']} / {gap['ties']} / {gap['losses']}" if gap["pairs"] else DASH
            shown = fixed(gap["mean"], True) + (
                f" ({gap['seeds']} of {gap['seeds'] + gap['missing']})" if gap["missing"] and gap["seeds"] else ""
            )
            rows.append(
                [
                    arm,
                    heading(metric),
                    shown,
                    interval(gap["low"], gap["high"]),
                    probability(gap["p_holm"]),
                    pairs,
                    counts,
                ]
            )
    return Table(["arm", "metric", "difference", "95 % interval", "p (Holm)", "pairs", "better / equal / worse"], rows)


def seed_table(comparison: Comparison, setting: str) -> Table:
    """Difference from the baseline and findings, one row per arm and seed; the arms are named where there are several."""
    arms = of_setting(comparison, setting)
    metrics = comparison.get("seed_metrics") or comparison["metrics"]
    findings = {(f["arm"], str(f["seed"])): f for f in comparison.get("findings", []) if f["setting"] == setting}
    base, others = arms.get(comparison["baseline"], {}), [arm for arm in arms if arm != comparison["baseline"]]
    named = len(others) > 1
    columns = next((list(f["columns"]) for f in findings.values()), [])
    rows: Rows = []
    for arm in others:
        for seed in next(iter(arms[arm].values()))["values"]:
            gains = [number(arms[arm][m]["values"][seed]) - number(base[m]["values"].get(seed)) for m in metrics]
            cells = findings.get((arm, seed), {}).get("cells", [DASH] * len(columns))
            rows.append([*([arm] if named else []), seed, *(fixed(gain, True) for gain in gains), *cells])
    return Table([*(["arm"] if named else []), "seed", *(f"Δ {heading(m)}" for m in metrics), *columns], rows)


def settings_table(comparison: Comparison) -> Table:
    """Settings in which an arm is better, not shown to differ, and worse; no rows for a single setting."""
    counts = {(c["arm"], c["metric"]): f"{c['wins']} / {c['ties']} / {c['losses']}" for c in comparison["win_tie_loss"]}
    arms, metrics = dict.fromkeys(arm for arm, _ in counts), comparison["metrics"]
    rows = [[arm, *(counts.get((arm, m), DASH) for m in metrics)] for arm in arms]
    return Table(["arm", *map(heading, metrics)], rows if len(comparison["settings"]) > 1 else [])


def origin(comparison: Comparison, quote: str = "`") -> str:
    """What made the tables: command, runs, data, engine, versions."""
    cells = comparison.get("cells", [])
    done = sum(cell["state"] == "done" for cell in cells)
    runs = f"{len(cells)} runs" if done == len(cells) else f"{done} of {len(cells)} runs"
    versions = ", ".join(f"{name} {version}" for name, version in comparison.get("versions", {}).items())
    data = [f"data {comparison['data']}"] if comparison["data"] else []  # real sites have their own
    parts = [runs, *data, f"engine {comparison['engine']}", *([versions] if versions else [])]
    return f"Made by {quote}{comparison['command']}{quote}: {'; '.join(parts)}."


def _sections(comparison: Comparison, mark: Mark, best: str) -> list[tuple[str, list[Table]]]:
    """All tables under their titles, the empty ones left out."""
    found = []
    for setting in comparison["settings"]:
        name = setting["name"]
        tables = [
            arm_table(comparison, name, mark, best),
            difference_table(comparison, name),
            seed_table(comparison, name),
        ]
        found.append((str(setting["title"]), [t for t in tables if t.rows]))
    title = f"Settings in which an arm is better / not shown to differ / worse than {comparison['baseline']}"
    overall = settings_table(comparison)
    return found + ([(title, [overall])] if overall.rows else [])


def _closing(comparison: Comparison, quote: str) -> list[str]:
    explained = any(result["difference"] for result in comparison["results"])
    return [*([EXPLAINED.format(comparison["baseline"])] if explained else []), origin(comparison, quote)]


def markdown(comparison: Comparison) -> str:
    """All tables as Markdown, under one heading for the comparison and one for each setting."""

    def mark(text: str, best: bool, tied: bool) -> str:
        return f"**{text}**" if best else f"{text} {TIED}" if tied else text

    parts = [f"## {comparison['name']}, {comparison['variant']}", comparison.get("description", "")]
    for title, tables in _sections(comparison, mark, "bold"):
        parts.append(f"### {title}")
        for table in tables:
            parts += [markdown_table(table.header, table.rows), table.note]
    return "\n\n".join(part for part in [*parts, *_closing(comparison, "`")] if part) + "\n"


def text(comparison: Comparison) -> str:
    """All tables for the terminal, in aligned columns."""

    def mark(text: str, best: bool, tied: bool) -> str:
        return f"{text} {'*' if best else TIED if tied else ' '}"  # a place for the sign keeps the columns aligned

    parts = [f"{comparison['name']}, {comparison['variant']}"]
    for title, tables in _sections(comparison, mark, "*"):
        shown = [text_table(t.header, t.rows) + (f"\n{t.note}" if t.note else "") for t in tables]
        parts += [f"{title}\n\n{shown[0]}" if shown else title, *shown[1:]]
    return "\n\n".join([*parts, "\n".join(_closing(comparison, ""))])


def csv_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Every value as one row: setting, arm, metric, seed, site (empty: the value of the run), value (None: undefined)."""
    rows = []
    for result in comparison["results"]:
        head = {key: result[key] for key in ("setting", "arm", "metric")}
        for seed, value in result["values"].items():
            rows.append({**head, "seed": seed, "site": "", "value": value})
            sites = result["sites"].get(seed, {})
            rows += [{**head, "seed": seed, "site": site, "value": score} for site, score in sites.items()]
    return rows


def sentence(result: Result) -> str:
    """Say in one line what a result shows against the baseline: "mine: bacc -.030 [-.092, +.032], no difference shown over 5 seeds"."""

    def short(value: Any) -> str:
        return fixed(value, True).replace("0.", ".", 1) if abs(number(value)) < 1 else fixed(value, True)

    gap, name = result["difference"], f"{result['arm']}: {result['metric']}"
    if gap is None:
        return f"{name} {fixed(result['mean'])}, the baseline"
    if not gap["seeds"]:
        return f"{name} not compared: no seed has both values"
    if gap["low"] is None:
        return f"{name} {short(gap['mean'])}, one seed shows no more than a direction"
    sign = outcome(gap["low"], gap["high"], smaller_is_better(result["metric"]))
    verdict = {1: "better", 0: "no difference shown", -1: "worse"}[sign]
    return (
        f"{name} {short(gap['mean'])} [{short(gap['low'])}, {short(gap['high'])}], {verdict} over {gap['seeds']} seeds"
    )
