"""SCAFFOLD at the server: the mean of the models, the new c, and whose reply counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from strategies.control_variates import (
    Scaffold,
    ScaffoldParams,
    ScaffoldState,
    changes,
    count_sites,
    entry_weights,
    next_control,
)

NAN = float("nan")
F64 = torch.float64


def number(value: float, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor([value], dtype=dtype)


def state(weight: float, mean: float = 0.0, seen: int = 0) -> dict[str, Tensor]:
    return {"w": number(weight), "running_mean": number(mean), "seen": torch.tensor(seen)}


def make(bench: SimpleNamespace, sites: int = 4, **params: Any) -> Scaffold:
    rule = Scaffold(ScaffoldParams(**params))
    return bench.bound(rule, state(0.0), [(f"s{k}", 10) for k in range(sites)])  # type: ignore[no-any-return]


def reply(bench: SimpleNamespace, k: int, arrays: dict[str, Tensor], change: float | Tensor, n: int = 10) -> Any:
    value = change if isinstance(change, Tensor) else number(change)
    return dataclasses.replace(bench.update(f"s{k}", k, n, arrays), extras={"dc/w": value})


# ---------------------------------------------------------------------- equations


def test_control_by_hand() -> None:
    mean = {"w": number(3.0)}
    assert next_control({}, mean, replies=2, num_sites=4, before=0)["w"].tolist() == [1.5]  # c = 0
    assert next_control({"w": number(1.0)}, mean, 2, 4, 4)["w"].tolist() == [2.5]
    assert next_control({"w": number(1.0)}, mean, 4, 4, 4)["w"].tolist() == [4.0]  # everybody: c + mean


def test_control_stays_the_mean_over_all_sites() -> None:
    """Only some reply, a newcomer joins: c = Σ c_k / N throughout."""
    own, before = [0.0, 0.0, 0.0], 0
    control: dict[str, Tensor] = {}
    for who, values in (([0, 2], [4.0, -2.0]), ([1], [9.0]), ([0, 1, 2], [1.0, 1.0, 1.0]), ([3, 0], [5.0, -3.0])):
        own = own + [0.0] * (max(who) + 1 - len(own))
        deltas = [value - own[k] for k, value in zip(who, values, strict=True)]
        for k, value in zip(who, values, strict=True):
            own[k] = value
        control = next_control(control, {"w": number(sum(deltas) / len(who))}, len(who), len(own), before)
        before = len(own)
        assert float(control["w"]) == pytest.approx(sum(own) / len(own), abs=1e-12)


def test_control_gives_new_tensors_of_the_same_type() -> None:
    before = {"w": number(1.0, torch.float32), "absent": number(2.0, torch.float32)}
    after = next_control(before, {"w": number(0.0, torch.float32)}, 1, 1, 1)
    assert {n: v.tolist() for n, v in after.items()} == {"w": [1.0], "absent": [2.0]}
    assert all(v.dtype == torch.float32 and v is not before[n] for n, v in after.items())


def test_sites_that_count(bench: SimpleNamespace) -> None:
    rule = bench.bound(Scaffold(), state(0.0), [("a", 10), ("empty", 0), ("c", 5)])
    assert count_sites(rule.sites, before=0, replies=1) == 2
    assert count_sites(rule.sites, before=3, replies=1) == 3  # a resumed run that finds fewer
    plain = [dataclasses.replace(site, num_train=0, plain=True) for site in rule.sites]
    assert count_sites(plain, 0, 0) == 3
    assert count_sites([], 0, 2) == 2 and count_sites([], 0, 0) == 0


def test_weights_by_entry() -> None:
    assert entry_weights(["w", "running_mean"], ["w"], 7.0, "uniform") == {"w": 1.0, "running_mean": 7.0}
    assert entry_weights(["w", "running_mean"], ["w"], 7.0, "examples") == {"w": 7.0, "running_mean": 7.0}


@pytest.mark.parametrize(
    ("sent", "problem"),
    [
        ({}, "dc/w is missing"),
        ({"dc/w": number(1.0).expand(2)}, "not as the parameter"),
        ({"dc/w": number(1.0, torch.float32)}, "not as the parameter"),
        ({"dc/w": number(NAN)}, "dc/w holds NaN"),
        ({"dc/w": number(float("inf"))}, "dc/w holds NaN"),
    ],
)
def test_what_is_wrong_with_a_change(sent: dict[str, Tensor], problem: str) -> None:
    assert problem in (changes(sent, {"w": number(0.0)})[1] or "")


def test_a_good_change() -> None:
    value = number(1.0)
    assert changes({"dc/w": value, "other": value}, {"w": number(0.0)}) == ({"w": value}, None)
    assert changes({}, {}) == ({}, None)


# ---------------------------------------------------------------------- rule


def run(rule: Scaffold, replies: Sequence[Any], start: float = 9.0) -> dict[str, Tensor]:
    return rule.aggregate(1, state(start), iter(replies))


def test_round_by_hand(bench: SimpleNamespace) -> None:
    rule = make(bench)
    assert rule.payload(1, "s0") == ({}, {})
    new = run(rule, [reply(bench, 0, state(1.0, 1.0, 3), 2.0, n=4), reply(bench, 1, state(5.0, 5.0, 2), 4.0, n=12)])
    assert float(new["w"]) == 3.0  # uniform
    assert float(new["running_mean"]) == 4.0 and int(new["seen"]) == 3  # by examples, maximum
    assert float(rule.state.control["w"]) == 1.5 and rule.state.num_sites == 4  # (2 / 4) · 3
    assert rule.notes["weights"] == {"s0": 0.5, "s1": 0.5} and rule.notes["left_out"] == []
    first, second = rule.payload(2, "s0")[0], rule.payload(2, "s3")[0]
    assert first.keys() == {"c/w"} and first["c/w"] is second["c/w"]  # one object: encoded once


def test_weights_by_examples(bench: SimpleNamespace) -> None:
    rule = make(bench, weights="examples")
    new = run(rule, [reply(bench, 0, state(1.0), 2.0, n=4), reply(bench, 1, state(5.0), 4.0, n=12)])
    assert float(new["w"]) == 4.0 and float(rule.state.control["w"]) == 1.5  # the changes are never weighted
    assert rule.notes["largest_weight"] == 0.75


def test_order_and_identical_sites(bench: SimpleNamespace) -> None:
    replies = [reply(bench, k, state(2.5, 2.5), 0.5, n=k + 1) for k in range(4)]
    rule = make(bench)
    new = run(rule, replies)
    assert float(new["w"]) == 2.5 and float(rule.state.control["w"]) == 0.5
    other = [reply(bench, k, state(float(k)), float(k)) for k in range(4)]
    forth, back = make(bench), make(bench)
    torch.testing.assert_close(run(forth, other), run(back, other[::-1]))
    torch.testing.assert_close(forth.state.control, back.state.control)


@pytest.mark.parametrize("bad", [NAN, number(1.0, torch.float32)])
def test_a_broken_change_leaves_the_site_out_of_both_sums(bench: SimpleNamespace, bad: Any) -> None:
    with_bad, without = make(bench), make(bench)
    good = reply(bench, 0, state(1.0), 2.0)
    new = run(with_bad, [good, reply(bench, 1, state(70.0, 70.0, 9), bad)])
    torch.testing.assert_close(new, run(without, [good]), rtol=0, atol=0)
    assert with_bad.state.control["w"].tolist() == without.state.control["w"].tolist() == [0.5]
    assert with_bad.notes["left_out"] == ["s1"]


def test_nobody(bench: SimpleNamespace) -> None:
    rule, kept = make(bench), state(3.0)
    held = rule.state = ScaffoldState({"w": number(1.0)}, 4)
    assert rule.aggregate(2, kept, iter([])) is kept and rule.state is held
    assert rule.aggregate(2, kept, iter([reply(bench, 0, state(1.0), NAN)])) is kept and rule.state is held


def test_nothing_received_is_written_or_kept(bench: SimpleNamespace) -> None:
    rule, sent, change = make(bench, 1), state(1.0), number(2.0)
    run(rule, [reply(bench, 0, sent, change)])
    control = rule.state.control["w"]
    run(rule, [reply(bench, 0, sent, change)])
    assert change.tolist() == [2.0] and sent["w"].tolist() == [1.0] and control.tolist() == [2.0]
    assert rule.state.control["w"].tolist() == [4.0]


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="uniform or examples expected, got 'size'"):
        ScaffoldParams(weights="size")
