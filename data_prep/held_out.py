"""Which client is dealt which validation and test items, after the training items are dealt.

n items of one split, K clients; `owners` (K,) is the natural site of each client, None where clients have no site of their own.
"""

from __future__ import annotations

import numpy as np

from data_prep.deal import iid_partition
from data_prep.seeding import Rng


def deal_evenly(site: np.ndarray, num_clients: int, owners: np.ndarray | None, rng: Rng) -> np.ndarray:
    """At random in nearly equal parts, to all clients or to those of the item's own site. In: site (n,). Out: client (n,)."""
    if owners is None:
        return iid_partition(len(site), num_clients, rng)
    client = np.empty(len(site), dtype=np.int64)
    for index in range(int(owners.max(initial=-1)) + 1):
        own, clients = np.flatnonzero(site == index), np.flatnonzero(owners == index)
        client[own] = clients[iid_partition(len(own), len(clients), rng)]
    return client


def deal_alike(
    labels: np.ndarray, site: np.ndarray, train_counts: np.ndarray, owners: np.ndarray, rng: Rng
) -> np.ndarray:
    """Items of a class in proportion to the training items the clients of that site have of it, so that a client is tested on what it sees.

    In: labels (n,), site (n,), train_counts (K, C), owners (K,). Out: client (n,). Whole numbers by the largest remainder (the first of equals);
    a class that no client of the site trains on is dealt evenly. Draws: one permutation per site and class that has items, ascending.
    """
    client = np.empty(len(labels), dtype=np.int64)
    for index in range(int(owners.max(initial=-1)) + 1):
        clients = np.flatnonzero(owners == index)
        for label in np.unique(labels[site == index]):
            own = np.asarray(rng.permutation(np.flatnonzero((site == index) & (labels == label))))
            counts = train_counts[clients, label].astype(np.float64)
            share = counts / counts.sum() if counts.sum() > 0 else np.full(len(clients), 1.0 / len(clients))
            client[own] = np.repeat(clients, largest_remainder(share, len(own)))
    return client


def largest_remainder(share: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers nearest to share · total that sum to `total`. In: (K,) >= 0 with sum 1. Out: (K,) int64."""
    exact = share * total
    whole = np.floor(exact + 1e-9).astype(np.int64)  # 1e-9: a share such as 1/3 of 3 items must not lose one
    order = np.argsort(-(exact - whole), kind="stable")
    whole[order[: total - int(whole.sum())]] += 1
    return whole
