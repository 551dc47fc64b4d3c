"""`fedmed site start` and `status` without real processes: command lines, secrets, what is said, and the lock."""

from __future__ import annotations

import logging
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmed.deployment import keys, site_start, supernode
from fedmed.deployment.probe import Finding
from fedmed.deployment.site_config import SiteConfig
from fedmed.deployment.site_log import BACK, CONNECTED, LOST, MARK, MarkedFormatter, marked
from fedmed.deployment.site_start import (
    Narrator,
    child_environment,
    children,
    is_running,
    lock,
    make_state_folder,
    start,
    status,
)
from fedmed.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path: Path) -> SiteConfig:
    """A site with a key and a state folder."""
    keys.write_secret(tmp_path / "site.key", keys.new_site_key().private)
    made = SiteConfig(
        "A", tmp_path / "d.h5", "fl.example.org:8000", tmp_path / "ca.crt", tmp_path / "site.key", tmp_path / "state"
    )
    make_state_folder(made.state)
    return made


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """What the next looks at the coordinator find, the last for ever."""
    findings = [Finding(True, "answer", "it answers")]
    monkeypatch.setattr(site_start, "probe", lambda *_: findings.pop(0) if len(findings) > 1 else findings[0])
    return findings


def wait_for(said: list[str], count: int) -> None:
    """Wait until so many lines were said; a look at the coordinator has a thread of its own."""
    deadline = time.monotonic() + 20
    while len(said) < count:
        assert time.monotonic() < deadline, said
        time.sleep(0.01)


# --- processes ------------------------------------------------------------------------------------------------------


def test_the_command_lines_hold_paths_and_no_secret(config: SiteConfig, tmp_path: Path) -> None:
    node, executor = children(config, tmp_path / "site.yaml", 4711)
    secret = (config.state / "secret").read_bytes()
    assert len(secret) >= 32 and stat.S_IMODE((config.state / "secret").stat().st_mode) == 0o600
    for child in (node, executor):
        assert secret.decode() not in " ".join(child.command) and secret.decode() not in " ".join(child.env.values())
        assert child.log == config.log_file and child.echo == MARK and child.command[0] == sys.executable
    assert "--insecure" not in node.command and node.command[3] == "fedmed.deployment.supernode"
    assert executor.command[3:5] == ("fedmed.deployment.executor", str(tmp_path / "site.yaml"))
    before = (config.state / "secret").read_bytes()
    children(config, tmp_path / "site.yaml", 4711)
    assert (config.state / "secret").read_bytes() != before  # made anew at each start


def test_flower_understands_the_command_line(config: SiteConfig, tmp_path: Path) -> None:
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

    node, _ = children(config, tmp_path / "site.yaml", 4711)
    args = _parse_args_run_supernode().parse_args(node.command[4:])
    assert (args.superlink, args.isolation, args.port, args.host) == (
        "fl.example.org:8000",
        "process",
        4711,
        "127.0.0.1",
    )
    assert args.max_wait_time == 60.0 and not args.insecure and args.auth_supernode_private_key == str(config.key)


def test_a_supernode_gives_up_before_it_counts_as_steady() -> None:
    from fedmed.deployment.supervise import STEADY_S

    assert site_start.GIVE_UP_S < STEADY_S


def test_the_environment_is_quiet_offline_and_goes_straight_to_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", "/elsewhere")
    monkeypatch.setenv("SSLKEYLOGFILE", "/tmp/keys")
    monkeypatch.setenv("NO_PROXY", "intranet")
    env = child_environment(tmp_path)
    assert env["FLWR_HOME"] == str(tmp_path) and env["FLWR_TELEMETRY_ENABLED"] == "0" and env["HF_HUB_OFFLINE"] == "1"
    assert env["NO_PROXY"] == "intranet,127.0.0.1,localhost" and "SSLKEYLOGFILE" not in env


# --- before anything runs -------------------------------------------------------------------------------------------


def test_a_site_with_a_problem_does_not_start(config: SiteConfig, tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    values = {
        "name": "A",
        "data": "d.h5",
        "coordinator": "localhost:1",
        "ca": "ca.crt",
        "key": "site.key",
        "state": "state",
    }
    file.write_text("".join(f"{key}: {value}\n" for key, value in values.items()))
    config.key.chmod(0o644)
    with pytest.raises(UserError, match="the site cannot start") as caught:
        start(file, lambda line: None)
    text = str(caught.value)
    assert (
        "problem  data: there is no file" in text
        and f"chmod 600 {config.key}" in text
        and "problem  certificate" in text
    )
    assert not is_running(config)


def test_a_loose_state_folder_is_refused(config: SiteConfig) -> None:
    config.state.chmod(0o755)
    with pytest.raises(UserError, match=f"chmod 700 {config.state}"):
        make_state_folder(config.state)


def test_one_process_runs_a_state_folder(config: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_start, "LOCK_WAIT_S", 0.0)
    assert not is_running(config)
    with lock(config):
        assert is_running(config)
        with pytest.raises(UserError, match="a site runs already with the state folder"), lock(config):
            pass
    assert not is_running(config)


# --- what is said ---------------------------------------------------------------------------------------------------


def test_events_are_said_and_the_last_one_is_kept(config: SiteConfig, looks: list[Finding]) -> None:
    said: list[str] = []
    narrator = Narrator(config, said.append)
    assert status(config) == (False, "site 'A' is not running; start it with `fedmed site start`")
    with lock(config):
        assert status(config)[0] is False and "is starting" in status(config)[1]
        narrator(marked(CONNECTED))
        narrator(f"{MARK}2031-02-03 04:05:06 round 3, train: answered in 4.2 s")
        fine, text = status(config)
        assert (
            fine
            and "connected to fl.example.org:8000; last, 2031-02-03 04:05:06: round 3, train: answered in 4.2 s" in text
        )
        narrator("supernode ended with exit code 3: no way; starting it again in 1 s")
        assert status(config)[0] is False and "not connected" in status(config)[1]
        narrator(marked(BACK))
        assert status(config)[0]
    assert said[1] == "2031-02-03 04:05:06 round 3, train: answered in 4.2 s" and MARK not in "".join(said)
    assert stat.S_IMODE((config.state).stat().st_mode) == 0o700


def test_a_lost_connection_is_looked_into(config: SiteConfig, looks: list[Finding]) -> None:
    said: list[str] = []
    config.log_file.parent.mkdir()
    config.log_file.touch()
    looks[:] = [Finding(False, "connection", "nothing listens on fl.example.org:8000")]
    Narrator(config, said.append)(marked(LOST))
    wait_for(said, 2)
    assert [line[20:] for line in said] == [LOST, "nothing listens on fl.example.org:8000"]
    assert "nothing listens" in config.log_file.read_text()
    looks[:] = [Finding(True, "answer", "fl.example.org:8000 answers")]
    Narrator(config, said.append)(marked(LOST))
    wait_for(said, 4)
    assert said[-1].endswith("fl.example.org:8000 answers to this check, so the connection may be back soon")


def test_the_end_of_a_process_is_explained(config: SiteConfig, looks: list[Finding]) -> None:
    narrator = Narrator(config, lambda line: None)
    refused = [
        "ERROR :     Exit Code: 305",
        "Failed to initialize the connection to the SuperLink.",
        "[code: 2004] Failed to activate SuperNode.",
    ]
    found = narrator.explain("supernode", refused)
    assert (
        found is not None
        and keys.read_site_key(config.key).fingerprint in found
        and "fedmed coordinator approve" in found
    )
    looks[:] = [Finding(False, "tls", "the certificate has expired")]
    assert narrator.explain("supernode", refused) == "the certificate has expired"
    assert "taken by another program" in (narrator.explain("supernode", ["[Errno 98] address already in use"]) or "")
    lines = ["something", marked("no site in the file", "ERROR"), marked("ready")]
    assert narrator.explain("executor", lines) == "no site in the file"
    assert narrator.explain("executor", ["Killed"]) is None


def test_lines_for_people_have_mark_time_and_level(caplog: pytest.LogCaptureFixture) -> None:
    record = logging.LogRecord("fedmed.site", logging.WARNING, "f.py", 1, "scores of %s withheld", ("val",), None)
    text = MarkedFormatter().format(record)
    assert text.startswith(MARK) and text[len(MARK) + 20 :] == "WARNING: scores of val withheld"
    assert marked("ready")[len(MARK) + 20 :] == "ready"


# --- the SuperNode's end ----------------------------------------------------------------------------------------------


def test_each_change_of_the_connection_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    listener = supernode.Listener()
    for text in (
        "Starting Flower SuperNode", "Connection attempt failed, retrying in 1.00 seconds", "Connection attempt failed, retrying in 2.00 seconds",
        "Connection successful after 3.00 seconds and 3 tries.", "SuperNode ID: 17", "Connection successful after 1 s",
        "Connection attempt failed, retrying in 1.00 seconds",
    ):  # fmt: skip
        listener.emit(logging.LogRecord("flwr", logging.INFO, "f.py", 1, text, None, None))
    said = [line[len(MARK) + 20 :] for line in capsys.readouterr().out.splitlines()]
    assert said == [LOST, BACK, CONNECTED, LOST]


@pytest.mark.parametrize(("end", "words"), [("return", "the connection was given up"), ("1 / 0", "ZeroDivisionError")])
def test_a_supernode_that_has_given_up_ends(end: str, words: str) -> None:
    """Flower's own would stay alive: a thread that serves its API goes on."""
    code = (
        "import threading, time\n"
        "import flwr.supernode.cli\n"
        "from fedmed.deployment import supernode\n"
        "def stays():\n"
        "    threading.Thread(target=time.sleep, args=(120,)).start()\n"
        f"    {end}\n"
        "flwr.supernode.cli.flower_supernode = stays\n"
        "supernode.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == supernode.GAVE_UP and words in done.stdout + done.stderr
