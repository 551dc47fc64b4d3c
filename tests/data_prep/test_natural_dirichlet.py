from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep.deal import _top_up, site_dirichlet_partition
from data_prep.partition import NaturalDirichlet, Pool
from data_prep.protocol import derive, describe
from fedmed.config import DataConfig, StepConfig, load_config
from fedmed.data.site_file import SiteFile
from fedmed.data.writer import SiteArrays, write_site_file
from fedmed.errors import UserError


def sites(sizes: tuple[int, ...], classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    site = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(seed).integers(0, classes, len(site)), site


def deal(labels, site, groups, counts, alpha=0.5, min_items=8, seed=0):
    rng = np.random.RandomState(seed)
    return site_dirichlet_partition(labels, site, groups, counts, 4, alpha, min_items, rng)


def test_clients_stay_within_their_site_and_have_enough():
    labels, site = sites((60, 90, 40))
    client = deal(labels, site, np.arange(190), [3, 4, 2])
    assert [sorted(set(client[site == index])) for index in range(3)] == [[0, 1, 2], [3, 4, 5, 6], [7, 8]]
    assert np.bincount(client).min() >= 8


def test_groups_are_never_split():
    labels, site = sites((80, 80))
    groups = np.concatenate([np.arange(80) // 3, np.arange(80) // 3])  # equal names at two sites are two groups
    labels = labels[groups * 3]
    client = deal(labels, site, groups, [3, 3], alpha=0.2)
    for index in range(2):
        for group in np.unique(groups):
            assert len(set(client[(site == index) & (groups == group)])) == 1


def test_small_alpha_is_skewed_and_large_alpha_even():
    labels, site = sites((4000,))
    spread = []
    for alpha in (0.1, 1000.0):
        client = deal(labels, site, np.arange(4000), [4], alpha)
        table = np.zeros((4, 4))
        np.add.at(table, (client, labels), 1)
        spread.append((table / table.sum(axis=0)).std())
    assert spread[0] > 0.25 and spread[1] < 0.03


def test_one_client_per_site_draws_nothing():
    labels, site = sites((3, 5))
    rng = np.random.RandomState(0)
    client = site_dirichlet_partition(labels, site, np.arange(8), [1, 1], 4, 0.5, 8, rng)
    assert np.array_equal(client, site) and rng.randint(1000) == np.random.RandomState(0).randint(1000)


def test_the_same_seed_deals_the_same():
    labels, site = sites((60, 60))
    first = deal(labels, site, np.arange(120), [3, 3], seed=1)
    assert np.array_equal(first, deal(labels, site, np.arange(120), [3, 3], seed=1))
    assert not np.array_equal(first, deal(labels, site, np.arange(120), [3, 3], seed=2))


def test_topping_up_when_no_draw_is_even_enough():
    labels, site = np.zeros(30, dtype=np.int64), np.zeros(30, dtype=np.int64)
    client = deal(labels, site, np.arange(30), [3], alpha=0.001, min_items=10)
    assert np.bincount(client, minlength=3).tolist() == [10, 10, 10]


def test_topping_up_by_hand():
    rng = np.random.RandomState(0)
    owner = _top_up(np.array([0, 0, 0, 1, 1]), np.array([1, 1, 1, 1, 1]), 3, 1, rng)
    assert sorted(owner[:3]) == [0, 0, 2] and owner[3:].tolist() == [1, 1]  # the largest client gives
    assert _top_up(np.array([0, 1]), np.array([2, 2]), 2, 2, rng).tolist() == [0, 1]
    with pytest.raises(UserError, match="groups of up to 5 items"):
        _top_up(np.array([0, 0]), np.array([5, 3]), 2, 4, rng)


@pytest.mark.parametrize(
    ("counts", "min_items", "alpha", "word"),
    [
        ([3], 8, 0.5, "site 0 has 20 training items, too few for 3"),
        ([2], -1, 0.5, "min_items = -1"),
        ([2], 8, 0.0, "alpha"),
        ([2], 8, float("nan"), "alpha"),
    ],
)
def test_errors(counts, min_items, alpha, word):
    labels, site = sites((20,))
    with pytest.raises(UserError, match=word):
        deal(labels, site, np.arange(20), counts, alpha, min_items)


def test_an_empty_client_is_allowed_where_asked_for():
    labels = np.zeros(3, dtype=np.int64)
    client = deal(labels, labels, np.arange(3), [5], min_items=0)
    assert len(client) == 3 and client.max() < 5


def test_items_without_one_class_are_refused():
    pool = Pool(None, np.zeros(40, dtype=np.int64), 1, 4)
    with pytest.raises(UserError, match="no single class"):
        NaturalDirichlet().assign(pool, np.random.RandomState(0))


def test_items_without_groups_are_dealt_one_by_one():
    labels, site = sites((60,))
    own = NaturalDirichlet().assign(Pool(labels, site, 1, 4), np.random.RandomState(0))
    assert np.array_equal(own, deal(labels, site, np.arange(60), [3]))


@pytest.fixture
def lesions(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    made = []
    for index, size in enumerate((90, 60)):
        rows = np.arange(size)
        case = rows // 2
        splits = {"train": rows[case % 5 < 3], "val": rows[case % 5 == 3], "test": rows[case % 5 == 4]}
        label = rng.integers(0, 4, size)[case]
        image = rng.integers(0, 255, (size, 8, 8, 3), dtype=np.uint8)
        ids = [f"{index}-{row}" for row in rows]
        groups = [f"lesion {number}" for number in case]
        made.append(SiteArrays(f"hospital {index}", image, {"label": label}, splits, ids, groups))
    classes = {"task": "classification", "classes": list("abcd"), "channels": ["R", "G", "B"], "image_size": [8, 8]}
    return write_site_file(tmp_path / "lesions.h5", classes, made)


def test_the_derived_file(lesions, tmp_path):
    step = StepConfig("natural_dirichlet", {"clients_per_site": [3, 2], "min_items": 5})
    path = derive(DataConfig(path=str(lesions), partition=step), 0, tmp_path)
    with h5py.File(path) as file:
        owner: dict[tuple[bytes, bytes], str] = {}
        for group in [name for name in file if name.startswith("site_")]:
            node = file[group]
            hospitals = {name.split(b"-")[0] for name in node["item_id"][:]}
            assert hospitals == {b"0"} if group < "site_03" else {b"1"}
            for row in node.attrs["train_idx"]:
                key = (node["item_id"][row].split(b"-")[0], node["group_id"][row])
                assert owner.setdefault(key, group) == group
    table = describe(path)
    assert len(table) == 5 and min(row["n_train"] for row in table) >= 5
    assert sum(row["n_train"] for row in table) == 90


def test_one_client_each_keeps_the_sites(lesions, tmp_path):
    step = StepConfig("natural_dirichlet", {"clients_per_site": 1})
    with SiteFile.open(derive(DataConfig(path=str(lesions), partition=step), 0, tmp_path)) as file:
        assert [site.name for site in file.sites] == ["hospital 0", "hospital 1"]


def test_wrong_number_of_sites(lesions, tmp_path):
    step = StepConfig("natural_dirichlet", {"clients_per_site": [3]})
    with pytest.raises(UserError, match="2 numbers >= 1"):
        derive(DataConfig(path=str(lesions), partition=step), 0, tmp_path)


def test_example_protocol(tmp_path):
    small = ["data.phantom.num_sites=2", "data.phantom.images_per_site=60", "data.phantom.image_size=16"]
    data = load_config("data/long_tail", ["data.path=phantom:classification", *small]).data
    table = describe(derive(data, 0, tmp_path))
    assert len(table) == 6 and min(row["n_train"] for row in table) >= 8
