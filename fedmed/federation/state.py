"""Algebra on model states: mappings from entry name to tensor.

Maths layer: no Flower, no files. Symbols: θ_k → state of site k, w_k → weight, n_k → number of examples.
Policy for one aggregate: floating entries are averaged, integer entries (counters) take the maximum, dtype in = dtype out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedmed.federation.buffers import Plan, plan_of

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
        self._dtypes: dict[str, torch.dtype] = {}  # of the entries as they came in
        self._plan: Plan | None = None  # of the sums, if the first state came with one weight
        self._flats: list[Tensor] | None = None  # the sums as one tensor a type, if they lie in one block
        self._whole = 0.0  # weights added to all entries of the plan at once
        self._totals: dict[str, float] = {}  # weights added to single entries

    def add(self, state: Mapping[str, Tensor], weight: Weight) -> None:
        """Add one state of CPU tensors. `weight` >= 0 and finite, else `ValueError`; entries may differ from state to state."""
        with torch.no_grad():
            if not isinstance(weight, Mapping):
                _check_weight(float(weight), "state")
                if weight > 0.0:
                    self._add_whole(state, float(weight))
                return
            for name, value in state.items():
                entry_weight = float(weight[name])
                _check_weight(entry_weight, name)
                if entry_weight > 0.0:
                    self._add_entry(name, value, entry_weight)

    def _add_whole(self, state: Mapping[str, Tensor], weight: float) -> None:
        """Add with one weight: in one operation a type if the state lies in memory as the sums do (replies do), else entry by entry."""
        if not self._sums:
            self._dtypes = {name: value.dtype for name, value in state.items()}
            wanted = {name: _sum_dtype(kind) for name, kind in self._dtypes.items()}
            self._plan = plan_of(state) if wanted == self._dtypes else Plan(state, wanted)
            self._sums = self._plan.blank()
            self._flats = self._plan.flats(self._sums)
        flats = self._plan.flats(state) if self._plan is not None and self._flats is not None else None
        if self._flats is None or flats is None:
            for name, value in state.items():
                self._add_entry(name, value, weight)
            return
        first = self.empty  # if not, the state that made the plan has filled every entry of it
        for held, flat in zip(self._flats, flats, strict=True):
            _accumulate(held, flat, weight, first=first)
        self._whole += weight

    def _add_entry(self, name: str, value: Tensor, weight: float) -> None:
        if name not in self._sums:
            self._sums[name] = torch.empty(value.shape, dtype=_sum_dtype(value.dtype))
            self._dtypes[name] = value.dtype
        _accumulate(self._sums[name], value, weight, first=self.total(name) == 0.0)
        self._totals[name] = self._totals.get(name, 0.0) + weight

    def total(self, name: str) -> float:
        """Σ w_k of one entry (0.0 if nothing was added)."""
        whole = self._whole if self._plan is not None and name in self._plan.starts else 0.0
        return whole + self._totals.get(name, 0.0)

    @property
    def empty(self) -> bool:
        """True while nothing of positive weight was added."""
        return self._whole == 0.0 and not self._totals

    def result(self) -> State | None:
        """The mean, in the dtype of the inputs; None if nothing of positive weight was added. Ends the accumulation (the sums are given away)."""
        if self.empty:
            return None
        sums, dtypes = self._sums, self._dtypes
        with torch.no_grad():
            if self._flats is not None and not self._totals:
                for held in self._flats:
                    if held.is_floating_point():
                        held.div_(self._whole)
            else:
                for name, value in sums.items():
                    if value.is_floating_point():
                        value.div_(self.total(name))
        self.__dict__.update(RunningMean().__dict__)
        return {name: value if value.dtype == dtypes[name] else value.to(dtypes[name]) for name, value in sums.items()}


def _accumulate(held: Tensor, value: Tensor, weight: float, *, first: bool) -> None:
    """held ← held + weight · value, or the maximum for integers; the first value fills `held`."""
    if not value.is_floating_point():
        held.copy_(value if first else torch.maximum(held, value))
    elif first:
        torch.mul(value.to(held.dtype), weight, out=held)
    else:
        held.add_(value, alpha=weight)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type a sum of such entries has: float32 for floats, but float64 for float64; integers stay what they are."""
    return torch.float32 if dtype.is_floating_point and dtype != torch.float64 else dtype


def wide(value: Tensor) -> Tensor:
    """A floating tensor as it is computed with: float64 as it is, anything else as float32."""
    return value if value.dtype == torch.float64 else value.float()


def _check_weight(weight: float, name: str) -> None:
    if not (weight >= 0.0 and math.isfinite(weight)):
        raise ValueError(f"expected a finite weight >= 0 for {name}, got {weight}")


def weighted_mean(states: Iterable[tuple[Weight, Mapping[str, Tensor]]]) -> State | None:
    """Weighted mean of (weight, state) pairs, read once and in order; see `RunningMean`. None if all weights are 0."""
    mean = RunningMean()
    for weight, state in states:
        mean.add(state, weight)
        del state  # whoever makes the next one need not find this one in memory
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
    flats = plan_of(state).flats(state)
    with torch.no_grad():
        if flats is not None and all(
            not flat.is_floating_point() or math.isfinite(float(flat.sum())) for flat in flats
        ):
            return None
        for name, value in state.items():
            if (
                value.is_floating_point()
                and not math.isfinite(float(value.sum()))
                and not bool(torch.isfinite(value).all())
            ):
                return name
    return None


def clone_state(state: Mapping[str, Tensor]) -> State:
    """A copy on the CPU that owns its tensors."""
    copy = plan_of(state).blank()
    copy_state(state, copy)
    return copy


def copy_state(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Write every entry of `source` into the entry of `target` of that name, across types and devices where they differ."""
    if not source:
        return
    target = {name: target[name] for name in source}
    plan = plan_of(source)
    origins = plan.flats(source)
    places = plan.flats(target) if origins is not None else None
    with torch.no_grad():
        if origins is not None and places is not None:
            for place, origin in zip(places, origins, strict=True):
                place.copy_(origin)
        else:
            torch._foreach_copy_(list(target.values()), list(source.values()))


def num_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes the tensors of a state take."""
    return sum(value.numel() * value.element_size() for value in state.values())
