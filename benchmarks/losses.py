"""Losses with pairs of pixels: the gated CRF loss against its unfold form (and the tree energy loss, where it is there).

    python benchmarks/losses.py            value and gradient, float32, one thread; and the share of each loss in a training step
    python benchmarks/losses.py --tiny     small inputs, equality checks only

The unfold form (kept with the tests) makes all (2r+1)² shifted copies and leaves the gradient to autograd. Limit: what
no way over pairs can leave out, on flat tensors of the same volume: for each half offset one exponential per pixel, and
for both ends of the pairs one pass over the gradient that reads the neighbour's probabilities. Extra memory is the growth
of the peak resident size of a fresh process over one call, the gradient included.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import losses_step
import losses_tree
import torch
from loss_rows import Row, extra_mib, main
from torch import Tensor

from fedmed.losses.gated_crf import gated_crf, half_offsets

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "losses"))
from test_gated_crf import unfold_form

RADIUS = 5
# (B, C, H, W), image channels, whether the unfold form is timed too
CASES = [
    ((4, 2, 256, 256), 1, True),
    ((4, 2, 64, 64), 1, True),
    ((4, 3, 256, 256), 3, False),
    ((12, 2, 256, 256), 1, False),
    ((4, 8, 256, 256), 1, False),
    ((4, 2, 512, 512), 1, False),
]


def make_inputs(shape: tuple[int, ...], channels: int) -> tuple[Tensor, Tensor]:
    """Probabilities, a leaf that takes a gradient, and images: smooth ones with some noise, as the kernels expect them."""
    rng = torch.Generator().manual_seed(0)
    prob = torch.randn(shape, generator=rng).softmax(dim=1).requires_grad_()
    coarse = torch.rand(shape[0], channels, 8, 8, generator=rng)
    smooth = torch.nn.functional.interpolate(coarse, shape[2:], mode="bilinear")
    return prob, (0.9 * smooth + 0.1 * torch.rand(smooth.shape, generator=rng)).contiguous()


def value_and_gradient(loss: Callable[..., Tensor], prob: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """One training use of a loss."""
    value = loss(prob, image, radius=RADIUS)
    return value.detach(), torch.autograd.grad(value, prob)[0]


class PassesLimit:
    """For each half offset: one exponential per pixel, and `gradient += prob` for each end of the pairs, in place."""

    def __init__(self, prob: Tensor) -> None:
        self._offsets = len(list(half_offsets(RADIUS, *prob.shape[2:])))
        self._prob, self._gradient = prob.detach().clone(), torch.zeros(prob.shape)
        self._exponent, self._similarity = torch.zeros(2, *prob.shape[2:])

    def __call__(self) -> None:
        for p, g in zip(
            self._prob, self._gradient, strict=True
        ):  # one image's tensors at a time, as long as the cache holds them
            for _ in range(self._offsets):
                torch.exp(self._exponent, out=self._similarity)
                g.add_(p)
                g.add_(p)


def name_of(shape: tuple[int, ...], channels: int) -> str:
    """How a case is called in the table and on the command line."""
    return f"gated_crf {'x'.join(map(str, shape))} image {channels}"


def calls() -> dict[str, Callable[[], Callable[[], Any]]]:
    """Makers of what the memory measurement runs."""
    made: dict[str, Callable[[], Callable[[], Any]]] = {}
    for shape, channels, _ in CASES:
        for label, loss in (("", gated_crf), (" unfold", unfold_form)):
            made[name_of(shape, channels) + label] = partial(_use, loss, shape, channels)
    return made


def _use(loss: Callable[..., Tensor], shape: tuple[int, ...], channels: int) -> Callable[[], Any]:
    return partial(value_and_gradient, loss, *make_inputs(shape, channels))


def check(shape: tuple[int, ...], channels: int) -> None:
    """Both forms must give the same value and gradient."""
    prob, image = make_inputs(shape, channels)
    (value, gradient), (expected, by_autograd) = (
        value_and_gradient(loss, prob, image) for loss in (gated_crf, unfold_form)
    )
    far = float((gradient - by_autograd).abs().max() / by_autograd.abs().max())
    off = abs(float(value / expected) - 1)
    what = f"gated CRF = unfold form at {'x'.join(map(str, shape))} (value and gradient to 1e-5 of their size)"
    common.require(off <= 1e-5 and far <= 1e-5, what)


def measure(tiny: bool = False, repetitions: int = 7) -> list[Row]:
    """Check, then time and measure all cases; `tiny`: check small ones only."""
    if tiny:
        check((2, 2, 24, 40), 1)
        check((1, 3, 16, 9), 3)
        return []
    rows = []
    for shape, channels, with_unfold in CASES:
        if with_unfold:
            check(shape, channels)
        inputs = make_inputs(shape, channels)
        cases: dict[str, Callable[[], Any]] = {"ours": partial(value_and_gradient, gated_crf, *inputs)}
        cases["limit"] = PassesLimit(inputs[0])
        if with_unfold:
            cases["unfold"] = partial(value_and_gradient, unfold_form, *inputs)
        times = common.interleave(cases, repetitions, warmups=1)
        name = name_of(shape, channels)
        memory = extra_mib(__file__, name)
        unfold_memory = extra_mib(__file__, f"{name} unfold") if with_unfold else None
        target = "; target >= 25, at most 16 MiB" if shape == CASES[0][0] and channels == 1 else ""
        rows.append(Row(name, times["ours"], times.get("unfold"), times["limit"], memory, unfold_memory, target))
    return rows


def measure_all(tiny: bool = False, repetitions: int = 7) -> list[Row]:
    """This loss and the tree energy, after what either adds to a training step."""
    losses_step.measure(tiny, repetitions)
    return measure(tiny, repetitions) + losses_tree.measure(tiny, repetitions)


if __name__ == "__main__":
    main(__doc__, calls, measure_all)
