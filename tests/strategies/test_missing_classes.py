"""FedMLP at the server: prototypes by row, degrees by class, and who is in which mean."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmed.config import from_tree
from fedmed.federation.checkpoint import flatten, unflatten
from fedmed.federation.messages import Update
from strategies.missing_classes import (
    FedMLP,
    FedMLPParams,
    FedMLPState,
    aggregate_degrees,
    aggregate_prototypes,
    learn,
    read_finding,
    row_weights,
    unknown_classes,
)

NAN, INF = float("nan"), float("inf")


def mean_of(values: list[float], sizes: list[float], active: list[bool], counts: list[int] | None = None) -> Any:
    """One class, one feature, both rows alike."""
    tables = np.array(values)[:, None, None].repeat(2, axis=1)
    count = np.array(counts or [9] * len(values), dtype=float)[:, None].repeat(2, axis=1)
    weights = row_weights(tables, count, np.array(active)[:, None], np.array(sizes))
    return aggregate_prototypes(tables, weights, np.full((2, 1), 7.0), np.zeros(2, dtype=bool))


def test_prototypes_by_hand() -> None:
    proto, valid = mean_of([2.0, 4.0, 100.0], [100, 300, 50], [True, True, False])
    assert proto.ravel().tolist() == [3.5, 3.5] and valid.all()


def test_sites_without_items_or_with_broken_rows_do_not_enter() -> None:
    for value, count in ((100.0, 0), (NAN, 9), (INF, 9), (100.0, NAN)):
        proto, _ = mean_of([2.0, 4.0, value], [100, 300, 50], [True] * 3, [9, 9, count])
        assert proto.ravel().tolist() == [3.5, 3.5]


def test_rows_are_weighed_one_by_one() -> None:
    tables = np.array([[[1.0], [10.0]], [[3.0], [0.0]]])
    counts, active = np.array([[4.0, 2.0], [6.0, 0.0]]), np.ones((2, 1), dtype=bool)
    sizes = np.array([1.0, 3.0])
    start, flags = np.zeros((2, 1)), np.zeros(2, dtype=bool)
    by_size = aggregate_prototypes(tables, row_weights(tables, counts, active, sizes), start, flags)[0]
    assert by_size.ravel().tolist() == [2.5, 10.0]
    by_count = aggregate_prototypes(tables, row_weights(tables, counts, active, sizes, 1, "count"), start, flags)[0]
    assert by_count.ravel().tolist() == [pytest.approx(2.2), 10.0]
    _, valid = aggregate_prototypes(tables, row_weights(tables, counts, active, sizes, min_count=3), start, flags)
    assert valid.tolist() == [True, False]


def test_without_contributors_a_row_and_its_flag_stay() -> None:
    proto, valid = mean_of([2.0, 4.0], [100, 300], [False, False])
    assert proto.ravel().tolist() == [7.0, 7.0] and not valid.any()
    empty = aggregate_prototypes(np.zeros((0, 2, 1)), np.zeros((0, 2)), np.full((2, 1), 7.0), np.ones(2, dtype=bool))
    assert empty[0].ravel().tolist() == [7.0, 7.0] and empty[1].all()
    assert mean_of([2.0], [0], [True])[0].ravel().tolist() == [7.0, 7.0]  # a site of no items


def test_prototypes_do_not_depend_on_the_order_of_sites_or_the_scale_of_sizes() -> None:
    rng = np.random.default_rng(0)
    tables, counts = rng.normal(size=(4, 6, 5)), rng.integers(0, 4, size=(4, 6)).astype(float)
    active, sizes = rng.random((4, 3)) > 0.4, rng.integers(1, 9, size=4).astype(float)
    start, flags = np.zeros((6, 5)), np.zeros(6, dtype=bool)

    def mean(order: list[int], scale: float) -> Any:
        weights = row_weights(tables[order], counts[order], active[order], scale * sizes[order])
        return aggregate_prototypes(tables[order], weights, start, flags)

    (first, flags_first), (second, flags_second) = mean([0, 1, 2, 3], 1.0), mean([2, 0, 3, 1], 10.0)
    np.testing.assert_allclose(first, second, atol=1e-12)
    assert (flags_first == flags_second).all()


def test_degrees_by_hand() -> None:
    degrees, active = np.array([[0.0, 0.5], [0.2, 0.0], [0.6, 0.9]]), np.array([[1, 0], [0, 1], [0, 0]]) == 1
    sizes = np.array([10.0, 30.0, 10.0])
    found = aggregate_degrees(degrees, active, sizes, np.ones(2))
    assert found.tolist() == pytest.approx([0.3, 0.7])
    assert aggregate_degrees(degrees, np.ones((3, 2), bool), sizes, np.array([1.0, 0.4])).tolist() == [1.0, 0.4]
    degrees[2] = NAN, INF
    assert aggregate_degrees(degrees, active, sizes, np.ones(2)).tolist() == pytest.approx([0.2, 0.5])
    assert aggregate_degrees(degrees[:0], active[:0], sizes[:0], np.array([0.3, 1.0])).tolist() == [0.3, 1.0]
    assert aggregate_degrees(degrees, active, 0 * sizes, np.ones(2)).tolist() == [1.0, 1.0]


def extras(proto: list[float], active: list[int], count: int = 9, tau: float = 0.5) -> dict[str, Tensor]:
    """One feature; `proto` (2C,)."""
    return {
        "proto": torch.tensor(proto)[:, None],
        "proto_count": torch.full((len(proto),), count),
        "tau": torch.full((len(active),), tau),
        "active": torch.tensor(active, dtype=torch.uint8),
    }


def test_what_does_not_fit_is_refused() -> None:
    good = extras([1.0, 2.0, 3.0, 4.0], [1, 0])
    assert read_finding(good, None, None).proto.shape == read_finding(good, 2, 1).proto.shape == (4, 1)
    with pytest.raises(ValueError, match="'tau' is missing"):
        read_finding({k: v for k, v in good.items() if k != "tau"}, 2, 1)
    for wrong in ({"proto": good["proto"][:2]}, {"proto": good["proto"][:, 0]}, {"active": torch.ones(3)}):
        with pytest.raises(ValueError, match="arrays of shapes"):
            read_finding({**good, **wrong}, 2, 1)
    with pytest.raises(ValueError, match="arrays of shapes"):
        read_finding(good, 2, 8)


def test_a_class_that_was_once_known_stays_known() -> None:
    known = learn(FedMLPState(), [read_finding(extras([1.0, 2.0, 0.0, 0.0], [1, 0]), 2, 1)], [10], FedMLPParams())
    assert known.proto_valid == [1, 1, 0, 0] and known.tau == [1.0, 0.5] and unknown_classes(known, 2) == [1]
    other = learn(known, [read_finding(extras([0.0, 0.0, 3.0, 4.0], [0, 1], tau=0.1), 2, 1)], [10], FedMLPParams())
    assert other.proto.ravel().tolist() == [1.0, 2.0, 3.0, 4.0] and other.proto_valid == [1, 1, 1, 1]
    assert other.tau == pytest.approx([0.1, 0.5]) and unknown_classes(other, 2) == []
    assert learn(other, [], [], FedMLPParams()) is other
    assert unknown_classes(FedMLPState(), 2) == [0, 1]


# ---------------------------------------------------------------------- the rule


STATE = {"w": torch.zeros(2), "running_mean": torch.zeros(1), "counter": torch.tensor(0)}


def make_rule(bench: SimpleNamespace, rounds: int = 9, **params: Any) -> FedMLP:
    rule: FedMLP = bench.bound(FedMLP(FedMLPParams(**{"warmup_rounds": 2, **params})), STATE, [("s0", 1), ("s1", 3)])
    rule.config = from_tree({"federation": {"rounds": rounds}})
    return rule


def reply(index: int, n: int, value: float, more: dict[str, Tensor] | None = None, **metrics: float) -> Update:
    state = {"w": torch.full((2,), value), "running_mean": torch.full((1,), value), "counter": torch.tensor(index)}
    return Update(f"s{index}", index, n, state, more or {}, {"n_pseudo_pos": 1, "n_pseudo_neg": 2, **metrics})


def both(proto: tuple[list[float], list[float]] = ([1.0, 2.0, 0, 0], [0, 0, 3.0, 4.0]), **kw: Any) -> list[Update]:
    return [reply(0, 1, 1.0, extras(proto[0], [1, 0]), **kw), reply(1, 3, 5.0, extras(proto[1], [0, 1]), **kw)]


def test_payload_by_round(bench: SimpleNamespace) -> None:
    rule = make_rule(bench)
    assert rule.payload(1, "s0") == ({}, {"stage": 1, "collect": 0})
    assert rule.payload(2, "s0") == ({}, {"stage": 1, "collect": 1})
    assert rule.payload(3, "s0") == ({}, {"stage": 2, "collect": 1})  # nobody has sent prototypes
    rule.aggregate(2, STATE, iter(both()))
    arrays, config = rule.payload(3, "s1")
    assert config == {"stage": 2, "collect": 1}
    assert arrays["proto"].ravel().tolist() == [1, 2, 3, 4] and arrays["proto"].dtype == torch.float32
    assert arrays["proto_valid"].tolist() == [1] * 4 and arrays["tau"].tolist() == [0.5, 0.5]


def test_models_are_averaged_by_size_and_buffers_too(bench: SimpleNamespace) -> None:
    rule = make_rule(bench)
    out = rule.aggregate(1, STATE, iter(both()))
    assert out["w"].tolist() == [4.0, 4.0] and out["running_mean"].item() == 4.0 and out["counter"].item() == 1
    assert rule.notes["weights"] == {"s0": 0.25, "s1": 0.75} and rule.notes["largest_weight"] == 0.75
    assert rule.state.proto_valid == [] and "learning_degree" not in rule.notes  # not collected yet


def test_nobody_replied(bench: SimpleNamespace) -> None:
    rule = make_rule(bench)
    assert rule.aggregate(3, STATE, iter([])) is STATE
    assert rule.state.proto_valid == [] and rule.notes["weights"] == {}
    assert rule.notes["classes_without_prototypes"] == ["a", "b"]
    rule.aggregate(3, STATE, iter(both()))
    before = rule.state
    assert rule.aggregate(4, STATE, iter([])) is STATE and rule.state is before


def test_broken_findings_leave_the_model_alone(bench: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    rule = make_rule(bench)
    broken = both(([NAN, 2.0, 0, 0], [0, 0, INF, 4.0]))
    broken[1].extras.pop("tau")
    with caplog.at_level(logging.WARNING):
        out = rule.aggregate(2, STATE, iter(broken))
    assert out["w"].tolist() == [4.0, 4.0]
    assert rule.state.proto_valid == [0, 1, 0, 0] and torch.isfinite(rule.state.proto).all()
    assert "prototypes of s1 are left out" in caplog.text and "no pseudo-labels for a, b" in caplog.text


def test_only_those_that_replied_are_in_the_means_of_a_round(bench: SimpleNamespace) -> None:
    rule = make_rule(bench)
    rule.aggregate(2, STATE, iter(both()))
    rule.aggregate(3, STATE, iter([reply(1, 3, 5.0, extras([0, 0, 30.0, 40.0], [0, 1], tau=0.2))]))
    assert rule.state.proto.ravel().tolist() == [1, 2, 30, 40] and rule.state.tau == pytest.approx([0.2, 0.5])


def test_notes_survive_metrics_that_are_no_numbers(bench: SimpleNamespace) -> None:
    rule = make_rule(bench)
    rule.aggregate(2, STATE, iter(both(n_pseudo_pos=NAN)))
    assert rule.notes["n_pseudo_pos"] == {} and rule.notes["n_pseudo_neg"] == {"s0": 2.0, "s1": 2.0}
    assert rule.notes["learning_degree"] == {"a": 0.5, "b": 0.5}


def test_what_the_state_keeps_is_its_own(bench: SimpleNamespace) -> None:
    rule = make_rule(bench)
    updates = both()
    rule.aggregate(2, STATE, iter(updates))
    for update in updates:
        update.extras["proto"].fill_(-1.0)
    assert rule.state.proto.ravel().tolist() == [1, 2, 3, 4]


def test_the_state_goes_through_a_checkpoint(bench: SimpleNamespace) -> None:
    rule = make_rule(bench)
    for number in (1, 2):
        rule.aggregate(number, STATE, iter(both()))
        arrays: dict[str, Tensor] = {}
        tree = {k: flatten(v, arrays, k) for k, v in vars(rule.state).items()}
        other = make_rule(bench)
        other.restore({k: unflatten(v, arrays) for k, v in tree.items()}, {})
        assert torch.equal(other.state.proto, rule.state.proto) and other.state.tau == rule.state.tau
        assert other.payload(3, "s0")[1] == rule.payload(3, "s0")[1]


def test_a_run_that_ends_in_the_warm_up_says_so(bench: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make_rule(bench, rounds=3).aggregate(1, STATE, iter(both()))
        assert caplog.text == ""
        make_rule(bench, rounds=2).aggregate(1, STATE, iter(both()))
    assert "begins in round 3, the last is 2" in caplog.text


@pytest.mark.parametrize("wrong", [{"warmup_rounds": 0}, {"min_count": 0}, {"proto_weight": "sites"}])
def test_values_outside_their_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected, got"):
        FedMLPParams(**wrong)
