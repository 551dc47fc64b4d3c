"""The shape of a listener of a run, and the flattening of records that all of them share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]  # one line of history.jsonl


class Callback:
    """A listener of a run. Subclass it and override what is needed; every method may be left out.

    All methods are called in the server's process, in this order: `on_start`, then per round `on_record`s and one
    `on_round`, at last `on_end`; `close` comes when the run is over for whatever reason. A callback that raises is left
    out for the rest of the run.
    """

    def on_start(self, info: Mapping[str, Any]) -> None:
        """Called once before the first round; `info` has name, out, rounds, start_round, sites, main_metric, config
        (YAML text).
        """

    def on_record(self, record: Record) -> None:
        """Called for each record as it is filed: one per site and phase."""

    def on_round(self, round_number: int, records: Sequence[Record], elapsed: float) -> None:
        """Called after a round's checkpoint, with all records of the round and the seconds since this process began the
        run.
        """

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Called once after the last round, with the content of summary.json."""

    def close(self) -> None:
        """Let go of terminals, files and connections; called at least once, must not raise."""


def _values(record: Record) -> dict[str, float]:
    """Give the defined scalar metrics of a record; lists and undefined values are left out."""
    return {
        key: float(value)
        for key, value in record.get("metrics", {}).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def round_scalars(records: Sequence[Record]) -> dict[str, float]:
    """Flatten the records of a round for a tracker.

    "mean/<metric>" (sites count alike), "central/<metric>", "server/<note>", "sites/<site>/<metric>" and "failed_sites"
    (a count).
    """
    flat: dict[str, float] = {"failed_sites": float(sum(r.get("status") == "failed" for r in records))}
    pooled: dict[str, list[float]] = {}
    for record in records:
        if record.get("status", "ok") != "ok":
            continue
        site = record.get("site")
        head = f"sites/{site}" if site is not None else str(record.get("phase", "server"))
        for key, value in _values(record).items():
            flat[f"{head}/{key}"] = value
            if site is not None:
                pooled.setdefault(key, []).append(value)
    return flat | {f"mean/{key}": math.fsum(values) / len(values) for key, values in pooled.items()}
