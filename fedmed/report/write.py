"""Write the report of a finished run: summary.json, cases.csv, figures and report.md.

Everything is made again from the files of the run, so a report can be repeated at any time. Without matplotlib the
figures are left out.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmed.errors import UserError
from fedmed.files import Record, read_history, read_json, write_json, write_text
from fedmed.report import figures, tables
from fedmed.report.run_folder import RunFolder, collect_cases

# What `numpy.load` and the arrays of an npz raise for a file that is cut off or is something else.
UNREADABLE = (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def read_overlay(path: Path) -> dict[str, Any]:
    """Read the stored example cases of a site.

    The file is an npz without pickled objects: `image` (N, H, W[, C]), `reference` and `prediction` (N, H, W) label
    maps, and if wanted `item_id` (N,) text and `dice` (N,) float. Raises `UserError` when it is broken or an array is
    missing.
    """
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as stored:
            cases = {name: stored[name] for name in stored.files}
    except UNREADABLE as error:
        raise UserError(f"{path}: not a readable npz file ({error})") from error
    missing = [name for name in ("image", "reference", "prediction") if name not in cases]
    if missing:
        raise UserError(f"{path}: expected arrays image, reference and prediction; missing: {', '.join(missing)}")
    return cases


def file_name(site: str) -> str:
    """Turn a site name into a file name: every other character than letters, digits, dot, dash becomes an
    underscore.
    """
    return re.sub(r"[^\w.-]", "_", site) or "_"


def draw_figures(
    folder: RunFolder, history: Sequence[Record], summary: Mapping[str, Any], say: Callable[[str], None]
) -> list[Path]:
    """Draw the curves of a run and one overlay sheet per site that stored cases. Without matplotlib: one line through
    `say`, no figure.
    """
    if not figures.available():
        say(figures.NO_MATPLOTLIB)
        return []
    metric, prefix = summary.get("main_metric"), summary.get("judged_by")
    key = f"{prefix}/{metric}" if prefix and metric else None
    drawn = [figures.plot_curves(history, folder.figures / "curves.png", key, title=str(summary["name"]))]
    for path in sorted(folder.sites.glob("*/overlay.npz")):
        site = path.parent.name
        target = folder.figures / f"overlay-{file_name(site)}.png"
        try:
            drawn.append(figures.plot_overlays(read_overlay(path), target, title=f"{summary['name']}: {site}"))
        except UserError as error:  # an unreadable example must not cost the rest of the report
            say(f"note: {error}")
    return [path for path in drawn if path is not None]


def report_text(summary: Mapping[str, Any], drawn: Sequence[Path]) -> str:
    """Give the Markdown report of one run; figures are linked relative to the run folder."""
    judged = f"Judged by {summary['judged_by']}/{summary['main_metric']}. " if summary.get("judged_by") else ""
    parts = [
        f"# {summary['name']}",
        f"{judged}Engine {summary['engine']}, seed {summary['seed']}. Values of the last evaluation of each site; "
        "spread is best minus worst site, and a dash an undefined value.",
    ]
    if summary["sites"]:
        header, rows, _ = tables.site_table(summary)
        parts.append(tables.markdown_table(header, rows))
    parts.append("\n".join(f"- {line}" for line in tables.facts(summary)))
    header, rows = tables.fairness_table(summary)
    if rows:
        parts += [tables.markdown_table(header, rows), f"Worst site: {tables.worst_site(summary)}."]
    for table in (tables.subset_table, tables.pair_table, tables.personal_table):
        header, rows = table(summary)
        parts += [tables.markdown_table(header, rows)] if rows else []
    parts += [f"{tables.personal_origin(summary)}."] if summary.get("personal") else []
    header, rows = tables.weight_table(summary)
    if rows:
        parts += [
            "Weights of the last round beside the shares of the training items:",
            tables.markdown_table(header, rows),
        ]
    parts += [f"![{path.stem}](figures/{path.name})" for path in drawn]
    versions = ", ".join(f"{name} {version}" for name, version in summary.get("versions", {}).items())
    return "\n\n".join([*parts, f"Versions: {versions}."]) + "\n"


def write_report(
    run_dir: str | Path, summary: Mapping[str, Any] | None = None, say: Callable[[str], None] = lambda _: None
) -> Path:
    """Write figures, `cases.csv`, `report.md` (and `summary.json` if the run left none) into a run folder; give the
    path of the report.

    `summary` is what `build_summary` gave, by default the stored one; `say` takes remarks of one line. Raises
    `UserError` when the folder holds no run.
    """
    folder = RunFolder(Path(run_dir))
    summary = read_json(folder.summary) if summary is None else summary
    if not folder.summary.exists():
        write_json(folder.summary, summary)
    history = read_history(folder.history)
    collect_cases(folder)
    drawn = draw_figures(folder, history, summary, say)
    return write_text(folder.report, report_text(summary, drawn))
