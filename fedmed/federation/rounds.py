"""The round loop of the server: queries, training, aggregation, evaluation, checkpoint, callbacks."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord
from torch import Tensor

from fedmed.config import Config
from fedmed.errors import FedMedError, UserError
from fedmed.federation import messages as names
from fedmed.federation.checkpoint import Checkpoint, CheckpointStore
from fedmed.federation.exchange import Exchange, Reply, read_answer, read_update, short_reason
from fedmed.federation.history import Journal, Record
from fedmed.federation.layout import Layout
from fedmed.federation.messages import Answer, Query, Update
from fedmed.federation.quorum import Quorum
from fedmed.federation.records import TensorArray, decode_metrics, encode_state
from fedmed.federation.seeding import numpy_rng
from fedmed.federation.state import State
from fedmed.federation.strategy import Strategy
from fedmed.schema import lower_is_better

log = logging.getLogger("fedmed.server")
_MAX_QUERIES = 32  # a rule that asks without end is broken

Scorer = Callable[[State, bool], dict[str, float]]  # (global state, last evaluation?) -> metrics


@dataclass
class Progress:
    """What the loop itself carries from round to round (the rest is the strategy's state)."""

    round: int = 0
    accepted: dict[str, int] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    elapsed: float = 0.0
    history_bytes: int = 0  # length of the history after `round`


class RoundLoop:
    """Runs the rounds of one strategy over one grid.

    `state`: exchanged entries of the global model. `store` None: no checkpoints (nothing to resume). `central`: scores the global model on items the
    coordinator holds. `extra_train`, `extra_evaluate`: config sent along. `on_best`: told the state whenever validation chooses it.
    """

    def __init__(
        self,
        strategy: Strategy,
        exchange: Exchange,
        config: Config,
        layout: Layout,
        state: State,
        *,
        journal: Journal | None = None,
        store: CheckpointStore | None = None,
        central: Scorer | None = None,
        extra_train: Mapping[str, Any] | None = None,
        extra_evaluate: Mapping[str, Any] | None = None,
        config_hash: str = "",
        on_best: Callable[[State], None] | None = None,
    ) -> None:
        self.strategy, self.exchange, self.config, self.layout = strategy, exchange, config, layout
        self.state = state
        self.journal = journal or Journal(None)
        self.store = store
        self.central = central
        self.progress = Progress()
        self._on_best = on_best
        self._extra = {"train": dict(extra_train or {}), "evaluate": dict(extra_evaluate or {})}
        self._config_hash = config_hash
        self._durable: dict[str, int] = {}  # `progress.accepted` as the newest checkpoint has it
        self._started = time.monotonic()
        strategy.bind(config, layout, exchange.roster, self.journal)

    # ------------------------------------------------------------------ resume

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on after a checkpoint. Raises `UserError` if it is of another configuration."""
        if checkpoint.config_hash != self._config_hash:
            raise UserError(
                "the checkpoint was made with another configuration (data, model, method or schedule); resume with the config.yaml of the run folder"
            )
        self.strategy.restore(checkpoint.strategy, checkpoint.notes)
        self.state = {
            name: checkpoint.model[name] for name in self.layout.exchanged
        }  # files have an order of their own
        self.progress = Progress(
            checkpoint.round,
            dict(checkpoint.accepted),
            dict(checkpoint.best),
            checkpoint.elapsed,
            checkpoint.history_bytes,
        )
        self._durable = dict(checkpoint.accepted)
        self.journal.restore(checkpoint.history_bytes)

    def checkpoint(self) -> None:
        """Write a checkpoint of the last finished round."""
        if self.store is None:
            return
        fields = {f.name: getattr(self.strategy.state, f.name) for f in dataclasses.fields(self.strategy.state)}
        self.store.write(
            Checkpoint(
                round=self.progress.round, model=self.state, strategy=fields, config_hash=self._config_hash,
                sites={name: i.index for name, i in self.exchange.roster.items()}, accepted=self.progress.accepted,
                history_bytes=self.progress.history_bytes, best=self.progress.best, notes=self.strategy.notes, elapsed=self.elapsed,
            )
        )  # fmt: skip
        self._durable = dict(self.progress.accepted)

    @property
    def elapsed(self) -> float:
        """Seconds since the run began, over all its resumed parts."""
        return self.progress.elapsed + time.monotonic() - self._started

    def _resume_hint(self) -> str:
        if self.store is None or not self.store.rounds():
            return "No checkpoint exists yet: start the run again (in the same folder with --resume) once the sites are back"
        return f"The checkpoint after round {self.store.rounds()[-1]} is kept: run the same command with --resume once the sites are back"

    # ------------------------------------------------------------------ the loop

    def run(self) -> State:
        """Run all rounds that are left and give back the final global state. Raises `QuorumLost` after writing a checkpoint.

        A round that fails, or is interrupted, leaves no trace but its history records: the checkpoint is that of the round before.
        """
        rounds = self.config.federation.rounds
        for number in range(self.progress.round + 1, rounds + 1):
            before = self._snapshot()
            try:
                records = self._round(number)
                before = self._snapshot()
                self.journal.tell("on_round", number, records, self.elapsed)
            except BaseException:
                self.state, self.progress, self.strategy.state, self.strategy.notes = before
                if self.store is not None and self.progress.round > max(self.store.rounds(), default=0):
                    self.checkpoint()
                self.journal.flush()
                raise
        return self.state

    def _snapshot(self) -> tuple[State, Progress, Any, dict[str, Any]]:
        """What a failed round must not change; all of it is replaced by a round, never written into."""
        return self.state, dataclasses.replace(self.progress), self.strategy.state, self.strategy.notes

    def _round(self, number: int) -> list[Record]:
        cfg = self.config
        if number > 1 or not self.exchange.online:
            self.exchange.refresh()
        self.strategy.begin_round(number)
        self._ask_queries(number)
        new_state, accepted = self._train(number)
        self.state = new_state
        self.progress.accepted = {**self.progress.accepted, **dict.fromkeys(accepted, number)}
        self.progress.round = number
        last = number == cfg.federation.rounds
        if last or number % cfg.evaluation.every == 0:
            self._evaluate(number, last)
        records = self.journal.flush()
        self.progress.history_bytes = self.journal.num_bytes
        if last or number % cfg.federation.checkpoint_every == 0:
            self.checkpoint()
        return records

    def _base_config(self, number: int, site: str) -> dict[str, Any]:
        return {
            "round": number, "rounds": self.config.federation.rounds, "site_index": self.exchange.roster[site].index,
            "num_sites": self.exchange.num_sites, "personal_round": self.progress.accepted.get(site, 0),
            "durable_round": self._durable.get(site, 0), "server-round": number,
        }  # fmt: skip

    # ------------------------------------------------------------------ queries

    def _ask_queries(self, number: int) -> None:
        for _ in range(_MAX_QUERIES):
            pending = self.strategy.queries(number)
            if not pending:
                return
            for query in pending:
                self.strategy.on_query(number, query.name, self._ask(number, query))
        raise FedMedError(
            f"{type(self.strategy).__name__} still had queries after asking {_MAX_QUERIES} times in round {number}"
        )

    def _ask(self, number: int, query: Query) -> list[Answer]:
        model = encode_state(self.state)
        sites = self.exchange.sites
        requests = []
        for site in sites:
            config = {**self._base_config(number, site), **query.config, "query": query.name}
            content = names.pack(arrays=model, config=config, extras=query.arrays)
            requests.append((site, self._message(content, site, "query.method", number)))
        quorum = self._quorum(f"query {query.name}", number, len(sites))
        answers: list[Answer] = []
        for reply in self.exchange.replies(requests, self.config.federation.query_deadline_s):
            result = (
                reply.reason
                if reply.message is None
                else read_answer(reply.message.content, self.exchange.roster[reply.site])
            )
            if isinstance(result, Answer):
                quorum.valid += 1
                answers.append(result)
                self._record(number, "query", reply, num_examples=result.num_examples, metrics={"query": query.name})
            else:
                self._failed(number, "query", reply, result, quorum)
        quorum.check()
        return answers

    # ------------------------------------------------------------------ training

    def _train(self, number: int) -> tuple[State, list[str]]:
        sites = self._sample(number)
        requests = self._train_requests(number, sites)
        quorum = self._quorum("training", number, len(sites))
        accepted: list[str] = []
        updates = self._updates(number, requests, quorum, accepted)
        new_state = self.strategy.aggregate(number, self.state, updates)
        for _ in updates:  # a rule may stop early; every reply is still heard, counted and recorded
            pass
        quorum.check()
        return new_state, accepted

    def _sample(self, number: int) -> tuple[str, ...]:
        """Sites of this round: drawn by (seed, round) from the sorted names, at least `min_sites`, in site order."""
        sites = self.exchange.sites
        fraction = self.config.federation.fraction
        count = min(len(sites), max(self.config.federation.min_sites, math.ceil(fraction * len(sites) - 1e-9)))
        if count == len(sites):
            return sites
        drawn = numpy_rng(self.config.seed, number, "", "sample").choice(len(sites), size=count, replace=False)
        by_name = sorted(sites)
        chosen = {by_name[i] for i in drawn}
        return tuple(s for s in sites if s in chosen)

    def _train_requests(self, number: int, sites: Sequence[str]) -> list[tuple[str, Message]]:
        shared: dict[int, TensorArray] = {}  # an array that goes to many sites is encoded once

        def wrap(tensor: Tensor) -> TensorArray:
            return shared.setdefault(id(tensor), TensorArray(tensor))

        base = encode_state(self.state)
        requests = []
        for site in sites:
            arrays, config = self.strategy.payload(number, site)
            record, extras = base, ArrayRecord()
            for name, tensor in arrays.items():
                if name in self.layout.entries:
                    record = record.copy() if record is base else record
                    record[name] = wrap(tensor)
                else:
                    extras[name] = wrap(tensor)
            evaluation = {} if self.config.evaluation.mode == "separate" else {"evaluate": self.config.evaluation.mode}
            content = names.pack(
                arrays=record,
                config={**self._base_config(number, site), **evaluation, **self._extra["train"], **config},
            )
            if len(extras):
                content[names.EXTRAS] = extras
            requests.append((site, self._message(content, site, "train", number)))
        return requests

    def _updates(
        self, number: int, requests: list[tuple[str, Message]], quorum: Quorum, accepted: list[str]
    ) -> Iterator[Update]:
        """The valid updates in site order; broken ones are recorded and dropped, empty ones heard and not passed on."""
        for reply in self.exchange.replies(requests, self.config.federation.train_deadline_s):
            result = (
                reply.reason
                if reply.message is None
                else read_update(reply.message.content, self.exchange.roster[reply.site], self.layout)
            )
            if not isinstance(result, Update):
                self._failed(number, "train", reply, result, quorum)
                continue
            quorum.valid += 1
            accepted.append(reply.site)
            train, scores = _split_scores(result.metrics)
            status = "ok" if result.num_examples else "empty"
            self._record(number, "train", reply, status=status, num_examples=result.num_examples, metrics=train)
            if scores:
                scored = number - 1 if self.config.evaluation.mode == "before" else number
                self._record(scored, "evaluate", reply, num_examples=_scored(scores), metrics=scores)
            if result.num_examples:
                yield result
            del reply, result  # not held while the next site works

    # ------------------------------------------------------------------ evaluation

    def _evaluate(self, number: int, last: bool) -> None:
        evaluation = self.config.evaluation
        scores: dict[str, tuple[int, dict[str, Any]]] = {}
        if evaluation.sites and (last or evaluation.mode == "separate"):
            scores = self._evaluate_sites(number, last)
        central: dict[str, float] = {}
        if self.central is not None:
            begun = time.monotonic()
            central = self.central(self.state, last)
            self.journal.add(
                number,
                "central",
                None,
                num_examples=_scored(central),
                metrics=central,
                seconds=time.monotonic() - begun,
            )
        if evaluation.select:
            self._select(number, evaluation.select, scores, central)

    def _evaluate_sites(self, number: int, last: bool) -> dict[str, tuple[int, dict[str, Any]]]:
        model = encode_state(self.state)
        sites = self.exchange.sites
        requests = []
        for site in sites:
            config = {**self._base_config(number, site), "final": last, **self._extra["evaluate"]}
            requests.append((site, self._message(names.pack(arrays=model, config=config), site, "evaluate", number)))
        quorum = self._quorum("evaluation", number, len(sites))
        scores: dict[str, tuple[int, dict[str, Any]]] = {}
        for reply in self.exchange.replies(requests, self.config.federation.evaluate_deadline_s):
            record = None if reply.message is None else names.part(reply.message.content, names.METRICS, MetricRecord)
            if record is None:
                self._failed(number, "evaluate", reply, reply.reason or "the reply has no metrics", quorum)
                continue
            quorum.valid += 1
            metrics = decode_metrics(record)
            count = int(metrics.pop(names.NUM_EXAMPLES, 0))  # type: ignore[arg-type]
            scores[reply.site] = count, metrics
            self._record(number, "evaluate", reply, num_examples=count, metrics=metrics)
        return scores

    def _select(
        self, number: int, metric: str, scores: Mapping[str, tuple[int, dict[str, Any]]], central: Mapping[str, float]
    ) -> None:
        """Keep the state of the best validation round: the coordinator's own validation items if it has any, else the sites' mean by number of items."""
        value = _first(central, f"val/global/{metric}")
        if value is None:
            pairs = [
                (m["n/val"], _first(m, f"val/global/{metric}", f"val/personal/{metric}"))
                for _, m in scores.values()
                if m.get("n/val")
            ]
            known = [(n, v) for n, v in pairs if v is not None]
            total = sum(n for n, _ in known)
            value = sum(n * v for n, v in known) / total if total else None
        best = self.progress.best.get("value")
        if value is not None and (best is None or (value < best if lower_is_better(metric) else value > best)):
            self.progress.best = {"round": number, "value": value, "metric": metric}
            if self._on_best is not None:
                self._on_best(self.state)

    # ------------------------------------------------------------------ small helpers

    def _message(self, content: Any, site: str, kind: str, number: int) -> Message:
        return Message(content, self.exchange.online[site], kind, group_id=str(number))

    def _quorum(self, phase: str, number: int, asked: int) -> Quorum:
        return Quorum(phase, number, asked, self.config.federation.quorum, self._resume_hint)

    def _record(self, number: int, phase: str, reply: Reply, **fields: Any) -> None:
        self.journal.add(number, phase, reply.site, seconds=reply.seconds, **fields)

    def _failed(self, number: int, phase: str, reply: Reply, reason: object, quorum: Quorum) -> None:
        text = short_reason(str(reason))
        quorum.failures.append(f"{reply.site}: {text}")
        log.warning("round %d, %s: site %s left out: %s", number, phase, reply.site, text)
        self._record(number, phase, reply, status="failed", reason=text)


def _split_scores(metrics: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Training metrics and, where evaluation rode along, scores."""
    splits = {k: k.split("/", 1)[0] for k in metrics}
    scores = {
        k: v for k, v in metrics.items() if splits[k] in ("train", "val", "test", "n") or splits[k].startswith("test-")
    }
    return {k: v for k, v in metrics.items() if k not in scores}, scores


def _scored(scores: Mapping[str, Any]) -> int:
    return int(scores.get("n/test", 0))


def _first(values: Mapping[str, Any], *keys: str) -> float | None:
    """The first of the keys that is there with a defined value."""
    for key in keys:
        value = values.get(key)
        if value is not None and not math.isnan(value):
            return float(value)
    return None
