"""Dealing validation and test items: evenly, or as the training items of their class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.held_out import deal_alike, deal_evenly, largest_remainder
from data_prep.protocol import derive
from fedmed.config import load_config
from fedmed.data.site_file import SiteFile


def rng() -> np.random.RandomState:
    return np.random.RandomState(3)


def test_largest_remainder_by_hand() -> None:
    assert largest_remainder(np.array([0.5, 0.3, 0.2]), 4).tolist() == [2, 1, 1]
    assert largest_remainder(np.array([1 / 3, 1 / 3, 1 / 3]), 3).tolist() == [1, 1, 1]
    assert largest_remainder(np.array([0.5, 0.5]), 1).tolist() == [1, 0]  # the first of equals
    assert largest_remainder(np.array([0.2, 0.8]), 0).tolist() == [0, 0]


def test_items_follow_the_training_items_of_their_class() -> None:
    labels, site = np.array([0] * 8 + [1] * 4 + [2] * 2), np.zeros(14, dtype=np.int64)
    counts = np.array([[30, 0, 0], [10, 5, 0]])  # class 2 is at nobody: evenly
    client = deal_alike(labels, site, counts, np.array([0, 0]), rng())
    assert [np.bincount(client[labels == c], minlength=2).tolist() for c in range(3)] == [[6, 2], [0, 4], [1, 1]]


def test_items_stay_at_their_site() -> None:
    site = np.repeat([0, 1], 10)
    owners = np.array([0, 0, 1])
    for client in (
        deal_evenly(site, 3, owners, rng()),
        deal_alike(np.zeros(20, dtype=np.int64), site, np.ones((3, 1)), owners, rng()),
    ):
        assert (owners[client] == site).all() and np.bincount(client).tolist() == [5, 5, 10]
    assert np.bincount(deal_evenly(site, 4, None, rng())).tolist() == [5] * 4
    assert len(deal_evenly(site[:0], 3, owners, rng())) == 0


def test_a_long_tailed_partition_tests_clients_on_what_they_train(tmp_path: Path) -> None:
    def mismatch(value: str) -> float:
        words = ["data.phantom={num_sites: 2, images_per_site: 200, image_size: 16}"]
        data = load_config("fednpr", [*words, f"data.partition.args.test_like_train={value}"]).data
        distances = []
        with SiteFile.open(derive(data, 0, tmp_path)) as file:
            for info in file.sites:
                shares = [file.site(info.name).split(s).class_counts() for s in ("train", "test")]
                distances.append(np.abs(shares[0] / shares[0].sum() - shares[1] / max(shares[1].sum(), 1)).sum() / 2)
        return float(np.mean(distances))

    assert mismatch("true") < 0.2 < mismatch("false")
