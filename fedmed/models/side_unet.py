"""The U-Net of weakly supervised federated segmentation (FedICRA, FedLPPA), in parts, and plain with side outputs.

Sources: arXiv 2304.05635 and 2402.17502 with their official code. b = `base_width`, 16 there. Encoder b, 2b, 4b, 8b, 16b with
dropout, decoder 8b, 4b, 2b, b without. LeakyReLU with slope 0.01; every convolution has a bias, as in the official code, so
that counts of parameters can be compared.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmed.errors import UserError
from fedmed.models.output import Output, channels_last

SIDE_LOGITS = "side_logits"  # of `Output.aux`: logits at 1/4, 1/2 and 1/1 of the resolution
DROPOUT = (0.05, 0.1, 0.2, 0.3, 0.5)  # of the five encoder stages (official code)
HALVINGS = 4


class ConvBlock(nn.Sequential):
    """Two 3x3 convolutions, each with BatchNorm and LeakyReLU, dropout between them; the size is kept."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(inplace=True),
        )


class Encoder(nn.Module):
    """Images (B, in_channels, H, W) to five maps: (B, b, H, W), (B, 2b, H/2, W/2) ... (B, 16b, H/16, W/16)."""

    def __init__(self, in_channels: int, base_width: int) -> None:
        super().__init__()
        if base_width < 1:
            raise UserError(f"model.args.base_width: expected a whole number of at least 1, got {base_width}")
        widths = (in_channels, *stage_widths(base_width))
        self.stages = nn.ModuleList(ConvBlock(widths[i], widths[i + 1], dropout) for i, dropout in enumerate(DROPOUT))

    def forward(self, images: Tensor) -> list[Tensor]:
        """The maps, finest first."""
        maps = [self.stages[0](channels_last(images))]
        for stage in list(self.stages)[1:]:
            maps.append(stage(F.max_pool2d(maps[-1], 2)))
        return maps


class UpBlock(nn.Module):
    """A 1x1 convolution, bilinear enlargement (aligned corners) to the size of the skipped maps, then a `ConvBlock` on both."""

    def __init__(self, deep_channels: int, skip_channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(deep_channels, skip_channels, 1)
        self.convs = ConvBlock(2 * skip_channels, skip_channels)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        """Deeper (B, D, h, w) and skipped (B, S, H, W) maps to (B, S, H, W)."""
        enlarged = F.interpolate(self.reduce(deep), size=skip.shape[-2:], mode="bilinear", align_corners=True)
        result: Tensor = self.convs(torch.cat([skip, enlarged], dim=1))
        return result


class Decoder(nn.Module):
    """From the maps of an `Encoder` to logits; the deepest may have been given more channels on the way (`deep_channels`).

    Its modules are up1 ... up4 and out_conv, the names by which both methods tell what is merged at a site.
    """

    def __init__(self, num_outputs: int, base_width: int, deep_channels: int | None = None) -> None:
        super().__init__()
        b = stage_widths(base_width)
        self.up1 = UpBlock(b[4] if deep_channels is None else deep_channels, b[3])
        self.up2 = UpBlock(b[3], b[2])
        self.up3 = UpBlock(b[2], b[1])
        self.up4 = UpBlock(b[1], b[0])
        self.out_conv = nn.Conv2d(b[0], num_outputs, 3, padding=1)

    def stages(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps at 1/8, 1/4, 1/2 and 1/1 of the resolution: (B, 8b, H/8, W/8) ... (B, b, H, W)."""
        found = [maps[-1]]
        for up, skip in zip((self.up1, self.up2, self.up3, self.up4), maps[-2::-1], strict=True):
            found.append(up(found[-1], skip))
        return found[1:]

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Logits (B, num_outputs, H, W)."""
        logits: Tensor = self.out_conv(self.stages(maps)[-1])
        return logits


class SideHead(nn.Sequential):
    """Side output: 3x3 convolution to `width` channels, BatchNorm, ReLU, channel dropout 0.1, 1x1 convolution without bias."""

    def __init__(self, in_channels: int, num_outputs: int, width: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.1),
            nn.Conv2d(width, num_outputs, 1, bias=False),
        )


def stage_widths(base_width: int) -> tuple[int, ...]:
    """Channels of the five encoder stages."""
    return tuple(base_width * 2**stage for stage in range(HALVINGS + 1))


class SideUNet(nn.Module):
    """The U-Net with three side outputs for the tree energy loss.

    In: images (B, in_channels, H, W) float32, sides of at least 16. Out: logits (B, num_outputs, H, W), features (B, b, H, W), what
    enters the last convolution, and in `aux` the entry `side_logits`: (B, num_outputs, ·, ·) at 1/4, 1/2 and 1/1 of the resolution.
    They are made in training mode only, and while `give_sides` is true, since they are costly and nothing else reads them.

    side_width: channels in a side head, 512 published, which costs more than the rest of the network at small base widths. b = 16,
    width 512, one channel, two outputs: 2,337,250 parameters. Groups `depth`: encoder stages, up1 ... up4, last convolution and side
    heads.
    """

    MIN_IMAGE_SIZE = 16
    TASKS = ("segmentation",)
    classifier_prefixes: tuple[str, ...] = ("decoder.out_conv",)
    give_sides = True  # a client that does not read the side outputs says so

    def __init__(self, in_channels: int, num_outputs: int, base_width: int = 16, side_width: int = 512) -> None:
        super().__init__()
        if side_width < 1:
            raise UserError(f"model.args.side_width: expected a whole number of at least 1, got {side_width}")
        self.encoder = Encoder(in_channels, base_width)
        self.decoder = Decoder(num_outputs, base_width)
        widths = stage_widths(base_width)
        self.sides = nn.ModuleList(SideHead(widths[i], num_outputs, side_width) for i in (2, 1, 0))
        ups = tuple(f"decoder.{name}" for name in ("up1", "up2", "up3", "up4", "out_conv"))
        self.groups: dict[str, tuple[str, ...]] = {
            "depth": (*(f"encoder.stages.{i}" for i in range(HALVINGS + 1)), *ups, "sides")
        }

    def decode(self, maps: list[Tensor]) -> Output:
        """The `Output` from the encoder's maps."""
        stages = self.decoder.stages(maps)
        aux = None
        if self.training and self.give_sides:
            aux = {SIDE_LOGITS: [head(stage) for head, stage in zip(self.sides, stages[1:], strict=True)]}
        return Output(self.decoder.out_conv(stages[-1]), stages[-1], aux)

    def forward(self, images: Tensor) -> Output:
        """Give the `Output` of images (B, in_channels, H, W)."""
        return self.decode(self.encoder(images))
