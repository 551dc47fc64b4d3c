"""What images have in common that must not: pixels, patients, and identifiers that tell who it is.

Identifiers are compared and counted; none is ever part of a finding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from data_prep.checks.contents import SHOWN
from data_prep.checks.findings import Findings, number
from data_prep.checks.scan import SiteFacts

_TRAIN, _TEST = 0, 2
_YEAR, _MONTH, _DAY = r"(?:19|20)\d\d", r"(?:0?[1-9]|1[0-2])", r"(?:0?[1-9]|[12]\d|3[01])"
_NAME = r"[A-ZÀ-Þ][a-zß-ÿ]{2,}"
_LOOKS_LIKE = {
    "a date": re.compile(
        rf"(?<!\d){_YEAR}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?:\d{{4}}|\d{{6}})?(?!\d)"
        rf"|(?<!\d){_YEAR}([-_./]){_MONTH}\1{_DAY}(?!\d)|(?<!\d){_DAY}([-_./]){_MONTH}\2{_YEAR}(?!\d)"
    ),
    "a DICOM identifier": re.compile(r"(?<![\d.])\d+(?:\.\d+){4,}(?![\d.])"),
    "a name": re.compile(rf"\^|(?<![^\W\d_]){_NAME}(?:, ?|[ _]){_NAME}(?![^\W\d_])"),
}
_CARET = re.compile(r"\^")  # parts of a person's name in DICOM
_HASH = re.compile(r"\b(?=[0-9a-f]*[a-f])[0-9a-f]{12,}\b")  # what an importer writes; digits in it mean nothing


def check_duplicates(sites: Sequence[SiteFacts], findings: Findings) -> None:
    """Images with the same pixels: in train and test an error, elsewhere a warning. Constant images do not count."""
    if not sites:
        return
    site = np.repeat(np.arange(len(sites)), [facts.frame.size for facts in sites])
    row = np.concatenate([np.arange(facts.frame.size) for facts in sites])
    split = np.concatenate([facts.frame.split_of() for facts in sites])
    digest = np.concatenate([facts.image.digest for facts in sites])
    usable = np.flatnonzero(~np.concatenate([f.image.constant for f in sites]) & (digest != 0).any(axis=1))
    order = usable[np.lexsort((digest[usable, 1], digest[usable, 0]))]  # stable: rows stay in order within a set
    starts = np.flatnonzero(np.r_[True, (digest[order][1:] != digest[order][:-1]).any(axis=1)]) if len(order) else order
    clusters = [part for part in np.split(order, starts[1:]) if len(part) > 1]
    kinds: dict[str, list[np.ndarray]] = {"train_test_duplicates": [], "site_duplicates": [], "duplicates": []}
    for members in clusters:
        if {_TRAIN, _TEST} <= set(split[members].tolist()):
            kinds["train_test_duplicates"].append(members)
        elif len(set(site[members].tolist())) > 1:
            kinds["site_duplicates"].append(members)
        else:
            kinds["duplicates"].append(members)
    said = {
        "train_test_duplicates": ("error", "in train and in test"),
        "site_duplicates": ("warning", "at several sites"),
        "duplicates": ("warning", "within a site"),
    }
    for code, found in kinds.items():
        if found:
            severity, where = said[code]
            places = [[(sites[site[member]].name, int(row[member])) for member in members] for members in found]
            listed = "; ".join(" = ".join(f"{name!r} row {r}" for name, r in one[:3]) for one in places[:SHOWN])
            text = f"{number(len(found), 'set')} of images with equal pixels {where}: {listed}"
            text += "; ..." if len(places) > SHOWN else ""
            flat = [place for one in places[:SHOWN] for place in one[:SHOWN]]
            findings.add(severity, code, text, count=sum(map(len, found)), rows=flat)


def check_groups(sites: Sequence[SiteFacts], findings: Findings) -> None:
    """Patients (lesions, volumes) whose images are in several splits of a site: error; at several sites: warning."""
    homes: dict[str, set[int]] = {}
    for index, facts in enumerate(sites):
        groups = facts.ids.get("group_id")
        if groups is None:
            if "group_id" not in facts.lengths:
                text = (
                    "no group_id: every image counts as a patient of its own, and leaks between splits cannot be seen"
                )
                findings.add("note", "no_groups", text, facts.name)
            continue
        nameless = int((groups == "").sum())
        if nameless:
            findings.add(
                "warning", "no_groups", f"{number(nameless, 'image')} with an empty group_id", facts.name, nameless
            )
        split = facts.frame.split_of()
        known, code = np.unique(groups, return_inverse=True)
        seen = np.zeros((len(known), 3), dtype=bool)
        seen[code[split >= 0], split[split >= 0]] = True
        leaks = (seen.sum(axis=1) > 1) & (known != "")
        if leaks.any():
            images = int(leaks[code].sum())
            volumes = "slice_no" in facts.flags
            what = number(int(leaks.sum()), "volume" if volumes else "group")
            text = f"{what} ({number(images, 'slice' if volumes else 'image')}) in several splits; deal them by patient"
            findings.add("error", "volume_leak" if volumes else "group_leak", text, facts.name, int(leaks.sum()))
        for name in known.tolist():
            if name:
                homes.setdefault(name, set()).add(index)
    shared = [places for places in homes.values() if len(places) > 1]
    if shared:
        where = sorted(set().union(*shared))
        names = ", ".join(repr(sites[index].name) for index in where[:SHOWN]) + (", ..." if len(where) > SHOWN else "")
        text = (
            f"{number(len(shared), 'group')} at several sites ({names}): the same patients, or sites that number alike"
        )
        findings.add("warning", "group_at_sites", text, count=len(shared))


def check_identifiers(sites: Sequence[SiteFacts], findings: Findings) -> None:
    """Identifiers that look as if they say who or when; images that share an item_id; identifiers that do not fit the images."""
    for key in ("item_id", "group_id"):
        values = [(facts, facts.ids[key]) for facts in sites if key in facts.ids]
        total = sum(len(ids) for _, ids in values)
        for what, pattern in _LOOKS_LIKE.items():
            hits = [sum(bool(pattern.search(_HASH.sub("", text))) for text in ids.tolist()) for _, ids in values]
            if any(hits):
                names = number(sum(hit > 0 for hit in hits), "site")
                text = f"{sum(hits)} of {total} {key} at {names} look like {what}: replace them by numbers before the file goes anywhere"
                findings.add("warning", "identifiers", text, count=sum(hits))
    for facts in sites:
        for key, length in facts.lengths.items():
            text = f"{key} has {length} entries, image has {facts.frame.size}"
            findings.add("error", "layout", text, facts.name)
        items = facts.ids.get("item_id")
        if items is not None and len(np.unique(items)) < len(items):
            twice = len(items) - len(np.unique(items))
            findings.add(
                "warning", "item_twice", f"{number(twice, 'image')} with the item_id of another", facts.name, twice
            )


def check_names(sites: Sequence[SiteFacts], classes: Sequence[str], findings: Findings) -> None:
    """Names of sites and classes that look like a patient's folder or cell. Two words in capitals are none: hospitals and findings have them."""
    for what, names in (("sites", [facts.name for facts in sites]), ("classes", list(classes))):
        for kind, pattern in {**_LOOKS_LIKE, "a name": _CARET}.items():
            hits = sum(bool(pattern.search(_HASH.sub("", name))) for name in names)
            if hits:
                text = f"{hits} of {len(names)} names of {what} look like {kind}: do they name patients?"
                findings.add("warning", "names", text, count=hits)
