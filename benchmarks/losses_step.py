"""What each loss for weak annotation adds to a training step: `python benchmarks/losses.py` prints it after the losses alone.

A step is what the client `weak` does with a batch: forward pass of the U-Net with side outputs, terms, backward pass, AdamW. The
share of a loss is what the step is longer with it, as a part of the step with it; steps with and without it take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import common
import torch
from torch import Tensor

from clients.weak_annotation import WeakParams, side_logits, unit_range, weak_terms
from fedmed.data.split import Batch
from fedmed.losses.gated_crf import gated_crf
from fedmed.losses.tree_energy import tree_energy_loss
from fedmed.models.side_unet import SideUNet

CLASSES = 4
DRAWN = 0.02  # share of the pixels that is labelled
ARMS = {
    "pCE": WeakParams(),
    "pCE + gated CRF": WeakParams(crf_weight=0.1),
    "pCE + tree energy": WeakParams(tree_weight=0.1),
    "pCE + both": WeakParams(crf_weight=0.1, tree_weight=0.1),
}
# base width, side width, (B, H, W): the network of the experiments, and the published one but for its side heads (512 wide there)
CASES = [(8, 16, (12, 128, 128)), (16, 32, (12, 256, 256))]


class Step:
    """A network with its optimiser, and one batch of smooth gray images of which few pixels are drawn."""

    def __init__(self, base_width: int, side_width: int, shape: tuple[int, int, int]) -> None:
        torch.manual_seed(0)
        self.model = SideUNet(1, CLASSES, base_width, side_width)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        batch, height, width = shape
        coarse = torch.rand(batch, 1, 8, 8)
        images = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        drawn = torch.rand(shape) < DRAWN
        targets = torch.where(drawn, torch.randint(CLASSES, shape), CLASSES)
        self.batch = Batch(0.9 * images + 0.1 * torch.rand(images.shape), targets, torch.arange(batch))

    def __call__(self, params: WeakParams) -> None:
        """Train on the batch once."""
        output = self.model(self.batch.images)
        terms = weak_terms(output, self.batch, CLASSES, params)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        self.optimizer.step()


def check(step: Step) -> None:
    """The terms of the step must be the losses that are timed alone."""
    output = step.model(step.batch.images)
    terms = weak_terms(output, step.batch, CLASSES, ARMS["pCE + both"])
    image, unlabelled = unit_range(step.batch.images), step.batch.targets == CLASSES
    alone: dict[str, Tensor] = {
        "crf": 0.1 * gated_crf(output.logits.softmax(dim=1), image),
        "tree": 0.1 * tree_energy_loss(output.logits, image, side_logits(output), unlabelled),
    }
    same = all(torch.equal(terms[name], value) for name, value in alone.items())
    common.require(same, "terms of a training step = the losses alone")


def measure(tiny: bool = False, repetitions: int = 7) -> None:
    """Check, then print milliseconds of each arm and the share of its losses in the step; `tiny`: check only."""
    check(Step(2, 2, (2, 32, 32)))
    for base_width, side_width, shape in [] if tiny else CASES:
        step = Step(base_width, side_width, shape)
        arms: dict[str, Callable[[], None]] = {name: partial(step, params) for name, params in ARMS.items()}
        times = common.interleave(arms, repetitions, warmups=1)
        print(f"training step, {'x'.join(map(str, shape))} images, base width {base_width}, side width {side_width}")
        common.show_times(times)
        for name in list(ARMS)[1:]:
            plain, full = times["pCE"].cpu, times[name].cpu
            share = [
                (long - short) / long if long > 0 else float("nan") for long, short in zip(full, plain, strict=True)
            ]
            print(f"{name}: {common.spread(share)} of the step by CPU time")
