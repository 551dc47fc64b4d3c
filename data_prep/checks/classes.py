"""How many images of each class a site has, and classes that cannot be learnt or scored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_prep.checks.findings import Findings
from data_prep.checks.layout import Root
from data_prep.checks.scan import SiteFacts
from fedmed.data.site_checks import SPLITS


def class_counts(facts: SiteFacts, root: Root) -> np.ndarray | None:
    """Images that show each class, (3, L) int64 for train, val and test; None where the annotation says nothing usable.

    Segmentation counts what training reads in train, and `mask` where there is one in the other splits. Multi-label counts
    positives of classes that the image is annotated for.
    """
    classes = root.classes or ()
    split = facts.frame.split_of()
    if root.task == "segmentation":
        train = facts.rasters.get(facts.frame.training)
        truth = facts.rasters.get("mask", train)
        if train is None or truth is None:
            return None
        shows = [train.present, truth.present, truth.present]
        return np.stack([there[split == code].sum(axis=0) for code, there in enumerate(shows)])
    label = facts.label
    if label is None or label.dtype.kind not in "biu" or not classes:
        return None
    if root.task == "multilabel":
        if label.shape != (len(label), len(classes)):
            return None
        there = label == 1
        active = facts.flags.get("active_classes")
        if active is not None and active.shape in (label.shape, label.shape[1:]):
            there = there & (active != 0)
        return np.stack([there[split == code].sum(axis=0) for code in range(len(SPLITS))])
    if label.ndim != 1:
        return None
    inside = (label >= 0) & (label < len(classes))
    chosen = [label[(split == code) & inside] for code in range(len(SPLITS))]
    return np.stack([np.bincount(part.astype(np.int64), minlength=len(classes)) for part in chosen])


def check_classes(sites: Sequence[SiteFacts], root: Root, findings: Findings) -> None:
    """Classes without a training image: in the whole file a warning, at a site a note. Without a test image: a note."""
    tables = [(facts, table) for facts in sites if (table := class_counts(facts, root)) is not None]
    if not tables or root.classes is None:
        return
    first = int(root.task == "segmentation")  # background is no class to be learnt
    total = np.sum([table for _, table in tables], axis=0)
    everywhere = []
    for code, severity, text in (
        (0, "warning", "no training image anywhere"),
        (2, "note", "no test image anywhere: cannot be scored"),
    ):
        absent = [name for name, count in list(zip(root.classes, total[code], strict=True))[first:] if not count]
        everywhere.append(set(absent))
        if absent:
            findings.add(severity, f"class_without_{SPLITS[code]}", f"{_listed(absent)}: {text}", count=len(absent))
    for facts, table in tables if len(tables) > 1 else []:
        rows = list(zip(root.classes, table[0], strict=True))[first:]
        absent = [name for name, count in rows if not count and name not in everywhere[0]]
        if absent:
            text = f"{_listed(absent)}: no training image here"
            findings.add("note", "class_without_train", text, facts.name, len(absent))


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'} ({', '.join(names)})"
