"""The ray engine: environment, settings, reasons of failures; sessions with stand-in programs; slow: real runs."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

from fedmed.config import Config, EngineConfig, FederationConfig
from fedmed.engines import bundle, processes, ray, ray_log, ray_session
from fedmed.engines import flower_internals as internals
from fedmed.errors import FedMedError, QuorumLost, UserError

CONFIG = Config(engine=EngineConfig(name="ray", cpus_per_client=1, gpus_per_client=0.25))


# --- settings -----------------------------------------------------------------------------------------------------


def test_federation_config_starts_no_more_actors_than_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "available_cpus", lambda: 16)
    expected = "num-supernodes=4 client-resources-num-cpus=1 client-resources-num-gpus=0.25 init-args-num-cpus=4"
    assert ray.federation_config(CONFIG, 4) == expected
    two = dataclasses.replace(CONFIG, engine=dataclasses.replace(CONFIG.engine, cpus_per_client=5))
    assert ray.federation_config(two, 4).endswith("init-args-num-cpus=16")


def test_federation_config_attached_sets_no_limits_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    many = dataclasses.replace(CONFIG, engine=dataclasses.replace(CONFIG.engine, cpus_per_client=10_000))
    assert "init-args" not in ray.federation_config(many, 4)
    monkeypatch.setenv("RAY_ADDRESS", "local")  # Ray's word for: start a new one here
    assert ray.attached_cluster() is None


def test_more_cpus_than_there_are_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "available_cpus", lambda: 2)
    greedy = dataclasses.replace(CONFIG, engine=EngineConfig(cpus_per_client=3))
    with pytest.raises(UserError, match="cpus_per_client=3, but this machine offers 2"):
        ray.federation_config(greedy, 2)


def test_time_limit_adds_up_all_deadlines() -> None:
    federation = FederationConfig(
        rounds=2, start_deadline_s=7, query_deadline_s=1, train_deadline_s=100, evaluate_deadline_s=10
    )
    assert ray.time_limit(Config(federation=federation)) == 7 + 2 * (32 + 100 + 20) + ray.SLACK_S


def test_environment_is_isolated_and_quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("FLWR_HOME", "/home/of/the/user")
    monkeypatch.setenv("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "39091")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["lib", "/abs"]))
    env = ray.environment(tmp_path, threads=3)
    flower = {k: v for k, v in env.items() if k.startswith("FLWR_")}
    assert flower == {
        "FLWR_HOME": str(tmp_path),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    }
    assert env["RAY_USAGE_STATS_ENABLED"] == "0" and env["RAY_TMPDIR"] == str(tmp_path)
    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == "3"
    assert str(Path(sys.executable).parent) in env["PATH"].split(os.pathsep)[:2]
    assert {str(tmp_path / "lib"), "/abs"} <= set(env["PYTHONPATH"].split(os.pathsep))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "RAY_TMPDIR" not in ray.environment(tmp_path, threads=1)


def test_private_folder_is_private_and_short_enough_for_sockets() -> None:
    folder = ray.private_folder()
    try:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        socket = folder / "ray" / "session_2026-01-01_00-00-00_000000_1234567" / "sockets" / "plasma_store"
        assert len(str(socket)) < 104
    finally:
        folder.rmdir()


def test_free_port_can_be_bound_and_differs() -> None:
    ports = [internals.free_port() for _ in range(5)]
    assert all(1024 <= port < 65536 for port in ports) and len(set(ports)) > 1
    assert f'address = "127.0.0.1:{ports[0]}"' in internals.connection_toml(ports[0])
    assert internals.superlink_command(ports[0])[-1] == str(ports[0])


def test_run_refuses_no_sites(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one site"):
        ray.run(Config(), tmp_path, resume=False, num_sites=0)


# --- what Flower says ---------------------------------------------------------------------------------------------


def test_run_state_is_read_from_the_end_of_the_output() -> None:
    runs = {"success": True, "runs": [{"run-id": "7", "status": "finished:failed", "status-details": "why {x}"}]}
    text = "Warning {not json}\nDisplaying...\n" + json.dumps(runs, indent=2) + "\n"
    state = internals.parse_run_state(text, "7")
    assert state == ("finished:failed", "why {x}") and state.finished
    with pytest.raises(ValueError, match="run 8 is not listed"):
        internals.parse_run_state(text, "8")
    with pytest.raises(ValueError, match="no JSON"):
        internals.parse_run_state("nothing", "7")


TRACE = """\
\x1b[91mERROR \x1b[0m:     Simulation raised an exception
Traceback (most recent call last):
  File "x.py", line 3, in main
    raise QuorumLost(
fedmed.errors.QuorumLost: round 2: 1 of 4 sites answered
resume with --resume
""".splitlines()


def test_own_errors_come_back_as_themselves(tmp_path: Path) -> None:
    details = "Simulation failed with exception: round 2: 1 of 4 sites answered\nresume with --resume"
    error = ray_log.failure(internals.RunState("finished:failed", details), TRACE, tmp_path)
    assert type(error) is QuorumLost
    assert str(error) == "round 2: 1 of 4 sites answered\nresume with --resume"


def test_an_error_of_a_site_does_not_decide_the_kind(tmp_path: Path) -> None:
    lines = ["fedmed.errors.UserError: site_1: mask is empty", "ValueError: boom"]
    error = ray_log.failure(
        internals.RunState("finished:failed", "Simulation failed with exception: boom"), lines, tmp_path
    )
    assert type(error) is FedMedError
    assert str(error).splitlines() == [
        "the ray run failed: boom",
        "  fedmed.errors.UserError: site_1: mask is empty",
        f"Full log: {tmp_path}",
    ]


def test_untelling_details_give_way_to_the_log_and_hints(tmp_path: Path) -> None:
    state = internals.RunState(
        "finished:failed", "Simulation failed with exception: An error was encountered. Ending simulation."
    )
    lines = ["WARNING :   site_2 failed in round 1", "  File x", "ValueError: ActorPool is empty. Stopping Simulation."]
    text = str(ray_log.failure(state, [*lines, "RuntimeError: Simulation Runtime crashed."], tmp_path))
    assert text.startswith("the ray run failed: ValueError: ActorPool is empty")
    assert "  site_2 failed in round 1" in text and "Hint: Ray offers too few CPUs or GPUs" in text
    assert "stopped from outside" in str(ray_log.failure(internals.RunState("finished:stopped", ""), [], tmp_path))
    assert "no reason given" in str(ray_log.failure(internals.RunState("finished:failed", ""), [], tmp_path))


def test_reasons_are_few_short_and_the_last(tmp_path: Path) -> None:
    lines = [f"WARNING : line {i} {'x' * 400}" for i in range(50)]
    found = ray_log.telling_lines(lines)
    assert len(found) == ray_log.REASON_LINES and found[-1].startswith("line 49")
    assert all(len(line) <= ray_log.LINE_WIDTH + 3 for line in found)
    assert ray_log.telling_lines(["(ClientAppActor pid=3) ERROR : a", "ERROR : a", "plain"]) == ["a"]


def test_console_shows_no_call_stacks() -> None:
    shows = ray_log.ConsoleFilter()
    lines = [
        *map(ray_log.clean, TRACE),
        "  indented table",
        "Using SuperLink: fedmed",
        "(ClientAppActor pid=1) epoch 1",
        "",
    ]
    shown = [line for line in lines if shows.shows(line)]
    assert shown == [
        "ERROR :     Simulation raised an exception",
        "fedmed.errors.QuorumLost: round 2: 1 of 4 sites answered",
        "resume with --resume",
        "  indented table",
        "(ClientAppActor pid=1) epoch 1",
    ]


# --- a session against stand-in programs --------------------------------------------------------------------------

SUPERLINK = """\
import http.server, os, subprocess, sys, time
if os.environ["STAND_IN"] == "no-superlink":
    print("ValueError: port is taken"); sys.exit(1)
subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(99)"], start_new_session=True)
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *a): pass
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Page)
if os.environ["STAND_IN"] == "dies":
    server.timeout = 1; end = time.time() + 2
    while time.time() < end: server.handle_request()
    print("MemoryError: no room"); sys.exit(1)
server.serve_forever()
"""
FLWR = """\
import json, os, sys, time
case, word = os.environ["STAND_IN"], sys.argv[1]
home = os.environ["FLWR_HOME"]
if word == "run":
    if case == "refused": print(json.dumps({"success": False, "error-message": "bad key"})); sys.exit(1)
    if case == "garbled": print("Segmentation fault"); sys.exit(139)
    print("warning: x"); print(json.dumps({"success": True, "run-id": "42"}))
elif word == "log":
    print("Using SuperLink: fedmed", flush=True)
    print("INFO : round 1", flush=True)
    if case in ("hangs", "dies"): time.sleep(99)
    count = os.path.join(home, "streams"); open(count, "a").write("x")
    if case == "breaks" and os.path.getsize(count) < 2: sys.exit(1)
    print("INFO : round 2", flush=True)
else:
    status, details = "finished:completed", "N/A"
    if case == "fails": status, details = "finished:failed", "Simulation failed with exception: kaputt"
    if case == "breaks" and os.path.getsize(os.path.join(home, "streams")) < 2: status = "running"
    print(json.dumps({"runs": [{"run-id": "42", "status": status, "status-details": details}]}))
"""


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """An environment where Flower's programs are stand-ins; STAND_IN names the case."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, code in (("flower-superlink", SUPERLINK), ("flwr", FLWR)):
        path = folder / name
        path.write_text(f"#!{sys.executable} -S\n{code}")
        path.chmod(0o755)
    return {**os.environ, "PATH": os.pathsep.join([str(folder), os.environ["PATH"]])}


def go(
    env: dict[str, str], case: str, out: Path, timeout_s: float = 30, lines: list[str] | None = None
) -> tuple[Path, BaseException | None]:
    """Run one stand-in session; give its (removed) private folder and what it raised."""
    home = Path(tempfile.mkdtemp(prefix="fedmed-test-"))
    env = {**env, "FLWR_HOME": str(home), "STAND_IN": case}
    log = out / "ray.log"
    raised: BaseException | None = None
    try:
        with ray_session.Session(home, env, log, (lines if lines is not None else []).append, timeout_s) as session:
            session.start()
            run_id = session.submit(bundle.write_stub(home / "app"), home / "run.toml", "num-supernodes=1")
            state = session.follow(run_id)
            if state.status != "finished:completed":
                raise ray_log.failure(state, session.tail, log)
    except BaseException as error:
        raised = error
    return home, raised


def gone(home: Path) -> bool:
    return not home.exists() and not processes.owned(home)


def test_a_good_run_leaves_the_log_and_nothing_else(programs: dict[str, str], tmp_path: Path) -> None:
    lines: list[str] = []
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    home, raised = go(programs, "good", tmp_path, lines=lines)
    assert raised is None and gone(home)
    assert lines == ["INFO : round 1", "INFO : round 2"]
    log = (tmp_path / "ray.log").read_text()
    assert "Using SuperLink" in log and "[flwr ls]" in log
    assert {s: signal.getsignal(s) for s in before} == before


def test_a_broken_stream_is_taken_up_again_without_repeats(programs: dict[str, str], tmp_path: Path) -> None:
    lines: list[str] = []
    home, raised = go(programs, "breaks", tmp_path, lines=lines)
    assert raised is None and gone(home)
    assert lines == ["INFO : round 1", "INFO : round 2"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("fails", "the ray run failed: kaputt"),
        ("refused", "flwr run refused the app: bad key"),
        ("garbled", "flwr run refused the app: Segmentation fault"),
        ("no-superlink", "SuperLink did not start: ValueError: port is taken"),
        ("dies", "SuperLink ended in the middle of the run: MemoryError: no room"),
    ],
)
def test_failures_say_why_and_leave_nothing(programs: dict[str, str], tmp_path: Path, case: str, words: str) -> None:
    home, raised = go(programs, case, tmp_path)
    assert isinstance(raised, FedMedError) and words in str(raised)
    assert gone(home)


def test_the_time_limit_ends_a_run_that_hangs(programs: dict[str, str], tmp_path: Path) -> None:
    home, raised = go(programs, "hangs", tmp_path, timeout_s=4)
    assert isinstance(raised, FedMedError) and "given up after 4 s" in str(raised)
    assert gone(home)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_signals_end_everything_first(
    programs: dict[str, str], tmp_path: Path, number: signal.Signals, kind: type[BaseException]
) -> None:
    class Signalling(list[str]):
        def append(self, line: str) -> None:
            super().append(line)
            os.kill(os.getpid(), number)

    home, raised = go(programs, "hangs", tmp_path, lines=Signalling())
    assert type(raised) is kind and gone(home)
    if isinstance(raised, SystemExit):
        assert raised.code == 128 + number


def test_a_callback_that_raises_ends_the_run(programs: dict[str, str], tmp_path: Path) -> None:
    class Breaking(list[str]):
        def append(self, line: str) -> None:
            raise ZeroDivisionError(line)

    home, raised = go(programs, "hangs", tmp_path, lines=Breaking())
    assert isinstance(raised, ZeroDivisionError) and gone(home)


def test_a_session_works_in_a_thread(programs: dict[str, str], tmp_path: Path) -> None:
    found: list[tuple[Path, BaseException | None]] = []
    thread = threading.Thread(target=lambda: found.append(go(programs, "good", tmp_path)))
    thread.start()
    thread.join(60)
    assert found and found[0][1] is None and gone(found[0][0])


# --- real runs ----------------------------------------------------------------------------------------------------

SERVER = """\
    import time
    from pathlib import Path
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.serverapp import ServerApp
    from fedmed.errors import QuorumLost
    app = ServerApp()

    @app.main()
    def main(grid, context):
        mode, ids = context.run_config["config"], []
        while len(ids) < 4:
            ids = list(grid.get_node_ids())
        if mode == "early":
            raise QuorumLost("round 1: 1 of 4 sites answered\\nresume with --resume")
        print("waiting", flush=True)
        content = RecordDict({"config": ConfigRecord({"mode": mode})})
        replies = list(grid.send_and_receive([Message(content, i, "train") for i in ids]))
        cwd = {m.content["config"]["cwd"] for m in replies if m.has_content()}
        broken = [m.error.reason for m in replies if m.has_error()]
        if mode == "sleep":
            time.sleep(120)
        if broken:
            raise ValueError(f"{len(broken)} broken")
        (Path(context.run_config["out"]) / "summary.json").write_text(repr((mode, sorted(cwd))))
"""
CLIENT = """\
    import os
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp
    app = ClientApp()

    @app.train()
    def train(message, context):
        if message.content["config"]["mode"] == "broken" and context.node_config["partition-id"] == 2:
            raise ValueError("site_2 has no pixels")
        cwd = ConfigRecord({"cwd": " ".join(os.listdir("."))})
        return Message(RecordDict({"config": cwd}), reply_to=message)
"""
FEDERATION = "num-supernodes=4 client-resources-num-cpus=1 init-args-num-cpus=2"


@pytest.fixture
def standin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trivial app in a package of its own, started through the stub."""
    package = tmp_path / "lib" / "standin_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "server.py").write_text(textwrap.dedent(SERVER))
    (package / "client.py").write_text(textwrap.dedent(CLIENT))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return bundle.write_stub(tmp_path / "app", "standin_package.server:app", "standin_package.client:app")


def folders() -> set[str]:
    return {p.name for p in Path(tempfile.gettempdir()).glob("fedmed-*")}


@pytest.mark.slow
@pytest.mark.processes
def test_real_run_completes_with_awkward_text_and_an_empty_working_directory(standin: Path, tmp_path: Path) -> None:
    before, lines = folders(), list[str]()
    text = "name: \"quoted\"\nµ: '日本語 \U0001f600'\n# back\\slash\n"
    ray.simulate(standin, text, tmp_path / "out", federation=FEDERATION, on_line=lines.append, timeout_s=240)
    assert (tmp_path / "out" / "summary.json").read_text() == repr((text, [""]))
    assert "waiting" in lines
    assert folders() == before and not processes.owned(tmp_path)


@pytest.mark.slow
@pytest.mark.processes
def test_real_failures_come_with_their_reason(standin: Path, tmp_path: Path) -> None:
    before = folders()
    with pytest.raises(FedMedError, match=r"the ray run failed: 1 broken\n(.*\n)*.*site_2 has no pixels"):
        ray.simulate(standin, "broken", tmp_path / "out", federation=FEDERATION, timeout_s=240)
    with pytest.raises(QuorumLost, match="round 1: 1 of 4 sites answered\nresume with --resume"):
        ray.simulate(standin, "early", tmp_path / "out", federation=FEDERATION, timeout_s=240)
    assert folders() == before


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_real_run_that_is_interrupted_leaves_nothing(standin: Path, tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import sys; from pathlib import Path; from fedmed.engines import ray\n"
        "app, out = map(Path, sys.argv[1:3])\n"
        "ray.simulate(app, 'sleep', out, federation=sys.argv[3], on_line=print, timeout_s=200)"
    )
    root = str(Path(ray.__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ["PYTHONPATH"]]), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", code, str(standin), str(tmp_path / "out"), FEDERATION]
    before = folders()
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        assert any("waiting" in line for line in child.stdout)
        home = Path(tempfile.gettempdir()) / next(iter(folders() - before))
        time.sleep(5)  # into the start of Ray and its actors, which takes longer on a busy machine
        deadline = time.monotonic() + 90
        while len(processes.owned(home)) < 5 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(processes.owned(home)) >= 5
        child.send_signal(number)
        child.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while not gone(home) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert gone(home)
