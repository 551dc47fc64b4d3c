"""A small comparison on phantom data, and runs that only pretend."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmed.compare.expand import Options, make_plan
from fedmed.compare.plan import Plan
from fedmed.config import load_config, to_yaml

SMALL = """
description: A small one.
task: classification
data: phantom:classification
base: fedavg
overrides: [federation.rounds=3, optimizer.lr=0.5, "data.phantom={num_sites: 2, images_per_site: 20, image_size: 16}"]
metrics: [bacc, auc]
last_rounds: 2
findings: []
arms:
  plain: []
  prox: [client.prox.enabled=true, optimizer.lr=0.25]
settings:
  easy: {title: Easy, overrides: [optimizer.lr=0.125, training.epochs=4]}
  told: {title: Told, arms: [prox], against: easy, seeds: 1}
variants:
  small: {seeds: 2, overrides: [training.batch_size=8]}
  full: {seeds: 3, settings: [easy], metrics: [auc]}
"""


class FakeRun:
    """A child that is over after `polls` looks; writes what a run writes, or fails when its folder is among `failing`."""

    def __init__(
        self, command: list[str], log: Path, environment: dict[str, str], polls: int, failing: set[str]
    ) -> None:
        self.command, self.environment, self.signals = command, environment, list[str]()
        self.folder = Path(command[command.index("--out") + 1])
        self._polls, self._code = polls, 3 if f"{self.folder.parent.name}/{self.folder.name}" in failing else 0
        words = command[command.index("run") + 2 : command.index("--out")]
        self.config = load_config(command[command.index("run") + 1], [w for w in words if "=" in w])
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(to_yaml(self.config))

    def poll(self) -> int | None:
        """Exit code once it is over."""
        if "kill" in self.signals or "interrupt" in self.signals:
            return -2
        self._polls -= 1
        if self._polls > 0:
            return None
        if self._code == 0 and not (self.folder / "summary.json").exists():
            write_scores(self.folder, 0.5 + 0.125 * self.config.seed + 0.125 * (self.config.optimizer.lr == 0.25))
        return self._code

    def interrupt(self) -> None:
        """Noted."""
        self.signals.append("interrupt")

    def kill(self) -> None:
        """Noted."""
        self.signals.append("kill")

    def reason(self) -> str:
        """A made-up reason."""
        return "it ended with exit code 3\nerror: 1 of 2 sites answered"


class Runs:
    """Starts `FakeRun`s and keeps them; `most` is the largest number that was ever under way at once."""

    def __init__(self) -> None:
        self.made: list[FakeRun] = []
        self.failing: set[str] = set()
        self.polls, self.most = 2, 0

    def __call__(self, command: list[str], log: Path, environment: dict[str, str]) -> FakeRun:
        self.made.append(FakeRun(command, log, environment, self.polls, self.failing))
        self.most = max(self.most, sum(run._polls > 0 and not run.signals for run in self.made))
        return self.made[-1]

    @property
    def folders(self) -> list[str]:
        """What was started, in order, as setting/arm-seed."""
        return [f"{run.folder.parent.name}/{run.folder.name}" for run in self.made]


def write_scores(folder: Path, value: float) -> None:
    """The files of a finished run that scored `value` in its last three rounds."""
    metrics = {"test/global/bacc": value, "test/global/auc": value}
    lines = [{"round": r, "phase": "central", "site": None, "status": "ok", "metrics": metrics} for r in (1, 2, 3)]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"seconds": 1.5, "sites": {}, "notes": {}}))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The comparison file."""
    path = tmp_path / "mine.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def plan_of(file: Path, tmp_path: Path) -> Callable[..., Plan]:
    """Makes the plan of the small comparison with some options; results lie in `tmp_path/out`."""

    def make(*words: str, command: str = "fedmed compare mine.yaml", **options: Any) -> Plan:
        options = {"out": str(tmp_path / "out"), **options}
        return make_plan(str(file), Options(words=words, **options), command)

    return make


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Pretended runs, without any waiting."""
    monkeypatch.setattr("fedmed.compare.run.TICK_S", 0.0)
    return Runs()
