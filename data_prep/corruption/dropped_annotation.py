"""Incomplete annotation: whole lesions left out of the training masks, at a rate per client (setting of FedIA).

FedIA: Federated Medical Image Segmentation with Heterogeneous Annotation Completeness, MICCAI 2024, arXiv 2407.02280.
Symbols: rho_k keep rate of client k, n components of a case. A case is one image ("2d") or the slices of one group that
a client holds ("3d"); a component is a 4-connected (2d) or 6-connected (3d) region of one class.
Departures: the authors' generator and their rates are not public; both are our choice here. Nothing is ever added: a
mask that comes out is part of the one that went in, and a component stays whole or goes whole.
Order of draws, in a generator of each client's own: its rate (range only); then per case, images in the order of the
pool or groups in the order of their names, one draw for all components of the case, ordered by class id, then by first
pixel (slice, row, column). Cases without a component draw nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from scipy import ndimage

from data_prep.corruption import Corrupted, TrainPool
from data_prep.geometry import mask_dice
from data_prep.seeding import Rng, Seed, integers
from fedmed.errors import UserError

DEFAULT_KEEP = (0.4, 0.6, 0.8, 1.0)  # our choice
RULES = ("independent", "exact", "single")
CONNECTIVITIES = ("2d", "3d")


def label_components(stack: np.ndarray, num_classes: int) -> tuple[np.ndarray, int]:
    """Number the face-connected regions of each class; regions of different classes never join.

    In: stack (S, H, W) integer class ids, neighbouring slices of one case, or S = 1 for an image. Out: (S, H, W) int32,
    0 none, 1..n by class id, then by first pixel in reading order; and n. Ids outside 1..C-1 (not annotated) give none.
    """
    components = np.zeros(stack.shape, dtype=np.int32)
    count = 0
    for label in range(1, num_classes):
        regions, found = ndimage.label(stack == label)
        if not found:
            continue
        names, first = np.unique(regions, return_index=True)
        rank = np.zeros(found + 1, dtype=np.int32)
        ordered = names[np.argsort(first)]
        rank[ordered[ordered > 0]] = np.arange(1, found + 1)  # the labelling promises no order of its own
        components += np.where(regions > 0, rank[regions] + count, 0).astype(np.int32)
        count += found
    return components, count


def label_volume(stack: np.ndarray, num_classes: int, places: np.ndarray, max_step: int = 1) -> tuple[np.ndarray, int]:
    """As `label_components`, for slices (S, H, W) at ascending places (S,): nothing joins across a larger step."""
    cuts = np.flatnonzero(np.diff(places) > max_step) + 1
    apart = np.insert(stack, cuts, 0, axis=0)  # an empty slice in each gap
    components, count = label_components(apart, num_classes)
    return np.delete(components, cuts + np.arange(len(cuts)), axis=0), count


def keep_components(count: int, rate: float, rule: str, rng: Rng) -> np.ndarray:
    """Which of n components stay: (n,) bool. n = 0: nothing is drawn.

    independent: each with probability rho; exact: ceil(rho n) of them; single: one (rho unused). Draws do not depend on
    rho, so what stays at a lower rate is part of what stays at a higher one.
    """
    kept = np.zeros(count, dtype=bool)
    if count == 0:
        return kept
    if rule == "independent":
        return np.asarray(rng.uniform(size=count)) < rate
    if rule == "exact":
        wanted = int(np.ceil(rate * count - 1e-9))  # 0.7 * 10 is above 7 in floating point
        kept[np.asarray(rng.permutation(count))[:wanted]] = True
    else:
        kept[integers(rng, count)] = True
    return kept


def drop_components(
    stack: np.ndarray, components: np.ndarray, count: int, rate: float, rule: str, rng: Rng, min_area: int = 1
) -> tuple[np.ndarray, int, int]:
    """One case with components left out: masks (S, H, W) of the same dtype, candidates and how many of them went.

    In: stack (S, H, W) class ids; components (S, H, W) with numbers 1..n. Candidates have at least `min_area` pixels;
    smaller ones stay and are not counted.
    """
    areas = np.bincount(components.ravel(), minlength=count + 1)[1:]
    candidate = areas >= min_area
    kept = np.ones(count + 1, dtype=bool)  # entry 0: background and pixels that are not annotated stay
    kept[1:][candidate] = keep_components(int(candidate.sum()), rate, rule, rng)
    return np.where(kept[components], stack, 0).astype(stack.dtype), int(candidate.sum()), int((~kept).sum())


@dataclass(frozen=True)
class DroppedAnnotation:
    """`dropped_annotation`: parameters of the corruption; segmentation files only.

    Areas in pixels of the derived (resized) image. Rates per client from `keep`, or drawn between keep_low and
    keep_high.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)
    keep: tuple[float, ...] | None = None  # rho of clients 0, 1, ..., repeated, [0, 1]; None: 0.4, 0.6, 0.8, 1
    keep_low: float | None = None  # instead of keep: rho ~ U(low, high), 0 <= low <= high, our option
    keep_high: float | None = None  # upper end, <= 1, our option
    rule: str = "independent"  # or "exact" (ceil(rho*n) of n per case), "single" (one, rho unused), our choice
    connectivity: str = "2d"  # components of an image ("2d") or of a volume ("3d", needs slice_no), our choice
    max_slice_step: int = 1  # 3d: largest step of slice_no that still touches, >= 1; a larger one separates, our choice
    min_area: int = 1  # smaller components (pixels; 3d: voxels) always stay and do not count, >= 1, our choice
    seed: int | None = None  # of the draws; None: from the run's seed

    def __post_init__(self) -> None:
        if self.rule not in RULES or self.connectivity not in CONNECTIVITIES:
            raise ValueError(
                f"need rule in {', '.join(RULES)} and connectivity in {', '.join(CONNECTIVITIES)}, got {self.rule!r} "
                f"and {self.connectivity!r}"
            )
        if self.min_area < 1 or self.max_slice_step < 1:
            raise ValueError(
                f"need min_area >= 1 and max_slice_step >= 1, got {self.min_area} and {self.max_slice_step}"
            )
        if (self.keep_low is None) != (self.keep_high is None):
            raise ValueError(f"need both keep_low and keep_high, or neither, got {self.keep_low} and {self.keep_high}")
        if self.keep_low is None or self.keep_high is None:
            if self.keep is not None and (not self.keep or not all(0.0 <= rate <= 1.0 for rate in self.keep)):
                raise ValueError(f"need keep to be a list of rates in [0, 1], got {list(self.keep)}")
        elif self.keep is not None:
            raise ValueError("need keep or keep_low and keep_high, got both; set keep to null for the range")
        elif not 0.0 <= self.keep_low <= self.keep_high <= 1.0:
            raise ValueError(f"need 0 <= keep_low <= keep_high <= 1, got {self.keep_low} and {self.keep_high}")

    def apply(self, pool: TrainPool, seed: Seed) -> Corrupted:
        """Masks of the pool with components set to background; a client's draws depend on no other client.

        Facts: keep_rate (rho; not for "single"), completeness (share of components that stayed, 1 without any),
        n_components, n_dropped, dropped_pixel_fraction, n_emptied (images that lost all), mean_dice with the clean
        masks, noise_rate (1 - completeness), is_noisy: completeness below 1. UserError: "3d" without usable slice_no.
        """
        if self.connectivity == "3d":
            _check_places(pool)
        base = seed if self.seed is None else Seed(self.seed)
        given = pool.targets.copy()
        facts = []
        for client in range(pool.num_clients):
            rng = base.rng(f"dropped_annotation/{client}")
            rate = self._rate(client, rng)
            count = dropped = 0
            for case in self._cases(pool, client):
                components, number = self._label(pool, case)
                given[case], found, gone = drop_components(
                    pool.targets[case], components, number, rate, self.rule, rng, self.min_area
                )
                count, dropped = count + found, dropped + gone
            members = pool.client == client
            asked = {} if self.rule == "single" else {"keep_rate": rate}
            facts.append({**asked, **_facts(pool.targets[members], given[members], pool.num_classes, count, dropped)})
        return Corrupted(given, tuple(facts))

    def _rate(self, client: int, rng: Rng) -> float:
        if self.keep_low is not None and self.keep_high is not None:
            return float(rng.uniform(self.keep_low, self.keep_high))
        rates = self.keep or DEFAULT_KEEP
        return rates[client % len(rates)]

    def _cases(self, pool: TrainPool, client: int) -> Iterator[np.ndarray]:
        """Item indices of each case of a client, slices in ascending place."""
        items = np.flatnonzero(pool.client == client)
        if self.connectivity == "2d" or pool.slices is None:
            yield from items[:, None]
            return
        for group in np.unique(pool.groups[items]):
            slices = items[pool.groups[items] == group]
            yield slices[np.argsort(pool.slices[slices])]

    def _label(self, pool: TrainPool, case: np.ndarray) -> tuple[np.ndarray, int]:
        if self.connectivity == "2d" or pool.slices is None:
            return label_components(pool.targets[case], pool.num_classes)
        return label_volume(pool.targets[case], pool.num_classes, pool.slices[case], self.max_slice_step)


def _check_places(pool: TrainPool) -> None:
    """3-D components need to know which image lies next to which."""
    advice = "Set data.corruption.args.connectivity=2d, or write slice_no and group_id into the site file."
    places = pool.slices
    if places is None or places.ndim != 1 or places.dtype.kind not in "iuf" or not np.isfinite(places).all():
        raise UserError(
            f"dropped annotation: connectivity 3d needs slice_no, one number per image, at all sites. {advice}"
        )
    names, group = np.unique(pool.groups, return_inverse=True)
    spots, count = np.unique(np.stack([pool.client, group, places]), axis=1, return_counts=True)
    if count.max(initial=1) > 1:
        name = names[int(spots[1, np.argmax(count)])]
        name = name.decode() if isinstance(name, bytes) else name
        raise UserError(f"dropped annotation: case {name} has two images with the same slice_no. {advice}")


def _facts(clean: np.ndarray, given: np.ndarray, num_classes: int, count: int, dropped: int) -> dict[str, Any]:
    """Realised figures of one client; clean and given (n, H, W)."""
    # pixels that are not annotated are no class: they count nowhere
    clean, given = (np.where(masks < num_classes, masks, 0) for masks in (clean, given))
    scores = [mask_dice(*pair) for pair in zip(clean, given, strict=True)]
    before, after = np.count_nonzero(clean, axis=(1, 2)), np.count_nonzero(given, axis=(1, 2))
    incomplete = dropped / count if count else 0.0
    return {
        "noise_rate": incomplete,
        "completeness": 1.0 - incomplete,
        "n_components": count,
        "n_dropped": dropped,
        "dropped_pixel_fraction": 1.0 - float(after.sum() / before.sum()) if before.sum() else 0.0,
        "n_emptied": int(((before > 0) & (after == 0)).sum()),
        "mean_dice": float(np.mean(scores)) if scores else 1.0,
        "is_noisy": dropped > 0,
    }
