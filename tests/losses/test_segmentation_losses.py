"""Soft Dice variants and the losses made of them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fedmed.losses.segmentation import (
    bce_dice,
    bce_with_logits,
    ce_dice,
    foreground_channels,
    soft_dice,
    soft_dice_loss,
)


def _pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    prob = torch.rand(*shape, generator=rng, dtype=torch.float64)
    return prob.requires_grad_(), (torch.rand(*shape, generator=rng) > 0.5).double()


def _naive_dice(prob, target, above, below, squared, per, pooled, mask):  # type: ignore[no-untyped-def]
    """Loops over cells of the result and over every pixel, one number at a time."""
    images, channels = range(prob.shape[0]), range(prob.shape[1])
    cells = [[b] for b in images] if per == "image" else [list(images)]
    groups = [list(channels)] if pooled else [[c] for c in channels]
    scores = []
    for cell, group in itertools.product(cells, groups):
        overlap = size = 0.0
        for b, c in itertools.product(cell, group):
            for row, column in itertools.product(range(prob.shape[2]), range(prob.shape[3])):
                if mask is None or mask[b, row, column]:
                    p, y = float(prob[b, c, row, column]), float(target[b, c, row, column])
                    overlap += p * y
                    size += p * p + y * y if squared else p + y
        scores.append((2 * overlap + above) / (size + below))
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("per", ["image", "batch"])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("above", "below"), [(1.0, 1.0), (0.0, 1e-4)])
def test_every_variant_equals_the_naive_one(pooled, per, squared, masked, above, below) -> None:  # type: ignore[no-untyped-def]
    prob, target = _pair(2, 3, 3, 4)
    mask = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(2)) > 0.4 if masked else None
    options = {
        "smooth_numerator": above,
        "smooth_denominator": below,
        "squared": squared,
        "per": per,
        "pool_channels": pooled,
        "pixel_mask": mask,
    }
    score = soft_dice(prob, target, **options)
    naive = _naive_dice(prob.detach(), target, above, below, squared, per, pooled, mask)
    assert torch.allclose(score.flatten(), naive, atol=1e-12)
    assert soft_dice_loss(prob, target, **options).item() == pytest.approx(1 - naive.mean().item())
    assert torch.autograd.gradcheck(lambda p: soft_dice_loss(p, target, **options), (prob,))


def test_dice_by_hand() -> None:
    # p = (1, .5), y = (1, 0), smoothing 1e-4 in the denominator only: 2 / 2.5001.
    prob, target = torch.tensor([1.0, 0.5]).view(1, 1, 2), torch.tensor([1.0, 0.0]).view(1, 1, 2)
    score = soft_dice(prob, target, smooth_numerator=0.0, smooth_denominator=1e-4)
    assert score.shape == (1, 1)
    assert score.item() == pytest.approx(0.799968, abs=1e-6)
    # Smoothing 1 in both: 3 / 3.5; squares below: 3 / 3.25.
    assert soft_dice(prob, target).item() == pytest.approx(3 / 3.5)
    assert soft_dice(prob, target, squared=True).item() == pytest.approx(3 / 3.25)


def test_empty_prediction_and_reference() -> None:
    empty = torch.zeros(1, 1, 4, 4, requires_grad=True)
    nothing = torch.zeros(1, 1, 4, 4)
    assert soft_dice(empty, nothing).item() == 1
    assert soft_dice(empty, nothing, smooth_numerator=0.0, smooth_denominator=1e-4).item() == 0
    score = soft_dice(empty, nothing, smooth_numerator=0.0, smooth_denominator=0.0)
    score.sum().backward()
    assert score.item() == 1
    assert (empty.grad == 0).all()


def test_wrong_arguments_are_refused() -> None:
    prob, target = _pair(2, 1, 3, 3)
    with pytest.raises(ValueError, match="one shape"):
        soft_dice(prob, target[:, 0])
    with pytest.raises(ValueError, match="'image' or 'batch'"):
        soft_dice(prob, target, per="pixel")  # type: ignore[arg-type]


def test_class_ids_become_foreground_channels() -> None:
    ids = torch.tensor([[0, 1, 2, 2]], dtype=torch.uint8)
    assert foreground_channels(ids, 2).tolist() == [[[0, 1, 0, 0], [0, 0, 1, 1]]]


def test_bce_of_ids_channels_and_labels() -> None:
    logits = torch.randn(
        2, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    ids = torch.randint(0, 3, (2, 3, 3), generator=torch.Generator().manual_seed(1))
    channels = foreground_channels(ids, 2)
    naive = -(channels * logits.sigmoid().log() + (1 - channels) * (1 - logits.sigmoid()).log()).mean()
    assert torch.allclose(bce_with_logits(logits, ids), naive)
    assert torch.equal(bce_with_logits(logits, ids), bce_with_logits(logits, channels))
    assert torch.autograd.gradcheck(lambda z: bce_with_logits(z, ids), (logits,))
    labels = torch.tensor([[0, 1, 1]])
    assert bce_with_logits(torch.zeros(1, 3), labels).item() == pytest.approx(math.log(2))


def test_bce_dice_by_hand() -> None:
    # One image of two pixels, logits 0, one foreground pixel: BCE ln 2, Dice (2 * .5 + 1) / (1 + 1 + 1) = 2/3.
    logits = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    ids = torch.tensor([[[1, 0]]])
    assert bce_dice(logits, ids).item() == pytest.approx(0.5 * math.log(2) + 0.5 / 3, abs=1e-8)
    assert bce_dice(logits, ids, bce_weight=1.0).item() == pytest.approx(math.log(2))
    assert bce_dice(logits, ids, bce_weight=0.0).item() == pytest.approx(1 / 3, abs=1e-8)


def test_gradients_of_the_combined_losses() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 3, 4, dtype=torch.float64, generator=rng, requires_grad=True)
    ids = torch.randint(0, 3, (2, 3, 4), generator=rng)
    assert torch.autograd.gradcheck(lambda z: ce_dice(z, ids), (logits,))
    assert torch.autograd.gradcheck(lambda z: bce_dice(z[:, 1:], ids), (logits,))


def test_two_class_softmax_agrees_with_sigmoid() -> None:
    # softmax over (0, z) is sigmoid(z), so both losses must agree when the activations do.
    rng = torch.Generator().manual_seed(0)
    foreground = torch.randn(2, 1, 5, 5, generator=rng, dtype=torch.float64)
    ids = torch.randint(0, 2, (2, 5, 5), generator=rng)
    both = torch.cat([torch.zeros_like(foreground), foreground], dim=1)
    assert torch.allclose(ce_dice(both, ids), bce_dice(foreground, ids))
