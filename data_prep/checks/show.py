"""The result of a check as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.checks.classes import class_counts
from data_prep.checks.contents import empty_masks
from data_prep.checks.findings import SEVERITIES, Findings, number
from data_prep.checks.layout import Root
from data_prep.checks.scan import SiteFacts
from fedmed.data.site_checks import SPLITS

_LONG = 16  # site names beyond this are replaced by their number where they head a column
_COLUMNS = 8  # sites beside each other in the table of classes; of more, only the sum is printed


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are aligned on the left."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    rule = ["-" * width for width in widths]
    lines = (header, rule, *rows)
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def site_record(facts: SiteFacts, root: Root) -> dict[str, Any]:
    """What is known of a site, JSON-ready: sizes, splits, annotation, classes, empty masks; no identifiers."""
    frame = facts.frame
    split = frame.split_of()
    counts = class_counts(facts, root)
    mask = facts.rasters.get("mask")
    record: dict[str, Any] = {
        "site": frame.name,
        "n": frame.size,
        "groups": len(np.unique(facts.ids["group_id"])) if "group_id" in facts.ids else frame.size,
        "splits": {name: int((split == code).sum()) for code, name in enumerate(SPLITS)},
        "image_type": facts.image.dtype,
        "range": [facts.image.low, facts.image.high],
        "annotations": list(frame.annotations),
        "training_reads": frame.training,
        "label_kind": frame.label_kind,
    }
    if mask is not None and mask.integer:
        empty = empty_masks(mask)
        record["empty_masks"] = {name: int((empty & (split == code)).sum()) for code, name in enumerate(SPLITS)}
    weak = facts.rasters.get(frame.training) if frame.training != "mask" else None
    if weak is not None and weak.integer and (split == 0).any():
        record["drawn_share"] = round(float(weak.drawn[split == 0].mean()), 4)
    if counts is not None and root.classes is not None:
        named = zip(root.classes, counts.T.tolist(), strict=True)
        record["classes"] = {name: dict(zip(SPLITS, row, strict=True)) for name, row in named}
    present, active = facts.flags.get("modality_present"), facts.flags.get("active_classes")
    if present is not None and present.shape == facts.image.flat.shape and frame.size:
        record["modality_present"] = np.round((present != 0).mean(axis=0), 4).tolist()
    wide = len(root.classes or ())
    if active is not None and root.classes is not None and active.shape in ((frame.size, wide), (wide,)):
        train = active[split == 0] if active.ndim == 2 else active[None]
        shares = (train != 0).mean(axis=0) if len(train) else np.zeros(len(root.classes))
        record["active_classes"] = {name: round(float(s), 4) for name, s in zip(root.classes, shares, strict=True)}
    return record


def render(name: str, root: Root, records: Sequence[dict[str, Any]], findings: Findings, quiet: bool) -> str:
    """Text for the terminal; quiet: the findings only."""
    blocks = [] if quiet else [_head(name, root, records), *_tables(root, records)]
    found = findings.sorted()
    lines = [f"{f.severity:<8} {f.site + ': ' if f.site else ''}{f.text}" for f in found]
    counts = ", ".join(number(findings.count(severity), severity) for severity in SEVERITIES)
    return "\n\n".join([*blocks, "\n".join([*lines, counts])])


def _head(name: str, root: Root, records: Sequence[dict[str, Any]]) -> str:
    images = sum(record["n"] for record in records)
    parts = [root.task or "no task", f"{number(images, 'image')} of {number(len(records), 'site')}"]
    parts += [f"{root.size[0]} x {root.size[1]} pixels"] if root.size else []
    parts += [", ".join(root.channels)] if root.channels else []
    derived = " (derived, with pooled images)" if root.pooled else ""
    return f"{name}: {'; '.join(parts)}{derived}"


def _tables(root: Root, records: Sequence[dict[str, Any]]) -> list[str]:
    def split(record: dict[str, Any], name: str) -> str:
        count, share = record["splits"][name], 100 * record["splits"][name] / max(1, record["n"])
        return f"{count} ({share:.0f} %)"

    def kind(record: dict[str, Any]) -> str:
        reads, made = record["training_reads"], record["label_kind"]
        drawn = f", {100 * record['drawn_share']:.1f} % drawn" if "drawn_share" in record else ""
        others = [name for name in record["annotations"] if name != reads]
        also = f"; also {', '.join(others)}" if others else ""
        return (reads if made in ("", reads) else f"{reads} ({made})") + drawn + also

    header = ["site", "images", "groups", *SPLITS, "annotation"]
    numbered = any(len(record["site"]) > _LONG for record in records)
    short = [str(place) if numbered else record["site"] for place, record in enumerate(records, start=1)]
    rows = [
        [f"{place}: {r['site']}" if numbered else place, str(r["n"]), str(r["groups"])]
        + [split(r, name) for name in SPLITS]
        + [kind(r)]
        for place, r in zip(short, records, strict=True)
    ]
    if any("empty_masks" in record for record in records):
        header.append("empty masks")
        for row, record in zip(rows, records, strict=True):
            row.append("/".join(str(count) for count in record.get("empty_masks", {}).values()) or "-")
    for key, title in (("modality_present", "has " + "/".join(root.channels or ())), ("active_classes", "annotates")):
        if any(key in record for record in records):
            header.append(title)
            for row, record in zip(rows, records, strict=True):
                row.append(_flags(record.get(key)))
    blocks = ["\n".join(aligned(header, rows))] if rows else []
    counted = [(name, record) for name, record in zip(short, records, strict=True) if "classes" in record]
    if counted and root.classes:
        shown = counted if 1 < len(counted) <= _COLUMNS else []
        table = [
            [name, *(_cells([r], name) for _, r in shown), _cells([r for _, r in counted], name)]
            for name in root.classes
        ]
        header = ["images with it, train/val/test", *(name for name, _ in shown), "all"]
        blocks.append("\n".join(aligned(header, table)))
    return blocks


def _cells(records: Sequence[dict[str, Any]], name: str) -> str:
    return "/".join(str(sum(record["classes"][name][split] for record in records)) for split in SPLITS)


def _flags(value: Any) -> str:
    if isinstance(value, dict):  # name of a class -> share of training images it is annotated at
        return f"{sum(share > 0 for share in value.values())} of {len(value)} classes"
    return "/".join(f"{100 * share:.0f}" for share in value) + " %" if value else "-"
