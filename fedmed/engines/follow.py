"""The Ray engine seen from the command line: the run goes on in other processes, and this one follows its history file."""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedmed.config import Config
from fedmed.federation.history import Callback, Journal, Record, start_info
from fedmed.files import read_json
from fedmed.report.run_folder import RunFolder

_LOOK_S = 0.3
_WARNED = re.compile(r"^(?P<level>WARNING|ERROR) (?P<logger>fedmed[\w.]*): (?P<text>.+)$")  # as `server_app` writes it


class HistoryFollower:
    """Tells callbacks what another process writes into `history.jsonl`: every record, and a round once it is complete.

    `path`: the file, which need not exist yet; `kept_bytes`: what a resumed run keeps of it (its checkpoint says), the
    rest is made anew. Context manager; a daemon thread looks at the file every 0.3 s.
    """

    def __init__(self, path: Path, callbacks: Iterable[Callback], kept_bytes: int = 0) -> None:
        self._path = path
        self._journal = Journal(None, callbacks)
        self._kept = kept_bytes
        self._offset = path.stat().st_size if path.exists() else 0
        self._rest = b""
        self._started = time.monotonic()
        self._records: list[Record] = []
        self._told = 0  # the last round that callbacks heard of as complete
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="history", daemon=True)

    def tell(self, event: str, *args: Any) -> None:
        """Pass one event on."""
        self._journal.tell(event, *args)

    def __enter__(self) -> HistoryFollower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.look()
        self._finish_rounds(math.inf)

    def _follow(self) -> None:
        while not self._stop.wait(_LOOK_S):
            self.look()

    def look(self) -> None:
        """Read what came since the last look. A round counts as complete when a look finds nothing more of it."""
        size = self._path.stat().st_size if self._path.exists() else 0
        if size < self._offset:  # the server cut the file back to its checkpoint
            self._offset, self._rest = min(size, self._kept), b""
        if size == self._offset:
            return self._finish_rounds(math.inf)
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            self._take(line)
        return None

    def _take(self, line: bytes) -> None:
        try:
            record: Record = json.loads(line)
            number = int(record["round"])
        except (ValueError, KeyError, TypeError):  # the file was cut between two looks; the next line is whole again
            return
        self._finish_rounds(number - 1)
        self._records.append(record)
        self._journal.tell("on_record", record)

    def _finish_rounds(self, last: float) -> None:
        """Tell of the rounds up to `last` as complete. `evaluation.mode=before` scores a round in the one after it."""
        numbers = sorted({int(r["round"]) for r in self._records if self._told < r["round"] <= last})
        for number in numbers:
            records = [r for r in self._records if r["round"] <= number]
            self._records = [r for r in self._records if r["round"] > number]
            self._journal.tell("on_round", number, records, time.monotonic() - self._started)
            self._told = number


def relay(line: str) -> None:
    """Log what the server app warned of in this process too, so that the user sees it; the rest is in `ray.log`."""
    found = _WARNED.match(line)
    if found:
        logging.getLogger(found["logger"]).log(getattr(logging, found["level"]), found["text"])


def run_ray(config: Config, num_sites: int, *, resume: bool, callbacks: Iterable[Callback]) -> dict[str, Any]:
    """Run on the Ray engine and give the summary; callbacks hear of every round as it is written.

    `config` with absolute paths. What can be found wrong with it is found before anything is started or written. Raises
    `UserError`, `QuorumLost` and other `FedMedError`s.
    """
    from fedmed.engines.prepare import site_file
    from fedmed.engines.ray import check_gpus, federation_config, run
    from fedmed.federation.checkpoint import CheckpointStore
    from fedmed.metrics import main_metric
    from fedmed.server_app import check_config, file_facts

    facts = file_facts(site_file(config))
    check_config(config, facts)
    check_gpus(config)
    federation_config(config, num_sites)
    folder = RunFolder(Path(config.out))
    checkpoint = CheckpointStore(folder.checkpoint).read() if resume else None
    start_round, kept = (checkpoint.round + 1, checkpoint.history_bytes) if checkpoint else (1, 0)
    with HistoryFollower(folder.history, callbacks, kept) as follower:
        follower.tell("on_start", start_info(config, start_round, [], main_metric(facts.task)))
        run(config, folder.path, resume=resume, num_sites=num_sites, on_line=relay)
    summary: dict[str, Any] = read_json(folder.summary)
    follower.tell("on_end", summary)
    return summary
