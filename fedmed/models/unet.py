"""The plain U-Net for segmentation, in the two common forms of up-sampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmed.errors import UserError
from fedmed.models.output import Output, channels_last

UPSAMPLING = ("bilinear", "transpose")


class ConvPair(nn.Sequential):
    """Two 3x3 convolutions, each followed by BatchNorm and ReLU, that keep the size: in -> middle -> out channels."""

    def __init__(self, in_channels: int, out_channels: int, middle_channels: int | None = None) -> None:
        middle = out_channels if middle_channels is None else middle_channels
        super().__init__()
        # BatchNorm subtracts the mean, so a bias before it would do nothing.
        self.add_module("conv1", nn.Conv2d(in_channels, middle, 3, padding=1, bias=False))
        self.add_module("norm1", nn.BatchNorm2d(middle))
        self.add_module("relu1", nn.ReLU(inplace=True))
        self.add_module("conv2", nn.Conv2d(middle, out_channels, 3, padding=1, bias=False))
        self.add_module("norm2", nn.BatchNorm2d(out_channels))
        self.add_module("relu2", nn.ReLU(inplace=True))


class Down(nn.Module):
    """Halve the maps by 2x2 max-pooling, then a `ConvPair`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convs = ConvPair(in_channels, out_channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, H // 2, W // 2)."""
        result: Tensor = self.convs(F.max_pool2d(maps, 2))
        return result


class Up(nn.Module):
    """Enlarge the deeper maps to the size of the skipped ones, concatenate both, then a `ConvPair`.

    bilinear: aligned corners, and the first convolution halves the concatenated channels. transpose: a 2x2 transposed
    convolution halves the deeper channels first.
    """

    def __init__(self, deep_channels: int, skip_channels: int, out_channels: int, upsampling: str) -> None:
        super().__init__()
        self.enlarge: nn.Module | None = None
        if upsampling == "transpose":
            self.enlarge = nn.ConvTranspose2d(deep_channels, deep_channels // 2, 2, stride=2)
            self.convs = ConvPair(deep_channels // 2 + skip_channels, out_channels)
        else:
            total = deep_channels + skip_channels
            self.convs = ConvPair(total, out_channels, middle_channels=total // 2)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        """Map deeper (B, D, h, w) and skipped (B, S, H, W) maps to (B, out, H, W); H, W of any parity."""
        if self.enlarge is not None:
            deep = self.enlarge(deep)
        if self.enlarge is None or deep.shape[-2:] != skip.shape[-2:]:
            deep = F.interpolate(deep, size=skip.shape[-2:], mode="bilinear", align_corners=True)
        result: Tensor = self.convs(torch.cat([skip, deep], dim=1))
        return result


class UNet(nn.Module):
    """U-Net with four halvings, BatchNorm, no dropout.

    In: images (B, in_channels, H, W) float32, H and W at least `MIN_IMAGE_SIZE`, any parity. Out: logits (B,
    num_outputs, H, W), features (B, base_width, H, W) (what enters the last 1x1 convolution). bilinear: encoder widths
    b, 2b, 4b, 8b, 8b, decoder 4b, 2b, b, b with b = `base_width`, as the official code of FedA3I (arXiv 2312.12838) has
    them for b = 16: 1.08 M parameters; b = 43 gives 7.80 M. transpose: encoder b, 2b, 4b, 8b, 16b, decoder 8b, 4b, 2b,
    b; b = 32 gives 7.76 M. Departure: no bias before a BatchNorm. The ten first dotted components (inc, down1-4, up1-4,
    outc) are the depth groups.
    """

    MIN_IMAGE_SIZE = 16
    TASKS = ("segmentation",)
    classifier_prefixes: tuple[str, ...] = ("outc",)

    def __init__(self, in_channels: int, num_outputs: int, base_width: int = 16, upsampling: str = "bilinear") -> None:
        super().__init__()
        if base_width < 2:
            raise UserError(f"model.args.base_width: expected a whole number of at least 2, got {base_width}")
        if upsampling not in UPSAMPLING:
            raise UserError(f"model.args.upsampling: expected one of {', '.join(UPSAMPLING)}, got {upsampling!r}")
        b = base_width
        smooth = upsampling == "bilinear"
        widths = (b, 2 * b, 4 * b, 8 * b, 8 * b if smooth else 16 * b)
        decoder = (4 * b, 2 * b, b, b) if smooth else (8 * b, 4 * b, 2 * b, b)
        self.inc = ConvPair(in_channels, widths[0])
        self.down1 = Down(widths[0], widths[1])
        self.down2 = Down(widths[1], widths[2])
        self.down3 = Down(widths[2], widths[3])
        self.down4 = Down(widths[3], widths[4])
        self.up1 = Up(widths[4], widths[3], decoder[0], upsampling)
        self.up2 = Up(decoder[0], widths[2], decoder[1], upsampling)
        self.up3 = Up(decoder[1], widths[1], decoder[2], upsampling)
        self.up4 = Up(decoder[2], widths[0], decoder[3], upsampling)
        self.outc = nn.Conv2d(decoder[3], num_outputs, 1)
        self.groups: dict[str, tuple[str, ...]] = {"depth": tuple(name for name, _ in self.named_children())}

    def forward(self, images: Tensor) -> Output:
        """Give logits (B, num_outputs, H, W) and features (B, base_width, H, W) of images (B, in_channels, H, W)."""
        x1 = self.inc(channels_last(images))
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x4 = self.down3(x3)
        features = self.up1(self.down4(x4), x4)
        features = self.up2(features, x3)
        features = self.up3(features, x2)
        features = self.up4(features, x1)
        return Output(self.outc(features), features)
