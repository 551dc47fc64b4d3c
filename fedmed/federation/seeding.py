"""Random generators keyed by (seed, round, site, purpose), so that nothing depends on arrival order, process or history."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive_seed(seed: int, round_number: int, site: str, purpose: str) -> int:
    """A 63-bit seed from the key; equal on every machine and Python."""
    key = f"{seed}|{round_number}|{site}|{purpose}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1


def torch_rng(seed: int, round_number: int, site: str, purpose: str) -> torch.Generator:
    """A CPU torch generator for the key."""
    return torch.Generator().manual_seed(derive_seed(seed, round_number, site, purpose))


def numpy_rng(seed: int, round_number: int, site: str, purpose: str) -> np.random.Generator:
    """A NumPy generator for the key."""
    return np.random.default_rng(derive_seed(seed, round_number, site, purpose))
