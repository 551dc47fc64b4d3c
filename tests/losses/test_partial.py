"""Losses of sparse annotation: hand cases, naive twins, gradients, and batches without a labelled pixel."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedmed.losses.partial import labelled_pixels, partial_cross_entropy, partial_dice_loss


def sparse(*shape: int, share: float = 0.4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (B, C, *) and targets (B, *) of which about `share` are labelled, the others C."""
    rng = torch.Generator().manual_seed(seed)
    batch, classes, *axes = shape
    targets = torch.randint(0, classes, (batch, *axes), generator=rng)
    targets[torch.rand(batch, *axes, generator=rng) > share] = classes
    return torch.randn(shape, generator=rng, dtype=torch.float64), targets


# (B, C, *)
SHAPES = [(2, 2, 4, 5), (3, 4, 1, 7), (1, 3, 6), (2, 3, 2, 3, 2)]


def test_partial_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0]]], dtype=torch.float64)  # (1, 2, 2)
    both, one = torch.tensor([[0, 0]]), torch.tensor([[0, 2]])
    assert float(partial_cross_entropy(logits, both)) == pytest.approx(0.490415, abs=1e-6)
    assert float(partial_cross_entropy(logits, one)) == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_partial_cross_entropy_equals_a_loop_over_pixels(shape: tuple[int, ...]) -> None:
    logits, targets = sparse(*shape)
    logs = logits.log_softmax(dim=1).movedim(1, -1).reshape(-1, shape[1])
    terms = [-float(row[y]) for row, y in zip(logs, targets.flatten().tolist(), strict=True) if y < shape[1]]
    assert terms and float(partial_cross_entropy(logits, targets)) == pytest.approx(sum(terms) / len(terms), abs=1e-12)


def test_gradient_of_partial_cross_entropy() -> None:
    logits, targets = sparse(2, 3, 3, 4)
    leaf = logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: partial_cross_entropy(z, targets), leaf)
    partial_cross_entropy(leaf, targets).backward()
    labelled = labelled_pixels(targets, 3)
    onehot = F.one_hot(targets, 4)[..., :3].movedim(-1, 1)
    expected = (logits.softmax(dim=1) - onehot) * labelled.unsqueeze(1) / labelled.sum()
    torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=1e-14)


def test_labels_count_over_the_batch_not_per_image() -> None:
    logits, _ = sparse(2, 2, 1, 3)
    targets = torch.tensor([[[0, 1, 0]], [[1, 2, 2]]])
    alone = [partial_cross_entropy(logits[b : b + 1], targets[b : b + 1]) for b in range(2)]
    torch.testing.assert_close(partial_cross_entropy(logits, targets), (3 * alone[0] + alone[1]) / 4)


def test_partial_dice_by_hand() -> None:
    prob = torch.tensor([[[0.8, 0.5], [0.2, 0.5]]], dtype=torch.float64)  # (1, 2, 2); the second pixel is open
    loss = partial_dice_loss(prob, torch.tensor([[0, 2]]), smooth=0.0)
    assert float(loss) == pytest.approx(1 - (1.6 / 1.64 + 0.0) / 2, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_partial_dice_equals_the_formula_on_the_labelled_pixels_alone(shape: tuple[int, ...]) -> None:
    logits, targets = sparse(*shape)
    prob, keep = logits.softmax(dim=1), targets < shape[1]
    rows, labels = prob.movedim(1, -1)[keep], targets[keep]
    scores = []
    for c in range(shape[1]):
        p, y = rows[:, c], (labels == c).double()
        scores.append((2 * (p * y).sum() + 1e-5) / (p.square().sum() + y.sum() + 1e-5))
    torch.testing.assert_close(partial_dice_loss(prob, targets), 1 - torch.stack(scores).mean(), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda p: partial_dice_loss(p, targets), prob.detach().requires_grad_())


def test_every_image_has_its_own_mask() -> None:
    logits, targets = sparse(3, 2, 4, 4)
    prob = logits.softmax(dim=1)
    other = prob.clone()
    other.movedim(1, -1)[targets == 2] = 0.5  # what is predicted at open pixels does not matter
    torch.testing.assert_close(partial_dice_loss(other, targets), partial_dice_loss(prob, targets))


@pytest.mark.parametrize("loss", [partial_cross_entropy, partial_dice_loss])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 2, 1, 1), (0, 2, 3, 3), (2, 2, 0)])
def test_no_labelled_pixel(loss, shape) -> None:  # type: ignore[no-untyped-def]
    leaf = torch.rand(shape, dtype=torch.float64).requires_grad_()
    value = loss(leaf, torch.full((shape[0], *shape[2:]), shape[1]))
    value.backward()
    assert value.item() == 0 and leaf.grad is not None and not leaf.grad.any()


@pytest.mark.parametrize("loss", [partial_cross_entropy, partial_dice_loss])
def test_invariances_and_forms_of_input(loss) -> None:  # type: ignore[no-untyped-def]
    logits, targets = sparse(3, 3, 4, 5)
    prob = logits.softmax(dim=1)
    before, expected = (prob.clone(), targets.clone()), loss(prob, targets)
    order = torch.tensor([2, 0, 1])
    turned = prob.transpose(2, 3).contiguous().transpose(2, 3)
    marked = torch.where(targets == 3, 255, targets)
    for other in (
        loss(prob[order], targets[order]),
        loss(turned, targets),
        loss(prob, targets.to(torch.uint8)),
        loss(prob, marked, 255),
        loss(prob, marked.to(torch.uint8), 255),
    ):
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-13)
    assert torch.equal(prob, before[0]) and torch.equal(targets, before[1])


def test_half_precision_is_summed_in_float32() -> None:
    logits = torch.zeros(1, 2, 400, 400, dtype=torch.float16).requires_grad_()  # the sum is beyond float16
    value = partial_cross_entropy(logits, torch.zeros(1, 400, 400, dtype=torch.long))
    value.backward()
    assert value.dtype == torch.float32 and value.item() == pytest.approx(math.log(2), abs=1e-5)
    assert logits.grad is not None and logits.grad.dtype == torch.float16
