"""Tree energy loss: unlabelled pixels are drawn to the tree-filtered prediction of their surroundings.

Source: Liang et al., "Tree Energy Loss: Towards Sparsely Annotated Semantic Segmentation", CVPR 2022, arXiv 2203.10739; the
cascade as FedLPPA and FedICRA use it (official code).
B batch, C classes, H W pixels. Symbols: z → logits, P → prob, U → unlabelled_mask, A_m → affinities, I → image,
h_m → high_features, F → `tree_filter`.

    P = softmax(z)    A_0 = F(P; I, σ_low)
    single:  A_1 = F(A_0; h_1)    cascade: A_m = F(A_(m-1); h_m), m = 1 ... M    add: A_m = F(A_0; h_m)
    TEL = 1 / max(|U|, 1) Σ_(i in U) Σ_c |P_ic - A_ic|    A = A_1, A_M, or a sum over all m

The gradient flows through P and through A: to the logits and, by the affinities, to the high-level features; not to the
image, nor through the choice of the trees. A constant prediction has loss 0, so TEL needs a supervised loss beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmed.losses.tree_filter import Tree, tree_filter

Form = Literal["cascade", "single", "add"]

SIGMA_LOW = 0.02  # σ of the image, in [0, 1] (official code)
SIGMA_HIGH = 1.0  # σ of logits and features (official code)
WEIGHT = 0.1  # usual weight of the loss in a sum (official code); it is not applied here


def low_level_guide(image: Tensor) -> Tensor:
    """The image as guide: a gray one (B, 1, H, W) counts three times, as its colour copy would. Other images: themselves."""
    return image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear (corners not aligned) to the spatial `size`; of that size already: the maps. (B, K, *, *) → (B, K, H, W)."""
    if tuple(maps.shape[2:]) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def affinities(
    prob: Tensor,
    image: Tensor,
    high_features: Sequence[Tensor],
    *,
    form: Form = "cascade",
    sigma_low: float = SIGMA_LOW,
    sigma_high: float = SIGMA_HIGH,
    trees: Sequence[Tree | None] = (),
) -> list[Tensor]:
    """The filtered predictions [A_0, A_1, ...], each (B, C, H, W), rows over C summing to 1 as those of `prob` do.

    prob (B, C, H, W), image (B, K, *, *) and high_features (B, D, *, *) of any resolution, resized to H x W. trees: those of
    the image, h_1, h_2, ... as far as known; None or missing: built. Without high-level features: [A_0].
    """
    size = (prob.shape[2], prob.shape[3])
    known = [*trees, *[None] * (1 + len(high_features) - len(trees))]
    found = [tree_filter(prob, resized(low_level_guide(image.detach()), size), sigma_low, known[0])]
    used = high_features[:1] if form == "single" else high_features
    for feature, tree in zip(used, known[1:], strict=False):
        source = found[-1] if form == "cascade" else found[0]
        found.append(tree_filter(source, resized(feature, size), sigma_high, tree))
    return found


def energy(prob: Tensor, affinity: Tensor, unlabelled_mask: Tensor) -> Tensor:
    """1 / max(|U|, 1) Σ_(i in U) Σ_c |P_ic - A_ic|, in [0, 2]; gradient 0 where the two are equal. mask (B, H, W) bool."""
    difference = (prob - affinity).abs().sum(dim=1)
    count = unlabelled_mask.sum().clamp_min(1)
    return difference.masked_fill(~unlabelled_mask, 0).sum() / count


def tree_energy_loss(
    logits: Tensor,
    image: Tensor,
    high_features: Sequence[Tensor],
    unlabelled_mask: Tensor,
    *,
    form: Form = "cascade",
    sigma_low: float = SIGMA_LOW,
    sigma_high: float = SIGMA_HIGH,
    scale: int = 1,
    trees: Sequence[Tree | None] = (),
) -> Tensor:
    """Tree energy loss, unweighted (see `WEIGHT`).

    logits (B, C, H, W); image (B, K, *, *), intensities in [0, 1]; high_features: (B, D, *, *) each, of any resolution, coarse
    to fine, usually the logits of side outputs at 1/4, 1/2 and 1/1 (M = 3), none: A = A_0; unlabelled_mask (B, *, *), nonzero =
    unlabelled, resized to the nearest pixel. scale: everything is compared at 1/scale of the resolution (prob by area), which costs
    scale² times less. trees: as for `affinities`, of that resolution. Out: scalar in [0, 2] (for "add" M times that), in float32 at
    least; 0 with gradient 0 when no pixel is unlabelled. ValueError: unknown form, scale below 1, more trees than guides.
    """
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
    if scale < 1:
        raise ValueError(f"scale must be >= 1, got {scale}")
    if len(trees) > 1 + len(high_features):
        raise ValueError(f"{len(trees)} trees for the image and {len(high_features)} high-level features")
    size = (max(1, logits.shape[2] // scale), max(1, logits.shape[3] // scale))
    unlabelled, dtype = nearest(unlabelled_mask, size), torch.promote_types(logits.dtype, torch.float32)
    if not bool(unlabelled.any()):
        nothing = [t.flatten()[:0].sum() for t in (logits, *high_features)]  # no entry, so no NaN can get in
        return torch.stack([part.to(dtype) for part in nothing]).sum()
    prob = logits.to(dtype).softmax(dim=1)
    if scale > 1:
        prob = F.interpolate(prob, size=size, mode="area")
    sigmas = {"sigma_low": sigma_low, "sigma_high": sigma_high}
    found = affinities(prob, image, high_features, form=form, trees=trees, **sigmas)
    compared = found[1:] if form == "add" and len(found) > 1 else found[-1:]
    return torch.stack([energy(prob, affinity, unlabelled) for affinity in compared]).sum()


def nearest(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask (B, *, *) of any dtype as (B, H, W) bool at the spatial `size`, by the nearest pixel (index rounded down)."""
    if tuple(mask.shape[1:]) == size:
        return mask.bool()
    return F.interpolate(mask.bool().float().unsqueeze(1), size=size, mode="nearest").squeeze(1).bool()
