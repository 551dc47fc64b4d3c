"""Consistency of two classifiers and the focal loss: hand cases, gradients, nothing through the anchor."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedmed.losses.anchoring import anchored_kl, focal_cross_entropy, released_consistency

F64 = torch.float64
Pair = Callable[[Tensor, Tensor], Tensor]


def logits_of(*probs: float) -> Tensor:
    """Logits (1, C) whose softmax these are."""
    return torch.tensor([probs], dtype=F64).log()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_by_hand() -> None:
    first, second = torch.zeros(1, 2, dtype=F64), logits_of(0.8, 0.2)
    assert anchored_kl(first, second).item() == pytest.approx(0.8 * math.log(1.6) + 0.2 * math.log(0.4))
    assert anchored_kl(first, second).item() == pytest.approx(0.192745, abs=1e-6)
    assert released_consistency(first, second).item() == pytest.approx(-0.500201, abs=1e-6)


def test_gradient_of_the_divergence_by_hand() -> None:
    first = torch.zeros(1, 2, dtype=F64, requires_grad=True)
    anchored_kl(first, logits_of(0.8, 0.2)).backward()
    torch.testing.assert_close(first.grad, torch.tensor([[-0.3, 0.3]], dtype=F64))


@pytest.mark.parametrize("term", [anchored_kl, released_consistency])
def test_gradient_check_and_none_to_the_anchor(term: Pair) -> None:
    first, second = drawn(4, 3).requires_grad_(), drawn(4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: term(z, second), (first,))
    term(first, second).backward()
    assert first.grad is not None and second.grad is None


def test_gradient_of_the_divergence_is_the_difference_of_the_probabilities() -> None:
    first, second = drawn(5, 4).requires_grad_(), drawn(5, 4, seed=1)
    anchored_kl(first, second).backward()
    torch.testing.assert_close(first.grad, (first.softmax(1) - second.softmax(1)).detach() / 5)


def test_the_divergence_is_zero_where_both_agree_and_positive_elsewhere() -> None:
    same, other = drawn(6, 3), drawn(6, 3, seed=1)
    assert anchored_kl(same, same + 2.0).item() == pytest.approx(0.0, abs=1e-12)  # a constant changes no softmax
    assert anchored_kl(same, other) > 0


def test_the_released_term_does_not_vanish_where_both_agree() -> None:
    """It pulls towards the preferred class for ever, C times more weakly than a mean over the batch would."""
    same = logits_of(0.8, 0.2).requires_grad_()
    released_consistency(same, same.detach()).backward()
    assert same.grad is not None and same.grad[0, 0] < -0.01 < 0.01 < same.grad[0, 1]
    p, t = torch.full((1, 3), 1 / 3, dtype=F64), logits_of(0.5, 0.3, 0.2)
    values = [released_consistency(x.log(), t).item() for x in (p, torch.tensor([[0.6, 0.2, 0.2]], dtype=F64))]
    assert values[1] - values[0] == pytest.approx(-(0.5 * 0.6 + 0.3 * 0.2 + 0.2 * 0.2 - 1 / 3) / 3)


def test_the_divergence_is_a_mean_over_the_batch() -> None:
    first, second = drawn(4, 3), drawn(4, 3, seed=1)
    naive = sum(
        float(sum(q * (q.log() - p) for q, p in zip(b.softmax(0), a.log_softmax(0), strict=True)))
        for a, b in zip(first, second, strict=True)
    )
    assert anchored_kl(first, second).item() == pytest.approx(naive / 4)
    twice = anchored_kl(torch.cat([first, first]), torch.cat([second, second]))
    assert twice.item() == pytest.approx(naive / 4)


@pytest.mark.parametrize("term", [anchored_kl, released_consistency])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_extreme_logits_and_an_empty_batch(term: Pair, dtype: torch.dtype) -> None:
    far = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype)
    first = far.flip(1).clone().requires_grad_()
    term(first, far).backward()
    assert first.grad is not None and torch.isfinite(first.grad).all()
    empty = torch.zeros(0, 3, dtype=dtype)
    assert term(empty, empty).item() == 0 and term(empty, empty).dtype == dtype


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_by_hand_and_gradient(gamma: float) -> None:
    logits, labels = logits_of(0.8, 0.2), torch.tensor([1])
    assert focal_cross_entropy(logits, labels, gamma).item() == pytest.approx(-(0.8**gamma) * math.log(0.2))
    targets = torch.tensor([0, 2, 1])
    assert torch.autograd.gradcheck(lambda z: focal_cross_entropy(z, targets, gamma), (drawn(3, 3).requires_grad_(),))


def test_focal_edges() -> None:
    logits, labels = drawn(4, 3), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(focal_cross_entropy(logits, labels, 0.0), F.cross_entropy(logits, labels))
    assert focal_cross_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).item() == 0
    for gamma in (0.5, 1.0):
        sure = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)  # p_y is 1
        loss = focal_cross_entropy(sure, torch.tensor([0]), gamma)
        loss.backward()
        assert loss.item() == 0 and sure.grad is not None and torch.isfinite(sure.grad).all()
