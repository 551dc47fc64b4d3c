"""Which processes belong to a run, and that all of them end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmed.engines import processes

pytestmark = pytest.mark.skipif(os.name != "posix", reason="process groups and signals of POSIX systems")
SLEEP = "import time; time.sleep(60)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"


def until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie nobody has waited for does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def marked(folder: Path, code: str, **extra: object) -> subprocess.Popen[bytes]:
    env = {**os.environ, "FLWR_HOME": str(folder)}
    return subprocess.Popen([sys.executable, "-S", "-c", code], env=env, start_new_session=True, **extra)  # type: ignore[call-overload]


def test_only_marked_processes_are_owned(tmp_path: Path) -> None:
    home, other = tmp_path / "home", tmp_path / "home2"  # one name begins like the other
    mine, theirs = marked(home, SLEEP), marked(other, SLEEP)
    try:
        assert until(lambda: mine.pid in processes.owned(home))
        found = processes.owned(home)
        assert found == {mine.pid}
        assert os.getpid() not in found and os.getppid() not in found
        assert processes.terminate(home) == set()
        assert mine.wait(5) == -signal.SIGTERM
        assert theirs.poll() is None
    finally:
        for process in (mine, theirs):
            process.kill()
            process.wait()


def test_descendants_without_the_mark_and_detached_ones_are_owned(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys, time\n"
        "clean = {k: v for k, v in os.environ.items() if k != 'FLWR_HOME'}\n"
        f"a = subprocess.Popen([sys.executable, '-S', '-c', {SLEEP!r}], env=clean)\n"  # unmarked child
        f"b = subprocess.Popen([sys.executable, '-S', '-c', {SLEEP!r}], start_new_session=True)\n"  # detached child
        "print(a.pid, b.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = marked(tmp_path, code, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    children = {int(word) for word in parent.stdout.readline().split()}
    assert until(lambda: processes.owned(tmp_path) == {parent.pid, *children})
    assert processes.terminate(tmp_path) == set()
    assert processes.owned(tmp_path) == set()
    parent.wait()
    parent.stdout.close()
    assert until(lambda: not any(alive(pid) for pid in children))


def test_orphans_of_a_dead_daemon_are_owned(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys, time\n"
        f"b = subprocess.Popen([sys.executable, '-S', '-c', {SLEEP!r}], start_new_session=True)\n"
        "print(b.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = marked(tmp_path, code, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    orphan = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert until(lambda: processes.owned(tmp_path) == {orphan})  # not yet while it is being loaded
    assert processes.terminate(tmp_path) == set()
    assert until(lambda: not alive(orphan))


def test_a_process_deaf_to_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "TERM_GRACE_S", 0.2)
    process = marked(tmp_path, DEAF, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    assert processes.terminate(tmp_path) == set()
    assert process.wait(5) == -signal.SIGKILL
    process.stdout.close()


def test_terminate_without_processes_and_remove_without_folder(tmp_path: Path) -> None:
    assert processes.terminate(tmp_path / "none") == set()
    processes.remove(tmp_path / "none")


def test_guard_ends_the_run_of_a_killed_parent(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "file").write_text("x")
    run = marked(home, SLEEP)
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[2])\n"
        "import processes; from pathlib import Path\n"
        "processes.start_guard(Path(sys.argv[1])); print('on guard', flush=True); time.sleep(60)\n"
    )
    where = str(Path(processes.__file__).parent)
    parent = subprocess.Popen([sys.executable, "-c", code, str(home), where], stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.readline() == b"on guard\n"
    assert run.poll() is None and home.exists()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert run.wait(20) == -signal.SIGTERM
    assert until(lambda: not home.exists())


def test_guard_with_nothing_left_to_do_ends_at_once(tmp_path: Path) -> None:
    guard = processes.start_guard(tmp_path / "gone")
    assert guard.stdin is not None
    guard.stdin.close()
    assert guard.wait(20) == 0
    assert str(guard.pid) not in {str(pid) for pid in processes.owned(tmp_path / "gone")}


def test_ps_table_reads_marks_groups_and_skips_zombies(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "  10     1    10 Ss   /bin/a FLWR_HOME=/tmp/x HOME=/root\n"
        "  11    10    10 S    /bin/b -c x\n"
        "  12     1    12 S    /bin/c FLWR_HOME=/tmp/xy\n"
        "  13    10    13 Z    <defunct> FLWR_HOME=/tmp/x\n"
        "garbage\n"
    )
    done = subprocess.CompletedProcess([], 0, stdout=text)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    table = processes._ps_table("FLWR_HOME=/tmp/x")
    assert [(p.pid, p.parent, p.group, p.marked) for p in table] == [
        (10, 1, 10, True),
        (11, 10, 10, False),
        (12, 1, 12, False),
    ]
