"""Batches of a split: one gather per step on compact tensors, augmentation while they are small, one conversion to
float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from fedmed.data.augment import Augment
from fedmed.data.split import Batch, Split
from fedmed.errors import UserError


def num_batches(num_items: int, batch_size: int, skip_singleton: bool = True) -> int:
    """Number of batches an epoch over `num_items` gives (see `batches`)."""
    full, rest = divmod(num_items, batch_size)
    return full + (rest > (1 if skip_singleton and batch_size > 1 else 0))


def batches(
    split: Split,
    batch_size: int,
    rng: torch.Generator | None = None,
    augment: Augment | None = None,
    skip_singleton: bool | None = None,
) -> Iterator[Batch]:
    """Yield one epoch of batches of at most `batch_size` items.

    The order is `torch.randperm(n, generator=rng)` with a CPU generator, or the split's own order when `rng` is None.
    `augment` draws from the same generator, batch by batch. `skip_singleton` leaves out a last batch of one item (batch
    normalisation has no variance there; a batch size of 1 is kept); None means: in shuffled epochs only, so that
    ordered passes see every item.
    """
    if batch_size < 1:
        raise UserError(f"training.batch_size must be at least 1, got {batch_size}.")
    if augment is not None and augment.active and rng is None:
        raise ValueError("augmentation needs a generator: pass rng, or no augment for an ordered pass")
    num_items = len(split)
    skip = (rng is not None) if skip_singleton is None else skip_singleton
    order = torch.arange(num_items) if rng is None else torch.randperm(num_items, generator=rng)
    steps = num_batches(num_items, batch_size, skip)
    if steps:
        order = order.to(split.home)  # once, not batch by batch
    for step in range(steps):
        positions = order[step * batch_size : (step + 1) * batch_size]
        if augment is None or rng is None or not augment.active:
            yield split.batch(positions)
        else:
            yield _augmented(split, positions, augment, rng)


def _augmented(split: Split, positions: torch.Tensor, augment: Augment, rng: torch.Generator) -> Batch:
    raw, labels, rows = split.raw(positions)
    moves = augment.draw(raw.shape, rng)
    masks = labels if labels.ndim >= 3 else None
    images, moved = augment.move(raw, masks, moves)  # on the stored type: a quarter of the bytes of float32
    images, moved = augment.finish(split.decode(images), moved, moves)
    targets = split.decode_targets(labels if moved is None else moved)
    return Batch(images, targets, rows, source=partial(split.decode, raw), extras=split.extras_at(rows))
