"""The U-Net of FedICRA: it is told which site an image comes from, and weighs its deepest channels accordingly.

Source: arXiv 2304.05635 and its official code. K sites, B batch, f channels of the deepest map x (B, f, h, w), s the
one-hot vector of a site. Symbols: V1, V2 → `site_in`, `site_out`, Q1, Q2 → `mix_in`, `mix_out`, e → embedding, h → heatmap.

    e(s)    = V2 relu(V1 s)
    q(u)    = Q2 relu(Q1 [u ; e(s)])
    h(x, s) = sigmoid(q(avgpool x) + q(maxpool x))
    x'      = x h + x

Departures: the official code keeps these layers where neither optimiser nor server sees them, so that they stay what they
were drawn as; here they are trained and exchanged (`train_selection: false` gives the official behaviour). It takes site 0
for no site; here no site is `None`. Its 1x1 convolutions act on one pixel, so they are linear layers here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmed.errors import UserError
from fedmed.models.output import Output
from fedmed.models.side_unet import HALVINGS, SideUNet, stage_widths

DEEPEST = "deepest"  # of `Output.aux`: the deepest map before the selection, (B, f, h, w)
HEATMAP = "heatmap"  # of `Output.aux`: weights of its channels, (B, f)
REDUCTION = 16  # Q1 leaves f / 16 channels (official code)


class ChannelSelection(nn.Module):
    """Weights of the channels of a map that depend on the map and on the site; everything is computed in float32 at least."""

    def __init__(self, channels: int, num_sites: int) -> None:
        super().__init__()
        reduced = max(1, channels // REDUCTION)
        self.site_in = nn.Linear(num_sites, channels, bias=False)
        self.site_out = nn.Linear(channels, channels, bias=False)
        self.mix_in = nn.Linear(2 * channels, reduced, bias=False)
        self.mix_out = nn.Linear(reduced, channels, bias=False)

    def embedding(self, site_index: Tensor | None) -> Tensor:
        """e of site_index (N,) int64 in 0 ... K - 1: (N, f). None: the mean over all K sites, (1, f)."""
        rows = self.site_in.weight.t()  # V1 s is a column of V1
        chosen = rows if site_index is None else F.embedding(site_index, rows)
        embedded: Tensor = self.site_out(chosen.relu())
        return embedded.mean(dim=0, keepdim=True) if site_index is None else embedded

    def heatmap(self, features: Tensor, embedding: Tensor) -> Tensor:
        """h of features (B, f, h, w) and embeddings (..., B, f) or (..., 1, f): (..., B, f), in (0, 1)."""
        with torch.autocast(features.device.type, enabled=False):
            wide = features.to(self.mix_in.weight.dtype)
            of_map, of_site = self.mix_in.weight.split(features.shape[1], dim=1)
            site = F.linear(embedding, of_site)
            votes = [self.mix_out((F.linear(u, of_map) + site).relu()) for u in (wide.mean((2, 3)), wide.amax((2, 3)))]
            return torch.sigmoid(votes[0] + votes[1])

    def forward(self, features: Tensor, site_index: Tensor | None = None) -> Tensor:
        """h of features (B, f, h, w), each with its own site of site_index (B,) int64, or None: (B, f)."""
        with torch.autocast(features.device.type, enabled=False):
            return self.heatmap(features, self.embedding(site_index))


def selected(features: Tensor, heatmap: Tensor) -> Tensor:
    """x' = x h + x. features (B, f, h, w), heatmap (B, f). Out: (B, f, h, w) in the type of the features."""
    return features + features * heatmap[:, :, None, None].to(features.dtype)


def site_heatmaps(selection: ChannelSelection, features: Tensor, site_index: Tensor) -> Tensor:
    """h of every item of one feature tensor (B, f, h, w) for every site of site_index (S,) int64: (S, B, f)."""
    with torch.autocast(features.device.type, enabled=False):
        return selection.heatmap(features, selection.embedding(site_index).unsqueeze(1))


class SiteUNet(SideUNet):
    """The `SideUNet` with channel selection by site after the deepest encoder stage.

    In: images (B, in_channels, H, W) and site_index (B,) int64, the place of each image's site in the federation; None, as in
    central scoring: the mean embedding of all sites the model has room for. Out: as `SideUNet`; `aux` also holds `deepest`
    (B, 16b, H/16, W/16) and `heatmap` (B, 16b). num_sites: how many sites it has room for. train_selection: false leaves
    the selection as it is drawn from the run's seed, and out of what is exchanged. With equal seeds all other entries are those
    of a `SideUNet`. b = 16, 5 sites: 79,104 parameters more.
    """

    inputs: tuple[str, ...] = ("site_index",)

    def __init__(
        self,
        in_channels: int,
        num_outputs: int,
        base_width: int = 16,
        side_width: int = 512,
        num_sites: int = 8,
        train_selection: bool = True,
    ) -> None:
        super().__init__(in_channels, num_outputs, base_width, side_width)
        if num_sites < 1:
            raise UserError(f"model.args.num_sites: expected a whole number of at least 1, got {num_sites}")
        self.num_sites = num_sites
        self.selection = ChannelSelection(stage_widths(base_width)[-1], num_sites).requires_grad_(train_selection)
        stages = self.groups["depth"]
        self.groups = {"depth": (*stages[: HALVINGS + 1], "selection", *stages[HALVINGS + 1 :])}

    def forward(self, images: Tensor, site_index: Tensor | None = None) -> Output:
        """Give the `Output` of images (B, in_channels, H, W) of sites site_index (B,)."""
        maps = self.encoder(images)
        deepest = maps[-1]
        heatmap = self.selection(deepest, site_index)
        output = self.decode([*maps[:-1], selected(deepest, heatmap)])
        return Output(output.logits, output.features, {**(output.aux or {}), DEEPEST: deepest, HEATMAP: heatmap})
