"""Generators of data preparation, derived from (seed, purpose); the global NumPy generator is never touched."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from fedmed.errors import UserError

Rng = np.random.RandomState | np.random.Generator


@dataclass(frozen=True)
class Seed:
    """The seed of a run. `rng(purpose)` gives the legacy generator of one purpose; equal seed and purpose, equal draws.

    Legacy generators are used because the published protocols are defined by their stream of draws.
    """

    value: int

    def rng(self, purpose: str, fixed: int | None = None) -> np.random.RandomState:
        """Legacy generator for `purpose`; `fixed` (0..2^32-1), where given, is used as it is (a published seed)."""
        if fixed is not None:
            if not 0 <= fixed < 2**32:
                raise UserError(f"seed of a data protocol: expected 0..{2**32 - 1}, got {fixed}. Set args.seed.")
            return np.random.RandomState(fixed)
        digest = hashlib.sha256(f"{self.value}/{purpose}".encode()).digest()
        return np.random.RandomState(int.from_bytes(digest[:4], "little"))


def integers(rng: Rng, high: int, size: int | None = None) -> np.ndarray | int:
    """Uniform integers in [0, high) from either kind of NumPy generator."""
    if isinstance(rng, np.random.Generator):
        return rng.integers(high, size=size)
    return rng.randint(high, size=size)
