"""Segmentation from several modalities of which any may be missing: one encoder each, one fusion decoder for all subsets.

Our own small architecture. It has the parts that networks of this family have in common (RFNet, mmFormer: an encoder per
modality, a fusion decoder, and one uni-modal decoder shared by all modalities that regularises the encoders), but neither
their region-aware fusion nor transformers: a missing modality is left out of a mean.

M modalities, K = num_outputs, L = `depth` levels, level l with D_l = base_width 2^l channels and ceil(H / 2^l) x
ceil(W / 2^l) pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmed.errors import UserError
from fedmed.models.output import Output, channels_last

_NORM_GROUPS = 4  # at most; a group has at least two channels, so that it has a variance on a map of one pixel


def _norm(channels: int) -> nn.GroupNorm:
    """Normalise within an image: no batch statistics, hence nothing that depends on which images share a batch."""
    groups = next(g for g in range(min(_NORM_GROUPS, channels // 2), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


class ConvPair(nn.Sequential):
    """Two 3x3 convolutions with GroupNorm and ReLU, in -> out channels; the first one halves the maps with `stride` 2."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        # No bias: the normalisation has a shift of its own.
        self.add_module("conv1", nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False))
        self.add_module("norm1", _norm(out_channels))
        self.add_module("relu1", nn.ReLU(inplace=True))
        self.add_module("conv2", nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False))
        self.add_module("norm2", _norm(out_channels))
        self.add_module("relu2", nn.ReLU(inplace=True))


class Encoder(nn.Sequential):
    """The encoder of one modality: a `ConvPair` per level, all but the first at half the size of the level before."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__(*(ConvPair(a, b, 2 if i else 1) for i, (a, b) in enumerate(zip((1, *widths), widths))))  # noqa: B905

    def forward(self, image: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Map an image (B, 1, H, W) to the maps (B, D_l, H_l, W_l) of all levels, finest first."""
        maps: list[Tensor] = []
        for stage in self:
            maps.append(stage(maps[-1] if maps else image))
        return maps


class Decoder(nn.Module):
    """U-Net decoder: enlarge (bilinear, aligned corners), concatenate with the next finer maps, `ConvPair`; then 1x1.

    `ups.l` makes the maps of level l. `deep.(s - 1)` is the side output of level s; there are none without `deep`.
    """

    def __init__(self, widths: Sequence[int], num_outputs: int, deep: bool) -> None:
        super().__init__()
        levels = range(len(widths) - 1)
        self.ups = nn.ModuleList(ConvPair(widths[i + 1] + widths[i], widths[i]) for i in levels)
        self.deep = nn.ModuleList(nn.Conv2d(widths[i + 1], num_outputs, 1) for i in levels if deep)
        self.outc = nn.Conv2d(widths[0], num_outputs, 1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Give logits (B, K, H, W), features (B, D_0, H, W), and the side outputs, of maps (B, D_l, H_l, W_l), finest first."""
        states = [maps[-1]]  # of the levels, coarsest first
        for up, skip in zip(reversed(self.ups), reversed(maps[:-1]), strict=True):
            enlarged = F.interpolate(states[-1], size=skip.shape[-2:], mode="bilinear", align_corners=True)
            states.append(up(torch.cat([skip, enlarged], dim=1)))
        *coarse, features = states
        deep = [head(state) for head, state in zip(self.deep, reversed(coarse))]  # noqa: B905 (no heads: nothing)
        return self.outc(features), features, deep


class Shared(nn.Module):
    """What all modalities share: per level a 1x1 convolution behind the mean, the fusion decoder, the uni-modal decoder."""

    def __init__(self, widths: Sequence[int], num_outputs: int) -> None:
        super().__init__()
        self.mix = nn.ModuleList(
            nn.Sequential(nn.Conv2d(w, w, 1, bias=False), _norm(w), nn.ReLU(inplace=True)) for w in widths
        )
        self.fusion = Decoder(widths, num_outputs, deep=True)
        self.single = Decoder(widths, num_outputs, deep=False)


def presence(present: Tensor | None, images: Tensor) -> Tensor:
    """Availability (B, M) as booleans on the device of `images` (B, M, H, W); None: every modality of every image."""
    if present is None:
        return torch.ones(images.shape[:2], dtype=torch.bool, device=images.device)
    if present.shape != images.shape[:2]:
        raise ValueError(f"modality_present: expected shape {tuple(images.shape[:2])}, got {tuple(present.shape)}")
    return present.to(images.device) > 0


def present_mean(maps: Tensor, present: Tensor) -> Tensor:
    """Mean of maps (B, M, D, H, W) over the present modalities (B, M), 0/1; an item without any gives 0."""
    weight = (present > 0).to(maps.dtype)
    weight = weight / weight.sum(dim=1, keepdim=True).clamp_min(1)
    return (maps * weight[:, :, None, None, None]).sum(dim=1)


def only(present: Tensor, modality: int) -> Tensor:
    """Availability (B, M) of the same items when everything but one modality is dropped (all 0 where they lack that one)."""
    kept = torch.zeros_like(present)
    kept[:, modality] = present[:, modality]
    return kept


class MultiEncoderUNet(nn.Module):
    """U-Net with one encoder per modality, masked fusion by a mean at every level, deep supervision and a uni-modal decoder.

    In: images (B, M, H, W), one channel per modality, H and W at least `MIN_IMAGE_SIZE`, any parity;
    modality_present (B, M), 0/1 in any type. A missing modality has exactly no influence: its pixels are replaced by zeros
    (they may be anything, NaN too), its maps are zeros, and it enters neither sum nor count of the mean. Out: logits
    (B, K, H, W) of the fusion decoder; features (B, base_width, H, W), what enters its last 1x1 convolution;
    aux["deep"]: the L - 1 side outputs, finest first: number s = 1, 2, ... at list index s - 1 is (B, K, ceil(H / 2^s),
    ceil(W / 2^s)). An item without any modality is fused to zeros, so its logits are finite and say nothing.

    The uni-modal decoder (`decode_single`) and the side outputs enter no logits of `forward`; plain training leaves
    them as they are. No buffers: nothing but parameters travels. Groups `modality`: the M encoders in the order of the
    channels, then all that is shared. With three channels, one output and the defaults: 324 141 parameters.

    base_width: channels of the finest level, at least 2. depth: number of levels, 2 to 5. Raises `UserError` otherwise.
    """

    MIN_IMAGE_SIZE = 16
    TASKS = ("segmentation",)
    inputs: tuple[str, ...] = ("modality_present",)
    classifier_prefixes: tuple[str, ...] = ("shared.fusion.outc", "shared.fusion.deep", "shared.single.outc")

    def __init__(self, in_channels: int, num_outputs: int, base_width: int = 8, depth: int = 4) -> None:
        super().__init__()
        if base_width < 2:
            raise UserError(f"model.args.base_width: expected a whole number of at least 2, got {base_width}")
        if not 2 <= depth <= 5:
            raise UserError(f"model.args.depth: expected 2 to 5 levels, got {depth}")
        widths = [base_width * 2**level for level in range(depth)]
        self.num_modalities = in_channels
        self.encoders = nn.ModuleList(Encoder(widths) for _ in range(in_channels))
        self.shared = Shared(widths, num_outputs)
        ups = tuple(f"shared.fusion.ups.{level}" for level in reversed(range(depth - 1)))
        self.groups: dict[str, tuple[str, ...]] = {
            "modality": (*(f"encoders.{m}" for m in range(in_channels)), "shared"),
            # In the order of execution; what only serves training comes last.
            "depth": ("encoders", "shared.mix", *ups, "shared.fusion.outc", "shared.fusion.deep", "shared.single"),
        }

    def encode(self, images: Tensor, present: Tensor | None = None) -> list[Tensor]:
        """Run every encoder once: maps (B, M, D_l, H_l, W_l) of all levels, finest first, zeros where a modality is missing."""
        available = presence(present, images)
        shown = images.masked_fill(~available[:, :, None, None], 0)  # a product would let NaN through
        by_modality = [encoder(channels_last(shown[:, m : m + 1])) for m, encoder in enumerate(self.encoders)]
        # Zero pixels still give maps that are not zero (shifts), which would reach `decode_single`.
        keep = available[:, :, None, None, None]
        return [_stack(maps) * keep for maps in zip(*by_modality, strict=True)]

    def decode(self, levels: Sequence[Tensor], present: Tensor | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Fuse the maps of `encode` over the modalities in `present` and decode: logits, features and side outputs as in `forward`.

        present: (B, M), what `encode` was given or any part of it (`only` keeps one modality); None: all.
        """
        available = presence(present, levels[0])
        fused = [mix(channels_last(present_mean(m, available))) for mix, m in zip(self.shared.mix, levels, strict=True)]  # type: ignore[call-overload]
        decoded: tuple[Tensor, Tensor, list[Tensor]] = self.shared.fusion(fused)
        return decoded

    def decode_single(self, levels: Sequence[Tensor], modality: int) -> Tensor:
        """Logits (B, K, H, W) of the uni-modal decoder for one modality; they say nothing where an item lacks it."""
        logits: Tensor = self.shared.single([maps[:, modality] for maps in levels])[0]
        return logits

    def forward(self, images: Tensor, modality_present: Tensor | None = None) -> Output:
        """Give logits, features and aux["deep"] of images (B, M, H, W) from the modalities in `modality_present` (None: all)."""
        logits, features, deep = self.decode(self.encode(images, modality_present), modality_present)
        return Output(logits, features, {"deep": deep})


def _stack(maps: Sequence[Tensor]) -> Tensor:
    """Stack maps (B, D, H, W) to (B, M, D, H, W) such that the maps of one modality stay one channels-last block."""
    return torch.stack([m.permute(0, 2, 3, 1) for m in maps]).permute(1, 0, 4, 2, 3)
