"""Agnostic FL: projection and ascent by hand, the worst site, the mixture over rounds, absence."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmed.federation.messages import Update
from strategies.agnostic import AgnosticFL, AgnosticParams, AgnosticState, ascend, project_simplex

NAN, INF = math.nan, math.inf


def state(weight: float) -> dict[str, Tensor]:
    return {"w": torch.tensor([weight], dtype=torch.float64), "seen": torch.tensor(int(weight))}


def make(bench: SimpleNamespace, step: float | None = None, **mixture: float) -> AgnosticFL:
    rule = bench.bound(AgnosticFL(AgnosticParams(step)), state(0.0), [("a", 4), ("b", 12)])
    rule.state = AgnosticState(dict(mixture))
    return rule  # type: ignore[no-any-return]


def replies(bench: SimpleNamespace, **losses: float) -> list[Update]:
    """Models 1, 2, … of the sites named."""
    return [bench.update(s, k, 1 + k, state(1.0 + k), loss_received=loss) for k, (s, loss) in enumerate(losses.items())]


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ([0.5, 0.5], [0.5, 0.5]),
        ([1.0, 1.0], [0.5, 0.5]),
        ([2.0, 0.0], [1.0, 0.0]),
        ([0.9, 0.3, 0.0], [0.8, 0.2, 0.0]),
        ([-5.0, -5.0, -5.0], [1 / 3, 1 / 3, 1 / 3]),
        ([0.7], [1.0]),
        ([1e15, 1e15 + 1.0], [0.0, 1.0]),
    ],
)
def test_projection_by_hand(point: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(project_simplex(np.array(point)), expected, atol=1e-12)


def test_projection_is_the_nearest_point() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        point = rng.normal(size=5)
        low, high = point.min() - 1, point.max()  # Σ max(v − θ, 0) falls in θ: bisection as the naive twin
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if np.maximum(point - middle, 0).sum() > 1 else (low, middle)
        found = project_simplex(point)
        np.testing.assert_allclose(found, np.maximum(point - low, 0), atol=1e-12)
        np.testing.assert_allclose(project_simplex(point + 3.0), found, atol=1e-12)
        order = rng.permutation(5)
        np.testing.assert_allclose(project_simplex(point[order]), found[order], atol=1e-12)
    assert project_simplex(np.zeros(0)).size == 0


def test_ascent_by_hand() -> None:
    half = np.array([0.5, 0.5])
    np.testing.assert_allclose(ascend(half, np.array([1.0, 0.0]), 0.2), [0.6, 0.4])
    np.testing.assert_allclose(ascend(half, np.array([7.0, 7.0]), 0.2), half)
    np.testing.assert_allclose(ascend(half, np.array([9.0, 0.0]), 1.0), [1.0, 0.0])


def test_ascent_without_a_loss_moves_neither_up_nor_down() -> None:
    third = np.full(3, 1 / 3)
    np.testing.assert_allclose(
        ascend(third, np.array([1.0, NAN, 0.0]), 0.2), ascend(third, np.array([1.0, 0.5, 0.0]), 0.2)
    )
    np.testing.assert_allclose(ascend(third, np.array([1e308, INF, 1.0]), 10.0), third)  # 10 · 1e308 is not finite
    np.testing.assert_allclose(ascend(third, np.array([NAN, INF, -INF]), 0.2), third)


def test_the_worst_site_is_taken_whole(bench: SimpleNamespace) -> None:
    rule = make(bench)
    new = rule.aggregate(1, state(9.0), iter(replies(bench, a=0.4, b=0.9, c=0.5)))
    assert float(new["w"]) == 2.0 and int(new["seen"]) == 2
    assert rule.notes["weights"] == {"a": 0.0, "b": 1.0, "c": 0.0} and rule.notes["largest_weight"] == 1.0
    assert rule.state == AgnosticState()


def test_the_first_of_equals_and_never_a_loss_that_is_not_finite(bench: SimpleNamespace) -> None:
    assert float(make(bench).aggregate(1, state(9.0), iter(replies(bench, a=0.4, b=0.9, c=0.9)))["w"]) == 2.0
    assert float(make(bench).aggregate(1, state(9.0), iter(replies(bench, a=NAN, b=0.1, c=INF)))["w"]) == 2.0


@pytest.mark.parametrize("step", [None, 0.1])
def test_nobody_to_choose(bench: SimpleNamespace, step: float | None) -> None:
    kept, rule = state(3.0), make(bench, step)
    assert rule.aggregate(1, kept, iter([])) is kept and rule.state == AgnosticState()
    if step is None:
        assert rule.aggregate(1, kept, iter(replies(bench, a=NAN, b=NAN))) is kept
        assert rule.notes["weights"] == {"a": 0.0, "b": 0.0}


@pytest.mark.parametrize("step", [None, 0.1])
def test_one_site(bench: SimpleNamespace, step: float | None) -> None:
    rule = make(bench, step)
    assert float(rule.aggregate(1, state(3.0), iter(replies(bench, a=0.5)))["w"]) == pytest.approx(1.0)
    assert rule.notes["weights"] == {"a": 1.0}


def test_the_mean_uses_the_mixture_before_its_step(bench: SimpleNamespace) -> None:
    rule = make(bench, 0.2)
    first = rule.aggregate(1, state(0.0), iter(replies(bench, a=1.0, b=0.0)))
    assert float(first["w"]) == pytest.approx(1.5)
    assert rule.state.mixture == pytest.approx({"a": 0.6, "b": 0.4})
    second = rule.aggregate(2, first, iter(replies(bench, a=1.0, b=0.0)))
    assert float(second["w"]) == pytest.approx(0.6 * 1 + 0.4 * 2)
    assert rule.state.mixture == pytest.approx({"a": 0.7, "b": 0.3})
    assert rule.notes["weights"] == pytest.approx({"a": 0.6, "b": 0.4})


def test_equal_losses_leave_the_mixture(bench: SimpleNamespace) -> None:
    rule = make(bench, 5.0, a=0.7, b=0.3)
    rule.aggregate(1, state(0.0), iter(replies(bench, a=2.0, b=2.0)))
    assert rule.state.mixture == pytest.approx({"a": 0.7, "b": 0.3})


def test_absent_sites_keep_theirs_and_newcomers_hold_the_mean_share(bench: SimpleNamespace) -> None:
    rule = make(bench, 0.2, a=0.5, b=0.3, c=0.2)
    new = rule.aggregate(1, state(0.0), iter(replies(bench, a=1.0, c=1.0)))
    assert float(new["w"]) == pytest.approx((0.5 * 1 + 0.2 * 2) / 0.7)
    assert rule.state.mixture == pytest.approx({"a": 0.5, "b": 0.3, "c": 0.2})
    new = rule.aggregate(2, new, iter(replies(bench, b=1.0, d=1.0)))
    weight = np.array([0.3, 1 / 3]) / (0.3 + 1 / 3)
    assert float(new["w"]) == pytest.approx(float(weight @ [1, 2]))
    total = 4 / 3
    assert rule.state.mixture == pytest.approx({"a": 0.5 / total, "b": 0.3 / total, "c": 0.2 / total, "d": 0.25})


def test_replies_that_all_hold_zero_are_averaged_uniformly(bench: SimpleNamespace) -> None:
    rule = make(bench, 0.2, a=0.0, b=0.0, c=1.0)
    new = rule.aggregate(1, state(0.0), iter(replies(bench, a=1.0, b=1.0)))
    assert float(new["w"]) == pytest.approx(1.5)
    assert rule.state.mixture == pytest.approx({"a": 0.2, "b": 0.2, "c": 0.6})
    assert rule.notes["weights"] == {"a": 0.5, "b": 0.5}


def test_order_of_the_sites_does_not_matter(bench: SimpleNamespace) -> None:
    sites = replies(bench, a=0.4, b=0.9, c=0.5)
    for step in (None, 0.3):
        one, two = make(bench, step, a=0.2, b=0.2, c=0.6), make(bench, step, a=0.2, b=0.2, c=0.6)
        expected = one.aggregate(1, state(0.0), iter(sites))
        turned = two.aggregate(1, state(0.0), iter(sites[::-1]))
        torch.testing.assert_close(expected["w"], turned["w"])
        assert one.state.mixture == pytest.approx(two.state.mixture)


@pytest.mark.parametrize(("step", "expected"), [(None, [0, 1, 1, 1]), (0.1, [0, 0, 0, 0])])
def test_replies_in_memory(bench: SimpleNamespace, step: float | None, expected: list[int]) -> None:
    alive: list[weakref.ref[Update]] = []
    most = []

    def stream() -> Iterator[Update]:
        for k in range(4):
            most.append(sum(ref() is not None for ref in alive))
            update = bench.update(f"s{k}", k, 1, state(1.0), loss_received=1.0 + k)
            alive.append(weakref.ref(update))
            yield update
            del update

    make(bench, step).aggregate(1, state(0.0), stream())
    assert most == expected


@pytest.mark.parametrize("wrong", [0.0, -1.0, INF, NAN])
def test_values_outside_their_range_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        AgnosticParams(wrong)
