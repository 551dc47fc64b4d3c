"""FedIA at the server: trend of the losses, completeness weights, and what is asked of a site when."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmed.config import from_tree
from strategies.completeness import (
    FedIA,
    FedIAParams,
    FedIAState,
    account,
    all_flagged,
    completeness_weights,
    exponents,
    fit_line,
    fitted_lines,
    gap,
    iou_proxy,
    observe,
    size_weights,
    triggered,
    watch,
)

NAN, INF = float("nan"), float("inf")


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


# ---------------------------------------------------------------------- trend


def test_iou_of_a_dice_loss() -> None:
    assert float(iou_proxy(0.25)) == pytest.approx(0.6)
    np.testing.assert_allclose(iou_proxy([0.0, 1.0]), [1.0, 0.0])
    assert np.isnan(iou_proxy([NAN, INF, -INF, -1.0])).all()


def test_line_matches_polyfit_over_the_rounds_there_are() -> None:
    u = np.random.default_rng(0).random(31)
    slope, intercept = np.polyfit(np.arange(31), u, 1)
    assert fit_line(u) == pytest.approx((slope, intercept))
    u[[0, 4, 5, 30]] = NAN
    seen = np.flatnonzero(np.isfinite(u))
    assert fit_line(u) == pytest.approx(tuple(np.polyfit(seen, u[seen], 1)))


def test_line_of_two_of_one_and_of_no_point() -> None:
    assert fit_line(array(0.2, NAN, 0.4)) == pytest.approx((0.1, 0.2))
    assert fit_line(array(NAN, NAN, 0.4)) == (0.0, pytest.approx(0.4))
    assert fit_line(array(NAN, NAN)) is None and fit_line(array()) is None


def test_trigger_by_hand() -> None:
    line = (0.01, 0.2)
    np.testing.assert_allclose(gap(line, [40, 40], [0.56, 0.58]), [0.04, 0.02])
    loss = [(1 - u) / (1 + u) for u in (0.56, 0.58)]  # the proxy is its own inverse
    assert triggered(line, 40, loss[0], 0.03) and not triggered(line, 40, loss[1], 0.03)


def test_trigger_is_strict_and_never_fires_without_a_loss() -> None:
    assert not triggered((0.0, 0.5), 3, 1.0, margin=0.5)
    assert not any(triggered((0.0, 0.5), 3, loss, margin=-1.0) for loss in (NAN, INF))


def test_lines_of_sites() -> None:
    lines = fitted_lines({"a": [0.25, NAN, 9.0], "b": [NAN, NAN, 0.25], "c": []}, 2)
    assert lines == {"a": [0.0, pytest.approx(0.6)]}


# ---------------------------------------------------------------------- weights


def weights(a: np.ndarray, loss: np.ndarray, n: np.ndarray | None = None, **options: float) -> np.ndarray:
    return completeness_weights(exponents(a, loss, **options), np.ones(len(a)) if n is None else n)


def test_weights_by_hand() -> None:
    a, loss = array(0.8, 0.4), array(0.4, 0.4)
    np.testing.assert_allclose(exponents(a, loss), [2, 1])
    np.testing.assert_allclose(weights(a, loss), [0.731059, 0.268941], atol=1e-6)
    np.testing.assert_allclose(weights(a, loss, temperature=2.0), [0.622459, 0.377541], atol=1e-6)


def test_weights_invariances() -> None:
    rng = np.random.default_rng(1)
    a, loss, n = rng.random(5), rng.random(5), rng.integers(1, 9, 5).astype(float)
    order = [3, 0, 4, 1, 2]
    np.testing.assert_allclose(weights(a[order], loss[order], n[order]), weights(a, loss, n)[order])
    np.testing.assert_allclose(weights(a, loss, n), weights(a, loss, 7 * n))  # sizes do not enter
    np.testing.assert_allclose(weights(np.full(5, 0.3), np.full(5, 0.6), n), np.full(5, 0.2))
    assert weights(a, loss).sum() == pytest.approx(1.0)
    assert weights(array(0.2), array(0.9)).tolist() == [1.0]


def test_weights_match_the_plain_softmax() -> None:
    a, loss = array(0.9, 0.5, 0.7), array(0.3, 0.2, 0.8)
    plain = np.exp(a / loss) / np.exp(a / loss).sum()
    np.testing.assert_allclose(weights(a, loss), plain, rtol=1e-12)


def test_tiny_losses_neither_overflow_nor_divide_by_zero() -> None:
    assert weights(array(1, 1, 1), array(0.0, 1e-9, 0.5)).tolist() == [0.5, 0.5, 0.0]
    assert weights(array(1, 1), array(0.0, 0.0), temperature=1e-6, min_loss=1e-6).tolist() == [0.5, 0.5]


def test_completeness_is_clipped_and_unknown_counts_as_one() -> None:
    np.testing.assert_allclose(exponents(array(3.0, NAN, -2.0, INF), np.full(4, 0.5)), [2, 2, 0, 2])


def test_sites_without_loss_or_items_are_left_out() -> None:
    got = weights(np.ones(5), array(0.5, NAN, INF, 0.5, 0.5), array(3, 3, 3, 0, 1))
    assert got.tolist() == [0.5, 0, 0, 0, 0.5]


def test_nobody_left() -> None:
    assert weights(np.ones(2), array(NAN, 0.5), array(4, 0)).tolist() == [0, 0]
    assert weights(array(), array()).tolist() == [] and size_weights(array()).tolist() == []
    assert size_weights(array(0, 0)).tolist() == [0, 0] and size_weights(array(1, 3)).tolist() == [0.25, 0.75]


# ---------------------------------------------------------------------- state


def test_all_flagged_counts_sites_with_a_line() -> None:
    assert not all_flagged({}, {})
    assert not all_flagged({"a": 0, "b": 0}, {"a": 3})
    assert all_flagged({"a": 0}, {"a": 3}) and all_flagged({"a": 0}, {"a": 3, "gone": 2})


def test_observe_pads_absences_and_takes_the_first_completeness(bench: SimpleNamespace) -> None:
    def reply(**metrics: Any) -> dict[str, Any]:
        return {"a": bench.update("a", 0, 4, {}, **{k.replace("__", "/"): v for k, v in metrics.items()})}

    state = observe(FedIAState(), 2, 2, reply(loss__dice=0.5, completeness=NAN))
    assert state.completeness == {} and np.isnan(state.losses["a"][:2]).all() and state.losses["a"][2] == 0.5
    state = observe(state, 4, 2, reply(completeness=0.4))
    assert len(state.losses["a"]) == 5 and math.isnan(state.losses["a"][4])
    assert observe(state, 5, 2, reply(completeness=0.9)).completeness == {"a": 0.4}
    assert observe(FedIAState(), 1, 2, reply(completeness=0.4)).completeness == {}  # nobody asked for it


def test_a_site_is_flagged_once(bench: SimpleNamespace) -> None:
    replies = {"a": bench.update("a", 0, 4, {})}
    state = FedIAState(losses={"a": [0.2, 0.2, 0.9, 0.9]})
    assert watch(state, 0, 1, 0.03, replies) is state
    state = watch(state, 1, 1, 0.03, replies)
    assert set(state.line) == {"a"} and state.flagged == {}
    state = watch(state, 2, 1, 0.03, replies)
    assert state.flagged == {"a": 3} and state.due == {"a": 4}
    assert watch(state, 3, 1, 0.03, replies) == state


def test_account_of_corrections(bench: SimpleNamespace) -> None:
    def reply(count: Any) -> dict[str, Any]:
        return {"a": bench.update("a", 0, 4, {}, n_corrected_pixels=count)}

    state = FedIAState(due={"a": 4})
    assert account(state, 3, reply(0)).due == {"a": 4}  # too early
    assert account(state, 4, {}) == state and account(state, 4, reply(NAN)) == state  # absent; undefined
    done = account(state, 5, reply(7))
    assert (done.due, done.corrected, done.pixels) == ({}, {"a": 5}, {"a": 7})
    assert account(done, 6, reply(7)) == done
    lost = account(done, 6, reply(0))
    assert (lost.due, lost.corrected, lost.pixels) == ({"a": 7}, {"a": 5}, {"a": 0})
    assert account(lost, 7, reply(3)).corrected == {"a": 7}


# ---------------------------------------------------------------------- rule


def state_of(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((3,), float(value)), "steps": torch.tensor(int(value))}


class Federation:
    """A rule over three sites that report losses; the model of site k is full of k."""

    def __init__(self, bench: SimpleNamespace, rounds: int = 9, **params: Any) -> None:
        self.bench = bench
        self.rule = bench.bound(FedIA(FedIAParams(**params)), state_of(9), [(f"s{k}", 10) for k in range(3)])
        self.rule.config = from_tree({"federation": {"rounds": rounds}})
        self.asked: dict[int, list[tuple[int, int]]] = {}

    def round(self, number: int, *losses: float | None, a: tuple[float, ...] = (0.8, 0.4, 1.0)) -> dict[str, Tensor]:
        self.rule.begin_round(number)
        self.asked[number], updates = [], []
        for k, loss in enumerate(losses):
            config = self.rule.payload(number, f"s{k}")[1]
            self.asked[number].append((config["measure"], config["correct"]))
            if loss is not None:
                metrics = {"loss/dice": loss, "train_loss": 99.0, "n_corrected_pixels": 5 * config["correct"]}
                metrics |= {"completeness": a[k]} if config["measure"] else {}
                updates.append(self.bench.update(f"s{k}", k, 10 * (k + 1), state_of(k), **metrics))
        result: dict[str, Tensor] = self.rule.aggregate(number, state_of(9), iter(updates))
        return result


def test_a_whole_course(bench: SimpleNamespace) -> None:
    run = Federation(bench, warmup_last_round=1)
    rule = run.rule
    by_size = run.round(1, 0.5, 0.5, 0.5)
    assert float(by_size["w"][0]) == pytest.approx(8 / 6) and int(by_size["steps"]) == 2
    assert rule.notes["weights"] == pytest.approx({"s0": 1 / 6, "s1": 2 / 6, "s2": 3 / 6})
    assert float(run.round(2, 0.4, 0.4, 0.4)["w"][0]) == pytest.approx(8 / 6)
    assert run.asked == {1: [(0, 0)] * 3, 2: [(1, 0)] * 3}
    assert rule.state.completeness == {"s0": 0.8, "s1": 0.4, "s2": 1.0} and len(rule.state.line) == 3
    weighted = run.round(3, 0.4, 0.2, 0.5)  # exponents 2, 2, 2
    assert rule.notes["weights"] == pytest.approx(dict.fromkeys(("s0", "s1", "s2"), 1 / 3))
    torch.testing.assert_close(weighted["w"], torch.ones(3))
    # u on the line: 1/3, 3/7, 11/21; at s0 and s2 it is below by 0.095 and 0.19, at s1 above.
    assert rule.state.flagged == {"s0": 3, "s2": 3} and not rule.notes["all_flagged"]
    run.round(4, 0.4, 0.9, 0.4)
    assert rule.state.flagged["s1"] == 4 and rule.notes["corrected"] == {"s0": 4, "s2": 4}
    assert rule.notes["corrected_pixels"] == {"s0": 5, "s2": 5} and rule.notes["all_flagged"]
    assert rule.notes["weights"]["s1"] != pytest.approx(2 / 6)  # the flags of this round count from the next on
    assert float(run.round(5, 0.4, 0.9, 0.4)["w"][0]) == pytest.approx(8 / 6)
    assert [run.asked[number] for number in (3, 4, 5)] == [
        [(0, 0)] * 3,
        [(0, 1), (0, 0), (0, 1)],
        [(0, 0), (0, 1), (0, 0)],
    ]
    assert rule.notes["largest_weight"] == pytest.approx(0.5)


def test_measured_when_it_answers_and_one_until_then(bench: SimpleNamespace) -> None:
    run = Federation(bench, warmup_last_round=0)
    run.round(1, 0.5, 0.5, None)
    run.round(2, 0.5, 0.5, None, a=(0.8, 0.4, 0.1))
    assert run.asked[2] == [(0, 0), (0, 0), (1, 0)]
    run.round(3, 0.5, 0.5, 0.5, a=(0.1, 0.1, NAN))
    total = math.exp(1.6) + math.exp(0.8) + math.exp(2)
    assert run.rule.notes["weights"]["s2"] == pytest.approx(math.exp(2) / total)
    run.round(4, 0.5, 0.5, 0.5, a=(0.1, 0.1, 0.6))
    assert run.asked[4][2] == (1, 0) and run.rule.state.completeness["s2"] == 0.6
    run.round(5, 0.5, 0.5, 0.5)
    assert run.asked[5][2] == (0, 0)


def test_a_site_from_after_the_warm_up_is_not_corrected_and_not_waited_for(bench: SimpleNamespace) -> None:
    run = Federation(bench, warmup_last_round=0)
    run.round(1, 0.2, 0.2, None)
    run.round(2, 0.9, 0.9, 0.9)
    assert run.rule.state.flagged == {"s0": 2, "s1": 2} and "s2" not in run.rule.state.line
    result = run.round(3, 0.9, 0.9, 0.9)
    assert float(result["w"][0]) == pytest.approx(8 / 6) and run.asked[3] == [(0, 1), (0, 1), (0, 0)]
    assert run.round(7, 0.9, 0.9, 0.9) is not None and "s2" not in run.rule.state.flagged


def test_an_absent_site_is_asked_for_its_correction_until_it_is_there(bench: SimpleNamespace) -> None:
    run = Federation(bench, warmup_last_round=0)
    run.round(1, 0.2, 0.2, 0.2)
    run.round(2, 0.9, 0.2, 0.2)
    run.round(3, None, 0.2, 0.2)
    run.round(4, None, 0.2, 0.2)
    run.round(5, 0.9, 0.2, 0.2)
    run.round(6, 0.9, 0.2, 0.2)
    assert [run.asked[number][0][1] for number in range(1, 7)] == [0, 0, 1, 1, 1, 0]
    assert run.rule.state.corrected == {"s0": 5}


def test_no_correction_before_two_rounds_after_the_warm_up(bench: SimpleNamespace) -> None:
    run = Federation(bench, warmup_last_round=2, margin=-1.0)
    for number in range(1, 6):
        run.round(number, 0.5, 0.5, 0.5)
    assert [any(c for _, c in run.asked[number]) for number in range(1, 6)] == [False] * 4 + [True]
    assert set(run.rule.state.flagged.values()) == {4}


@pytest.mark.parametrize(("rounds", "warned"), [(4, True), (5, False)])
def test_too_few_rounds_for_a_correction_are_warned_about(
    bench: SimpleNamespace, caplog: pytest.LogCaptureFixture, rounds: int, warned: bool
) -> None:
    with caplog.at_level(logging.WARNING):
        Federation(bench, rounds, warmup_last_round=2).round(1, 0.5, 0.5, 0.5)
    assert ("no mask will be corrected" in caplog.text) == warned


def test_undefined_losses_leave_the_model_as_it_is(bench: SimpleNamespace) -> None:
    run = Federation(bench, warmup_last_round=0)
    run.round(1, NAN, INF, NAN)
    assert run.rule.state.line == {}
    result = run.round(2, NAN, NAN, None)
    assert torch.equal(result["w"], torch.full((3,), 9.0)) and run.rule.notes["weights"] == {"s0": 0.0, "s1": 0.0}
    result = run.round(3, NAN, 0.5, None)
    assert torch.equal(result["w"], torch.ones(3)) and run.rule.notes["largest_weight"] == 1.0
    result = run.round(4)
    assert torch.equal(result["w"], torch.full((3,), 9.0)) and run.rule.notes["largest_weight"] == 0.0


def test_identical_sites_give_the_site_back_and_order_does_not_matter(bench: SimpleNamespace) -> None:
    rng = torch.Generator().manual_seed(0)
    made = [{"w": torch.randn(7, generator=rng, dtype=torch.float64)} for _ in range(4)]
    results = []
    for order, states in ((1, made), (-1, made[::-1]), (1, [made[0]] * 4)):
        rule = bench.bound(FedIA(FedIAParams(warmup_last_round=0)), made[0], [(f"s{k}", 5) for k in range(4)])
        names = [f"s{k}" for k in range(4)][::order]
        for number in (1, 2):
            updates = [
                bench.update(site, k, 5, state, **{"loss/dice": 0.1 * (int(site[1:]) + number)})
                for k, (site, state) in enumerate(zip(names, states, strict=True))
            ]
            result = rule.aggregate(number, made[0], updates)
        results.append(result["w"])
        assert result["w"].dtype == torch.float64
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(results[2], made[0]["w"], rtol=0, atol=1e-12)


def test_state_is_replaced_and_survives_a_restore(bench: SimpleNamespace) -> None:
    run, whole = Federation(bench, warmup_last_round=0), Federation(bench, warmup_last_round=0)
    losses = [(0.2, 0.3, 0.4), (0.9, None, 0.4), (0.9, 0.9, NAN), (0.8, 0.7, 0.9)]
    for number, row in enumerate(losses, start=1):
        expected = whole.round(number, *row)
        before = run.rule.state
        frozen = repr(before)
        kept = {name: getattr(before, name) for name in before.__dataclass_fields__}
        fresh = Federation(bench, warmup_last_round=0)
        fresh.rule.restore(kept, {})
        result = fresh.round(number, *row)
        assert repr(before) == frozen
        torch.testing.assert_close(result["w"], expected["w"], rtol=0, atol=0)
        assert repr(fresh.rule.state) == repr(whole.rule.state)
        run = fresh


@pytest.mark.parametrize(
    "wrong",
    [
        {"warmup_last_round": -1}, {"margin": 1.5}, {"margin": NAN}, {"threshold": 1.0}, {"temperature": 0.0},
        {"min_loss": 0.0},
    ],
)  # fmt: skip
def test_values_outside_their_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="outside its range"):
        FedIAParams(**wrong)
