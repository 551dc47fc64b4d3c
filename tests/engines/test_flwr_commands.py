"""Calls of Flower's command, with a stand-in for it."""

from __future__ import annotations

import json
import os
import queue
import sys
from pathlib import Path

import pytest

from fedmed.engines import flwr_commands
from fedmed.engines.flower_internals import RunState
from fedmed.engines.flwr_commands import FlwrCommands
from fedmed.errors import FedMedError

# Prints the text of the environment for its first word, and writes down what it was asked.
STAND_IN = """\
import os, sys
open(os.path.join(os.environ["FLWR_HOME"], "asked"), "a").write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1] == "wait": import time; time.sleep(60)
print(os.environ["SAYS"]); print("\\x1b[91mred\\x1b[0m", file=sys.stderr)
"""


class Desk:
    """A folder with the stand-in; `commands(says)` gives the calls, `asked` what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.notes = folder, list[str]()
        program = folder / "flwr"
        program.write_text(f"#!{sys.executable} -S\n{STAND_IN}")
        program.chmod(0o755)

    def commands(self, says: object, **options: object) -> FlwrCommands:
        """Calls of a command that prints this (JSON unless it is a string)."""
        text = says if isinstance(says, str) else json.dumps(says)
        path = os.pathsep.join([str(self.folder), os.environ["PATH"]])
        env = {**os.environ, "PATH": path, "FLWR_HOME": str(self.folder), "SAYS": text}
        return FlwrCommands(self.folder, env, note=self.notes.append, **options)  # type: ignore[arg-type]

    @property
    def asked(self) -> list[str]:
        """What the command was asked."""
        return (self.folder / "asked").read_text().splitlines()


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A desk."""
    return Desk(tmp_path)


def test_a_run_is_handed_in(desk: Desk) -> None:
    given = desk.commands({"success": True, "run-id": 42})
    assert given.submit(Path("/app"), Path("/run.toml")) == "42"
    assert given.submit(Path("/app"), Path("/run.toml"), "num-supernodes=1") == "42"
    plain = "run /app fedmed --format json -c /run.toml"
    assert desk.asked == [plain, f"{plain} --federation-config num-supernodes=1"]
    assert desk.notes[:2] == ['[flwr run] {"success": true, "run-id": 42}', "[flwr run] red"]


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ({"success": False, "error-message": "bad key"}, "refused the app: bad key"),
        ("Segmentation fault", "refused the app: Segmentation fault"),
        ("", "refused the app: no answer"),
    ],
)
def test_a_run_that_is_refused(desk: Desk, says: object, words: str) -> None:
    with pytest.raises(FedMedError, match=words):
        desk.commands(says).submit(Path("/app"), Path("/run.toml"))


def test_runs_are_listed(desk: Desk) -> None:
    runs = [
        {"run-id": "1", "status": "running", "status-details": "N/A"},
        {"run-id": 2, "status": "finished:failed", "status-details": "why"},
    ]
    commands = desk.commands({"success": True, "runs": runs})
    assert commands.states() == {"1": RunState("running", ""), "2": RunState("finished:failed", "why")}
    assert commands.state("2").finished and not commands.state("1").finished
    with pytest.raises(FedMedError, match="run 3 is not listed"):
        commands.state("3")
    assert desk.commands({"success": True, "runs": []}).states() == {}
    assert desk.asked[:2] == ["ls fedmed --format json", "ls fedmed --run-id 2 --format json"]
    for says in ({"success": False, "error-message": "no"}, "garbage"):
        with pytest.raises(FedMedError, match="flwr ls gave no states"):
            desk.commands(says).states()


def test_a_run_is_stopped_or_not(desk: Desk) -> None:
    assert desk.commands({"success": True, "run-id": "7"}).stop("7")
    assert not desk.commands({"success": False, "error-message": "finished already"}).stop("7")
    assert not desk.commands("garbage").stop("7")
    assert desk.asked[0] == "stop 7 fedmed --format json"


def test_no_call_waits_for_ever(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flwr_commands, "COMMAND_LIMIT_S", 1.0)
    with pytest.raises(FedMedError, match=r"flwr wait gave no answer within 1 s; see .*x\.log"):
        desk.commands("", log=Path("x.log")).call("wait")


def test_a_missing_command_is_said(tmp_path: Path) -> None:
    with pytest.raises(FedMedError, match="command flwr is not installed beside"):
        FlwrCommands(tmp_path, {"PATH": str(tmp_path)}).states()


def test_a_log_is_followed(desk: Desk) -> None:
    lines: queue.Queue[str | None] = queue.Queue()
    desk.commands("one\ntwo\nthree").stream("7", lines, 1)
    assert [lines.get(timeout=30) for _ in range(3)] == ["two\n", "three\n", None]
    assert desk.asked == ["log 7 fedmed --stream"]
