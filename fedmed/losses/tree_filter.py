"""Tree filter: averages over an image whose weights fall along the minimum spanning tree of its pixels.

Source: Song et al., "Learnable Tree Filter for Structure-preserving Feature Transform", NeurIPS 2019, arXiv 1909.12513.
B batch, C channels, K guide channels, N = H·W pixels, E = 2HW - H - W edges between 4-neighbours.
Symbols: e → guide, d_uv = ||e_u - e_v||² → weights, T → tree, a_uv = exp(-d_uv / σ) → affinity, x → feature.

    S_ij = product of a over the path from i to j in T, S_ii = 1        F(x)_i = Σ_j S_ij x_j / Σ_j S_ij

A tree is made without gradient; given it, F is differentiable in x and, through a, in e, in time and memory linear in N:
two sweeps over the tree for the value, two more for the gradients. On the CPU compiled loops do that (`tree_kernels`,
needs numba), on other devices and without numba tensor operations with log(depth) steps (`tree_doubling`).

Departures: the public code adds 1 to d in float32 before it looks for the tree, which makes ties of differences below
1e-7; we do not. Ties go to the edge that comes first in `edge_weights`, so a tree is the same in every run.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

log = logging.getLogger("fedmed.losses")

DOWN, UP, RIGHT, LEFT = 1, 2, 4, 8  # bits of a pixel's byte: the neighbours it is joined to in the tree


@dataclass(frozen=True)
class Tree:
    """Rooted spanning trees of B images: order (B, N), the pixel row·W + column at every position, parents before children;
    parent (B, N), the position of its parent (of the root, at 0: 0). Both int32.
    """

    order: Tensor
    parent: Tensor
    height: int
    width: int

    def edges(self) -> Tensor:
        """The N - 1 edges of every image as pairs of pixels, smaller one first, in ascending order. (B, N - 1, 2) int64."""
        order = self.order.long()
        pairs = torch.stack([order, order.gather(1, self.parent.long())], dim=2)[:, 1:].sort(dim=2).values
        keys = pairs[..., 0] * self.order.shape[1] + pairs[..., 1]
        return pairs.gather(1, keys.argsort(dim=1).unsqueeze(2).expand_as(pairs))


def edge_weights(guide: Tensor) -> Tensor:
    """d_uv of all edges, first every vertical one (pixel, pixel below) row by row, then every horizontal one (pixel, pixel
    to the right). guide (B, K, H, W) → (B, E), >= 0.
    """
    down = (guide[:, :, 1:] - guide[:, :, :-1]).square().sum(dim=1)
    right = (guide[..., 1:] - guide[..., :-1]).square().sum(dim=1)
    return torch.cat([down.flatten(1), right.flatten(1)], dim=1)


def minimum_spanning_tree(guide: Tensor) -> Tree:
    """The spanning tree with the least Σ d of every image, rooted at its central pixel; between equal d the earlier edge wins.

    guide (B, K, H, W), any floating dtype; below float32 it is taken as float32. No gradient.
    """
    _, _, height, width = guide.shape
    with torch.no_grad():
        weights = edge_weights(guide.detach().to(torch.promote_types(guide.dtype, torch.float32)))
        return _rooted(_backend(guide.device.type).spanning_links(weights, height, width), height, width)


def tree_from_edges(edges: Tensor, height: int, width: int) -> Tree:
    """Root given trees at the central pixel. edges (B, N - 1, 2): pairs of neighbouring pixels row·W + column in any order.

    ValueError where they are no spanning tree of the grid.
    """
    pixels = height * width
    if edges.ndim != 3 or edges.shape[1:] != (pixels - 1, 2):
        raise ValueError(f"a tree of {pixels} pixels has edges of shape (B, {pixels - 1}, 2), got {tuple(edges.shape)}")
    first, second = edges.long().sort(dim=2).values.unbind(dim=2)
    below, beside = second - first == width, (second - first == 1) & (second % width != 0)
    if edges.numel() and not bool(((below | beside) & (first >= 0) & (second < pixels)).all()):
        raise ValueError(f"edges must join neighbours in a grid of {height} x {width} pixels")
    links = torch.zeros(edges.shape[0], pixels, dtype=torch.int32, device=edges.device)
    links.scatter_add_(1, first, torch.where(below, DOWN, RIGHT).to(torch.int32))
    links.scatter_add_(1, second, torch.where(below, UP, LEFT).to(torch.int32))
    if not _connected(first, second, pixels):
        raise ValueError("edges contain a cycle: they must join all pixels of every image")
    return _rooted(links.to(torch.uint8), height, width)


def _rooted(links: Tensor, height: int, width: int) -> Tree:
    order, parent = _backend(links.device.type).orient(links, height, width)
    return Tree(order, parent, height, width)


def tree_filter(feature: Tensor, guide: Tensor, sigma: float, tree: Tree | None = None) -> Tensor:
    """F(x) of every channel of x = feature, with affinities exp(-d / σ) of the guide.

    feature (B, C, H, W), guide (B, K, H, W), sigma > 0; tree: None builds the minimum spanning tree of the guide. Gradient
    for both (a guide without requires_grad costs less). Out: (B, C, H, W), a weighted mean, so within the range of x. A
    constant guide gives the mean of the image. Half precision is worked out in float32; dtype out = dtype of feature.
    """
    if feature.ndim != 4 or len({(t.shape[0], *t.shape[2:]) for t in (feature, guide)}) != 1:
        raise ValueError(
            f"feature (B, C, H, W) and guide (B, K, H, W) must agree in B, H, W, got {tuple(feature.shape)}, {tuple(guide.shape)}"
        )
    if not sigma > 0:
        raise ValueError(f"sigma must be > 0, got {sigma}")
    if feature.numel() == 0:
        return feature.clone()
    tree = minimum_spanning_tree(guide) if tree is None else tree
    if (tree.order.shape[0], tree.height, tree.width) != (feature.shape[0], *feature.shape[2:]):
        raise ValueError(
            f"tree of {tree.order.shape[0]} images of {tree.height} x {tree.width} for features {tuple(feature.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(feature.dtype, guide.dtype), torch.float32)
    result: Tensor = _TreeFilter.apply(feature.to(dtype), guide.to(dtype), tree.order, tree.parent, float(sigma))
    return result.to(feature.dtype)


class _TreeFilter(torch.autograd.Function):
    """F(x) with the analytic gradient; the sweeps of the value are kept for it."""

    # feature (B, C, H, W) and guide of one dtype, order and parent of a Tree
    @staticmethod
    def forward(ctx: Any, feature: Tensor, guide: Tensor, order: Tensor, parent: Tensor, sigma: float) -> Tensor:
        backend = _backend(feature.device.type)
        result, affinity, up, down = backend.filter_value(feature, guide, order, parent, sigma)
        ctx.sigma, ctx.backend = sigma, backend
        kept = (guide, up) if ctx.needs_input_grad[1] else (None, None)
        ctx.save_for_backward(order, parent, affinity, down, *kept)
        return result  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        order, parent, affinity, down, guide, up = ctx.saved_tensors
        to_feature, to_guide = ctx.backend.filter_gradient(
            grads[0], guide, order, parent, affinity, up, down, ctx.sigma
        )
        return to_feature, to_guide, None, None, None


@functools.cache
def _backend(device: str) -> ModuleType:
    """Compiled loops on the CPU, tensor operations elsewhere and without numba (said once)."""
    if device == "cpu":
        try:
            from fedmed.losses import tree_kernels

            return tree_kernels
        except ImportError as error:
            log.warning(
                "tree filter: numba is missing (%s); slower tensor operations take over. pip install numba", error
            )
    from fedmed.losses import tree_doubling

    return tree_doubling


def _connected(first: Tensor, second: Tensor, pixels: int) -> bool:
    """Whether the edges join all pixels of every image."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    for u, v in zip(first.cpu().numpy(), second.cpu().numpy(), strict=True):
        graph = coo_array(([True] * len(u), (u, v)), shape=(pixels, pixels))
        if connected_components(graph, directed=False, return_labels=False) != 1:
            return False
    return True
