"""FedAvgM and FedAdam: hand-worked steps, and what must not move."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from strategies.server_optimizer import FedAdam, FedAdamParams, FedAvgM, FedAvgMParams


def state(weight: float, variance: float = 1.0, seen: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    values = {"w": torch.tensor([weight], dtype=dtype), "running_var": torch.tensor([variance], dtype=dtype)}
    return {**values, "seen": torch.tensor(seen)}


def rounds(bench: SimpleNamespace, rule: FedAvgM | FedAdam, targets: list[float]) -> list[float]:
    current, path = state(0.0), []
    for number, target in enumerate(targets, start=1):
        current = rule.aggregate(number, current, iter([bench.update("a", 0, 4, state(target))]))
        path.append(float(current["w"]))
    return path


def make(bench: SimpleNamespace, rule: FedAvgM | FedAdam, dtype: torch.dtype = torch.float64) -> FedAvgM | FedAdam:
    return bench.bound(rule, state(0.0, dtype=dtype), [("a", 4), ("b", 12)])  # type: ignore[no-any-return]


def test_momentum_by_hand(bench: SimpleNamespace) -> None:
    # Δ = 1, m = 1, w = .5; Δ = 2 − .5, m = .9 + 1.5, w = .5 + 1.2
    assert rounds(bench, make(bench, FedAvgM(FedAvgMParams(lr=0.5, momentum=0.9))), [1.0, 2.0]) == pytest.approx(
        [0.5, 1.7]
    )


def test_momentum_zero_is_averaging(bench: SimpleNamespace) -> None:
    rule = make(bench, FedAvgM(FedAvgMParams(lr=1.0, momentum=0.0)))
    updates = [bench.update("a", 0, 4, state(1.0, 2.0, 3)), bench.update("b", 1, 12, state(5.0, 4.0, 8))]
    new = rule.aggregate(1, state(9.0), iter(updates))
    assert float(new["w"]) == pytest.approx(4.0)
    assert float(new["running_var"]) == pytest.approx(3.5) and int(new["seen"]) == 8


def test_adam_by_hand(bench: SimpleNamespace) -> None:
    rule = make(bench, FedAdam(FedAdamParams(lr=0.1, beta1=0.9, beta2=0.99, tau=0.1)))
    first = 0.1 * 0.1 / (0.01**0.5 + 0.1)  # Δ = 1: m = .1, v = .01
    delta = 1.0 - first
    second = first + 0.1 * (0.09 + 0.1 * delta) / ((0.0099 + 0.01 * delta**2) ** 0.5 + 0.1)
    assert rounds(bench, rule, [1.0, 1.0]) == pytest.approx([first, second])
    assert rule.state.step == 2


@pytest.mark.parametrize("rule", [FedAvgM(), FedAdam()])
def test_only_trainable_parameters_move_by_the_moments(bench: SimpleNamespace, rule: FedAvgM | FedAdam) -> None:
    rule = make(bench, rule)
    for number in (1, 2, 3):
        new = rule.aggregate(number, state(0.0, 5.0), iter([bench.update("a", 0, 4, state(1.0, 0.5, number))]))
        assert float(new["running_var"]) == 0.5 and int(new["seen"]) == number
    assert set(rule.state.first) == {"w"}


@pytest.mark.parametrize("rule", [FedAvgM(), FedAdam()])
def test_no_update_no_step(bench: SimpleNamespace, rule: FedAvgM | FedAdam) -> None:
    rule = make(bench, rule)
    rule.aggregate(1, state(0.0), iter([bench.update("a", 0, 4, state(1.0))]))
    held, kept = rule.state, state(3.0)
    assert rule.aggregate(2, kept, iter([])) is kept and rule.state is held


@pytest.mark.parametrize("rule", [FedAvgM(), FedAdam()])
def test_received_state_is_not_written_and_dtype_stays(bench: SimpleNamespace, rule: FedAvgM | FedAdam) -> None:
    rule, before = make(bench, rule, torch.float16), state(1.0, dtype=torch.float16)
    new = rule.aggregate(1, before, iter([bench.update("a", 0, 4, state(2.0, dtype=torch.float16))]))
    assert float(before["w"]) == 1.0 and new["w"].dtype == torch.float16
    assert rule.state.first["w"].dtype == torch.float32


@pytest.mark.parametrize(
    "wrong", [(FedAvgMParams, {"momentum": 1.0}), (FedAdamParams, {"tau": 0.0}), (FedAdamParams, {"lr": 0.0})]
)
def test_values_outside_their_range_are_refused(wrong: tuple[type, dict[str, float]]) -> None:
    with pytest.raises(ValueError, match="expected"):
        wrong[0](**wrong[1])
