"""FedLPPA: every site gets an auxiliary decoder mixed for it, more from sites whose prompts are like its own.

Source: "FedLPPA: Learning Personalized Prompt and Aggregation for Federated Weakly-supervised Medical Image Segmentation",
arXiv 2402.17502, and its official code. `clients/prompted_decoders.py` is the local half, `fedmed/models/prompt_unet.py` the
network. Symbols: K sites, n_k → num_examples, p_D → distribution prompts (one row a site), p_U → universal prompt, q_k → vector
of a site, c_k → affinity, aux_k → last auxiliary decoder of a site.

    q_k = [p_D,k ; p_U] of the global model,  c_k = max(0, cos(q_k, q_i)), c_i = 1,  aux_i = Σ_k c_k aux_k / Σ_k c_k

Departures: the server mixes, where officially every site gets the models of all; the mix is used in every round (officially
it is thrown away after the first ones). Row k of p_D is taken from site k as it is (officially averaged over all sites, of
whom only k has trained it). A prompt that is zero or not finite has affinity 0 with others (officially NaN). A site that is
away is mixed with what it sent last, one never heard is left out. Weights are images (officially batches).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedmed.errors import UserError
from fedmed.federation.state import RunningMean, clone_state, weighted_mean
from fedmed.federation.state import State as ModelState
from fedmed.federation.strategy import Strategy, Update
from fedmed.models.prompt_unet import AUXILIARY, DISTRIBUTION, UNIVERSAL


@dataclass(frozen=True)
class FedLPPAState:
    """What survives a round; both are empty before the first replies."""

    aux: dict[int, ModelState] = field(
        default_factory=dict
    )  # site index → floating entries of the aux decoder it sent last
    prompts: ModelState = field(default_factory=dict)  # p_D and p_U of the global model, by entry name


def prompt_vectors(distribution: Tensor, universal: Tensor) -> Tensor:
    """q_k = [p_D,k ; p_U] of every row. In: (K, h, w), (1, h, w). Out: (K, 2 h w) float64."""
    rows = distribution.double().flatten(1)
    return torch.cat([rows, universal.double().flatten().expand(len(rows), -1)], dim=1)


def affinities(vectors: Tensor, site: int) -> list[float]:
    """c_k = max(0, cos(q_k, q_i)) for i = `site`, and c_i = 1; 0 where q_k or q_i is zero or not finite. (K, D) to K numbers."""
    norms = vectors.norm(dim=1)
    usable = norms.isfinite() & (norms > 0)
    unit = torch.where(usable[:, None], vectors / norms[:, None], 0.0)
    found = (unit @ unit[site]).clamp_min(0.0)
    found[site] = 1.0
    return [float(c) for c in found]


def mixed(affinity: Iterable[float], aux: Mapping[int, ModelState]) -> ModelState:
    """aux_i = Σ_k c_k aux_k / Σ_k c_k over the sites heard (the keys of `aux`), in their order; {} if the sum is 0."""
    weights = list(affinity)
    return weighted_mean((weights[k], aux[k]) for k in sorted(aux)) or {}


class FedLPPA(Strategy):
    """FedAvg, but row k of p_D comes from site k alone, and every site is sent its own mix of the auxiliary decoders.

    The global model's auxiliary decoder is the plain mean; a site gets it until a decoder was heard that has affinity with it.
    Sites receive mixes, never the model of another site. Loops once over the replies; in memory, and in every checkpoint: K
    auxiliary decoders (b = 16: K · 2.6 MB), besides one reply and the running sum.
    """

    State = FedLPPAState
    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    def payload(self, round: int, site: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The auxiliary decoder mixed for the site (its counters stay those of the global model); nothing in the first round."""
        self._auxiliary_entries()  # another model is refused before anything is trained
        index = self.roster[site].index
        if not self.state.prompts or not self._has_row(index):  # it refuses by itself
            return {}, {}
        return mixed(self._affinity(index), self.state.aux), {}

    def aggregate(self, round: int, global_state: ModelState, updates: Iterable[Update]) -> ModelState:
        """Average the models by size, take each site's row of p_D, and put its auxiliary decoder aside."""
        names = self._auxiliary_entries()
        model, sizes = RunningMean(), dict[str, float]()
        aux, rows = dict(self.state.aux), global_state[DISTRIBUTION].clone()
        for update in updates:
            if not 0 <= update.index < len(rows):
                raise UserError(
                    f"{update.site} is site number {update.index + 1}, the model has prompts for {len(rows)}; raise model.args.num_sites"
                )
            model.add(update.arrays, update.num_examples)
            sizes[update.site] = float(update.num_examples)
            if update.num_examples > 0:
                aux[update.index] = clone_state({name: update.arrays[name] for name in names})
                rows[update.index] = update.arrays[DISTRIBUTION][update.index]
            del update
        mean = model.result()
        if mean is None:
            return global_state
        new = {**global_state, **mean, DISTRIBUTION: rows}
        self.state = FedLPPAState(aux, {name: new[name] for name in (DISTRIBUTION, UNIVERSAL)})
        self._report(sizes)
        return new

    def _has_row(self, index: int) -> bool:
        return 0 <= index < len(self.state.prompts[DISTRIBUTION])

    def _affinity(self, index: int) -> list[float]:
        prompts = self.state.prompts
        return affinities(prompt_vectors(prompts[DISTRIBUTION], prompts[UNIVERSAL]), index)

    def _auxiliary_entries(self) -> tuple[str, ...]:
        """Floating entries of the auxiliary decoder. Raises `UserError` for a model without one, or without prompts."""
        entries = self.layout.entries
        found = tuple(n for n, e in entries.items() if n.startswith(f"{AUXILIARY}.") and e.kind != "counter")
        if not found or DISTRIBUTION not in entries or UNIVERSAL not in entries:
            raise UserError(
                "strategy 'fedlppa' needs a model with prompts and an auxiliary decoder; set model.name=prompt_unet"
            )
        return found

    def _report(self, sizes: Mapping[str, float]) -> None:
        """Note the weights in the mean, and the affinities that the next mixes are made with, by site."""
        total = sum(sizes.values())
        self.note_weights({site: n / total for site, n in sizes.items()})
        heard = [site for site in self.sites if site.index in self.state.aux]
        rows = {site.site: self._affinity(site.index) for site in self.sites if self._has_row(site.index)}
        self.note("affinity", {name: {k.site: row[k.index] for k in heard} for name, row in rows.items()})
