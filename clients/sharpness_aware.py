"""FedISM, local half: training towards flat minima, and how sharp the received model is on the site's data.

Source: Wu et al., IJCAI 2024, arXiv 2404.17805, and its official code; see `strategies/sharpness_matching.py` for the
server. The step is GSAM: Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR 2022,
arXiv 2203.08065, on SAM: Foret et al., ICLR 2021, arXiv 2010.01412.
Symbols: w → parameters, g → first (gradient at w), g' → second (gradient at w + e), ρ → rho, e = ρ·g/(‖g‖ + 1e-12),
α → alpha, u → the gradient the optimiser gets, L, L̂ → loss_base, loss_perturbed. ‖·‖ is the norm over all parameters.

Departures: L and L̂ are measured without augmentation, in eval mode (official: random training transform, so the two
differ by chance). w comes back from a copy, not by subtracting e. In the second pass every buffer keeps its value, of
any kind of layer (official: batch norms' momentum is 0, their counters run on).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clients.supervised import Params as SupervisedParams
from clients.supervised import Supervised
from fedmed.data.split import Batch
from fedmed.errors import UserError
from fedmed.federation.messages import Leaf
from fedmed.federation.state import wide

Terms = dict[str, Tensor]
EPS = 1e-12  # added to every norm that divides (official code): a zero gradient moves nothing


@dataclass(frozen=True)
class SharpnessAwareParams(SupervisedParams):
    """Constants of the local half; defaults are the official code's unless marked."""

    loss: str = "logit_adjusted_ce"  # training loss, see `supervised`; the measurement is always plain cross-entropy
    alpha: float = 0.1  # α ≥ 0, weight of the surrogate gap; 0 is plain SAM
    decimals: int | None = None  # ≥ 0: round both losses to so many decimals before they leave (our option)

    def __post_init__(self) -> None:
        super().__post_init__()
        finite = 0 <= self.alpha < math.inf and 0 <= self.tau < math.inf
        if not finite or (self.decimals is not None and self.decimals < 0):
            raise ValueError(f"alpha >= 0, tau >= 0 (both finite) and decimals null or >= 0 expected, got {self}")


def global_norm(tensors: list[Tensor]) -> Tensor:
    """‖·‖₂ over all entries of all tensors, float64 (). Sums inside a tensor are float32, or float64 for float64."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([n.double() for n in torch._foreach_norm([wide(t) for t in tensors])]).norm()


def dot(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """⟨·,·⟩ over all entries of two lists of tensors of equal shapes, float64 (); summed as in `global_norm`."""
    products = [torch.dot(wide(a).flatten(), wide(b).flatten()) for a, b in zip(first, second, strict=True)]
    return torch.stack([p.double() for p in products]).sum() if products else torch.zeros((), dtype=torch.float64)


@contextmanager
def perturbed(parameters: list[Tensor], gradients: list[Tensor], rho: float) -> Iterator[None]:
    """Inside, the parameters are w + ρ·g/(‖g‖ + 1e-12); afterwards w again, to the bit. Extra memory: one copy of w.

    In: parameters and their gradients, of equal shapes; ρ ≥ 0. Empty lists and a zero gradient move nothing.
    """
    start = [p.detach().clone() for p in parameters]
    try:
        if start:
            with torch.no_grad():  # w + e is built in the place of w, so that e needs no memory
                scale = rho / (global_norm(gradients) + EPS)
                torch._foreach_copy_(parameters, gradients)
                torch._foreach_mul_(parameters, scale.to(parameters[0].dtype))
                torch._foreach_add_(parameters, start)
        yield
    finally:
        if start:
            with torch.no_grad():
                torch._foreach_copy_(parameters, start)


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Afterwards every buffer (running statistics, counters) has the value it had, whatever forward passes did to it."""
    buffers = list(model.buffers())
    kept = [b.clone() for b in buffers]
    try:
        yield
    finally:
        if kept:
            with torch.no_grad():
                torch._foreach_copy_(buffers, kept)


def surrogate_gap_gradient_(first: list[Tensor], second: list[Tensor], alpha: float) -> None:
    """GSAM: g' ← u = g' − α·g_⊥, in place, g_⊥ = g − cosθ·‖g‖·g'/(‖g'‖ + 1e-12) the part of g that g' does not explain.

    cosθ = ⟨g,g'⟩/(‖g'‖·‖g‖ + 1e-12), so u = (1 + α·cosθ·‖g‖/(‖g'‖ + 1e-12))·g' − α·g. In: g and g' as lists of equal
    shapes. No extra memory. g = 0: u = g'; g' = 0: u = −α·g.
    """
    if not first:
        return
    with torch.no_grad():
        norm, norm_second = global_norm(first), global_norm(second)
        cosine = dot(first, second) / (norm_second * norm + EPS)
        factor = 1.0 + alpha * cosine * norm / (norm_second + EPS)
        torch._foreach_mul_(second, factor.to(second[0].dtype))
        torch._foreach_add_(second, first, alpha=-alpha)


def gsam_gradient(model: nn.Module, closure: Callable[[], Terms], rho: float, alpha: float) -> Terms:
    """Put u into `.grad` of every parameter the loss reaches; parameters and buffers are as after one plain pass.

    `closure` runs the model on the batch and gives the named terms; their sum is the loss. Out: the terms of the first
    pass, detached. Extra memory over a plain backward pass: a copy of w and g.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    terms = closure()
    _total(terms).backward()
    terms = {name: value.detach() for name, value in terms.items()}
    first = {p: p.grad for p in parameters if p.grad is not None}
    model.zero_grad(set_to_none=True)
    with unchanged_buffers(model), perturbed(list(first), list(first.values()), rho):
        _total(closure()).backward()
    reached = [p for p in parameters if p in first or p.grad is not None]  # a gradient that is missing once counts as 0
    for p in reached:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    at_w = [first[p] if p in first else torch.zeros_like(p) for p in reached]
    surrogate_gap_gradient_(at_w, [p.grad for p in reached if p.grad is not None], alpha)
    return terms


def _total(terms: Terms) -> Tensor:
    values = list(terms.values())
    return values[0] if len(values) == 1 else torch.stack(values).sum()  # as in the base step, bit for bit


def gsam_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, closure: Callable[[], Terms], rho: float, alpha: float
) -> Terms:
    """One optimiser step with u; weight decay acts at w. Out: the terms of the first pass, detached."""
    terms = gsam_gradient(model, closure, rho, alpha)
    optimizer.step()
    return terms


def sharpness_losses(model: nn.Module, mean_loss: Callable[[bool], float], rho: float) -> tuple[float, float]:
    """L at w and L̂ at w + ρ·G/(‖G‖ + 1e-12), G the gradient of the loss over all data (its scale cancels).

    `mean_loss(True)` gives the mean loss over the data and adds its gradient, of any scale, to `.grad`; `mean_loss(False)`
    gives the mean only. Afterwards the parameters are w to the bit and there are no gradients.
    """
    model.zero_grad(set_to_none=True)
    base = mean_loss(True)
    gradient = {p: p.grad for p in model.parameters() if p.grad is not None}
    with perturbed(list(gradient), list(gradient.values()), rho):
        higher = mean_loss(False)
    model.zero_grad(set_to_none=True)
    return base, higher


class SharpnessAware(Supervised):
    """Measures L and L̂ of the received model on all training items, then trains with GSAM steps of the same radius."""

    Params: ClassVar[type] = SharpnessAwareParams
    leaves: ClassVar[tuple[Leaf, ...]] = (
        Leaf("loss_base", "1", "mean cross-entropy of the received model over all training items", min_count=1),
        Leaf("loss_perturbed", "1", "the same at distance rho from it, in the direction of the gradient", min_count=1),
    )
    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Read ρ and measure; the model is still the received one. Raises `UserError` without a usable ρ."""
        super().begin_round(config, extras)
        self.rho = float(config.get("rho", math.nan))
        if not 0 <= self.rho < math.inf:
            raise UserError(
                f"client 'fedism' needs a radius rho >= 0 with every train message, got {config.get('rho')}; "
                "use strategy.name=fedism or fedism_plus"
            )
        self.loss_base, self.loss_perturbed = sharpness_losses(self.model, self._mean_loss, self.rho)

    def _mean_loss(self, with_gradient: bool) -> float:
        """Mean plain cross-entropy over the training split (NaN without items); `with_gradient`: adds that of the sum."""
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for batch, output in self.sweep("train", gradient=with_gradient):
            loss = F.cross_entropy(output.logits, batch.targets, reduction="none").double().sum()
            if with_gradient:
                loss.backward()
            total, count = total + loss.detach(), count + len(batch.targets)
        return float(total) / count if count else math.nan

    def train_step(self, batch: Batch, step: int) -> Terms:
        """One GSAM step; the reported terms are those at w."""
        assert self.optimizer is not None
        return gsam_step(self.model, self.optimizer, lambda: self.loss_terms(batch, step), self.rho, self.params.alpha)

    def end_round(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Send the two losses, rounded where `decimals` says so."""
        found, decimals = {"loss_base": self.loss_base, "loss_perturbed": self.loss_perturbed}, self.params.decimals
        return {}, found if decimals is None else {name: round(value, decimals) for name, value in found.items()}
