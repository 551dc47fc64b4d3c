"""Tree energy loss: the compiled loops against the same in tensor operations, logits to gradients, trees built in the step.

    python benchmarks/losses_tree.py            value and gradient, float32, one thread
    python benchmarks/losses_tree.py --tiny     small inputs, equality checks only

Limit: what no way over trees can leave out, as passes over flat tensors of the same volume: for each tree its edge weights and one
exponential per node; for each filter, channel by channel and for the normaliser, a sweep up and a sweep down for the value and as many
for the gradient, each a read of two numbers and a write of one. Finding the tree, and that its order jumps in memory, come on top.
Extra memory is the growth of the peak resident size of a fresh process.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import common
import torch
from loss_rows import Row, extra_mib, main
from torch import Tensor

from fedmed.losses import tree_doubling, tree_filter
from fedmed.losses.tree_energy import Form, tree_energy_loss

# (B, C, H, W), form, whether the tensor operations are timed too
CASES: list[tuple[tuple[int, int, int, int], Form, bool]] = [
    ((12, 2, 256, 256), "cascade", True),
    ((12, 2, 64, 64), "cascade", True),
    ((12, 2, 128, 128), "cascade", False),
    ((12, 2, 512, 512), "cascade", False),
    ((12, 2, 256, 256), "single", False),
    ((12, 3, 256, 256), "cascade", False),
]


def make_inputs(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Logits, smooth gray images with some noise, logits of side outputs at 1/4, 1/2 and 1/1, and a mask with 5 % annotated."""
    batch, classes, height, width = shape
    rng = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(
        torch.rand(batch, 1, 8, 8, generator=rng), (height, width), mode="bilinear"
    )
    image = 0.9 * smooth + 0.1 * torch.rand(smooth.shape, generator=rng)
    logits = torch.randn(shape, generator=rng).requires_grad_()
    sides = [torch.randn(batch, classes, height // s, width // s, generator=rng).requires_grad_() for s in (4, 2, 1)]
    return logits, image, sides, torch.rand(batch, height, width, generator=rng) < 0.95


def value_and_gradient(form: Form, logits: Tensor, image: Tensor, sides: list[Tensor], mask: Tensor) -> list[Tensor]:
    """One training use of the loss: value and gradients of the logits and the side outputs that take part."""
    value = tree_energy_loss(logits, image, sides, mask, form=form)
    return [value.detach(), *torch.autograd.grad(value, (logits, *(sides[:1] if form == "single" else sides)))]


@contextmanager
def tensor_operations() -> Iterator[None]:
    """Inside, the loss does without the compiled loops, as where numba is missing."""
    chosen = tree_filter._backend
    tree_filter._backend = lambda device: tree_doubling  # type: ignore[assignment]
    try:
        yield
    finally:
        tree_filter._backend = chosen


def without_compiling(*arguments: Any) -> list[Tensor]:
    """`value_and_gradient` in tensor operations."""
    with tensor_operations():
        return value_and_gradient(*arguments)


class PassesLimit:
    """The unavoidable passes, see the top."""

    def __init__(self, shape: tuple[int, int, int, int], form: Form) -> None:
        batch, channels, height, width = shape
        self._filters = 2 if form == "single" else 4
        self._guide = torch.zeros(batch, channels, height, width)
        self._nodes = torch.zeros(batch, height * width)
        self._values = torch.zeros(batch, channels + 1, height * width)

    def __call__(self) -> None:
        for _ in range(self._filters):
            tree_filter.edge_weights(self._guide)
            self._nodes.exp_().zero_()
            for image, a in zip(self._values, self._nodes, strict=True):
                for _ in range(4):
                    image.mul_(a)


def name_of(shape: tuple[int, ...], form: str) -> str:
    """How a case is called in the table and on the command line."""
    return f"tree_energy {'x'.join(map(str, shape))} {form}"


def calls() -> dict[str, Callable[[], Callable[[], Any]]]:
    """Makers of what the memory measurement runs."""
    made: dict[str, Callable[[], Callable[[], Any]]] = {}
    for shape, form, _ in CASES:
        for label, use in (("", value_and_gradient), (" tensor operations", without_compiling)):
            made[name_of(shape, form) + label] = partial(_use, use, shape, form)
    return made


def _use(use: Callable[..., Any], shape: tuple[int, int, int, int], form: Form) -> Callable[[], Any]:
    return partial(use, form, *make_inputs(shape))


def check(shape: tuple[int, int, int, int], form: Form) -> None:
    """Both ways must give the same value and gradients."""
    inputs = make_inputs(shape)
    ours, expected = value_and_gradient(form, *inputs), without_compiling(form, *inputs)
    far = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, expected, strict=True))
    what = "compiled loops = tensor operations"
    common.require(
        far <= 1e-4, f"{what} at {'x'.join(map(str, shape))}, {form} (value and gradients to 1e-4 of their size)"
    )


def measure(tiny: bool = False, repetitions: int = 7) -> list[Row]:
    """Check, then time and measure all cases; `tiny`: check small ones only."""
    if tiny:
        for form in ("cascade", "single", "add"):
            check((2, 3, 24, 40), form)
        return []
    rows = []
    for shape, form, with_reference in CASES:
        inputs = make_inputs(shape)
        cases: dict[str, Callable[[], Any]] = {"ours": partial(value_and_gradient, form, *inputs)}
        cases["limit"] = PassesLimit(shape, form)
        if with_reference:
            check(shape, form)
            cases["reference"] = partial(without_compiling, form, *inputs)
        times = common.interleave(cases, repetitions, warmups=1)
        name = name_of(shape, form)
        memory = extra_mib(__file__, name)
        reference_memory = extra_mib(__file__, f"{name} tensor operations") if with_reference else None
        note = f"{1e6 * statistics.median(times['ours'].cpu) / (shape[0] * shape[2] * shape[3]):.2f} us per pixel"
        note += "; target <= 500 ms" if (shape, form) == CASES[0][:2] else ""
        rows.append(Row(name, times["ours"], times.get("reference"), times["limit"], memory, reference_memory, note))
    return rows


if __name__ == "__main__":
    main(__doc__, calls, measure)
