"""What every model returns, and the memory layout of what it is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Output(NamedTuple):
    """Result of one forward pass; a field the model does not have is `None`.

    logits: (B, C) or (B, C, H, W), before any activation. features: what enters the classifier, (B, D) or (B, D, H, W).
    aux: named extras such as the side outputs of deep supervision.
    """

    logits: Tensor
    features: Tensor | None = None
    aux: dict[str, Any] | None = None


def extra_inputs(model: nn.Module, extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The per-item extras of a batch that a model asks for by its attribute `inputs` (such as `modality_present`), by name.

    What the batch does not have is left out: the model must say in its `forward` what it takes instead.
    """
    return {name: extras[name] for name in getattr(model, "inputs", ()) if name in extras}


def channels_last(images: Tensor) -> Tensor:
    """Lay (B, C, H, W) images out channels-last when they are on the CPU; values and shape stay.

    The convolutions keep the layout of their input, so this one copy moves a whole network to it (about a quarter less
    time a step for both networks of this package), while parameters stay contiguous for whoever flattens, stores or
    sends them.
    """
    if images.device.type != "cpu" or images.ndim != 4:
        return images
    if images.shape[1] > 1:
        return images.contiguous(memory_format=torch.channels_last)
    # With one channel both layouts hold the same bytes and PyTorch would keep the contiguous strides; only the strides
    # tell them apart.
    batch, _, height, width = images.shape
    return images.contiguous().as_strided(images.shape, (height * width, 1, width, 1)) if batch else images
