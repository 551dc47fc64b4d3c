"""Figures of a comparison: differences with intervals, a dot per seed, curves with bands, sites from worst to best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedmed.report.page.comparison_data import Lines, interval, signed, smaller_is_better
from fedmed.report.page.parts import Figure
from fedmed.report.page.plots import drawn, last_of
from fedmed.report.page.svg import INK, MUTED, colour, dash, plain, series_id
from fedmed.report.tables import show
from fedmed.report.values import mean, mean_curve, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Numbers = Mapping[str, int]


def _arm_axis(axes: Axes, arms: Sequence[str]) -> None:
    """Arms from top to bottom."""
    axes.set_yticks(range(len(arms)), [plain(arm, 22) for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def _height(arms: Sequence[str]) -> float:
    return 1.1 + 0.32 * len(arms)


def _good_side(metric: str) -> str:
    return "left" if smaller_is_better(metric) else "right"


def forest(
    name: str, metric: str, gaps: Mapping[str, Mapping[str, Any]], numbers: Numbers, baseline: str, limit: float
) -> Figure:
    """Differences from the baseline with their intervals, an arm per row. `limit`: largest distance from 0, shared by all settings."""
    arms = list(gaps)

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=MUTED, linewidth=1.2)
        for row, arm in enumerate(arms):
            low, middle, high = (number(gaps[arm].get(key)) for key in ("low", "mean", "high"))
            shade = colour(numbers[arm])
            if not math.isnan(low) and not math.isnan(high):
                axes.plot([low, high], [row, row], linewidth=2.2, color=shade).pop().set_gid(series_id(numbers[arm]))
            if not math.isnan(middle):
                axes.plot([middle], [row], marker="s", markersize=6, color=shade).pop().set_gid(series_id(numbers[arm]))
        _arm_axis(axes, arms)
        if limit > 0:
            axes.set_xlim(-1.08 * limit, 1.08 * limit)
        axes.locator_params(axis="x", nbins=5)
        axes.set_title(f"difference in {metric} from {plain(baseline, 22)}")

    said = "; ".join(f"{arm} {signed(gap.get('mean'))}, interval {interval(gap)}" for arm, gap in gaps.items())
    caption = (
        f"Difference from {baseline}: mean over the seeds and its interval; to the {_good_side(metric)} is better."
    )
    return drawn(name, _height(arms), f"Differences in {metric} from {baseline}", f"{said}.", caption, draw)


def dots(name: str, metric: str, values: Mapping[str, Mapping[str, Any]], numbers: Numbers) -> Figure:
    """A dot per seed and a bar at the mean, an arm per row; grey lines join the dots of one seed."""
    arms = list(values)
    by_arm = {arm: {seed: number(v) for seed, v in found.items()} for arm, found in values.items()}
    seeds = list(dict.fromkeys(seed for found in by_arm.values() for seed in found))

    def draw(axes: Axes) -> None:
        for seed in seeds:
            line = [by_arm[arm].get(seed, math.nan) for arm in arms]
            axes.plot(line, range(len(arms)), color=MUTED, linewidth=0.7, alpha=0.45)
        for row, arm in enumerate(arms):
            known = [v for v in by_arm[arm].values() if not math.isnan(v)]
            points = axes.plot(known, [row] * len(known), "o", markersize=5, color=colour(numbers[arm]))
            points[0].set_gid(series_id(numbers[arm]))
            if known:
                axes.plot([mean(known)], [row], marker="|", markersize=17, markeredgewidth=2.2, color=INK)
        _arm_axis(axes, arms)
        axes.locator_params(axis="x", nbins=6)
        axes.set_title(f"{metric} by seed")

    said = "; ".join(
        f"{arm}: {', '.join(f'seed {seed} {show(v)}' for seed, v in found.items())}, mean {show(mean(found.values()))}"
        for arm, found in by_arm.items()
    )
    caption = f"{metric} of each seed (dots, thin lines join a seed) and the mean (bar)."
    return drawn(name, _height(arms), f"{metric} by seed", f"{said}.", caption, draw)


def arm_lines(name: str, metric: str, curves: Mapping[str, Lines], numbers: Numbers) -> Figure:
    """Mean over the seeds of each arm over the rounds, with a band from the lowest to the highest seed."""
    means = {arm: mean_curve(lines) for arm, lines in curves.items()}

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        for arm, lines in curves.items():
            number_, rounds = numbers[arm], sorted(means[arm])
            style: dict[str, Any] = {"color": colour(number_)}
            if len(lines) > 1:
                spans = [[line[r] for line in lines.values() if not math.isnan(line.get(r, math.nan))] for r in rounds]
                low = [min(span, default=math.nan) for span in spans]
                high = [max(span, default=math.nan) for span in spans]
                band = axes.fill_between(rounds, low, high, alpha=0.16, linewidth=0, **style)
                band.set_gid(series_id(number_))
            values = [means[arm][r] for r in rounds]
            line = axes.plot(rounds, values, linewidth=1.9, linestyle=dash(number_), **style)
            line[0].set_gid(series_id(number_))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("round")
        axes.set_title(f"{metric} over the rounds")

    ends = {arm: last_of(line) for arm, line in means.items()}
    said = "Last values, mean over the seeds: " + ", ".join(f"{arm} {show(end)}" for arm, end in ends.items())
    band = " with a band from the lowest to the highest" if any(len(lines) > 1 for lines in curves.values()) else ""
    caption = f"{metric} over the rounds, mean over the seeds{band}. {said.removeprefix('Last values, mean over the seeds: ')} at the end."
    tips = {numbers[arm]: f"{arm}: {show(end)}" for arm, end in ends.items()}
    return drawn(name, 3.2, f"{metric} of each arm over the rounds", f"{said}.", caption, draw, tips)


def site_ranges(name: str, metric: str, ranges: Mapping[str, tuple[float, float, float]], numbers: Numbers) -> Figure:
    """From the worst to the best site of each arm with the mean of the sites: arm -> (worst, mean, best)."""
    arms = list(ranges)

    def draw(axes: Axes) -> None:
        for row, arm in enumerate(arms):
            worst, middle, best = ranges[arm]
            shade = colour(numbers[arm])
            axes.plot([worst, best], [row, row], linewidth=5, alpha=0.35, color=shade).pop().set_gid(
                series_id(numbers[arm])
            )
            axes.plot([middle], [row], marker="o", markersize=7, color=shade).pop().set_gid(series_id(numbers[arm]))
            axes.plot([worst], [row], marker="|", markersize=14, markeredgewidth=2.2, color=shade)
        _arm_axis(axes, arms)
        axes.set_title(f"{metric} of the sites")

    said = "; ".join(f"{arm}: worst {show(a)}, mean {show(b)}, best {show(c)}" for arm, (a, b, c) in ranges.items())
    caption = f"{metric} of the worst site (bar), the mean of the sites (dot) and the best site, each averaged over the seeds."
    return drawn(name, _height(arms), f"{metric} of the sites, by arm", f"{said}.", caption, draw)
