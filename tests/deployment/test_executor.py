"""The executor of a site: what it answers, what it refuses before it looks further, and that nothing ends its loop."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import stat
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict

from fedmed import client_app
from fedmed.config import Config, config_hash, from_tree, to_yaml
from fedmed.data.phantom import make_phantom
from fedmed.deployment import executor as module
from fedmed.deployment.executor import STOPPED, Executor, describe
from fedmed.deployment.site_config import Limits, SiteConfig
from fedmed.deployment.site_facts import Facts, own_bundle_hash, site_in_file
from fedmed.engines.flower_internals import act_as_server, stamp
from fedmed.engines.flower_tasks import TaskLost
from fedmed.errors import UserError
from fedmed.federation.layout import Layout
from fedmed.federation.messages import Identity, pack
from fedmed.federation.site import client_class, make_model

OWN = "ab" * 32  # the allowed bundle


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One classification site of 20 images: 14 to train, 2 to validate, 4 to test."""
    path = tmp_path_factory.mktemp("data") / "site.h5"
    return make_phantom(path, "classification", num_sites=1, images_per_site=20, image_size=16)


class Task:
    """Stands for `ClientTask`; `answer` may raise what `fails` holds, once each."""

    def __init__(
        self, message: Message, run_config: dict[str, Any], digest: str = OWN, fails: tuple[Exception, ...] = ()
    ) -> None:
        self.message, self.bundle_hash, self._fails = message, digest, list(fails)
        self.context = Context(1, 7, {"data-path": "/from/the/coordinator"}, RecordDict(), run_config)
        self.answers: list[Message] = []

    def answer(self, reply: Message) -> None:
        """Take the reply."""
        if self._fails:
            raise self._fails.pop(0)
        self.answers.append(reply)

    def __enter__(self) -> Task:
        return self

    def __exit__(self, *error: object) -> None:
        return None


def message(kind: str = "train", group: str = "3", content: RecordDict | None = None) -> Message:
    """A message as a SuperNode hands it out."""
    act_as_server()
    made = Message(content or pack(config={}), 7, kind, group_id=group)
    stamp(made, f"{kind}-{group}")
    return made


def config(**sections: Any) -> Config:
    """A configuration with a tiny network."""
    tree = {"model": {"args": {"widths": [4, 4]}}, "training": {"batch_size": 5}, "engine": {"device": "cpu"}}
    return from_tree({**tree, **sections})


def task(kind: str = "train", cfg: Config | None = None, *, content: RecordDict | None = None, **more: Any) -> Task:
    """A message with the configuration of its run."""
    text = to_yaml(cfg or config())
    return Task(message(kind, content=content), {"config": text, "out": "/from/the/coordinator"}, **more)


@pytest.fixture
def site(tmp_path: Path, data: Path) -> Callable[..., Executor]:
    """`site(app, limits)`: an executor; the app notes its calls unless it is given."""

    def make(app: Any = None, limits: Limits | None = None, name: str = "A") -> Executor:
        state = tmp_path / "state"
        state.mkdir(mode=0o700, exist_ok=True)
        settings = SiteConfig(name, data, "h:1", tmp_path, tmp_path, state, device="cpu", limits=limits or Limits())
        in_file, num_train = site_in_file(settings)
        made = Executor(settings, app, frozenset({OWN}), Facts(name, num_train), in_file)
        if app is None:
            made.calls = []
            made.app = lambda message, context: (
                made.calls.append(context) or Message(pack(metrics={}), reply_to=message)
            )
        return made

    return make


def run(executor: Executor, *tasks: Task | None) -> None:
    """Let the executor take these tasks (None: there is none), then end it by SIGTERM."""
    waiting = list(enumerate(tasks))

    def take() -> tuple[int, str] | None:
        if not waiting:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            raise AssertionError("SIGTERM did not end the loop")
        number, found = waiting.pop(0)
        return None if found is None else (1, str(number))

    source: Any = SimpleNamespace(take=take)
    opened: Any = lambda source, token: tasks[int(token)]  # noqa: E731
    assert executor.run(source, opened) == 0


def reason(task: Task) -> str:
    """The reason of the error that was answered."""
    assert len(task.answers) == 1 and task.answers[0].has_error()
    return task.answers[0].error.reason


# --- bundles --------------------------------------------------------------------------------------------------------


def test_a_tampered_bundle_is_refused_before_anything_else(
    site: Callable[..., Executor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    executor, digest = site(limits=Limits(allow_imports=("evil_module:Thing",))), "cd" * 32
    tampered = task(cfg=config(client={"name": "evil_module:Thing"}), digest=digest)
    monkeypatch.setattr(module, "read_config", lambda text: pytest.fail("the configuration was read"))
    run(executor, tampered)
    text = reason(tampered)
    assert text.startswith("UserError: site 'A' refuses the bundle") and digest in text
    assert "install the same version of FedMed at both ends" in text and "`bundles` in its site.yaml" in text
    assert executor.calls == [] and "evil_module" not in sys.modules
    assert tampered.answers[0].metadata.reply_to_message_id == tampered.message.metadata.message_id


def test_the_bundle_of_this_installation_has_one_hash() -> None:
    assert re.fullmatch(r"[0-9a-f]{64}", own_bundle_hash()) and own_bundle_hash() == own_bundle_hash()


# --- limits ---------------------------------------------------------------------------------------------------------


def test_what_exceeds_the_limits_is_refused_with_the_reason(site: Callable[..., Executor]) -> None:
    executor = site(limits=Limits(max_epochs=2))
    allowed, refused = task(cfg=config(training={"epochs": 2})), task("query.identify", config(training={"epochs": 3}))
    run(executor, allowed, refused)
    assert len(executor.calls) == 1 and not allowed.answers[0].has_error()
    assert reason(refused) == "UserError: site 'A' refuses: training.epochs=3, allowed are 2 (limits.max_epochs)"


def test_a_run_without_configuration_is_refused(site: Callable[..., Executor]) -> None:
    executor = site()
    bare = Task(message(), {"experiment": "fedavg"})
    run(executor, bare)
    assert "brings no configuration" in reason(bare) and executor.calls == []


def test_the_app_is_told_the_sites_own_paths_and_nothing_of_the_run_but_its_configuration(
    site: Callable[..., Executor], data: Path
) -> None:
    executor, cfg = site(), config(name="../odd name")
    run(executor, task(cfg=cfg))
    (context,) = executor.calls
    state = Path(context.node_config["state-dir"])
    assert state.parent == executor.config.state and state.name.endswith(config_hash(cfg, with_rounds=False)[:8])
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert dict(context.node_config) == {
        "data-path": str(data), "site": executor.in_file, "name": "A", "state-dir": str(state), "device": "cpu",
    }  # fmt: skip
    assert dict(context.run_config) == {"config": to_yaml(cfg)} == {"config": (state / "config.yaml").read_text()}


# --- whole messages -------------------------------------------------------------------------------------------------


def whole(cfg: Config, **more: Any) -> RecordDict:
    """A train message with the initial model, in Flower's own arrays as they come over the wire."""
    model, _ = make_model(cfg, "classification", 6, 3, (16, 16))
    state = Layout.of(model, client_class(cfg).is_personal).exchanged_state(model)
    content = pack(arrays=state, config={"round": 1, "rounds": 4, "personal_round": 0, "durable_round": 0, **more})
    content["arrays"] = ArrayRecord({name: Array(value.detach().numpy().copy()) for name, value in state.items()})
    return content


def test_the_real_app_answers_under_the_sites_name_and_keeps_its_state(site: Callable[..., Executor]) -> None:
    cfg = config(
        name="mine", client={"name": "local_norm"}, engine={"device": "cuda:7"}, data={"path": "/not/here.h5"},
        evaluation={"central": "/not/here.h5", "mode": "after"},
    )  # fmt: skip
    executor = site(client_app.app)
    identify, train = task("query.identify", cfg), task("train", cfg, content=whole(cfg, evaluate="after"))
    run(executor, identify, None, train)
    identity = Identity.from_config(dict(identify.answers[0].content.config_records["identity"]))
    assert (identity.site, identity.num_train, identity.num_test) == ("A", 14, 4)
    metrics = train.answers[0].content.metric_records["metrics"]
    assert metrics["num-examples"] == 14 and metrics["n/test"] == 4 and "test/personal/acc" in metrics
    (kept,) = executor.config.state.glob("mine-*/personal/round-00001/personal.safetensors")
    assert stat.S_IMODE(kept.parents[1].stat().st_mode) == 0o700


def test_the_name_in_site_yaml_decides_the_random_numbers(site: Callable[..., Executor], data: Path) -> None:
    def trained(name: str) -> dict[str, torch.Tensor]:
        client_app._workshop.cache_clear()
        sent = task("train", config(), content=whole(config()))
        run(site(client_app.app, name=name), sent)
        record = sent.answers[0].content.array_records["arrays"]
        return {key: torch.from_numpy(value.numpy()) for key, value in record.items()}

    own = site().in_file
    first, second, third = trained(own), trained("other"), trained(own)
    assert all(torch.equal(first[key], third[key]) for key in first)
    assert not all(torch.equal(first[key], second[key]) for key in first)


def test_scores_of_a_small_split_stay(site: Callable[..., Executor]) -> None:
    cfg = config(evaluation={"select": "bacc"})
    evaluate, identify = task("evaluate", cfg, content=whole(cfg)), task("query.identify", cfg)
    run(site(client_app.app, Limits(min_count=3)), evaluate, identify)
    metrics = dict(evaluate.answers[0].content.metric_records["metrics"])
    assert metrics["n/test"] == 4 and not any(key.startswith(("val/", "n/val")) for key in metrics)
    identity = dict(identify.answers[0].content.config_records["identity"])
    assert (identity["num_val"], identity["num_test"]) == (0, 4)


def test_what_an_app_raises_is_answered_without_paths_and_data(site: Callable[..., Executor], tmp_path: Path) -> None:
    broken = site(client_app.app)
    wrong = task("train", config(data={"annotation": "box"}), content=whole(config()))
    misfit = task("train", config(), content=pack(config={"round": 1}))
    strange = task("train.other")
    run(broken, wrong, misfit, strange)
    assert reason(wrong) == "UserError: the data file of this site does not suit the run (the site's log says why)"
    assert reason(misfit).startswith("FedMedError: the received model has no entry")
    assert "details in the site's log" in reason(strange)
    for error in (
        UserError(f"cannot read {tmp_path}/a b.h5: no, {tmp_path / 'state'} and ~/x, n/test or {broken.config.data}"),
        ValueError(f"patient 7 in {tmp_path}"),
    ):
        context = Context(
            1, 7, {"data-path": f"{tmp_path}/a b.h5", "state-dir": str(tmp_path / "state")}, RecordDict(), {}
        )
        try:
            raise error
        except Exception as caught:
            text = client_app._reason(caught, context)
        assert str(tmp_path) not in text and "patient" not in text and "~/x" not in text and "a b" not in text
        assert "n/test" in text or isinstance(error, ValueError)


# --- the loop -------------------------------------------------------------------------------------------------------


def test_nothing_that_happens_to_a_message_ends_the_loop(site: Callable[..., Executor]) -> None:
    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "evaluate":
            raise ZeroDivisionError("a secret of the site")
        return Message(pack(metrics={}), reply_to=message)

    raises = task("evaluate")
    gone = task(fails=(httpx.ConnectError("gone"),))
    lost = task(fails=(TaskLost("its run has ended"),))
    unwritable = task(fails=(TypeError("bfloat16"),))
    last = task()
    run(site(app), raises, gone, lost, unwritable, last)
    assert reason(raises) == "ZeroDivisionError (details in the site's log)"
    assert gone.answers == lost.answers == []
    assert reason(unwritable) == "TypeError: the answer cannot be sent (details in the site's log)"
    assert len(last.answers) == 1 and not last.answers[0].has_error()


def test_sigterm_lets_the_message_in_work_finish(site: Callable[..., Executor]) -> None:
    def app(message: Message, context: Context) -> Message:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        return Message(pack(metrics={"done": 1}), reply_to=message)

    first, second = task(), task()
    source: Any = SimpleNamespace(take=lambda: (1, ""))
    before = signal.getsignal(signal.SIGTERM)
    assert site(app).run(source, lambda source, token: first if not first.answers else second) == 0  # type: ignore[arg-type,return-value]
    assert len(first.answers) == 1 and not first.answers[0].has_error() and second.answers == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_message_that_takes_too_long_is_answered_when_the_site_stops(
    site: Callable[..., Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE_S", 0.1)

    def app(message: Message, context: Context) -> Message:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        raise AssertionError("nobody ended it")

    slow = task()
    source: Any = SimpleNamespace(take=lambda: (1, ""))
    assert site(app).run(source, lambda source, token: slow) == 0  # type: ignore[arg-type,return-value]
    assert reason(slow) == STOPPED


def test_the_log_says_what_was_asked_and_how_it_went(
    site: Callable[..., Executor], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fedmed.site")
    executor = site(limits=Limits(max_epochs=1))
    run(executor, task(), task(cfg=config(training={"epochs": 2}, name="x\nfake line")))
    lines = caplog.messages
    assert lines[0] == "round 3, train: received" and re.fullmatch(r"round 3, train: answered in \d+\.\d s", lines[1])
    assert lines[3].startswith("round 3, train: refused: UserError: site 'A' refuses: training.epochs=2")
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize(
    ("kind", "group", "words"),
    [
        ("query.identify", "", "identify"), ("query.method", "12", "round 12, query"), ("train", "1\nERROR forged", "train"),
        ("Train\nERROR", "1", "round 1, message"),
    ],
)  # fmt: skip
def test_words_of_the_sender_do_not_reach_the_log(kind: str, group: str, words: str) -> None:
    made: Any = SimpleNamespace(metadata=SimpleNamespace(message_type=kind, group_id=group))
    assert describe(made) == words


# --- memory ---------------------------------------------------------------------------------------------------------


def test_memory_stays_flat_over_rounds_and_over_runs(site: Callable[..., Executor]) -> None:
    executor = site(client_app.app)
    dead: list[weakref.ref[Any]] = []
    live: list[int] = []

    def stream() -> Any:
        for number in range(12):
            cfg = config(seed=number // 4, client={"name": "local_norm"})
            sent = task("train", cfg, content=whole(cfg))
            dead.append(weakref.ref(sent.message))
            yield sent
            dead.append(weakref.ref(client_app._workshop(to_yaml(cfg), "", "", "", device="cpu")))
            if number % 5 == 1:
                gc.collect()
                live.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))

    tasks = stream()

    def take() -> tuple[int, str]:
        return 1, ""

    def open_task(source: Any, token: str) -> Any:
        try:
            return next(tasks)
        except StopIteration:
            os.kill(os.getpid(), signal.SIGTERM)
            return task("train", config(seed=9), content=pack(config={}))

    assert executor.run(SimpleNamespace(take=take), open_task) == 0  # type: ignore[arg-type]
    gc.collect()
    assert all(ref() is None for ref in dead[:-1])  # every message, and the workshop of every run that is over
    assert len(live) == 3 and max(live) == live[0]
    assert client_app._workshop.cache_info().currsize == 1
    assert threading.active_count() < 20


def test_an_error_is_an_answer_flower_understands(site: Callable[..., Executor]) -> None:
    refused = task(digest="00" * 32)
    run(site(), refused)
    assert isinstance(refused.answers[0].error, Error) and refused.answers[0].error.code == 2
