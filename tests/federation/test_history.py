"""The journal: strict JSON lines, torn ends, going back to a checkpoint, callbacks that fail."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedmed.federation.history import Journal, Record
from fedmed.files import read_history


class Listener:
    """Writes down what it is told; `fail` is the event at which it raises."""

    def __init__(self, fail: str | None = None, error: type[BaseException] = ValueError) -> None:
        self.heard: list[str] = []
        self.fail, self.error = fail, error

    def _hear(self, event: str) -> None:
        self.heard.append(event)
        if event == self.fail:
            raise self.error("no")

    def on_start(self, info: dict[str, Any]) -> None:
        self._hear("start")

    def on_record(self, record: Record) -> None:
        self._hear("record")

    def on_round(self, round_number: int, records: Sequence[Record], elapsed: float) -> None:
        self._hear("round")

    def on_end(self, summary: dict[str, Any]) -> None:
        self._hear("end")


def test_one_strict_line_per_record(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run" / "history.jsonl")
    journal.add(1, "train", "a", num_examples=3, metrics={"loss": math.nan, "n": 2}, seconds=0.123456)
    assert journal.num_bytes == 0  # not before flush
    records = journal.flush()
    assert journal.flush() == []
    lines = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records == journal.records
    assert records[0] == {
        "round": 1, "phase": "train", "site": "a", "status": "ok", "reason": None, "num_examples": 3,
        "metrics": {"loss": None, "n": 2}, "seconds": 0.1235,
    }  # fmt: skip
    assert journal.num_bytes == len(lines[0]) + 1


def test_in_memory_only() -> None:
    journal = Journal(None)
    journal.add(1, "server", None)
    assert len(journal.flush()) == 1 and journal.num_bytes == 0
    journal.restore(0)


def filled(path: Path, rounds: int = 3) -> list[int]:
    """A journal of some rounds; the file's length after each."""
    journal, lengths = Journal(path), [0]
    for number in range(1, rounds + 1):
        journal.add(number, "train", "a")
        journal.flush()
        lengths.append(journal.num_bytes)
    return lengths


def test_going_back_to_a_checkpoint_cuts_what_came_after(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    lengths = filled(path)
    journal = Journal(path)
    journal.restore(lengths[2])
    assert [r["round"] for r in journal.records] == [1, 2] and journal.num_bytes == lengths[2]
    journal.add(3, "evaluate", None)
    journal.flush()
    assert [(r["round"], r["phase"]) for r in read_history(path)] == [(1, "train"), (2, "train"), (3, "evaluate")]
    journal.restore(0)
    assert journal.records == [] and journal.num_bytes == 0


def test_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    lengths = filled(path)
    with path.open("a") as file:
        file.write('{"round": 4, "phase": "tr')
    assert [r["round"] for r in read_history(path)] == [1, 2, 3]
    # A file shorter than the checkpoint says (a disk that was full) is cut to whole lines, so the next line is readable.
    with path.open("r+b") as file:
        file.truncate(lengths[3] - 5)
    journal = Journal(path)
    journal.restore(lengths[3])
    journal.add(9, "train", "a")
    journal.flush()
    assert [r["round"] for r in read_history(path)] == [1, 2, 9]


def test_a_callback_that_fails_is_reported_once_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    bad, good = Listener("record"), Listener()
    journal = Journal(None, [bad, good])
    with caplog.at_level(logging.WARNING, "fedmed.server"):
        journal.tell("on_start", {})
        for number in (1, 2):
            journal.add(number, "train", "a")
            journal.tell("on_round", number, journal.flush(), 0.0)
        journal.tell("on_end", {})
    assert bad.heard == ["start", "record"]
    assert good.heard == ["start", "record", "round", "record", "round", "end"]
    assert [r.getMessage() for r in caplog.records] == ["Listener stopped following the run: ValueError: no"]


def test_an_interrupt_passes_through() -> None:
    with pytest.raises(KeyboardInterrupt):
        Journal(None, [Listener("round", KeyboardInterrupt)]).tell("on_round", 1, [], 0.0)
