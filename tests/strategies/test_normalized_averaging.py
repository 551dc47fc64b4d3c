"""FedNova at the server: local work, effective steps, the normalised step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmed.config import OptimizerConfig
from fedmed.errors import UserError
from fedmed.federation.strategy import Strategy
from strategies.normalized_averaging import (
    FedNova,
    effective_steps,
    local_work,
    momentum_of,
    normalised_step,
    read_steps,
    step_gain,
)

NAN = float("nan")


def naive_work(steps: int, momentum: float) -> float:
    """How much of each gradient the parameters have moved by after all steps of SGD with momentum, summed up."""
    weights, velocity = [0.0] * steps, [0.0] * steps
    for step in range(steps):
        velocity = [momentum * v for v in velocity]
        velocity[step] += 1.0
        weights = [w + v for w, v in zip(weights, velocity, strict=True)]
    return sum(weights)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("steps", [0, 1, 2, 7, 40])
def test_work_is_the_sum_of_the_weights_of_the_gradients(steps: int, momentum: float) -> None:
    assert local_work(steps, momentum) == pytest.approx(naive_work(steps, momentum), abs=1e-10)


def test_work_by_hand() -> None:
    assert local_work(5) == 5.0
    assert local_work(2, 0.5) == pytest.approx(2.5)  # the first gradient counts 1.5, the second 1
    assert local_work(1, 0.999) == pytest.approx(1.0, abs=1e-9)
    for momentum in (1.0, -0.1, NAN):
        with pytest.raises(ValueError, match="0 <= momentum < 1"):
            local_work(3, momentum)


def test_work_is_what_torch_does() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.8)
    for _ in range(6):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert -parameter.item() == pytest.approx(local_work(6, 0.8))


def test_effective_steps_and_gain_by_hand() -> None:
    assert effective_steps([1.0, 3.0], [2.0, 6.0]) == 5.0
    assert step_gain([1.0, 3.0], [2.0, 6.0]) == pytest.approx(5.0 * (0.25 / 2 + 0.75 / 6))
    assert step_gain([2.0, 9.0, 4.0], [7.0] * 3) == pytest.approx(1.0)
    assert step_gain([5.0], [3.0]) == 1.0
    assert effective_steps([], []) == step_gain([], []) == 0.0
    assert effective_steps([0.0], [3.0]) == step_gain([0.0], [3.0]) == 0.0


def test_step_by_hand_and_dtype() -> None:
    before = {"w": torch.tensor([1.0]), "half": torch.tensor([1.0], dtype=torch.float16), "buffer": torch.tensor([4.0])}
    mean = {"w": torch.tensor([3.0]), "half": torch.tensor([3.0], dtype=torch.float16), "buffer": torch.tensor([0.0])}
    new = normalised_step(before, mean, 1.5, ["w", "half", "elsewhere"])
    assert {n: v.tolist() for n, v in new.items()} == {"w": [4.0], "half": [4.0]}
    assert new["half"].dtype == torch.float16 and before["w"].tolist() == [1.0]


@pytest.mark.parametrize("bad", [0, 0.0, 0.5, -3, NAN, float("inf"), [3.0], None])
def test_unusable_steps(bad: Any) -> None:
    assert read_steps({"num_steps": bad}) is None


def test_usable_steps() -> None:
    assert read_steps({"num_steps": 3}) == 3.0 and read_steps({}) is None


def test_momentum_is_that_of_sgd() -> None:
    assert momentum_of(OptimizerConfig("sgd", momentum=0.9)) == 0.9
    assert momentum_of(OptimizerConfig("adam", momentum=0.9)) == 0.0
    with pytest.raises(UserError, match="FedNova needs a value < 1, got 1"):
        momentum_of(OptimizerConfig("sgd", momentum=1.0))


# ---------------------------------------------------------------------- rule


def state(weight: float, mean: float = 0.0, seen: int = 0) -> dict[str, Tensor]:
    floats = {"w": weight, "running_mean": mean}
    return {**{n: torch.tensor([v], dtype=torch.float64) for n, v in floats.items()}, "seen": torch.tensor(seen)}


def make(bench: SimpleNamespace, cls: type[Strategy] = FedNova, **optimizer: Any) -> Any:
    rule = bench.bound(cls(), state(0.0), [("a", 10), ("b", 10), ("c", 10)])
    rule.config = dataclasses.replace(rule.config, optimizer=OptimizerConfig(**optimizer))
    return rule


def replies(bench: SimpleNamespace, *sites: tuple[float, int, float]) -> list[Any]:
    """(weight, n, steps) of each site."""
    return [bench.update("abc"[k], k, n, state(w, 10 * w, k), num_steps=steps) for k, (w, n, steps) in enumerate(sites)]


def naive(start: float, sites: Sequence[tuple[float, int, float]], momentum: float) -> float:
    total = sum(n for _, n, _ in sites)
    work = [naive_work(int(steps), momentum) for *_, steps in sites]
    tau = sum(n / total * a for (_, n, _), a in zip(sites, work, strict=True))
    return start + tau * sum(n / total * (w - start) / a for (w, n, _), a in zip(sites, work, strict=True))


SITES = [(1.0, 10, 2.0), (4.0, 30, 8.0), (-2.0, 5, 1.0)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_published_sum(bench: SimpleNamespace, momentum: float) -> None:
    rule = make(bench, name="sgd", momentum=momentum)
    new = rule.aggregate(1, state(0.5), iter(replies(bench, *SITES)))
    assert float(new["w"]) == pytest.approx(naive(0.5, SITES, momentum), abs=1e-12)
    assert float(new["running_mean"]) == pytest.approx(10 * (10 + 120 - 10) / 45) and int(new["seen"]) == 2
    assert sum(rule.notes["weights"].values()) == pytest.approx(1.0)
    if momentum == 0.0:
        assert rule.notes["weights"] == pytest.approx({"a": 5 / 13.75, "b": 3.75 / 13.75, "c": 5 / 13.75})
        assert rule.notes["effective_steps"] == pytest.approx((20 + 240 + 5) / 45)


def test_equal_work_is_fedavg(bench: SimpleNamespace) -> None:
    sent = replies(bench, (1.0, 10, 6), (4.0, 30, 6), (-2.0, 5, 6))
    plain = make(bench, Strategy).aggregate(1, state(0.5), iter(sent))
    for optimizer in ({"name": "sgd", "momentum": 0.9}, {"name": "adam"}):
        torch.testing.assert_close(make(bench, **optimizer).aggregate(1, state(0.5), iter(sent)), plain)


def test_one_site_and_identical_sites_give_the_site_back(bench: SimpleNamespace) -> None:
    for count in (1, 3):
        new = make(bench).aggregate(1, state(0.5), iter(replies(bench, *[(3.0, 7, 4)] * count)))
        torch.testing.assert_close(new, state(3.0, 30.0, count - 1))


def test_order_and_scale_of_sizes(bench: SimpleNamespace) -> None:
    sent = replies(bench, *SITES)
    scaled = replies(bench, *[(w, 3 * n, steps) for w, n, steps in SITES])
    first = make(bench).aggregate(1, state(0.5), iter(sent))
    torch.testing.assert_close(make(bench).aggregate(1, state(0.5), iter(sent[::-1])), first)
    torch.testing.assert_close(make(bench).aggregate(1, state(0.5), iter(scaled)), first)


@pytest.mark.parametrize("steps", [0, NAN])
def test_a_site_without_steps_is_left_out(bench: SimpleNamespace, steps: float) -> None:
    rule = make(bench)
    new = rule.aggregate(1, state(0.5), iter(replies(bench, *SITES[:2], (99.0, 50, steps))))
    torch.testing.assert_close(new, make(bench).aggregate(1, state(0.5), iter(replies(bench, *SITES[:2]))))
    assert rule.notes["left_out"] == ["c"]


def test_nobody(bench: SimpleNamespace) -> None:
    kept = state(3.0)
    assert make(bench).aggregate(1, kept, iter([])) is kept
    assert make(bench).aggregate(1, kept, iter(replies(bench, (1.0, 5, 0)))) is kept


def test_too_much_momentum_is_refused_before_training(bench: SimpleNamespace) -> None:
    with pytest.raises(UserError, match=r"optimizer\.momentum"):
        make(bench, name="sgd", momentum=1.2).payload(1, "a")
    assert make(bench).payload(1, "a") == ({}, {})
