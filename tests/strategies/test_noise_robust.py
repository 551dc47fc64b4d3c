"""FedNoRo at the server: identification (R1), ramp, DaAgg (R2), and the rule around them."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmed.federation.messages import Answer
from strategies.noise_robust import (
    FedNoRo,
    FedNoRoParams,
    daagg,
    daagg_weights,
    distance_matrix,
    fill_absent,
    identify,
    kd_weight,
    majority_set,
    normalise_columns,
)

NAN, INF = float("nan"), float("inf")
HAND = np.array([[0.3, 1.0], [0.4, 1.2], [2.0, 3.0], [2.0, 2.6]])


def test_identification_by_hand() -> None:
    found = identify(HAND)
    np.testing.assert_allclose(found.indicator, [[0, 0], [0.1 / 1.7, 0.1], [1, 1], [1, 0.8]])
    assert found.votes.shape == (9, 4)
    assert (found.votes == [False, False, True, True]).all()
    assert found.is_noisy.tolist() == [False, False, True, True]


def test_identification_does_not_depend_on_site_order() -> None:
    order = [2, 0, 3, 1]
    assert identify(HAND[order]).is_noisy.tolist() == identify(HAND).is_noisy[order].tolist()


def test_absent_class_takes_the_column_minimum() -> None:
    table = np.array([[NAN, 1.0], [0.5, 2.0], [0.7, 3.0]])
    filled = fill_absent(table, np.ones(3, dtype=bool))
    np.testing.assert_allclose(filled[:, 0], [0.5, 0.5, 0.7])
    np.testing.assert_allclose(normalise_columns(filled)[:, 0], [0, 0, 1], atol=1e-12)


def test_class_absent_everywhere_and_flat_class_are_dropped() -> None:
    table = np.column_stack([np.full(4, NAN), HAND[:, 0], np.full(4, 0.7)])
    found = identify(table)
    assert found.is_noisy.tolist() == [False, False, True, True]
    assert np.isnan(found.indicator[:, [0, 2]]).all() and not np.isnan(found.indicator[:, 1]).any()


@pytest.mark.parametrize("bad", [[NAN, NAN], [INF, 1.0]])
def test_site_without_finite_losses_is_left_out_and_not_noisy(bad: list[float]) -> None:
    found = identify(np.vstack([HAND, bad]))
    assert found.is_noisy.tolist() == [False, False, True, True, False]
    assert found.used.tolist() == [True, True, True, True, False]
    assert np.isnan(found.filled[4]).all()


@pytest.mark.parametrize(
    "table",
    [np.full((5, 2), 0.5), HAND[:1], np.full((3, 2), NAN), np.full((2, 2), INF), np.vstack([HAND[:1], [[NAN, NAN]]])],
    ids=["equal rows", "one site", "all absent", "all infinite", "one usable site"],
)
def test_nobody_is_noisy_without_a_basis(table: np.ndarray) -> None:
    assert not identify(table).is_noisy.any()


def test_two_sites_can_be_told_apart() -> None:
    assert identify(np.array([[0.1, 0.2], [3.0, 4.0]])).is_noisy.tolist() == [False, True]


def test_majority_counts_whole_sets_and_the_first_wins_a_tie() -> None:
    a, b, c = [True, False, False], [True, True, False], [False, False, True]
    assert majority_set(np.array([a, b, b, c])).tolist() == b
    assert majority_set(np.array([c, a, a, c])).tolist() == c


@pytest.mark.parametrize(
    ("t", "weight"), [(5, 0.00539036), (10, 0.00539036), (20, 0.0504), (30, 0.244177), (49, 0.8), (99, 0.8)]
)
def test_ramp_by_hand(t: int, weight: float) -> None:
    assert kd_weight(t) == pytest.approx(weight, abs=1e-6)


def test_ramp_without_length_is_a_step() -> None:
    assert kd_weight(3, 4, 4, 0.8) == pytest.approx(0.8 * np.exp(-5))
    assert kd_weight(4, 4, 4, 0.8) == 0.8


def states_by_hand() -> list[dict[str, Tensor]]:
    a = [(0.0, 0.0), (1.0, 0.0), (3.0, 4.0), (0.0, 3.0)]
    b = [0.0, 0.0, 2.0, 0.5]
    return [
        {"a": torch.tensor(x, dtype=torch.float64), "b": torch.tensor([y], dtype=torch.float64)}
        for x, y in zip(a, b, strict=True)
    ]


def test_daagg_by_hand() -> None:
    mean, used = daagg(states_by_hand(), [1, 1, 1, 1], [False, False, True, True])
    np.testing.assert_allclose(used.distance, [0, 0, 6.472136, 3.5], atol=1e-6)
    np.testing.assert_allclose(used.normalised, [0, 0, 1, 0.540780], atol=1e-6)
    np.testing.assert_allclose(used.weights, [0.338963, 0.338963, 0.124698, 0.197376], atol=1e-6)
    assert mean is not None
    np.testing.assert_allclose(mean["a"].numpy(), [0.713056, 1.090919], atol=1e-6)
    np.testing.assert_allclose(mean["b"].numpy(), [0.348083], atol=1e-6)


def random_states(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    shapes = {"conv.weight": (4, 3, 3, 3), "bn.running_var": (4,), "scalar": ()}
    made = [{n: torch.randn(s, generator=rng, dtype=dtype) for n, s in shapes.items()} for _ in range(count)]
    return [{**state, "bn.num_batches_tracked": torch.tensor(k)} for k, state in enumerate(made)]


def test_distance_matches_the_naive_sum_of_norms_and_skips_integers() -> None:
    rows, columns = random_states(3), random_states(2, seed=1)
    naive = [
        [sum(float((i[n].double() - j[n].double()).norm()) for n in i if i[n].is_floating_point()) for j in columns]
        for i in rows
    ]
    np.testing.assert_allclose(distance_matrix(rows, columns), naive, rtol=1e-12)
    only = distance_matrix(rows, columns, ["scalar"])
    np.testing.assert_allclose(
        only, [[abs(float(i["scalar"].double() - j["scalar"].double())) for j in columns] for i in rows]
    )


def test_small_differences_of_large_weights_are_kept() -> None:
    base = torch.full((10_000,), 100.0)
    moved = base + 1e-4
    expected = float((moved.double() - base.double()).norm())
    assert distance_matrix([{"w": base}], [{"w": moved}])[0, 0] == pytest.approx(expected, rel=1e-9)


def test_daagg_invariances() -> None:
    states, n, noisy = random_states(4, dtype=torch.float64), [10.0, 20.0, 5.0, 7.0], [False, True, False, True]
    mean, used = daagg(states, n, noisy)
    _, scaled = daagg(states, [3 * x for x in n], noisy)
    np.testing.assert_allclose(used.weights, scaled.weights)
    order = [3, 1, 0, 2]
    permuted, _ = daagg([states[k] for k in order], [n[k] for k in order], [noisy[k] for k in order])
    same, equal = daagg([states[0]] * 4, n, noisy)
    assert mean is not None and permuted is not None and same is not None
    for name, value in mean.items():
        torch.testing.assert_close(value, permuted[name], rtol=0, atol=1e-12)
        torch.testing.assert_close(same[name], states[0][name])
    assert int(mean["bn.num_batches_tracked"]) == 3
    np.testing.assert_allclose(equal.weights, np.array(n) / sum(n))


@pytest.mark.parametrize("flags", [[False] * 3, [True] * 3])
def test_one_group_empty_gives_size_weights(flags: list[bool]) -> None:
    _, used = daagg(random_states(3), [5, 6, 7], flags)
    np.testing.assert_allclose(used.weights, np.array([5, 6, 7]) / 18)


def test_non_finite_state_is_dropped_before_the_distances() -> None:
    states = random_states(4)
    reference, _ = daagg([states[0], states[1], states[2]], [1, 2, 3], [False, True, False])
    states[3]["conv.weight"][0, 0, 0, 0] = NAN
    mean, used = daagg(states, [1, 2, 3, 4], [False, True, False, True])
    assert used.weights[3] == 0 and used.distance[3] == 0
    assert mean is not None and reference is not None
    torch.testing.assert_close(mean, reference)


def test_nobody_left() -> None:
    states = [{"w": torch.tensor([NAN])}, {"w": torch.tensor([INF])}]
    mean, used = daagg(states, [1, 1], [False, True])
    assert mean is None and used.weights.tolist() == [0, 0]
    assert daagg(random_states(2), [0, 0], [False, True])[0] is None
    assert daagg([], [], [])[0] is None
    assert daagg_weights(np.zeros(2), np.zeros(2)).weights.tolist() == [0, 0]


def answers(table: np.ndarray) -> list[Answer]:
    return [Answer(f"s{k}", k, 10, {}, {"class_loss": row.tolist()}) for k, row in enumerate(table)]


def make_rule(bench: SimpleNamespace, num_sites: int = 5, **params: float) -> FedNoRo:
    rule = FedNoRo(FedNoRoParams(warmup_rounds=2, **params))  # type: ignore[arg-type]
    return bench.bound(rule, random_states(1)[0], [(f"s{k}", 10) for k in range(num_sites)])  # type: ignore[no-any-return]


def test_query_is_asked_once_and_absent_sites_are_clean(bench: SimpleNamespace) -> None:
    rule = make_rule(bench)
    assert rule.queries(2) == [] and [q.name for q in rule.queries(3)] == ["class_losses"]
    rule.on_query(3, "class_losses", answers(HAND))
    assert rule.queries(3) == [] and rule.queries(4) == []
    assert rule.state.roles == {"s0": "clean", "s1": "clean", "s2": "noisy", "s3": "noisy", "s4": "clean"}
    assert rule.notes["believed_noisy"] == ["s2", "s3"]
    assert rule.notes["groups"] == {"clean": 3, "noisy": 2}


def test_small_group_is_warned_about(bench: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make_rule(bench).on_query(3, "class_losses", answers(HAND))
    assert "do not lean on this split" in caplog.text


def test_query_without_losses_ends_with_everybody_clean(bench: SimpleNamespace) -> None:
    rule = make_rule(bench, 2)
    rule.on_query(3, "class_losses", [Answer("s0", 0, 10)])
    assert set(rule.state.roles.values()) == {"clean"} and rule.queries(3) == []


def test_row_of_another_length_is_no_answer(bench: SimpleNamespace) -> None:
    rule = make_rule(bench)
    rule.on_query(3, "class_losses", [*answers(HAND), Answer("s4", 4, 10, {}, {"class_loss": [1.0, 2.0, 9.0]})])
    assert rule.state.roles["s4"] == "clean" and "s4" not in rule.state.class_loss


def test_payload_by_stage_and_role(bench: SimpleNamespace) -> None:
    rule = make_rule(bench, ramp_begin=2.0, ramp_end=4.0)
    assert rule.payload(1, "s2")[1] == {"stage": 1, "role": "clean", "kd_weight": 0.0}
    rule.on_query(3, "class_losses", answers(HAND))
    assert rule.payload(3, "s0")[1] == {"stage": 2, "role": "clean", "kd_weight": 0.0}
    assert rule.payload(5, "s2")[1] == {"stage": 2, "role": "noisy", "kd_weight": 0.8}
    assert rule.payload(3, "s2")[1]["kd_weight"] == pytest.approx(0.8 * np.exp(-5))
    assert rule.payload(5, "newcomer")[1]["role"] == "clean"


def test_stages_of_aggregation(bench: SimpleNamespace) -> None:
    rule = make_rule(bench)
    states = random_states(4)
    updates = [bench.update(f"s{k}", k, 10 + k, state) for k, state in enumerate(states)]
    plain = rule.aggregate(2, states[0], iter(updates))
    by_size, _ = daagg(states, [10, 11, 12, 13], [False] * 4)
    assert by_size is not None
    torch.testing.assert_close(plain["conv.weight"], by_size["conv.weight"])
    rule.on_query(3, "class_losses", answers(HAND))
    robust = rule.aggregate(3, states[0], iter(updates))
    expected, used = daagg(states, [10, 11, 12, 13], [False, False, True, True])
    assert expected is not None
    torch.testing.assert_close(robust, expected)
    assert rule.notes["weights"]["s3"] == pytest.approx(used.weights[3])
    assert rule.aggregate(3, states[0], iter([])) is states[0]


def test_distance_may_be_limited_to_parameters(bench: SimpleNamespace) -> None:
    states = random_states(3, dtype=torch.float64)
    states[2] = {**states[0], "bn.running_var": states[0]["bn.running_var"] + 100}
    updates = [bench.update(f"s{k}", k, 10, state) for k, state in enumerate(states)]
    rule = make_rule(bench, 3, distance="parameters")  # type: ignore[arg-type]
    rule.on_query(3, "class_losses", answers(np.array([[0.1, 0.1], [0.2, 0.1], [2.0, 3.0]])))
    assert rule.state.roles["s2"] == "noisy"
    rule.aggregate(3, states[0], iter(updates))
    assert rule.notes["weights"]["s2"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "wrong", [{"ramp_begin": 9, "ramp_end": 3}, {"kd_cap": 1.5}, {"covariance": "round"}, {"num_votes": 0}]
)
def test_values_outside_their_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="outside its range"):
        FedNoRoParams(**wrong)  # type: ignore[arg-type]
