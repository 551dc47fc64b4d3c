"""Pure partitions: labels and a generator in, `client_of_sample` (n,) int64 in [0, K) out.

FedNoRo (IJCAI 2023, arXiv 2305.05230): Bernoulli class grants, then a Dirichlet share per class. FedA3I (AAAI 2024,
arXiv 2312.12838): shuffle and cut. FedISM (IJCAI 2024, arXiv 2404.17805): two pools, Dirichlet shares in each. Sites cut
by Dirichlet shares stand for the long tails of FedNPR (arXiv 2407.12446) and FCA, whose own draw is not published.
Symbols: K num_clients, C num_classes, n items, p p_class, a alpha, Phi granted, K_c num_corrupted.
Departure from the published code: the column of Phi of a class that no client was granted is drawn again (it raises).

The functions accept `numpy.random.RandomState` (which reproduces the published assignments) or `numpy.random.Generator`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_prep.seeding import Rng
from fedmed.errors import UserError

REDRAWS = 100  # draws of a site before its smallest clients are topped up


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
    check_clients(num_clients)
    _check_alpha(alpha)
    return _deal_by_class(labels, [np.arange(num_clients)] * num_classes, alpha, rng)


def fedism_partition(
    labels: np.ndarray, num_clients: int, num_corrupted: int, num_classes: int, alpha: float, rng: Rng
) -> np.ndarray:
    """Partition of FedISM: the last K_c clients share a pool of their own, which holds K_c/K of every class.

    In: labels (n,) integers in [0, C); 0 <= K_c <= K; alpha > 0. Out: client_of_sample (n,) int64. Of every class the
    leading rint((K - K_c)/K * n_c) items go to the first pool, the others to the second. Order of draws per class:
    Dirichlet(a) odds of the first K - K_c clients, then of the last K_c, then one weighted choice per pool. With K_c = 0
    or K there is one pool and its draws (the published code raises). A client may end with no item.
    """
    labels = _check_labels(labels, num_classes)
    check_clients(num_clients)
    _check_alpha(alpha)
    if not 0 <= num_corrupted <= num_clients:
        raise UserError(
            f"fedism partition: expected 0 <= num_corrupted <= num_clients, got num_corrupted={num_corrupted}, "
            f"num_clients={num_clients}. Set data.partition.args."
        )
    num_clean = num_clients - num_corrupted
    holders = (np.arange(num_clean), np.arange(num_clean, num_clients))
    client = np.empty(len(labels), dtype=np.int64)
    for label in range(num_classes):
        members = np.flatnonzero(labels == label)
        pools = np.split(members, [int(np.rint(num_clean / num_clients * len(members)))])
        odds = [rng.dirichlet(np.repeat(alpha, len(clients))) if len(clients) else None for clients in holders]
        for clients, share, items in zip(holders, odds, pools, strict=True):
            if share is not None:
                client[items] = rng.choice(clients, size=len(items), p=share)
    return client


def iid_partition(num_items: int, num_clients: int, rng: Rng) -> np.ndarray:
    """Partition of FedA3I: shuffle 0..n-1 and cut into K consecutive parts whose sizes differ by at most one.

    Out: client_of_sample (n,) int64; the first n mod K clients hold one item more.
    """
    check_clients(num_clients)
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


def site_dirichlet_partition(
    labels: np.ndarray,
    site: np.ndarray,
    groups: np.ndarray,
    clients_per_site: Sequence[int],
    num_classes: int,
    alpha: float,
    min_items: int,
    rng: Rng,
) -> np.ndarray:
    """Natural partition, each site cut further into label-skewed clients; no group is split.

    In: labels (n,) in [0, C); site (n,) int in [0, S); groups (n,) of any kind, told apart within a site; clients_per_site
    (S,) >= 1; alpha > 0; min_items >= 0. Out: client_of_sample (n,) int64, numbered as in `site_partition`. Within a site
    the groups of a class (that of most of their items, the lower one of equals) are dealt with odds ~ Dirichlet(alpha).
    Until every client has `min_items` items the site is drawn again, `REDRAWS` times at most; then clients are topped
    up (`_top_up`). A site with one client draws nothing. UserError: a site with too few items.
    """
    labels = _check_labels(labels, num_classes)
    _check_alpha(alpha)
    client = np.empty(len(labels), dtype=np.int64)
    first = 0
    for index, count in enumerate(clients_per_site):
        members = np.flatnonzero(site == index)
        if min_items < 0 or (count > 1 and len(members) < count * min_items):
            raise UserError(
                f"natural_dirichlet partition: site {index} has {len(members)} training items, too few for {count} "
                f"clients of min_items = {min_items} (>= 0). Set data.partition.args.clients_per_site or min_items."
            )
        names, group = np.unique(groups[members], return_inverse=True)
        table = np.zeros((len(names), num_classes), dtype=np.int64)
        np.add.at(table, (group, labels[members]), 1)
        sizes = table.sum(axis=1)
        owner = np.zeros(len(names), dtype=np.int64)
        for _ in range(REDRAWS if count > 1 else 0):
            owner = _deal_by_class(table.argmax(axis=1), [np.arange(count)] * num_classes, alpha, rng)
            if np.bincount(owner, weights=sizes, minlength=count).min() >= min_items:
                break
        else:
            owner = _top_up(owner, sizes, count, min_items, rng) if count > 1 else owner
        client[members] = first + owner[group]
        first += count
    return client


def _top_up(owner: np.ndarray, sizes: np.ndarray, count: int, min_items: int, rng: Rng) -> np.ndarray:
    """Move groups to clients with fewer than `min_items` items, one at a time, until there is none.

    In: owner (G,) client of each group in [0, count); sizes (G,) its items. A random group goes from the client with the
    most items to the one with the fewest (the first of equals), of those groups that leave the giver with enough.
    UserError when large groups make that impossible.
    """
    owner = owner.copy()
    while True:
        held = np.bincount(owner, weights=sizes, minlength=count)
        taker, givers = int(held.argmin()), np.argsort(-held, kind="stable")
        if held[taker] >= min_items:
            return owner
        spare = (np.flatnonzero((owner == giver) & (held[giver] - sizes >= min_items)) for giver in givers)
        movable = next((groups for groups in spare if len(groups)), None)
        if movable is None:
            raise UserError(
                f"natural_dirichlet partition: groups of up to {sizes.max()} items cannot be dealt so that each of "
                f"{count} clients has {min_items}. Set data.partition.args.min_items or clients_per_site."
            )
        owner[rng.choice(movable)] = taker


def _deal_by_class(labels: np.ndarray, holders: Sequence[np.ndarray], alpha: float, rng: Rng) -> np.ndarray:
    client = np.empty(len(labels), dtype=np.int64)
    for label, clients in enumerate(holders):
        members = np.flatnonzero(labels == label)
        odds = rng.dirichlet(np.repeat(alpha, len(clients)))
        if not np.isfinite(odds).all():  # alpha so small that all shares are 0: one client, the limit
            odds = np.eye(len(clients))[rng.choice(len(clients))]
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


def check_clients(num_clients: int) -> None:
    """Raise UserError unless there is at least one client."""
    if num_clients < 1:
        raise UserError(f"partition: num_clients must be >= 1, got {num_clients}. Set data.partition.args.num_clients.")
