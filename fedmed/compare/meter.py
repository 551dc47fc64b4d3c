"""Counts and times what training does in this process: steps, passes through the network, bytes of messages."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fedmed.config import Config


@dataclass
class Sample:
    """One message answered by a site, or one scoring by the coordinator (kind `central`, node -1). Bytes are those of arrays, passes are images."""

    kind: str  # train, query, evaluate, central
    round: int
    node: int
    seconds: float
    down: int = 0
    up: int = 0
    items: int = 0  # training items the answer stands for
    steps: int = 0
    step_s: float = 0.0  # median time from one step to the next; 0 for fewer than two
    forward: int = 0  # outside training steps
    backward: int = 0
    step_images: int = 0  # in the batches of the steps
    step_forward: int = 0  # inside training steps
    step_backward: int = 0


class Meter:
    """Counts and times what happens in this process; `reset` begins anew."""

    def __init__(self, synchronise: Callable[[], None]) -> None:
        self._synchronise = synchronise
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.forward = self.backward = self.step_forward = self.step_backward = self.step_images = 0
        self.stamps: list[float] = []
        self._in_step = False

    def passed(self, output: Any, images: int) -> None:
        """A forward pass of `images` images gave `output`; its backward pass counts once, when a gradient comes through."""
        inside, awaited = self._in_step, [images]
        if inside:
            self.step_forward += images
        else:
            self.forward += images

        def came(_: Any) -> None:
            count = awaited.pop() if awaited else 0
            if inside:
                self.step_backward += count
            else:
                self.backward += count

        for tensor in output[:2]:  # logits and features
            if tensor is not None and tensor.requires_grad:
                tensor.register_hook(came)

    @contextlib.contextmanager
    def step(self, images: int) -> Iterator[None]:
        """Around one training step."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
        self._synchronise()
        self.step_images += images
        self.stamps.append(time.perf_counter())

    def sample(self, kind: str, number: int, node: int, seconds: float) -> Sample:
        """What was counted since the last reset."""
        gaps = [b - a for a, b in itertools.pairwise(self.stamps)]
        return Sample(
            kind, number, node, seconds, steps=len(self.stamps), step_s=statistics.median(gaps) if gaps else 0.0,
            forward=self.forward, backward=self.backward, step_images=self.step_images,
            step_forward=self.step_forward, step_backward=self.step_backward,
        )  # fmt: skip


@contextlib.contextmanager
def metered(config: Config, meter: Meter) -> Iterator[None]:
    """Let the networks and the client class of a configuration report to a meter for a while."""
    from fedmed.federation import site

    build, cls = site.build_model, site.client_class(config)
    owner: Any = next(c for c in cls.__mro__ if "train_step" in vars(c))
    train_step = owner.train_step

    def counted(*args: Any, **options: Any) -> Any:
        model = build(*args, **options)
        model.register_forward_hook(lambda _, given, output: meter.passed(output, len(given[0])))
        return model

    def timed(self: Any, batch: Any, step: int) -> Any:
        with meter.step(len(batch.images)):
            return train_step(self, batch, step)

    site.build_model, owner.train_step = counted, timed
    try:
        yield
    finally:
        site.build_model, owner.train_step = build, train_step


def array_bytes(content: Any) -> int:
    """Bytes of all arrays of a message, without what the protocol adds."""
    from flwr.app import ArrayRecord

    records = [record for record in content.values() if isinstance(record, ArrayRecord)]
    return sum(_size(array) for record in records for array in record.values())


def _size(array: Any) -> int:
    tensor = vars(array).get("tensor")
    return len(array.data) if tensor is None else tensor.numel() * tensor.element_size()
