"""The tree filter in tensor operations with log(depth) steps: for CUDA, and for the CPU without numba.

Same functions as `tree_kernels`. B images of N = H·W pixels are one forest of B·N nodes. With W[i, parent(i)] = a_i the
path affinities are S = (I - W)^-1 diag(1 - a²) (I - Wᵀ)^-1, and (I - W)^-1 = Π_s (I + W^(2^s)), where W^(2^s) has one entry
per node as well: the product of a over 2^s steps towards the root, at the node these steps lead to.

Trees are the same in every run. Sums over children use `index_add`, whose order on CUDA is free (rounding) unless
torch.use_deterministic_algorithms is on.
"""

from __future__ import annotations

import torch
from torch import Tensor

REVERSE = (1, 0, 3, 2)  # directions down, up, right, left are the bits 0 ... 3 of a link byte


# ------------------------------------------------------------------------------------------------------------- tree


def spanning_links(weights: Tensor, height: int, width: int) -> Tensor:
    """Minimum spanning trees of the grid as one byte per pixel (bits of `tree_filter`). weights (B, E) >= 0 → (B, N) uint8.

    Borůvka: every component takes its least edge, by (weight, index), until one is left; at most log2(N) rounds.
    """
    batch, edges = weights.shape
    pixels = height * width
    first, second, bits = _grid(height, width, weights.device)
    links = torch.zeros(batch * pixels, dtype=torch.int32, device=weights.device)
    by_rank = weights.sort(dim=1, stable=True).indices
    image = torch.arange(batch, device=weights.device).unsqueeze(1)
    u, v = ((image * pixels + end[by_rank]).flatten() for end in (first, second))
    bit_u, bit_v = (bit[by_rank].flatten() for bit in bits)
    component = torch.arange(batch * pixels, device=weights.device)
    rank = torch.arange(batch * edges, device=weights.device)  # left edges, ascending within an image
    while True:
        at_u, at_v = component[u[rank]], component[v[rank]]
        between = at_u != at_v
        rank, at_u, at_v = rank[between], at_u[between], at_v[between]
        if rank.numel() == 0:
            return links.view(batch, pixels).to(torch.uint8)
        least = torch.full_like(component, batch * edges)
        least = least.scatter_reduce(0, at_u, rank, "amin").scatter_reduce(0, at_v, rank, "amin")
        owner = (least < batch * edges).nonzero().squeeze(1)
        chosen = least[owner]
        there = component[u[chosen]] + component[v[chosen]] - owner  # the other end's component
        hook = torch.arange(batch * pixels, device=weights.device)
        hook[owner] = there
        mutual = (hook[there] == owner) & (owner < there)  # two that chose one edge: the smaller one is the root
        hook[owner[mutual]] = owner[mutual]
        added = chosen[~mutual]
        links = links.index_add(0, u[added], bit_u[added]).index_add(0, v[added], bit_v[added])
        while not torch.equal(further := hook[hook], hook):
            hook = further
        component = hook[component]


def _grid(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Ends (E,) of the edges in the order of `edge_weights`, and the bits of the edge in the bytes of the two ends."""
    pixel = torch.arange(height * width, device=device).view(height, width)
    first = torch.cat([pixel[:-1].flatten(), pixel[:, :-1].flatten()])
    second = torch.cat([pixel[1:].flatten(), pixel[:, 1:].flatten()])
    bit = torch.ones_like(first, dtype=torch.int32)
    bit[(height - 1) * width :] = 4
    return first, second, (bit, 2 * bit)


def orient(links: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Depth-first order from the central pixel, and the positions of the parents. (B, N) uint8 → twice (B, N) int32.

    The tour around the tree visits each edge in both directions; how far it is from its end follows by doubling, and the
    direction that comes first leads away from the root.
    """
    batch, pixels = links.shape
    nodes = torch.arange(batch * pixels, device=links.device).unsqueeze(1)
    root = (height // 2) * width + width // 2
    byte = links.flatten().long()
    direction = torch.arange(4, device=links.device)
    present = (byte.unsqueeze(1) >> direction & 1).bool()
    there = torch.where(present, nodes + torch.tensor([width, -width, 1, -1], device=links.device), nodes)
    following = torch.tensor([[_next_bit(mask, d) for d in range(4)] for mask in range(16)], device=links.device)
    reverse = torch.tensor(REVERSE, device=links.device)
    back = 4 * there + reverse  # the same edge from its other end
    own = 4 * nodes + direction
    step = torch.where(present, 4 * there + following[byte[there], reverse], own)
    roots = nodes[root::pixels, 0]
    start = 4 * roots + following[byte[roots], 3]
    ends = (step == start.repeat_interleave(pixels).unsqueeze(1)) & present
    step = torch.where(ends, own, step).flatten()
    left = (step != own.flatten()).long()
    for _ in range((2 * pixels).bit_length()):
        left, step = left + left[step], step[step]
    left = left.view(-1, 4)
    away = present & (left > left.flatten()[back])
    entered = torch.full((batch * pixels,), 4 * pixels, device=links.device)
    entered[there[away]] = left[away]
    above = nodes.squeeze(1).clone()
    above[there[away]] = nodes.expand(-1, 4)[away]
    order = entered.view(batch, pixels).argsort(dim=1, descending=True, stable=True)
    position = torch.empty_like(order).scatter_(1, order, nodes[:pixels].T.expand(batch, -1).contiguous())
    above = above.view(batch, pixels) - nodes.view(batch, pixels)[:, :1]
    return order.int(), position.gather(1, above.gather(1, order)).int()


def _next_bit(mask: int, bit: int) -> int:
    """The next set bit of four after `bit`, around the corner; 0 for an empty mask."""
    return next((d % 4 for d in range(bit + 1, bit + 5) if mask >> d % 4 & 1), 0)


# ----------------------------------------------------------------------------------------------------------- filter


class _Forest:
    """Up and down sweeps over B trees: W^(2^s) for s = 0, 1, ... as pairs (a_s, p_s) of (B·N, 1) and (B·N,)."""

    def __init__(self, affinity: Tensor, parent: Tensor) -> None:
        batch, pixels = parent.shape
        offset = pixels * torch.arange(batch, device=parent.device).unsqueeze(1)
        self.parent = (parent.long() + offset).flatten()
        self.affinity = affinity.reshape(-1, 1)
        self.powers = [(self.affinity, self.parent)]
        root = offset.expand_as(parent).flatten()
        while not torch.equal(self.powers[-1][1], root):
            a, p = self.powers[-1]
            self.powers.append((a * a[p], p[p]))

    def up(self, x: Tensor) -> Tensor:
        """A = (I - Wᵀ)^-1 x: A_i = x_i + Σ a_c A_c over the children. (B·N, C) → same."""
        for a, p in self.powers:
            x = x.index_add(0, p, a * x)
        return x

    def down(self, up: Tensor) -> Tensor:
        """O = (I - W)^-1 (1 - a²) A: O_i = (1 - a_i²) A_i + a_i O_parent. (B·N, C) → same."""
        x = (1 - self.affinity.square()) * up
        for a, p in self.powers:
            x = x + a * x[p]
        return x


def _to_nodes(maps: Tensor, order: Tensor) -> Tensor:
    """(B, C, H, W) → (B·N, C) in the order of the nodes."""
    flat = maps.flatten(2)
    return flat.gather(2, order.long().unsqueeze(1).expand_as(flat)).transpose(1, 2).flatten(0, 1)


def _to_maps(nodes: Tensor, order: Tensor, like: Tensor) -> Tensor:
    """(B·N, C) in the order of the nodes → (B, C, H, W)."""
    flat = nodes.view(*order.shape, -1).transpose(1, 2)
    return torch.empty_like(flat).scatter_(2, order.long().unsqueeze(1).expand_as(flat), flat).reshape(like.shape)


def filter_value(
    feature: Tensor, guide: Tensor, order: Tensor, parent: Tensor, sigma: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """F(x), and in the order of the nodes what the gradient needs: a (B, N), A and O of (x, 1), (B, N, C + 1)."""
    batch, pixels = order.shape
    e, x = _to_nodes(guide, order), _to_nodes(feature, order)
    nodes = (parent.long() + pixels * torch.arange(batch, device=parent.device).unsqueeze(1)).flatten()
    affinity = (-(e - e[nodes]).square().sum(dim=1) / sigma).exp().view(batch, pixels).to(x.dtype)
    affinity[:, 0] = 0
    forest = _Forest(affinity, parent)
    up = forest.up(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
    down = forest.down(up)
    shape = (batch, pixels, -1)
    return _to_maps(down[:, :-1] / down[:, -1:], order, feature), affinity, up.view(shape), down.view(shape)


def filter_gradient(
    grad: Tensor, guide: Tensor | None, order: Tensor, parent: Tensor, affinity: Tensor, up: Tensor | None,
    down: Tensor, sigma: float,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dL/dx = S ḡ, ḡ = g / O(1), and through a dL/de; without a guide only the first.

    da_i = Σ A(u)_i (O(v)_p - a_i A(v)_i) + A(v)_i (O(u)_p - a_i A(u)_i) over the pairs (u, v) = (ḡ_c, x_c) and (h, 1),
    h = -Σ_c ḡ_c F_c.
    """
    forest, down = _Forest(affinity, parent), down.flatten(0, 1)
    u = _to_nodes(grad, order) / down[:, -1:]
    if guide is None or up is None:
        return _to_maps(forest.down(forest.up(u)), order, grad), None
    u = torch.cat([u, -(u * down[:, :-1] / down[:, -1:]).sum(dim=1, keepdim=True)], dim=1)
    up_u, up_v = forest.up(u), up.flatten(0, 1)
    down_u, a, p = forest.down(up_u), forest.affinity, forest.parent
    by_affinity = up_u * (down[p] - a * up_v) + up_v * (down_u[p] - a * up_u)
    by_distance = -a / sigma * by_affinity.sum(dim=1, keepdim=True)
    e = _to_nodes(guide, order)
    along = 2 * by_distance * (e - e[p])
    to_guide = along.index_add(0, p, -along)
    return _to_maps(down_u[:, :-1], order, grad), _to_maps(to_guide, order, guide)
