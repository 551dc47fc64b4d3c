"""SCAFFOLD, local half: every step is corrected by the difference of two control variates.

Source: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, arXiv
1910.06378, algorithm 1 with option II; `strategies/control_variates.py` is the server.
Symbols: x → received, y_i → trained, c → control, c_i → own, c_i⁺ → new own, K → num_steps, η_l → lr, g_i → gradient.

Plain SGD only: option II reads the mean gradient off the distance travelled, which holds for no other optimiser. Weight
decay and the terms of add-ons are part of the local objective, so of g_i and of c_i. Buffers have no control variate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clients.supervised import Supervised
from fedmed.data.split import Batch
from fedmed.errors import FedMedError, UserError
from fedmed.federation.messages import Leaf
from fedmed.federation.state import State, first_non_finite

OWN, CONTROL, CHANGE = "control/", "c/", "dc/"  # prefixes: c_i at the site, c on the way down, Δc_i on the way up


def correct_gradients(
    parameters: Mapping[str, nn.Parameter], control: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> None:
    """In place: g ← g + c − c_i. An empty mapping is zero; a parameter without gradient has g = 0."""
    if not control and not own:
        return
    for parameter in parameters.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    with torch.no_grad():
        if control:
            torch._foreach_add_(gradients, [control[name] for name in parameters])
        if own:
            torch._foreach_sub_(gradients, [own[name] for name in parameters])


def travelled_gradient(received: Tensor, trained: Tensor, num_steps: int, lr: float) -> Tensor:
    """(x − y_i) / (K·η_l): the mean of what the K steps subtracted per unit of learning rate. K = 0: zeros."""
    return (received - trained) / (num_steps * lr) if num_steps else torch.zeros_like(received)


def new_own(
    received: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    control: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    num_steps: int,
    lr: float,
) -> State:
    """Option II: c_i⁺ = c_i − c + (x − y_i) / (K·η_l), for the entries of `trained`, in their dtype.

    An empty `control` or `own` is zero. K = 0: c_i, unchanged, for no step says nothing about the gradient.
    """
    out: State = {}
    for name, value in trained.items():
        before = own[name] if own else torch.zeros_like(value)
        gradient = travelled_gradient(received[name], value, num_steps, lr)
        out[name] = before + gradient - control[name] if control and num_steps else before + gradient
    return out


def change(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> State:
    """Δc_i = c_i⁺ − c_i; an empty `before` is zero."""
    return {name: value - before[name] if before else value for name, value in after.items()}


def with_prefix(state: Mapping[str, Tensor], prefix: str) -> State:
    """The same tensors under `prefix` + name."""
    return {prefix + name: value for name, value in state.items()}


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> State:
    """The entries that begin with `prefix`, by reference, under their names without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


class ControlVariates(Supervised):
    """Supervised training with corrected gradients; keeps c_i between rounds. Memory: c and c_i (on the device too if
    that is not the CPU), and at the end c_i⁺ and Δc_i.

    A site without a kept c_i begins from 0; if it had one, it is out of step with the server and `personal_fresh` says so.
    """

    leaves: ClassVar[tuple[Leaf, ...]] = (
        Leaf(
            "dc/*", "as the parameter", "change of the control variate: mean training gradient of the round", 1, "array"
        ),
    )

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Take c from the message and c_i from what the site keeps. Raises `UserError` for any but plain SGD."""
        super().begin_round(config, extras)
        optimizer = self.config.optimizer
        if optimizer.name != "sgd" or optimizer.momentum != 0.0:
            raise UserError(
                f"SCAFFOLD needs plain SGD, got {optimizer.name} with momentum {optimizer.momentum:g}; "
                "set optimizer.name=sgd optimizer.momentum=0 and a learning rate that suits it"
            )
        self.control, self.own = without_prefix(extras, CONTROL), without_prefix(self.personal, OWN)
        self.num_steps = 0

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The base step, with the gradients corrected between backward and update."""
        if step == 0:
            assert self.optimizer is not None
            parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            control = {name: value.to(self.device) for name, value in self.control.items()}
            own = {name: value.to(self.device) for name, value in self.own.items()}
            # The hook refers to tensors only: with the client in it, a cycle would keep all of them till the collector comes.
            self.optimizer.register_step_pre_hook(lambda *_: correct_gradients(parameters, control, own))
        self.num_steps = step + 1
        return super().train_step(batch, step)

    def end_round(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Keep c_i⁺ and send Δc_i. Raises `FedMedError` if it is not finite: the site then counts as absent everywhere."""
        trained = {name: p.detach().cpu() for name, p in self.model.named_parameters() if p.requires_grad}
        after = new_own(self.received, trained, self.control, self.own, self.num_steps, self.lr)
        delta = change(after, self.own)
        broken = first_non_finite(delta)
        if broken:
            raise FedMedError(f"the control variate of entry {broken!r} is not finite: the local training diverged")
        self.personal = {**self.personal, **with_prefix(after, OWN)}
        return with_prefix(delta, CHANGE), {}
