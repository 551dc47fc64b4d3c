"""How far runs are, read from the histories they write, and how long the rest takes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedmed.compare.plan import Key
from fedmed.tracking.callbacks import Record
from fedmed.tracking.progress import headline


class Tail:
    """Follows a `history.jsonl` that may not exist yet, and that a resumed run cuts back: the last finished round and its metric."""

    def __init__(self, path: Path, metrics: Sequence[str]) -> None:
        self._path, self._metrics = path, [short_name(metric) for metric in metrics]
        self._offset, self._rest = 0, b""
        self._records: list[Record] = []  # of the last two rounds
        self.round, self.metric, self.value = 0, "", math.nan
        self.look()

    def look(self) -> None:
        """Read what came since the last look."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._offset:
                    self._offset, self._rest, self._records, self.round = 0, b"", [], 0
                file.seek(self._offset)
                new = file.read()
        except OSError:  # not there yet
            return
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            try:
                record = json.loads(line)
                number = int(record["round"])
            except (ValueError, KeyError, TypeError):  # the file was cut between two looks
                continue
            self.round = max(self.round, number)  # evaluation.mode=before scores a round in the one after it
            self._records = [r for r in [*self._records, record] if r["round"] >= self.round - 1]
        self._judge()

    def _judge(self) -> None:
        """Take the first metric of the comparison that the last records have; between evaluations the last one stays."""
        for name in self._metrics:
            value = headline(self._records, name)[1]
            if not math.isnan(value):
                self.metric, self.value = name, value
                return

    @property
    def text(self) -> str:
        """The metric for people, "" before the first evaluation."""
        return "" if math.isnan(self.value) else f"{self.metric} {self.value:.3f}"


def short_name(metric: str) -> str:
    """The last part of a metric: "S:bacc" and "test-corrupted/bacc" -> "bacc"."""
    return metric.rpartition(":")[2].rpartition("/")[2]


class Clock:
    """How much of a comparison is left, by the rounds (or estimated seconds) that its runs have behind them since it began."""

    def __init__(self, weights: Mapping[Key, float], rounds: Mapping[Key, int]) -> None:
        known = all(weights.get(key) for key in rounds)
        self._weights = {key: weights[key] if known else float(rounds[key]) for key in rounds}
        self._rounds, self._started = rounds, time.monotonic()
        self._done: dict[Key, float] = {}  # key -> part of a run done by this command, 0 to 1
        self._skipped: dict[Key, float] = {}  # key -> part that an earlier command had done

    def begin(self, key: Key, first: int) -> None:
        """A run starts, or goes on after round `first`."""
        self._skipped[key], self._done[key] = first / self._rounds[key], 0.0

    def at(self, key: Key, number: int) -> None:
        """A run has finished round `number`."""
        self._done[key] = max(0.0, number / self._rounds[key] - self._skipped.get(key, 0.0))

    def over(self, key: Key) -> None:
        """A run has ended: there is nothing left of it."""
        self._done[key] = 1.0 - self._skipped.get(key, 0.0)

    @property
    def left(self) -> float:
        """Seconds left, NaN while nothing is done."""
        done = math.fsum(self._weights[key] * part for key, part in self._done.items())
        skipped = math.fsum(self._weights[key] * part for key, part in self._skipped.items())
        rest = math.fsum(self._weights.values()) - skipped - done
        return (time.monotonic() - self._started) * rest / done if done > 0 else math.nan
