from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep.corruption import TrainPool
from data_prep.corruption.missing_classes import MissingClasses, cyclic_classes, hide, random_classes
from data_prep.protocol import derive, describe
from data_prep.seeding import Seed
from fedmed.config import DataConfig, StepConfig, load_config, params_from
from fedmed.data.site_file import SiteFile, read_truth
from fedmed.data.writer import SiteArrays, write_site_file
from fedmed.errors import UserError

NAMES = ("a", "b", "c")


def pool(targets: np.ndarray, client: np.ndarray, active: np.ndarray | None = None) -> TrainPool:
    size = len(targets)
    groups = np.arange(size).astype("S4")
    images = np.zeros((size, 2, 2), dtype=np.uint8)
    clients = int(client.max(initial=-1)) + 1
    return TrainPool(
        images, targets, client, groups, clients, targets.shape[1], active=active, classes=NAMES[: targets.shape[1]]
    )


@pytest.mark.parametrize(
    ("clients", "classes", "count", "expected"),
    [
        (3, 3, 1, [[0], [1], [2]]),  # as published: client i has class i
        (5, 3, 1, [[0], [1], [2], [0], [1]]),
        (3, 3, 2, [[0, 1], [1, 2], [0, 2]]),
        (2, 6, 3, [[0, 1, 2], [3, 4, 5]]),
        (4, 14, 4, [[0, 1, 2, 3], [3, 4, 5, 6], [7, 8, 9, 10], [10, 11, 12, 13]]),
        (1, 3, 3, [[0, 1, 2]]),
        (2, 3, 1, [[0], [1]]),  # two clients of one class cannot hold three
    ],
)
def test_cyclic_sets(clients, classes, count, expected):
    assert [cyclic_classes(client, clients, classes, count) for client in range(clients)] == expected


def test_cyclic_sets_leave_nothing_out_where_they_can_hold_all():
    for classes in range(1, 10):
        for clients in range(1, 12):
            for count in range(1, classes + 1):
                sets = [cyclic_classes(client, clients, classes, count) for client in range(clients)]
                assert all(len(chosen) == count for chosen in sets)
                if clients * count >= classes:
                    assert set().union(*sets) == set(range(classes))


def test_random_sets_are_different_classes():
    rng = np.random.RandomState(0)
    assert all(len(set(random_classes(6, 3, rng))) == 3 for _ in range(20))
    assert random_classes(3, 3, rng) == [0, 1, 2] and random_classes(3, 0, rng) == []


def test_hiding_by_hand():
    labels = np.array([[1, 1, 0], [1, 0, 1]], dtype=np.int64)
    active = np.array([[1, 0, 0], [0, 1, 1]], dtype=np.uint8)
    assert hide(labels, active).tolist() == [[1, 0, 0], [0, 0, 1]] and hide(labels, active).dtype == np.int64


def test_facts_by_hand():
    targets = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 0]])
    client = np.array([0, 0, 1, 1])
    given = MissingClasses(annotation_num=1).apply(pool(targets, client), Seed(0))
    assert given.targets.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert given.active is not None
    assert given.active.tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]]
    first, second = given.facts
    assert first["false_negative_rate"] == first["noise_rate"] == pytest.approx(3 / 4)
    assert (first["n_positives"], first["n_hidden"], first["n_missing"]) == (4, 3, 2)
    assert first["active_classes"].tolist() == [0] and second["active_classes"].tolist() == [1]
    assert second["noise_rate"] == 1.0 and first["is_noisy"] is True
    assert first["missing_everywhere"].tolist() == second["missing_everywhere"].tolist() == [2]
    assert targets.sum() == 6  # the pool is left as it was


def test_all_classes_annotated_change_nothing():
    targets = np.array([[1, 0, 1], [0, 1, 0]])
    for protocol in (MissingClasses(annotation_num=3), MissingClasses(missing_rate=0.0)):
        given = protocol.apply(pool(targets, np.array([0, 1])), Seed(0))
        assert np.array_equal(given.targets, targets) and given.active is not None and given.active.all()
        assert not given.facts[0]["is_noisy"] and given.facts[0]["noise_rate"] == 0.0


def test_classes_that_were_missing_before_stay_missing():
    targets = np.array([[1, 0, 0], [1, 0, 0]])
    active = np.array([[1, 0, 1], [1, 0, 1]])
    protocol = MissingClasses(annotated=[["a", "b"]])
    given = protocol.apply(pool(targets, np.array([0, 0]), active), Seed(0))
    assert given.active is not None and given.active.tolist() == [[1, 0, 0]] * 2
    assert given.facts[0]["active_classes"].tolist() == [0] and given.facts[0]["n_missing"] == 2


def test_named_classes_are_repeated_over_clients():
    protocol = params_from(MissingClasses, {"annotated": [["c", "a"], [1]]}, "args")
    assert protocol.active_sets(3, 3, NAMES, Seed(0)) == [[0, 2], [1], [0, 2]]


def test_rate_is_rounded_and_one_class_stays():
    for rate, expected in ((0.5, 3), (0.34, 4), (0.99, 1), (0.0, 6)):
        sets = MissingClasses(missing_rate=rate).active_sets(2, 6, (), Seed(0))
        assert [len(chosen) for chosen in sets] == [expected] * 2


def test_random_place_depends_on_the_seed_only():
    protocol = MissingClasses(annotation_num=2, place="random")
    assert protocol.active_sets(6, 9, (), Seed(1)) == protocol.active_sets(6, 9, (), Seed(1))
    assert protocol.active_sets(6, 9, (), Seed(1)) != protocol.active_sets(6, 9, (), Seed(2))
    assert protocol.active_sets(4, 9, (), Seed(1)) == protocol.active_sets(6, 9, (), Seed(1))[:4]
    fixed = MissingClasses(annotation_num=2, place="random", seed=3)
    assert fixed.active_sets(6, 9, (), Seed(1)) == fixed.active_sets(6, 9, (), Seed(2))


def test_a_client_without_items():
    targets = np.zeros((0, 3), dtype=np.int64)
    empty = TrainPool(
        np.zeros((0, 2, 2), np.uint8), targets, np.zeros(0, np.int64), np.zeros(0, "S1"), 2, 3, classes=NAMES
    )
    given = MissingClasses().apply(empty, Seed(0))
    assert [facts["noise_rate"] for facts in given.facts] == [0.0, 0.0] and not given.facts[0]["is_noisy"]


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ({"annotation_num": 1, "missing_rate": 0.5}, "one of"),
        ({"annotated": [["a"]], "annotation_num": 1}, "one of"),
        ({"annotated": []}, "none of them empty"),
        ({"annotated": [["a"], []]}, "none of them empty"),
        ({"annotation_num": 0}, "annotation_num >= 1"),
        ({"missing_rate": 1.0}, "missing_rate < 1"),
        ({"missing_rate": float("nan")}, "missing_rate"),
        ({"place": "first"}, "cyclic or random"),
    ],
)
def test_arguments_are_checked(args, word):
    with pytest.raises(UserError, match=word):
        params_from(MissingClasses, args, "data.corruption.args")


def test_what_the_file_does_not_have():
    targets = np.zeros((2, 3), dtype=np.int64)
    with pytest.raises(UserError, match="3 classes"):
        MissingClasses(annotation_num=4).apply(pool(targets, np.array([0, 1])), Seed(0))
    with pytest.raises(UserError, match=r"'d'.*indices are 0\.\.2"):
        MissingClasses(annotated=[["d"]]).apply(pool(targets, np.array([0, 1])), Seed(0))
    with pytest.raises(UserError, match="no class '3'"):
        MissingClasses(annotated=[["3"]]).apply(pool(targets, np.array([0, 1])), Seed(0))


@pytest.fixture
def findings(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    sites = []
    for index, size in enumerate((30, 20)):
        rows = np.arange(size)
        splits = {"train": rows[rows % 5 < 3], "val": rows[rows % 5 == 3], "test": rows[rows % 5 == 4]}
        label = rng.integers(0, 2, (size, 3))
        label[0] = 1
        extras = {"active_classes": np.array([1, 1, 0], np.uint8)} if index else {}
        label[:, 2] *= 1 - index  # site 1 never annotated class c
        image = rng.integers(0, 255, (size, 8, 8), dtype=np.uint8)
        sites.append(SiteArrays(f"site {index}", image, {"label": label}, splits, extras=extras))
    meta = {"task": "multilabel", "classes": list(NAMES), "channels": ["grey"], "image_size": [8, 8]}
    return write_site_file(tmp_path / "findings.h5", meta, sites)


def test_the_derived_file(findings, tmp_path):
    step = StepConfig("missing_classes", {"annotated": [["a"], ["b", "c"]]})
    path = derive(DataConfig(path=str(findings), corruption=step), 0, tmp_path)
    with SiteFile.open(path) as file, h5py.File(findings) as source, h5py.File(path) as derived:
        for index, (chosen, elsewhere) in enumerate((([1, 0, 0], [1, 1, 1]), ([0, 1, 0], [1, 1, 0]))):
            data = file.site(f"site {index}")
            clean, train = source[f"site_0{index}/label"][:], data.splits["train"]
            rest = np.setdiff1d(np.arange(len(clean)), train)
            flags = data.extras["active_classes"]
            assert flags[train].tolist() == [chosen] * len(train) and flags[rest].tolist() == [elsewhere] * len(rest)
            assert np.array_equal(data.target[train], clean[train] * chosen)
            assert np.array_equal(data.target[rest], clean[rest])
            assert np.array_equal(derived[f"site_0{index}/reference/label"][:], clean)
            assert data.active_classes.tolist() == [bool(flag) for flag in chosen]  # of the training items
    truth = read_truth(path)
    assert truth["site 0"]["active_classes"] == [0] and truth["site 1"]["missing_everywhere"] == [2]
    assert [row["active_classes"] for row in describe(path)] == [[0], [1]]


def test_other_tasks_are_refused(tmp_path):
    small = {"num_sites": 1, "images_per_site": 10, "image_size": 16}
    config = DataConfig(path="phantom:classification", phantom=small, corruption=StepConfig("missing_classes"))
    with pytest.raises(UserError, match="for multilabel files"):
        derive(config, 0, tmp_path)


def test_example_protocol(tmp_path):
    small = ["data.phantom.num_sites=2", "data.phantom.images_per_site=30", "data.phantom.image_size=16"]
    data = load_config("data/missing_classes", ["data.path=phantom:multilabel", *small]).data
    table = describe(derive(data, 0, tmp_path))
    assert [row["active_classes"] for row in table] == [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [0, 5]]
    assert all(row["is_noisy"] and row["missing_everywhere"] == [] for row in table)
