"""Train, validation and test: what the source says, else dealt by group at random, as near to the shares asked for as whole groups allow.

Letters: G groups of a site, K columns that shall be balanced (all images, then images of each label).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from data_prep.importers.base import Entry
from fedmed.data.site_checks import SPLITS
from fedmed.errors import UserError

TRAIN, VAL, TEST = range(3)
_PASSES = 20  # over all groups; a pass that moves none ends it


def parse_split(text: str) -> tuple[float, float, float]:
    """Shares of train, validation and test, sum 1, from "70/10/20" (any numbers >= 0). Raises UserError."""
    try:
        parts = [float(part) for part in text.split("/")]
    except ValueError:
        parts = []
    if len(parts) != 3 or not all(0 <= part < float("inf") for part in parts) or sum(parts) <= 0:
        raise UserError(f"--split: expected three numbers such as 70/10/20 (train/validation/test), got {text!r}")
    return parts[0] / sum(parts), parts[1] / sum(parts), parts[2] / sum(parts)


def said_splits(entries: Iterable[Entry]) -> tuple[dict[str, int], list[str]]:
    """Split of each group as the source says it, and remarks for the user.

    A group the source puts into two splits goes to train as a whole, so that no patient is tested on who was trained on. A source that puts
    everything into one split says nothing.
    """
    found: dict[str, set[int]] = defaultdict(set)
    silent = False
    for entry in entries:
        if entry.split:
            found[entry.group].add(SPLITS.index(entry.split))
        else:
            silent = True
    named = set().union(*found.values()) if found else set()
    if len(named) == 1 and not silent:
        return {}, [f"the source has one split only ({SPLITS[named.pop()]}); its groups are dealt anew"]
    torn = sum(len(splits) > 1 for splits in found.values())
    remarks = (
        [f"{torn} groups lie in more than one split of the source; all of their images go to train"] if torn else []
    )
    return {group: TRAIN if len(splits) > 1 else next(iter(splits)) for group, splits in found.items()}, remarks


def deal(
    groups: Sequence[str],
    labels: np.ndarray | None,
    fixed: Mapping[str, int],
    shares: Sequence[float],
    seed: int,
    site: str,
) -> dict[str, int]:
    """Split of every group of one site.

    groups: group of each image, N names; labels: (N,) class ids or (N, L) 0/1, balanced too, or None; fixed: groups that are settled;
    shares: of train, validation and test; seed, site: choose the draw. A site of two or more groups gets one of train and test at least,
    where these have a share; a single group goes to train.
    """
    names, owner = np.unique(np.array(groups, dtype=object), return_inverse=True)
    counts = _counts(owner, len(names), labels)
    target = np.array(shares)[:, None] * counts.sum(axis=0)
    settled = np.array([fixed.get(name, -1) for name in names], dtype=np.int64)
    free = np.flatnonzero(settled < 0)
    if len(names) == 1 and len(free) and shares[TRAIN] > 0:
        return {names[0]: TRAIN}
    words = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, *site.encode("utf-8", "surrogateescape")]
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence(words))).permutation(free)
    chosen = settled.copy()
    current = np.zeros_like(target)
    for group in np.flatnonzero(settled >= 0):
        current[chosen[group]] += counts[group]
    for group in order:
        chosen[group] = int(np.argmin((current - target) @ counts[group]))
        current[chosen[group]] += counts[group]
    _improve(chosen, current, target, counts, order)
    _fill_empty(chosen, counts, order, shares)
    return dict(zip(names.tolist(), chosen.tolist(), strict=True))


def _counts(owner: np.ndarray, num_groups: int, labels: np.ndarray | None) -> np.ndarray:
    """Images of each group, and of each label in it: (G, K) float64."""
    columns = [np.ones(len(owner))]
    if labels is not None and labels.ndim == 1:
        columns += [(labels == value).astype(float) for value in np.unique(labels)]
    elif labels is not None:
        columns += [(labels[:, index] > 0).astype(float) for index in range(labels.shape[1])]
    return np.stack([np.bincount(owner, weights=column, minlength=num_groups) for column in columns], axis=1)


def _improve(
    chosen: np.ndarray, current: np.ndarray, target: np.ndarray, counts: np.ndarray, order: np.ndarray
) -> None:
    """Move single groups as long as that brings the sum of squared deviations from the target down; works in place."""
    for _ in range(_PASSES):
        moved = False
        for group in order:
            here, own = chosen[group], counts[group]
            gain = (current - target) @ own  # moving from a to b changes the sum by 2 (gain[b] - gain[a] + own @ own)
            there = int(np.argmin(np.where(np.arange(3) == here, np.inf, gain)))
            if gain[there] - gain[here] + own @ own < -1e-9:
                current[here] -= own
                current[there] += own
                chosen[group] = there
                moved = True
        if not moved:
            return


def _fill_empty(chosen: np.ndarray, counts: np.ndarray, order: np.ndarray, shares: Sequence[float]) -> None:
    """Give train and test a group each, the smallest of the split that has most groups to spare; works in place."""
    for split in (TRAIN, TEST):
        if shares[split] <= 0 or (chosen == split).any():
            continue
        sizes = [int((chosen == other).sum()) for other in range(3)]
        movable = [group for group in order if sizes[chosen[group]] > 1 or chosen[group] == VAL]
        if movable:
            chosen[min(movable, key=lambda group: counts[group, 0])] = split
