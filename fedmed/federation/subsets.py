"""Test items as if modalities were missing: the subsets of the modalities, and what is left of items and batches.

N items, M modalities (one image channel each). For models with `modality_present` in `inputs`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedmed.data.split import Batch, Split
from fedmed.schema import SUBSET_SPLIT

PRESENT = "modality_present"
_ALL_UP_TO = 6  # modalities; 63 subsets


def takes_subsets(model: nn.Module, num_modalities: int) -> bool:
    """Whether a model can be told what is missing, and there is more than one modality that could be."""
    return PRESENT in getattr(model, "inputs", ()) and num_modalities > 1


def safe_names(channels: Sequence[str]) -> list[str]:
    """Channel names of letters, digits, `_` and `-` alone; equal ones get their place (from 1) behind them."""
    names = [re.sub(r"[^A-Za-z0-9_-]", "_", channel) or "_" for channel in channels]
    return [f"{n}_{i}" if names.count(n) > 1 else n for i, n in enumerate(names, start=1)]


def modality_subsets(channels: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Name of the split (`test-with+FLAIR+T1`) -> places of its modalities: the 2^M - 1 non-empty subsets, small ones first.

    Of more than six modalities only each alone and all together, since the number of subsets doubles with each.
    """
    places = range(len(channels))
    sizes = places if len(channels) <= _ALL_UP_TO else (0, len(channels) - 1)
    names = safe_names(channels)
    subsets = [subset for size in sizes for subset in itertools.combinations(places, size + 1)]
    return {SUBSET_SPLIT + "+".join(names[m] for m in subset): subset for subset in subsets}


def present_in(split: Split) -> Tensor | None:
    """Own modalities of the items of a split, (N, M) bool; None where the data do not say: all of them."""
    own = split.extras_at(split.index).get(PRESENT)
    return None if own is None else own > 0


def restrict(split: Split, subset: Sequence[int]) -> Split:
    """The items that have at least one modality of the subset."""
    own = present_in(split)
    return split if own is None else split.subset(own[:, list(subset)].any(dim=1))


def take_away(batch: Batch, subset: Sequence[int]) -> Batch:
    """The batch without the modalities outside the subset: marked as missing, and their pixels are zeros.

    The zeros keep a model honest that asks for `modality_present` and looks at the pixels all the same.
    """
    kept = torch.zeros(batch.images.shape[1], dtype=torch.bool, device=batch.images.device)
    kept[list(subset)] = True
    own = batch.extras.get(PRESENT)
    left = kept.expand(len(batch), -1) if own is None else (own > 0) & kept
    extras: dict[str, Any] = {**batch.extras, PRESENT: left.to(torch.uint8)}
    return Batch(batch.images.masked_fill(~left[:, :, None, None], 0), batch.targets, batch.index, extras=extras)
