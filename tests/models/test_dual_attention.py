"""Dual attention: hand-worked values, a naive twin, the identity it starts as, and large scores."""

from __future__ import annotations

import math

import pytest
import torch

from fedmed.models.dual_attention import ChannelAttention, DualAttention, SpatialAttention, channel_mix, spatial_mix


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def set_gammas(module: torch.nn.Module, value: float) -> None:
    for name, parameter in module.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.constant_(parameter, value)


def test_it_starts_as_twice_the_input() -> None:
    maps = drawn(2, 16, 3, 4)
    for mode in (True, False):
        module = DualAttention(16).double().train(mode)
        assert torch.equal(module(maps), 2 * maps)


def test_channel_mix_by_hand() -> None:
    """One position, x = (1, 2): E' rows (1, 0) and (2, 0)."""
    mixed = channel_mix(torch.tensor([[[1.0], [2.0]]], dtype=torch.float64)).flatten()
    first, second = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    assert mixed.tolist() == pytest.approx([first + 2 * (1 - first), second + 2 * (1 - second)])
    assert mixed.tolist() == pytest.approx([1.2689, 1.1192], abs=1e-4)


def test_spatial_mix_by_hand() -> None:
    """Two positions: q = (1, 0), k = (0, ln 3), v = (1, 5). Scores of position 0: 0 and ln 3; of position 1: 0 and 0."""
    rows = ([1.0, 0.0], [0.0, math.log(3)], [1.0, 5.0])
    query, key, value = (torch.tensor([[row]], dtype=torch.float64) for row in rows)
    assert spatial_mix(query, key, value).flatten().tolist() == pytest.approx([(1 + 3 * 5) / 4, 3.0])


def test_naive_twin() -> None:
    query, key, value = drawn(1, 2, 5, seed=1), drawn(1, 2, 5, seed=2), drawn(1, 3, 5, seed=3)
    spatial, channel = torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.float64)
    for i in range(5):
        weights = torch.tensor([math.exp(float(query[0, :, i] @ key[0, :, j])) for j in range(5)], dtype=torch.float64)
        spatial[:, i] = sum(weights[j] * value[0, :, j] for j in range(5)) / weights.sum()
    for c in range(3):
        energy = [float(value[0, c] @ value[0, d]) for d in range(3)]
        weights = torch.tensor([math.exp(max(energy) - e) for e in energy], dtype=torch.float64)
        channel[c] = sum(weights[d] * value[0, d] for d in range(3)) / weights.sum()
    torch.testing.assert_close(spatial_mix(query, key, value)[0], spatial, rtol=0, atol=1e-12)
    torch.testing.assert_close(channel_mix(value)[0], channel, rtol=0, atol=1e-12)


def test_gradients() -> None:
    query, key, value = (drawn(1, d, 3, seed=d).requires_grad_() for d in (1, 1, 2))
    assert torch.autograd.gradcheck(spatial_mix, (query, key, value))
    assert torch.autograd.gradcheck(channel_mix, (value,))


def test_the_order_of_positions_and_channels_carries_over() -> None:
    maps, positions, channels = drawn(2, 4, 6), torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        spatial_mix(*(maps[:, :, positions],) * 3), spatial_mix(maps, maps, maps)[:, :, positions]
    )
    torch.testing.assert_close(channel_mix(maps[:, channels]), channel_mix(maps)[:, channels])


def test_parameters_and_few_channels() -> None:
    assert sum(p.numel() for p in DualAttention(64).parameters()) == 7282
    for channels in (1, 4):  # less than one eighth: one channel for query and key
        module = DualAttention(channels).double()
        assert module.sab.query[0].out_channels == 1
        set_gammas(module, 0.5)
        assert module(drawn(2, channels, 2, 2)).shape == (2, channels, 2, 2)


def test_blocks_are_added_and_both_learn() -> None:
    module = DualAttention(8).double().eval()
    set_gammas(module, 0.3)
    maps = drawn(2, 8, 3, 3)
    assert torch.equal(module(maps), module.sab(maps) + module.cab(maps))
    spatial, channel = SpatialAttention(8).double(), ChannelAttention().double()
    for block in (spatial, channel):
        block(maps).square().sum().backward()
        assert float(block.gamma.grad.abs()) > 0  # moves although it is 0
    assert all(float(p.grad.abs().max()) == 0 for n, p in spatial.named_parameters() if n != "gamma")


def test_large_scores_stay_finite_also_in_half_precision() -> None:
    maps = 1e4 * drawn(2, 8, 4, 4).float()
    module = DualAttention(8)
    set_gammas(module, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(maps)
    assert bool(found.isfinite().all())
    assert bool(channel_mix(torch.zeros(1, 3, 4)).eq(0).all())
