from __future__ import annotations

import io
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fedmed.errors import UserError
from fedmed.tracking import Callback, build_callbacks, round_scalars, trackers
from fedmed.tracking.progress import ProgressBar, headline, interactive

INFO = {"name": "demo", "out": "x", "rounds": 4, "start_round": 1, "sites": ["a", "b"], "main_metric": "dice"}


def record(phase: str, site: str | None, status: str = "ok", **metrics: Any) -> dict[str, Any]:
    """One record; `__` in a metric's name stands for a slash."""
    named = {key.replace("__", "/"): value for key, value in metrics.items()}
    return {"round": 1, "phase": phase, "site": site, "status": status, "metrics": named}


RECORDS = [
    record("train", "a", train_loss=1.0),
    record("train", "b", train_loss=3.0, per_class=[1, 2]),
    record("train", "c", status="failed", train_loss=100.0),
    record("evaluate", "a", test__global__dice=0.5, val__global__dice=0.9),
    record("evaluate", "b", test__global__dice=None, val__global__dice=0.7),
    record("server", None, largest_weight=0.4, believed_noisy=["a"]),
]


def test_round_scalars_by_hand() -> None:
    flat = round_scalars(RECORDS)
    assert flat["mean/train_loss"] == 2.0  # the failed answer is no part of it
    assert flat["mean/test/global/dice"] == 0.5  # null is left out
    assert flat["sites/a/test/global/dice"] == 0.5
    assert flat["server/largest_weight"] == 0.4
    assert flat["failed_sites"] == 1.0
    assert not any("per_class" in key or "believed" in key for key in flat)
    assert round_scalars([]) == {"failed_sites": 0.0}


def test_headline_prefers_the_central_test_set() -> None:
    assert headline(RECORDS, "dice") == (2.0, 0.5, "mean/test/global/dice")
    central = [*RECORDS, record("central", None, test__global__dice=0.25)]
    assert headline(central, "dice") == (2.0, 0.25, "central/test/global/dice")
    degraded = record("central", None, **{"test-corrupted__global__dice": 0.1, "test__global__dice": 0.25})
    assert headline([*RECORDS, degraded], "dice")[1:] == (0.25, "central/test/global/dice")
    loss, metric, name = headline([], "dice")
    assert loss != loss and metric != metric and name == ""


def run_plain(rounds: int, start_round: int = 1, records: Any = RECORDS) -> list[str]:
    """Lines that the progress prints where there is no terminal."""
    lines: list[str] = []
    bar = ProgressBar(use_bar=False, write=lines.append)
    bar.on_start({**INFO, "rounds": rounds, "start_round": start_round})
    for number in range(start_round, rounds + 1):
        for one in records:
            bar.on_record(one)
        bar.on_round(number, records, 1.0 * number)
    bar.on_end({})
    bar.close()
    return lines


def test_plain_lines() -> None:
    lines = run_plain(4)
    assert lines[0] == "demo: 4 rounds, 2 sites"
    assert len(lines) == 5
    assert lines[1].startswith("round 1/4  loss 2.0000  dice 0.500  left 0:00:00")
    assert lines[1].endswith("no valid answer from c")
    assert run_plain(4, start_round=3)[0] == "demo: 4 rounds, 2 sites, going on with round 3"


def test_long_runs_print_few_lines_and_always_the_last() -> None:
    lines = run_plain(401, records=[record("train", "a", train_loss=1.0)])
    assert len(lines) <= 45
    assert lines[-1].startswith("round 401/401")


def test_metric_stays_between_evaluations() -> None:
    lines: list[str] = []
    bar = ProgressBar(use_bar=False, write=lines.append)
    bar.on_start(INFO)
    bar.on_round(1, RECORDS, 1.0)
    bar.on_round(2, [record("train", "a", train_loss=0.5)], 2.0)
    assert "loss 0.5000  dice 0.500" in lines[-1]


def test_bar_draws_and_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    bar = ProgressBar(use_bar=True)
    bar.on_start({**INFO, "name": "demo [x]"})
    for one in RECORDS:
        bar.on_record({**one, "site": "[site]"})
    bar.on_round(1, RECORDS, 1.0)
    bar.on_end({})
    bar.close()
    text = screen.getvalue()
    assert "demo [x]" in text and "round 1/4" in text and "dice 0.500" in text
    assert "no valid answer from c" in text


def test_interactive_needs_a_terminal_outside_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    assert interactive()
    monkeypatch.setenv("CI", "true")
    assert not interactive()
    monkeypatch.delenv("CI")
    monkeypatch.setenv("TERM", "dumb")
    assert not interactive()


class FakeWandb(ModuleType):
    """Records what a tracker does; `broken` names the call that fails."""

    def __init__(self, broken: str = "") -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, Any]] = []
        self.broken = broken
        self.summary = SimpleNamespace(update=lambda values: self._call("summary", values))

    def _call(self, name: str, value: Any) -> Any:
        self.calls.append((name, value))
        if name == self.broken:
            raise SystemExit(1) if name == "finish" else RuntimeError("no disk")
        return self

    def init(self, **settings: Any) -> Any:
        """Stands for wandb.init."""
        return self._call("init", settings)

    def Settings(self, **settings: Any) -> dict[str, Any]:
        """Stands for wandb.Settings."""
        return settings

    def log(self, values: Any, step: int) -> None:
        """Stands for Run.log."""
        self._call("log", (step, values))

    def finish(self) -> None:
        """Stands for Run.finish."""
        self._call("finish", None)


def use_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path, broken: str = "", mode: str = "offline") -> FakeWandb:
    """Take a tracker through a whole run with a fake wandb."""
    fake = FakeWandb(broken)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = trackers.WandbTracker(tmp_path, "project", mode, {"seed": 1})
    tracker.on_start(INFO)
    tracker.on_round(1, RECORDS, 2.5)
    tracker.on_end({"main_metric": "dice", "mean": 0.5, "worst": float("nan"), "spread": None})
    tracker.close()
    return fake


def test_wandb_gets_scalars_and_headlines(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    calls = use_wandb(monkeypatch, tmp_path).calls
    assert [name for name, _ in calls] == ["init", "log", "summary", "finish"]
    assert calls[0][1]["mode"] == "offline" and calls[0][1]["dir"] == str(tmp_path)
    assert calls[1][1][0] == 1 and calls[1][1][1]["mean/train_loss"] == 2.0 and calls[1][1][1]["seconds"] == 2.5
    assert calls[2][1] == {"dice/mean": 0.5}


def test_wandb_mode_of_the_environment_wins(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert use_wandb(monkeypatch, tmp_path, mode="online").calls[0][1]["mode"] == "disabled"


@pytest.mark.parametrize("broken", ["init", "log", "summary", "finish"])
def test_wandb_never_fails_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path, broken: str, caplog) -> None:
    use_wandb(monkeypatch, tmp_path, broken)
    assert "wandb is off for this run" in caplog.text


def test_missing_wandb_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path, caplog) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = trackers.WandbTracker(tmp_path)
    tracker.on_start(INFO)
    tracker.on_round(1, RECORDS, 1.0)
    tracker.on_end({})
    assert "start failed" in caplog.text


def tracking_config(wandb: bool = False, tensorboard: bool = False) -> Any:
    """A configuration with trackers on or off."""
    from fedmed.config import from_tree

    return from_tree({"tracking": {"wandb": {"enabled": wandb}, "tensorboard": {"enabled": tensorboard}}})


def test_only_progress_by_default(tmp_path) -> None:
    assert [type(c) for c in build_callbacks(tracking_config(), tmp_path)] == [ProgressBar]
    assert build_callbacks(tracking_config(), tmp_path, quiet=True) == []
    every = build_callbacks(tracking_config(wandb=True), tmp_path)
    assert [type(c) for c in every] == [ProgressBar, trackers.WandbTracker]
    assert all(isinstance(c, Callback) for c in every)


def test_missing_tensorboard_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        build_callbacks(tracking_config(tensorboard=True), tmp_path)


def test_base_callback_does_nothing() -> None:
    callback = Callback()
    callback.on_start(INFO)
    callback.on_record(RECORDS[0])
    callback.on_round(1, RECORDS, 0.0)
    callback.on_end({})
    callback.close()


@pytest.mark.slow
def test_tensorboard_writes_scalars(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = trackers.TensorboardTracker(tmp_path)
    tracker.on_start(INFO)
    tracker.on_round(1, RECORDS, 2.0)
    tracker.on_end({"main_metric": "dice", "mean": 0.5, "rounds": 1})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("mean/train_loss")[0].value == 2.0
    assert events.Scalars("final/dice/mean")[0].value == 0.5


@pytest.mark.slow
def test_real_wandb_offline(tmp_path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracker = trackers.WandbTracker(tmp_path, config={"seed": 1})
    tracker.on_start(INFO)
    tracker.on_round(1, RECORDS, 2.0)
    tracker.on_end({"main_metric": "dice", "mean": 0.5})
    assert "wandb is off" not in caplog.text
    assert list((tmp_path / "wandb").glob("offline-run-*"))
