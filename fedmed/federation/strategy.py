"""The base server rule: FedAvg, and the hooks a method overrides.

Federated averaging: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017,
arXiv 1602.05629: w = Σ_k n_k w_k / Σ_k n_k over the sites that answered. Departure: floating buffers are averaged like weights and
integer counters take the maximum.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from torch import Tensor

from fedmed.config import Config
from fedmed.errors import FedMedError, UserError
from fedmed.federation.history import Journal
from fedmed.federation.layout import Layout
from fedmed.federation.messages import Answer, Identity, Query, Update
from fedmed.federation.state import State as ModelState
from fedmed.federation.state import weighted_mean
from fedmed.files import json_ready
from fedmed.schema import NoParams


@dataclass(frozen=True)
class NoState:
    """A rule that remembers nothing from round to round."""


def by_examples(updates: Iterable[Update]) -> Iterator[tuple[int, ModelState]]:
    """Pairs (number of examples, state) for `weighted_mean`; no update is held while the next one is made."""
    for update in updates:
        yield update.num_examples, update.arrays
        del update


class Strategy(FlowerStrategy):
    """Federated averaging by number of examples, and the base of every rule.

    A method overrides `queries`, `on_query`, `payload`, `aggregate` as far as it needs them and keeps what it remembers in `self.state`, one
    frozen dataclass that is replaced, never mutated. Loops once over the updates: one reply in memory besides the running sum.
    """

    Params: ClassVar[type] = NoParams
    State: ClassVar[type] = NoState
    requires: ClassVar[tuple[str, ...]] = ()  # leaves (`Leaf.name`) the client must declare
    tasks: ClassVar[tuple[str, ...]] = ("classification", "multilabel", "segmentation")
    # True for a schedule that counts back from the last round: then a resume must keep `rounds`.
    depends_on_rounds: ClassVar[bool] = False

    params: Any
    state: Any
    layout: Layout
    config: Config

    def __init__(self, params: Any = None) -> None:
        self.params = self.Params() if params is None else params
        self.state = self.State()
        self.log = logging.getLogger(f"fedmed.{type(self).__name__.lower()}")
        self.roster: dict[str, Identity] = {}
        self.notes: dict[str, Any] = {}
        self._journal: Journal | None = None
        self._round = 0

    # ------------------------------------------------------------------ what a method may override

    def queries(self, round: int) -> list[Query]:
        """Questions to ask all sites before training of `round`; asked again after the answers until the list is empty."""
        return []

    def on_query(self, round: int, name: str, answers: list[Answer]) -> None:
        """Take the valid answers to one query, in site order; store what follows from them in `self.state`."""

    def payload(self, round: int, site: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Extra arrays and config for one site. An array named like a model entry replaces that entry for this site."""
        return {}, {}

    def aggregate(self, round: int, global_state: ModelState, updates: Iterable[Update]) -> ModelState:
        """Make the new global state (exchanged entries) from the valid updates, which come in site order.

        Give `global_state` back when there is nothing to average. It must not be written into.
        """
        mean = weighted_mean(by_examples(updates))
        # Entries that nobody sent (a group that every site leaves out) stay as they are.
        return global_state if mean is None else {**global_state, **mean}

    # ------------------------------------------------------------------ what the base gives a method

    @property
    def num_sites(self) -> int:
        """Number of sites known so far (online or not)."""
        return len(self.roster)

    @property
    def sites(self) -> tuple[Identity, ...]:
        """The known sites in site order."""
        return tuple(sorted(self.roster.values(), key=lambda i: i.index))

    def note(self, key: str, value: Any) -> None:
        """Put a finding into the history of this round and into the run's summary (the last value of a key stands)."""
        self.notes = {**self.notes, key: json_ready(value)}
        if self._journal is not None:
            self._journal.add(self._round, "server", None, metrics={key: value})

    def note_weights(self, weights: Mapping[str, float]) -> None:
        """Note the share of each site in the new model (site → share) and the largest of them, 0 without any."""
        self.note("weights", dict(weights))
        self.note("largest_weight", max(weights.values(), default=0.0))

    def bind(self, config: Config, layout: Layout, roster: dict[str, Identity], journal: Journal) -> None:
        """Called once by the round loop before the first round."""
        self.config, self.layout, self.roster, self._journal = config, layout, roster, journal

    def begin_round(self, round_number: int) -> None:
        """Called by the round loop; notes belong to this round from here on."""
        self._round = round_number

    def restore(self, values: dict[str, Any], notes: dict[str, Any]) -> None:
        """Put back the state a checkpoint holds. Raises `UserError` if its fields are not this rule's."""
        names = {f.name for f in dataclasses.fields(self.State)}
        if set(values) != names:
            raise UserError(
                f"the checkpoint holds the state of another rule: fields {sorted(values)}, this rule has {sorted(names)}"
            )
        self.state = self.State(**values)
        self.notes = dict(notes)

    # ------------------------------------------------------------------ Flower's interface

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rule over any Flower grid with plain or FedMed clients, without run folder or resume; see `fedmed.federation.foreign`.

        `timeout` in seconds is the deadline of each phase. `train_config` and `evaluate_config` are added to what is sent.
        """
        from fedmed.federation.foreign import start_plain

        return start_plain(self, grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Not used: rounds are built site by site in `fedmed.federation.rounds`. Raises `FedMedError`."""
        raise FedMedError(_WRAPPED)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Not used, as `configure_train`."""
        raise FedMedError(_WRAPPED)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Not used, as `configure_train`."""
        raise FedMedError(_WRAPPED)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Not used, as `configure_train`."""
        raise FedMedError(_WRAPPED)

    def summary(self) -> None:
        """Log the rule and its arguments."""
        self.log.info("%s %s", type(self).__name__, self.params)


_WRAPPED = (
    "FedMed rules run their own round loop (site order, quorum, resume) and cannot be wrapped by a Flower strategy that calls configure_train; "
    "call start(), or use `fedmed run`"
)
