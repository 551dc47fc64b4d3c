"""Dual attention of FedLPPA: every position looks at all positions, every channel at all channels, and both are added.

Source: arXiv 2402.17502 and its official code. B batch, D channels, N = h w positions, x (B, D, h, w) taken as X (B, D, N).
Symbols: SAB → `SpatialAttention`, CAB → `ChannelAttention`, M → attention, v → value, γ → gamma (0 at first).

    SAB(x)_i = γ Σ_j M_ij v_j + x_i,  M = softmax over j of q_i · k_j
    CAB(x)   = γ M X + X,             M = softmax of rowmax(E) - E by rows, E = X Xᵀ
    A(x)     = SAB(x) + CAB(x),       2 x at first

Both softmaxes have unscaled scores, which grow with N and with the channels: they are computed in float32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

REDUCTION = 8  # query and key have D / 8 channels (official code)


def spatial_mix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Σ_j M_ij v_j with M_ij = softmax over j of q_i · k_j. query, key (B, d, N), value (B, D, N). Out: (B, D, N)."""
    attention = (query.transpose(1, 2) @ key).softmax(dim=2)
    return value @ attention.transpose(1, 2)


def channel_mix(maps: Tensor) -> Tensor:
    """M X with M = softmax by rows of rowmax(E) - E, E = X Xᵀ: channels unlike a channel count most. (B, D, N) to (B, D, N)."""
    energy = maps @ maps.transpose(1, 2)
    return (-energy).softmax(dim=2) @ maps  # a softmax does not see what is added to a whole row


def _widened(value: Tensor) -> Tensor:
    """(B, D, h, w) to (B, D, N), float32 at least."""
    return value.flatten(2).to(torch.promote_types(value.dtype, torch.float32))


class SpatialAttention(nn.Module):
    """SAB: query by a 1x3 and key by a 3x1 convolution, each with BatchNorm and ReLU, value by a 1x1 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = max(1, channels // REDUCTION)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.query = _scorer(channels, reduced, (1, 3))
        self.key = _scorer(channels, reduced, (3, 1))
        self.value = nn.Conv2d(channels, channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, D, h, w) to (B, D, h, w)."""
        query, key, value = (_widened(layer(maps)) for layer in (self.query, self.key, self.value))
        with torch.autocast(maps.device.type, enabled=False):
            mixed = spatial_mix(query, key, value)
        return self.gamma * mixed.view_as(maps) + maps


class ChannelAttention(nn.Module):
    """CAB: nothing is learned but γ."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, maps: Tensor) -> Tensor:
        """(B, D, h, w) to (B, D, h, w)."""
        with torch.autocast(maps.device.type, enabled=False):
            mixed = channel_mix(_widened(maps))
        return self.gamma * mixed.view_as(maps) + maps


class DualAttention(nn.Module):
    """A(x) = SAB(x) + CAB(x). D = 64: 7,282 parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.sab = SpatialAttention(channels)
        self.cab = ChannelAttention()

    def forward(self, maps: Tensor) -> Tensor:
        """(B, D, h, w) to (B, D, h, w)."""
        summed: Tensor = self.sab(maps) + self.cab(maps)
        return summed


def _scorer(channels: int, reduced: int, kernel: tuple[int, int]) -> nn.Sequential:
    padding = (kernel[0] // 2, kernel[1] // 2)
    return nn.Sequential(
        nn.Conv2d(channels, reduced, kernel, padding=padding), nn.BatchNorm2d(reduced), nn.ReLU(inplace=True)
    )
