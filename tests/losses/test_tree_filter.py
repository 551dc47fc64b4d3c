"""Tree filter: the tree against SciPy, the filter against path products worked out pair by pair, gradients, ties and degenerate images.

Every test of the filter runs with the compiled loops and with the tensor operations that take over on CUDA.
"""

from __future__ import annotations

import builtins
import logging
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import minimum_spanning_tree as scipy_tree
from torch import Tensor

from fedmed.losses import tree_doubling, tree_kernels
from fedmed.losses import tree_filter as module
from fedmed.losses.tree_filter import Tree, edge_weights, minimum_spanning_tree, tree_filter, tree_from_edges

BACKENDS = {"compiled": tree_kernels, "doubling": tree_doubling}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(module, "_backend", lambda device: BACKENDS[request.param])
    return str(request.param)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def grid_edges(height: int, width: int) -> np.ndarray:
    """(E, 2): vertical edges row by row, then horizontal ones."""
    pixel = np.arange(height * width).reshape(height, width)
    down = np.stack([pixel[:-1].ravel(), pixel[1:].ravel()], axis=1)
    right = np.stack([pixel[:, :-1].ravel(), pixel[:, 1:].ravel()], axis=1)
    return np.concatenate([down, right])


def naive_filter(feature: Tensor, guide: Tensor, sigma: float, tree: Tree) -> Tensor:
    """F by the definition: for every pair the product of the affinities along the path, differentiable. O(N²)."""
    batch, channels, height, width = feature.shape
    results = []
    for b in range(batch):
        e, edges = guide[b].flatten(1), tree.edges()[b].tolist()
        neighbours: dict[int, list[int]] = {i: [] for i in range(height * width)}
        for u, v in edges:
            neighbours[u].append(v)
            neighbours[v].append(u)
        rows = []
        for start in range(height * width):
            product: dict[int, Tensor] = {start: feature.new_ones(())}
            open_nodes = [start]
            while open_nodes:
                u = open_nodes.pop()
                for v in neighbours[u]:
                    if v not in product:
                        product[v] = product[u] * torch.exp(-(e[:, u] - e[:, v]).square().sum() / sigma)
                        open_nodes.append(v)
            rows.append(torch.stack([product[i] for i in range(height * width)]))
        paths = torch.stack(rows)
        results.append((feature[b].flatten(1) @ paths.T / paths.sum(dim=1)).view(channels, height, width))
    return torch.stack(results)


# ---------------------------------------------------------------------- tree


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 2), (9, 14), (33, 20)])
def test_tree_has_the_least_weight(backend: str, size: tuple[int, int]) -> None:
    guide = normal(3, 2, *size)
    tree, weights, ends = minimum_spanning_tree(guide), edge_weights(guide).numpy(), grid_edges(*size)
    pixels = size[0] * size[1]
    for b in range(3):
        graph = coo_array((weights[b] + 1, (ends[:, 0], ends[:, 1])), shape=(pixels, pixels)).tocsr()
        expected = {(min(u, v), max(u, v)) for u, v in zip(*scipy_tree(graph).nonzero(), strict=True)}
        assert {tuple(edge) for edge in tree.edges()[b].tolist()} == expected


def test_order_and_parents(backend: str) -> None:
    tree = minimum_spanning_tree(normal(2, 1, 8, 11, dtype=torch.float32))
    assert tree.order.dtype == tree.parent.dtype == torch.int32
    assert (tree.order[:, 0] == 4 * 11 + 5).all() and (tree.parent[:, 0] == 0).all()
    assert torch.equal(tree.order.sort(dim=1).values, torch.arange(88).expand(2, -1).int())
    assert (tree.parent[:, 1:] < torch.arange(1, 88)).all()  # parents first
    pairs = tree.edges()
    assert set((pairs[..., 1] - pairs[..., 0]).flatten().tolist()) == {1, 11}


def test_ties_go_to_the_earlier_edge(backend: str) -> None:
    tree = minimum_spanning_tree(torch.full((1, 3, 3, 4), 0.7))
    columns = [[r * 4 + c, (r + 1) * 4 + c] for r in range(2) for c in range(4)]
    assert tree.edges()[0].tolist() == sorted([*columns, [0, 1], [1, 2], [2, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ways_give_the_same_tree(dtype: torch.dtype) -> None:
    for guide in (
        normal(2, 2, 40, 37, dtype=dtype),
        (3 * normal(2, 1, 40, 37, dtype=dtype)).round(),
    ):  # few ties, many ties
        weights = edge_weights(guide)
        links = tree_kernels.spanning_links(weights, 40, 37)
        assert torch.equal(links, tree_doubling.spanning_links(weights, 40, 37))
        one, other = (Tree(*b.orient(links, 40, 37), height=40, width=37) for b in BACKENDS.values())  # type: ignore[misc]
        assert torch.equal(one.edges(), other.edges())


def test_weights_sort_like_numbers() -> None:
    """The radix sort sees bit patterns: zero, subnormal, huge, infinite and NaN weights, and all orders of magnitude."""
    weights = torch.tensor([[0.0, 1e-42, 3.0, math.inf, 1e-3, math.nan, 1e30, 1e-3, 2.9999, 0.0, 1e8, 5e-39]])
    links = tree_kernels.spanning_links(weights, 3, 3)
    assert torch.equal(links, tree_doubling.spanning_links(weights, 3, 3))
    wide = torch.exp(20 * normal(1, 2 * 30 * 30 - 60, dtype=torch.float32))
    assert torch.equal(tree_kernels.spanning_links(wide, 30, 30), tree_doubling.spanning_links(wide, 30, 30))


def test_given_edges_are_rooted(backend: str) -> None:
    tree = minimum_spanning_tree(normal(2, 1, 5, 6))
    shuffled = tree.edges()[:, torch.randperm(29, generator=torch.Generator().manual_seed(0))].flip(2)
    again = tree_from_edges(shuffled, 5, 6)
    assert torch.equal(again.edges(), tree.edges()) and torch.equal(again.order, tree.order)
    column = tree_from_edges(torch.tensor([[[0, 1], [2, 1]]]), 3, 1)
    assert column.order.tolist() == [[1, 2, 0]] or column.order.tolist() == [[1, 0, 2]]
    assert tree_from_edges(torch.zeros(2, 0, 2, dtype=torch.long), 1, 1).order.tolist() == [[0], [0]]


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([[0, 1], [1, 3]], "shape"),
        ([[0, 1], [1, 3], [0, 3]], "neighbours"),
        ([[0, 1], [1, 2], [2, 3]], "neighbours"),
        ([[0, 1], [1, 3], [3, 5]], "neighbours"),
        ([[0, 1], [2, 3], [1, 0]], "cycle"),
    ],
)
def test_edges_that_are_no_tree(edges: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tree_from_edges(torch.tensor([edges]), 2, 2)


# -------------------------------------------------------------------- filter


def test_chain_by_hand(backend: str) -> None:
    """Affinities 1/2: F of (1, 0, 0) is (1, 1/2, 1/4) over (1.75, 2, 1.75)."""
    guide = math.sqrt(math.log(2)) * torch.arange(3, dtype=torch.float64).view(1, 1, 1, 3)
    result = tree_filter(torch.tensor([[[[1.0, 0.0, 0.0]]]], dtype=torch.float64), guide, 1.0)
    assert result.flatten().tolist() == pytest.approx([1 / 1.75, 0.25, 0.25 / 1.75], abs=1e-14)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 1, 5), (2, 3, 5, 1), (2, 2, 4, 5), (1, 4, 6, 6)])
def test_against_path_products(backend: str, shape: tuple[int, ...]) -> None:
    feature = normal(*shape).requires_grad_()
    guide = normal(shape[0], 2, *shape[2:], seed=1).requires_grad_()
    tree, upstream = minimum_spanning_tree(guide), normal(*shape, seed=2)
    fast, slow = tree_filter(feature, guide, 0.8), naive_filter(feature, guide, 0.8, tree)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    grads = torch.autograd.grad(fast, (feature, guide), upstream)
    expected = torch.autograd.grad(slow, (feature, guide), upstream, allow_unused=True)
    torch.testing.assert_close(grads[0], expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        grads[1], torch.zeros_like(guide) if expected[1] is None else expected[1], rtol=0, atol=1e-12
    )


def test_gradient_check(backend: str) -> None:
    feature, guide = normal(2, 3, 4, 3).requires_grad_(), (0.5 * normal(2, 2, 4, 3, seed=1)).requires_grad_()
    tree = minimum_spanning_tree(guide)
    assert torch.autograd.gradcheck(lambda x, e: tree_filter(x, e, 0.7, tree), (feature, guide))
    assert torch.autograd.gradcheck(lambda x: tree_filter(x, guide.detach(), 0.7, tree), (feature,))


def test_both_ways_agree_on_a_larger_image(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chosen in BACKENDS.values():
        monkeypatch.setattr(module, "_backend", lambda device, chosen=chosen: chosen)
        feature, guide = normal(2, 2, 50, 61).requires_grad_(), (0.3 * normal(2, 3, 50, 61, seed=1)).requires_grad_()
        result = tree_filter(feature, guide, 1.0)
        found.append((result, *torch.autograd.grad(result, (feature, guide), normal(2, 2, 50, 61, seed=2))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_single_precision(backend: str) -> None:
    feature, guide = normal(1, 2, 96, 96), normal(1, 2, 96, 96, seed=1)
    guide = guide.float().double()  # the same tree
    found = []
    for dtype in (torch.float64, torch.float32):
        x, e = feature.to(dtype).requires_grad_(), guide.to(dtype).requires_grad_()
        result = tree_filter(x, e, 1.0, minimum_spanning_tree(guide))
        assert result.dtype == dtype
        found.append([t.detach().double() for t in (result, *torch.autograd.grad(result, (x, e), feature.to(dtype)))])
    for exact, single in zip(*found, strict=True):
        assert float((exact - single).abs().max() / exact.abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_worked_out_in_single(backend: str, dtype: torch.dtype) -> None:
    feature = normal(1, 2, 12, 12).to(dtype).requires_grad_()
    guide = normal(1, 1, 12, 12, seed=1).to(dtype)
    result = tree_filter(feature, guide, 0.5)
    assert result.dtype == dtype
    assert torch.equal(result, tree_filter(feature.float(), guide.float(), 0.5).to(dtype))
    assert torch.autograd.grad(result.sum(), feature)[0].dtype == dtype


def test_constant_guide_gives_the_mean(backend: str) -> None:
    feature = normal(2, 3, 9, 8).requires_grad_()
    guide = torch.full((2, 1, 9, 8), 0.4, dtype=torch.float64, requires_grad=True)
    result = tree_filter(feature, guide, 0.02)
    torch.testing.assert_close(result, feature.mean(dim=(2, 3), keepdim=True).expand_as(feature), rtol=0, atol=1e-13)
    to_feature, to_guide = torch.autograd.grad(result.sum(), (feature, guide))
    torch.testing.assert_close(to_feature, torch.ones_like(feature), rtol=0, atol=1e-12)
    assert float(to_guide.abs().max()) < 1e-12


def test_far_apart_pixels_keep_their_values(backend: str) -> None:
    """Affinities that underflow cut the tree; nothing divides by zero."""
    guide = (1e3 * torch.arange(12.0).view(1, 1, 3, 4)).requires_grad_()
    feature = normal(1, 2, 3, 4, dtype=torch.float32).requires_grad_()
    result = tree_filter(feature, guide, 0.02)
    assert torch.equal(result, feature)
    to_feature, to_guide = torch.autograd.grad(result.sum(), (feature, guide))
    assert torch.equal(to_feature, torch.ones_like(feature)) and not to_guide.any()


def test_invariances(backend: str) -> None:
    feature, guide = normal(3, 2, 6, 7), normal(3, 2, 6, 7, seed=1)
    kept = feature.clone(), guide.clone()
    result = tree_filter(feature, guide, 1.0)
    assert torch.equal(feature, kept[0]) and torch.equal(guide, kept[1])
    swapped = [2, 0, 1]
    assert torch.equal(tree_filter(feature[swapped], guide[swapped], 1.0), result[swapped])
    torch.testing.assert_close(tree_filter(3 * feature + 1, guide, 1.0), 3 * result + 1)
    strided = feature.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not strided.is_contiguous() and torch.equal(tree_filter(strided, guide, 1.0), result)
    torch.testing.assert_close(
        tree_filter(feature.flip(2).transpose(2, 3), guide.flip(2).transpose(2, 3), 1.0), result.flip(2).transpose(2, 3)
    )
    assert (result <= feature.amax(dim=(2, 3), keepdim=True)).all() and (
        result >= feature.amin(dim=(2, 3), keepdim=True)
    ).all()
    assert tree_filter(feature[:0], guide[:0], 1.0).shape == (0, 2, 6, 7)


def test_same_bits_every_time(backend: str) -> None:
    guide = (4 * normal(2, 1, 30, 30, dtype=torch.float32)).round().requires_grad_()  # many ties
    feature = normal(2, 2, 30, 30, dtype=torch.float32).requires_grad_()
    runs = [tree_filter(feature, guide, 1.0) for _ in range(2)]
    grads = [torch.autograd.grad(r.square().sum(), (feature, guide)) for r in runs]
    assert torch.equal(*runs) and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_arguments() -> None:
    feature, guide = normal(1, 2, 3, 4), normal(1, 1, 3, 4)
    with pytest.raises(ValueError, match="must agree"):
        tree_filter(feature, normal(1, 1, 4, 3), 1.0)
    for sigma in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="sigma"):
            tree_filter(feature, guide, sigma)
    with pytest.raises(ValueError, match="tree of"):
        tree_filter(feature, guide, 1.0, minimum_spanning_tree(normal(1, 1, 4, 3)))


# ------------------------------------------------------------------- backend


def test_numba_is_loaded_late() -> None:
    code = "import sys, fedmed.losses.tree_energy; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_numba(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    real = builtins.__import__

    def no_numba(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "fedmed.losses" and "tree_kernels" in (args[2] or ()):
            raise ImportError("No module named 'numba'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_numba)
    module._backend.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="fedmed.losses"):
            found = [tree_filter(normal(1, 2, 5, 5), normal(1, 1, 5, 5, seed=1), 1.0) for _ in range(2)]
        assert [r.levelname for r in caplog.records] == ["WARNING"] and "pip install numba" in caplog.text
    finally:
        monkeypatch.undo()
        module._backend.cache_clear()
    torch.testing.assert_close(found[0], tree_filter(normal(1, 2, 5, 5), normal(1, 1, 5, 5, seed=1), 1.0))
