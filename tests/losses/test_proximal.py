"""The proximal term."""

from __future__ import annotations

import pytest
import torch

from fedmed.losses.proximal import proximal_term, squared_distance


def test_squared_norm_by_hand() -> None:
    weights = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[2.0]])}
    zero = {"a": torch.zeros(2), "b": torch.zeros(1, 1), "counter": torch.tensor(7)}
    assert squared_distance(weights, zero).item() == 29.0  # not 5 + 2, not the root
    assert proximal_term(weights, zero, mu=0.1).item() == pytest.approx(1.45)


def test_gradient_is_mu_times_the_difference_and_none_reaches_the_reference() -> None:
    weight = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    proximal_term({"w": weight}, {"w": reference}, mu=0.3).backward()
    assert torch.allclose(weight.grad, 0.3 * (weight - reference))
    assert reference.grad is None
    assert torch.autograd.gradcheck(lambda w: proximal_term({"w": w}, {"w": reference}, 0.3), (weight,))


def test_start_of_a_round_and_no_parameters() -> None:
    weight = torch.randn(4, requires_grad=True)
    term = proximal_term({"w": weight}, {"w": weight.detach().clone()}, mu=1.0)
    term.backward()
    assert term.item() == 0
    assert (weight.grad == 0).all()
    assert squared_distance({}, {}).item() == 0
