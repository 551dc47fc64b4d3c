"""Ditto: beside the global model every site trains one of its own, held near the global one.

Source: Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021, arXiv 2012.04221,
algorithm 1. The server rule is any; FedAvg in the experiment. `flwr.serverapp.strategy` (1.41) has nothing of the kind.
Symbols: w^t → received, v_k → own, λ → lam. Objective of v_k: F_k(v) + (λ/2)·‖v − w^t‖², w^t fixed in the round.

Decided here: v_k makes one step on each batch that w makes one on (paper: its own number of steps); it has norm statistics
of its own and an optimiser of the same kind, whose moments start anew every round also with `optimizer.persist`; add-ons
act on w only. What w computes is that of `supervised` to the bit.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clients.supervised import Params as SupervisedParams
from clients.supervised import Supervised
from fedmed.data.split import Batch
from fedmed.errors import UserError
from fedmed.federation.client import make_optimizer
from fedmed.federation.state import State, clone_state, first_non_finite
from fedmed.models.output import Output, extra_inputs

log = logging.getLogger("fedmed.ditto")


@dataclass(frozen=True)
class DittoParams(SupervisedParams):
    """Constants of Ditto, and the arguments of the supervised loss of both models."""

    lam: float = 0.1  # λ ≥ 0 (paper tries 0.1, 1 and others); 0: training without others

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lam < float("inf"):
            raise ValueError(f"a finite lam >= 0 expected, got {self.lam}")


def add_pull(own: Sequence[Tensor], gradients: Sequence[Tensor], received: Sequence[Tensor], lam: float) -> None:
    """In place: g ← g + λ·(v − w^t), the gradient of (λ/2)·‖v − w^t‖²; tensors of the same shapes in the same order."""
    with torch.no_grad():
        for gradient, value, reference in zip(gradients, own, received, strict=True):
            gradient.add_(value - reference, alpha=lam)


def copy_of_model(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Own copies of the trainable parameters (leaves of autograd) and of the buffers that a state dict holds, by name."""
    kept = set(model.state_dict())
    parameters = {
        name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters() if p.requires_grad
    }  # a tied weight once, under its first name
    buffers = {name: b.detach().clone() for name, b in model.named_buffers() if name in kept}
    return parameters, buffers


def too_strong(lam: float, lr: float, momentum: float) -> bool:
    """True if SGD cannot follow the pull: with λ·η > 2·(1 + ρ) every step overshoots w^t by more than the one before."""
    return lam * lr > 2.0 * (1.0 + momentum)


class Ditto(Supervised):
    """Trains w as `supervised` does, and v_k on the same batches; v_k stays at the site and is the view `personal`.

    v_k starts as the received model and waits in rounds the site is away. Memory on top of `supervised`: v_k, its gradient
    and its optimiser's moments; what it keeps is one model.
    """

    Params: ClassVar[type] = DittoParams
    views: ClassVar[tuple[str, ...]] = ("global", "personal")

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Copy v_k from the model, in which the personal view is loaded, then load the received one to train on."""
        super().begin_round(config, extras)
        optimizer = self.config.optimizer
        if optimizer.name == "sgd" and too_strong(self.params.lam, self.lr, optimizer.momentum):
            raise UserError(
                f"client.args.lam={self.params.lam:g} with a learning rate of {self.lr:g} diverges: the product must "
                f"not be above {2 * (1 + optimizer.momentum):g}; lower one of them"
            )
        self.own, self.own_buffers = copy_of_model(self.model)
        self.load_view("global")
        self.reference = [self.received[name].to(self.device) for name in self.own]
        self.own_optimizer = make_optimizer(nn.ParameterList(self.own.values()), self.config, {}, self.lr)

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One step of each model. v_k goes first and gives the random numbers back, so that both drop the same units
        and w draws what it would draw alone."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            self.personal_step(batch, step)
        return super().train_step(batch, step)

    def personal_step(self, batch: Batch, step: int) -> None:
        """v ← v − η·(∇F_k(v) + λ·(v − w^t)) by the optimiser of v; its norm statistics move in place."""
        with self.autocast():
            state, inputs = {**self.own, **self.own_buffers}, extra_inputs(self.model, batch.extras)
            output = torch.func.functional_call(self.model, state, (batch.images,), inputs)
        terms = self.loss(Output(output.logits.float(), *output[1:]), batch, step)
        self.own_optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        for parameter in self.own.values():
            if parameter.grad is None:  # unused in this pass: the pull acts on it all the same
                parameter.grad = torch.zeros_like(parameter)
        values = list(self.own.values())
        add_pull(values, [v.grad for v in values if v.grad is not None], self.reference, self.params.lam)
        self.own_optimizer.step()

    def end_round(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Keep v_k; one that diverged is thrown away, and the site goes on from the one before."""
        self.personal = {**self.personal, **usable(self.site, {**self.own, **self.own_buffers})}
        return {}, {}


def usable(site: str, own: Mapping[str, Tensor]) -> State:
    """A copy of v_k on the CPU; {} and a warning if it holds NaN or infinite values."""
    copy = clone_state({name: value.detach() for name, value in own.items()})
    broken = first_non_finite(copy)
    if broken:
        log.warning("%s: the personal model diverged in entry %r; this round's is thrown away", site, broken)
        return {}
    return copy
