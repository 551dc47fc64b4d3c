"""Flower's own pieces beside ours: its strategies over our sites, and our rules called as Flower calls its own.

`strategy.name=flwr:FedMedian` with that class's own arguments. What is lost: resume and checkpoints, the quorum, site-name order of sums (so
bit-equality between engines), dropping of broken updates, queries, extras and personal rounds. What stays: our clients and their losses, the
run folder, the history (one record per round instead of one per site).
"""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower_strategies
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedmed.config import Config, FederationConfig, nearest
from fedmed.errors import FedMedError, UserError
from fedmed.federation.exchange import Exchange
from fedmed.federation.history import Journal
from fedmed.federation.layout import Entry, Layout
from fedmed.federation.records import decode_metrics, decode_state, encode_metrics, encode_state
from fedmed.federation.rounds import RoundLoop, Scorer
from fedmed.federation.state import State
from fedmed.federation.strategy import Strategy

log = logging.getLogger("fedmed.server")
ALL_SITES = "all sites"  # Flower gives one mean, not a value per site


def flower_strategy(config: Config) -> FlowerStrategy:
    """Build the class of `flwr.serverapp.strategy` that `strategy.name` names. Raises `UserError` for an unknown class or argument."""
    name, args = config.strategy.name.removeprefix("flwr:"), dict(config.strategy.args)
    cls = getattr(flower_strategies, name, None)
    known = [n for n in flower_strategies.__all__ if n not in ("Strategy", "Result")]
    if name not in known or cls is None:
        raise UserError(f"flwr.serverapp.strategy has no class {name!r}{nearest(name, known)}")
    accepted = [p for p in inspect.signature(cls).parameters if p != "self"]
    unknown = [a for a in args if a not in accepted]
    if unknown:
        raise UserError(f"strategy.args: {name} takes no argument {unknown[0]!r}{nearest(unknown[0], accepted)}")
    try:
        built: FlowerStrategy = cls(**args)
    except TypeError as error:
        raise UserError(f"strategy.args: {name}: {error}") from error
    return built


def run_flower_strategy(
    strategy: FlowerStrategy,
    grid: Grid,
    config: Config,
    initial: State,
    journal: Journal,
    exchange: Exchange,
    central: Scorer | None,
) -> State:
    """Run all rounds of a Flower strategy over the grid and give the final state; history records go to `journal`."""
    rounds = config.federation.rounds
    started = time.monotonic()
    log.info("flwr strategy: no resume, no quorum, sums in arrival order")

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord | None:
        # Flower aggregates before it evaluates, so a round is over here.
        if number == 0:
            return None
        scores = central(decode_state(arrays), number == rounds) if central is not None else {}
        if scores:
            journal.add(number, "central", None, num_examples=int(scores.get("n/test", 0)), metrics=scores)
        journal.tell("on_round", number, journal.flush(), time.monotonic() - started)
        return encode_metrics(scores)

    _record_rounds(strategy, journal)
    result = strategy.start(
        grid=grid,
        initial_arrays=encode_state(initial),
        num_rounds=rounds,
        timeout=config.federation.train_deadline_s,
        train_config=ConfigRecord({"rounds": rounds, "num_sites": len(exchange.roster)}),
        evaluate_config=ConfigRecord({"rounds": rounds}),
        evaluate_fn=evaluate,
    )
    if not len(result.arrays):
        raise FedMedError(
            "the Flower strategy gave no model back: every round failed. The log says why; a site that fails ends such a run"
        )
    # Flower's averages turn integer counters into float64.
    return {name: value.to(initial[name].dtype) for name, value in decode_state(result.arrays).items()}


def _record_rounds(strategy: FlowerStrategy, journal: Journal) -> None:
    """Write the aggregated metrics of each round into the history when they are made; Flower gives them out at the very end only."""
    aggregate_train, aggregate_evaluate = strategy.aggregate_train, strategy.aggregate_evaluate

    def train(server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = aggregate_train(server_round, replies)
        if metrics is not None:
            journal.add(server_round, "train", ALL_SITES, metrics=decode_metrics(metrics))
        return arrays, metrics

    def evaluate(server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        metrics = aggregate_evaluate(server_round, replies)
        if metrics is not None:
            journal.add(server_round, "evaluate", ALL_SITES, metrics=decode_metrics(metrics))
        return metrics

    strategy.aggregate_train, strategy.aggregate_evaluate = train, evaluate  # type: ignore[method-assign]


def start_plain(
    strategy: Strategy,
    grid: Grid,
    initial_arrays: ArrayRecord,
    num_rounds: int,
    timeout: float,
    train_config: ConfigRecord | None,
    evaluate_config: ConfigRecord | None,
    evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
) -> Result:
    """`Strategy.start`: the round loop with Flower's own arguments, over FedMed or plain clients; everything in the arrays counts as trainable."""
    state = decode_state(initial_arrays)
    config = Config(
        federation=FederationConfig(
            rounds=num_rounds,
            plain_clients=True,
            train_deadline_s=timeout,
            query_deadline_s=timeout,
            evaluate_deadline_s=timeout,
            start_deadline_s=timeout,
        )
    )
    kinds = {n: "parameter" if v.is_floating_point() else "counter" for n, v in state.items()}
    layout = Layout(
        {n: Entry(kinds[n], kinds[n] == "parameter", False, tuple(v.shape), v.dtype) for n, v in state.items()}, {}
    )
    exchange = Exchange(grid, min_sites=config.federation.min_sites, plain_clients=True, start_deadline_s=timeout)
    exchange.wait_for_sites()
    result = Result()

    def central(current: State, last: bool) -> dict[str, float]:
        assert evaluate_fn is not None
        record = evaluate_fn(loop.progress.round, encode_state(current))
        if record is not None:
            result.evaluate_metrics_serverapp[loop.progress.round] = record
        return {} if record is None else {k: float(v) for k, v in record.items() if isinstance(v, (int, float))}

    loop = RoundLoop(
        strategy, exchange, config, layout, state,
        central=central if evaluate_fn else None, extra_train=train_config or {}, extra_evaluate=evaluate_config or {},
    )  # fmt: skip
    if evaluate_fn is not None and (first := evaluate_fn(0, initial_arrays)) is not None:  # as Flower's own rules do
        result.evaluate_metrics_serverapp[0] = first
    result.arrays = encode_state(loop.run())
    for phase, target in (("train", result.train_metrics_clientapp), ("evaluate", result.evaluate_metrics_clientapp)):
        for number in range(1, num_rounds + 1):
            records = [
                r for r in loop.journal.records if r["phase"] == phase and r["round"] == number and r["status"] == "ok"
            ]
            target[number] = encode_metrics(mean_metrics([(r["num_examples"], r["metrics"]) for r in records]))
    return result


def mean_metrics(pairs: Sequence[tuple[float, Mapping[str, Any]]]) -> dict[str, float]:
    """Mean of each scalar metric weighted by number of items, over the sites where it is defined; a metric defined nowhere is left out."""
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for weight, metrics in pairs:
        for key, value in metrics.items():
            if isinstance(value, (int, float)) and not math.isnan(value):
                sums[key] = sums.get(key, 0.0) + weight * value
                weights[key] = weights.get(key, 0.0) + weight
    return {key: sums[key] / weights[key] for key in sums if weights[key] > 0}
