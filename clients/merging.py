"""A site that merges the received model into its own before it trains: the common part of FedICRA and FedLPPA.

Sources: FedICRA, arXiv 2304.05635, and FedLPPA, arXiv 2402.17502, with their official code; the rule itself and its symbols
are in `clients/adaptive_merge.py`. θ_i, W, a flag that W was learnt before, and the number of steps made stay at the site.
At the start of a round the lower part of the model is the received one; of the upper part, `merge_prefixes`, the parameters
are merged and the norm statistics are the received ones.

Departures: nothing is learnt at evaluation, where θ_i is the view `personal` (the released code learns there as well and so
changes the site's model); W is learnt in eval mode; by default W starts at 1 and is kept, `ala_init: zeros` with
`ala_persist: false` is the released variant; the merge is left out if all merged parameters agree, not only the first.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from clients import adaptive_merge as merge
from clients.weak_annotation import any_labelled
from fedmed.data.loader import batches, num_batches
from fedmed.data.split import Batch
from fedmed.errors import UserError
from fedmed.federation.client import MOMENTS, Client
from fedmed.federation.messages import Leaf
from fedmed.federation.state import State, clone_state, copy_state, first_non_finite
from fedmed.losses.partial import labelled_pixels, partial_cross_entropy
from fedmed.models.output import Output

log = logging.getLogger("fedmed.merge")

SITE_INDEX = "site_index"  # extra of a batch: place of its items' site in the federation
KEPT = "merge/"  # prefix of what is kept besides θ_i: merge/<entry> is W
STARTED, STEPS = "merge/started", "merge/steps"
POWER = 0.9  # of the decay over `total_steps` (official code)


@dataclass(frozen=True)
class MergingParams:
    """Constants of the merge and of the learning rate."""

    eta: float = 1.0  # η ≥ 0, step size for W (FedALA, official code)
    warmup_rounds: int = 5  # ≥ 0, first rounds, which copy the received model (official code: 50 steps of 10 a round)
    merge_data_share: float = 0.8  # in (0, 1], contiguous share of the items W is learnt on (FedALA; official code: 1)
    max_passes: int = 50  # ≥ 1, most passes the first time W is learnt, later it is one (ours; published: no limit)
    ala_init: str = "ones"  # first W: ones, the received model (FedALA) | zeros, the site's own (official code)
    ala_persist: bool = True  # W is kept from round to round (FedALA; official code: false)
    bn_buffers: str = "received"  # norm statistics of the merged part: received (official code) | local (ours)
    total_steps: int | None = None  # T ≥ 1: lr·(1 − t/T)^0.9 by the site's steps (official: 30000); null: no decay

    def __post_init__(self) -> None:
        if not 0 <= self.eta < float("inf"):
            raise ValueError(f"a finite eta >= 0 expected, got {self.eta}")
        if not 0 < self.merge_data_share <= 1:
            raise ValueError(f"merge_data_share in (0, 1] expected, got {self.merge_data_share}")
        for name, least in (("warmup_rounds", 0), ("max_passes", 1), ("total_steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} >= {least} expected, got {value}")
        for name, known in (("ala_init", tuple(merge.FIRST_W)), ("bn_buffers", ("received", "local"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: one of {', '.join(known)} expected, got {getattr(self, name)!r}")


def poly_lr(lr: float, step: int, total: int | None) -> float:
    """lr·(1 − t/T)^0.9 at step t = 0, 1, ...; 0 from t = T on; T None: lr."""
    return lr if total is None else lr * max(0.0, 1.0 - step / total) ** POWER


def contiguous_share(num_items: int, share: float, rng: torch.Generator) -> Tensor:
    """Positions of max(1, ⌊share·n⌋) neighbouring items out of n ≥ 1, every start equally likely; int64, ascending."""
    length = max(1, int(share * num_items))
    start = int(torch.randint(num_items - length + 1, (1,), generator=rng))
    return torch.arange(start, start + length)


class MergingClient(Client):
    """Base of clients that learn at the start of a round how much of each received parameter they take.

    A subclass names `merge_prefixes`, dotted names of modules, and gives the objective. Kept at the site: θ_i (1 S), W (a
    number a merged parameter), two scalars. Memory in `begin_round`: θ_i, G, W and θ̂ of the merged part.
    """

    Params: ClassVar[type] = MergingParams
    leaves: ClassVar[tuple[Leaf, ...]] = (
        Leaf("merge_weight_mean", "1", "mean share of the received value in the merged parameters"),
    )
    views: ClassVar[tuple[str, ...]] = ("global", "personal")
    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)
    merge_prefixes: ClassVar[tuple[str, ...]] = ()
    learnt: merge.Learnt | None = None  # of this round, if it merges

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Load the received model and, after the warm-up, merge. Without any labelled pixel the site trains on nothing."""
        self.load_view("global")
        self._check()
        if not any_labelled(self.train_set):
            level = logging.WARNING if self.round <= 1 else logging.INFO
            log.log(level, "%s: no training image has a labelled pixel; the site does not train", self.site)
            self.train_set = self.train_set.subset(torch.zeros(len(self.train_set), dtype=torch.bool))
        elif all(name in self.personal for name in self._merged_entries()):
            self._merge()

    def merge_logits(self, output: Output) -> Tensor:
        """The logits (B, C, H, W) by whose partial cross-entropy W is learnt."""
        return output.logits

    def forward(self, batch: Batch) -> Output:
        """One pass, with the place of the site in the federation for a model that asks for it."""
        if self.site_index >= 0 and SITE_INDEX in getattr(self.model, "inputs", ()):
            capacity = int(self.model.num_sites)  # type: ignore[arg-type]
            if self.site_index >= capacity:
                raise UserError(
                    f"{self.site} is site number {self.site_index + 1} of the federation, the model has room for {capacity}; "
                    "raise model.args.num_sites"
                )
            index = torch.full((len(batch),), self.site_index, dtype=torch.int64, device=batch.images.device)
            batch.extras = {**batch.extras, SITE_INDEX: index}
        return super().forward(batch)

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One optimiser step at the learning rate of the step."""
        assert self.optimizer is not None
        self.set_lr(self.optimizer, step)
        return super().train_step(batch, step)

    def end_round(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Keep θ_i, W, flag and number of steps; a model that diverged is thrown away, and the site goes on from the one before."""
        if len(self.train_set) == 0:
            return {}, {}
        own = clone_state(self.layout.exchanged_state(self.model))
        broken = first_non_finite(own)
        if broken:
            log.warning("%s: the model diverged in entry %r; the site keeps that of its last round", self.site, broken)
            self.personal = {name: v for name, v in self.personal.items() if not name.startswith(MOMENTS)}
        else:
            steps = torch.tensor([self.steps_before + self.num_steps()])
            self.personal = {**self.personal, **own, **self._kept_weights(), STEPS: steps}
        return {}, {"merge_weight_mean": merge.mean_weight(self.learnt.weights if self.learnt else {})}

    # ------------------------------------------------------------------ steps and their learning rate

    def num_steps(self) -> int:
        """Number of optimiser steps this round has: epochs of `train_set` as the loader cuts them, up to `max_steps`."""
        training = self.config.training
        steps = training.epochs * num_batches(len(self.train_set), training.batch_size)
        return steps if training.max_steps is None else min(steps, training.max_steps)

    @property
    def steps_before(self) -> int:
        """Number of optimiser steps the site made in the rounds before this one."""
        return int(self.personal[STEPS]) if STEPS in self.personal else 0

    def set_lr(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Give an optimiser the learning rate of the round's step 0, 1, ...; without `total_steps` it keeps its own."""
        if self.params.total_steps is not None:
            lr = poly_lr(self.lr, self.steps_before + step, self.params.total_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

    # ------------------------------------------------------------------ the merge

    def _check(self) -> None:
        """Refuse what the method cannot read. Raises `UserError`."""
        if self.activation != "softmax":
            raise UserError(
                f"the partial cross-entropy needs softmax outputs, got {self.activation}; set model.activation=softmax"
            )
        schedule = self.config.optimizer.schedule
        if self.params.total_steps is not None and schedule != "constant":
            raise UserError(
                f"client.args.total_steps and optimizer.schedule={schedule} both lower the learning rate; "
                "leave total_steps out or set optimizer.schedule=constant"
            )
        if not self._merged_entries():
            raise UserError(
                f"client {self.config.client.name!r} merges the parameters under {', '.join(self.merge_prefixes)}, of which "
                f"model {self.config.model.name!r} has none; choose the model that belongs to the client"
            )

    def _merged_entries(self) -> list[str]:
        return [name for name in self.layout.trainable if self._is_upper(name)]

    def _is_upper(self, name: str) -> bool:
        return any(name == prefix or name.startswith(prefix + ".") for prefix in self.merge_prefixes)

    def _labelled(self, targets: Tensor) -> bool:
        return bool(labelled_pixels(targets, self.train_set.num_classes, self.train_set.ignore_value).any())

    def _merge(self) -> None:
        """Learn W and leave θ̂ in the model, which holds G."""
        own, received = ({n: state[n] for n in self._merged_entries()} for state in (self.personal, self.received))
        if not merge.merge_due(self.round, self.params.warmup_rounds, own, received):
            return
        if self.params.bn_buffers == "local":
            copy_state(self._own_statistics(), self.model.state_dict())
        share = contiguous_share(len(self.train_set), self.params.merge_data_share, self.rng("merge"))
        items, size = self.train_set.subset(share), self.config.training.batch_size
        weights = self._first_weights(received)
        own, received, weights = self._placed(own), self._placed(received), self._placed(weights)
        first = STARTED not in self.personal
        passes = self.params.max_passes if first else 1
        self.learnt = merge.learn_in_model(
            self.model, own, received, weights, self._merge_loss, lambda: batches(items, size), self.params.eta, passes
        )
        if first:
            log.info("%s: merge weights learnt for the first time, %d passes", self.site, len(self.learnt.losses))

    def _merge_loss(self, batch: Batch) -> Tensor | None:
        """pCE of a batch; None without a labelled pixel."""
        if not self._labelled(batch.targets):
            return None
        return partial_cross_entropy(self.merge_logits(self.forward(batch)), batch.targets, self.train_set.ignore_value)

    def _placed(self, state: State) -> State:
        return {name: value.to(self.device) for name, value in state.items()}

    def _first_weights(self, received: State) -> State:
        """W as it was kept, or anew."""
        fresh = merge.initial_weights(received, self.params.ala_init)
        return {n: self.personal.get(KEPT + n, w) for n, w in fresh.items()} if self.params.ala_persist else fresh

    def _own_statistics(self) -> State:
        """The site's own norm statistics of the merged part; counters stay the received ones."""
        buffers = [n for n, entry in self.layout.entries.items() if entry.kind == "buffer" and self._is_upper(n)]
        return {name: self.personal[name] for name in buffers if name in self.personal}

    def _kept_weights(self) -> State:
        """What the merge of this round leaves to the next: W, if it is kept, and the flag once it was learnt."""
        if self.learnt is None:
            return {}
        kept = {KEPT + n: w for n, w in self.learnt.weights.items()} if self.params.ala_persist else {}
        return {**clone_state(kept), **({STARTED: torch.ones(1)} if self.learnt.losses else {})}
