"""The deployment engine with a made-up Flower: what is sent, whose task is taken, how a run ends; no other processes."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from fedmed.client_app import app as client_app
from fedmed.config import Config, from_yaml, load_config
from fedmed.data.phantom import make_phantom
from fedmed.deployment.coordinator_folder import ApprovedSite, CoordinatorFolder
from fedmed.engines import deployment, flower_tasks, run
from fedmed.engines import flower_internals as internals
from fedmed.engines.flower_internals import RunState
from fedmed.engines.flower_tasks import ServerTask, TaskLost, bundle_hash
from fedmed.engines.local import LocalGrid
from fedmed.errors import FedMedError, QuorumLost, UserError
from fedmed.files import read_history
from fedmed.tracking import Callback

NAMES = ("a", "b", "c")
HASH = "made-up hash"
SMALL = (
    "model.args={widths: [4, 4]}", "optimizer.lr=0.01", "training.batch_size=7", "engine.device=cpu", "federation.min_sites=3",
    "federation.start_deadline_s=0.2", "optimizer.persist=true",
)  # fmt: skip
FINISHED = RunState("finished:completed", "")


def config(*words: str) -> Config:
    """A small classification run on the deployment engine."""
    return load_config("fedavg", [*SMALL, "federation.rounds=3", "engine.name=deployment", *words])


class Flower:
    """Stands for the SuperLink and the sites: `submitted` runs get the next of `ids`, and `offered` tasks wait before them.

    `sites`: one node config per site, with its own file and state folder. `ended`: how each task was finished, by run id.
    """

    def __init__(self, sites: list[dict[str, Any]]) -> None:
        self.sites = sites
        self.ids = ["11", "12"]
        self.states_of: dict[str, RunState] = {"7": FINISHED}
        self.submitted: list[str] = []
        self.offered: list[tuple[int, str]] = []
        self.hashes: dict[int, str] = {}
        self.ended: dict[int, tuple[str, bool]] = {}
        self.stopped: list[str] = []
        self.listed = 0
        self.heard = True
        self.intercept: Any = None
        self.unstoppable: set[str] = set()

    # What FlwrCommands does.

    def submit(self, app: Path, run_config: Path, federation: str | None = None) -> str:
        """Take a run."""
        assert federation is None and (app / "pyproject.toml").is_file()
        values = tomllib.loads(run_config.read_text(encoding="utf-8"))
        assert set(values) == {"config"}
        assert run_config.stat().st_mode & 0o077 == 0
        self.submitted.append(values["config"])
        run_id = self.ids.pop(0)
        self.offered.append((int(run_id), f"token {run_id}"))
        return run_id

    def states(self) -> dict[str, RunState]:
        """The runs."""
        self.listed += 1
        return dict(self.states_of)

    def state(self, run_id: str) -> RunState:
        """One run."""
        return self.states_of[run_id]

    def stop(self, run_id: str) -> bool:
        """Stop a run."""
        if run_id in self.unstoppable:
            return False
        self.stopped.append(run_id)
        return True

    # What TaskSource and ServerTask do.

    def source(self, address: str, secret: bytes, ca: bytes | None = None, *, server: bool = False) -> Any:
        """The queue of tasks."""
        assert address.startswith("127.0.0.1:") and len(secret) >= 32 and ca is not None and server
        take: Callable[[], tuple[int, str] | None] = lambda: self.offered.pop(0) if self.offered else None  # noqa: E731
        return SimpleNamespace(take=take, close=lambda: None)

    def task(self, source: Any, token: str) -> Any:
        """A task; its grid runs the installed client app on the sites' own files."""
        number = int(token.split()[1])

        def finish(problem: str = "", *, stopped: bool = False) -> bool:
            self.ended[number] = problem, stopped
            return self.heard

        grid = LocalGrid(
            client_app,
            len(self.sites),
            {"config": self.submitted[-1]},
            node_configs=self.sites,
            intercept=self.intercept,
        )
        return SimpleNamespace(grid=grid, bundle_hash=self.hashes.get(number, HASH), finish=finish)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with three sites."""
    path = tmp_path_factory.mktemp("data") / "sites.h5"
    return make_phantom(path, "classification", num_sites=3, images_per_site=20, image_size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorFolder:
    """A coordinator's folder with three approved sites; nothing listens on its port."""
    made = CoordinatorFolder.create(tmp_path_factory.mktemp("coordinator") / "fl", ["localhost"], internals.free_port())
    with made.changed_sites() as sites:
        sites.update({f"phantom-0{i}": ApprovedSite(1000 + i, "", "", "") for i in range(3)})
    return made


@pytest.fixture
def flower(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flower:
    """A made-up Flower in place of the real one; `flower.sites` keep their state in `tmp_path/site-*`."""
    made = Flower([
        {"data-path": str(data), "site": f"phantom-0{i}", "state-dir": str(tmp_path / f"site-{i}")} for i in range(3)
    ])  # fmt: skip
    monkeypatch.setattr(deployment, "wait_for_superlink", lambda folder: None)
    monkeypatch.setattr(deployment, "FlwrCommands", lambda *words, **options: made)
    monkeypatch.setattr(deployment, "TaskSource", made.source)
    monkeypatch.setattr(deployment, "ServerTask", made.task)
    monkeypatch.setattr(deployment, "bundle_hash", lambda app: HASH)
    return made


# ---------------------------------------------------------------------- configuration


def test_nothing_of_the_coordinators_own_is_sent(tmp_path: Path) -> None:
    secret = str(tmp_path / "COORDINATOR")
    words = [f"data.path={secret}.h5", f"data.cache_dir={secret}", f"evaluation.central={secret}.h5", f"out={secret}",
             f"evaluation.local_only={secret}", "data.corruption.args={table: " + secret + "}", "data.phantom={where: " + secret + "}",
             "tracking.wandb.enabled=true", "tracking.wandb.project=COORDINATOR", "data.mean=[0.5]", "engine.threads=1"]  # fmt: skip
    own = deployment.coordinator_config(config(*words))
    assert own.out == secret and own.evaluation.central == f"{secret}.h5" and own.evaluation.local_only == secret
    assert own.tracking.wandb.enabled
    sent = deployment.sent_config(own)
    text = deployment.to_yaml(sent)
    assert "COORDINATOR" not in text and str(Path.cwd()) not in text and str(Path.home()) not in text
    assert (sent.data.mean, sent.name, sent.federation) == ([0.5], "fedavg", own.federation)
    assert from_yaml(text) == sent


def test_paths_of_the_coordinator_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = deployment.coordinator_config(config("out=runs/x", "evaluation.central=test.h5"))
    assert (own.out, own.evaluation.central) == (str(tmp_path / "runs" / "x"), str(tmp_path / "test.h5"))
    automatic = deployment.coordinator_config(config("out=x"))
    assert (automatic.evaluation.central, automatic.data.path, automatic.data.corruption.name) == ("none", "", None)


def test_keys_without_effect_are_named_where_somebody_may_expect_one() -> None:
    def keys(experiment: str, *words: str) -> list[str]:
        return deployment.ignored_keys(load_config(experiment, words), words)

    assert (
        keys("fedavg") == keys("fednoro") == []
    )  # phantom data and what is done to it: nobody expects that of real sites
    assert keys("fedavg", "data.path=phantom:classification", "data.partition.name=null", "data.mean=[0.5]") == [
        "data.path",
        "data.partition",
    ]
    config_of_file = dataclasses.replace(load_config("fedavg"), data=dataclasses.replace(Config().data, path="x.h5"))
    assert deployment.ignored_keys(config_of_file) == ["data.path"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["client.args.los=ce"], r"unknown key 'client\.args\.los'"),
        (["strategy.name=fedavgg"], "fedavgg"),
        (["evaluation.central=nowhere.h5"], "evaluation.central: there is no .*nowhere.h5 on this machine"),
        (["data.augment=[hflipp]"], "hflipp"),
    ],
)
def test_mistakes_are_found_before_anything_is_handed_in(
    flower: Flower, folder: CoordinatorFolder, tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        deployment.run(config(f"out={tmp_path}/out", *words), folder.path)
    assert flower.submitted == [] and flower.listed == 0
    with pytest.raises(UserError, match="the key out is empty"):
        deployment.check(config())


def test_engine_and_folder_belong_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs --coordinator DIR"):
        run(config(f"out={tmp_path}"))
    with pytest.raises(
        UserError, match="--coordinator is for --engine deployment; this run is to use the engine local"
    ):
        run(load_config("fedavg", [f"out={tmp_path}"]), coordinator=tmp_path)
    with pytest.raises(UserError, match="is no coordinator's folder"):
        run(config(f"out={tmp_path}"), coordinator=tmp_path)


# ---------------------------------------------------------------------- whole runs


def model(out: Path) -> bytes:
    """The final model."""
    return (out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def local(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on the local engine."""
    out = tmp_path_factory.mktemp("local") / "out"
    run(load_config("fedavg", [*SMALL, "federation.rounds=3", f"data.path={data}", f"out={out}"]))
    return out


def test_a_run_ends_as_on_the_local_engine(
    flower: Flower, folder: CoordinatorFolder, local: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    summary = run(config(f"out={out}", f"data.path={data}"), coordinator=folder.path)
    assert model(out) == model(local) and summary["rounds"] == 3
    assert flower.ended == {11: ("", False)}
    assert flower.listed == 2  # before, and at the end, when Flower then removes what is left of the run
    left = {p.name for p in out.iterdir()}
    assert left == {
        "checkpoint",
        "config.yaml",
        "history.jsonl",
        "model.json",
        "model.safetensors",
        "summary.json",
    }  # aggregates only
    for i in range(3):
        assert (tmp_path / f"site-{i}" / "cases.csv").is_file() and (tmp_path / f"site-{i}" / "personal").is_dir()


class Stop(Callback):
    """Ctrl-C after the first round."""

    def on_round(self, number: int, records: Any, elapsed: float) -> None:
        """Interrupt."""
        raise KeyboardInterrupt


def test_a_run_that_was_stopped_goes_on_to_the_same_model(
    flower: Flower, folder: CoordinatorFolder, local: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(config(f"out={out}"), coordinator=folder.path, callbacks=[Stop()])
    assert flower.ended == {11: ("stopped at the coordinator", True)}
    run(config(f"out={out}"), coordinator=folder.path, resume=True)
    assert flower.ended[12] == ("", False) and model(out) == model(local)
    assert flower.submitted[0] == flower.submitted[1]  # the sites' folders go by its hash
    assert [r["round"] for r in read_history(out / "history.jsonl") if r["phase"] == "train"] == [
        1,
        1,
        1,
        2,
        2,
        2,
        3,
        3,
        3,
    ]


def test_a_site_that_was_away_for_a_round_keeps_its_state(
    flower: Flower, folder: CoordinatorFolder, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []

    def intercept(message: Any, call: Any) -> Any:
        if message.metadata.message_type != "train" or message.metadata.dst_node_id != 1001:
            return call()
        sent = message.content["config"]
        seen.append((sent["round"], sent["personal_round"]))
        reply = call()  # round 2: it worked, and was killed before the answer left
        if sent["round"] == 2:
            raise RuntimeError("the site was killed")
        assert "personal_fresh" not in reply.content["metrics"]
        return reply

    flower.intercept = intercept
    out = tmp_path / "out"
    run(config(f"out={out}"), coordinator=folder.path)
    assert seen == [(1, 0), (2, 1), (3, 1)]  # from round 1 on, the last that was heard of
    failed = [
        (r["round"], r["phase"], r["site"]) for r in read_history(out / "history.jsonl") if r["status"] == "failed"
    ]
    assert failed == [(2, "train", "phantom-01")]


def test_a_quorum_that_is_lost_names_the_sites_away(flower: Flower, folder: CoordinatorFolder, tmp_path: Path) -> None:
    with folder.changed_sites() as sites:
        sites["far"] = ApprovedSite(1003, "", "", "")
    try:
        with pytest.raises(QuorumLost, match=r"3 of the 4 sites needed .*; not online: far; start the missing sites"):
            run(config(f"out={tmp_path}/out", "federation.min_sites=4"), coordinator=folder.path)
    finally:
        with folder.changed_sites() as sites:
            del sites["far"]
    assert "not online: far" in flower.ended[11][0]


# ---------------------------------------------------------------------- whose task, whose run


def test_foreign_runs_are_refused(
    flower: Flower, folder: CoordinatorFolder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    flower.submitted = [""]
    flower.offered = [(666, "token 666"), (667, "token 667"), (11, "token 11")]
    make = flower.task

    def fragile(source: Any, token: str) -> Any:
        if token == "token 667":
            raise httpx.ReadTimeout("gone")
        return make(source, token)

    monkeypatch.setattr(deployment, "ServerTask", fragile)
    with caplog.at_level(logging.WARNING, "fedmed.deployment"):
        task = deployment.take(folder, "11", HASH)
    assert task.bundle_hash == HASH and 11 not in flower.ended
    assert flower.ended[666][0].startswith("refused") and "run 666 was not handed in by this command" in caplog.text


def test_a_bundle_that_was_changed_on_the_way_is_refused(
    flower: Flower, folder: CoordinatorFolder, tmp_path: Path
) -> None:
    flower.hashes[11] = "another"
    with pytest.raises(FedMedError, match="came back with another bundle"):
        run(config(f"out={tmp_path}/out"), coordinator=folder.path)
    assert flower.ended[11][0].startswith("refused") and flower.stopped == ["11"]


def test_a_task_that_never_comes(
    flower: Flower, folder: CoordinatorFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "TAKE_LIMIT_S", 0.05)
    monkeypatch.setattr(deployment, "POLL_S", 0.01)
    monkeypatch.setattr(flower, "source", lambda *a, **k: SimpleNamespace(take=lambda: None, close=lambda: None))
    monkeypatch.setattr(deployment, "TaskSource", flower.source)
    with pytest.raises(FedMedError, match=r"had no task for run 11 within 0\.05 s"):
        run(config(f"out={tmp_path}/out"), coordinator=folder.path)
    assert flower.stopped == ["11"]  # nobody else would ever take it


def test_runs_left_behind_are_stopped(flower: Flower, caplog: pytest.LogCaptureFixture) -> None:
    flower.states_of = {"1": RunState("running", ""), "2": FINISHED, "3": RunState("pending", "")}
    with caplog.at_level(logging.WARNING, "fedmed.deployment"):
        deployment.stop_left_over(flower)  # type: ignore[arg-type]
    assert flower.stopped == ["1", "3"]
    assert "stopped run 1, which an earlier command left behind as running" in caplog.text
    flower.unstoppable = {"1"}
    with pytest.raises(FedMedError, match="run 1 of an earlier command is still running"):
        deployment.stop_left_over(flower)  # type: ignore[arg-type]


def test_one_run_at_a_time(folder: CoordinatorFolder) -> None:
    holder = (
        "import sys; from fedmed.deployment.coordinator_folder import CoordinatorFolder\n"
        "from fedmed.engines.deployment import only_run\n"
        "with only_run(CoordinatorFolder.open(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()\n"
    )
    root = str(Path(deployment.__file__).resolve().parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(folder.path)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:  # fmt: skip
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        with (
            pytest.raises(FedMedError, match=f"under way already .*, as process {child.pid}; wait"),
            deployment.only_run(folder),
        ):
            pass
        child.kill()  # the lock goes with its process, whatever way
        child.wait()
    with deployment.only_run(folder):
        lock = folder.path / "state" / "run.lock"
        assert lock.read_text() == str(os.getpid()) and lock.stat().st_mode & 0o777 == 0o600


# ---------------------------------------------------------------------- the SuperLink away


def test_a_coordinator_that_is_not_up(folder: CoordinatorFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "HEALTH_LIMIT_S", 0.0)
    with pytest.raises(FedMedError, match=r"not up \(nothing listens on .*\); .*fedmed coordinator start "):
        deployment.wait_for_superlink(folder)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TaskLost("no sign of life"), r"the SuperLink lost the run \(no sign of life\): .*"),
        (
            httpx.ConnectError("refused"),
            r"the SuperLink lost the run \(no answer for 15 minutes, ConnectError: refused\)",
        ),
    ],
)
def test_a_run_that_lost_its_superlink_says_how_to_go_on(
    flower: Flower, folder: CoordinatorFolder, tmp_path: Path, local: Path, error: Exception, words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    grids: list[LocalGrid] = []
    make = flower.task

    def task(source: Any, token: str) -> Any:
        made = make(source, token)
        grids.append(made.grid)
        return made

    class Cut(Callback):
        """The wire breaks after the first round."""

        def on_round(self, number: int, records: Any, elapsed: float) -> None:
            def broken(messages: Any) -> Any:
                raise error

            grids[0].push_messages = broken  # type: ignore[method-assign]

    monkeypatch.setattr(deployment, "ServerTask", task)
    flower.heard, out = False, tmp_path / "out"
    with pytest.raises(FedMedError, match=words) as failed:
        run(config(f"out={out}"), coordinator=folder.path, callbacks=[Cut()])
    assert f"--out {out} --resume goes on" in str(failed.value) and not isinstance(failed.value, UserError)
    assert flower.listed == 1  # nobody to ask
    flower.heard = True
    run(config(f"out={out}"), coordinator=folder.path, resume=True)
    assert model(out) == model(local)


# ---------------------------------------------------------------------- Flower's own ways, mended


def refused(status: int) -> httpx.HTTPStatusError:
    """What httpx raises for an answer with this status."""
    request = httpx.Request("POST", "https://x/")
    return httpx.HTTPStatusError(
        str(status), request=request, response=httpx.Response(status, request=request, text="{}")
    )


@pytest.mark.parametrize(("status", "words"), [(401, "no longer knows the task"), (403, "its run has ended")])
def test_a_lost_task_is_an_error_and_no_signal(status: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("a signal"))
    monkeypatch.setattr(signal, "raise_signal", lambda *_: pytest.fail("a signal"))

    def call() -> None:
        raise refused(status)

    with pytest.raises(TaskLost, match=f"Flower at here:1 .*{words}"):
        flower_tasks._patient_invoker("here:1").invoke(call)


def test_an_outage_is_borne_and_said_twice(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    slept: list[float] = []
    monkeypatch.setattr(flower_tasks.time, "sleep", slept.append)
    tries = iter([httpx.ConnectError("a"), refused(503), httpx.ReadTimeout("b"), None])

    def call() -> str:
        error = next(tries)
        if error is not None:
            raise error
        return "done"

    with caplog.at_level(logging.WARNING, "fedmed.flower"):
        assert flower_tasks._patient_invoker("here:1").invoke(call) == "done"
    assert len(slept) == 3
    assert [r.getMessage() for r in caplog.records] == [
        "no answer from here:1; trying again for 15 minutes",
        "here:1 answers again",
    ]


def test_an_outage_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_tasks, "GIVE_UP_S", 0.0)

    def call() -> None:
        raise httpx.ConnectError("refused")

    with pytest.raises(httpx.ConnectError):
        flower_tasks._patient_invoker("here:1").invoke(call)
    with pytest.raises(TaskLost, match="all quiet, ConnectError: refused"), flower_tasks.no_answer("all quiet"):
        call()


class Client:
    """Stands for Flower's client: keeps what it is sent, raises `error`."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.sent = error, list[Any]()

    def PushTaskOutput(self, request: Any) -> None:
        """Take the end of a task."""
        self.sent.append(request)
        if self.error is not None:
            raise self.error


def task_with(client: Client) -> tuple[ServerTask, list[str]]:
    """A task that talks to `client`, and what was let go of."""
    from flwr.app import Context, RecordDict

    task, let_go = object.__new__(ServerTask), list[str]()
    task._client = client  # type: ignore[assignment]
    task._invoker = SimpleNamespace(max_tries=None)
    task._context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    task._heartbeat = SimpleNamespace(stop=lambda: let_go.append("heartbeat"))  # type: ignore[assignment]
    task.grid = SimpleNamespace(close=lambda: let_go.append("grid"))  # type: ignore[assignment]
    return task, let_go


def test_the_end_of_a_task_is_said_once_and_never_waits() -> None:
    endings: tuple[Mapping[str, Any], ...] = ({}, {"problem": "x"}, {"problem": "x", "stopped": True})
    for arguments, status in zip(endings, ("completed", "failed", "stopped"), strict=True):
        client = Client()
        task, let_go = task_with(client)
        assert task.finish(**arguments)
        assert client.sent[0].sub_status == status and client.sent[0].details == arguments.get("problem", "")
        assert task._invoker.max_tries == 1 and let_go == ["heartbeat", "grid"]
    for error in (httpx.ConnectError("away"), TaskLost("gone")):
        task, let_go = task_with(Client(error))
        assert not task.finish() and let_go == ["heartbeat", "grid"]


def test_signs_of_life_survive_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    beats: list[int] = []
    done = flower_tasks.threading.Event()

    class Source:
        def SendTaskHeartbeat(self, request: Any) -> None:
            beats.append(1)
            if len(beats) == 3:
                done.set()
            raise refused(401) if len(beats) == 1 else httpx.ConnectError("away")

        def close(self) -> None:
            beats.append(0)

    monkeypatch.setattr(flower_tasks, "BEAT_S", 0.001)
    monkeypatch.setattr(flower_tasks, "_token_client", lambda *words, **options: Source())
    heartbeat = flower_tasks._Heartbeat(SimpleNamespace(), "token", "x")  # type: ignore[arg-type]
    assert done.wait(30)
    heartbeat.stop()
    heartbeat.join(30)
    assert not heartbeat.is_alive() and beats[-1] == 0


@pytest.mark.parametrize("outcome", ["received", "refused", "nothing there"])
def test_a_message_whose_run_has_ended_leaves_no_task_behind(outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supernode import start_client_internal as supernode

    tasks, dropped = {1: "of an earlier message, whose executor is just saying that it is done"}, list[Any]()

    def flowers_way(*, receive: Callable[[], Any], **others: Any) -> int | None:
        if receive() is None:
            return None
        tasks[2] = "new"
        return 7 if outcome == "received" else None

    state = SimpleNamespace(
        get_tasks=lambda statuses: [SimpleNamespace(task_id=number) for number in tasks],
        finish_task=lambda number, status, details: dropped.append(("task", number, status)),
        delete_messages=lambda message_ids: dropped.append(("messages", *message_ids)),
    )
    message = SimpleNamespace(metadata=SimpleNamespace(message_id="m"))
    monkeypatch.setattr(supernode, "_pull_and_store_message", flowers_way)
    flower_tasks.mend_supernode()
    found = supernode._pull_and_store_message(  # type: ignore[call-arg]
        state=state,  # type: ignore[arg-type]
        object_store=SimpleNamespace(delete=lambda number: dropped.append(("object", number))),  # type: ignore[arg-type]
        receive=lambda: None if outcome == "nothing there" else (message, "tree"),  # type: ignore[arg-type,return-value]
        node_config={},
    )
    assert found == (7 if outcome == "received" else None)
    left = [("task", 2, "failed"), ("messages", "m"), ("object", "m")]
    assert dropped == (left if outcome == "refused" else [])


def test_the_stub_has_the_hash_that_sites_expect(tmp_path: Path) -> None:
    from fedmed.engines import bundle

    first, second = (bundle_hash(bundle.write_stub(tmp_path / name)) for name in ("one", "two"))
    assert first == second and len(first) == 64 and json.dumps(first)
