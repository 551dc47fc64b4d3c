"""Partitions of pooled training items into clients: what `data.partition.name` names. The mathematics is in `deal`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from data_prep.deal import (
    check_clients,
    class_grants,
    dirichlet_partition,
    fedism_partition,
    fednoro_partition,
    iid_partition,
    site_dirichlet_partition,
    site_partition,
)
from data_prep.seeding import Rng
from fedmed.errors import UserError

__all__ = [
    "Dirichlet",
    "FedISMPartition",
    "FedNoRoPartition",
    "Iid",
    "Natural",
    "NaturalDirichlet",
    "Partition",
    "Pool",
    "class_grants",
    "dirichlet_partition",
    "fedism_partition",
    "fednoro_partition",
    "iid_partition",
    "site_dirichlet_partition",
    "site_partition",
]


@dataclass(frozen=True)
class Pool:
    """Items to partition: labels (n,) or None (no single label per item), site (n,) natural site index of each item,
    groups (n,) its lesion, patient or case (None: an item is a group of its own).
    """

    labels: np.ndarray | None
    site: np.ndarray
    num_sites: int
    num_classes: int
    groups: np.ndarray | None = None

    def single_labels(self) -> np.ndarray:
        """The labels (n,), or UserError when the items have none."""
        if self.labels is None:
            raise UserError(
                "partition by label: this file has no single class per item. Use data.partition.name=iid or natural."
            )
        return self.labels


class _PooledPartition:
    """Shared half of the partitions that pool all sites into `num_clients` clients."""

    test_like_train: ClassVar[bool] = False  # validation and test items are dealt evenly
    num_clients: int

    def total(self, num_sites: int) -> int:
        """Number of clients K."""
        check_clients(self.num_clients)
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
class FedISMPartition(_PooledPartition):
    """`fedism`: the last `num_corrupted` clients are dealt from a pool of their own (classification only).

    Goes with the corruption `image_quality`, which by default degrades the last clients. The published pools are the
    leading and the trailing items of every class; where the items of natural sites lie one after the other, the second
    pool would be the last site, and its appearance would be mistaken for the degradation: hence `shuffle`.
    """

    num_clients: int = 20  # K >= 1, official code
    num_corrupted: int = 4  # K_c in 0..K, official code
    alpha: float = 1.0  # a > 0, official code
    shuffle: bool = True  # items into random order first, our option; false: the published pools
    seed: int | None = None  # legacy seed >= 0; 2024 in the official code

    def assign(self, pool: Pool, rng: Rng) -> np.ndarray:
        """client_of_sample (n,) int64."""
        labels = pool.single_labels()
        order = np.asarray(rng.permutation(len(labels))) if self.shuffle else np.arange(len(labels))
        client = np.empty(len(labels), dtype=np.int64)
        client[order] = fedism_partition(
            labels[order], self.num_clients, self.num_corrupted, pool.num_classes, self.alpha, rng
        )
        return client


@dataclass(frozen=True)
class Iid(_PooledPartition):
    """`iid`: nearly equal random parts of the pooled items (FedA3I)."""

    num_clients: int = 50  # K >= 1, official code of FedA3I
    seed: int | None = None  # legacy seed >= 0; 0 in the official code

    def assign(self, pool: Pool, rng: Rng) -> np.ndarray:
        """client_of_sample (n,) int64."""
        return iid_partition(len(pool.site), self.num_clients, rng)


class _NaturalPartition:
    """Shared half of the partitions that cut each site into clients of its own."""

    test_like_train: bool = False  # validation and test items are dealt evenly
    clients_per_site: int | list[int]

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


@dataclass(frozen=True)
class Natural(_NaturalPartition):
    """`natural`: the sites of the file; with clients_per_site > 1 (one number, or one per site) each is cut further."""

    clients_per_site: int | list[int] = 1  # >= 1, our choice
    seed: int | None = None  # legacy seed >= 0; None: from the run's seed

    def assign(self, pool: Pool, rng: Rng) -> np.ndarray:
        """client_of_sample (n,) int64."""
        return site_partition(pool.site, self.counts(pool.num_sites), rng)


@dataclass(frozen=True)
class NaturalDirichlet(_NaturalPartition):
    """`natural_dirichlet`: each site cut into clients with other classes; a lesion, patient or case stays at one client."""

    clients_per_site: int | list[int] = 3  # >= 1, one number or one per site, our choice
    alpha: float = 0.5  # > 0, our choice; small: strong skew
    min_items: int = 8  # training items every client has at least, >= 0, our choice
    test_like_train: bool = True  # validation and test items of a class as its training items; false: evenly
    seed: int | None = None  # legacy seed >= 0; None: from the run's seed

    def assign(self, pool: Pool, rng: Rng) -> np.ndarray:
        """client_of_sample (n,) int64."""
        groups = np.arange(len(pool.site)) if pool.groups is None else pool.groups
        return site_dirichlet_partition(
            pool.single_labels(),
            pool.site,
            groups,
            self.counts(pool.num_sites),
            pool.num_classes,
            self.alpha,
            self.min_items,
            rng,
        )


Partition = FedNoRoPartition | FedISMPartition | Dirichlet | Iid | Natural | NaturalDirichlet
