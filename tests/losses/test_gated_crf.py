"""Gated CRF loss: hand cases, the unfold form as naive twin (value and gradient), masks, and every empty or degenerate input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedmed.losses.gated_crf import Kernel, binary_mask, gated_crf, half_offsets, pair_sums

PAPER = (Kernel(0.9), Kernel(0.1, sigma_rgb=None))
ODD = (Kernel(0.5, 2.0, 0.3), Kernel(0.25, None, 0.7), Kernel(2.0, 1.5, None), Kernel(0.125, None, None))


def unfolded(planes: Tensor, radius: int) -> Tensor:
    """The (2r+1)² shifted copies of (B, C, H, W), 0 outside the image. Out: (B, C, (2r+1)², H, W)."""
    side = 2 * radius + 1
    return F.unfold(planes, side, padding=radius).view(*planes.shape[:2], side * side, *planes.shape[2:])


def unfold_form(
    prob: Tensor,
    image: Tensor,
    kernels: Sequence[Kernel] = (Kernel(),),
    radius: int = 5,
    source: Tensor | None = None,
    destination: Tensor | None = None,
) -> Tensor:
    """The loss as one writes it first: every shifted copy at once, gradient by autograd. Masks fit the prediction, 0 or 1."""
    batch, _, height, width = prob.shape
    image = F.adaptive_avg_pool2d(image, (height, width))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([columns, rows]).to(prob).unsqueeze(0)
    similarity = prob.new_zeros(())
    for kernel in kernels:
        exponent = prob.new_zeros(())
        for features, sigma in ((places, kernel.sigma_xy), (image, kernel.sigma_rgb)):
            if sigma is not None:
                step = (features.unsqueeze(2) - unfolded(features, radius)) / sigma
                exponent = exponent - step.square().sum(dim=1) / 2
        similarity = similarity + kernel.weight * exponent.exp()
    gate = unfolded(prob.new_ones(1, 1, height, width) if source is None else source.to(prob), radius)[:, 0]
    gate[:, gate.shape[1] // 2] = 0
    if destination is not None:
        gate = gate * destination.to(prob)
    disagreement = 1 - (prob.unsqueeze(2) * unfolded(prob, radius)).sum(dim=1)
    counted = source if destination is None else destination
    denominator = batch * height * width if counted is None else max(1.0, float(counted.sum()))
    return (similarity * gate * disagreement).sum() / denominator


def inputs(*shape: int, channels: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities (B, C, H, W), image (B, K, H, W), source and destination masks (B, 1, H, W); float64."""
    rng = torch.Generator().manual_seed(seed)
    batch, _, height, width = shape
    prob = torch.randn(shape, generator=rng, dtype=torch.float64).softmax(dim=1)
    image = torch.rand(batch, channels, height, width, generator=rng, dtype=torch.float64)
    source, destination = (torch.rand(2, batch, 1, height, width, generator=rng) > 0.4).double()
    return prob, image, source, destination


def graded(loss: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient."""
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


# ---------------------------------------------------------------------- by hand


def test_two_pixels_by_hand() -> None:
    prob = torch.eye(2, dtype=torch.float64).view(1, 2, 1, 2).requires_grad_()  # (1, 0) and (0, 1)
    kernel = Kernel(sigma_xy=1.0, sigma_rgb=None)
    loss, gradient = graded(gated_crf(prob, torch.zeros(1, 1, 1, 2), [kernel], radius=1), prob)
    assert float(loss) == pytest.approx(0.606531, abs=1e-6)
    assert gradient[0, :, 0].tolist() == [
        [0.0, pytest.approx(-0.606531, abs=1e-6)],
        [pytest.approx(-0.606531, abs=1e-6), 0.0],
    ]


def test_masks_by_hand() -> None:
    """Left may vote, right receives: one of the two ordered pairs counts, and one destination pixel divides."""
    prob = torch.eye(2, dtype=torch.float64).view(1, 2, 1, 2)
    left, right = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    image, kernels = torch.zeros(1, 1, 1, 2), [Kernel(sigma_xy=1.0, sigma_rgb=None)]
    k = math.exp(-0.5)
    found = [
        float(gated_crf(prob, image, kernels, 1, *m))
        for m in ((left, right), (left, None), (None, right), (left, left))
    ]
    assert found == pytest.approx([k, k, k, 0.0], abs=1e-12)


def test_a_certain_constant_map_costs_nothing() -> None:
    image = torch.rand(2, 3, 6, 5)
    prob = torch.zeros(2, 3, 6, 5)
    prob[:, 1] = 1
    assert abs(float(gated_crf(prob, image, PAPER))) < 1e-6


def test_a_uniform_map_costs_its_share_of_all_similarity() -> None:
    _, image, _, _ = inputs(2, 4, 6, 5)
    total, _ = pair_sums(torch.zeros(2, 4, 6, 5, dtype=torch.float64), image, ODD, 3)
    loss = gated_crf(torch.full((2, 4, 6, 5), 0.25, dtype=torch.float64), image, ODD, 3)
    torch.testing.assert_close(loss, 0.75 * total / 60)


@pytest.mark.parametrize(
    ("radius", "height", "width"), [(5, 20, 20), (1, 3, 2), (4, 2, 9), (3, 1, 1), (0, 5, 5), (7, 1, 4)]
)
def test_half_of_the_offsets(radius: int, height: int, width: int) -> None:
    half = list(half_offsets(radius, height, width))
    down, across = min(radius, height - 1), min(radius, width - 1)
    window = set(itertools.product(range(-down, down + 1), range(-across, across + 1))) - {(0, 0)}
    assert len(half) == len(window) / 2 and set(half) | {(-dy, -dx) for dy, dx in half} == window


# ---------------------------------------------------------------------- the naive twin

# (B, C, H, W), K, radius: oblong, wider than the window, one row, one column, radius beyond the image, one class, many classes
CASES = [
    ((2, 2, 9, 14), 1, 5),
    ((1, 3, 8, 6), 3, 2),
    ((2, 2, 1, 9), 1, 3),
    ((2, 2, 7, 1), 2, 3),
    ((1, 4, 3, 4), 1, 6),
    ((1, 1, 5, 5), 1, 2),
    ((3, 6, 4, 5), 4, 1),
]


@pytest.mark.parametrize("gates", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kernels", [(Kernel(),), PAPER, ODD], ids=["one", "paper", "odd"])
@pytest.mark.parametrize(("shape", "channels", "radius"), CASES)
def test_equals_the_unfold_form(shape, channels, radius, kernels, gates) -> None:  # type: ignore[no-untyped-def]
    prob, image, *masks = inputs(*shape, channels=channels)
    masks = [mask if gate else None for mask, gate in zip(masks, gates, strict=True)]
    leaf = prob.requires_grad_()
    fast = graded(gated_crf(leaf, image, kernels, radius, *masks), leaf)
    slow = graded(unfold_form(leaf, image, kernels, radius, *masks), leaf)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)


def test_float32_is_close_to_float64() -> None:
    prob, image, _, _ = inputs(2, 3, 40, 30, channels=3)
    narrow, wide = prob.float().requires_grad_(), prob.float().double().requires_grad_()
    found = graded(gated_crf(narrow, image.float()), narrow)
    expected = graded(gated_crf(wide, image.float().double()), wide)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and float((a - b).abs().max() / b.abs().max()) < 2e-6


@pytest.mark.parametrize("pixels", [1, 7, 30, 60, 10**6])
def test_tiles_do_not_change_the_sums(pixels: int) -> None:
    prob, image, *masks = inputs(3, 2, 6, 5, channels=2)
    masks = [mask[:, 0] for mask in masks]
    for chosen in (None, masks):
        expected = pair_sums(prob, image, PAPER, 4, chosen)
        torch.testing.assert_close(pair_sums(prob, image, PAPER, 4, chosen, pixels), expected, rtol=1e-13, atol=1e-13)


# ---------------------------------------------------------------------- gradient


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_by_finite_differences(masked: bool) -> None:
    prob, image, *masks = inputs(2, 3, 4, 5, channels=2)
    masks = masks if masked else [None, None]
    assert torch.autograd.gradcheck(lambda p: gated_crf(p, image, PAPER, 2, *masks), prob.requires_grad_())


def test_gradient_through_softmax_and_a_factor_twice() -> None:
    logits, image, _, _ = inputs(2, 2, 5, 4)
    logits.requires_grad_()
    loss = 0.1 * gated_crf(logits.softmax(dim=1), image)
    once, twice = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    expected = torch.autograd.grad(0.1 * unfold_form(logits.softmax(dim=1), image), logits)[0]
    torch.testing.assert_close(once, expected)
    assert torch.equal(once, twice)


def test_the_image_gets_no_gradient_and_a_second_derivative_is_an_error() -> None:
    prob, image, _, _ = inputs(1, 2, 4, 4)
    prob.requires_grad_(), image.requires_grad_()
    loss = gated_crf(prob, image)
    assert torch.autograd.grad(loss, (prob, image), retain_graph=True, allow_unused=True)[1] is None
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, prob, create_graph=True)
    with torch.no_grad():
        assert not gated_crf(prob, image).requires_grad


# ---------------------------------------------------------------------- invariances and forms of input


def test_order_of_the_batch_and_orientation() -> None:
    prob, image, source, destination = inputs(3, 2, 6, 4, channels=2)
    expected = gated_crf(prob, image, PAPER, 3, source, destination)
    for turn in (
        lambda t: t[[2, 0, 1]],
        lambda t: t.flip(2),
        lambda t: t.flip(3),
        lambda t: t.transpose(2, 3),  # not contiguous
        lambda t: t.repeat(2, 1, 1, 1),
    ):
        turned = gated_crf(turn(prob), turn(image), PAPER, 3, turn(source), turn(destination))
        torch.testing.assert_close(turned, expected, rtol=1e-12, atol=0)


def test_inputs_stay_as_they_are() -> None:
    tensors = inputs(2, 2, 5, 4)
    tensors[2][0, 0, 0] = 0.5
    tensors[3][1, 0, 2, 1] = math.nan
    before = [tensor.clone() for tensor in tensors]
    gated_crf(*tensors[:2], PAPER, 2, *tensors[2:])
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(tensors, before, strict=True))


def test_a_larger_image_and_larger_masks_are_averaged() -> None:
    prob, _, _, _ = inputs(2, 2, 4, 3)
    _, image, source, destination = inputs(2, 2, 8, 6, channels=3)
    source[0, 0, 2:4, 2:4] = 1
    small = [F.avg_pool2d(t, 2) for t in (image, source, destination)]
    kept = [(mask >= 1).double() for mask in small[1:]]
    assert kept[0].any()
    expected = unfold_form(prob, small[0], PAPER, 2, *kept)
    torch.testing.assert_close(gated_crf(prob, image, PAPER, 2, source, destination), expected)


def test_mask_values() -> None:
    mask = torch.tensor([[[[1.0, 0.999, math.nan, 0.0, -1.0]]]])
    assert binary_mask(mask, torch.zeros(1, 2, 1, 5)).tolist() == [[[1.0, 0.0, 0.0, 0.0, 0.0]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    prob, image, _, _ = inputs(1, 2, 6, 6)
    leaf = prob.to(dtype).requires_grad_()
    loss, gradient = graded(gated_crf(leaf, image.to(dtype)), leaf)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(loss, gated_crf(leaf.detach().float(), image.to(dtype).float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gated_crf(leaf, image.to(dtype)), loss)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_cuda_device() -> None:
    tensors = inputs(2, 3, 20, 17, channels=3)
    results = []
    for device in ("cpu", "cuda"):
        prob, *others = (tensor.to(device) for tensor in tensors)
        leaf = prob.requires_grad_()
        results.append([r.cpu() for r in graded(gated_crf(leaf, others[0], PAPER, 5, *others[1:]), leaf)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------- nothing to compare, and errors


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 2, 1, 1), {}),
        ((2, 2, 3, 4), {"radius": 0}),
        ((0, 2, 3, 4), {}),
        ((0, 2, 3, 4), {"source": torch.ones(0, 1, 3, 4)}),
        ((1, 2, 0, 4), {}),
        ((1, 2, 4, 0), {}),
        ((1, 2, 3, 4), {"source": torch.zeros(1, 1, 3, 4)}),
        ((1, 2, 3, 4), {"destination": torch.zeros(1, 1, 3, 4)}),
        ((1, 2, 3, 4), {"destination": torch.full((1, 1, 3, 4), math.nan)}),
        ((1, 2, 3, 4), {"kernels": ()}),
        ((1, 2, 3, 4), {"kernels": (Kernel(0.0),)}),
    ],
    ids=str,
)
def test_no_pair_counts(shape, options) -> None:  # type: ignore[no-untyped-def]
    leaf = torch.full(shape, 0.5).requires_grad_()
    loss, gradient = graded(gated_crf(leaf, torch.rand(shape[0], 1, *shape[2:]), **options), leaf)
    assert float(loss) == 0 and gradient.shape == shape and not gradient.any()


def test_a_constant_image_and_a_strongly_differing_one() -> None:
    prob, image, _, _ = inputs(1, 2, 4, 4)
    flat = gated_crf(prob, torch.zeros_like(image), [Kernel(sigma_rgb=1e-3)])
    torch.testing.assert_close(flat, gated_crf(prob, image, [Kernel(sigma_rgb=None)]))
    leaf = prob.requires_grad_()
    loss, gradient = graded(gated_crf(leaf, image, [Kernel(sigma_rgb=1e-6)]), leaf)
    assert float(loss) == 0 and not gradient.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Kernel(weight=-1.0), "weight must be finite"),
        (lambda: Kernel(sigma_xy=0.0), "sigma_xy must be finite and > 0"),
        (lambda: Kernel(sigma_rgb=math.nan), "sigma_rgb must be finite and > 0"),
        (lambda: gated_crf(torch.zeros(2, 4, 4), torch.zeros(1, 1, 4, 4)), r"prob must be \(B, C, H, W\)"),
        (lambda: gated_crf(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4), radius=-1), "radius must be >= 0"),
        (lambda: gated_crf(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 8, 4)), "image must be"),
        (lambda: gated_crf(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 6, 6)), "image must be"),
        (lambda: gated_crf(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 2, 2)), "image must be"),
        (lambda: gated_crf(torch.zeros(1, 2, 4, 4), torch.zeros(2, 1, 4, 4)), "image must be"),
        (lambda: gated_crf(torch.zeros(1, 2, 4, 4), torch.zeros(1, 0, 4, 4)), "image must be"),
        (lambda: gated_crf(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4)), "image must be"),
        (lambda: gated_crf(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4), source=torch.ones(1, 4, 4)), "a mask must be"),
        (lambda: gated_crf(torch.zeros(2, 2, 4, 4), torch.zeros(2, 1, 4, 4), source=torch.ones(1, 1, 4, 4)), "a mask must be"),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
