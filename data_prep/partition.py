"""Partitions of pooled training items into clients.

FedNoRo (IJCAI 2023, arXiv 2305.05230): Bernoulli class grants, then a Dirichlet share per class. FedA3I (AAAI 2024,
arXiv 2312.12838): shuffle and cut. Symbols: K num_clients, C num_classes, n items, p p_class, a alpha, Phi granted.
Departure from the published code: the column of Phi of a class that no client was granted is drawn again (it raises).

The functions are pure: labels and a generator in, `client_of_sample` (n,) int64 in [0, K) out. They accept
`numpy.random.RandomState` (which reproduces the published assignments) or `numpy.random.Generator`.
The dataclasses at the end are what `data.partition.name` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.seeding import Rng
from fedmed.errors import UserError


def class_grants(num_clients: int, num_classes: int, p_class: float, rng: Rng) -> np.ndarray:
    """Draw which client may hold which class: Phi (K, C) bool with no empty row and no empty column.

    Order of calls: the whole matrix, then all empty rows together until none is left, then each empty column
    (by class) until it is not. 0 < p_class <= 1.
    """
    if not 0.0 < p_class <= 1.0 or num_clients < 1 or num_classes < 1:
        raise UserError(
            f"fednoro partition: need 0 < p_class <= 1, num_clients >= 1 and num_classes >= 1, got p_class={p_class}, "
            f"num_clients={num_clients}, num_classes={num_classes}. Set data.partition.args."
        )
    granted = np.asarray(rng.binomial(1, p_class, size=(num_clients, num_classes)))
    empty = np.flatnonzero(granted.sum(axis=1) == 0)
    while len(empty):
        granted[empty] = rng.binomial(1, p_class, size=(len(empty), num_classes))
        empty = np.flatnonzero(granted.sum(axis=1) == 0)
    for label in range(num_classes):
        while not granted[:, label].any():
            granted[:, label] = rng.binomial(1, p_class, size=num_clients)
    return granted.astype(bool)


def fednoro_partition(
    labels: np.ndarray, num_clients: int, num_classes: int, p_class: float, alpha: float, rng: Rng
) -> np.ndarray:
    """Partition of FedNoRo: class by class, each item goes to a granted client with Dirichlet(a) odds.

    In: labels (n,) integers in [0, C); p_class in (0, 1]; alpha > 0. Out: client_of_sample (n,) int64. Per class one
    Dirichlet call and one weighted choice for all its items in ascending index. A client may end with no item.
    """
    labels = _check_labels(labels, num_classes)
    _check_alpha(alpha)
    granted = class_grants(num_clients, num_classes, p_class, rng)
    return _deal_by_class(labels, [np.flatnonzero(granted[:, label]) for label in range(num_classes)], alpha, rng)


def dirichlet_partition(labels: np.ndarray, num_clients: int, num_classes: int, alpha: float, rng: Rng) -> np.ndarray:
    """Label-skewed partition: for each class the items are dealt with odds ~ Dirichlet(alpha) over all K clients.

    In: labels (n,) in [0, C); alpha > 0 (small: strong skew). Out: client_of_sample (n,) int64.
    """
    labels = _check_labels(labels, num_classes)
    _check_clients(num_clients)
    _check_alpha(alpha)
    return _deal_by_class(labels, [np.arange(num_clients)] * num_classes, alpha, rng)


def iid_partition(num_items: int, num_clients: int, rng: Rng) -> np.ndarray:
    """Partition of FedA3I: shuffle 0..n-1 and cut into K consecutive parts whose sizes differ by at most one.

    Out: client_of_sample (n,) int64; the first n mod K clients hold one item more.
    """
    _check_clients(num_clients)
    order = np.arange(num_items)
    rng.shuffle(order)
    client = np.empty(num_items, dtype=np.int64)
    for index, part in enumerate(np.array_split(order, num_clients)):
        client[part] = index
    return client


def site_partition(site: np.ndarray, clients_per_site: Sequence[int], rng: Rng) -> np.ndarray:
    """Natural partition, each site cut further into clients at random.

    In: site (n,) int in [0, S); clients_per_site (S,) >= 1. Out: client_of_sample (n,) int64; site s owns the
    consecutive numbers after those of site s-1. All ones: the sites themselves, nothing drawn.
    """
    client = np.empty(len(site), dtype=np.int64)
    first = 0
    for index, count in enumerate(clients_per_site):
        members = np.flatnonzero(site == index)
        client[members] = first if count == 1 else first + iid_partition(len(members), count, rng)
        first += count
    return client


def _deal_by_class(labels: np.ndarray, holders: Sequence[np.ndarray], alpha: float, rng: Rng) -> np.ndarray:
    client = np.empty(len(labels), dtype=np.int64)
    for label, clients in enumerate(holders):
        members = np.flatnonzero(labels == label)
        odds = rng.dirichlet(np.repeat(alpha, len(clients)))
        client[members] = rng.choice(clients, size=len(members), p=odds)
    return client


def _check_labels(labels: np.ndarray, num_classes: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"partition by label: expected one integer class per item, got {labels.dtype} of shape {labels.shape}. "
            "Use data.partition.name=iid or natural for segmentation and multi-label files."
        )
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        raise UserError(
            f"partition by label: classes must lie in 0..{num_classes - 1}, got {labels.min()}..{labels.max()}. "
            "Check the label dataset of the site file."
        )
    return labels


def _check_alpha(alpha: float) -> None:
    if not 0.0 < alpha < float("inf"):
        raise UserError(f"partition: alpha must be a positive number, got {alpha}. Set data.partition.args.alpha.")


def _check_clients(num_clients: int) -> None:
    if num_clients < 1:
        raise UserError(f"partition: num_clients must be >= 1, got {num_clients}. Set data.partition.args.num_clients.")


@dataclass(frozen=True)
class Pool:
    """Items to partition: labels (n,) or None (no single label per item), site (n,) natural site index of each item."""

    labels: np.ndarray | None
    site: np.ndarray
    num_sites: int
    num_classes: int

    def single_labels(self) -> np.ndarray:
        """The labels (n,), or UserError when the items have none."""
        if self.labels is None:
            raise UserError(
                "partition by label: this file has no single class per item. Use data.partition.name=iid or natural."
            )
        return self.labels


class _PooledPartition:
    """Shared half of the partitions that pool all sites into `num_clients` clients."""

    num_clients: int

    def total(self, num_sites: int) -> int:
        """Number of clients K."""
        _check_clients(self.num_clients)
        return self.num_clients

    def owners(self, num_sites: int) -> np.ndarray | None:
        """None: a client is dealt validation and test items of any site."""
        return None


@dataclass(frozen=True)
class FedNoRoPartition(_PooledPartition):
    """`fednoro`: Bernoulli grants and Dirichlet shares. seed None: from the run's seed (the published one is 100)."""

    num_clients: int = 20  # K >= 1, paper
    p_class: float = 0.9  # p in (0, 1], official code
    alpha: float = 2.0  # a > 0, official code
    seed: int | None = None  # legacy seed >= 0; 100 in the official code

    def assign(self, pool: Pool, rng: Rng) -> np.ndarray:
        """client_of_sample (n,) int64."""
        labels = pool.single_labels()
        return fednoro_partition(labels, self.num_clients, pool.num_classes, self.p_class, self.alpha, rng)


@dataclass(frozen=True)
class Dirichlet(_PooledPartition):
    """`dirichlet`: label skew over all clients."""

    num_clients: int = 10  # K >= 1, our choice
    alpha: float = 1.0  # > 0, our choice; 1 = uniform over the simplex
    seed: int | None = None  # legacy seed >= 0; None: from the run's seed

    def assign(self, pool: Pool, rng: Rng) -> np.ndarray:
        """client_of_sample (n,) int64."""
        return dirichlet_partition(pool.single_labels(), self.num_clients, pool.num_classes, self.alpha, rng)


@dataclass(frozen=True)
class Iid(_PooledPartition):
    """`iid`: nearly equal random parts of the pooled items (FedA3I)."""

    num_clients: int = 50  # K >= 1, official code of FedA3I
    seed: int | None = None  # legacy seed >= 0; 0 in the official code

    def assign(self, pool: Pool, rng: Rng) -> np.ndarray:
        """client_of_sample (n,) int64."""
        return iid_partition(len(pool.site), self.num_clients, rng)


@dataclass(frozen=True)
class Natural:
    """`natural`: the sites of the file; with clients_per_site > 1 (one number, or one per site) each is cut further."""

    clients_per_site: int | list[int] = 1  # >= 1, our choice
    seed: int | None = None  # legacy seed >= 0; None: from the run's seed

    def counts(self, num_sites: int) -> list[int]:
        """Clients of each site, in site order; UserError when their number or values are wrong."""
        given = self.clients_per_site
        counts = [given] * num_sites if isinstance(given, int) else list(given)
        if len(counts) != num_sites or min(counts, default=0) < 1:
            raise UserError(
                f"natural partition: clients_per_site needs {num_sites} numbers >= 1 (one per site) or one for all, "
                f"got {given}. Set data.partition.args.clients_per_site."
            )
        return counts

    def total(self, num_sites: int) -> int:
        """Number of clients K."""
        return sum(self.counts(num_sites))

    def owners(self, num_sites: int) -> np.ndarray | None:
        """Natural site of each client (K,): a client is dealt validation and test items of its own site only."""
        return np.repeat(np.arange(num_sites), self.counts(num_sites))

    def assign(self, pool: Pool, rng: Rng) -> np.ndarray:
        """client_of_sample (n,) int64."""
        return site_partition(pool.site, self.counts(pool.num_sites), rng)


Partition = FedNoRoPartition | Dirichlet | Iid | Natural
