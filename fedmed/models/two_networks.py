"""Two segmentation networks of one kind that teach each other: equal layers, different initial weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedmed.models.build import build_model
from fedmed.models.output import Output

SECOND_LOGITS = "second_logits"  # of `Output.aux`


class TwoNetworks(nn.Module):
    """Any segmentation network twice, held as `net1` and `net2`.

    In: what the network takes. Out: the `Output` of network 1; while training, `aux` has the entry `second_logits`, the
    logits of network 2 in the same shape. In eval mode network 2 is not run, so that scoring costs what one network costs;
    whoever wants both then asks `second`.

    name, args: the network, a registered one or `monai:<network>`. With equal seeds network 1 has the weights it has alone;
    network 2 draws its own from a seed of its own: two networks that began alike would agree on everything. Groups are
    passed on, each kind with every group of network 1 followed by the same group of network 2.
    """

    TASKS = ("segmentation",)

    def __init__(
        self,
        in_channels: int,
        num_outputs: int,
        image_size: tuple[int, int],
        task: str,
        name: str = "unet",
        args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        seed = torch.initial_seed() % 2**63  # of the run, when `build_model` is what builds this
        other = int(torch.randint(2**62, ()))
        other += other == seed
        self.net1, self.net2 = (
            build_model(name, args, in_channels, num_outputs, image_size, task, seed=own) for own in (seed, other)
        )
        self.inputs: tuple[str, ...] = tuple(getattr(self.net1, "inputs", ()))
        self.classifier_prefixes = _twice(tuple(getattr(self.net1, "classifier_prefixes", ())))
        self.groups: dict[str, tuple[str, ...]] = {
            kind: _twice(prefixes) for kind, prefixes in dict(getattr(self.net1, "groups", {})).items()
        }

    def forward(self, images: Tensor, **extras: Tensor) -> Output:
        """Give the `Output` of images (B, in_channels, H, W)."""
        output: Output = self.net1(images, **extras)
        if not self.training:
            return output
        aux = {**(output.aux or {}), SECOND_LOGITS: self.second(images, **extras)}
        return Output(output.logits, output.features, aux)

    def second(self, images: Tensor, **extras: Tensor) -> Tensor:
        """Logits (B, num_outputs, H, W) of network 2, in either mode."""
        logits: Tensor = self.net2(images, **extras).logits
        return logits


def _twice(prefixes: tuple[str, ...]) -> tuple[str, ...]:
    """Prefixes in the first network, each followed by the same one in the second."""
    return tuple(f"{network}.{prefix}" for prefix in prefixes for network in ("net1", "net2"))
