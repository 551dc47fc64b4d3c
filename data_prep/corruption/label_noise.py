"""Heterogeneous label noise of FedNoRo (IJCAI 2023, arXiv 2305.05230): a fraction of clients, each with its own rate.

Symbols: K num_clients, rho noisy_fraction, [lo, hi] rate range, r_k rates, q soft_labels, y labels, C num_classes.
The order of draws is that of the published code, so `numpy.random.RandomState(seed)` reproduces its labels.
Departures: rows of q whose mass off the label is below 1e-6 are mixed with 1e-6 uniform (the code raises when too few
samples can change, or divides 0 by 0); clients without samples draw nothing. The published per-image soft labels are
not public: `soft_labels` is a stand-in from a cross-fitted linear classifier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from data_prep.corruption import Corrupted, TrainPool
from data_prep.seeding import Rng, Seed, integers
from fedmed.errors import UserError

UNIFORM_MIX = 1e-6  # share of the uniform distribution in rows that could not change otherwise


def noise_rates(num_clients: int, noisy_fraction: float, lower: float, upper: float, rng: Rng) -> np.ndarray:
    """Noise rate of each client: r_k = flag_k * (lo + (hi - lo) * U_k).

    Out: (K,) float64, 0 for clean clients. floor(rho*K) flags are set, shuffled in place; then U for all K clients.
    0 <= rho <= 1, 0 <= lo <= hi <= 1, else UserError.
    """
    if not 0.0 <= noisy_fraction <= 1.0 or not 0.0 <= lower <= upper <= 1.0:
        raise UserError(
            f"label noise: need 0 <= noisy_fraction <= 1 and 0 <= rate_lower <= rate_upper <= 1, got {noisy_fraction}, "
            f"{lower}, {upper}. Set data.corruption.args."
        )
    flags = np.zeros(num_clients)
    flags[: int(noisy_fraction * num_clients)] = 1
    rng.shuffle(flags)
    return flags * (lower + (upper - lower) * rng.uniform(size=num_clients))


def instance_noise(labels: np.ndarray, soft_labels: np.ndarray, rate: float, rng: Rng) -> np.ndarray:
    """Instance-dependent noise in one client: floor(r*n) samples, all of which change.

    In: labels (n,) int, soft_labels q (n, C) float64 rows on the simplex. Samples are picked without replacement with
    odds 1 - q[y]; the new label follows q without entry y, renormalised. Out: labels (n,), a copy.
    """
    noisy = labels.copy()
    count = int(rate * len(labels))
    if count == 0:
        return noisy
    rows = np.arange(len(labels))
    soft_labels = _open_rows(soft_labels, labels)
    odds = 1.0 - soft_labels[rows, labels]
    picked = rng.choice(len(labels), size=count, replace=False, p=odds / odds.sum())
    for item in picked:
        other = soft_labels[item].copy()
        other[labels[item]] = 0.0
        noisy[item] = rng.choice(len(other), p=other / other.sum())
    return noisy


def random_noise(labels: np.ndarray, num_classes: int, rate: float, rng: Rng) -> np.ndarray:
    """Symmetric noise in one client: each sample with U <= r gets a uniform class of all C (it may keep its own).

    In: labels (n,) int. Out: labels (n,), a copy. Expected share of changed labels: r * (C - 1) / C.
    """
    noisy = labels.copy()
    picked = rng.uniform(size=len(labels)) <= rate
    noisy[picked] = integers(rng, num_classes, int(picked.sum()))
    return noisy


def label_noise(
    labels: np.ndarray,
    client_of_sample: np.ndarray,
    rates: np.ndarray,
    kind: str,
    num_classes: int,
    rng: Rng,
    soft_labels: np.ndarray | None = None,
) -> np.ndarray:
    """Noisy labels of all clients, visited in ascending id, samples of a client in ascending index.

    In: labels (n,) int in [0, C), client_of_sample (n,) in [0, K), rates (K,), kind "instance" (needs soft_labels
    (n, C)) or "random". Out: labels (n,). Clients with rate 0 draw nothing.
    """
    if kind not in ("instance", "random"):
        raise UserError(f"label noise: kind must be instance or random, got {kind!r}. Set data.corruption.args.kind.")
    if kind == "instance" and (rates > 0).any():
        soft_labels = _check_soft(soft_labels, labels)
    noisy = labels.copy()
    for client in np.flatnonzero(rates > 0):
        members = np.flatnonzero(client_of_sample == client)
        if len(members) == 0:
            continue
        if soft_labels is not None and kind == "instance":
            noisy[members] = instance_noise(labels[members], soft_labels[members], float(rates[client]), rng)
        else:
            noisy[members] = random_noise(labels[members], num_classes, float(rates[client]), rng)
    return noisy


def realised_rates(clean: np.ndarray, noisy: np.ndarray, client: np.ndarray, num_clients: int) -> np.ndarray:
    """Share of changed labels of each client: (K,) float64, 0 for a client without samples."""
    changed = np.bincount(client, weights=clean != noisy, minlength=num_clients)
    rates: np.ndarray = changed / np.maximum(np.bincount(client, minlength=num_clients), 1)
    return rates


def colour_means(images: np.ndarray, cells: int = 8) -> np.ndarray:
    """Mean colour of a cells x cells grid over each image: (N, H, W[, channels]) -> (N, cells*cells*channels) float64.

    H and W need not be multiples of `cells` (cell borders are rounded); H, W >= cells, else the grid is H x W.
    """
    stack = images.reshape(*images.shape[:3], -1)
    rows, columns = (np.linspace(0, size, min(cells, size) + 1).astype(int) for size in stack.shape[1:3])
    sums = np.add.reduceat(np.add.reduceat(stack.astype(np.float64), rows[:-1], axis=1), columns[:-1], axis=2)
    areas = np.diff(rows)[:, None] * np.diff(columns)[None, :]
    means: np.ndarray = (sums / areas[None, :, :, None]).reshape(len(images), -1)
    return means


def soft_labels(
    images: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    num_classes: int,
    rng: Rng,
    folds: int = 5,
    inverse_penalty: float = 0.01,
    mix: float = 1e-3,
) -> np.ndarray:
    """Per-image class probabilities from a classifier that never saw the image or another image of its group.

    In: images (N, H, W[, channels]), labels (N,) int in [0, C), groups (N,). Class-weighted logistic regression
    (inverse penalty C = 0.01) on standardised 8x8 colour means, one fit per fold; whole groups are dealt to the folds
    at random. Out: q (N, C) float64, rows sum to 1, every entry >= mix / C. Where the training part of a fold holds one
    class, its class shares stand in; with a single group those of all items. Our choice: see the module's header.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    names, group_index = np.unique(groups, return_inverse=True)
    folds = max(1, min(folds, len(names)))
    fold = iid_folds(len(names), folds, rng)[group_index]
    features = colour_means(images)
    result = np.zeros((len(labels), num_classes))
    for index in range(folds):
        held_out = fold == index
        seen = ~held_out if folds > 1 else held_out
        shares = np.bincount(labels[seen], minlength=num_classes)
        if (shares > 0).sum() < 2:
            result[held_out] = shares / max(shares.sum(), 1)
            continue
        scaler = StandardScaler().fit(features[seen])
        model = LogisticRegression(C=inverse_penalty, class_weight="balanced", max_iter=1000)
        model.fit(scaler.transform(features[seen]), labels[seen])
        result[np.ix_(held_out, model.classes_)] = model.predict_proba(scaler.transform(features[held_out]))
    mixed: np.ndarray = (1.0 - mix) * result / result.sum(axis=1, keepdims=True) + mix / num_classes
    return mixed


def iid_folds(num_groups: int, folds: int, rng: Rng) -> np.ndarray:
    """Fold of each group (num_groups,), sizes differing by at most one."""
    return np.asarray(rng.permutation(num_groups)) % folds


@dataclass(frozen=True)
class LabelNoise:
    """`label_noise`: parameters of the noise; classification files only. seed None: from the run's seed."""

    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    kind: str = "instance"  # "instance" (default of the official code) or "random" (symmetric)
    noisy_fraction: float = 0.4  # rho in [0, 1], official code
    rate_lower: float = 0.5  # lo in [0, 1], official code
    rate_upper: float = 0.7  # hi in [lo, 1], official code
    soft_mix: float = 1e-3  # share of uniform in the soft labels, (0, 1], our choice
    seed: int | None = None  # legacy seed of the noise; 0 in the official code

    def apply(self, pool: TrainPool, seed: Seed) -> Corrupted:
        """Noisy labels of the pool; facts: noise_rate (share changed), is_noisy (any changed), drawn_rate (r_k)."""
        rng = seed.rng("label_noise", self.seed)
        base = seed if self.seed is None else Seed(self.seed)
        rates = noise_rates(pool.num_clients, self.noisy_fraction, self.rate_lower, self.rate_upper, rng)
        soft = None
        if self.kind == "instance" and (rates > 0).any():
            # own generator: the folds must not shift the published stream of draws
            fold_rng = base.rng("soft_labels")
            soft = soft_labels(pool.images, pool.targets, pool.groups, pool.num_classes, fold_rng, mix=self.soft_mix)
        noisy = label_noise(pool.targets, pool.client, rates, self.kind, pool.num_classes, rng, soft)
        realised = realised_rates(pool.targets, noisy, pool.client, pool.num_clients)
        facts = tuple(
            {"noise_rate": float(real), "is_noisy": bool(real > 0), "drawn_rate": float(drawn)}
            for real, drawn in zip(realised, rates, strict=True)
        )
        return Corrupted(noisy, facts)


def _open_rows(soft: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mix rows that hold (nearly) nothing besides their label with 1e-6 uniform: now they can be picked and change."""
    closed = 1.0 - soft[np.arange(len(labels)), labels] <= UNIFORM_MIX
    if not closed.any():
        return soft
    opened = soft.copy()
    opened[closed] = (1.0 - UNIFORM_MIX) * soft[closed] + UNIFORM_MIX / soft.shape[1]
    return opened


def _check_soft(soft: np.ndarray | None, labels: np.ndarray) -> np.ndarray:
    if soft is None:
        soft = np.empty((0, 0))
    highest = int(labels.max(initial=0))
    if soft.ndim != 2 or len(soft) != len(labels) or soft.shape[1] < max(2, highest + 1):
        raise UserError(
            f"instance noise: expected soft labels ({len(labels)}, C), C >= {max(2, highest + 1)}, got {soft.shape}. "
            "Use kind=random or check the number of classes."
        )
    if not np.isfinite(soft).all() or soft.min(initial=0) < 0 or np.abs(soft.sum(axis=1) - 1).max(initial=0) > 1e-4:
        raise UserError("instance noise: soft labels must be finite, >= 0 and sum to 1 in each row. Normalise them.")
    return soft.astype(np.float64)
