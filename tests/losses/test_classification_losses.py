"""Cross-entropies: hand-worked numbers, absent classes, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from fedmed.losses.classification import (
    binary_cross_entropy,
    cross_entropy,
    log_prior,
    logit_adjusted_cross_entropy,
)


def _logits(*shape: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_()


def test_logit_adjustment_by_hand() -> None:
    # Counts (80, 20), equal logits, label 1: loss ln 5, gradient (.8, -.8).
    logits = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    loss = logit_adjusted_cross_entropy(logits, torch.tensor([1]), torch.tensor([80, 20]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(5), abs=1e-12)
    assert torch.allclose(logits.grad, torch.tensor([[0.8, -0.8]], dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_absent_class_gets_probability_zero_and_everything_stays_finite(dtype: torch.dtype) -> None:
    logits = _logits(6, 4).detach().to(dtype).requires_grad_()
    labels = torch.tensor([1, 2, 3, 1, 2, 3])
    loss = logit_adjusted_cross_entropy(logits, labels, torch.tensor([0, 5, 7, 1]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[:, 0] == 0).all()
    # The class might as well not exist.
    without = logit_adjusted_cross_entropy(logits[:, 1:], labels - 1, torch.tensor([5, 7, 1]))
    assert torch.allclose(loss, without)


def test_label_of_an_absent_class_is_an_infinite_loss_with_finite_gradient() -> None:
    logits = _logits(2, 3)
    loss = logit_adjusted_cross_entropy(logits, torch.tensor([0, 1]), torch.tensor([0, 5, 7]))
    loss.backward()
    assert torch.isposinf(loss)
    assert torch.isfinite(logits.grad).all()


def test_eps_keeps_an_absent_class_alive() -> None:
    assert log_prior(torch.tensor([0, 4]), eps=1e-9).tolist() == pytest.approx([math.log(1e-9), 1e-9], abs=1e-12)
    assert log_prior(torch.tensor([0, 4])).tolist() == [-math.inf, 0.0]


def test_no_counts_at_all_means_equal_shares() -> None:
    assert log_prior(torch.zeros(4)).exp().tolist() == pytest.approx([0.25] * 4)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_tau_scales_the_shift(tau: float) -> None:
    logits, labels, counts = _logits(5, 3), torch.tensor([1, 1, 2, 1, 2]), torch.tensor([0, 6, 2])
    loss = logit_adjusted_cross_entropy(logits, labels, counts, tau=tau)
    share = counts.double() / 8
    weighted = share**tau * logits.exp()  # softmax of z + tau ln pi, written out; 0**0 is 1
    naive = -(weighted[range(5), labels] / weighted.sum(1)).log().mean()
    assert loss.item() == pytest.approx(naive.item(), rel=1e-12)
    assert torch.autograd.gradcheck(lambda z: logit_adjusted_cross_entropy(z, labels, counts, tau=tau), (logits,))


def test_given_logarithm_equals_counts_and_equal_counts_change_nothing() -> None:
    logits, labels = _logits(5, 3), torch.tensor([0, 1, 2, 1, 2])
    counts = torch.tensor([3, 6, 2])
    first = logit_adjusted_cross_entropy(logits, labels, counts, eps=1e-9)
    assert torch.equal(first, logit_adjusted_cross_entropy(logits, labels, prior=log_prior(counts, 1e-9)))
    equal = logit_adjusted_cross_entropy(logits, labels, torch.tensor([4, 4, 4]))
    assert torch.allclose(equal, cross_entropy(logits, labels))
    with pytest.raises(ValueError, match="class_counts"):
        logit_adjusted_cross_entropy(logits, labels)


def test_adjustment_per_pixel() -> None:
    logits, labels = _logits(2, 3, 4, 5), torch.randint(1, 3, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    counts = torch.tensor([0, 6, 2])
    flat = logits.permute(0, 2, 3, 1).reshape(-1, 3)
    expected = logit_adjusted_cross_entropy(flat, labels.reshape(-1), counts)
    assert torch.allclose(logit_adjusted_cross_entropy(logits, labels, counts), expected)


def test_numpy_counts_are_taken() -> None:
    import numpy as np

    loss = logit_adjusted_cross_entropy(torch.zeros(1, 2), torch.tensor([1]), np.array([80, 20]))  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(math.log(5), rel=1e-6)


def test_masked_binary_cross_entropy() -> None:
    logits = _logits(3, 4)
    targets = (_logits(3, 4, seed=1) > 0).double()
    mask = torch.tensor([1, 0, 1, 1])
    kept = mask.bool().expand(3, 4)
    unknown = targets.masked_fill(~kept, math.nan)
    loss = binary_cross_entropy(logits, unknown, mask)
    assert torch.allclose(loss, binary_cross_entropy(logits[kept], targets[kept]))
    assert torch.autograd.gradcheck(lambda z: binary_cross_entropy(z, unknown, mask), (logits,))
    nothing = binary_cross_entropy(logits, unknown, torch.zeros(4))
    nothing.backward()
    assert nothing.item() == 0
    assert (logits.grad == 0).all()
