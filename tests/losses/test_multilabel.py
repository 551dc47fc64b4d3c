"""Multi-label losses with missing classes: hand-worked numbers, gradients, and every division at zero."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedmed.losses.classification import binary_cross_entropy, log_prior
from fedmed.losses.multilabel import joint_terms, masked_squared_error, prior_shift, two_view_terms

LOG3 = math.log(3)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def mask(*values: int) -> Tensor:
    return torch.tensor([values]).bool()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_prior_adjustment_by_hand() -> None:
    adjusted = row(0.6).logit() + prior_shift(row(0.1))
    assert adjusted.sigmoid().item() == pytest.approx(0.06 / 0.42, abs=1e-12)


def test_an_even_prior_moves_nothing_and_sides_are_symmetric() -> None:
    prior = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    shift = prior_shift(prior)
    assert shift[0] == 0 and shift[1].item() == pytest.approx(-shift[2].item(), abs=1e-12)


def test_the_two_class_form_is_the_logit_adjustment_of_two_classes() -> None:
    log_share = log_prior(torch.tensor([7, 3]))
    assert prior_shift(torch.tensor(0.3).double()).item() == pytest.approx((log_share[1] - log_share[0]).item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_priors_of_zero_and_one_are_finite(dtype: torch.dtype) -> None:
    shift = prior_shift(torch.tensor([0.0, 1.0], dtype=dtype), clip=1e-6)
    assert shift.tolist() == pytest.approx([math.log(1e-6), -math.log(1e-6)], rel=1e-5)
    assert shift.dtype == dtype


def test_stage_1_by_hand() -> None:
    logits, teacher = row(LOG3, 0.0), row(0.0, LOG3)
    terms = two_view_terms([logits, logits], [teacher, teacher], row(1, 0), mask(1, 0))
    assert terms["supervised"].item() == pytest.approx(-math.log(0.75), abs=1e-12)
    assert terms["consistency"].item() == pytest.approx(0.0625, abs=1e-12)
    assert sum(terms.values()).item() == pytest.approx(0.350182, abs=1e-6)


def test_views_are_averaged_and_may_be_exchanged() -> None:
    a, b, g, h = (random(4, 3, seed=s) for s in range(4))
    targets, use = (random(4, 3, seed=5) > 0).double(), mask(1, 0, 1).expand(4, 3)
    shift = random(3, seed=6)
    terms = two_view_terms([a, b], [g, h], targets, use, shift, 0.5)
    expected = (binary_cross_entropy(a + shift, targets, use) + binary_cross_entropy(b + shift, targets, use)) / 2
    torch.testing.assert_close(terms["supervised"], expected)
    error = ((a.sigmoid() - g.sigmoid()) ** 2 + (b.sigmoid() - h.sigmoid()) ** 2)[:, 1]
    torch.testing.assert_close(terms["consistency"], 0.5 * error.mean() / 2)
    torch.testing.assert_close(two_view_terms([b, a], [h, g], targets, use, shift, 0.5), terms)
    assert set(two_view_terms([a, b], [], targets, use)) == {"supervised"}


def test_joint_mean_by_hand() -> None:
    terms = joint_terms(row(LOG3, 0.0, 0.0), row(9.0, LOG3, 0.0), row(1, 1, 1), mask(1, 0, 0))
    assert terms["supervised"].item() == pytest.approx(-math.log(0.75) / 3, abs=1e-12)
    assert terms["distilled"].item() == pytest.approx(0.0625 / 3, abs=1e-12)


def test_joint_mean_is_one_mean_over_all_entries() -> None:
    logits, teacher, use = random(5, 4), random(5, 4, seed=1), random(5, 4, seed=2) > 0
    targets, shift = (random(5, 4, seed=3) > 0).double(), random(4, seed=4)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits + shift, targets, reduction="none")
    naive = torch.where(use, bce, (logits.sigmoid() - teacher.sigmoid()) ** 2).mean()
    torch.testing.assert_close(sum(joint_terms(logits, teacher, targets, use, shift).values()), naive)


def test_a_label_that_is_not_annotated_is_not_read() -> None:
    logits, teacher, use = random(2, 3), random(2, 3, seed=1), mask(1, 0, 1).expand(2, 3)
    for column in (0.0, 1.0, math.nan):
        targets = torch.tensor([[1, column, 0], [0, column, 1]], dtype=torch.float64)
        terms = joint_terms(logits, teacher, targets, use) | two_view_terms([logits], [teacher], targets, use)
        reference = targets.nan_to_num(0.0) * use
        expected = joint_terms(logits, teacher, reference, use) | two_view_terms([logits], [teacher], reference, use)
        torch.testing.assert_close(terms, expected)


@pytest.mark.parametrize("filled", [True, False])
def test_an_empty_side_costs_nothing_and_stays_finite(filled: bool) -> None:
    logits = random(3, 2).requires_grad_()
    use = torch.full((3, 2), filled)
    both = [joint_terms(logits, random(3, 2, seed=1), torch.zeros(3, 2), use)]
    both.append(two_view_terms([logits, logits], [logits.detach(), random(3, 2, seed=1)], torch.zeros(3, 2), use))
    for terms in both:
        parts = list(terms.values())
        empty, other = (parts[1], parts[0]) if filled else (parts[0], parts[1])
        assert empty.item() == 0 and other.item() > 0
        (gradient,) = torch.autograd.grad(sum(parts), logits)
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


def test_no_entry_at_all() -> None:
    nothing = torch.zeros(0, 2)
    use = torch.zeros(0, 2, dtype=torch.bool)
    assert masked_squared_error(nothing, nothing, use).item() == 0
    assert sum(joint_terms(nothing, nothing, nothing, use).values()).item() == 0


def test_gradients_against_finite_differences() -> None:
    teacher, targets, use = random(3, 4, seed=1), (random(3, 4, seed=2) > 0).double(), random(3, 4, seed=3) > 0
    shift = random(4, seed=4)
    logits, other = random(3, 4).requires_grad_(), random(3, 4, seed=5).requires_grad_()
    torch.autograd.gradcheck(lambda z: sum(joint_terms(z, teacher, targets, use, shift).values()), (logits,))
    torch.autograd.gradcheck(
        lambda a, b: sum(two_view_terms([a, b], [teacher, teacher], targets, use, shift).values()), (logits, other)
    )


def test_the_dtype_of_the_logits_stays() -> None:
    logits, use = random(2, 2).float(), mask(1, 0).expand(2, 2)
    terms = joint_terms(logits, logits, torch.zeros(2, 2), use) | two_view_terms(
        [logits], [logits], torch.zeros(2, 2), use
    )
    assert all(value.dtype == torch.float32 for value in terms.values())
