"""FedMLP, maths of the local half: class prototypes, learning degrees, and pseudo-labels made from prototypes.

Source: arXiv 2406.18995 (MICCAI 2024) and its official code; see `clients/missing_classes.py`. n items of a site, C
classes, D features. Row 2c of a table (2C, D) stands for "class c absent", row 2c + 1 for "class c present". All float64.
Symbols: f → features, P_k → proto, m_k → counts, d_k → degree, s → difference, N₀ / N₁ → closer to absent / to present,
r₀ / r₁ → negative / positive fraction, π → prior, L / U → lower / upper.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Tags = npt.NDArray[np.uint8]

NONE, NEGATIVE, POSITIVE = 0, 1, 2  # values of a tag
EPS = 1e-12  # least product of two norms in a cosine: that of a zero vector is 0


def annotated_entries(flags: npt.NDArray[Any] | None, index: Ints, num_classes: int) -> Bools:
    """Which classes count as annotated for which items. In: flags (C,) or (N, C) 0/1 over the site, None = all; index (n,)
    places in the site. Out: (n, C).
    """
    if flags is None:
        return np.ones((len(index), num_classes), dtype=bool)
    rows = np.broadcast_to(flags, (len(index), num_classes)) if flags.ndim == 1 else flags[index]
    return np.asarray(rows != 0)


def class_prior(labels: Bools, annotated: Bools, tags: Tags) -> Floats:
    """Share of positives π_c: over the items annotated for c, or, where there are none, pseudo-positives over all items.

    In: (n, C) each; labels are read where annotated. Out: (C,) in [0, 1]. No item: 0.
    """
    known = annotated.sum(axis=0)
    rate = (labels & annotated).sum(axis=0) / np.maximum(known, 1)
    pseudo = (tags == POSITIVE).sum(axis=0) / max(len(tags), 1)
    return np.where(known > 0, rate, pseudo)


def clip_norms(features: Floats, limit: float) -> Floats:
    """Shorten every feature vector to a norm of at most `limit`; 0: leave them. (n, D) → (n, D)."""
    if limit == 0:
        return features
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    return features * np.minimum(1.0, limit / np.maximum(norm, EPS))


def local_prototypes(features: Floats, labels: Bools, annotated: Bools) -> tuple[Floats, Ints]:
    """P_k[2c + v] = mean of f over the items annotated for c with y_c = v. In: (n, D), (n, C), (n, C). Out: (2C, D) and the
    counts m_k (2C,); zeros where the count is 0.
    """
    member = np.stack([annotated & ~labels, annotated & labels], axis=2).reshape(len(labels), 2 * labels.shape[1])
    counts: Ints = np.asarray(member.sum(axis=0), dtype=np.int64)
    sums = member.T.astype(np.float64) @ features
    return np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], 0.0), counts


def withhold(proto: Floats, counts: Ints, min_count: int) -> tuple[Floats, Ints]:
    """Empty the rows of a class one side of which has some items, but fewer than `min_count`; their counts become 0.

    Both rows go: with a second class at hand, the small one could be had from the sum over all items. A side without
    items hides nobody, so the other may stay.
    """
    pairs = counts.reshape(-1, 2)
    few = np.asarray(((pairs > 0) & (pairs < min_count)).any(axis=1))
    kept = np.where(few[:, None], 0, pairs).reshape(-1)
    return np.where(kept[:, None] > 0, proto, 0.0), kept


def learning_degrees(prob: Floats, lower: float = 0.3, upper: float = 0.7) -> Floats:
    """d_k[c] = (1/n)·#{i: q_ic < L or q_ic > U}, how often the model is sure. (n, C) → (C,) in [0, 1]; no item: 0."""
    sure = (prob < lower) | (prob > upper)
    return np.asarray(sure.sum(axis=0) / max(len(prob), 1), dtype=np.float64)


def cosines(features: Floats, row: Floats) -> Floats:
    """cos(f_i, g) of every item, (n, D), (D,) → (n,); 0 for a zero vector. Equal items give equal values to the bit."""
    below = np.linalg.norm(features, axis=1) * np.linalg.norm(row)
    return np.asarray((features * row).sum(axis=1) / np.maximum(below, EPS))


def similarity_difference(features: Floats, proto: Floats) -> Floats:
    """s_ic = cos(f_i, G[2c]) − cos(f_i, G[2c + 1]), ≥ 0 where the item is closer to "absent". (n, D), (2C, D) → (n, C)."""
    sides = np.stack([cosines(features, row) for row in proto], axis=1)
    return np.asarray(sides[:, 0::2] - sides[:, 1::2])


def adaptive_fraction(base: float, degree: float) -> float:
    """r = min(1, r_base·d_G): few tags for a class that the models are not sure of."""
    return min(1.0, base * degree)


def quota(fraction: float, count: int, min_quota: int = 0) -> int:
    """How many of `count` items to tag: the float64 product is truncated; at least `min_quota`, at most all."""
    return min(max(int(fraction * count), min_quota), count)


def sides(difference: Floats) -> tuple[Bools, Bools]:
    """N₀ = {s ≥ 0} and N₁ = {s < 0}, (m,) each; NaN is in neither."""
    return difference >= 0, difference < 0


def most_confident(
    difference: Floats, ids: Ints, negative_fraction: float, positive_fraction: float, min_quota: int = 0
) -> tuple[Ints, Ints]:
    """The items to tag for one class, most confident first: negative those with the largest s of N₀, positive those with
    the smallest s of N₁; of equal ones the smaller id. In: s (m,) and ids (m,) of the candidates. Out: two lists of ids.
    """
    absent, present = sides(difference)
    order = np.lexsort((ids, -difference))
    negative = ids[order[absent[order]]][: quota(negative_fraction, int(absent.sum()), min_quota)]
    order = np.lexsort((ids, difference))
    positive = ids[order[present[order]]][: quota(positive_fraction, int(present.sum()), min_quota)]
    return negative, positive


def add_tags(
    tags: Tags, annotated: Bools, difference: Floats, usable: Bools, fractions: Floats, min_quota: int = 0
) -> Tags:
    """Tag further entries; tags that are there stay. Candidates of class c: items neither annotated nor tagged for c.

    In: tags, annotated, s (n, C); usable (C,), classes with both prototypes; fractions (2, C), r₀ and r₁. Out: (n, C), new.
    Equal s: the item that comes first.
    """
    out = tags.copy()
    for c in np.flatnonzero(usable):
        ids = np.flatnonzero(~annotated[:, c] & (tags[:, c] == NONE))
        found = most_confident(difference[ids, c], ids, float(fractions[0, c]), float(fractions[1, c]), min_quota)
        for value, chosen in zip((NEGATIVE, POSITIVE), found, strict=True):
            out[chosen, c] = value
    return out
