"""Compiled loops of the tree filter for the CPU; imported only when a tree is needed, since numba takes time to load.

Same functions as `tree_doubling`, which reads closer to the equations. Image after image on one thread, linear in the number
of pixels: radix sort of the weights, union-find with path halving, breadth-first order, and sweeps over the nodes in that order
with all channels and the ones channel of the normaliser side by side. Machine code is kept on disk after the first call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

DIGIT = 11  # bits of a radix sort pass: a table of 2048 counts stays in the first-level cache


def _compiled(function: Callable[..., Any]) -> Any:
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for the cache can be written: compile in every process
        return numba.njit(**options)(function)


def spanning_links(weights: Tensor, height: int, width: int) -> Tensor:
    """Minimum spanning trees of the grid as one byte per pixel (bits of `tree_filter`). weights (B, E) >= 0 → (B, N) uint8."""
    keys = weights.contiguous().numpy().view(np.uint32 if weights.dtype == torch.float32 else np.uint64)
    links = np.zeros((weights.shape[0], height * width), dtype=np.uint8)
    _kruskal(keys, height, width, links)
    return torch.from_numpy(links)


def orient(links: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Breadth-first order from the central pixel, and the positions of the parents. (B, N) uint8 → twice (B, N) int32."""
    order = np.zeros(tuple(links.shape), dtype=np.int32)
    parent = np.zeros_like(order)
    _breadth_first(links.contiguous().numpy(), (height // 2) * width + width // 2, width, order, parent)
    return torch.from_numpy(order), torch.from_numpy(parent)


@_compiled
def _kruskal(keys, height, width, links):  # type: ignore[no-untyped-def]
    """Edges by ascending weight (non-negative floats sort by their bit patterns), kept where they join two components."""
    pixels, vertical = height * width, (height - 1) * width
    edges = keys.shape[1]
    key, other_key = np.empty(edges, keys.dtype), np.empty(edges, keys.dtype)
    edge, other_edge, root = np.empty(edges, np.uint32), np.empty(edges, np.uint32), np.empty(pixels, np.uint32)
    one, below = np.uint32(1), np.uint32(width)
    for b in range(keys.shape[0]):
        key[:] = keys[b]
        for i in range(vertical):  # an edge is 2 · upper or left pixel + (0 vertical, 1 horizontal)
            edge[i] = 2 * i
        for i in range(edges - vertical):
            edge[vertical + i] = 2 * (i + i // (width - 1)) + 1
        key, edge, other_key, other_edge = _radix_sort(key, edge, other_key, other_edge)
        for n in range(pixels):
            root[n] = n
        left = pixels - 1
        for i in range(edges):
            if left == 0:
                break
            horizontal = edge[i] & one
            u = edge[i] >> one
            v = u + (one if horizontal else below)
            root_u, root_v = _find(root, u), _find(root, v)
            if root_u != root_v:
                root[max(root_u, root_v)] = min(root_u, root_v)
                links[b, u] |= np.uint8(4) if horizontal else np.uint8(1)
                links[b, v] |= np.uint8(8) if horizontal else np.uint8(2)
                left -= 1


@_compiled
def _find(root, u):  # type: ignore[no-untyped-def]
    while root[u] != u:
        root[u] = root[root[u]]
        u = root[u]
    return u


@_compiled
def _radix_sort(key, edge, other_key, other_edge):  # type: ignore[no-untyped-def]
    """Stable sort by unsigned keys, least significant digit first; the two pairs of arrays take turns."""
    buckets = 1 << DIGIT
    passes = (8 * key.itemsize + DIGIT - 1) // DIGIT
    mask = key.dtype.type(buckets - 1)
    counts = np.zeros((passes, buckets), np.uint32)
    for i in range(key.size):
        for p in range(passes):
            counts[p, (key[i] >> key.dtype.type(p * DIGIT)) & mask] += 1
    for p in range(passes):
        shift = key.dtype.type(p * DIGIT)
        if key.size == 0 or counts[p, (key[0] >> shift) & mask] == key.size:
            continue  # all alike
        start = np.uint32(0)
        for d in range(buckets):
            start, counts[p, d] = start + counts[p, d], start
        for i in range(key.size):
            digit = (key[i] >> shift) & mask
            to = counts[p, digit]
            counts[p, digit] += np.uint32(1)
            other_key[to] = key[i]
            other_edge[to] = edge[i]
        key, other_key = other_key, key
        edge, other_edge = other_edge, edge
    return key, edge, other_key, other_edge


@_compiled
def _breadth_first(links, root, width, order, parent):  # type: ignore[no-untyped-def]
    offsets, backward = (width, -width, 1, -1), (2, 1, 8, 4)
    back = np.zeros(links.shape[1], np.uint8)  # the bit that leads to the parent
    for b in range(links.shape[0]):
        order[b, 0] = root
        filled = 1
        for i in range(links.shape[1]):
            here = order[b, i]
            left = links[b, here] & ~back[i]
            for d in range(4):
                if left >> d & 1:
                    order[b, filled] = here + offsets[d]
                    parent[b, filled] = i
                    back[filled] = backward[d]
                    filled += 1


def _arrays(*tensors: Tensor) -> tuple[Any, ...]:
    """Planes (B, C, N) and arrays of nodes as they lie in memory; positions unsigned, which spares a test per access."""
    found = [t.detach().contiguous().numpy() for t in tensors]
    return tuple(a.view(np.uint32) if a.dtype == np.int32 else a for a in found)


def filter_value(
    feature: Tensor, guide: Tensor, order: Tensor, parent: Tensor, sigma: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """F(x), and in the order of the nodes what the gradient needs: a (B, N), A and O of (x, 1), (B, N, C + 1)."""
    batch, channels, height, width = feature.shape
    result = torch.empty(feature.shape, dtype=feature.dtype)
    affinity = feature.new_empty(batch, height * width)
    up = feature.new_empty(batch, height * width, channels + 1)
    down = torch.empty_like(up)
    _value(*_arrays(feature.flatten(2), guide.flatten(2), order, parent), sigma,
           result.flatten(2).numpy(), affinity.numpy(), up.numpy(), down.numpy())  # fmt: skip
    return result, affinity, up, down


def filter_gradient(
    grad: Tensor, guide: Tensor | None, order: Tensor, parent: Tensor, affinity: Tensor, up: Tensor | None,
    down: Tensor, sigma: float,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dL/dx and dL/de from dL/dF; without a guide only the first."""
    to_feature = torch.empty(grad.shape, dtype=grad.dtype)
    given = _arrays(grad.flatten(2), order, parent, affinity, down)
    if guide is None or up is None:
        _gradient_of_feature(*given, to_feature.flatten(2).numpy())
        return to_feature, None
    to_guide = torch.zeros(guide.shape, dtype=guide.dtype)
    _gradient(*given, *_arrays(up, guide.flatten(2)), sigma, to_feature.flatten(2).numpy(), to_guide.flatten(2).numpy())
    return to_feature, to_guide


@_compiled
def _value(feature, guide, order, parent, sigma, result, affinity, up, down):  # type: ignore[no-untyped-def]
    batch, channels, pixels = feature.shape
    scale = feature.dtype.type(-1 / sigma)
    one = feature.dtype.type(1)
    for b in range(batch):
        for i in range(pixels):
            here, above = order[b, i], order[b, parent[b, i]]
            distance = feature.dtype.type(0)
            for k in range(guide.shape[1]):
                distance += (guide[b, k, here] - guide[b, k, above]) ** 2
            affinity[b, i] = np.exp(scale * distance)
            for c in range(channels):
                up[b, i, c] = feature[b, c, here]
            up[b, i, channels] = one
        affinity[b, 0] = 0
        for i in range(pixels - 1, 0, -1):  # A_i = x_i + Σ a_c A_c over the children
            for c in range(channels + 1):
                up[b, parent[b, i], c] += affinity[b, i] * up[b, i, c]
        for i in range(pixels):  # O_i = (1 - a_i²) A_i + a_i O_parent, F = O(x) / O(1)
            a = affinity[b, i]
            for c in range(channels + 1):
                above_value = a * down[b, parent[b, i], c] if i else feature.dtype.type(0)
                down[b, i, c] = (one - a * a) * up[b, i, c] + above_value
            for c in range(channels):
                result[b, c, order[b, i]] = down[b, i, c] / down[b, i, channels]


@_compiled
def _gradient_of_feature(grad, order, parent, affinity, down, to_feature):  # type: ignore[no-untyped-def]
    """dL/dx = S ḡ with ḡ = g / O(1)."""
    batch, channels, pixels = grad.shape
    upper = np.empty((pixels, channels), grad.dtype)
    one = grad.dtype.type(1)
    for b in range(batch):
        for i in range(pixels):
            for c in range(channels):
                upper[i, c] = grad[b, c, order[b, i]] / down[b, i, channels]
        for i in range(pixels - 1, 0, -1):
            for c in range(channels):
                upper[parent[b, i], c] += affinity[b, i] * upper[i, c]
        for i in range(pixels):  # from here on `upper` holds O(ḡ)
            a = affinity[b, i]
            for c in range(channels):
                if i:
                    upper[i, c] = (one - a * a) * upper[i, c] + a * upper[parent[b, i], c]
                to_feature[b, c, order[b, i]] = upper[i, c]


@_compiled
def _gradient(grad, order, parent, affinity, down, up, guide, sigma, to_feature, to_guide):  # type: ignore[no-untyped-def]
    """dL/dx, and through da = Σ A(u)_i (O(v)_p - a A(v)_i) + A(v)_i (O(u)_p - a A(u)_i), u = (ḡ, h), v = (x, 1), dL/de."""
    batch, channels, pixels = grad.shape
    upper = np.empty((pixels, channels + 1), grad.dtype)  # A(u), then O(u)
    one = grad.dtype.type(1)
    scale = grad.dtype.type(-2 / sigma)
    for b in range(batch):
        for i in range(pixels):
            norm = one / down[b, i, channels]
            h = grad.dtype.type(0)
            for c in range(channels):
                upper[i, c] = grad[b, c, order[b, i]] * norm
                h -= upper[i, c] * down[b, i, c] * norm
            upper[i, channels] = h
        for i in range(pixels - 1, 0, -1):
            for c in range(channels + 1):
                upper[parent[b, i], c] += affinity[b, i] * upper[i, c]
        for i in range(pixels):
            a, p = affinity[b, i], parent[b, i]
            here, above = order[b, i], order[b, p]
            if i:
                by_affinity = grad.dtype.type(0)
                for c in range(channels + 1):
                    lower, edge = upper[i, c], down[b, p, c] - a * up[b, i, c]
                    edge_u = upper[p, c] - a * lower
                    by_affinity += lower * edge + up[b, i, c] * edge_u
                    upper[i, c] = lower + a * edge_u  # (1 - a²) A + a O_p
                by_distance = scale * a * by_affinity
                for k in range(guide.shape[1]):
                    step = by_distance * (guide[b, k, here] - guide[b, k, above])
                    to_guide[b, k, here] += step
                    to_guide[b, k, above] -= step
            for c in range(channels):
                to_feature[b, c, here] = upper[i, c]
