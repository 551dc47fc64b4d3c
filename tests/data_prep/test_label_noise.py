from __future__ import annotations

import numpy as np
import pytest

from data_prep.corruption import TrainPool
from data_prep.corruption.label_noise import (
    LabelNoise,
    colour_means,
    instance_noise,
    label_noise,
    noise_rates,
    random_noise,
    realised_rates,
    soft_labels,
)
from data_prep.seeding import Seed
from fedmed.errors import UserError

GENERATORS = [np.random.RandomState, np.random.default_rng]


def test_published_noisy_clients_of_twenty():
    rates = noise_rates(20, 0.4, 0.5, 0.7, np.random.RandomState(0))
    assert np.flatnonzero(rates).tolist() == [1, 6, 8, 9, 10, 13, 16, 17]
    published = [0.6058, 0.5040, 0.6556, 0.6740, 0.6957, 0.6561, 0.5287, 0.6889]
    assert np.allclose(rates[rates > 0], published, atol=5e-5)


@pytest.mark.parametrize("generator", GENERATORS)
def test_instance_noise_changes_exactly_the_floor_and_follows_q(generator):
    labels = np.zeros(1000, dtype=np.int64)
    soft = np.tile([0.5, 0.375, 0.125], (1000, 1))
    noisy = instance_noise(labels, soft, 0.6009, generator(3))
    assert (noisy != labels).sum() == 600
    assert abs((noisy == 1).sum() / 600 - 0.75) < 0.06  # q without the label: 3/4, 1/4
    assert labels.sum() == 0  # the input is not touched


def test_one_hot_soft_labels_still_change():
    labels = np.array([0, 1, 2, 1])
    noisy = instance_noise(labels, np.eye(3)[labels], 1.0, np.random.RandomState(0))
    assert (noisy != labels).all()


def test_one_hot_rows_are_picked_last():
    labels = np.zeros(100, dtype=np.int64)
    soft = np.tile([0.2, 0.8], (100, 1))
    soft[:50] = [1.0, 0.0]
    noisy = instance_noise(labels, soft, 0.5, np.random.RandomState(0))
    assert (noisy[:50] == 0).all() and (noisy[50:] == 1).all()


@pytest.mark.parametrize("generator", GENERATORS)
def test_random_noise_realises_the_expected_rate(generator):
    labels = np.random.default_rng(0).integers(0, 4, 8000)
    noisy = random_noise(labels, 4, 0.6, generator(1))
    assert abs((noisy != labels).mean() - 0.6 * 3 / 4) < 0.02
    assert noisy.min() >= 0 and noisy.max() < 4


def test_clean_and_empty_clients_draw_nothing():
    labels, client = np.array([0, 1, 0, 1, 1, 0]), np.array([2, 0, 2, 0, 2, 2])
    rates = np.array([0.0, 0.9, 0.5])
    rng = np.random.RandomState(7)
    noisy = label_noise(labels, client, rates, "random", 2, rng)
    alone = random_noise(labels[client == 2], 2, 0.5, np.random.RandomState(7))
    assert np.array_equal(noisy[client == 2], alone)
    assert np.array_equal(noisy[client == 0], labels[client == 0])


def test_realised_rates_with_an_empty_client():
    clean, noisy = np.array([0, 1, 1, 0]), np.array([1, 1, 0, 0])
    assert realised_rates(clean, noisy, np.array([0, 0, 2, 2]), 3).tolist() == [0.5, 0.0, 0.5]


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda r: noise_rates(3, 1.2, 0.1, 0.2, r), "noisy_fraction"),
        (lambda r: noise_rates(3, 0.2, 0.5, 0.2, r), "rate_lower"),
        (lambda r: label_noise(np.array([0]), np.array([0]), np.ones(1), "pair", 2, r), "instance or random"),
        (lambda r: label_noise(np.array([0]), np.array([0]), np.ones(1), "instance", 2, r), "soft labels"),
        (lambda r: label_noise(np.array([0]), np.array([0]), np.ones(1), "instance", 1, r, np.ones((1, 1))), "C >= 2"),
        (
            lambda r: label_noise(np.array([0]), np.array([0]), np.ones(1), "instance", 2, r, np.ones((1, 2))),
            "sum to 1",
        ),
    ],
)
def test_errors(call, word):
    with pytest.raises(UserError, match=word):
        call(np.random.RandomState(0))


def test_colour_means_by_hand():
    image = np.zeros((1, 16, 16, 2), dtype=np.uint8)
    image[0, :2, :2, 0] = 40
    image[0, 14:, 15, 1] = 8
    means = colour_means(image).reshape(8, 8, 2)
    assert means[0, 0].tolist() == [40.0, 0.0] and means[7, 7].tolist() == [0.0, 4.0]
    assert means.sum() == 44.0
    assert colour_means(np.ones((2, 5, 11))).shape == (2, 5 * 8)


def coloured(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, num)
    images = rng.integers(0, 60, (num, 16, 16, 3)).astype(np.uint8)
    images[np.arange(num), :, :, labels] += 60
    return images, labels


def test_soft_labels_are_cross_fitted_probabilities():
    images, labels = coloured(120, 0)
    groups = np.arange(120) // 2
    soft = soft_labels(images, labels, groups, 4, np.random.RandomState(0))
    assert soft.shape == (120, 4) and np.allclose(soft.sum(axis=1), 1.0)
    assert soft.min() >= 1e-3 / 4 - 1e-12 and np.allclose(soft[:, 3], 1e-3 / 4)  # class 3 never seen
    assert (soft.argmax(axis=1) == labels).mean() > 0.9
    again = soft_labels(images, labels, groups, 4, np.random.RandomState(0))
    assert np.array_equal(soft, again)


def test_soft_labels_never_see_the_own_group():
    images, labels = coloured(60, 1)
    groups = np.arange(60)
    images[1], groups[1], labels[1] = images[0], groups[0], labels[0]
    soft = soft_labels(images, labels, groups, 3, np.random.RandomState(0))
    wrong = labels.copy()
    wrong[:2] = (labels[0] + 1) % 3  # a label no other group supports
    changed = soft_labels(images, wrong, groups, 3, np.random.RandomState(0))
    assert np.allclose(soft[:2], changed[:2])


def test_soft_labels_without_anything_to_fit():
    images, labels = coloured(4, 2)
    labels[:] = [0, 0, 1, 1]
    single = soft_labels(images, labels, np.zeros(4), 2, np.random.RandomState(0))
    assert np.isfinite(single).all() and np.allclose(single.sum(axis=1), 1)
    one_class = soft_labels(images, np.zeros(4, dtype=int), np.arange(4), 2, np.random.RandomState(0))
    assert np.allclose(one_class, [[1 - 5e-4, 5e-4]] * 4)


@pytest.mark.parametrize("kind", ["instance", "random"])
def test_apply_reports_what_it_did(kind):
    images, labels = coloured(200, 3)
    pool = TrainPool(images, labels, np.repeat(np.arange(5), 40), np.arange(200), 5, 3)
    result = LabelNoise(kind=kind).apply(pool, Seed(1))
    changed = (result.targets != labels).reshape(5, 40).mean(axis=1)
    assert [fact["noise_rate"] for fact in result.facts] == pytest.approx(changed)
    assert sum(fact["is_noisy"] for fact in result.facts) == 2
    assert np.array_equal(result.targets, LabelNoise(kind=kind).apply(pool, Seed(1)).targets)
    assert not np.array_equal(result.targets, LabelNoise(kind=kind).apply(pool, Seed(2)).targets)
    fixed = [LabelNoise(kind=kind, seed=0).apply(pool, Seed(seed)).targets for seed in (1, 2)]
    assert np.array_equal(*fixed)
