"""Tree energy loss: hand case, forms, gradients, resizing, and images without unlabelled pixels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedmed.losses.tree_energy import affinities, energy, low_level_guide, resized, tree_energy_loss
from fedmed.losses.tree_filter import minimum_spanning_tree, tree_filter


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def example(batch: int = 2, classes: int = 3, size: int = 8) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Logits, gray image, three high-level features at 1/4, 1/2 and 1/1, and a mask with 3 of 4 pixels unlabelled."""
    logits = normal(batch, classes, size, size).requires_grad_()
    image = normal(batch, 1, size, size, seed=1).sigmoid()
    features = [normal(batch, classes, size // s, size // s, seed=s + 1).requires_grad_() for s in (4, 2, 1)]
    return logits, image, features, normal(batch, size, size, seed=9) > -0.7


def test_chain_by_hand() -> None:
    """Affinities 1/2, P = (1, 0, 0), the last two unlabelled: (1/4 + 1/7) / 2."""
    guide = math.sqrt(math.log(2)) * torch.arange(3, dtype=torch.float64).view(1, 1, 1, 3)
    prob = torch.tensor([[[[1.0, 0.0, 0.0]]]], dtype=torch.float64)
    unlabelled = torch.tensor([[[False, True, True]]])
    assert float(energy(prob, tree_filter(prob, guide, 1.0), unlabelled)) == pytest.approx(0.196429, abs=5e-7)


def test_forms() -> None:
    logits, image, features, mask = example()
    prob = logits.softmax(dim=1)
    low = tree_filter(prob, image.expand(-1, 3, -1, -1), 0.02)
    guides = [F.interpolate(f, size=(8, 8), mode="bilinear", align_corners=False) for f in features]
    chain, each = [low], [tree_filter(low, g, 1.0) for g in guides]
    for g in guides:
        chain.append(tree_filter(chain[-1], g, 1.0))
    expected = {
        "single": energy(prob, chain[1], mask),
        "cascade": energy(prob, chain[3], mask),
        "add": sum(energy(prob, a, mask) for a in each),
    }
    for form, value in expected.items():
        torch.testing.assert_close(tree_energy_loss(logits, image, features, mask, form=form), value)  # type: ignore[arg-type]
    torch.testing.assert_close(tree_energy_loss(logits, image, features, mask), expected["cascade"])
    torch.testing.assert_close(tree_energy_loss(logits, image, [], mask), energy(prob, low, mask))
    assert len(affinities(prob, image, features, form="single")) == 2


def test_affinities_are_probabilities() -> None:
    logits, image, features, _ = example()
    for affinity in affinities(logits.softmax(dim=1), image, features):
        torch.testing.assert_close(affinity.sum(dim=1), torch.ones(2, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("form", ["cascade", "single", "add"])
def test_gradient_check(form: Any) -> None:
    logits, image, features, mask = example(batch=1, classes=2)
    guides = [low_level_guide(image), *(resized(f, (8, 8)) for f in features)]
    trees = [minimum_spanning_tree(g) for g in guides]
    assert torch.autograd.gradcheck(
        lambda z, *h: tree_energy_loss(z, image, h, mask, form=form, trees=trees),
        (logits, *features),
        eps=1e-7,
        atol=1e-5,
    )


def test_who_gets_a_gradient() -> None:
    logits, image, features, mask = example()
    image.requires_grad_()
    tree_energy_loss(logits, image, features, mask).backward()
    assert image.grad is None
    assert all(t.grad is not None and bool(t.grad.any()) for t in (logits, *features))


def test_invariances() -> None:
    logits, image, features, mask = example(batch=3)
    value = tree_energy_loss(logits, image, features, mask)
    kept = [2, 0, 1]
    torch.testing.assert_close(
        tree_energy_loss(logits[kept], image[kept], [f[kept] for f in features], mask[kept]), value
    )
    torch.testing.assert_close(tree_energy_loss(logits + 5, image, features, mask), value)
    twice = [torch.cat([t, t]) for t in (logits, image, *features)]
    torch.testing.assert_close(tree_energy_loss(twice[0], twice[1], twice[2:], torch.cat([mask, mask])), value)
    assert torch.equal(tree_energy_loss(logits, image, features, mask), value)
    assert torch.equal(tree_energy_loss(logits, image, features, mask.to(torch.uint8)), value)
    swapped = logits.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    torch.testing.assert_close(tree_energy_loss(swapped, image, features, mask), value)


def test_resizing() -> None:
    logits, image, features, mask = example()
    enlarged = image.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(  # every other pixel of the enlarged mask; the mean of two equal pixels is the pixel
        tree_energy_loss(logits, enlarged, features, mask.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)),
        tree_energy_loss(logits, image, features, mask),
    )
    half = tree_energy_loss(logits, image, features, mask, scale=2)
    prob = F.avg_pool2d(logits.softmax(dim=1), 2)
    guides = [F.interpolate(g, size=(4, 4), mode="bilinear", align_corners=False) for g in (image, *features)]
    affinity = tree_filter(prob, guides[0].expand(-1, 3, -1, -1), 0.02)
    for guide in guides[1:]:
        affinity = tree_filter(affinity, guide, 1.0)
    torch.testing.assert_close(half, energy(prob, affinity, mask[:, ::2, ::2]))
    assert bool(torch.autograd.grad(half, logits)[0].any())
    assert tree_energy_loss(logits, image, features, torch.ones_like(mask), scale=100).item() == 0  # one pixel is left


def test_nothing_unlabelled() -> None:
    logits, image, features, mask = example()
    with torch.no_grad():
        logits[0, 0, 0, 0] = math.nan
    value = tree_energy_loss(logits, image, features, torch.zeros_like(mask))
    assert value.item() == 0 and value.dtype == torch.float64
    value.backward()
    assert all(t.grad is not None and not t.grad.any() for t in (logits, *features))
    empty = [t[:0] for t in (logits, image, *features)]
    assert tree_energy_loss(empty[0], empty[1], empty[2:], mask[:0]).item() == 0


def test_an_image_without_unlabelled_pixels_takes_no_part() -> None:
    logits, image, features, mask = example()
    mask[1] = False
    value = tree_energy_loss(logits, image, features, mask)
    torch.testing.assert_close(value, tree_energy_loss(logits[:1], image[:1], [f[:1] for f in features], mask[:1]))
    assert not torch.autograd.grad(value, logits)[0][1].any()


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1)])
def test_small_and_constant_images(size: tuple[int, int]) -> None:
    logits = normal(2, 2, *size, dtype=torch.float32).requires_grad_()
    features = [torch.zeros(2, 2, *size, requires_grad=True) for _ in range(2)]
    value = tree_energy_loss(logits, torch.zeros(2, 1, *size), features, torch.ones(2, *size))
    prob = logits.softmax(dim=1)
    expected = (prob - prob.mean(dim=(2, 3), keepdim=True)).abs().sum(dim=1).mean()
    torch.testing.assert_close(value, expected)
    grads = torch.autograd.grad(value, (logits, *features))
    assert all(bool(g.isfinite().all()) for g in grads)


def test_constant_prediction_has_no_loss() -> None:
    logits = torch.zeros(1, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    _, image, features, mask = example(batch=1, classes=2)
    value = tree_energy_loss(logits, image, features, mask)
    assert value.item() == pytest.approx(0, abs=1e-15)


def test_half_precision_logits() -> None:
    logits, image, features, mask = example()
    half = logits.detach().half().requires_grad_()
    value = tree_energy_loss(half, image.half(), [f.detach().half() for f in features], mask)
    assert value.dtype == torch.float32
    value.backward()
    assert half.grad is not None and bool(half.grad.isfinite().all())


def test_arguments() -> None:
    logits, image, features, mask = example()
    for wrong, message in (({"form": "chain"}, "form"), ({"scale": 0}, "scale"), ({"trees": [None] * 5}, "trees")):
        with pytest.raises(ValueError, match=message):
            tree_energy_loss(logits, image, features, mask, **wrong)  # type: ignore[arg-type]
