"""The coordinator's commands: with a made-up Flower, and (slow) with the real processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedmed.cli.coordinator import app
from fedmed.deployment import coordinator, coordinator_status, keys, supervise
from fedmed.deployment.coordinator_folder import CoordinatorFolder
from fedmed.engines.flower_internals import CONNECTION, free_port
from fedmed.engines.flwr_commands import FlwrCommands
from fedmed.errors import FedMedError, UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> CoordinatorFolder:
    """A coordinator's folder on a free port."""
    return CoordinatorFolder.create(tmp_path / "fl", ["fl.example.org"], free_port())


def site_key(folder: Path, name: str = "site") -> Path:
    """Make a site's key pair and give the file of the public half."""
    pair = keys.new_site_key()
    keys.write_secret(folder / f"{name}.key", pair.private)
    return keys.write_secret(folder / f"{name}.pub", pair.public)


def run(*words: object) -> int:
    """Run a subcommand in this process and give its exit code; errors are raised."""
    code = app(args=[str(word) for word in words], standalone_mode=False)
    return code if isinstance(code, int) else 0


class Flower:
    """What `flwr supernode` does: registered keys, each once for ever; nodes by id."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.nodes: dict[int, dict[str, Any]] = {}
        self.calls: list[tuple[str, ...]] = []

    def call(self, commands: object, *words: str) -> str:
        """Answer one call of the command as FlwrCommands does."""
        assert words[0] == "supernode" and words[-2:] == ("--format", "json") and CONNECTION in words
        self.calls.append(words[1:-2])
        return "some plain line\n" + json.dumps(getattr(self, words[1])(*words[2:-2]))

    def register(self, path: str, connection: str, name: str) -> dict[str, Any]:
        """`flwr supernode register`."""
        key = Path(path).read_text()
        if key in self.keys:
            return {"success": False, "error-message": "\n[code: 111] Public key already in use.\n"}
        node_id = 2**63 + len(self.keys)
        self.keys.add(key)
        self.nodes[node_id] = {"node-id": str(node_id), "status": "registered"}
        return {"success": True, "node-id": node_id}

    def unregister(self, node_id: str, connection: str) -> dict[str, Any]:
        """`flwr supernode unregister`."""
        self.nodes[int(node_id)]["status"] = "unregistered"
        return {"success": True, "node-id": node_id}

    def ls(self, connection: str) -> dict[str, Any]:
        """`flwr supernode ls`."""
        return {"success": True, "nodes": list(self.nodes.values())}


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> Flower:
    """A made-up Flower behind a SuperLink that answers."""
    made = Flower()
    monkeypatch.setattr(FlwrCommands, "call", lambda self, *words: made.call(self, *words))
    monkeypatch.setattr(coordinator, "problem", lambda folder, timeout_s=0.0: None)
    monkeypatch.setattr(coordinator_status, "problem", lambda folder, timeout_s=0.0: None)
    return made


# ---------------------------------------------------------------------- init, renew


def test_init_says_what_the_sites_get_and_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "fl"
    assert run("init", place, "--host", "fl.example.org,10.1.2.3", "--host", "other", "--port", 8443) == 0
    folder, shown = CoordinatorFolder.open(place), capsys.readouterr().out
    assert folder.hosts == ("fl.example.org", "10.1.2.3", "other")
    for text in (
        str(folder.ca_file), keys.fingerprint(folder.authority()), "fl.example.org:8443 or 10.1.2.3:8443",
        f"fedmed coordinator start {place}", "fedmed coordinator approve SITE.pub --name NAME",
    ):  # fmt: skip
        assert text in shown
    assert "PRIVATE" not in shown and folder.secret_file.read_text() not in shown
    with pytest.raises(UserError, match="is a coordinator's folder already"):
        run("init", place, "--host", "a")
    with pytest.raises(UserError, match="--host: expected at least one name"):
        run("init", tmp_path / "new")


def test_renew_takes_the_old_hosts_or_new_ones(folder: CoordinatorFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.renew(days=-3)
    assert run("renew", folder.path) == 0
    assert run("renew", "--dir", folder.path, "--host", "new.example.org", "--port", 9001) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("new certificate for fl.example.org until 20") and "restart the coordinator" in shown[0]
    assert shown[1].startswith("new certificate for new.example.org until")
    assert CoordinatorFolder.open(folder.path).port == 9001


def test_the_folder_is_an_argument_an_option_or_the_current_one(
    folder: CoordinatorFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.path)
    for words in ([], [folder.path], ["-C", folder.path], [".", "--dir", folder.path]):
        assert run("status", "--quiet", *words) == 3
    with pytest.raises(UserError, match="two coordinator's folders given"):
        run("status", tmp_path, "--dir", folder.path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is no coordinator's folder"):
        run("status")
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------- approve, revoke


def test_approve_registers_the_key_and_keeps_the_name(
    folder: CoordinatorFolder, flower: Flower, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    public = site_key(tmp_path)
    assert run("approve", public, "--name", "site A (north)", "--dir", folder.path) == 0
    site = folder.sites()["site A (north)"]
    key = keys.read_public_key(public)
    assert (site.node_id, site.fingerprint, site.key) == (2**63, key.fingerprint, key.line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", site.since)
    assert flower.calls == [("register", str(public), CONNECTION, "--name=site A (north)")]
    shown = capsys.readouterr().out
    assert f"approved site A (north): {key.fingerprint}" in shown and "compare this fingerprint" in shown


def test_a_key_and_a_name_are_given_once(folder: CoordinatorFolder, flower: Flower, tmp_path: Path) -> None:
    one, two = site_key(tmp_path, "one"), site_key(tmp_path, "two")
    coordinator.approve(folder, one, "A")
    with pytest.raises(UserError, match="'A' is approved already with this key, since 20"):
        coordinator.approve(folder, one, "A")
    with pytest.raises(UserError, match="this key is approved already, as 'A'"):
        coordinator.approve(folder, one, "B")
    with pytest.raises(UserError, match=r"'A' is approved already with another key \(SHA256:.*revoke --name 'A'"):
        coordinator.approve(folder, two, "A")
    coordinator.approve(folder, two, "B")
    assert list(folder.sites()) == ["A", "B"] and len(flower.keys) == 2


def test_what_may_not_be_approved(folder: CoordinatorFolder, flower: Flower, tmp_path: Path) -> None:
    public = site_key(tmp_path)
    with pytest.raises(UserError, match="holds a private key") as caught:
        coordinator.approve(folder, tmp_path / "site.key", "A")
    assert (tmp_path / "site.key").read_text().splitlines()[1] not in str(caught.value)
    for name in ("", " A", "A\n", "a\x1b[31m", "x" * 101):
        with pytest.raises(UserError, match="--name: expected one line"):
            coordinator.approve(folder, public, name)
    with pytest.raises(UserError, match="cannot read the public key"):
        coordinator.approve(folder, tmp_path / "none.pub", "A")
    assert flower.calls == [] and folder.sites() == {}


def test_a_revoked_key_never_comes_back(
    folder: CoordinatorFolder, flower: Flower, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    public = site_key(tmp_path)
    coordinator.approve(folder, public, "north")
    with pytest.raises(UserError, match="no approved site is called 'nort'; did you mean 'north'"):
        run("revoke", "--name", "nort", "--dir", folder.path)
    assert run("revoke", "--name", "north", "--dir", folder.path) == 0
    assert "revoked north: SHA256:" in capsys.readouterr().out
    assert folder.sites() == {} and flower.nodes[2**63]["status"] == "unregistered"
    with pytest.raises(UserError, match="Flower knows this key already: it was revoked"):
        coordinator.approve(folder, public, "north")
    assert folder.sites() == {}
    coordinator.approve(folder, site_key(tmp_path, "new"), "north")


def test_after_the_loss_of_flowers_database_keys_are_approved_again(
    folder: CoordinatorFolder, flower: Flower, tmp_path: Path
) -> None:
    public, other = site_key(tmp_path), site_key(tmp_path, "other")
    coordinator.approve(folder, public, "A")
    coordinator.approve(folder, other, "B")
    flower.keys.clear()
    flower.nodes.clear()
    assert [site.state for site in coordinator_status.status(folder).sites] == [
        "lost by Flower: approve its public key again"
    ] * 2
    coordinator.approve(folder, public, "A")
    assert [site.state for site in coordinator_status.status(folder).sites if site.name == "A"] == ["never seen"]
    coordinator.revoke(folder, "B")
    assert list(folder.sites()) == ["A"]


def test_without_a_superlink_nobody_is_approved(folder: CoordinatorFolder, tmp_path: Path) -> None:
    with pytest.raises(
        FedMedError, match=rf"must be running for this: nothing listens on 127.0.0.1:{folder.port}"
    ) as caught:
        coordinator.approve(folder, site_key(tmp_path), "A")
    assert not isinstance(caught.value, UserError) and folder.sites() == {}


def test_exit_codes_are_those_of_fedmed(
    folder: CoordinatorFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedmed.cli.main import main

    assert main(["coordinator", "status", str(tmp_path)]) == 2
    assert main(["coordinator", "status", "-q", str(folder.path)]) == 3
    assert main(["coordinator", "approve", str(site_key(tmp_path)), "--name", "A", "--dir", str(folder.path)]) == 3
    assert main(["coordinator", "init", str(tmp_path / "new"), "--host", "a"]) == 0
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 2 and all(line.startswith("error: ") for line in shown)


@pytest.mark.parametrize("output", ["", "Traceback: no JSON", '{"success": false, "error-message": "bad\\nluck"}'])
def test_what_flower_cannot_do_is_said(
    folder: CoordinatorFolder, flower: Flower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.setattr(FlwrCommands, "call", lambda self, *words: output)
    with pytest.raises(FedMedError, match=r"Flower refused `supernode register`: (no answer|Traceback|bad luck)"):
        coordinator.approve(folder, site_key(tmp_path), "A")
    assert folder.sites() == {}


# ---------------------------------------------------------------------- status


def write_run(folder: CoordinatorFolder, name: str, records: Sequence[dict[str, Any]], *, done: bool = False) -> Path:
    """A run folder as a run leaves it."""
    path = folder.runs / name
    path.mkdir()
    (path / "config.yaml").write_text("federation:\n  rounds: 12\n")
    if records:
        (path / "history.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if done:
        (path / "summary.json").write_text("{}")
    return path


def test_status_shows_sites_run_and_last_error_and_no_secret(
    folder: CoordinatorFolder, flower: Flower, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("A", "B", "C"):
        coordinator.approve(folder, site_key(tmp_path, name), name)
    moments = {"online-at": "2026-03-04 05:06:07Z", "offline-at": "2026-03-05 06:07:08Z"}
    flower.nodes[2**63] |= {"status": "online", **moments}
    flower.nodes[2**63 + 1] |= {"status": "offline", **moments}
    ok = {"round": 3, "phase": "train", "site": "A", "status": "ok", "reason": None}
    write_run(folder, "fedavg-1", [{**ok, "round": 2, "site": "B", "status": "failed", "reason": "it sent NaN"}, ok])
    assert run("status", folder.path) == 0
    shown = capsys.readouterr().out
    for text in (
        "coordinator  up (no process holds this folder)", f"sites use    fl.example.org:{folder.port}", "825 days left, until 20",
        "3 approved, 1 online", "online since 2026-03-04 05:06 UTC  SHA256:", "offline, last seen 2026-03-05 06:07 UTC",
        "never seen", "fedavg-1: round 3 of 12, train, 0 s ago", "last error   round 2, train, B: it sent NaN",
    ):  # fmt: skip
        assert text in shown
    for secret in (folder.secret_file, folder.server_key, folder.authority_key):
        assert secret.read_text().splitlines()[-1 if secret == folder.secret_file else 1] not in shown


def test_the_newest_run_and_how_far_it_is(folder: CoordinatorFolder) -> None:
    assert coordinator_status.newest_run(folder.runs) is None
    assert coordinator_status.newest_run(folder.path / "none") is None
    (folder.runs / "empty").mkdir()
    (folder.runs / "file").touch()
    assert coordinator_status.newest_run(folder.runs) is None
    record = {"round": 12, "phase": "central", "site": None, "status": "ok"}
    old = write_run(folder, "old", [record], done=True)
    past = time.time() - 3 * 3600
    for path in old.iterdir():
        os.utime(path, (past, past))
    found = coordinator_status.newest_run(folder.runs)
    assert found is not None and found.error is None
    assert (found.name, found.progress) == ("old", "finished (round 12 of 12, central)") and 10790 < found.age_s < 10900
    new = write_run(folder, "new", [])
    found = coordinator_status.newest_run(folder.runs)
    assert found is not None and (found.name, found.progress) == ("new", "waiting for its first round")
    (new / "config.yaml").write_text("federation: 3")
    (new / "history.jsonl").write_text(
        json.dumps({**record, "status": "failed", "reason": "x"}) + '\n{"rou'
    )  # cut short
    (new / "summary.json").write_text("{}")
    os.utime(new / "summary.json", (past, past))  # of the run before it was resumed
    found = coordinator_status.newest_run(folder.runs)
    assert found is not None and (found.progress, found.error) == ("round 12, central", "round 12, central, server: x")


def test_status_of_a_coordinator_that_is_down_or_expired(
    folder: CoordinatorFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("status", folder.path) == 3
    assert "down: nothing listens on" in capsys.readouterr().out
    folder.renew(days=-5)
    assert run("status", folder.path) == 3
    assert "EXPIRED 5 days ago: fedmed coordinator renew" in capsys.readouterr().out
    folder.renew(days=20)
    run("status", folder.path)
    assert re.search(r"20 days left, until \d{4}-\d\d-\d\d; renew it", capsys.readouterr().out)
    folder.path.chmod(0o750)
    with pytest.raises(UserError, match="chmod -R go="):
        run("status", folder.path)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (172800, "2 days")]
)
def test_durations(seconds: float, text: str) -> None:
    assert coordinator_status._duration(seconds) == text


# ---------------------------------------------------------------------- start


def test_the_superlinks_command_is_one_that_flower_understands(folder: CoordinatorFolder) -> None:
    from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink

    child = coordinator.superlink_child(folder, "0.0.0.0")
    assert child.command[1:3] == ("-m", "fedmed.deployment.superlink")
    found = _parse_args_run_superlink().parse_args(child.command[3:])
    assert (found.host, found.port, found.isolation, found.enable_supernode_auth) == (
        "0.0.0.0",
        folder.port,
        "process",
        True,
    )
    assert found.superexec_auth_secret_file == str(folder.secret_file) and found.database == str(folder.database)
    assert found.ssl_certfile == str(folder.server_certificate) and not found.insecure and not found.simulation
    assert folder.secret_file.read_text() not in " ".join([*child.command, *child.env.values()])
    everywhere = _parse_args_run_superlink().parse_args(coordinator.superlink_child(folder, "::").command[3:])
    assert everywhere.host == ""  # asyncio's word for all addresses of both families


def test_start_refuses_a_second_coordinator_a_taken_port_and_a_bind_without_loopback(
    folder: CoordinatorFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with pytest.raises(UserError, match=r"--bind: expected 0\.0\.0\.0"):
        coordinator.start(folder.path, "10.0.0.1", say=said.append)
    with (
        socket.create_server(("127.0.0.1", folder.port)),
        pytest.raises(UserError, match=f"port {folder.port} cannot be used"),
    ):
        coordinator.start(folder.path, say=said.append)
    monkeypatch.setattr(coordinator, "LOCK_WAIT_S", 0.1)
    assert coordinator.running_pid(folder) is None
    with coordinator._lock(folder):
        assert coordinator.running_pid(folder) == str(os.getpid())
        with pytest.raises(UserError, match=f"runs already, as process {os.getpid()};"):
            coordinator.start(folder.path, say=said.append)
    assert coordinator.running_pid(folder) is None
    assert said == []


def test_start_supervises_the_superlink_and_warns_of_the_certificate(
    folder: CoordinatorFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def keep_running(children: Sequence[supervise.Child], *, stop: threading.Event, **more: Any) -> int:
        seen.append((coordinator.running_pid(folder), [child.name for child in children], more["give_up_s"]))
        return 3

    monkeypatch.setattr(supervise, "keep_running", keep_running)
    said: list[str] = []
    folder.renew(days=9.5)
    assert coordinator.start(folder.path, say=said.append) == 3
    assert seen == [(str(os.getpid()), ["SuperLink"], coordinator.GIVE_UP_S)]
    assert re.match(r"the server certificate ends in (9|10) days: `fedmed coordinator renew", said[0])
    assert str(folder.log_file) in said[1]
    folder.renew(days=-1)
    with pytest.raises(UserError, match="ended on"):
        coordinator.start(folder.path, say=said.append)


def test_somebody_is_told_when_the_superlink_does_not_come_up(
    folder: CoordinatorFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "UP_LIMIT_S", 0.1)
    said: list[str] = []
    coordinator._announce(folder, said.append, threading.Event())
    assert len(said) == 1 and said[0].startswith("no answer from the SuperLink after 0.1 s: nothing listens")
    assert coordinator._explain("SuperLink", ["x", "ERROR: [Errno 98] error: address already in use"]) is not None
    assert coordinator._explain("SuperLink", ["x"]) is None


# ---------------------------------------------------------------------- real processes

FEDMED = (sys.executable, "-m", "fedmed.cli.main", "coordinator")


def environment() -> dict[str, str]:
    """The environment of the commands: this checkout's package."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def fedmed(*words: object, code: int = 0) -> str:
    """Run `fedmed coordinator WORDS` as a process and give what it printed; the exit code must be `code`."""
    done = subprocess.run([*FEDMED, *map(str, words)], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@contextlib.contextmanager
def started(folder: CoordinatorFolder, output: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """`fedmed coordinator start` as a process, up."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*FEDMED, "start", str(folder.path), *words],
            env=environment(), stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait(lambda: "up; sites reach it at" in output.read_text(), output)
        yield process
    finally:
        process.kill()  # the SuperLink goes with it
        process.wait()


def wait(condition: Any, output: Path, seconds: float = 30.0) -> None:
    """Wait for a condition; the test fails with the coordinator's output when it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.1)


def processes_of(folder: CoordinatorFolder) -> list[int]:
    """Ids of the SuperLinks that run on a coordinator's database."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if (
                b"fedmed.deployment.superlink" in words
                and str(folder.database).encode() in words
                and b"-S" not in words
            ):
                found.append(int(entry.name))
    return found


def other_address() -> str | None:
    """An IPv4 address of this machine that is not loopback; asks the routing table and sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        address = str(probe.getsockname()[0])
    return None if address.startswith("127.") else address


def ask(folder: CoordinatorFolder, host: str, path: str) -> int:
    """HTTP status of a POST to the SuperLink (GET for /health)."""
    context = ssl.create_default_context(cafile=str(folder.ca_file))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    data = None if path == "/health" else b""
    request = urllib.request.Request(f"https://{host}:{folder.port}{path}", data=data)
    try:
        with opener.open(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def join(folder: CoordinatorFolder, key: Path, home: Path) -> int:
    """Try to join as Flower's SuperNode does, once; gives its exit code."""
    command = [
        "flower-supernode", "--superlink", folder.address, "--root-certificates", str(folder.ca_file), "--max-retries", "1",
        "--auth-supernode-private-key", str(key), "--isolation", "process", "--host", "127.0.0.1", "--port", str(free_port()),
    ]  # fmt: skip
    env = folder.environment() | {"FLWR_HOME": str(home)}
    return subprocess.run(command, env=env, cwd=home, capture_output=True, timeout=60).returncode


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_a_coordinator_lives_is_killed_comes_back_and_stops(tmp_path: Path) -> None:
    elsewhere, output = other_address(), tmp_path / "output.txt"
    fedmed(
        "init",
        tmp_path / "fl",
        "--host",
        ",".join(["localhost", *([elsewhere] if elsewhere else [])]),
        "--port",
        free_port(),
    )
    folder = CoordinatorFolder.open(tmp_path / "fl")
    fedmed("status", folder.path, "--quiet", code=3)
    with started(folder, output, "--bind", "0.0.0.0") as process:
        fedmed("approve", site_key(tmp_path), "--name", "north", "--dir", folder.path)
        shown = fedmed("status", folder.path)
        assert f"up (process {process.pid})" in shown and "never seen" in shown and "1 approved, 0 online" in shown
        assert not [p for p in folder.path.rglob("*") if p != folder.ca_file and p.stat().st_mode & 0o077]

        assert ask(folder, "127.0.0.1", "/health") == 200
        assert ask(folder, "127.0.0.1", "/v1/control/list-nodes") != 403  # let in, and told that this is no request
        if elsewhere:
            assert ask(folder, elsewhere, "/health") == 200
            assert ask(folder, elsewhere, "/v1/control/list-nodes") == 403
            assert ask(folder, elsewhere, "/v1/runtime/acquire-task") == 403
            assert ask(folder, elsewhere, "/v1/fleet/pull-messages") != 403
            wait(lambda: f"refused: {elsewhere} asked for /v1/control/list-nodes" in output.read_text(), output)
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", folder.port), 5) as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            plain.recv(10)
        wait(lambda: "refused: 127.0.0.1 spoke plain HTTP" in output.read_text(), output)

        stranger = site_key(tmp_path, "stranger")
        assert join(folder, stranger.with_suffix(".key"), tmp_path) != 0
        line = f"unknown key tried to join from 127.0.0.1: if {keys.read_public_key(stranger).fingerprint}"
        wait(lambda: line in output.read_text(), output)

        (superlink,) = processes_of(folder)
        os.kill(superlink, signal.SIGKILL)
        wait(lambda: "SuperLink was killed (SIGKILL" in output.read_text(), output)
        wait(lambda: coordinator.problem(folder) is None and processes_of(folder) != [superlink], output)
        assert "north" in fedmed("status", folder.path) and list(coordinator.nodes(folder)) == [
            folder.sites()["north"].node_id
        ]

        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert processes_of(folder) == [] and coordinator.running_pid(folder) is None
    fedmed("status", folder.path, "--quiet", code=3)
    log = folder.log_file.read_text()
    assert folder.secret_file.read_text() not in log + output.read_text() and "PRIVATE KEY" not in log


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_nothing_outlives_a_killed_coordinator_and_the_next_one_starts(tmp_path: Path) -> None:
    folder = CoordinatorFolder.create(tmp_path / "fl", ["localhost"], free_port())
    with started(folder, tmp_path / "one.txt") as process:
        again = subprocess.run(
            [*FEDMED, "start", str(folder.path)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert again.returncode == 2 and f"runs already, as process {process.pid};" in again.stderr
        process.kill()
        process.wait()
        wait(lambda: processes_of(folder) == [], tmp_path / "one.txt", 10)
    with started(folder, tmp_path / "two.txt", "--bind", "127.0.0.1") as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert processes_of(folder) == []
