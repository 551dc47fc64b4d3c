"""FedGA: schedule, gaps and weights by hand, which losses belong together, and what is missing."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmed.federation.messages import Update
from strategies.generalization_gap import FedGA, FedGAParams, FedGAState, adjust, centred_gaps, step_size

NAN = math.nan


def state(weight: float) -> dict[str, Tensor]:
    return {"w": torch.tensor([weight], dtype=torch.float64), "seen": torch.tensor(int(weight))}


def make(bench: SimpleNamespace, held: FedGAState | None = None, **params: float) -> FedGA:
    rule = bench.bound(FedGA(FedGAParams(**params)), state(0.0), [("a", 1), ("b", 1)])  # type: ignore[arg-type]
    rule.state = held or FedGAState()
    return rule  # type: ignore[no-any-return]


def replies(bench: SimpleNamespace, **losses: tuple[float, float]) -> list[Update]:
    """Models 1, 2, … of the sites named, with (loss of the received model, training loss), of unequal size."""
    return [
        bench.update(s, k, 10**k, state(1.0 + k), loss_received=received, train_loss=trained)
        for k, (s, (received, trained)) in enumerate(losses.items())
    ]


def test_step_by_hand() -> None:
    assert step_size(1, 10, 0.05, 4) == pytest.approx(0.0125)
    assert step_size(6, 10, 0.05) == pytest.approx(0.025)
    assert step_size(10, 10, 0.05) == pytest.approx(0.005)
    assert step_size(1, 1, 0.2, 1) == pytest.approx(0.2)


def test_gaps_by_hand() -> None:
    np.testing.assert_allclose(
        centred_gaps(np.array([1.0, 0.8, 0.6]), np.array([0.4, 0.6, 0.5])), [0.3, -0.1, -0.2], atol=1e-12
    )


def test_gaps_without_a_loss() -> None:
    known = centred_gaps(np.array([1.0, 0.8, NAN, 3.0]), np.array([0.4, 0.6, 0.5, math.inf]))
    np.testing.assert_allclose(known, [0.2, -0.2, 0, 0], atol=1e-12)
    assert centred_gaps(np.array([1.0]), np.array([NAN])).tolist() == [0]
    assert centred_gaps(np.array([1.0]), np.array([0.2])).tolist() == [0]
    assert centred_gaps(np.zeros(0), np.zeros(0)).size == 0


def test_weights_by_hand() -> None:
    third = np.full(3, 1 / 3)
    found = adjust(third, np.array([0.3, -0.1, -0.2]), 0.3)
    np.testing.assert_allclose(found, [1 / 3 + 0.3, 1 / 3 - 0.1, 1 / 3 - 0.2])
    np.testing.assert_allclose(adjust(third, np.array([30.0, -10.0, -20.0]), 0.3), found)  # the scale does not matter
    np.testing.assert_allclose(adjust(np.array([0.9, 0.1]), np.array([1.0, -1.0]), 0.3), [1.0, 0.0])
    np.testing.assert_allclose(adjust(third, np.zeros(3), 0.3), third)
    assert adjust(np.zeros(0), np.zeros(0), 0.3).size == 0


def test_order_does_not_matter() -> None:
    weights, one, two = np.array([0.2, 0.3, 0.5]), np.array([1.0, 0.8, 0.6]), np.array([0.4, 0.6, 0.5])
    order = [2, 0, 1]
    expected = adjust(weights, centred_gaps(one, two), 0.1)[order]
    np.testing.assert_allclose(adjust(weights[order], centred_gaps(one[order], two[order]), 0.1), expected)


def test_the_loss_of_the_local_model_waits_for_the_loss_of_the_global_one(bench: SimpleNamespace) -> None:
    rule = make(bench, step=0.4)
    rounds = rule.config.federation.rounds
    first = rule.aggregate(1, state(0.0), iter(replies(bench, a=(9.0, 0.5), b=(1.0, 0.5))))
    assert float(first["w"]) == pytest.approx(1.5)  # uniform, whatever the sizes and the losses of round 1
    assert rule.state == FedGAState({"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.5})
    # G = 1.0 − .5, .7 − .5; the training losses of round 2 do not count yet
    second = rule.aggregate(2, first, iter(replies(bench, a=(1.0, 0.1), b=(0.7, 9.0))))
    share = 0.5 + 0.4 * (rounds - 1) / rounds / 2
    assert rule.notes["weights"] == pytest.approx({"a": share, "b": 1 - share})
    assert float(second["w"]) == pytest.approx(share * 1 + (1 - share) * 2)
    assert rule.state.train_loss == {"a": 0.1, "b": 9.0}


def test_the_step_of_the_paper_does_not_know_the_number_of_sites(bench: SimpleNamespace) -> None:
    rule = make(bench, FedGAState({"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.5}), step=0.4, per_site=False)
    rule.aggregate(2, state(0.0), iter(replies(bench, a=(1.0, 0.1), b=(0.7, 9.0))))
    rounds = rule.config.federation.rounds
    assert rule.state.weights["a"] == pytest.approx(0.5 + 0.4 * (rounds - 1) / rounds)


def test_equal_sites_stay_uniform(bench: SimpleNamespace) -> None:
    rule = make(bench, step=0.5)
    for number in (1, 2, 3):
        rule.aggregate(number, state(0.0), iter(replies(bench, a=(1.0, 0.5), b=(1.0, 0.5), c=(1.0, 0.5))))
        assert list(rule.state.weights.values()) == pytest.approx([1 / 3] * 3)


def test_one_site_and_nobody(bench: SimpleNamespace) -> None:
    rule, kept = make(bench), state(7.0)
    for number in (1, 2):
        assert float(rule.aggregate(number, kept, iter(replies(bench, a=(1.0, 0.5))))["w"]) == 1.0
    assert rule.aggregate(3, kept, iter([])) is kept
    assert rule.state == FedGAState({"a": 1.0}, {})


def test_a_loss_that_is_missing_moves_nothing(bench: SimpleNamespace) -> None:
    before = FedGAState({"a": 0.4, "b": 0.6}, {"a": 0.5})
    rule = make(bench, before)
    rule.aggregate(2, state(0.0), iter(replies(bench, a=(3.0, NAN), b=(1.0, 0.2))))
    assert rule.state == FedGAState(pytest.approx({"a": 0.4, "b": 0.6}), {"b": 0.2})
    rule.aggregate(3, state(0.0), iter(replies(bench, a=(3.0, 0.1), b=(NAN, 0.2))))
    assert rule.state.weights == pytest.approx({"a": 0.4, "b": 0.6})


def test_absent_sites_keep_theirs_and_newcomers_hold_the_mean_share(bench: SimpleNamespace) -> None:
    rule = make(bench, FedGAState({"a": 0.5, "b": 0.3, "c": 0.2}, {"b": 0.1}))
    rule.aggregate(2, state(0.0), iter(replies(bench, a=(3.0, 0.1), c=(1.0, 0.2))))
    assert rule.state.weights == pytest.approx({"a": 0.5, "b": 0.3, "c": 0.2})
    assert set(rule.state.train_loss) == {"a", "c"}  # that of b is of no use once a round has passed
    rule.aggregate(3, state(0.0), iter(replies(bench, b=(3.0, 0.1), d=(1.0, 0.2))))
    assert rule.notes["weights"] == pytest.approx({"b": 0.9 / 1.9, "d": 1 / 1.9})


def test_rounds_are_part_of_the_method() -> None:
    assert FedGA.depends_on_rounds


@pytest.mark.parametrize("wrong", [0.0, 1.0, -0.1, NAN])
def test_values_outside_their_range_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        FedGAParams(wrong)
