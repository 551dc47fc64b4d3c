"""Missing modalities as in PASSION (ACM MM 2024, arXiv 2407.14796): every modality misses at a rate of its own.

Symbols: M modalities (the channels of a file), n cases, p (M,) missing rates, c (n, M) availability of 0/1, never all 0.
Read about in the published mask generator, whose draws `published_masks` repeats on `numpy.random.RandomState`. What is
missing is fixed, once: all images of a case share a mask, and a modality that is missing is 0 in the image.
Departures: any number of modalities; rates of each client's own (the published method is centralised); a pattern that
the rates rule out (a rate of 0 or 1) gets no case, where the published quotas give it one; modalities that are really
missing stay so, and a case that both leave with nothing is drawn again among those it has.
With few cases the quotas, one case at least for each of the 2^M - 1 patterns, pull the achieved rates towards 1/2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import numpy as np

from data_prep.corruption import Degraded, ImageStack
from data_prep.seeding import Rng, Seed
from fedmed.errors import UserError

GENERATORS = ("published", "bernoulli")
# The published order of four modalities is nearly, but not quite, that of falling binary numbers.
ORDER_OF_FOUR = "1111 1101 1110 1100 1011 1010 1001 1000 0111 0101 0110 0100 0011 0010 0001"


def availability_patterns(num_modalities: int) -> np.ndarray:
    """All non-empty patterns (2^M - 1, M) of 0/1 in the order the quotas are dealt.

    Four modalities: the published order; else falling, read as binary numbers with the first modality in front.
    """
    if num_modalities == 4:
        return np.array([[int(flag) for flag in word] for word in ORDER_OF_FOUR.split()], dtype=np.uint8)
    return np.array(list(product((1, 0), repeat=num_modalities))[:-1], dtype=np.uint8)


def pattern_quotas(rates: Sequence[float], num_cases: int, *, skip_impossible: bool = False) -> np.ndarray:
    """Number of cases each pattern is dealt: max(1, floor(n prod_m (p_m if missing else 1 - p_m))), (2^M - 1,) int64.

    Multiplied in float64 from n on, in the order of the modalities, then cut. skip_impossible: 0 for a product of 0.
    """
    quotas = []
    for pattern in availability_patterns(len(rates)):
        share = float(num_cases)
        for present, rate in zip(pattern, rates, strict=True):
            share *= 1.0 - rate if present else rate
        quotas.append(0 if skip_impossible and share == 0.0 else max(1, int(share)))
    return np.array(quotas, dtype=np.int64)


def dealt_masks(patterns: np.ndarray, quotas: np.ndarray, num_cases: int) -> np.ndarray:
    """Masks (n, M) before the shuffle: each pattern as often as its quota says, in order, cut after n; the rest empty."""
    dealt = np.repeat(patterns, quotas, axis=0)[:num_cases]
    return np.concatenate([dealt, np.zeros((num_cases - len(dealt), patterns.shape[1]), dtype=patterns.dtype)])


def published_masks(
    rates: Sequence[float], num_cases: int, rng: np.random.RandomState, *, skip_impossible: bool = False
) -> np.ndarray:
    """Availability c (n, M) uint8 of n cases by the published generator; no row is empty.

    rates p (M,) in [0, 1], one below 1. Draws: n unused uniforms per modality; one shuffle, the same for all modalities;
    then in the order of cases one uniform u per modality of each empty case, present iff u > p_m, until one is.
    """
    for _ in rates:
        rng.rand(num_cases)
    quotas = pattern_quotas(rates, num_cases, skip_impossible=skip_impossible)
    columns = dealt_masks(availability_patterns(len(rates)), quotas, num_cases).T.copy()
    state = rng.get_state()
    for column in columns:
        rng.set_state(state)
        rng.shuffle(column)
    masks = columns.T.copy()
    for case in np.flatnonzero(~masks.any(axis=1)):
        masks[case] = _kept(rates, rng)
    return masks


def bernoulli_masks(rates: Sequence[float], num_cases: int, rng: Rng) -> np.ndarray:
    """Availability c (n, M) uint8: each modality of each case misses with its rate; an empty case is drawn again."""
    return np.array([_kept(rates, rng) for _ in range(num_cases)], dtype=np.uint8).reshape(num_cases, len(rates))


def with_really_missing(masks: np.ndarray, real: np.ndarray, rates: Sequence[float], rng: Rng) -> np.ndarray:
    """c AND what is really there; an empty case is drawn again among the modalities it really has.

    In: masks, real (n, M) of 0/1, no row of either empty; rates (M,). Out: (n, M) uint8, no row empty. Where all that
    a case has would always miss (rates of 1), the one with the lowest rate stays, the first of equals.
    """
    both = (masks & real).astype(np.uint8)
    for case in np.flatnonzero(~both.any(axis=1)):
        own = np.flatnonzero(real[case])
        left = np.asarray(rates)[own]
        if left.min() < 1.0:
            both[case, own] = _kept(left.tolist(), rng)
        else:
            both[case, own[0]] = 1
    return both


def _kept(rates: Sequence[float], rng: Rng) -> np.ndarray:
    """One case: modality m is present iff u_m > p_m, drawn until one is."""
    while True:
        kept = np.array([rng.uniform() > rate for rate in rates], dtype=np.uint8)
        if kept.any():
            return kept


@dataclass(frozen=True)
class MissingModality:
    """`missing_modality`: modalities that are missing at rates of each client's own; files with two channels or more.

    With seed None each client has a generator of its own, from the run's seed; a number gives the published stream: one
    legacy generator for the clients one after the other. Lists per client are repeated; each needs a rate below 1. The
    published rates of flair, t1c, t1, t2 are .6, .4, .2, .8.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation", "classification", "multilabel")
    rates: float | list[float] | list[list[float]] = 0.3  # p in [0, 1]: one, one per channel, or lists per client, ours
    generator: str = "published"  # "published" (quotas, official code) or "bernoulli" (each by itself), our option
    only_train: bool = True  # false: validation and test images of a client miss modalities too; our option
    seed: int | None = None  # legacy seed of the masks; 1037 in the official code; None: from the run's seed

    def __post_init__(self) -> None:
        lists = self._lists()
        if not lists or not all(lists):
            raise ValueError(f"need at least one rate, and one list per client where there are lists, got {self.rates}")
        if not all(0.0 <= rate <= 1.0 for rates in lists for rate in rates) or max(map(min, lists)) >= 1.0:
            raise ValueError(f"need rates in [0, 1], one below 1 for each client, got {self.rates}")
        if self.generator not in GENERATORS:
            raise ValueError(f"need generator = {' or '.join(GENERATORS)}, got {self.generator!r}")

    def apply_images(self, sites: Sequence[ImageStack], central: ImageStack | None, seed: Seed) -> Degraded:
        """Images with missing channels at 0 and the new `present`; central images stay complete.

        Facts, over the cases of the client (training cases with only_train): missing_rates (asked, (M,)),
        achieved_rates (share of the cases without the modality, (M,), 0 without cases), n_cases, n_dropped (modalities
        of a case that the protocol took), n_really_missing (that it never had), noise_rate (n_dropped / (n_cases M)),
        is_noisy (n_dropped > 0). UserError: one channel only, rates of another length, a case without any modality.
        """
        shared = None if self.seed is None else seed.rng("missing_modality", self.seed)
        results = []
        for client, stack in enumerate(sites):
            rng = shared or seed.rng(f"missing_modality/{client}")
            results.append(self._drop(stack, self.client_rates(client, _num_channels(stack)), rng))
        images, present, facts = zip(*results, strict=True)
        return Degraded(images, facts, present=present)

    def client_rates(self, client: int, num_modalities: int) -> list[float]:
        """p (M,) of a client; UserError when the list is of another length."""
        if not isinstance(self.rates, list):
            return [self.rates] * num_modalities
        lists = self._lists()
        rates = lists[client % len(lists)]
        if len(rates) != num_modalities:
            raise UserError(
                f"missing modality: the file has {num_modalities} channels, got {len(rates)} rates: {rates}. "
                "Set data.corruption.args.rates."
            )
        return rates

    def _lists(self) -> list[list[float]]:
        if not isinstance(self.rates, list):
            return [[self.rates]]
        nested = [rates for rates in self.rates if isinstance(rates, list)]
        return nested or [[rate for rate in self.rates if not isinstance(rate, list)]]

    def _drop(
        self, stack: ImageStack, rates: list[float], rng: np.random.RandomState
    ) -> tuple[np.ndarray | None, np.ndarray, dict[str, Any]]:
        """Images (None: as they were), presence (N, M) and facts of one client."""
        size = len(stack.images)
        rows = stack.train if self.only_train and stack.train is not None else np.arange(size)
        groups = np.arange(size) if stack.groups is None else stack.groups
        names, case = np.unique(groups[rows], return_inverse=True)
        present = np.ones((size, len(rates)), dtype=np.uint8) if stack.present is None else stack.present.copy()
        real = np.zeros((len(names), len(rates)), dtype=np.uint8)
        np.maximum.at(real, case, present[rows])
        if not real.any(axis=1).all():
            name = names[int(np.argmin(real.any(axis=1)))]
            name = name.decode() if isinstance(name, bytes) else name
            raise UserError(f"missing modality: case {name} has no modality at all. Correct modality_present.")
        if self.generator == "published":
            masks = published_masks(rates, len(names), rng, skip_impossible=True)
        else:
            masks = bernoulli_masks(rates, len(names), rng)
        left = with_really_missing(masks, real, rates, rng)
        images, present = drop_channels(stack.images, present, rows, left[case])
        return images, present, _facts(rates, real, left)


def drop_channels(
    images: np.ndarray, present: np.ndarray, rows: np.ndarray, left: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray]:
    """Take channels from some images: those images (None: none was taken) and what is present.

    In: images (N, H, W, M); present (N, M) of 0/1; left (n, M) of 0/1 for the images at `rows` (n,). A channel that is
    not present stays as stored. An image that has nothing of what is left of its case keeps what it has.
    """
    own = present[rows]
    kept = own & left
    kept = np.where(kept.any(axis=1, keepdims=True), kept, own).astype(np.uint8)
    gone = (own != 0) & (kept == 0)
    result = present.astype(np.uint8)
    result[rows] = kept
    if not gone.any():
        return None, result
    poor = images.copy()
    for channel in range(gone.shape[1]):
        poor[rows[gone[:, channel]], ..., channel] = 0
    return poor, result


def _num_channels(stack: ImageStack) -> int:
    channels = stack.images.shape[3] if stack.images.ndim == 4 else 1
    if channels < 2:
        raise UserError("missing modality: the images have one channel, which cannot be missing. Leave it out.")
    return channels


def _facts(rates: list[float], real: np.ndarray, left: np.ndarray) -> dict[str, Any]:
    """Realised figures of one client; real and left (n, M): what its cases had and have."""
    dropped = int((real != 0).sum() - (left != 0).sum())
    return {
        "is_noisy": dropped > 0,
        "noise_rate": dropped / real.size if real.size else 0.0,
        "missing_rates": np.array(rates),
        "achieved_rates": (left == 0).mean(axis=0) if len(left) else np.zeros(len(rates)),
        "n_cases": len(real),
        "n_dropped": dropped,
        "n_really_missing": int((real == 0).sum()),
    }
