"""PASSION: each modality's encoder is averaged over the sites that have it, and lagging modalities get more weight.

Source: Shi et al., "PASSION: Towards Effective Incomplete Multi-Modal Medical Image Segmentation with Imbalanced Missing
Rates", ACM MM 2024, arXiv 2407.14796, and its official code: a method for one data set. The federated use is ours: the
sites train with the losses of `clients/modality_distillation.py`, the server keeps β (`fedmed/losses/balance.py`).
Symbols: M modalities, n_k → num_examples, N_k^m → counts (training items having m), S_k^m → distance sums,
D^m = Σ_k S_k^m / Σ_k N_k^m → distance, β → beta, η → eta, e = round - 1 → update.

Decided here: an encoder that no replying site has data for stays as it is; a reply whose counts cannot be read has part
in the shared entries only; one whose distances cannot be read has no part in D. One site alone is the published method,
with one update of β a round instead of one an epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedmed.federation.state import RunningMean
from fedmed.federation.strategy import Strategy, Update
from fedmed.losses.balance import BalanceParams, update_balance

Numbers = list[float]


@dataclass(frozen=True)
class PassionState:
    """What survives a round."""

    beta: list[float] = field(default_factory=list)  # β (M), norm √M; empty: ones
    eta: float = 0.0  # η of the last update; 0: there was none
    updates: int = 0  # number of updates of β


def read_counts(extras: Mapping[str, Tensor], num_modalities: int, num_examples: int) -> Numbers | None:
    """N_k^m (M) of a reply, at most n_k; None if they are missing, of another shape, or not finite and ≥ 0."""
    counts = _vector(extras.get("modality_count"), num_modalities)
    return None if counts is None else [min(count, float(num_examples)) for count in counts]


def read_distances(extras: Mapping[str, Tensor], counts: Numbers | None, num_modalities: int) -> Numbers | None:
    """S_k^m (M) of a reply; None if they, or the counts they belong to, cannot be used (see `read_counts`)."""
    return None if counts is None else _vector(extras.get("distance_sum"), num_modalities)


def _vector(values: Tensor | None, length: int) -> Numbers | None:
    if values is None or tuple(values.shape) != (length,):
        return None
    numbers = values.double()
    return numbers.tolist() if bool((numbers.isfinite() & (numbers >= 0)).all()) else None


def entry_weights(group: Mapping[str, int], counts: Numbers, num_examples: int) -> dict[str, float]:
    """Weight of one update by entry: N_k^m for the encoder of modality m, n_k for what is shared.

    group: entry → m in 0 ... M - 1, or M for a shared one; counts (M).
    """
    by_group = [*counts, float(num_examples)]
    return {name: by_group[index] for name, index in group.items()}


def mean_distance(sums: Sequence[Numbers], counts: Sequence[Numbers], num_modalities: int) -> Tensor:
    """D^m = Σ_k S_k^m / Σ_k N_k^m. In: K lists (M) each. Out: (M,) float64, NaN for a modality that no site has."""
    shape = (len(sums), num_modalities)
    above, below = (torch.tensor(x, dtype=torch.float64).reshape(shape).sum(dim=0) for x in (sums, counts))
    return torch.where(below > 0, above / below, torch.nan)


def shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights made to sum to 1; all 0 if they sum to 0."""
    total = sum(weights.values())
    return {site: weight / total if total > 0 else 0.0 for site, weight in weights.items()}


def advance(state: PassionState, update: int, distance: Tensor, params: BalanceParams) -> PassionState:
    """State after a round with distances (M,), NaN = not measured; unchanged if nothing was measured."""
    if not bool(distance.isfinite().any()):
        return state
    beta = torch.tensor(state.beta or [1.0] * len(distance), dtype=torch.float64)
    eta = state.eta if state.updates else params.eta
    beta, eta = update_balance(beta, eta, update, distance, params)
    return PassionState(beta.tolist(), eta, state.updates + 1)


class Passion(Strategy):
    """FedAvg with the encoder of each modality weighted by the items having it, and the rule for β.

    Loops once over the updates: a running sum and one reply in memory, and of every reply 2 M numbers.
    """

    Params: ClassVar[type] = BalanceParams
    State = PassionState
    requires: ClassVar[tuple[str, ...]] = ("distance_sum", "modality_count")
    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    @property
    def num_modalities(self) -> int:
        """M: the model's groups `modality` but the last, which is shared. Raises `UserError` for a model without."""
        return self.layout.num_groups("modality") - 1

    def payload(self, round: int, site: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """β (M,) float32, alike for all sites."""
        return {"beta": torch.tensor(self.state.beta or [1.0] * self.num_modalities)}, {}

    def aggregate(self, round: int, global_state: dict[str, Tensor], updates: Iterable[Update]) -> dict[str, Tensor]:
        """Average by groups, then move β by the distances of those who replied."""
        group, width, model = self.layout.group_of("modality"), self.num_modalities, RunningMean()
        sizes: dict[str, float] = {}
        having: dict[str, Numbers] = {}
        measured: dict[str, Numbers] = {}
        for update in updates:
            counts = read_counts(update.extras, width, update.num_examples)
            distances = read_distances(update.extras, counts, width)
            if counts is None:
                self.log.warning("round %d: %s has no usable modality counts", round, update.site)
            model.add(update.arrays, entry_weights(group, counts or [0.0] * width, update.num_examples))
            sizes[update.site] = float(update.num_examples)
            having |= {} if counts is None else {update.site: counts}
            measured |= {} if distances is None else {update.site: distances}
            del update
        distance = mean_distance(list(measured.values()), [having[site] for site in measured], width)
        self.state = advance(self.state, round - 1, distance, self.params)
        self._report(sizes, having, distance)
        mean = model.result()
        return global_state if mean is None else {**global_state, **mean}

    def _report(self, sizes: dict[str, float], having: dict[str, Numbers], distance: Tensor) -> None:
        """Note the weights of the shared entries and of each encoder, the distances and β."""
        weights = shares(sizes)
        self.note_weights(weights)
        by_modality = [shares({site: counts[m] for site, counts in having.items()}) for m in range(self.num_modalities)]
        self.note("modality_weights", by_modality)
        self.note("distance", distance.tolist())
        self.note("beta", self.state.beta)
        self.note("eta", self.state.eta)
