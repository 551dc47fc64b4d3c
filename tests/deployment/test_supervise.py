"""The supervisor: restarts with growing waits, words for what ended, an end to it, and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fedmed.deployment import supervise
from fedmed.deployment.supervise import Child, keep_running
from fedmed.errors import UserError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="process groups and signals of POSIX systems")
SLEEP = "import time; print('ready', flush=True); time.sleep(60)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
# A child that starts one of its own, says both ids, and waits.
FAMILY = (
    "import os, subprocess, sys, time\n"
    "p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
    "print('pids', os.getpid(), p.pid, flush=True)\n"
    "time.sleep(60)\n"
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of a few hundredths of a second."""
    monkeypatch.setattr(supervise, "FIRST_DELAY_S", 0.02)
    monkeypatch.setattr(supervise, "TICK_S", 0.01)


def child(folder: Path, code: str, name: str = "worker", log: str = "worker.log", echo: str = "") -> Child:
    """A child that runs some Python code."""
    return Child(name, (sys.executable, "-S", "-c", code), dict(os.environ), folder, folder / "logs" / log, echo)


def until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Wait for a condition; whether it came true."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def text_of(path: Path) -> str:
    """The text of a file, empty while it is not there."""
    return path.read_text() if path.exists() else ""


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie nobody has waited for does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Running:
    """`keep_running` in a thread, with what it said."""

    def __init__(self, children: Sequence[Child], **more: object) -> None:
        self.said: list[str] = []
        self.code: int | None = None
        self.stop = threading.Event()
        options = {"give_up_s": 3600.0, **more}
        self._thread = threading.Thread(target=lambda: self._run(children, options), daemon=True)
        self._thread.start()

    def _run(self, children: Sequence[Child], options: dict[str, object]) -> None:
        self.code = keep_running(children, say=self.said.append, stop=self.stop, **options)  # type: ignore[arg-type]

    def end(self) -> int | None:
        """Stop it and give its exit code."""
        self.stop.set()
        self._thread.join(20)
        return self.code


def test_children_run_until_they_are_stopped_and_their_output_is_logged(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "worker.log"
    running = Running([child(tmp_path, f"print('\\x1b[92mgreen\\x1b[0m'); {SLEEP}")])
    assert until(lambda: "ready" in text_of(log))
    assert running.end() == 0
    assert running.said == []
    assert "\ngreen\nready\n" in text_of(log) and "worker stopped" in text_of(log)
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.parent.stat().st_mode) == 0o700
    pid = int(re.search(r"process (\d+)", text_of(log))[1])  # type: ignore[index]
    assert not alive(pid)


def test_a_child_that_ends_is_restarted_with_doubled_waits_and_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "LONGEST_DELAY_S", 0.08)
    said: list[str] = []
    code = keep_running(
        [child(tmp_path, "print('ERROR : no such disk'); print('bye'); raise SystemExit(7)")],
        say=said.append,
        give_up_s=0.6,
    )
    assert code == 3
    waits = [float(m[1]) for line in said if (m := re.search(r"again in ([\d.e-]+) s$", line))]
    assert waits[:4] == [0.02, 0.04, 0.08, 0.08]
    assert all(line.startswith("worker ended with exit code 7: no such disk") for line in said)
    assert "given up after" in said[-1] and str(tmp_path / "logs" / "worker.log") in said[-1]
    assert len(waits) == len(said) - 1
    assert all(line in (tmp_path / "logs" / "worker.log").read_text() for line in said)


def test_no_patience_means_one_attempt(tmp_path: Path) -> None:
    said: list[str] = []
    assert keep_running([child(tmp_path, "raise SystemExit(1)")], say=said.append, give_up_s=0.0) == 3
    assert len(said) == 1 and "it said nothing; given up" in said[0]


def test_a_child_that_lived_long_enough_starts_from_the_shortest_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "STEADY_S", 0.0)  # every life counts as a good one
    running = Running([child(tmp_path, "pass")], give_up_s=0.01)  # and the failures before are forgotten
    assert until(lambda: len(running.said) >= 4)
    assert running.end() == 0
    assert all(line.endswith("again in 0.01 s") for line in running.said)  # never later than the end of the patience


def test_one_child_given_up_ends_the_others(tmp_path: Path) -> None:
    good = child(tmp_path, FAMILY, "good", "good.log")
    bad = child(tmp_path, "import time; time.sleep(0.3); raise SystemExit(2)", "bad", "bad.log")
    assert keep_running([good, bad], say=lambda line: None, give_up_s=0.0) == 3
    pids = [int(word) for word in re.search(r"pids (\d+) (\d+)", text_of(good.log)).groups()]  # type: ignore[union-attr]
    assert until(lambda: not any(alive(pid) for pid in pids), 5)


def test_the_words_of_the_caller_and_of_the_log(tmp_path: Path) -> None:
    seen: list[tuple[str, list[str]]] = []

    def explain(name: str, lines: Sequence[str]) -> str | None:
        seen.append((name, list(lines)))
        return "the key is not approved" if "code 2004" in lines[-1] else None

    said: list[str] = []
    children = [child(tmp_path, "print('one'); print('code 2004'); raise SystemExit(1)")]
    keep_running(children, say=said.append, explain=explain, give_up_s=0.0)
    assert seen == [("worker", ["one", "code 2004"])]
    assert said[0].startswith("worker ended with exit code 1: the key is not approved; given up")
    children = [child(tmp_path, "print('last words'); raise SystemExit(1)")]
    keep_running(children, say=said.append, explain=explain, give_up_s=0.0)
    assert "exit code 1: last words" in said[1]


def test_a_killed_child_is_not_explained_by_its_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "worker.log"
    running = Running([child(tmp_path, f"print('ERROR : an old trouble'); {SLEEP}")])
    assert until(lambda: "ready" in text_of(log))
    os.kill(int(re.search(r"process (\d+)", text_of(log))[1]), signal.SIGKILL)  # type: ignore[index]
    assert until(lambda: text_of(log).count("ready") == 2)
    assert running.end() == 0
    assert running.said == [
        "worker was killed (SIGKILL, often by the system for lack of memory); starting it again in 0.02 s"
    ]


def test_what_cannot_be_started_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    missing = Child("worker", ("no-such-program",), dict(os.environ), tmp_path, tmp_path / "a.log")
    assert keep_running([missing], say=said.append, give_up_s=0.0) == 3
    assert "cannot start no-such-program: No such file" in said[0]
    nowhere = Child("worker", ("true",), dict(os.environ), tmp_path / "gone", tmp_path / "a.log")
    assert keep_running([nowhere], say=said.append, give_up_s=0.0) == 3
    assert "could not be started: cannot be started in" in said[1] and "gone" in said[1]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write the log"):
        keep_running([Child("w", ("true",), {}, tmp_path, tmp_path / "file" / "a.log")], say=said.append, give_up_s=0.0)


def test_a_child_deaf_to_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "GRACE_S", 0.2)
    running = Running([child(tmp_path, DEAF)])
    assert until(lambda: "ready" in text_of(tmp_path / "logs" / "worker.log"))
    assert running.end() == 0
    assert running.said == ["worker did not end within 0.2 s and is killed"]


def test_full_logs_are_renamed_and_the_oldest_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "LOG_BYTES", 1000)
    monkeypatch.setattr(supervise, "LOG_FILES", 3)
    lines = "import time\nfor i in range(500): print(f'line {i:04d}')\nprint('ready', flush=True); time.sleep(60)"
    running = Running([child(tmp_path, lines)])
    logs = tmp_path / "logs"
    assert until(lambda: "ready" in text_of(logs / "worker.log"))
    running.end()
    assert sorted(path.name for path in logs.iterdir()) == ["worker.log", "worker.log.1", "worker.log.2"]
    assert all(path.stat().st_size <= 1000 and stat.S_IMODE(path.stat().st_mode) == 0o600 for path in logs.iterdir())
    kept = "".join(text_of(logs / name) for name in ("worker.log.2", "worker.log.1", "worker.log"))
    numbers = [int(n) for n in re.findall(r"line (\d+)", kept)]
    assert numbers == list(range(numbers[0], 500)) and numbers[0] > 0


def test_children_may_share_a_log_and_marked_lines_are_said(tmp_path: Path) -> None:
    a = child(tmp_path, f"print('refused: you'); {SLEEP}", "a", "both.log", "refused: ")
    b = child(tmp_path, f"print('refused: me'); {SLEEP}", "b", "both.log")
    running = Running([a, b])
    assert until(lambda: text_of(a.log).count("ready") == 2)
    running.end()
    assert running.said == ["refused: you"]
    assert {"a: refused: you", "a: ready", "b: refused: me", "b: ready"} <= set(text_of(a.log).splitlines())


PARENT = """
import sys
from pathlib import Path
from fedmed.deployment.supervise import Child, keep_running
import os
folder = Path(sys.argv[1])
child = Child("family", (sys.executable, "-S", "-c", sys.argv[2]), dict(os.environ), folder, folder / "log")
sys.exit(keep_running([child], say=print, give_up_s=60.0))
"""


def parent_of(folder: Path, code: str) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A supervisor in a process of its own, and the ids its child has written."""
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": root}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(folder), code], env=env, stdout=subprocess.DEVNULL)
    assert until(lambda: "pids" in text_of(folder / "log"))
    line = next(line for line in text_of(folder / "log").splitlines() if line.startswith("pids"))
    return parent, [int(word) for word in line.split()[1:]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_everything(tmp_path: Path, number: signal.Signals) -> None:
    parent, pids = parent_of(tmp_path, FAMILY)
    parent.send_signal(number)
    assert parent.wait(20) == 0
    assert until(lambda: not any(alive(pid) for pid in pids), 5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a child that its parent has died")
def test_no_child_survives_the_kill_of_its_supervisor(tmp_path: Path) -> None:
    parent, pids = parent_of(tmp_path, "import os, time; print('pids', os.getpid(), flush=True); time.sleep(60)")
    assert all(alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    assert until(lambda: not any(alive(pid) for pid in pids), 5)
