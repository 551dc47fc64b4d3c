"""Figures of a run: curves of the sites over the rounds, bars of their scores, weights. All drawn 360 units wide, for a telephone.

matplotlib is an extra and imported inside the functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fedmed.report.page.parts import Figure
from fedmed.report.page.svg import INK, MUTED, RC, colour, dash, inline, plain, series_id
from fedmed.report.tables import show
from fedmed.report.values import mean_curve
from fedmed.schema import lower_is_better

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = Mapping[int, float]
Lines = Mapping[str, Line]
WIDTH = 5.0  # inches of 72 units
NAMED = 21  # series that can be told apart by colour and dash; with more of them all are grey
_CENTRAL_DASHES = ((0, (4, 2)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)))
_MARK_UP_TO = 30  # rounds


def drawn(
    name: str,
    height: float,
    title: str,
    description: str,
    caption: str,
    draw: Callable[[Axes], None],
    tips: Mapping[int, str] | None = None,
) -> Figure:
    """Let `draw` fill the axes of a fresh figure of `height` inches and give it as a block."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    with mpl.rc_context({**RC, "svg.hashsalt": name}):
        canvas = Canvas(figsize=(WIDTH, height), dpi=72, layout="constrained")
        axes = canvas.subplots()
        draw(axes)
        return Figure(inline(canvas, name, title, description, tips), caption)


def last_of(line: Line) -> float:
    """The last defined value of a curve, NaN if there is none."""
    return next((line[r] for r in sorted(line, reverse=True) if not math.isnan(line[r])), math.nan)


def named_values(values: Mapping[str, float]) -> str:
    """ "site 0.812, ..." for descriptions."""
    return ", ".join(f"{name} {show(value)}" for name, value in values.items()) or "nothing"


def _plot(axes: Axes, line: Line, **style: Any) -> Any:
    rounds = sorted(line)
    if len(rounds) <= _MARK_UP_TO:
        style = {"marker": "o", "markersize": 3.0, **style}
    return axes.plot(rounds, [line[r] for r in rounds], **style)[0]


def _rounds(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("round")


def curves(
    name: str,
    metric: str,
    sites: Lines,
    numbers: Mapping[str, int],
    central: Lines | None = None,
    mean: bool = True,
    floor: float | None = None,
) -> Figure:
    """One line per site over the rounds, the mean of the sites heavy, central test sets (condition -> line) dashed.

    `numbers`: site -> number of its series, the same in all figures of a page. `floor`: lowest value that must be seen.
    """
    central = central or {}
    many = len(numbers) > NAMED
    ends = {site: last_of(line) for site, line in sites.items()}
    middle = mean_curve(sites) if mean and len(sites) > 1 else {}

    def draw(axes: Axes) -> None:
        for site, line in sites.items():
            number = numbers[site]
            style = {"color": MUTED, "alpha": 0.5} if many else {"color": colour(number), "linestyle": dash(number)}
            _plot(axes, line, linewidth=1.3, **style).set_gid(series_id(number))
        if middle:
            _plot(axes, middle, color=INK, linewidth=2.4)
        for place, line in enumerate(central.values()):
            _plot(axes, line, color=INK, linewidth=1.6, marker="", linestyle=_CENTRAL_DASHES[place % 5])
        _rounds(axes)
        if floor is not None:
            axes.set_ylim(bottom=floor)
        axes.set_title(metric + (" (lower is better)" if lower_is_better(metric) else ""))

    others = [f"mean of sites {show(last_of(middle))}"] if middle else []
    others += [f"central test, {which}: {show(last_of(line))}" for which, line in central.items()]
    said = f"Last values: {'; '.join([named_values(ends), *others])}."
    words = [f"heavy line: mean of sites ({show(last_of(middle))})"] if middle else []
    if central:
        which = ", ".join(f"{'' if c == 'clean' else c + ' '}{show(last_of(line))}" for c, line in central.items())
        words.append(f"heavy dashes: central test ({which})")
    tips = {numbers[site]: f"{site}: {show(end)}" for site, end in ends.items()}
    caption = f"{metric} over the rounds, a line per site" + (f"; {'; '.join(words)}" if words else "") + "."
    return drawn(name, 3.4, f"{metric} of each site over the rounds", said, caption, draw, tips)


def bars(
    name: str, metric: str, values: Mapping[str, float], numbers: Mapping[str, int], noisy: set[str], mean: float
) -> Figure:
    """One bar per site with its value; sites with corrupted training data are hatched, the mean is a line."""
    sites = list(values)

    def draw(axes: Axes) -> None:
        shown = [0.0 if math.isnan(values[s]) else values[s] for s in sites]
        for place, (site, value) in enumerate(zip(sites, shown, strict=True)):
            bar = axes.barh(place, value, height=0.72, color=colour(0), alpha=0.45 if site in noisy else 0.9)[0]
            bar.set_gid(series_id(numbers[site]))
            axes.text(value, place, f" {show(values[site])}", va="center", fontsize=9.5)
        if not math.isnan(mean):
            axes.axvline(mean, color=INK, linewidth=1.2, linestyle="--")
        axes.set_yticks(range(len(sites)), [plain(s) + (" *" if s in noisy else "") for s in sites])
        axes.set_ylim(len(sites) - 0.4, -0.6)
        axes.margins(x=0.14)
        axes.grid(axis="y", visible=False)
        axes.set_title(f"{metric}, last evaluation")

    said = f"{metric} in the last evaluation: {named_values(values)}; mean {show(mean)}."
    starred = " Paler bars with an asterisk: sites whose training data are corrupted." if noisy else ""
    caption = f"{metric} of each site in its last evaluation; dashed: the mean.{starred}"
    tips = {numbers[site]: f"{site}: {show(value)}" for site, value in values.items()}
    return drawn(name, 0.8 + 0.27 * len(sites), f"{metric} of each site", said, caption, draw, tips)


def weights(name: str, lines: Lines, numbers: Mapping[str, int], what: str) -> Figure:
    """The weight of each site in the new model over the rounds, as lines from 0."""
    figure = curves(name, what, lines, numbers, mean=False, floor=0.0)
    return Figure(figure.svg, f"{what} over the rounds, a line per site; together 1 in each round.")
