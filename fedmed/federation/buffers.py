"""Memory for states that come and go: replies and running sums of one size, round after round.

Fresh memory of this size costs a page fault for every four kilobytes, on a virtual machine several times the time of the copy that fills
it. So the memory of a state that nobody holds any more goes to the next state. Ownership stays exact: a block is given out again only
after the last tensor, view or NumPy array on it is gone.
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


def blank_like(state: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype] | None = None) -> dict[str, Tensor]:
    """Uninitialised contiguous CPU tensors with the names and shapes of `state`, and its dtypes unless `dtypes` gives others.

    The entries of a state of a megabyte or more share one block of memory: whoever keeps one entry keeps the block.
    """
    kinds = {name: dtypes[name] if dtypes is not None else value.dtype for name, value in state.items()}
    starts: list[int] = []
    total = 0
    for name, value in state.items():
        starts.append(total)
        total += -(-value.numel() * kinds[name].itemsize // _ALIGNMENT) * _ALIGNMENT
    if total < _SMALLEST:
        return {name: torch.empty(value.shape, dtype=kinds[name]) for name, value in state.items()}
    block = torch.from_numpy(_lease(total))
    views = {kind: block.view(kind) for kind in set(kinds.values())}
    blank = {}
    for start, (name, value) in zip(starts, state.items(), strict=True):
        kind = kinds[name]
        blank[name] = views[kind].as_strided(value.shape, _strides(value.shape), start // kind.itemsize)
    return blank


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
