"""Following the history that another process writes: whole rounds, resumed files, torn lines, warnings."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fedmed.engines.follow import HistoryFollower, relay
from fedmed.report.run_folder import prepare


class Listener:
    """Keeps what it is told: rounds with the number of their records, and places of single records."""

    def __init__(self) -> None:
        self.rounds: list[tuple[int, int]] = []
        self.records: list[tuple[int, str]] = []

    def on_record(self, record: dict[str, Any]) -> None:
        self.records.append((record["round"], record["phase"]))

    def on_round(self, number: int, records: list[dict[str, Any]], elapsed: float) -> None:
        self.rounds.append((number, len(records)))


def lines(*places: tuple[int, str]) -> str:
    return "".join(json.dumps({"round": number, "phase": phase}) + "\n" for number, phase in places)


def follower(path: Path, kept: int = 0) -> tuple[HistoryFollower, Listener]:
    """Looks only when told to: the thread is not started."""
    listener = Listener()
    return HistoryFollower(path, [listener], kept), listener


def test_a_round_is_told_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    follow, heard = follower(path)
    follow.look()
    assert heard.rounds == []
    text = lines((1, "train"), (1, "evaluate"))
    path.write_text(text[: len(text) // 2 + 3])  # in the middle of the second line
    follow.look()
    assert heard.records == [(1, "train")] and heard.rounds == []
    path.write_text(text)
    follow.look()
    assert heard.rounds == []  # more of round 1 may come
    follow.look()
    follow.look()
    assert heard.rounds == [(1, 2)]
    path.write_text(text + lines((2, "train"), (3, "train"), (3, "central")))
    follow.look()
    assert heard.rounds == [(1, 2), (2, 1)]  # a record of round 3 shows that round 2 is over
    follow.look()
    assert heard.rounds == [(1, 2), (2, 1), (3, 2)]


def test_scores_of_the_round_before_go_with_the_round_that_brings_them(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    follow, heard = follower(path)
    path.write_text(lines((1, "train")))
    follow.look()
    follow.look()
    path.write_text(lines((1, "train"), (2, "train"), (1, "evaluate"), (2, "train"), (1, "evaluate")))
    follow.look()
    follow.look()
    assert heard.rounds == [(1, 1), (2, 4)] and len(heard.records) == 5


def test_a_resumed_file_is_told_from_its_checkpoint_on(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    kept, lost = lines((1, "train")), lines((2, "train"), (2, "evaluate"))
    path.write_text(kept + lost)
    follow, heard = follower(path, len(kept))
    follow.look()
    assert heard.records == []
    path.write_text(kept + lines((2, "train")))  # cut back and written on between two looks
    follow.look()
    follow.look()
    assert heard.records == [(2, "train")] and heard.rounds == [(2, 1)]


def test_the_end_tells_what_is_left_and_survives_garbage(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    follow, heard = follower(path)
    with follow:
        path.write_text("torn}\n[1]\n" + lines((1, "train")) + '{"round": 2, ')
    assert heard.rounds == [(1, 1)]


def test_warnings_of_the_server_app_are_heard_here(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        relay("WARNING fedmed.fednoro: round 2: few answers")
        relay("INFO fedmed.server: report: x")
        relay("WARNING :   of Flower")
        relay("(ClientAppActor pid=3) WARNING fedmed.site: later")
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("fedmed.fednoro", "WARNING", "round 2: few answers")
    ]


def test_a_folder_with_nothing_but_the_log_of_ray_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "ray.log").write_text("ValueError: ActorPool is empty")
    assert prepare(tmp_path).ray_log.is_file()
