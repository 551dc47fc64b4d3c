"""For tests of strategies: a rule bound to a small layout and some known sites, without a federation."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import TypeVar

import pytest
from torch import Tensor

from fedmed.config import Config
from fedmed.federation.history import Journal
from fedmed.federation.layout import Entry, Layout
from fedmed.federation.messages import Identity, Update
from fedmed.federation.strategy import Strategy

R = TypeVar("R", bound=Strategy)


def identity(site: str, index: int, num_train: int = 10) -> Identity:
    """A site that is known."""
    return Identity(site, "classification", ("a", "b"), ("R",), (8, 8), "label", num_train, index=index)


def bound(rule: R, state: dict[str, Tensor], sites: Iterable[tuple[str, int]], groups: tuple[str, ...] = ()) -> R:
    """Bind `rule` as the round loop does. `sites`: (name, training items). Floats named running_* are buffers."""
    entries = {}
    for name, value in state.items():
        kind = "counter" if not value.is_floating_point() else "buffer" if "running" in name else "parameter"
        entries[name] = Entry(kind, kind == "parameter", False, tuple(value.shape), value.dtype)
    roster = {name: identity(name, index, n) for index, (name, n) in enumerate(sites)}
    rule.bind(Config(), Layout(entries, {"depth": groups} if groups else {}), roster, Journal(None))
    return rule


def update(site: str, index: int, n: int, state: dict[str, Tensor], **metrics: float) -> Update:
    """A valid reply."""
    return Update(site, index, n, state, {}, dict(metrics))


@pytest.fixture(scope="session")
def bench() -> SimpleNamespace:
    """The helpers above: `bench.bound(...)`, `bench.update(...)`."""
    return SimpleNamespace(bound=bound, update=update)
