"""Figures of a run: curves per site, comparison of arms, overlay sheets of segmentations.

matplotlib is an extra (`pip install 'fedmed[report]'`) and imported inside the functions; the object interface is used,
which draws with Agg and needs no display. Every function takes a path, writes one PNG atomically and gives the path
back.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmed.report.fairness import CLEAN, condition_keys
from fedmed.report.values import Record, curve, mean_curve, number, of_phase
from fedmed.schema import lower_is_better

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NO_MATPLOTLIB = "note: no figures, matplotlib is not installed (pip install 'fedmed[report]')"

# Okabe-Ito without black and yellow: told apart with any colour vision, and on white paper. Black is the mean.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F")
_STYLES = ("-", "--", ":")
_CONDITION_STYLES = (
    (0, (1, 1)),
    (0, (5, 1, 1, 1)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (8, 2)),
)  # central test items, degraded
_MAX_NAMED = len(_COLOURS) * len(_STYLES)  # sites that get a line and a legend entry of their own
_MEAN, _CENTRAL = "mean of sites", "central test"  # entries of the legend that come first
_MARK_UP_TO = 30  # rounds up to which points are marked
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def available() -> bool:
    """Whether matplotlib is installed; does not import it."""
    return importlib.util.find_spec("matplotlib") is not None


def site_styles(sites: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Give every site one line style, the same in every figure of a run: colour by place in the sorted names, then dash
    pattern.
    """
    return {
        site: {
            "label": site,
            "color": _COLOURS[i % len(_COLOURS)],
            "linestyle": _STYLES[(i // len(_COLOURS)) % len(_STYLES)],
        }
        for i, site in enumerate(sorted(sites))
    }


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp.png")
    try:
        figure.savefig(temporary, dpi=130, facecolor="white", bbox_inches="tight", format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _draw(axes: Axes, line: Mapping[int, float], **style: Any) -> None:
    """Draw one line over rounds; undefined values leave a gap, few points are marked."""
    rounds = sorted(line)
    if len(rounds) <= _MARK_UP_TO:
        style = {"marker": "o", "markersize": 2.0 + 1.0 * style.get("linewidth", 1.0), **style}
    axes.plot(rounds, [line[r] for r in rounds], **style)


def _final(line: Mapping[int, float]) -> float:
    kept = [line[r] for r in sorted(line) if not math.isnan(line[r])]
    return kept[-1] if kept else math.nan


def _central_lines(history: Sequence[Record], key: str) -> dict[str, dict[int, float]]:
    """Curves of `key` on the central test set, "clean" first, and on the same items under each condition."""
    names = (name for r in of_phase(history, "central") for name in r.get("metrics", {}))
    keys = condition_keys(names, key.rpartition("/")[2])
    keys = keys if keys.get(CLEAN) == key else {CLEAN: key}  # conditions belong to the clean items of the same view
    lines = {name: curve(history, full, "central").get("central", {}) for name, full in keys.items()}
    return {name: line for name, line in lines.items() if line}


def _extremes(lines: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, Any]]:
    """Styles and labels for the two sites with the lowest and the highest last value; empty when nothing is defined."""
    ends = {site: value for site, value in ((s, _final(line)) for s, line in lines.items()) if not math.isnan(value)}
    if not ends:
        return {}
    low, high = min(ends, key=ends.__getitem__), max(ends, key=ends.__getitem__)
    return {
        low: {"label": f"{low} (lowest of {len(lines)})", "color": _COLOURS[3]},
        high: {"label": f"{high} (highest of {len(lines)})", "color": _COLOURS[0]},
    }


def _draw_sites(
    axes: Axes, sites: Mapping[str, Mapping[int, float]], styles: Mapping[str, Mapping[str, Any]], metric: str
) -> None:
    """Draw one thin line per site, in grey where it has no style of its own, and the mean on top."""
    from matplotlib.ticker import MaxNLocator

    for site in sorted(sites, key=lambda s: s in styles):  # grey ones below
        if site in styles:
            _draw(axes, sites[site], linewidth=1.2, alpha=0.9, **styles[site])
        else:
            rounds = sorted(sites[site])
            axes.plot(rounds, [sites[site][r] for r in rounds], color="#BBBBBB", linewidth=0.6)
    if len(sites) > 1:
        _draw(axes, mean_curve(sites), label=_MEAN, linewidth=2.2, color="black")
    axes.set_xlabel("round")
    axes.set_title(metric + (" (lower is better)" if lower_is_better(metric) else ""), loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_central(axes: Axes, lines: Mapping[str, Mapping[int, float]]) -> None:
    """Draw the central test set as a dashed line, and its conditions with shorter dashes."""
    degraded = [name for name in lines if name != CLEAN]
    for name, line in lines.items():
        if name == CLEAN:
            style: dict[str, Any] = {"label": _CENTRAL, "linestyle": "--"}
        else:
            dashes = _CONDITION_STYLES[degraded.index(name) % len(_CONDITION_STYLES)]
            style = {"label": f"{_CENTRAL}, {name}", "linestyle": dashes}
        _draw(axes, line, linewidth=1.6, color="black", marker="", **style)


def _legend_outside(figure: Figure, axes_list: Sequence[Axes]) -> None:
    """One legend for all panels at the right of the figure, in as many columns as its height asks for."""
    entries: dict[str, Any] = {}
    for axes in axes_list:
        handles, labels = axes.get_legend_handles_labels()
        entries.update({label: handle for handle, label in zip(handles, labels, strict=True) if label not in entries})
    ordered = sorted(entries, key=lambda label: not (label == _MEAN or label.startswith(_CENTRAL)))
    columns = 1 + (len(ordered) - 1) // 16 if ordered else 1
    if ordered:
        figure.legend(
            [entries[k] for k in ordered], ordered, loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=columns
        )


def _new_figure(width: float, height: float, panels: int, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False, sharey=sharey)[0])


def plot_curves(history: Sequence[Record], path: Path, key: str | None, title: str = "") -> Path | None:
    """Draw training loss and metric `key` ("test/global/dice") per site over rounds; None when there is nothing to
    draw.

    The mean over sites is the heavy black line, the central test set the dashed one, with shorter dashes under each
    condition. Needs matplotlib.
    """
    import matplotlib as mpl

    panels: list[tuple[str, dict[str, dict[int, float]], dict[str, dict[int, float]]]] = []
    panels.append(("training loss", curve(history, "train_loss", "train"), {}))
    if key is not None:
        panels.append((key, curve(history, key), _central_lines(history, key)))
    panels = [(name, lines, central) for name, lines, central in panels if any(lines.values()) or central]
    if not panels:
        return None
    # One set of names for all panels, else the same site would change its colour.
    sites = sorted({s for _, lines, _ in panels for s in lines})
    styles = site_styles(sites)
    if len(sites) > _MAX_NAMED:
        styles = _extremes(panels[-1][1])
    with mpl.rc_context(_STYLE):
        figure, axes_list = _new_figure(4.4 * len(panels), 3.4, len(panels))
        for axes, (name, lines, central) in zip(axes_list, panels, strict=True):
            _draw_sites(axes, lines, styles, name)
            _draw_central(axes, central)
        _legend_outside(figure, axes_list)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        return _save(figure, path)


def _draw_arm(axes: Axes, lines: Mapping[str, Mapping[int, float]], arm: str, colour: str) -> None:
    """Draw the mean over sites of one arm, and the band from its worst to its best site."""
    middle = mean_curve(lines)
    _draw(axes, middle, label=arm, color=colour, linewidth=2.0)
    defined = {r: [line[r] for line in lines.values() if r in line and not math.isnan(line[r])] for r in middle}
    rounds = [r for r in middle if defined[r]]
    low, high = [min(defined[r]) for r in rounds], [max(defined[r]) for r in rounds]
    axes.fill_between(rounds, low, high, color=colour, alpha=0.13, linewidth=0)


def _central_title(conditions: Sequence[str]) -> str:
    """Title of the central panel, which says what its broken lines are."""
    words = [f"{('dashed', 'dotted')[i % 2]}: {name}" for i, name in enumerate(conditions)]
    return "central test set" + (f" ({', '.join(words)})" if words else "")


def plot_comparison(histories: Mapping[str, Sequence[Record]], path: Path, key: str, title: str = "") -> Path | None:
    """Compare arms on metric `key` over rounds; None when no arm has it.

    Left the mean over sites with the band from worst to best site, right the central test set if there is one, with
    broken lines for the same items under conditions: the distance to the full line is the gap. Needs matplotlib.
    """
    import matplotlib as mpl
    from matplotlib.ticker import MaxNLocator

    per_site = {arm: curve(history, key) for arm, history in histories.items()}
    central = {arm: _central_lines(history, key) for arm, history in histories.items()}
    conditions = sorted({name for lines in central.values() for name in lines} - {CLEAN})
    panels = {
        "mean of sites (band: worst to best site)": any(per_site.values()),
        _central_title(conditions): any(central.values()),
    }
    titles = [name for name, there in panels.items() if there]
    if not titles:
        return None
    with mpl.rc_context(_STYLE):
        figure, axes_list = _new_figure(4.6 * len(titles), 3.4, len(titles), sharey=True)
        for axes, name in zip(axes_list, titles, strict=True):
            for index, arm in enumerate(histories):
                colour = _COLOURS[index % len(_COLOURS)]
                if name.startswith("central"):
                    _draw(axes, central[arm].get(CLEAN, {}), label=arm, color=colour, linewidth=2.0)
                    for place, condition in enumerate(conditions):
                        style = {"linestyle": ("--", ":")[place % 2], "marker": "", "linewidth": 1.6}
                        _draw(axes, central[arm].get(condition, {}), color=colour, **style)
                else:
                    _draw_arm(axes, per_site[arm], arm, colour)
            axes.set_xlabel("round")
            axes.set_title(name, loc="left")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes_list[0].set_ylabel(key + (" (lower is better)" if lower_is_better(key) else ""))
        _legend_outside(figure, axes_list)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        return _save(figure, path)


def _grey_or_colour(image: Any) -> Any:
    """Bring an image (H, W), (H, W, 1..n) of any range to RGB in 0..1; a flat image becomes mid grey."""
    import numpy as np

    image = np.asarray(image, dtype=np.float32)
    image = image[..., None] if image.ndim == 2 else image
    image = image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1)
    low, high = float(image.min()), float(image.max())
    return (image - low) / (high - low) if high > low else np.full_like(image, 0.5)


def _outline(axes: Axes, mask: Any, fill: float) -> None:
    """Paint each foreground class of a label map (H, W) as a tint with a sharp outline."""
    import numpy as np
    from matplotlib.colors import to_rgb

    mask = np.asarray(mask)
    for label in (int(v) for v in np.unique(mask) if v > 0 and v != 255):  # 255 = not annotated
        colour = to_rgb(_COLOURS[(label - 1) % len(_COLOURS)] if label > 1 else "#FF3B30")
        tint = np.zeros((*mask.shape, 4), dtype=np.float32)
        tint[mask == label] = (*colour, fill)
        axes.imshow(tint, interpolation="nearest")
        axes.contour((mask == label).astype(np.float32), levels=[0.5], colors=[colour], linewidths=1.3)


def _foreground_dice(reference: Any, prediction: Any) -> Any:
    """Dice (N,) of any foreground against none, pixels marked 255 left out; NaN where both are empty."""
    import numpy as np

    known = np.asarray(reference) != 255
    first, second = (np.asarray(m) * known > 0 for m in (reference, prediction))
    overlap, total = ((a).sum(axis=(1, 2), dtype=np.float64) for a in (first & second, first.astype(int) + second))
    return np.divide(2 * overlap, total, out=np.full(len(total), np.nan), where=total > 0)


def plot_overlays(cases: Mapping[str, Any], path: Path, title: str = "", max_cases: int = 6) -> Path | None:
    """Draw a sheet of cases, one per column: image, reference, prediction. None when there is no case.

    `cases` holds arrays: image (N, H, W) or (N, H, W, C) of any range, reference and prediction (N, H, W) label maps (0
    background), and, if there, item_id (N,) and dice (N,); without it the Dice of the whole foreground is shown. With
    more than `max_cases` they are taken evenly from worst to best Dice. Needs matplotlib.
    """
    import matplotlib as mpl
    import numpy as np
    from matplotlib.figure import Figure

    total = len(cases["image"])
    if total == 0:
        return None
    dice = cases["dice"] if "dice" in cases else _foreground_dice(cases["reference"], cases["prediction"])
    dice = np.asarray(dice, dtype=np.float64)
    order = np.argsort(np.where(np.isnan(dice), -1.0, dice), kind="stable")
    chosen = order[np.unique(np.linspace(0, total - 1, min(max_cases, total)).round().astype(int))]
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        columns = len(chosen)
        figure = Figure(figsize=(1.75 * columns + 0.5, 1.75 * 3 + 0.7), layout="constrained")
        grid = figure.subplots(3, columns, squeeze=False)
        for column, index in enumerate(chosen):
            for row, name in enumerate(("image", "reference", "prediction")):
                axes = grid[row][column]
                axes.imshow(_grey_or_colour(cases["image"][index]), interpolation="nearest")
                if name != "image":
                    _outline(axes, cases[name][index], fill=0.25)
                axes.set_xticks([])
                axes.set_yticks([])
                for side in axes.spines.values():
                    side.set_visible(False)
                if column == 0:
                    axes.set_ylabel(name, fontsize=10)
            label = str(cases["item_id"][index]) if "item_id" in cases else f"case {index}"
            score = "" if math.isnan(number(float(dice[index]))) else f"Dice {dice[index]:.2f}"
            grid[0][column].set_title(label if len(label) <= 20 else label[:8] + "..." + label[-8:], fontsize=8)
            grid[2][column].set_xlabel(score, fontsize=9)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        return _save(figure, path)
