"""Adaptive element-wise aggregation: how much of each received parameter a site takes, learnt by descent on its own data.

Sources: Zhang et al., "FedALA: Adaptive Local Aggregation for Personalized Federated Learning", AAAI 2023, arXiv
2212.01197 (the canonical rule), as used by FedICRA (arXiv 2304.05635) and FedLPPA (arXiv 2402.17502).
Symbols: θ_i → own, the site's parameters after its last round; G → received; W → weights, W ∈ [0, 1] with the shapes of
the merged parameters; θ̂ → merged, the temporary model; g → gradients, ∂loss/∂θ̂; η → eta.
θ̂ = θ_i + (G − θ_i)·W, W ← clip(W − η·g·(G − θ_i), 0, 1): as ∂θ̂/∂W = G − θ_i, this is projected SGD on W.

The released code of both methods has θ_i and G in each other's places and V = 1 − W, V = 1 anew in every round: the same
rule with W_0 = 0 that is never kept. Decided here: an entry of g that is not finite counts as 0, a parameter that the loss
does not depend on keeps its W, a batch that can say nothing is left out, and learning stops after `max_passes` passes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fedmed.federation.state import State

BatchT = TypeVar("BatchT")
Gradient = Callable[[BatchT, State], tuple[Tensor, State] | None]

WINDOW = 10  # recorded losses whose spread is looked at
SPREAD = 0.1  # below it, their standard deviation says that W has settled
FIRST_W = {"ones": 1.0, "zeros": 0.0}  # W_0 by `ala_init`: from the received model, or from the site's own


class Learnt(NamedTuple):
    """What learning gives: θ̂ and W by entry, and the recorded losses, one for each pass that had a batch to learn from."""

    merged: State
    weights: State
    losses: list[float]


def initial_weights(received: Mapping[str, Tensor], ala_init: str) -> State:
    """W_0: ones (θ̂ = G) or zeros (θ̂ = θ_i), shaped, typed and placed as `received`."""
    return {name: torch.full_like(value, FIRST_W[ala_init]) for name, value in received.items()}


def merged_values(own: Mapping[str, Tensor], received: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> State:
    """θ̂ = θ_i + (G − θ_i)·W for every entry of W; new tensors of its shapes. W = 1 where it is exactly G, bit for bit."""
    merged = {}
    for name, share in weights.items():
        value = own[name] + (received[name] - own[name]) * share
        merged[name] = torch.where(share == 1, received[name], value)  # a sum of differences rounds
    return merged


def stepped_weights(
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    received: Mapping[str, Tensor],
    eta: float,
) -> State:
    """W ← clip(W − η·g·(G − θ_i), 0, 1); entries of g that are not finite count as 0, an entry without g keeps its W."""
    stepped = dict(weights)
    for name, gradient in gradients.items():
        finite = torch.where(torch.isfinite(gradient), gradient, 0.0)
        stepped[name] = (weights[name] - eta * finite * (received[name] - own[name])).clamp(0.0, 1.0)
    return stepped


def settled(losses: list[float]) -> bool:
    """True after at least 11 recorded losses of which the last 10 have a standard deviation (divisor 10) below 0.1."""
    if len(losses) <= WINDOW:
        return False
    last = losses[-WINDOW:]
    mean = math.fsum(last) / WINDOW
    return math.sqrt(math.fsum((loss - mean) ** 2 for loss in last) / WINDOW) < SPREAD


def merge_due(time: int, warmup: int, own: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> bool:
    """True if W is to be learnt: the warm-up is over (time > warmup, in one unit) and some entry of θ_i is not that of G.

    Where all entries agree, θ̂ = G whatever W is. The released code compares the sum of the first entry alone.
    """
    return time > warmup and any(not torch.equal(value, received[name]) for name, value in own.items())


def learn(
    own: Mapping[str, Tensor],
    received: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    gradient: Gradient[BatchT],
    batches: Callable[[], Iterable[BatchT]],
    eta: float = 1.0,
    max_passes: int = 1,
) -> Learnt:
    """Learn W, one step a batch: one pass over the batches, or up to `max_passes` until the losses have `settled`.

    own, received and weights have the same entries. gradient(batch, θ̂) gives the loss (scalar) and g, or None for a batch
    that can say nothing; batches() gives the batches of one pass. Recorded is the loss of a pass's last batch that could
    say something, before that batch's step. A pass without any ends learning, and W stays.
    """
    weights = dict(weights)
    merged = merged_values(own, received, weights)
    losses: list[float] = []
    for _ in range(max_passes):
        recorded: Tensor | None = None
        for batch in batches():
            found = gradient(batch, merged)
            if found is None:
                continue
            recorded, gradients = found
            weights = stepped_weights(weights, gradients, own, received, eta)
            merged = merged_values(own, received, weights)
        if recorded is None:
            break
        losses.append(float(recorded))  # one read from the device a pass
        if settled(losses):
            break
    return Learnt(merged, weights, losses)


def mean_weight(weights: Mapping[str, Tensor]) -> float:
    """Mean of W over all elements of all entries; 1, the plain copy, if there is none."""
    count = sum(value.numel() for value in weights.values())
    sums = [value.sum(dtype=torch.float64) for value in weights.values()]
    return float(torch.stack(sums).sum()) / count if count else 1.0


@contextlib.contextmanager
def temporary_model(model: nn.Module, names: Collection[str]) -> Iterator[dict[str, nn.Parameter]]:
    """The model in eval mode with only the parameters `names` asking for gradients; mode and flags are put back.

    Gives these parameters by name: θ̂ is written into them, and no second network is needed. Nothing is recorded for the
    layers below the first of them.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied weight under each of its names
    asked = {parameter: parameter.requires_grad for parameter in parameters.values()}
    was_training = model.training
    chosen = {name: parameters[name] for name in names}
    model.eval()
    for parameter in asked:
        parameter.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    try:
        yield chosen
    finally:
        for parameter, flag in asked.items():
            parameter.requires_grad_(flag)
        model.train(was_training)


def learn_in_model(
    model: nn.Module,
    own: Mapping[str, Tensor],
    received: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    loss: Callable[[BatchT], Tensor | None],
    batches: Callable[[], Iterable[BatchT]],
    eta: float = 1.0,
    max_passes: int = 1,
) -> Learnt:
    """`learn` with the model, whose other entries are what they shall be, as the temporary one; θ̂ is left in it.

    loss(batch) calls the model and gives a scalar, or None for a batch that can say nothing. States on the model's device.
    """
    with temporary_model(model, tuple(weights)) as parameters:
        values = list(parameters.values())

        def gradient(batch: BatchT, merged: State) -> tuple[Tensor, State] | None:
            _write(merged, parameters)
            with torch.enable_grad():
                total = loss(batch)
                if total is None:
                    return None
                found = torch.autograd.grad(total, values, allow_unused=True)
            return total.detach(), {n: g for n, g in zip(parameters, found, strict=True) if g is not None}

        learnt = learn(own, received, weights, gradient, batches, eta, max_passes)
        _write(learnt.merged, parameters)
    return learnt


def _write(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
