"""The record of a run: one JSON line per site, phase and round, and the callbacks that are told of it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from fedmed.config import Config, to_yaml
from fedmed.files import json_ready, read_history

log = logging.getLogger("fedmed.server")
Record = dict[str, Any]


class Callback(Protocol):
    """Somebody who wants to follow a run: progress, trackers. A callback that raises is reported once and left out."""

    def on_start(self, info: dict[str, Any]) -> None:
        """The run begins; `info` has name, out, rounds, start_round, sites, main_metric, config (YAML text)."""

    def on_record(self, record: Record) -> None:
        """One record was written."""

    def on_round(self, round_number: int, records: Sequence[Record], elapsed: float) -> None:
        """A round is over and its checkpoint written; `elapsed` in seconds since the start."""

    def on_end(self, summary: dict[str, Any]) -> None:
        """The run is over."""


class Journal:
    """Writes `history.jsonl` and tells the callbacks. `path` None keeps everything in memory only."""

    def __init__(self, path: Path | None, callbacks: Iterable[Callback] = ()) -> None:
        self.path = path
        self.records: list[Record] = []
        self._callbacks = list(callbacks)
        self._round: list[Record] = []

    def restore(self, num_bytes: int) -> None:
        """Cut the file back to what it held at a checkpoint and read the records up to there."""
        if self.path is None or not self.path.exists():
            return
        with self.path.open("r+b") as file:
            kept = file.read(num_bytes)
            file.truncate(kept.rfind(b"\n") + 1)  # whole lines only, should the file be shorter than it was
        self.records = read_history(self.path)

    @property
    def num_bytes(self) -> int:
        """Length of the file now."""
        return self.path.stat().st_size if self.path is not None and self.path.exists() else 0

    def add(
        self,
        round_number: int,
        phase: str,
        site: str | None,
        *,
        status: str = "ok",
        reason: str | None = None,
        num_examples: int = 0,
        metrics: dict[str, Any] | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Add one record; it is on disk when `flush` returns."""
        record: Record = json_ready(
            {
                "round": round_number, "phase": phase, "site": site, "status": status, "reason": reason,
                "num_examples": num_examples, "metrics": metrics or {}, "seconds": round(seconds, 4),
            }
        )  # fmt: skip
        self.records.append(record)
        self._round.append(record)
        self.tell("on_record", record)

    def flush(self) -> list[Record]:
        """Append what came since the last call to the file, force it to disk, and give it back."""
        new, self._round = self._round, []
        if self.path is not None and new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(r, allow_nan=False) + "\n" for r in new)
                file.flush()
                os.fsync(file.fileno())
        return new

    def tell(self, event: str, *args: Any) -> None:
        """Call one event on every callback; a callback must never end a run."""
        for callback in list(self._callbacks):
            try:
                getattr(callback, event)(*args)
            except Exception as error:
                log.warning(
                    "%s stopped following the run: %s: %s", type(callback).__name__, type(error).__name__, error
                )
                self._callbacks.remove(callback)


def start_info(config: Config, start_round: int, sites: Sequence[str], main_metric: str) -> dict[str, Any]:
    """What `Callback.on_start` is told."""
    return {
        "name": config.name, "out": config.out, "rounds": config.federation.rounds, "start_round": start_round,
        "sites": list(sites), "main_metric": main_metric, "config": to_yaml(config),
    }  # fmt: skip
