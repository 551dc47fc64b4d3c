"""Prototypes, learning degrees and pseudo-labels: hand-worked cases, ties, truncation, and what happens without items."""

from __future__ import annotations

import numpy as np
import pytest

from clients.prototype_tags import (
    NEGATIVE,
    NONE,
    POSITIVE,
    Tags,
    adaptive_fraction,
    add_tags,
    annotated_entries,
    class_prior,
    clip_norms,
    cosines,
    learning_degrees,
    local_prototypes,
    most_confident,
    quota,
    sides,
    similarity_difference,
    withhold,
)

NAN = float("nan")


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def flags(*rows: list[int]) -> np.ndarray:
    return np.array(rows) == 1


def tags_of(*rows: list[int]) -> Tags:
    return np.array(rows, dtype=np.uint8)


# ---------------------------------------------------------------------- who annotates what, priors


def test_annotation_by_site_by_item_and_unsaid() -> None:
    index = np.array([3, 1])
    assert annotated_entries(None, index, 2).all() and annotated_entries(None, index, 2).shape == (2, 2)
    assert annotated_entries(np.array([1, 0]), index, 2).tolist() == [[True, False]] * 2
    table = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], dtype=np.uint8)
    assert annotated_entries(table, index, 2).tolist() == [[False, True], [True, False]]


def test_priors_by_hand() -> None:
    labels, annotated = flags([1, 1, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0]), flags(*[[1, 0, 0]] * 4)
    tags = tags_of([0, POSITIVE, 0], [0, NEGATIVE, 0], [0, 0, 0], [0, POSITIVE, 0])
    # what stands in the columns of missing classes is not read
    assert class_prior(labels, annotated, tags).tolist() == [0.25, 0.5, 0.0]


def test_a_class_annotated_in_part_has_the_rate_of_its_annotated_items() -> None:
    labels, annotated = flags([1], [0], [0]), flags([1], [1], [0])
    assert class_prior(labels, annotated, tags_of([0], [0], [POSITIVE])).tolist() == [0.5]


def test_priors_of_nothing() -> None:
    none = np.zeros((0, 2), dtype=bool)
    assert class_prior(none, none, np.zeros((0, 2), dtype=np.uint8)).tolist() == [0.0, 0.0]


# ---------------------------------------------------------------------- prototypes, degrees


def test_prototypes_by_hand() -> None:
    features = np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 8.0]])
    proto, counts = local_prototypes(features, flags([0, 1], [0, 1], [1, 1]), flags(*[[1, 0]] * 3))
    assert proto.tolist() == [[2.0, 0.0], [0.0, 8.0], [0.0, 0.0], [0.0, 0.0]] and counts.tolist() == [2, 1, 0, 0]
    proto, counts = local_prototypes(features, flags([0, 1], [0, 1], [1, 1]), flags(*[[0, 1]] * 3))
    assert counts.tolist() == [0, 0, 0, 3] and np.isfinite(proto).all()


def test_prototypes_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    features, labels, annotated = rng.normal(size=(9, 4)), rng.random((9, 3)) > 0.6, rng.random((9, 3)) > 0.3
    proto, counts = local_prototypes(features, labels, annotated)
    for c in range(3):
        for v in (0, 1):
            rows = [features[i] for i in range(9) if annotated[i, c] and labels[i, c] == v]
            assert counts[2 * c + v] == len(rows)
            np.testing.assert_allclose(proto[2 * c + v], np.mean(rows, axis=0) if rows else np.zeros(4))


def test_prototypes_of_nobody() -> None:
    none = np.zeros((0, 2), dtype=bool)
    proto, counts = local_prototypes(np.zeros((0, 3)), none, none)
    assert proto.tolist() == [[0.0] * 3] * 4 and counts.tolist() == [0] * 4


def test_few_items_are_withheld_with_the_other_side_of_their_class() -> None:
    proto, counts = withhold(np.ones((6, 2)), np.array([40, 4, 40, 5, 44, 0]), 5)
    assert counts.tolist() == [0, 0, 40, 5, 44, 0]
    assert proto[:, 0].tolist() == [0, 0, 1, 1, 1, 0]
    assert withhold(np.ones((2, 2)), np.array([40, 1]), 1)[1].tolist() == [40, 1]


def test_norms_are_clipped() -> None:
    features = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    np.testing.assert_allclose(clip_norms(features, 1.0), [[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]])
    assert clip_norms(features, 0.0) is features


def test_degrees_by_hand() -> None:
    assert learning_degrees(np.array([[0.1], [0.5], [0.9], [0.69]])).tolist() == [0.5]
    assert learning_degrees(np.array([[0.3], [0.7], [NAN]])).tolist() == [0.0]  # the limits are not sure, nor is NaN
    assert learning_degrees(np.zeros((0, 2))).tolist() == [0.0, 0.0]


# ---------------------------------------------------------------------- tags


def test_difference_by_hand() -> None:
    features, proto = np.array([[1.0, 1.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 2.0]])
    found = similarity_difference(features, proto)[:, 0]
    assert found.tolist() == [0.0, 1.0]
    assert sides(found)[0].tolist() == [True, True]  # equally far counts as absent


def test_zero_vectors_have_no_direction() -> None:
    assert cosines(np.zeros((2, 3)), np.ones(3)).tolist() == [0.0, 0.0]
    assert cosines(np.ones((2, 3)), np.zeros(3)).tolist() == [0.0, 0.0]


def test_difference_does_not_depend_on_scale() -> None:
    rng = np.random.default_rng(0)
    features, proto = rng.normal(size=(5, 4)), rng.normal(size=(6, 4))
    expected = similarity_difference(features, proto)
    np.testing.assert_allclose(similarity_difference(7 * features, proto * rng.uniform(1, 9, (6, 1))), expected)


def test_quotas_by_hand() -> None:
    assert (quota(0.25, 40), quota(0.3, 7), quota(0.005, 199), quota(0.005, 200)) == (10, 2, 0, 1)
    assert quota(0.29, 100) == 28  # the product is 28.999999999999996
    assert (quota(0.0, 9, 2), quota(0.5, 9, 2), quota(0.0, 1, 2), quota(1.0, 0, 2), quota(1.0, 9)) == (2, 4, 1, 0, 9)
    assert (adaptive_fraction(0.01, 0.5), adaptive_fraction(1.0, 1.5), adaptive_fraction(0.5, 0.0)) == (0.005, 1.0, 0.0)


def test_the_most_confident_first_and_of_equal_ones_the_smaller_id() -> None:
    difference, ids = floats(0.5, 0.9, 0.9, -0.1, -0.4, -0.4, 0.0), np.array([10, 40, 20, 70, 60, 50, 30])
    negative, positive = most_confident(difference, ids, 0.75, 0.7)
    assert negative.tolist() == [20, 40, 10] and positive.tolist() == [50, 60]
    order = np.random.default_rng(0).permutation(7)
    again = most_confident(difference[order], ids[order], 0.75, 0.7)
    assert [part.tolist() for part in again] == [[20, 40, 10], [50, 60]]


def test_without_a_negative_quota_there_are_still_positives() -> None:
    negative, positive = most_confident(floats(0.5, -0.5, -0.4), np.arange(3), 0.5, 0.5)
    assert negative.tolist() == [] and positive.tolist() == [1]


def test_what_is_not_a_number_is_never_tagged() -> None:
    negative, positive = most_confident(floats(NAN, 0.5, NAN, -0.5), np.arange(4), 1.0, 1.0)
    assert negative.tolist() == [1] and positive.tolist() == [3]
    assert [len(part) for part in most_confident(floats(), np.zeros(0, dtype=np.int64), 1.0, 1.0)] == [0, 0]


FULL = np.ones((2, 3))


def test_tags_pile_up_and_are_not_withdrawn() -> None:
    difference = np.array([[0.9, 0.0, 0.0], [0.5, 0.0, 0.0], [-0.2, 0.0, 0.0], [-0.9, 0.0, 0.0]])
    annotated, usable = flags(*[[0, 1, 1]] * 4), np.ones(3, dtype=bool)
    first = add_tags(np.zeros((4, 3), dtype=np.uint8), annotated, difference, usable, 0.5 * FULL)
    assert first[:, 0].tolist() == [NEGATIVE, NONE, NONE, POSITIVE] and (first[:, 1:] == NONE).all()
    second = add_tags(first, annotated, -difference, usable, FULL)  # a model that has changed its mind
    assert second[:, 0].tolist() == [NEGATIVE, POSITIVE, NEGATIVE, POSITIVE]
    assert first[:, 0].tolist() == [NEGATIVE, NONE, NONE, POSITIVE]  # not written into
    assert (add_tags(second, annotated, difference, usable, FULL) == second).all()  # everything is tagged


def test_only_classes_with_both_prototypes_are_tagged() -> None:
    difference, annotated = np.array([[0.9, 0.9, 0.9]]), flags([0, 0, 0])
    tags = np.zeros((1, 3), dtype=np.uint8)
    found = add_tags(tags, annotated, difference, np.array([True, False, True]), FULL)
    assert found.tolist() == [[NEGATIVE, NONE, NEGATIVE]]
    fractions = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    assert add_tags(tags, annotated, difference, np.ones(3, bool), fractions).tolist() == [[NEGATIVE, NEGATIVE, NONE]]


def test_in_a_class_annotated_in_part_the_other_items_are_candidates() -> None:
    difference = np.array([[0.9], [0.8], [-0.7]])
    found = add_tags(np.zeros((3, 1), np.uint8), flags([1], [0], [0]), difference, np.ones(1, bool), np.ones((2, 1)))
    assert found.ravel().tolist() == [NONE, NEGATIVE, POSITIVE]


@pytest.mark.parametrize("shape", [(0, 3), (4, 3)])
def test_nothing_to_tag(shape: tuple[int, int]) -> None:
    tags, everything = np.zeros(shape, dtype=np.uint8), np.ones(shape, dtype=bool)
    assert (add_tags(tags, everything, np.ones(shape), np.ones(3, dtype=bool), FULL) == tags).all()
