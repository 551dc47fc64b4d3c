"""Dealing groups: shares, labels, groups that stay whole, sites of one and two groups, and what the source says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep.importers.base import Entry
from data_prep.importers.splits import TEST, TRAIN, VAL, deal, parse_split, said_splits
from fedmed.errors import UserError

SHARES = (0.7, 0.1, 0.2)


def entry(group: str, split: str) -> Entry:
    return Entry("", f"{group}/{split}", group, (Path("x"),), split)


def test_single_images_are_dealt_exactly() -> None:
    names = [f"p{number}" for number in range(50)]
    dealt = deal(names, None, {}, SHARES, 0, "a")
    assert Counter(dealt.values()) == {TRAIN: 35, VAL: 5, TEST: 10}
    assert dealt == deal(names, None, {}, SHARES, 0, "a")
    assert dealt != deal(names, None, {}, SHARES, 1, "a") and dealt != deal(names, None, {}, SHARES, 0, "b")


def test_groups_stay_whole_and_come_near_the_shares() -> None:
    rng = np.random.default_rng(0)
    for seed in range(10):
        sizes = rng.integers(1, 40, 25)
        names = [f"p{group}" for group, size in enumerate(sizes) for _ in range(size)]
        count = Counter(deal(names, None, {}, SHARES, seed, "")[name] for name in names)
        for split, share in enumerate(SHARES):
            assert abs(count[split] / len(names) - share) < 0.03


def test_labels_are_spread_over_the_splits() -> None:
    labels = np.repeat([0, 1, 2], [100, 20, 10])
    names = [f"p{number}" for number in range(130)]
    dealt = deal(names, labels, {}, SHARES, 3, "")
    table = np.zeros((3, 3), int)
    for name, label in zip(names, labels, strict=True):
        table[label, dealt[name]] += 1
    assert table.tolist() == [[70, 10, 20], [14, 2, 4], [7, 1, 2]]


def test_columns_of_a_multi_label_set_are_spread_too() -> None:
    labels = np.zeros((40, 2), np.uint8)
    labels[:10, 0] = 1
    labels[5:15, 1] = 1
    dealt = deal([str(number) for number in range(40)], labels, {}, SHARES, 0, "")
    for column in range(2):
        count = Counter(dealt[str(number)] for number in np.flatnonzero(labels[:, column]))
        assert count == {TRAIN: 7, VAL: 1, TEST: 2}


@pytest.mark.parametrize("seed", range(5))
def test_two_groups_are_one_of_train_and_one_of_test(seed: int) -> None:
    assert sorted(deal(["a", "b", "b"], None, {}, SHARES, seed, "").values()) == [TRAIN, TEST]
    three = Counter(deal(["a"] * 90 + ["b", "c"], None, {}, SHARES, seed, "").values())
    assert three[TRAIN] and three[TEST]


def test_one_group_goes_to_train() -> None:
    assert deal(["a", "a"], None, {}, SHARES, 0, "") == {"a": TRAIN}
    assert deal(["a"], None, {"a": TEST}, SHARES, 0, "") == {"a": TEST}
    assert deal(["a"], None, {}, (0.0, 0.0, 1.0), 0, "") == {"a": TEST}


def test_a_share_of_0_gets_nothing() -> None:
    assert set(deal([str(n) for n in range(9)], None, {}, (1.0, 0.0, 0.0), 0, "").values()) == {TRAIN}
    assert set(deal([str(n) for n in range(9)], None, {}, (0.0, 0.0, 1.0), 0, "").values()) == {TEST}


def test_settled_groups_stay_and_the_others_fill_up() -> None:
    names = [str(number) for number in range(10)]
    dealt = deal(names, None, {"0": TEST, "1": TEST}, SHARES, 0, "")
    assert dealt["0"] == dealt["1"] == TEST and Counter(dealt.values()) == {TRAIN: 7, VAL: 1, TEST: 2}


def test_what_the_source_says() -> None:
    fixed, remarks = said_splits([entry("a", "train"), entry("b", "val"), entry("c", "test"), entry("c", "test")])
    assert fixed == {"a": TRAIN, "b": VAL, "c": TEST} and remarks == []
    fixed, remarks = said_splits([entry("a", "train"), entry("a", "test"), entry("b", "test")])
    assert fixed == {"a": TRAIN, "b": TEST} and remarks[0].startswith("1 groups lie in more than one split")
    fixed, remarks = said_splits([entry("a", "train"), entry("b", "train")])
    assert fixed == {} and "one split only (train)" in remarks[0]
    assert said_splits([entry("a", "train"), entry("b", "")]) == ({"a": TRAIN}, [])
    assert said_splits([entry("a", "")]) == ({}, []) == said_splits([])


def test_shares_are_read() -> None:
    assert parse_split("70/10/20") == (0.7, 0.1, 0.2) and parse_split("3/0/1") == (0.75, 0.0, 0.25)
    for wrong in ("70/30", "a/b/c", "0/0/0", "-1/1/1", "nan/1/1", "inf/1/1", ""):
        with pytest.raises(UserError, match="--split"):
            parse_split(wrong)
