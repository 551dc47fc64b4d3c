"""A small convolutional classifier that trains on a CPU in seconds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedmed.errors import UserError
from fedmed.models.output import Output, channels_last

_STRIDED = 2  # the first blocks halve the image by stride, the later ones by max-pooling


class SmallCNN(nn.Module):
    """Four 3x3 convolutions with BatchNorm and ReLU, a global mean and a linear classifier.

    In: images (B, in_channels, H, W) float32, H and W at least `MIN_IMAGE_SIZE`. Out: logits (B, num_outputs), features
    (B, widths[-1]). The first two blocks halve the image by stride 2, every later one by 2x2 max-pooling before it.
    With the default widths, three channels and seven classes: 98 583 parameters. Our choice, no paper.
    """

    MIN_IMAGE_SIZE = 16
    TASKS = ("classification", "multilabel")
    classifier_prefixes: tuple[str, ...] = ("head",)

    def __init__(self, in_channels: int, num_outputs: int, widths: Sequence[int] = (16, 32, 64, 128)) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise UserError(f"model.args.widths: expected positive numbers of channels, got {list(widths)}")
        before = in_channels
        names = []
        for number, width in enumerate(widths):
            strided = number < _STRIDED
            block = nn.Sequential()
            if not strided:
                block.add_module("pool", nn.MaxPool2d(2, ceil_mode=True))
            block.add_module("conv", nn.Conv2d(before, width, 3, stride=2 if strided else 1, padding=1, bias=False))
            block.add_module("norm", nn.BatchNorm2d(width))
            block.add_module("relu", nn.ReLU(inplace=True))
            names.append(f"block{number + 1}")
            self.add_module(names[-1], block)
            before = width
        self.head = nn.Linear(before, num_outputs)
        self._blocks = tuple(names)
        self.groups: dict[str, tuple[str, ...]] = {"depth": (*names, "head")}

    def forward(self, images: Tensor) -> Output:
        """Give logits (B, num_outputs) and pooled features (B, widths[-1]) of images (B, in_channels, H, W)."""
        maps = channels_last(images)
        for name in self._blocks:
            maps = self.get_submodule(name)(maps)
        features = maps.mean(dim=(2, 3))
        return Output(self.head(features), features)
