"""FedISM and FedISM+ at the server: sharpness, power, moving average (rule R1), radius, aggregation, absent sites."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmed.config import from_tree
from strategies.sharpness_matching import (
    FLOOR,
    FedISM,
    FedISMParams,
    FedISMPlus,
    FedISMPlusParams,
    FedISMState,
    aggregate,
    growing_radius,
    moving_average,
    power_weights,
    sharpness,
    sharpness_weights,
)

NAN, INF = float("nan"), float("inf")
LOSS, PERTURBED = np.array([0.5, 0.5, 0.5]), np.array([0.6, 0.7, 0.8])


# ---------------------------------------------------------------------- sharpness


def test_sharpness_by_hand() -> None:
    np.testing.assert_allclose(sharpness(LOSS, PERTURBED), [0.1, 0.2, 0.3])


def test_sharpness_is_never_below_the_floor() -> None:
    assert sharpness(np.array([0.5, 0.5]), np.array([0.5, 0.1])).tolist() == [FLOOR, FLOOR]


@pytest.mark.parametrize("bad", [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (INF, INF), (NAN, NAN)])
def test_site_without_two_finite_losses_is_not_valid(bad: tuple[float, float]) -> None:
    assert sharpness(np.array([0.5, bad[0]]), np.array([0.6, bad[1]])) == pytest.approx([0.1, 0.0])


# ---------------------------------------------------------------------- weights


def test_first_round_by_hand() -> None:
    weights = sharpness_weights(sharpness(LOSS, PERTURBED), q=2.0, beta=0.5)
    np.testing.assert_allclose(weights, np.array([1, 4, 9]) / 14, atol=1e-8)


def test_later_round_by_hand() -> None:
    weights = sharpness_weights(sharpness(LOSS, PERTURBED), 2.0, 0.5, np.array([0.2, 0.3, 0.5]))
    np.testing.assert_allclose(weights, [0.135714, 0.292857, 0.571429], atol=1e-6)


def test_flat_everywhere_gives_equal_weights() -> None:
    flat = sharpness(np.full(4, 0.5), np.array([0.5, 0.4, 0.1, 0.5]))
    np.testing.assert_allclose(sharpness_weights(flat, 2.0), np.full(4, 0.25))


def test_power_zero_gives_equal_weights_over_the_valid_sites() -> None:
    np.testing.assert_allclose(power_weights(np.array([0.1, 0.0, 0.7]), 0.0), [0.5, 0.0, 0.5])


def test_one_site_that_is_not_valid_by_hand() -> None:
    found = sharpness(np.array([0.5, NAN, 0.5]), PERTURBED)
    np.testing.assert_allclose(sharpness_weights(found, 2.0), [0.1, 0.0, 0.9], atol=1e-8)


def test_history_is_made_to_sum_to_one_over_the_valid_sites() -> None:
    found = sharpness(np.array([0.5, 0.4, 0.5]), np.array([0.6, INF, 0.8]))
    weights = sharpness_weights(found, 1.0, 0.5, np.array([0.2, 0.3, 0.5]))
    np.testing.assert_allclose(weights, [0.5 * 0.25 + 0.5 * 2 / 7, 0.0, 0.5 * 0.75 + 0.5 * 5 / 7], atol=1e-8)


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0, 2.0, 7.3])
def test_power_agrees_with_the_plain_formula(q: float) -> None:
    found = np.random.default_rng(0).uniform(1e-6, 0.4, 20)
    plain = (found / found.sum() + FLOOR) ** q
    np.testing.assert_allclose(power_weights(found, q), plain / plain.sum(), rtol=1e-12)


@pytest.mark.parametrize("q", [100.0, 1e5, 1e300])
def test_large_power_leaves_the_sharpest_alone(q: float) -> None:
    weights = power_weights(np.array([1e-10, 0.2, 0.1, 1e-10, 0.0]), q)
    np.testing.assert_allclose(weights, [0, 1, 0, 0, 0], atol=1e-20)
    np.testing.assert_allclose(power_weights(np.array([0.2, 0.1, 0.2]), q), [0.5, 0, 0.5], atol=1e-20)


def test_huge_losses_do_not_overflow() -> None:
    huge = np.finfo(float).max
    found = sharpness(np.array([-huge, 0.0, 0.5]), np.array([huge, huge, 0.6]))
    np.testing.assert_allclose(power_weights(found, 1.0), [0.5, 0.5, 0.0], atol=1e-9)


def test_weights_follow_the_order_of_sites_and_not_the_scale_of_sharpness() -> None:
    rng = np.random.default_rng(1)
    found, previous, order = rng.uniform(0.01, 1, 6), rng.dirichlet(np.ones(6)), [3, 0, 5, 1, 4, 2]
    weights = sharpness_weights(found, 2.0, 0.3, previous)
    assert weights.sum() == pytest.approx(1.0) and (weights > 0).all()
    np.testing.assert_allclose(sharpness_weights(found[order], 2.0, 0.3, previous[order]), weights[order])
    np.testing.assert_allclose(sharpness_weights(7 * found, 2.0, 0.3, previous), weights)
    np.testing.assert_allclose(sharpness_weights(found, 2.0, 0.3, 5 * previous), weights)


@pytest.mark.parametrize("previous", [None, [NAN], [0.0], [0.3]])
@pytest.mark.parametrize("found", [0.2, FLOOR])
def test_one_site_has_all_the_weight(found: float, previous: list[float] | None) -> None:
    history = None if previous is None else np.array(previous)
    assert sharpness_weights(np.array([found]), 2.0, 0.5, history).tolist() == pytest.approx([1.0])


def test_identical_sites_share_evenly() -> None:
    np.testing.assert_allclose(sharpness_weights(np.full(5, 0.3), 2.0, 0.5, np.full(5, 0.2)), np.full(5, 0.2))


def test_no_site() -> None:
    none = np.zeros(0)
    assert sharpness(none, none).shape == sharpness_weights(none).shape == sharpness_weights(none, 1, 0.5, none).shape


def test_beta_chooses_between_round_and_history() -> None:
    share, previous, valid = np.array([0.25, 0.75]), np.array([0.6, 0.4]), np.ones(2, dtype=bool)
    np.testing.assert_allclose(moving_average(share, previous, valid, 1.0), share)
    np.testing.assert_allclose(moving_average(share, previous, valid, 0.0), previous)


def test_history_of_a_newcomer_is_its_own_share() -> None:
    share, previous = np.array([0.2, 0.3, 0.5]), np.array([0.1, 0.3, NAN])
    weights = moving_average(share, previous, np.ones(3, dtype=bool), 0.5)
    np.testing.assert_allclose(weights, [0.5 * 0.2 + 0.5 * 0.125, 0.5 * 0.3 + 0.5 * 0.375, 0.5])


def test_history_without_weight_is_no_history() -> None:
    share = np.array([0.2, 0.8, 0.0])
    valid = np.array([True, True, False])
    assert moving_average(share, np.array([0.0, NAN, 1.0]), valid).tolist() == share.tolist()


def test_site_that_was_not_valid_comes_back_with_history_zero() -> None:
    weights = sharpness_weights(np.array([0.1, 0.3]), 1.0, 0.5, np.array([1.0, 0.0]))
    np.testing.assert_allclose(weights, [0.5 * 0.25 + 0.5, 0.5 * 0.75], atol=1e-8)


def test_nobody_valid_keeps_the_previous_weights_or_takes_equal_ones() -> None:
    assert sharpness_weights(np.zeros(3)).tolist() == pytest.approx([1 / 3] * 3)
    assert sharpness_weights(np.zeros(3), 1.0, 0.5, np.array([0.2, NAN, 0.5])).tolist() == [0.2, 0.0, 0.5]


# ---------------------------------------------------------------------- radius


def test_growing_radius_by_hand() -> None:
    expected = [0.015811, 0.022361, 0.027386, 0.031623, 0.035355, 0.038730, 0.041833, 0.044721, 0.047434, 0.05]
    np.testing.assert_allclose([growing_radius(0.05, r, 10) for r in range(1, 11)], expected, atol=1e-6)


def test_growing_radius_at_its_edges() -> None:
    assert growing_radius(0.05, 1, 1) == 0.05
    assert growing_radius(0.05, 3, 10, power=0.0) == 0.05
    assert growing_radius(0.05, 1, 0) == 0.05


def test_radius_goes_to_every_site() -> None:
    config = from_tree({"federation": {"rounds": 4}})
    plain, plus = FedISM(FedISMParams(rho=0.1)), FedISMPlus(FedISMPlusParams(rho=0.1, power=1.0))
    plain.config = plus.config = config
    assert [plain.payload(r, "s")[1]["rho"] for r in (1, 2, 4)] == [0.1, 0.1, 0.1]
    assert [plus.payload(r, "s")[1]["rho"] for r in (1, 2, 4)] == pytest.approx([0.025, 0.05, 0.1])
    assert FedISMPlus.depends_on_rounds and not FedISM.depends_on_rounds


# ---------------------------------------------------------------------- aggregation


def states(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    shapes = {"conv.weight": (4, 3), "bn.running_var": (4,)}
    made = [{n: torch.rand(s, generator=rng) for n, s in shapes.items()} for _ in range(count)]
    return [{**state, "bn.num_batches_tracked": torch.tensor(k)} for k, state in enumerate(made)]


def test_mean_is_divided_by_the_weights_that_count() -> None:
    given = states(3)
    given[1]["conv.weight"][0, 0] = NAN
    mean, shares = aggregate(np.array([1.0, 5.0, 3.0]), given)
    assert mean is not None and shares.tolist() == [0.25, 0.0, 0.75]
    for name in ("conv.weight", "bn.running_var"):
        torch.testing.assert_close(mean[name], 0.25 * given[0][name] + 0.75 * given[2][name])
    assert int(mean["bn.num_batches_tracked"]) == 2 and mean["conv.weight"].dtype == torch.float32


def test_state_of_weight_zero_is_not_read() -> None:
    given = states(2)
    given[0]["conv.weight"].fill_(INF)
    mean, _ = aggregate(np.array([0.0, 0.2]), given)
    assert mean is not None
    torch.testing.assert_close(mean["conv.weight"], given[1]["conv.weight"])


def test_equal_models_come_back_whatever_the_weights() -> None:
    mean, _ = aggregate(np.array([0.7, 0.1, 0.2]), [states(1)[0]] * 3)
    assert mean is not None
    torch.testing.assert_close(mean["conv.weight"], states(1)[0]["conv.weight"])


def test_no_usable_state() -> None:
    bad = {"w": torch.tensor([NAN])}
    assert aggregate(np.array([1.0]), [bad])[0] is None
    assert aggregate(np.zeros(2), states(2))[0] is None
    assert aggregate(np.zeros(0), [])[0] is None


# ---------------------------------------------------------------------- the rule


def make_rule(bench: SimpleNamespace, **params: float) -> FedISM:
    rule = FedISM(FedISMParams(**{"q": 2.0, **params}))
    return bench.bound(rule, states(1)[0], [(f"s{k}", 10) for k in range(4)])  # type: ignore[no-any-return]


def replies(bench: SimpleNamespace, **losses: tuple[float, float]) -> Any:
    """Replies of named sites with (L, L̂); the number of examples differs and must not matter."""
    for name, (base, higher) in losses.items():
        k = int(name[1:])
        yield bench.update(name, k, 10 + 100 * k, states(4)[k], loss_base=base, loss_perturbed=higher)


def test_rule_weighs_and_notes(bench: SimpleNamespace) -> None:
    rule, given = make_rule(bench), states(4)
    result = rule.aggregate(1, given[3], replies(bench, s0=(0.5, 0.6), s1=(0.5, 0.7), s2=(0.5, 0.8)))
    expected, _ = aggregate(np.array([1.0, 4.0, 9.0]), given[:3])
    assert expected is not None
    torch.testing.assert_close(result, expected)
    assert rule.notes["weights"] == pytest.approx({"s0": 1 / 14, "s1": 4 / 14, "s2": 9 / 14}, abs=1e-8)
    assert rule.notes["sharpness"] == pytest.approx({"s0": 0.1, "s1": 0.2, "s2": 0.3})
    assert rule.notes["largest_weight"] == pytest.approx(9 / 14, abs=1e-8) and rule.notes["rho"] == 0.05
    torch.testing.assert_close(given[3], states(4)[3])


def test_sites_come_go_and_break(bench: SimpleNamespace) -> None:
    rule, old = make_rule(bench, q=1.0), states(4)[3]
    rule.aggregate(1, old, replies(bench, s0=(0.5, 0.6), s1=(0.5, 0.8)))
    assert rule.state.weights == pytest.approx({"s0": 0.25, "s1": 0.75}, abs=1e-8)
    # s1 is away and keeps what it had; s2 is new, its history is its own share.
    rule.aggregate(2, old, replies(bench, s0=(0.5, 0.6), s2=(0.5, 0.6)))
    assert rule.state.weights == pytest.approx({"s0": 0.5, "s1": 0.75, "s2": 0.5}, abs=1e-8)
    assert rule.notes["weights"] == pytest.approx({"s0": 0.5, "s2": 0.5})
    # s0 breaks: weight 0 now and as its history; s1 is back with its last weight.
    rule.aggregate(3, old, replies(bench, s0=(NAN, 0.6), s1=(0.5, 0.6), s2=(0.5, 0.6)))
    assert rule.state.weights == pytest.approx({"s0": 0.0, "s1": 0.25 + 0.3, "s2": 0.25 + 0.2}, abs=1e-8)
    assert rule.notes["sharpness"]["s0"] == 0.0
    rule.aggregate(4, old, replies(bench, s0=(0.5, 0.6), s1=(0.5, 0.6)))
    assert rule.state.weights["s0"] == pytest.approx(0.25) and rule.state.weights["s1"] == pytest.approx(0.75)


def test_all_losses_broken(bench: SimpleNamespace) -> None:
    rule, old = make_rule(bench), states(4)[3]
    broken = {"s0": (NAN, NAN), "s1": (INF, 1.0)}
    rule.aggregate(1, old, replies(bench, **broken))
    assert rule.notes["weights"] == {"s0": 0.5, "s1": 0.5}
    rule.state = FedISMState({"s0": 0.3, "s1": 0.1, "s2": 0.6})
    rule.aggregate(2, old, replies(bench, **broken))
    assert rule.notes["weights"] == pytest.approx({"s0": 0.75, "s1": 0.25})
    assert rule.state.weights == {"s0": 0.3, "s1": 0.1, "s2": 0.6}
    rule.state = FedISMState({"s0": 0.0, "s2": 1.0})
    assert rule.aggregate(3, old, replies(bench, s0=(NAN, NAN)))["conv.weight"] is old["conv.weight"]
    assert rule.notes["largest_weight"] == 0.0


def test_reply_without_losses_is_not_valid(bench: SimpleNamespace) -> None:
    rule, given = make_rule(bench), states(2)
    silent = bench.update("s1", 1, 10, given[1])
    listed = bench.update("s2", 2, 10, given[1], loss_base=[1.0], loss_perturbed=2.0)
    result = rule.aggregate(1, given[1], [*replies(bench, s0=(0.5, 0.6)), silent, listed])
    torch.testing.assert_close(result["conv.weight"], given[0]["conv.weight"])
    assert rule.notes["weights"] == {"s0": 1.0, "s1": 0.0, "s2": 0.0}


def test_no_reply_keeps_the_model(bench: SimpleNamespace) -> None:
    old = states(1)[0]
    assert make_rule(bench).aggregate(1, old, iter([])) is old


def test_entries_nobody_sent_are_kept(bench: SimpleNamespace) -> None:
    rule, old = make_rule(bench), states(4)[3]
    part = {"conv.weight": states(1)[0]["conv.weight"]}
    result = rule.aggregate(1, old, [bench.update("s0", 0, 10, part, loss_base=0.5, loss_perturbed=0.6)])
    torch.testing.assert_close(result["conv.weight"], part["conv.weight"])
    assert result["bn.running_var"] is old["bn.running_var"]


def test_order_of_the_replies_does_not_matter(bench: SimpleNamespace) -> None:
    losses = {"s0": (0.5, 0.6), "s1": (0.1, 0.9), "s2": (0.5, NAN)}
    results, notes = [], []
    for order in (("s0", "s1", "s2"), ("s2", "s1", "s0")):
        rule = make_rule(bench)
        rule.state = FedISMState({"s0": 0.2, "s1": 0.8})
        results.append(rule.aggregate(2, states(4)[3], replies(bench, **{name: losses[name] for name in order})))
        notes.append(rule.notes["weights"])
    torch.testing.assert_close(results[0], results[1])
    assert notes[0] == pytest.approx(notes[1])


@pytest.mark.parametrize("wrong", [{"rho": 0.0}, {"rho": INF}, {"q": -1.0}, {"q": NAN}, {"beta": 1.5}, {"power": -1.0}])
def test_values_outside_their_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        FedISMPlusParams(**wrong)
