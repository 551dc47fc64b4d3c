"""Algebra on model states: mappings from entry name to tensor.

Maths layer: no Flower, no files. Symbols: θ_k → state of site k, w_k → weight, n_k → number of examples.
Policy for one aggregate: floating entries are averaged, integer entries (counters) take the maximum, dtype in = dtype out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedmed.federation.buffers import blank_like

State = dict[str, Tensor]
Weight = float | Mapping[str, float]


class RunningMean:
    """Weighted mean Σ_k w_k θ_k / Σ_k w_k, one state at a time.

    Sums are float32 (float64 for float64 entries), in the order of `add`. A weight is one number for the whole state or one per entry.
    A term of weight 0 is never added, so what it holds cannot matter (0 · NaN). Integer entries: maximum over the states of positive weight.
    Peak extra memory: one state in the accumulation type, plus whatever the caller holds.
    """

    def __init__(self) -> None:
        self._sums: State = {}
        self._totals: dict[str, float] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, state: Mapping[str, Tensor], weight: Weight) -> None:
        """Add one state. `weight` >= 0 and finite, else `ValueError`; entries may differ from state to state."""
        with torch.no_grad():
            if not isinstance(weight, Mapping):
                _check_weight(float(weight), "state")
                self._add_whole(state, float(weight))
                return
            for name, value in state.items():
                entry_weight = float(weight[name])
                _check_weight(entry_weight, name)
                if entry_weight > 0.0:
                    self._add_entry(name, value, entry_weight)

    def _add_whole(self, state: Mapping[str, Tensor], weight: float) -> None:
        if weight == 0.0:
            return
        if not self._sums:
            self._begin(state, weight)
            return
        seen = [name for name in state if name in self._dtypes]
        for name in [name for name in state if name not in self._dtypes]:
            self._add_entry(name, state[name], weight)
        if seen:
            # One call for all entries: a network has many small ones, and a call for each costs a quarter of the whole sum.
            torch._foreach_add_([self._sums[n] for n in seen], [state[n] for n in seen], alpha=weight)
        for name in seen:
            self._totals[name] += weight

    def _begin(self, state: Mapping[str, Tensor], weight: float) -> None:
        """The first state, into memory of its own."""
        kinds = {name: _sum_dtype(value.dtype) for name, value in state.items()}
        self._sums = blank_like(state, kinds)
        for name, value in state.items():
            if value.is_floating_point():
                self._dtypes[name] = value.dtype
                torch.mul(value.to(kinds[name]), weight, out=self._sums[name])
            else:
                self._sums[name].copy_(value)
            self._totals[name] = weight

    def _add_entry(self, name: str, value: Tensor, weight: float) -> None:
        held = self._sums.get(name)
        if not value.is_floating_point():
            self._sums[name] = value.clone() if held is None else torch.maximum(held, value)
        elif held is None:
            self._dtypes[name] = value.dtype
            self._sums[name] = torch.mul(value.to(_sum_dtype(value.dtype)), weight)
        else:
            held.add_(value, alpha=weight)
        self._totals[name] = self._totals.get(name, 0.0) + weight

    def total(self, name: str) -> float:
        """Σ w_k of one entry (0.0 if nothing was added)."""
        return self._totals.get(name, 0.0)

    @property
    def empty(self) -> bool:
        """True while nothing of positive weight was added."""
        return not self._totals

    def result(self) -> State | None:
        """The mean, in the dtype of the inputs; None if nothing of positive weight was added. Ends the accumulation (the sums are given away)."""
        if self.empty:
            return None
        sums, self._sums = self._sums, {}
        out: State = {}
        with torch.no_grad():
            for name, value in sums.items():
                dtype = self._dtypes.get(name)
                out[name] = value if dtype is None else value.div_(self._totals[name]).to(dtype)
        self._totals = {}
        return out


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type a sum of such entries has: float32 for floats, but float64 for float64; integers stay what they are."""
    return torch.float32 if dtype.is_floating_point and dtype != torch.float64 else dtype


def _check_weight(weight: float, name: str) -> None:
    if not (weight >= 0.0 and math.isfinite(weight)):
        raise ValueError(f"expected a finite weight >= 0 for {name}, got {weight}")


def weighted_mean(states: Iterable[tuple[Weight, Mapping[str, Tensor]]]) -> State | None:
    """Weighted mean of (weight, state) pairs, read once and in order; see `RunningMean`. None if all weights are 0."""
    mean = RunningMean()
    for weight, state in states:
        mean.add(state, weight)
    return mean.result()


def mix(first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: Mapping[str, float]) -> State:
    """share · first + (1 − share) · second, entry by entry, with `share` in [0, 1] per entry; integer entries: maximum."""
    out: State = {}
    with torch.no_grad():
        for name, a in first.items():
            b = second[name]
            if not a.is_floating_point():
                out[name] = torch.maximum(a, b)
            elif a is b:
                out[name] = a
            else:
                out[name] = torch.add(a * share[name], b, alpha=1.0 - share[name])
    return out


def first_non_finite(state: Mapping[str, Tensor]) -> str | None:
    """Name of the first floating entry that holds NaN or ±inf, or None.

    One read per entry: the sum is finite unless the entry is not (or overflows, and then the exact test decides).
    """
    with torch.no_grad():
        for name, value in state.items():
            if value.is_floating_point() and not math.isfinite(float(value.sum())) and not bool(torch.isfinite(value).all()):
                return name
    return None


def squared_distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """Σ over entries of ‖a − b‖², a scalar tensor (float32, or float64 for float64 entries) with gradient to both; 0.0 for no entries."""
    total: Tensor | None = None
    for name in names:
        term = (first[name] - second[name]).pow(2).sum()
        total = term if total is None else total + term
    return torch.zeros(()) if total is None else total


def clone_state(state: Mapping[str, Tensor]) -> State:
    """A copy on the CPU that owns its tensors."""
    copy = blank_like(state)
    with torch.no_grad():
        if copy:
            torch._foreach_copy_(list(copy.values()), list(state.values()))
    return copy


def num_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes the tensors of a state take."""
    return sum(value.numel() * value.element_size() for value in state.values())
