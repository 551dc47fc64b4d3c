"""FairFed: gaps and weights by hand, rounds, absence, and accuracies that are missing."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmed.federation.messages import Update
from strategies.fair_gap import FairFed, FairFedParams, FairFedState, accuracy_gaps, adapt

NAN = math.nan


def state(weight: float) -> dict[str, Tensor]:
    return {"w": torch.tensor([weight], dtype=torch.float64), "seen": torch.tensor(int(weight))}


def make(bench: SimpleNamespace, beta: float = 1.0, **weights: float) -> FairFed:
    rule = bench.bound(FairFed(FairFedParams(beta)), state(0.0), [("a", 1), ("b", 1), ("c", 2)])
    rule.state = FairFedState(dict(weights))
    return rule  # type: ignore[no-any-return]


def replies(bench: SimpleNamespace, **sites: tuple[int, float]) -> list[Update]:
    """Models 1, 2, … of the sites named, with (number of examples, accuracy)."""
    return [bench.update(s, k, n, state(1.0 + k), bacc_received=acc) for k, (s, (n, acc)) in enumerate(sites.items())]


def test_gaps_by_hand() -> None:
    # the mean is summed: .65; one's own share of it would be .225, .175, .25
    np.testing.assert_allclose(
        accuracy_gaps(np.array([0.9, 0.7, 0.5]), np.array([1.0, 1.0, 2.0])), [0.25, 0.05, 0.15], atol=1e-12
    )


def test_gaps_without_an_accuracy() -> None:
    n = np.array([1.0, 1.0, 2.0])
    np.testing.assert_allclose(accuracy_gaps(np.array([0.9, 0.5, NAN]), n), [0.2, 0.2, 0.2], atol=1e-12)
    np.testing.assert_allclose(accuracy_gaps(np.array([1.0, 0.4, 0.4, NAN]), np.array([1, 1, 1, 9.0]))[3], 0.8 / 3)
    assert accuracy_gaps(np.full(3, NAN), n).tolist() == [0, 0, 0]
    assert accuracy_gaps(np.array([0.3]), np.array([5.0])).tolist() == [0]


def test_weights_by_hand() -> None:
    weights, gaps = np.array([0.25, 0.25, 0.5]), np.array([0.25, 0.05, 0.15])
    np.testing.assert_allclose(adapt(weights, gaps, 1.0, weights), [0.15, 0.35, 0.5])
    np.testing.assert_allclose(adapt(weights, gaps, 5.0, weights), [0.0, 0.6, 0.4], atol=1e-12)
    np.testing.assert_allclose(adapt(weights, gaps, 0.0, weights), weights)
    np.testing.assert_allclose(adapt(weights, np.full(3, 0.4), 9.0, weights), weights)


def test_weights_that_are_all_clipped_or_overflow_fall_back() -> None:
    shares = np.array([0.2, 0.8])
    np.testing.assert_allclose(adapt(np.zeros(2), np.zeros(2), 1.0, shares), shares)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(adapt(np.array([0.5, 0.5]), np.array([0.0, 1e300]), 1e300, shares), shares)
    assert adapt(np.zeros(0), np.zeros(0), 1.0, np.zeros(0)).size == 0


def test_order_does_not_matter() -> None:
    accuracy, n, order = np.array([0.9, 0.7, 0.5]), np.array([1.0, 1.0, 2.0]), [2, 0, 1]
    gaps = accuracy_gaps(accuracy, n)
    np.testing.assert_allclose(accuracy_gaps(accuracy[order], n[order]), gaps[order])
    w = n / 4
    np.testing.assert_allclose(adapt(w[order], gaps[order], 1.0, w[order]), adapt(w, gaps, 1.0, w)[order])


def test_the_first_round_is_fedavg_and_the_second_adapts(bench: SimpleNamespace) -> None:
    rule = make(bench)
    sites = {"a": (1, 0.9), "b": (1, 0.7), "c": (2, 0.5)}
    first = rule.aggregate(1, state(0.0), iter(replies(bench, **sites)))
    assert float(first["w"]) == pytest.approx((1 + 2 + 2 * 3) / 4) and int(first["seen"]) == 3
    assert rule.state.weights == pytest.approx({"a": 0.25, "b": 0.25, "c": 0.5})
    second = rule.aggregate(2, first, iter(replies(bench, **sites)))
    assert rule.notes["weights"] == pytest.approx({"a": 0.15, "b": 0.35, "c": 0.5})
    assert rule.notes["largest_weight"] == pytest.approx(0.5)
    assert float(second["w"]) == pytest.approx(0.15 + 0.7 + 1.5)
    rule.aggregate(3, second, iter(replies(bench, **sites)))
    assert rule.state.weights == pytest.approx({"a": 0.05, "b": 0.45, "c": 0.5})


def test_equal_accuracies_stay_fedavg(bench: SimpleNamespace) -> None:
    rule = make(bench)
    for number in (1, 2, 3):
        new = rule.aggregate(number, state(0.0), iter(replies(bench, a=(1, 0.6), b=(3, 0.6))))
        assert float(new["w"]) == pytest.approx(1.75)


@pytest.mark.parametrize("accuracy", [0.4, NAN])
def test_one_site(bench: SimpleNamespace, accuracy: float) -> None:
    rule = make(bench)
    for number in (1, 2):
        assert float(rule.aggregate(number, state(0.0), iter(replies(bench, a=(3, accuracy))))["w"]) == 1.0


def test_nobody(bench: SimpleNamespace) -> None:
    kept, rule = state(1.0), make(bench, a=0.5, b=0.5)
    assert rule.aggregate(2, kept, iter([])) is kept
    assert rule.state.weights == {"a": 0.5, "b": 0.5}


def test_an_accuracy_that_is_missing_changes_nothing_for_the_site(bench: SimpleNamespace) -> None:
    rule = make(bench, a=0.3, b=0.3, c=0.4)
    sent = replies(bench, a=(1, 1.0), b=(1, 0.5))
    sent.append(bench.update("c", 2, 2, state(3.0)))
    rule.aggregate(2, state(0.0), iter(sent))
    assert rule.state.weights["c"] == pytest.approx(0.4)


def test_absent_sites_keep_theirs_and_newcomers_hold_their_size(bench: SimpleNamespace) -> None:
    rule = make(bench, a=0.5, b=0.3, c=0.2)
    new = rule.aggregate(2, state(0.0), iter(replies(bench, a=(5, 0.6), c=(5, 0.6))))
    assert float(new["w"]) == pytest.approx((0.5 + 0.4) / 0.7)
    assert rule.state.weights == pytest.approx({"a": 0.5, "b": 0.3, "c": 0.2})
    rule.aggregate(3, new, iter(replies(bench, a=(1, 0.6), d=(3, 0.6))))
    assert rule.notes["weights"] == pytest.approx({"a": 0.4, "d": 0.6})
    assert rule.state.weights == pytest.approx({"a": 0.5 / 1.75, "b": 0.3 / 1.75, "c": 0.2 / 1.75, "d": 0.75 / 1.75})


@pytest.mark.parametrize("wrong", [-1.0, math.inf, NAN])
def test_values_outside_their_range_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        FairFedParams(wrong)
