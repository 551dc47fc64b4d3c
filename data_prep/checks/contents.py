"""What is wrong with the images and annotations of one site."""

from __future__ import annotations

import numpy as np

from data_prep.checks.findings import Findings, number
from data_prep.checks.layout import Root
from data_prep.checks.scan import RasterFacts, SiteFacts
from fedmed.data.site_checks import SPLITS

SHOWN = 5  # rows named in a finding
_DARK = 8  # integer images that stay below this part of their type's range are nearly black for a network


def check_images(facts: SiteFacts, root: Root, findings: Findings) -> None:
    """NaN, infinities, range, constant images and channels, damaged chunks."""
    image, name = facts.image, facts.name
    if image.unreadable:
        _add(findings, "error", "damaged", f"{number(image.unreadable, 'image')} cannot be read from the file", facts)
    for rows, severity, code, text in (
        (image.not_finite, "error", "not_finite", "hold NaN or infinite values"),
        (image.outside, "warning", "outside", "are floats outside 0..1, and floats are used as they are"),
        (image.constant, "warning", "constant", "have one value everywhere"),
    ):
        if rows.any():
            share = f"{rows.sum()} of {number(facts.frame.size, 'image')}"
            _add(findings, severity, code, f"{share} {text}{_range(facts, code)}", facts, rows)
    if image.dtype in ("uint8", "uint16") and facts.frame.size and not image.constant.all():
        top = np.iinfo(image.dtype).max
        if image.high < top / _DARK:
            text = f"no value above {image.high:g} of {top}: integers are scaled by {top}, images will be nearly black; rescale them"
            findings.add("warning", "dark", text, name, facts.frame.size)
    present = facts.flags.get("modality_present")
    if present is None:
        return
    if present.shape != image.flat.shape or not np.isin(present, (0, 1)).all():
        text = f"modality_present must be 0/1 flags of shape {image.flat.shape}, has shape {present.shape}"
        findings.add("error", "modality_present", text, name)
        return
    empty = ((present != 0) & image.flat & ~image.constant[:, None]).any(axis=1)
    if empty.any():
        text = f"{number(int(empty.sum()), 'image')} with a channel of one value that modality_present says is there"
        _add(findings, "warning", "modality_present", text, facts, empty)


def _range(facts: SiteFacts, code: str) -> str:
    return f" (found {facts.image.low:g} to {facts.image.high:g})" if code == "outside" else ""


def check_annotations(facts: SiteFacts, root: Root, findings: Findings) -> None:
    """Types and values of masks and labels, empty and withheld masks, weak annotation with nothing drawn, active_classes."""
    for name, raster in facts.rasters.items():
        _check_raster(name, raster, facts, root, findings)
    if facts.label is not None and root.classes is not None:
        _check_label(facts, facts.label, root, findings)
    _check_active(facts, root, findings)


def _check_raster(name: str, raster: RasterFacts, facts: SiteFacts, root: Root, findings: Findings) -> None:
    num_classes = raster.present.shape[1]
    if not raster.integer:
        findings.add("error", "label_type", f"{name} holds floats, expected whole numbers (uint8)", facts.name)
        return
    if raster.unreadable:
        text = f"{number(raster.unreadable, name)} cannot be read from the file"
        findings.add("error", "damaged", text, facts.name, raster.unreadable)
    if raster.wrong.any():
        extra = "" if raster.ignore is None else f" or {raster.ignore} = not annotated"
        text = (
            f"{name} of {number(int(raster.wrong.sum()), 'image')} holds values such as {raster.worst}, "
            f"expected class ids 0..{num_classes - 1}{extra}"
        )
        _add(findings, "error", "label_value", text, facts, raster.wrong)
    if facts.frame.central:
        return
    train = facts.frame.split_of() == 0
    nothing = train & raster.open
    if name != "mask" and facts.frame.training == name and nothing.any():
        text = f"{nothing.sum()} of {number(int(train.sum()), 'training image')} have nothing drawn in {name}"
        _add(findings, "warning", "nothing_drawn", text, facts, nothing)
    if name != "mask":
        return
    if facts.frame.training == "mask" and train.any() and nothing[train].all():
        findings.add("error", "withheld", "no training mask says anything, and training reads them", facts.name)
    empty, split = empty_masks(raster), facts.frame.split_of()
    of = {name: (int((empty & (split == code)).sum()), int((split == code).sum())) for code, name in enumerate(SPLITS)}
    if any(count for count, _ in of.values()):
        useless = any(count and count == total for name, (count, total) in of.items() if name != "val")
        listed = ", ".join(f"{name} {count} of {total}" for name, (count, total) in of.items() if count)
        text = f"empty masks (background only): {listed}"
        findings.add("warning" if useless else "note", "empty_masks", text, facts.name, int(empty.sum()))


def empty_masks(raster: RasterFacts) -> np.ndarray:
    """Images (N,) bool whose mask says something, and nothing but background."""
    return ~raster.present[:, 1:].any(axis=1) & raster.present[:, 0] & ~raster.wrong


def _check_label(facts: SiteFacts, label: np.ndarray, root: Root, findings: Findings) -> None:
    if label.dtype.kind not in "biu":
        findings.add("error", "label_type", f"label is {label.dtype}, expected whole numbers (int64)", facts.name)
        return
    top = 1 if root.task == "multilabel" else len(root.classes or ()) - 1
    wrong = (label < 0) | (label > top)
    rows = np.asarray(wrong.any(axis=tuple(range(1, wrong.ndim))))  # of a label per image: as it is
    if rows.any():
        expected = "0 or 1 per class" if root.task == "multilabel" else f"class ids 0..{top}"
        text = (
            f"label of {number(int(rows.sum()), 'image')} holds values such as {label[wrong][0]}, expected {expected}"
        )
        _add(findings, "error", "label_value", text, facts, rows)


def _check_active(facts: SiteFacts, root: Root, findings: Findings) -> None:
    active, classes = facts.flags.get("active_classes"), root.classes
    if active is None or classes is None:
        return
    allowed = ((facts.frame.size, len(classes)), (len(classes),))
    if active.shape not in allowed or not np.isin(active, (0, 1)).all():
        text = f"active_classes must be 0/1 flags of shape {allowed[0]} or {allowed[1]}, has shape {active.shape}"
        findings.add("error", "active_classes", text, facts.name)
        return
    if facts.label is None or facts.label.ndim != 2 or facts.label.shape[1] != len(classes):
        return
    hidden = ((facts.label != 0) & (np.broadcast_to(active, facts.label.shape) == 0)).any(axis=1)
    if hidden.any():
        text = f"{number(int(hidden.sum()), 'image')} with a positive label of a class that active_classes says is not annotated"
        _add(findings, "warning", "active_classes", text, facts, hidden)


def check_splits(facts: SiteFacts, root: Root, findings: Findings) -> None:
    """Empty splits and images in no split."""
    if facts.frame.central:
        return
    split, size = facts.frame.split_of(), facts.frame.size
    if size == 0:
        findings.add("error", "no_images", "holds no image", facts.name)
        return
    if not (split == 0).any():  # a partition may leave a client of a derived file without items, and runs accept that
        findings.add("warning" if root.derived else "error", "no_train", "no image is in train", facts.name)
    if not (split == 2).any():
        findings.add("warning", "no_test", "no image is in test: the site cannot be scored", facts.name)
    if not (split == 1).any():
        findings.add("note", "no_val", "no image is in val", facts.name)
    unused = split < 0
    if unused.any():
        _add(findings, "warning", "unused", f"{number(int(unused.sum()), 'image')} in no split", facts, unused)


def _add(
    findings: Findings, severity: str, code: str, text: str, facts: SiteFacts, rows: np.ndarray | None = None
) -> None:
    """A finding about some rows (N,) of a site; the first of them are named."""
    places = [] if rows is None else np.flatnonzero(rows).tolist()
    shown = ", ".join(map(str, places[:SHOWN])) + (", ..." if len(places) > SHOWN else "")
    text = f"{text}; {'row' if len(places) == 1 else 'rows'} {shown}" if places else text
    findings.add(severity, code, text, facts.name, len(places), [(facts.name, row) for row in places[:SHOWN]])
