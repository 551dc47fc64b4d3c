"""Memory for states that come and go: replies and running sums of one size, round after round.

Fresh memory of this size costs a page fault for every four kilobytes, on a virtual machine several times the time of the copy that fills
it. So the memory of a state that nobody holds any more goes to the next state. Ownership stays exact: a block is given out again only
after the last tensor, view or NumPy array on it is gone. And since the entries of a state lie side by side in its block, a sum over
whole states is one operation instead of one for each of its many small entries.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes, as PyTorch aligns its own tensors
_SMALLEST = 1 << 20  # bytes; the allocator itself reuses what is smaller
_KEPT = 4  # free blocks of one size: global model, running sum, a reply or two
_SIZES = 2  # sizes of which free blocks are kept; a run knows one, of its replies and sums

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_free: dict[int, list[Bytes]] = {}  # by size in bytes, the size given back last at the end


class Plan:
    """Where the entries of a state lie in one block of memory: by type, aligned, in the order of the state.

    `dtypes` gives an entry another type than it has in `state`.
    """

    def __init__(self, state: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        self.shapes = {name: value.shape for name, value in state.items()}
        self.dtypes = {name: dtypes[name] if dtypes is not None else value.dtype for name, value in state.items()}
        self.names: dict[torch.dtype, list[str]] = {}  # of the entries of one type
        self.starts: dict[str, int] = {}  # bytes
        self.segments: dict[torch.dtype, tuple[int, int]] = {}  # start and end of the entries of one type, bytes
        for name, kind in self.dtypes.items():
            self.names.setdefault(kind, []).append(name)
        end = 0
        for kind, names in self.names.items():
            start = end
            for name in names:
                self.starts[name] = end
                end += -(-self.shapes[name].numel() * kind.itemsize // _ALIGNMENT) * _ALIGNMENT
            self.segments[kind] = start, end
        self.num_bytes = end
        self._names, self._dtypes, self._shapes = list(state), list(self.dtypes.values()), list(self.shapes.values())
        self._starts = [self.starts[name] for name in state]

    def fits(self, state: Mapping[str, Tensor]) -> bool:
        """True if `state` has these names in this order, these types and shapes."""
        if list(state) != self._names:
            return False
        values = list(state.values())
        return [v.dtype for v in values] == self._dtypes and [v.shape for v in values] == self._shapes

    def blank(self) -> dict[str, Tensor]:
        """Uninitialised contiguous CPU tensors; those of a state of a megabyte or more in one block, which lives as long as one of them."""
        if self.num_bytes < _SMALLEST:
            return {name: torch.empty(shape, dtype=self.dtypes[name]) for name, shape in self.shapes.items()}
        block = torch.from_numpy(_lease(self.num_bytes))
        views = {kind: block.view(kind) for kind in self.segments}
        blank = {}
        for name, shape in self.shapes.items():
            kind = self.dtypes[name]
            blank[name] = views[kind].as_strided(shape, _strides(shape), self.starts[name] // kind.itemsize)
        return blank

    def flats(self, state: Mapping[str, Tensor]) -> list[Tensor] | None:
        """A state as one flat view a type, with the gaps between entries; None unless it lies in one block exactly by this plan."""
        if not state or not self.fits(state):
            return None
        values = list(state.values())
        bases = {v.data_ptr() - start for v, start in zip(values, self._starts, strict=True)}
        memory = values[0].untyped_storage()
        offset = bases.pop() - memory.data_ptr()
        if (
            bases
            or offset < 0
            or offset % _ALIGNMENT
            or offset + self.num_bytes > memory.nbytes()
            or not all(map(Tensor.is_contiguous, values))
        ):
            return None
        out = []
        for kind, (start, end) in self.segments.items():
            first = values[self._names.index(self.names[kind][0])]
            size = kind.itemsize
            out.append(first.as_strided(((end - start) // size,), (1,), (offset + start) // size))
        return out


_last: list[Plan] = []  # the plan asked for last; a run has one for all its states


def plan_of(state: Mapping[str, Tensor]) -> Plan:
    """The plan of a state, in its own types."""
    for last in _last:
        if last.fits(state):
            return last
    plan = Plan(state)
    _last[:] = [plan]
    return plan


def _strides(shape: torch.Size) -> list[int]:
    """Strides of a contiguous tensor, in elements."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 1, 0, -1):
        strides[axis - 1] = strides[axis] * shape[axis]
    return strides


def _lease(size: int) -> Bytes:
    """`size` aligned bytes, on memory of an earlier lease where one is over.

    PyTorch holds on to the array it was given until the storage made from it is freed, so the end of the array is the end of the lease.
    """
    try:
        block = _free[size].pop()
    except (KeyError, IndexError):
        block = np.empty(size + _ALIGNMENT, np.uint8)
        block.fill(0)  # gaps between entries stay 0, so that a flat sum over a finite state is finite
    offset = -block.ctypes.data % _ALIGNMENT
    lease = block[offset : offset + size]
    weakref.finalize(lease, _give_back, size, block).atexit = False
    return lease


def _give_back(size: int, block: Bytes) -> None:
    # Runs wherever the last tensor happens to die, in any thread: single dict and list operations only, and no lock.
    kept = _free.pop(size, [])
    _free[size] = [*kept[1 - _KEPT :], block]
    for old in list(_free)[:-_SIZES]:
        _free.pop(old, None)
