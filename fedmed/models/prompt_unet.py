"""The U-Net of FedLPPA: prompts tell it which site an image comes from and how it was annotated; two decoders in training.

Source: arXiv 2402.17502 and its official code. B batch, b = `base_width`, K sites the model has room for, hp x wp = H/16 x W/16.
Symbols: p_U → `universal_prompt`, p_D → `distribution_prompts`, p_S → the planes of `annotation_planes`, x4 → deepest map (16b
channels), u_k → what `PromptFusion` is given, F_k → fused (4b channels), z → logits, z' → `aux_logits`.

    u_k = [x4 ; p_D,k ; p_U ; p_S],  F_k = A(conv(conv(u_k))),  A the dual attention
    z   = out_conv(s · mean over positions of MLP([x4 ; F_k])),  s the finest map of the main decoder on [x4 ; F_k]
    z'  = the auxiliary decoder on [x4 ; F_k], another one of the same shape, without the product

The first convolution is linear, so its part on x4 is made once for all sites. Departures: F of other sites is made with the
dropped units of F_i (official: others, which then differ by more than the prompts do) and leaves the running statistics
alone (official: they move K times a step); p_S is no state of the model, every image comes with its own. Without a site, as in
central scoring, the mean of the K rows of p_D stands for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmed.errors import UserError
from fedmed.models.dual_attention import DualAttention
from fedmed.models.output import Output
from fedmed.models.side_unet import HALVINGS, Decoder, Encoder, stage_widths

DISTRIBUTION, UNIVERSAL, AUXILIARY = "distribution_prompts", "universal_prompt", "aux_decoder"  # names of entries
AUX_LOGITS = "aux_logits"  # of `Output.aux`: z' (B, num_outputs, H, W)
FUSED = "fused"  # of `Output.aux`: F of each image's own site (B, 4b, hp, wp)
PLANES = ("scribble", "block", "point")  # what the planes of p_S stand for, by the annotation kinds 0, 1, 2
NO_PLANE = -1  # annotation kind of everything else: all planes are 0
_IMAGE_PART, _NOISE = "image_part", "noise"  # of `Output.aux`: what F of another site is made from
_SIDE = 2**HALVINGS  # pixels for one number of a prompt
_DROPOUT = 0.5  # between the convolutions of the fusion (official code)


def annotation_planes(kinds: Tensor, size: tuple[int, int]) -> Tensor:
    """p_S: plane c of an item is 1 if its kind is c, else 0. kinds (B,) int64 in -1 ... 2. Out: (B, 3, h, w) float32."""
    ids = torch.arange(len(PLANES), device=kinds.device)
    return (kinds[:, None] == ids).float()[:, :, None, None].expand(-1, -1, *size)


class PromptFusion(nn.Module):
    """The tri-prompt fusion: two 3x3 convolutions with BatchNorm and LeakyReLU, dropout between them, then dual attention."""

    def __init__(self, deep_channels: int, prompts: int, base_width: int) -> None:
        super().__init__()
        self.deep_channels = deep_channels
        self.mix = nn.Conv2d(deep_channels + prompts, 8 * base_width, 3, padding=1)
        self.mix_norm = nn.BatchNorm2d(8 * base_width)
        self.reduce = nn.Conv2d(8 * base_width, 4 * base_width, 3, padding=1)
        self.reduce_norm = nn.BatchNorm2d(4 * base_width)
        self.attention = DualAttention(4 * base_width)

    def image_part(self, deepest: Tensor) -> Tensor:
        """The first convolution on x4 (B, 16b, h, w) alone, bias included: (B, 8b, h, w)."""
        return F.conv2d(deepest, self.mix.weight[:, : self.deep_channels], self.mix.bias, padding=1)

    def noise(self, image_part: Tensor) -> Tensor | None:
        """Factors of a dropout layer for maps (B, 8b, h, w), 0 or 2; None outside training."""
        return F.dropout(torch.ones_like(image_part), _DROPOUT) if self.training else None

    def forward(self, image_part: Tensor, prompts: Tensor, noise: Tensor | None) -> Tensor:
        """F of image_part (B, 8b, h, w) with prompts (B, 5, h, w): (B, 4b, h, w)."""
        of_prompts = F.conv2d(prompts, self.mix.weight[:, self.deep_channels :], padding=1)
        mixed = F.leaky_relu(self.mix_norm(image_part + of_prompts))
        reduced = self.reduce(mixed if noise is None else mixed * noise)
        fused: Tensor = self.attention(F.leaky_relu(self.reduce_norm(reduced)))
        return fused


class PromptUNet(nn.Module):
    """U-Net with prompts at its deepest map, a main decoder and, in training, an auxiliary one.

    In: images (B, in_channels, H, W) float32 of exactly the size the model was built for, a multiple of 16 and at least 32
    (of 16 pixels one position is left, whose norm has no variance with one image); site_index (B,) int64, the place of each
    image's site in the federation, None: the mean of all rows of p_D; annotation_kind (B,) int64, a place in `PLANES` or -1,
    None: -1. Out: logits z (B, num_outputs, H, W), features (B, b, H, W), what enters the last convolution, and in training mode
    `aux` with `aux_logits` z' and `fused` F, and what `others_fused` needs.

    num_sites: K. Prompts are drawn from U(0, 1). b = 16, K = 5, 64 x 64 pixels, one channel, two outputs: 2,895,990
    parameters. Groups `depth`: encoder stages, prompts, fusion, MLP, up1 ... up4, last convolution, auxiliary decoder.
    """

    MIN_IMAGE_SIZE = 2 * _SIDE
    TASKS = ("segmentation",)
    inputs: tuple[str, ...] = ("site_index", "annotation_kind")
    classifier_prefixes: tuple[str, ...] = ("decoder.out_conv", f"{AUXILIARY}.out_conv")

    def __init__(
        self,
        in_channels: int,
        num_outputs: int,
        image_size: tuple[int, int],
        base_width: int = 16,
        num_sites: int = 8,
    ) -> None:
        super().__init__()
        if num_sites < 1:
            raise UserError(f"model.args.num_sites: expected a whole number of at least 1, got {num_sites}")
        if any(side % _SIDE for side in image_size):
            raise UserError(
                f"model.name prompt_unet: sides of images must be multiples of {_SIDE} pixels, these are "
                f"{' x '.join(map(str, image_size))}; set data.resize"
            )
        self.num_sites, self.image_size = num_sites, (image_size[0], image_size[1])
        deep, fused, b = stage_widths(base_width)[-1], 4 * base_width, base_width
        self.encoder = Encoder(in_channels, base_width)
        self.fusion = PromptFusion(deep, 2 + len(PLANES), base_width)
        self.decoder = Decoder(num_outputs, base_width, deep + fused)
        self.mlp = nn.Sequential(
            *(nn.Conv2d(deep + fused, 8 * b, 1), nn.BatchNorm2d(8 * b), nn.LeakyReLU(inplace=True)),
            *(nn.Conv2d(8 * b, 4 * b, 1), nn.BatchNorm2d(4 * b), nn.LeakyReLU(inplace=True)),
            nn.Conv2d(4 * b, b, 1),
        )
        self.aux_decoder = Decoder(num_outputs, base_width, deep + fused)
        grid = (image_size[0] // _SIDE, image_size[1] // _SIDE)
        universal = torch.rand(1, *grid)
        self.distribution_prompts = nn.Parameter(torch.rand(num_sites, *grid))  # last: more room changes nothing else
        self.universal_prompt = nn.Parameter(universal)
        ups = tuple(f"decoder.{name}" for name in ("up1", "up2", "up3", "up4", "out_conv"))
        stages = tuple(f"encoder.stages.{i}" for i in range(HALVINGS + 1))
        self.groups: dict[str, tuple[str, ...]] = {
            "depth": (*stages, DISTRIBUTION, UNIVERSAL, "fusion", "mlp", *ups, AUXILIARY)
        }

    def prompts(self, items: int, site_index: Tensor | None, annotation_kind: Tensor | None) -> Tensor:
        """[p_D,k ; p_U ; p_S] of B = `items` images: (B, 5, hp, wp)."""
        rows, grid = self.distribution_prompts, self.universal_prompt.shape[1:]
        if site_index is None:
            own = rows.mean(dim=0, keepdim=True).expand(items, -1, -1)
        else:
            own = F.embedding(site_index, rows.flatten(1)).view(items, *grid)
        kinds = rows.new_full((items,), NO_PLANE, dtype=torch.int64) if annotation_kind is None else annotation_kind
        planes = annotation_planes(kinds, (grid[0], grid[1])).to(rows.dtype)
        return torch.cat([own.unsqueeze(1), self.universal_prompt.expand(items, 1, -1, -1), planes], dim=1)

    def others_fused(self, aux: Mapping[str, Any], site_index: Tensor, annotation_kind: Tensor | None) -> Tensor:
        """F_k of every image of a training pass for each site k of site_index (S,): (S, B, 4b, hp, wp), without gradient.

        aux: of the pass's `Output`; annotation_kind (B,) as it was there.
        """
        image_part, noise = aux[_IMAGE_PART].detach(), aux[_NOISE]
        items = image_part.shape[0]
        with torch.no_grad():
            # Statistics of the batch are used, but those that are kept belong to the own site.
            kept = {name: value.clone() for name, value in self.fusion.named_buffers()}
            maps = []
            for site in site_index.to(image_part.device):
                prompts = self.prompts(items, site.expand(items), annotation_kind)
                maps.append(torch.func.functional_call(self.fusion, kept, (image_part, prompts, noise)))
            return torch.stack(maps) if maps else aux[FUSED].new_zeros(0, *aux[FUSED].shape)

    def forward(
        self, images: Tensor, site_index: Tensor | None = None, annotation_kind: Tensor | None = None
    ) -> Output:
        """Give the `Output` of images (B, in_channels, H, W). Raises `UserError` for another size than that of the prompts."""
        if tuple(images.shape[-2:]) != self.image_size:
            raise UserError(
                f"model.name prompt_unet: its prompts are made for images of {self.image_size[0]} x {self.image_size[1]} pixels, "
                f"got {images.shape[-2]} x {images.shape[-1]}; set data.resize"
            )
        maps = self.encoder(images)
        image_part = self.fusion.image_part(maps[-1])
        noise = self.fusion.noise(image_part)
        fused = self.fusion(image_part, self.prompts(len(images), site_index, annotation_kind), noise)
        maps[-1] = torch.cat([maps[-1], fused], dim=1)
        features = self.decoder.stages(maps)[-1] * self.mlp(maps[-1]).mean(dim=(2, 3), keepdim=True)
        logits = self.decoder.out_conv(features)
        if not self.training:
            return Output(logits, features)
        aux = {AUX_LOGITS: self.aux_decoder(maps), FUSED: fused, _IMAGE_PART: image_part, _NOISE: noise}
        return Output(logits, features, aux)
