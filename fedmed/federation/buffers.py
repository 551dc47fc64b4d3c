"""Memory for states that come and go: replies and running sums of one size, round after round.

Fresh memory of this size costs a page fault for every four kilobytes, on a virtual machine several times the cost of the copy that
fills it. So the memory of a state that nobody holds any more is given to the next one. Ownership stays exact: memory is
handed out again only after the last tensor, view or NumPy array on it has gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes, as PyTorch aligns its own tensors
_SMALLEST = 1 << 20  # bytes; the allocator itself reuses what is smaller
_KEPT = 4  # free blocks kept: global model, sum, and a reply or two

_free: list[np.ndarray] = []  # oldest first


def blank_like(state: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype] | None = None) -> dict[str, Tensor]:
    """Uninitialised contiguous CPU tensors of the shapes of `state`, in its dtypes unless `dtypes` names another for an entry.

    Large states lie in one block of memory, so one entry that is kept keeps the block.
    """
    kinds = {name: value.dtype if dtypes is None else dtypes.get(name, value.dtype) for name, value in state.items()}
    sizes = {name: value.numel() * kinds[name].itemsize for name, value in state.items()}
    total = sum(_padded(size) for size in sizes.values())
    if total < _SMALLEST:
        return {name: torch.empty(value.shape, dtype=kinds[name]) for name, value in state.items()}
    block = torch.from_numpy(_lease(total))
    by_kind: dict[torch.dtype, Tensor] = {}
    blank: dict[str, Tensor] = {}
    start = 0
    for name, value in state.items():
        kind, shape = kinds[name], value.shape
        if kind not in by_kind:
            by_kind[kind] = block[: total - total % _ALIGNMENT].view(kind)
        stride, strides = 1, []
        for length in reversed(shape):
            strides.append(stride)
            stride *= length
        blank[name] = by_kind[kind].as_strided(shape, strides[::-1], start // kind.itemsize)
        start += _padded(sizes[name])
    return blank


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _lease(size: int) -> np.ndarray:
    """An array of `size` bytes, aligned; its memory returns to the shelf when the array and all tensors made from it are gone."""
    block = next((b for b in reversed(_free) if b.nbytes == size + _ALIGNMENT), None)
    ...
