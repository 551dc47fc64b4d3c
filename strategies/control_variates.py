"""SCAFFOLD: the sites correct their drift by control variates, whose mean the server keeps.

Source: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, arXiv
1910.06378, algorithm 1 with option II and η_g = 1; `clients/control_variates.py` is the local half.
Symbols: x → global parameters, y_i → update.arrays, c → control, Δc_i → change, S → sites that replied, N → num_sites.

Decided here: floating buffers (norm statistics) get the mean by number of examples and counters the maximum; N counts
the known sites that have training items; a newcomer's c_i is 0, so c shrinks by N'/N when one joins (paper: fixed N).
`flwr.serverapp.strategy` (1.41) has no SCAFFOLD.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedmed.federation.messages import Identity
from fedmed.federation.state import RunningMean, first_non_finite
from fedmed.federation.strategy import Strategy, Update

CONTROL, CHANGE = "c/", "dc/"  # prefixes of the extra arrays, down and up


@dataclass(frozen=True)
class ScaffoldParams:
    """Constants of the server."""

    weights: str = "uniform"  # of the model mean: uniform (paper) | examples, n_k as in FedAvg (our option)

    def __post_init__(self) -> None:
        if self.weights not in ("uniform", "examples"):
            raise ValueError(f"weights uniform or examples expected, got {self.weights!r}")


@dataclass(frozen=True)
class ScaffoldState:
    """What survives a round."""

    control: dict[str, Tensor] = field(default_factory=dict)  # c by parameter name; empty: zeros
    num_sites: int = 0  # N that c was made with; never falls, also when a resumed run finds fewer sites


def entry_weights(names: Iterable[str], trainable: Iterable[str], num_examples: float, rule: str) -> dict[str, float]:
    """Weight of one update by entry: 1 for trainable entries if `rule` is uniform, else n_k; n_k for all the rest."""
    uniform = set(trainable) if rule == "uniform" else set()
    return {name: 1.0 if name in uniform else num_examples for name in names}


def count_sites(sites: Sequence[Identity], before: int, replies: int) -> int:
    """N: sites that can train (a plain client does not say), at least the N before and the number of replies."""
    return max(sum(site.num_train > 0 or site.plain for site in sites), before, replies)


def next_control(
    control: Mapping[str, Tensor], mean_change: Mapping[str, Tensor], replies: int, num_sites: int, before: int
) -> dict[str, Tensor]:
    """c ← (N'·c + |S|·mean_S Δc) / N, which is the published c + (|S|/N)·mean_S Δc when N' = N.

    In: c (empty: zeros), mean over the replies, |S|, N ≥ 1, N' (0 before the first round). Entries without a change keep
    their c. Out: new tensors in the dtype of the inputs.
    """
    kept, gain = before / num_sites, replies / num_sites
    with torch.no_grad():
        out = {name: value * kept for name, value in control.items()}
        for name, value in mean_change.items():
            out[name] = out[name] + value * gain if name in out else value * gain
    return out


def changes(extras: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str | None]:
    """Δc_i by parameter name, and what is wrong with it or None: an entry that is missing, misshapen or not finite."""
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        value = extras.get(CHANGE + name)
        if value is None:
            return {}, f"{CHANGE}{name} is missing"
        if (value.shape, value.dtype) != (parameter.shape, parameter.dtype):
            return {}, f"{CHANGE}{name} is {tuple(value.shape)} {value.dtype}, not as the parameter"
        found[name] = value
    broken = first_non_finite(found) if found else None
    return found, f"{CHANGE}{broken} holds NaN or infinite values" if broken else None


class Scaffold(Strategy):
    """Mean of the models, and of the changes of the control variates. Memory: two running sums, c, and one reply.

    A site whose change is missing or broken is left out of both sums (note `left_out`); its own c_i has moved, so c is
    off by its share of that change until a later change cancels it.
    """

    Params = ScaffoldParams
    State = ScaffoldState
    requires: ClassVar[tuple[str, ...]] = ("dc/*",)

    def payload(self, round: int, site: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """c, the same tensors for all sites; nothing in the first round."""
        return {CONTROL + name: value for name, value in self.state.control.items()}, {}

    def aggregate(self, round: int, global_state: dict[str, Tensor], updates: Iterable[Update]) -> dict[str, Tensor]:
        """One pass over the replies, then the new model and the new c; without a usable reply both stay."""
        model, change = RunningMean(), RunningMean()
        shares: dict[str, float] = {}
        left_out: list[str] = []
        for update in updates:
            own = {name: update.arrays[name] for name in self.layout.trainable if name in update.arrays}
            delta, problem = changes(update.extras, own)
            if problem:
                self.log.warning("round %d: %s is left out, %s", round, update.site, problem)
                left_out.append(update.site)
            else:
                n = float(update.num_examples)
                shares[update.site] = n if self.params.weights == "examples" else 1.0
                model.add(update.arrays, entry_weights(update.arrays, self.layout.trainable, n, self.params.weights))
                change.add(delta, 1.0)
            del update, own, delta
        self.note("left_out", left_out)
        mean, mean_change = model.result(), change.result()
        if mean is None or mean_change is None:
            return global_state
        before = self.state.num_sites
        num_sites = count_sites(self.sites, before, len(shares))
        control = next_control(self.state.control, mean_change, len(shares), num_sites, before)
        self.state = ScaffoldState(control, num_sites)
        self._note_weights(shares)
        return {**global_state, **mean}

    def _note_weights(self, weights: Mapping[str, float]) -> None:
        total = sum(weights.values())
        shares = {site: weight / total for site, weight in weights.items()}
        self.note_weights(shares)
