"""FedMLP: sites that annotate only some classes learn the others from what the rest of the federation knows of them.

Source: "FedMLP: Federated Multi-Label Medical Image Classification under Task Heterogeneity", MICCAI 2024, arXiv
2406.18995, and its official code. The local half is `clients/missing_classes.py`.
Symbols: K sites, C classes, D features, n_k → num_examples, AC_k → active, P_k, m_k → tables, counts (rows 2c: class c
absent, 2c + 1: present), d_k → degrees, G → proto, d_G → tau, S → warmup_rounds.

Departures from the official code, where a class without positives or without sites gives NaN or a zero row that enters the
mean: a row averages only the sites that annotate the class, have items of it and sent finite values; without such a site
the row of the round before stays; a degree likewise (it begins at 1). Both prototypes of a class carry a flag that says
whether they were ever known. A site absent from a round is not in that round's means. Counters: maximum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmed.federation.strategy import Strategy, Update
from strategies.site_shares import normalise, reported

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class FedMLPParams:
    """Constants of the server; defaults are the official code's unless marked."""

    warmup_rounds: int = 50  # S ≥ 1, rounds of stage 1; in the last the first prototypes come in
    proto_weight: str = "examples"  # of a site in a row: examples, n_k | count, its items in the row (our option)
    min_count: int = 1  # ≥ 1, a row of fewer items does not enter (our option; sites withhold by their own min_count)

    def __post_init__(self) -> None:
        if self.warmup_rounds < 1 or self.min_count < 1 or self.proto_weight not in ("examples", "count"):
            raise ValueError(
                f"warmup_rounds >= 1, min_count >= 1 and proto_weight examples or count expected, got {self}"
            )


@dataclass(frozen=True)
class FedMLPState:
    """What survives a round; all empty until the first prototypes have come."""

    proto: Tensor = field(default_factory=lambda: torch.zeros(0, 0))  # G (2C, D) float32; zeros where not valid
    proto_valid: list[int] = field(default_factory=list)  # (2C,), 1 = the row was known at least once
    tau: list[float] = field(default_factory=list)  # d_G (C,) in [0, 1]


@dataclass(frozen=True)
class Finding:
    """What one site says of its classes: proto (2C, D), count (2C,), tau (C,), active (C,)."""

    proto: Floats
    count: Floats
    tau: Floats
    active: Bools


def read_finding(extras: Mapping[str, Tensor], num_classes: int | None, width: int | None) -> Finding:
    """Take a site's extra arrays apart. `num_classes`, `width`: C and D where they are known. Raises `ValueError` for
    arrays that are missing or of other shapes; values are not looked at.
    """
    missing = [name for name in ("proto", "proto_count", "tau", "active") if name not in extras]
    if missing:
        raise ValueError(f"array {missing[0]!r} is missing")
    proto, count, tau, active = (
        extras[name].detach().double().cpu().numpy().copy() for name in ("proto", "proto_count", "tau", "active")
    )
    c = len(active) if num_classes is None and active.ndim == 1 else num_classes or 0
    d = proto.shape[1] if width is None and proto.ndim == 2 else width or 0
    shapes, expected = (proto.shape, count.shape, tau.shape, active.shape), ((2 * c, d), (2 * c,), (c,), (c,))
    if shapes != expected:
        raise ValueError(f"arrays of shapes {expected} expected, got {shapes}")
    return Finding(proto, count, tau, active == 1)


def row_weights(
    tables: Floats, counts: Floats, active: Bools, num_examples: Floats, min_count: int = 1, rule: str = "examples"
) -> Floats:
    """Weight of each site in each row: n_k (or the row's count) where the class is active, the count is at least
    `min_count` and the row is finite; else 0. In: (K, 2C, D), (K, 2C), (K, C), (K,). Out: (K, 2C).
    """
    usable = np.repeat(active, 2, axis=1) & (counts >= max(min_count, 1)) & np.isfinite(tables).all(axis=2)
    usable &= np.isfinite(counts)
    return np.where(usable, counts if rule == "count" else num_examples[:, None], 0.0)


def aggregate_prototypes(tables: Floats, weights: Floats, previous: Floats, valid: Bools) -> tuple[Floats, Bools]:
    """G[r] = Σ_k w_kr P_k[r] / Σ_k w_kr; a row without weight keeps its value and its flag.

    In: (K, 2C, D), (K, 2C) ≥ 0, (2C, D), (2C,). Values of weight 0 are not read. Out: (2C, D), (2C,).
    """
    total = weights.sum(axis=0)
    known = np.where(weights[:, :, None] > 0, tables, 0.0)
    mean = np.einsum("kr,krd->rd", weights, known) / np.where(total > 0, total, 1.0)[:, None]
    return np.where((total > 0)[:, None], mean, previous), valid | (total > 0)


def aggregate_degrees(degrees: Floats, active: Bools, num_examples: Floats, previous: Floats) -> Floats:
    """d_G[c] = Σ n_k d_k[c] / Σ n_k over the sites that miss c and sent a finite degree; none: the previous value.

    In: (K, C), (K, C), (K,), (C,). Out: (C,) in [0, 1].
    """
    usable = ~active & np.isfinite(degrees)
    weights = np.where(usable, num_examples[:, None], 0.0)
    total = weights.sum(axis=0)
    mean = (weights * np.where(usable, degrees, 0.0)).sum(axis=0) / np.where(total > 0, total, 1.0)
    return np.clip(np.where(total > 0, mean, previous), 0.0, 1.0)


def learn(
    state: FedMLPState, findings: Sequence[Finding], num_examples: Sequence[int], params: FedMLPParams
) -> FedMLPState:
    """The state after the findings of a round; without any it stays."""
    if not findings:
        return state
    tables, counts, degrees = (np.stack([getattr(f, name) for f in findings]) for name in ("proto", "count", "tau"))
    active, sizes = np.stack([f.active for f in findings]), np.asarray(num_examples, dtype=np.float64)
    rows, classes = counts.shape[1], active.shape[1]
    before = state.proto.double().numpy() if state.proto_valid else np.zeros(tables.shape[1:])
    valid = np.array(state.proto_valid or [0] * rows, dtype=bool)
    weights = row_weights(tables, counts, active, sizes, params.min_count, params.proto_weight)
    proto, valid = aggregate_prototypes(tables, weights, before, valid)
    tau = aggregate_degrees(degrees, active, sizes, np.array(state.tau or [1.0] * classes))
    return FedMLPState(torch.from_numpy(proto).float(), valid.astype(int).tolist(), tau.tolist())


def unknown_classes(state: FedMLPState, num_classes: int) -> list[int]:
    """Classes that are not tagged anywhere: one of their two prototypes was never known."""
    valid = np.array(state.proto_valid or [0] * (2 * num_classes), dtype=bool).reshape(-1, 2)
    return np.flatnonzero(~valid.all(axis=1)).tolist()


class FedMLP(Strategy):
    """FedAvg for the model; from round S on also the means of the sites' prototypes, which go out in stage 2.

    Loops once over the replies; in memory: one reply, the running sum, and K prototype tables of 2C × D numbers.
    """

    Params = FedMLPParams
    State = FedMLPState
    requires: ClassVar[tuple[str, ...]] = ("proto", "proto_count", "tau", "active", "n_pseudo_pos", "n_pseudo_neg")
    tasks: ClassVar[tuple[str, ...]] = ("multilabel",)

    def payload(self, round: int, site: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Stage and whether to send prototypes; in stage 2 the global ones, once there are any."""
        stage = 1 if round <= self.params.warmup_rounds else 2
        config = {"stage": stage, "collect": int(round >= self.params.warmup_rounds)}
        if stage == 1 or not self.state.proto_valid:
            return {}, config
        valid = torch.tensor(self.state.proto_valid, dtype=torch.uint8)
        return {"proto": self.state.proto, "proto_valid": valid, "tau": torch.tensor(self.state.tau)}, config

    def aggregate(self, round: int, global_state: dict[str, Tensor], updates: Iterable[Update]) -> dict[str, Tensor]:
        """Average the models by size, then the prototypes and degrees that came with them."""
        if round == 1 and self.config.federation.rounds <= self.params.warmup_rounds:
            self.log.warning(
                "no pseudo-labels will be made: that begins in round %d, the last is %d",
                self.params.warmup_rounds + 1,
                self.config.federation.rounds,
            )
        heard: dict[str, Update] = {}
        findings: dict[str, Finding] = {}
        result = super().aggregate(round, global_state, self._heard(round, updates, heard, findings))
        self.state = learn(
            self.state, list(findings.values()), [heard[site].num_examples for site in findings], self.params
        )
        self._report(round, heard)
        return result

    def _heard(
        self, round: int, updates: Iterable[Update], heard: dict[str, Update], findings: dict[str, Finding]
    ) -> Iterator[Update]:
        """Pass the updates on and remember what else the sites said."""
        classes = [site.classes for site in self.sites if site.classes]
        num_classes = len(classes[0]) if classes else None
        width = int(self.state.proto.shape[1]) if self.state.proto_valid else None
        for update in updates:
            heard[update.site] = Update(update.site, update.index, update.num_examples, {}, {}, update.metrics)
            if round >= self.params.warmup_rounds:
                try:
                    findings[update.site] = found = read_finding(update.extras, num_classes, width)
                    num_classes, width = len(found.active), found.proto.shape[1]
                except ValueError as error:
                    self.log.warning("round %d: prototypes of %s are left out: %s", round, update.site, error)
            yield update
            del update

    def _report(self, round: int, heard: Mapping[str, Update]) -> None:
        """Note weights and tags; from round S on also the degrees and the classes without prototypes."""
        sizes = np.array([update.num_examples for update in heard.values()], dtype=np.float64)
        weights = normalise(sizes, np.ones(len(sizes))) if len(sizes) else sizes
        self.note_weights(dict(zip(heard, weights.tolist(), strict=True)))
        if round < self.params.warmup_rounds:
            return
        for key in ("n_pseudo_pos", "n_pseudo_neg"):
            numbers = {site: reported(update, key) for site, update in heard.items()}
            self.note(key, {site: value for site, value in numbers.items() if math.isfinite(value)})
        names = next((site.classes for site in self.sites if site.classes), ())
        names = names or tuple(str(c) for c in range(len(self.state.tau)))
        without = [names[c] for c in unknown_classes(self.state, len(names))]
        self.note("learning_degree", dict(zip(names, self.state.tau, strict=False)))
        self.note("classes_without_prototypes", without)
        if round == self.params.warmup_rounds and without:
            self.log.warning("no pseudo-labels for %s until their prototypes are known", ", ".join(without))
