from __future__ import annotations

import numpy as np
import pytest

from data_prep.partition import (
    Dirichlet,
    FedISMPartition,
    FedNoRoPartition,
    Iid,
    Natural,
    Pool,
    class_grants,
    dirichlet_partition,
    fedism_partition,
    fednoro_partition,
    iid_partition,
    site_partition,
)
from fedmed.errors import UserError

GENERATORS = [np.random.RandomState, np.random.default_rng]


class Scripted:
    """Stands in for a generator: returns prepared Bernoulli draws and records what was asked."""

    def __init__(self, draws: list[list]) -> None:
        self.draws = [np.array(draw) for draw in draws]
        self.asked: list[object] = []

    def binomial(self, trials: int, probability: float, size: object) -> np.ndarray:
        assert trials == 1 and probability == 0.5
        self.asked.append(size)
        return self.draws.pop(0)


def test_grants_redraw_all_empty_rows_together_then_empty_columns():
    rng = Scripted([[[0, 0], [1, 0], [0, 0]], [[1, 0], [0, 0]], [[1, 0]], [0, 0, 0], [0, 1, 0]])
    granted = class_grants(3, 2, 0.5, rng)
    # rows 0 and 2 empty: drawn in one call; then row 2 again; column 1 empty: drawn until it is not
    assert rng.asked == [(3, 2), (2, 2), (1, 2), 3, 3]
    assert granted.tolist() == [[True, False], [True, True], [True, False]]


def test_published_call_order_with_the_legacy_generator():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    found = fednoro_partition(labels, 4, 3, 0.9, 2.0, np.random.RandomState(100))
    rng = np.random.RandomState(100)
    granted = rng.binomial(1, 0.9, size=(4, 3))
    assert granted.any(axis=0).all() and granted.any(axis=1).all()
    expected = []
    for label, count in enumerate([50, 30, 20]):
        clients = np.flatnonzero(granted[:, label])
        odds = rng.dirichlet([2.0] * len(clients))
        expected.append(rng.choice(clients, count, p=odds))
    assert np.array_equal(found, np.concatenate(expected))


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("seed", range(5))
def test_zero_cells_follow_the_grants(generator, seed):
    labels = np.random.default_rng(9).integers(0, 3, 400)
    client = fednoro_partition(labels, 6, 3, 0.3, 2.0, generator(seed))
    granted = class_grants(6, 3, 0.3, generator(seed))
    assert client.shape == (400,) and client.min() >= 0 and client.max() < 6
    assert granted[client, labels].all()


def test_fedism_call_order_with_the_legacy_generator():
    labels = np.array([0, 1, 1, 0, 0, 1, 0, 1, 1, 1])  # class 0 at 0 3 4 6, class 1 at 1 2 5 7 8 9
    found = fedism_partition(labels, 4, 1, 3, 1.0, np.random.RandomState(2024))
    rng = np.random.RandomState(2024)
    expected = np.full(10, -1)
    for clean, corrupted in (([0, 3, 4], [6]), ([1, 2, 5, 7], [8, 9]), ([], [])):  # rint(3/4 * 4), rint(3/4 * 6 = 4.5)
        shares = rng.dirichlet([1.0] * 3), rng.dirichlet([1.0])
        expected[clean] = rng.choice([0, 1, 2], size=len(clean), p=shares[0])
        expected[corrupted] = rng.choice([3], size=len(corrupted), p=shares[1])
    assert np.array_equal(found, expected)


# Items per class, and published items per client (legacy seed 2024, 4 of 20 clients corrupted).
HAEMORRHAGE = [438, 4101, 2597, 4291, 8571]
HAEMORRHAGE_SIZES = [1469, 854, 1063, 300, 1019, 464, 1145, 1056, 543, 438, 1101, 831, 1428, 1727, 744, 1817, 1337, 735, 760, 1167]  # fmt: skip
SKIN = [3617, 10300, 2658, 693, 2099, 191, 202, 502]
SKIN_SIZES = [451, 777, 857, 778, 542, 412, 1299, 539, 1761, 823, 2656, 894, 790, 1849, 510, 1272, 1448, 1238, 635, 731]


@pytest.mark.parametrize(("counts", "sizes"), [(HAEMORRHAGE, HAEMORRHAGE_SIZES), (SKIN, SKIN_SIZES)])
def test_fedism_published_sizes(counts, sizes):
    labels = np.repeat(np.arange(len(counts)), counts)
    client = fedism_partition(labels, 20, 4, len(counts), 1.0, np.random.RandomState(2024))
    assert np.bincount(client).tolist() == sizes
    cells = np.zeros((20, len(counts)), dtype=int)
    np.add.at(cells, (client, labels), 1)
    assert (cells == 0).sum() == 2


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("corrupted", [0, 2, 5])
def test_fedism_pools_hold_their_share_of_every_class(generator, corrupted):
    labels = np.random.default_rng(3).integers(0, 4, 500)
    client = fedism_partition(labels, 5, corrupted, 4, 1.0, generator(1))
    assert client.min() >= 0 and client.max() < 5
    for label in range(4):
        count = (labels == label).sum()
        assert (client[labels == label] < 5 - corrupted).sum() == np.rint((5 - corrupted) / 5 * count)


def test_fedism_pools_are_the_leading_items_or_random_ones():
    site = np.repeat([0, 1, 2, 3], 100)
    labels = np.tile([0, 1], 200)
    pool = Pool(labels, site, 4, 2)
    published = FedISMPartition(4, 1, shuffle=False).assign(pool, np.random.RandomState(0))
    shuffled = FedISMPartition(4, 1).assign(pool, np.random.RandomState(0))
    assert np.bincount(site[published == 3], minlength=4).tolist() == [0, 0, 0, 100]  # the last site: confounded
    assert np.bincount(site[shuffled == 3], minlength=4).min() >= 15
    for client in (published, shuffled):
        assert np.bincount(labels[client == 3]).tolist() == [50, 50]
    assert np.array_equal(shuffled, FedISMPartition(4, 1).assign(pool, np.random.RandomState(0)))


def test_iid_sizes_and_order_of_the_legacy_shuffle():
    client = iid_partition(11, 3, np.random.RandomState(0))
    order = np.arange(11)
    np.random.RandomState(0).shuffle(order)
    assert np.bincount(client).tolist() == [4, 4, 3]
    assert set(np.flatnonzero(client == 0)) == set(order[:4])
    assert np.array_equal(np.sort(np.flatnonzero(client == 2)), np.sort(order[8:]))


@pytest.mark.parametrize("generator", GENERATORS)
def test_small_alpha_skews_and_large_alpha_balances(generator):
    labels = np.zeros(2000, dtype=np.int64)
    even = np.bincount(dirichlet_partition(labels, 4, 1, 1e4, generator(1)), minlength=4)
    skewed = np.bincount(dirichlet_partition(labels, 4, 1, 0.05, generator(1)), minlength=4)
    assert even.max() - even.min() < 150 < skewed.max() - skewed.min()


def test_natural_sites_stay_whole_and_draw_nothing():
    site = np.array([1, 0, 1, 2])
    assert site_partition(site, [1, 1, 1], None).tolist() == [1, 0, 1, 2]
    cut = site_partition(np.repeat([0, 1], [7, 4]), [3, 1], np.random.RandomState(0))
    assert np.bincount(cut).tolist() == [3, 2, 2, 4]
    assert (cut[7:] == 3).all()


def test_empty_inputs_and_more_clients_than_items():
    assert iid_partition(0, 3, np.random.RandomState(0)).shape == (0,)
    assert np.bincount(iid_partition(2, 5, np.random.RandomState(0)), minlength=5).sum() == 2
    assert fedism_partition(np.empty(0, dtype=int), 3, 1, 2, 1.0, np.random.RandomState(0)).shape == (0,)
    few = fedism_partition(np.array([0, 1]), 20, 4, 2, 1.0, np.random.RandomState(0))  # most clients stay empty
    assert np.bincount(few, minlength=20).sum() == 2
    assert fednoro_partition(np.empty(0, dtype=int), 2, 2, 0.9, 1.0, np.random.RandomState(0)).shape == (0,)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda r: fednoro_partition(np.array([0]), 2, 1, 0.0, 1.0, r), "p_class"),
        (lambda r: fednoro_partition(np.array([0]), 2, 1, 0.5, 0.0, r), "alpha"),
        (lambda r: fednoro_partition(np.array([3]), 2, 1, 0.5, 1.0, r), r"0\.\.0"),
        (lambda r: dirichlet_partition(np.eye(2, dtype=int), 2, 2, 1.0, r), "one integer class"),
        (lambda r: iid_partition(3, 0, r), "num_clients"),
        (lambda r: fedism_partition(np.array([0]), 2, 3, 1, 1.0, r), "num_corrupted=3"),
        (lambda r: fedism_partition(np.array([0]), 2, -1, 1, 1.0, r), "num_corrupted=-1"),
        (lambda r: fedism_partition(np.array([0]), 0, 0, 1, 1.0, r), "num_clients"),
        (lambda r: fedism_partition(np.array([0]), 2, 1, 1, float("nan"), r), "alpha"),
        (lambda r: Natural([1, 2]).counts(3), "3 numbers"),
        (lambda r: Natural(0).counts(2), "clients_per_site"),
    ],
)
def test_errors_name_the_key(call, word):
    with pytest.raises(UserError, match=word):
        call(np.random.RandomState(0))


def test_registered_objects_agree_with_the_functions():
    labels = np.random.default_rng(0).integers(0, 3, 60)
    pool = Pool(labels, np.repeat([0, 1], 30), 2, 3)
    pairs = [
        (FedNoRoPartition(5, 0.8, 1.0), fednoro_partition(labels, 5, 3, 0.8, 1.0, np.random.RandomState(4))),
        (FedISMPartition(5, 2, shuffle=False), fedism_partition(labels, 5, 2, 3, 1.0, np.random.RandomState(4))),
        (Dirichlet(5, 0.5), dirichlet_partition(labels, 5, 3, 0.5, np.random.RandomState(4))),
        (Iid(5), iid_partition(60, 5, np.random.RandomState(4))),
        (Natural(2), site_partition(pool.site, [2, 2], np.random.RandomState(4))),
    ]
    for partition, expected in pairs:
        assert np.array_equal(partition.assign(pool, np.random.RandomState(4)), expected)
        assert expected.max() < partition.total(2)
    with pytest.raises(UserError, match="no single class"):
        FedNoRoPartition().assign(Pool(None, pool.site, 2, 3), np.random.RandomState(0))
    with pytest.raises(UserError, match="no single class"):
        FedISMPartition().assign(Pool(None, pool.site, 2, 3), np.random.RandomState(0))
