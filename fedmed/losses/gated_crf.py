"""Gated CRF loss for weakly supervised segmentation (arXiv 1906.04651): pixels that look alike should be classed alike.

    k_ij = Σ_q w_q exp(-|x_i - x_j|² / 2σ_xy² - |I_i - I_j|² / 2σ_rgb²)
    L    = 1/D Σ_i Σ_{j ≠ i in the window of i} m^dst_i m^src_j k_ij (1 - Σ_c p_ic p_jc)

B batch, C classes, K image channels, H W prediction grid. Symbols: p → prob, I → image, x → (column, row) in pixels of
the prediction, w → weight, m^src → source (which pixels may vote), m^dst → destination (which pixels receive votes),
D → denominator, r → radius (the window is the square |dx|, |dy| <= r).

Every unordered pair {a, b} is met once, along half of the (2r+1)² - 1 offsets, in shifted views of the inputs. With
kk_ab = k_ab (m^dst_a m^src_b + m^dst_b m^src_a), which is 2 k_ab without masks, the sums

    s = Σ kk_ab,    G_a = -Σ_b kk_ab p_b

give both results without an inner product per offset: Σ_ab kk_ab <p_a, p_b> = -<p, G> / 2, so

    L = (s + <p, G> / 2) / D,    dL/dp = G / D.

The gradient is thus complete after the forward pass; nothing per offset is kept. Departures: pairs with a pixel outside the
image do not exist here (the published code counts them, with features 0; they add a constant that depends on the image, none
to the gradient), and masks are not written into.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Pixels handled at a time on a CPU: enough to make the cost of a call small, few enough for the planes to stay in the cache.
TILE_PIXELS = 131072


@dataclass(frozen=True)
class Kernel:
    """One term w exp(-|x_i - x_j|² / 2σ_xy² - |I_i - I_j|² / 2σ_rgb²) of the pairwise similarity.

    weight w >= 0. sigma_xy σ_xy > 0 in pixels of the prediction, None: distance does not matter. sigma_rgb σ_rgb > 0 in
    units of the image, channels summed, None: the image does not matter. Defaults: FedICRA's official code. The CRF
    paper has two: Kernel(0.9) and Kernel(0.1, sigma_rgb=None).
    """

    weight: float = 1.0
    sigma_xy: float | None = 6.0
    sigma_rgb: float | None = 0.1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"weight must be finite and >= 0, got {self.weight}")
        for name, sigma in (("sigma_xy", self.sigma_xy), ("sigma_rgb", self.sigma_rgb)):
            if sigma is not None and not (math.isfinite(sigma) and sigma > 0):
                raise ValueError(f"{name} must be finite and > 0, or None, got {sigma}")


def gated_crf(
    prob: Tensor,
    image: Tensor,
    kernels: Sequence[Kernel] = (Kernel(),),
    radius: int = 5,
    source: Tensor | None = None,
    destination: Tensor | None = None,
) -> Tensor:
    """Gated CRF loss; only `prob` receives a gradient.

    prob (B, C, H, W), class probabilities. image (B, K, sH, sW), any scale (the default σ_rgb expects [0, 1] per image),
    averaged down to the prediction; s a positive integer. source, destination (B, 1, h, w) or None, see `binary_mask`.
    Out: scalar in prob's dtype (float32 for half precision, in which nothing is computed). It is >= 0 for probabilities and 0
    for the same certain class everywhere; no pair in the window (one pixel, radius 0, empty masks or batch): 0 with
    gradient 0. There is no second derivative; asking for it is an error.

    Time O(r² B H W (C + K)). Memory beyond the inputs, gradient included: 2 B C H W numbers, one B K H W where the image has
    to be averaged or converted, and a few planes.
    """
    if prob.ndim != 4:
        raise ValueError(f"prob must be (B, C, H, W), got {tuple(prob.shape)}")
    if radius < 0:
        raise ValueError(f"radius must be >= 0, got {radius}")
    dtype = torch.promote_types(prob.dtype, torch.float32)
    batch, _, *grid = prob.shape
    features = fit_image(image.detach().to(prob.device, dtype), prob)
    gates = [None if mask is None else binary_mask(mask, prob) for mask in (source, destination)]
    denominator = pair_denominator(batch * grid[0] * grid[1], *gates)
    every = prob.new_ones((1, 1, 1), dtype=dtype).expand(batch, *grid)
    masks = None if all(gate is None for gate in gates) else [every if gate is None else gate for gate in gates]
    value: Tensor = _PairSum.apply(prob.to(dtype), features, tuple(kernels), radius, masks, denominator)
    return value


def fit_image(image: Tensor, prob: Tensor) -> Tensor:
    """Average an image (B, K, sH, sW) down to the grid of prob (B, C, H, W); s must be a positive integer. Out: (B, K, H, W)."""
    (batch, _, height, width), shape = prob.shape, tuple(image.shape)
    scale = shape[2] // height if height and len(shape) == 4 else 1
    if scale < 1 or shape != (batch, max(image.shape[1], 1), scale * height, scale * width):
        raise ValueError(
            f"image must be (B, K, sH, sW), K >= 1, with one integer s >= 1 for prob (B, C, H, W), got {shape} and "
            f"{tuple(prob.shape)}"
        )
    return image if scale == 1 else F.adaptive_avg_pool2d(image, (height, width))


def binary_mask(mask: Tensor, prob: Tensor) -> Tensor:
    """Average a mask (B, 1, h, w) to the grid of prob (B, C, H, W); what is then below 1, or NaN, is out.

    Out: (B, H, W), 0 or >= 1, in at least float32. `mask` stays as it is.
    """
    (batch, _, height, width), shape = prob.shape, tuple(mask.shape)
    if len(shape) != 4 or shape[:2] != (batch, 1):
        raise ValueError(f"a mask must be (B, 1, h, w) for prob (B, C, H, W), got {shape} and {tuple(prob.shape)}")
    resized = mask.detach().to(prob.device, torch.promote_types(prob.dtype, torch.float32))
    if shape[2:] != (height, width):
        resized = F.adaptive_avg_pool2d(resized, (height, width))
    return torch.where(resized >= 1, resized, 0.0)[:, 0]


def pair_denominator(num_pixels: int, source: Tensor | None, destination: Tensor | None) -> Tensor | float:
    """D: sum of the destination mask if there is one, else of the source mask, else `num_pixels` of the batch; at least 1."""
    mask = source if destination is None else destination
    return float(max(num_pixels, 1)) if mask is None else mask.sum(dtype=torch.float64).clamp_min(1.0)


def half_offsets(radius: int, height: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield one (dy, dx) of each pair ±(dy, dx) != 0 with |dy|, |dx| <= radius that joins two pixels of the grid."""
    across = min(radius, width - 1)
    for dy in range(min(radius, height - 1) + 1):
        for dx in range(-across if dy else 1, across + 1):
            yield dy, dx


def _tiles(batch: int, height: int, width: int, pixels: int) -> Iterator[tuple[slice, int, int]]:
    """Cut the batch into (images, first row, end row) of about `pixels` pixels: several small images, or rows of a large one."""
    images, rows = max(pixels // max(height * width, 1), 1), max(pixels // max(width, 1), 1)
    for first in range(0, batch, images):
        for top in range(0, height, rows):
            yield slice(first, min(first + images, batch)), top, min(top + rows, height)


def pair_sums(
    prob: Tensor,
    image: Tensor,
    kernels: Sequence[Kernel],
    radius: int,
    masks: Sequence[Tensor] | None = None,
    tile_pixels: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums over all pairs, see the module: s and G.

    prob (B, C, H, W), image (B, K, H, W) of one dtype; masks (source, destination), each (B, H, W). tile_pixels None:
    `TILE_PIXELS` on a CPU, everything at once elsewhere. Out: s () float64; G (B, C, H, W) in the dtype of `prob`.
    """
    prob, image = prob.contiguous(), image.contiguous()
    batch, _, height, width = prob.shape
    total, gradient = prob.new_zeros((), dtype=torch.float64), torch.zeros_like(prob)
    kernels = [kernel for kernel in kernels if kernel.weight > 0]
    if not kernels:
        return total, gradient
    offsets = list(half_offsets(radius, height, width))
    constants = prob.new_tensor(_constants(kernels, offsets, factor=2.0 if masks is None else 1.0))
    scales = [0.0 if kernel.sigma_rgb is None else -0.5 / kernel.sigma_rgb**2 for kernel in kernels]
    steps = [(dy, dx, list(zip(row, scales, strict=True))) for (dy, dx), row in zip(offsets, constants, strict=True)]
    limit = tile_pixels or (TILE_PIXELS if prob.device.type == "cpu" else prob.numel())
    tiles = list(_tiles(batch, height, width, limit))
    size = max(((n.stop - n.start) * (end - top) * width for n, top, end in tiles), default=0)
    buffers = [prob.new_empty(size) for _ in range(3)]
    for images, top, end in tiles:
        for dy, dx, terms in steps:
            bottom = min(end, height - dy)
            if bottom <= top:
                continue
            a = (images, ..., slice(top, bottom), slice(max(-dx, 0), width - max(dx, 0)))
            b = (images, ..., slice(top + dy, bottom + dy), slice(max(dx, 0), width - max(-dx, 0)))
            image_a = image[a]
            shape = image_a[:, 0].shape
            free = [buffer[: shape.numel()].view(shape) for buffer in buffers]
            pair = _similarity(free, image_a, image[b], terms)
            if masks is not None:
                pair.mul_(_gate(free[1], masks, a, b))
            total.add_(pair.sum())
            pair = pair.unsqueeze(1)
            gradient[a].addcmul_(pair, prob[b], value=-1)
            gradient[b].addcmul_(pair, prob[a], value=-1)
    return total, gradient


def _constants(kernels: Sequence[Kernel], offsets: Sequence[tuple[int, int]], factor: float) -> list[list[float]]:
    """ln(factor · w_q) - (dx² + dy²) / 2σ_xy², all of an exponent that no pixel changes, per offset and kernel."""
    near = [0.0 if q.sigma_xy is None else 0.5 / q.sigma_xy**2 for q in kernels]
    logs = [math.log(factor * q.weight) for q in kernels]
    return [[log - (dx * dx + dy * dy) * c for log, c in zip(logs, near, strict=True)] for dy, dx in offsets]


def _similarity(planes: list[Tensor], image_a: Tensor, image_b: Tensor, terms: list[tuple[Tensor, float]]) -> Tensor:
    """Σ_q exp(constant_q + scale_q |I_a - I_b|²) of views (b, K, h, w), in the first of three planes (b, h, w)."""
    total, another, difference = planes
    for q, (constant, scale) in enumerate(terms):
        plane = another if q else total
        if scale == 0:
            plane.copy_(constant)
        else:
            for k in range(image_a.shape[1]):
                torch.sub(image_a[:, k], image_b[:, k], out=difference)
                torch.addcmul(plane if k else constant, difference, difference, value=scale, out=plane)
        plane.exp_()
        if q:
            total.add_(another)
    return total


def _gate(plane: Tensor, masks: Sequence[Tensor], a: Any, b: Any) -> Tensor:
    """m^dst_a m^src_b + m^dst_b m^src_a, in `plane`."""
    source, destination = masks
    torch.mul(destination[a], source[b], out=plane)
    return plane.addcmul_(destination[b], source[a])


class _PairSum(torch.autograd.Function):
    """Value and gradient in one pass; backward only scales the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        prob: Tensor,
        image: Tensor,
        kernels: tuple[Kernel, ...],
        radius: int,
        masks: Sequence[Tensor] | None,
        denominator: Tensor | float,
    ) -> Tensor:
        """The loss; the finished gradient is what is kept."""
        with torch.autocast(prob.device.type, enabled=False):
            total, gradient = pair_sums(prob, image, kernels, radius, masks)
            for p, g in zip(prob, gradient, strict=True):  # image by image: the product is a copy
                total = total + (p * g).sum(dtype=torch.float64) / 2
            ctx.save_for_backward(gradient.div_(denominator))
            return (total / denominator).to(prob.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradient, scaled."""
        if torch.is_grad_enabled():  # create_graph: the saved gradient would silently count as a constant
            raise RuntimeError("the gated CRF loss has no second derivative; do not ask for it with create_graph=True")
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None, None, None
