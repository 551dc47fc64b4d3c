"""PASSION at the server: weights by modality, mean distances, the course of β, and replies that cannot be read."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmed.errors import UserError
from fedmed.federation.layout import Layout
from fedmed.federation.messages import Update
from fedmed.losses.balance import BalanceParams
from strategies.modality_balance import (
    Passion,
    PassionState,
    advance,
    entry_weights,
    mean_distance,
    read_counts,
    read_distances,
    shares,
)

NAN, INF = float("nan"), float("inf")
GLOBAL = {
    "encoders.0.w": torch.tensor([10.0]),
    "encoders.1.w": torch.tensor([20.0]),
    "encoders.1.running_mean": torch.tensor([20.0]),
    "shared.w": torch.tensor([30.0]),
    "shared.steps": torch.tensor(5),
}


def state(value: float, steps: int = 5) -> dict[str, Tensor]:
    return {
        name: torch.full_like(v, value) if v.is_floating_point() else torch.tensor(steps) for name, v in GLOBAL.items()
    }


def reply(site: str, n: int, arrays: dict[str, Tensor], counts: Any = None, sums: Any = None) -> Update:
    extras = {} if counts is None else {"modality_count": torch.tensor(counts)}
    extras |= {} if sums is None else {"distance_sum": torch.tensor(sums)}
    return Update(site, ord(site) - ord("a"), n, arrays, extras)


def passion(bench: SimpleNamespace, **params: Any) -> Passion:
    rule: Passion = bench.bound(Passion(BalanceParams(**params)), GLOBAL, [("a", 10), ("b", 30), ("c", 5)])
    rule.layout = Layout(rule.layout.entries, {"modality": ("encoders.0", "encoders.1", "shared")})
    return rule


def test_entry_weights_by_hand() -> None:
    group = {"encoders.0.w": 0, "encoders.1.w": 1, "shared.w": 2}
    assert entry_weights(group, [3.0, 0.0], 10) == {"encoders.0.w": 3.0, "encoders.1.w": 0.0, "shared.w": 10.0}


def test_mean_distance_by_hand() -> None:
    found = mean_distance([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]], [[10.0, 4.0, 0.0], [10.0, 0.0, 0.0]], 3)
    assert found[:2].tolist() == [0.2, 0.5] and math.isnan(found[2])
    assert mean_distance([], [], 2).isnan().all()


def test_shares() -> None:
    assert shares({"a": 1.0, "b": 3.0}) == {"a": 0.25, "b": 0.75}
    assert shares({"a": 0.0}) == {"a": 0.0} and shares({}) == {}


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([3, 0], [3.0, 0.0]),
        ([99, 1], [10.0, 1.0]),
        ([1, 2, 3], None),
        ([-1, 2], None),
        ([1.0, NAN], None),
        ([[1, 2]], None),
    ],
)
def test_counts_of_a_reply(counts: Any, expected: list[float] | None) -> None:
    assert read_counts({"modality_count": torch.tensor(counts)}, 2, 10) == expected
    assert read_counts({}, 2, 10) is None


def test_distances_of_a_reply() -> None:
    assert read_distances({"distance_sum": torch.tensor([0.5, 0.0])}, [1.0, 0.0], 2) == [0.5, 0.0]
    assert read_distances({"distance_sum": torch.tensor([0.5, 0.0])}, None, 2) is None
    for broken in ([NAN, 1.0], [INF, 1.0], [-0.1, 1.0], [1.0]):
        assert read_distances({"distance_sum": torch.tensor(broken)}, [1.0, 1.0], 2) is None


def test_advance() -> None:
    begun = advance(PassionState(), 0, torch.tensor([0.1, 0.3]).double(), BalanceParams())
    assert begun.eta == pytest.approx(0.015) and begun.updates == 1 and begun.beta[0] < 1 < begun.beta[1]
    assert advance(begun, 1, torch.tensor([NAN, NAN]), BalanceParams()) is begun
    assert advance(begun, 1, torch.tensor([0.2, 0.2]).double(), BalanceParams()).beta == pytest.approx(begun.beta)
    assert advance(begun, 100, torch.tensor([0.2, 0.2]).double(), BalanceParams()).eta == pytest.approx(0.0225)


def test_a_round_by_hand(bench: SimpleNamespace) -> None:
    """Site b never has modality 1; what its encoder holds does not matter."""
    rule = passion(bench)
    broken = {**state(3.0, steps=9), "encoders.1.w": torch.tensor([1e30])}
    updates = [reply("a", 10, state(1.0, steps=7), [5, 10], [0.5, 3.0]), reply("b", 30, broken, [15, 0], [1.5, 0.0])]
    new = rule.aggregate(1, GLOBAL, iter(updates))
    assert float(new["encoders.0.w"]) == pytest.approx((5 * 1 + 15 * 3) / 20)
    assert float(new["encoders.1.w"]) == float(new["encoders.1.running_mean"]) == 1.0
    assert float(new["shared.w"]) == pytest.approx((10 * 1 + 30 * 3) / 40)
    assert int(new["shared.steps"]) == 9 and new["shared.steps"].dtype == torch.int64
    assert rule.notes["weights"] == {"a": 0.25, "b": 0.75} and rule.notes["largest_weight"] == 0.75
    assert rule.notes["modality_weights"] == [{"a": 0.25, "b": 0.75}, {"a": 1.0, "b": 0.0}]
    assert rule.notes["distance"] == pytest.approx([0.1, 0.3])
    assert rule.state.beta[0] < 1 < rule.state.beta[1] and math.hypot(*rule.state.beta) == pytest.approx(math.sqrt(2))
    assert rule.state.eta == pytest.approx(0.015) and GLOBAL["shared.w"] == 30.0


def test_an_encoder_that_nobody_has_data_for_stays(bench: SimpleNamespace) -> None:
    rule = passion(bench)
    new = rule.aggregate(1, GLOBAL, [reply("a", 10, state(1.0), [10, 0], [1.0, 0.0])])
    assert float(new["encoders.1.w"]) == 20.0 and float(new["encoders.0.w"]) == 1.0 and float(new["shared.w"]) == 1.0
    assert rule.notes["distance"][0] == pytest.approx(0.1) and rule.notes["modality_weights"][1] == {"a": 0.0}
    assert rule.state.beta == pytest.approx([1.0, 1.0])


def test_an_encoder_may_be_left_out_of_a_reply(bench: SimpleNamespace) -> None:
    short = {name: value for name, value in state(1.0).items() if not name.startswith("encoders.1")}
    new = passion(bench).aggregate(
        1, GLOBAL, [reply("a", 10, short, [10, 0], [1.0, 0.0]), reply("b", 30, state(3.0), [0, 30], [0.0, 3.0])]
    )
    assert float(new["encoders.1.w"]) == 3.0 and float(new["encoders.0.w"]) == 1.0


def test_order_of_sites_and_scale_of_counts_do_not_matter(bench: SimpleNamespace) -> None:
    updates = [reply("a", 10, state(1.0), [5, 10], [0.5, 3.0]), reply("b", 30, state(3.0), [15, 6], [2.0, 1.0])]
    double = [reply("a", 20, state(1.0), [10, 20], [1.0, 6.0]), reply("b", 60, state(3.0), [30, 12], [4.0, 2.0])]
    rules = [passion(bench) for _ in range(3)]
    first, *others = (r.aggregate(1, GLOBAL, u) for r, u in zip(rules, (updates, updates[::-1], double), strict=True))
    for other in others:
        torch.testing.assert_close(other, first)
    assert all(rule.state.beta == pytest.approx(rules[0].state.beta) for rule in rules)


def test_equal_sites_give_the_site_back(bench: SimpleNamespace) -> None:
    new = passion(bench).aggregate(1, GLOBAL, [reply(s, 10, state(2.0), [4, 10], [1.0, 1.0]) for s in "abc"])
    torch.testing.assert_close(new, state(2.0))


def test_no_reply(bench: SimpleNamespace) -> None:
    rule = passion(bench)
    assert rule.aggregate(1, GLOBAL, []) is GLOBAL
    assert rule.state == PassionState() and rule.notes["largest_weight"] == 0.0


def test_broken_extras_never_reach_the_model_or_beta(bench: SimpleNamespace) -> None:
    """a is sound; b's distances are NaN: its model counts. c says nothing of its modalities: shared entries only."""
    rule = passion(bench)
    updates = [
        reply("a", 10, state(1.0), [10, 10], [1.0, 3.0]),
        reply("b", 10, state(3.0), [10, 10], [NAN, 1.0]),
        reply("c", 20, state(5.0)),
    ]
    new = rule.aggregate(1, GLOBAL, updates)
    assert float(new["encoders.0.w"]) == 2.0 and float(new["shared.w"]) == pytest.approx((10 + 30 + 100) / 40)
    assert rule.notes["distance"] == pytest.approx([0.1, 0.3])
    only_bad = passion(bench)
    only_bad.aggregate(1, GLOBAL, updates[1:])
    assert only_bad.state == PassionState()  # nothing measured


def test_payload_is_ones_first_and_beta_then(bench: SimpleNamespace) -> None:
    rule = passion(bench)
    first = rule.payload(1, "a")[0]["beta"]
    assert first.tolist() == [1.0, 1.0] and first.dtype == torch.float32
    rule.aggregate(1, GLOBAL, [reply("a", 10, state(1.0), [10, 10], [1.0, 3.0])])
    assert rule.payload(2, "b")[0]["beta"].tolist() == pytest.approx(rule.state.beta)


def test_one_reply_is_held_at_a_time(bench: SimpleNamespace) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def replies() -> Iterator[Update]:
        for site in "abc":
            gc.collect()
            assert not any(ref() is not None for ref in alive)
            made = reply(site, 10, state(1.0), [10, 10], [1.0, 3.0])
            alive[:] = [weakref.ref(made.arrays["shared.w"]), weakref.ref(made.extras["distance_sum"])]
            yield made
            del made

    passion(bench).aggregate(1, GLOBAL, replies())


def test_a_model_without_modality_groups_is_refused(bench: SimpleNamespace) -> None:
    rule = bench.bound(Passion(BalanceParams()), GLOBAL, [("a", 10)])
    with pytest.raises(UserError, match="'modality' groups"):
        rule.payload(1, "a")
