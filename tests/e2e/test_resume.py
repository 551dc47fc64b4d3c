"""Stopped and resumed is the same as never stopped: model to the bit, history but for the times."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedmed.config import from_yaml, to_yaml
from fedmed.errors import UserError
from fedmed.federation.checkpoint import CheckpointStore
from fedmed.report.run_folder import prepare

SMALL = {"num_sites": 4, "images_per_site": 20, "image_size": 16}
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"evaluation.select": "bacc"},
    "fedadam": {"strategy.name": "fedadam", "strategy.args": {"lr": 0.01}, "evaluation.mode": "before"},
    "fedavgm": {"strategy.name": "fedavgm", "federation.fraction": 0.5, "data.phantom": SMALL},
    "fedbn": {"client.name": "local_norm", "evaluation.mode": "after"},
    "persist": {"optimizer.persist": True, "federation.checkpoint_every": 2},
    "fednoro": {
        "strategy.name": "fednoro", "client.name": "fednoro", "federation.rounds": 4, "data.phantom": SMALL,
        "strategy.args": {"warmup_rounds": 2, "ramp_begin": 2, "ramp_end": 3, "num_votes": 3},
    },
}  # fmt: skip
FEDA3I = {"strategy.name": "feda3i", "client.name": "feda3i", "strategy.args": {"warmup_rounds": 1}}


def check_resume(lab: Any, **settings: Any) -> None:
    """A run stopped after every round leaves what one run leaves."""
    whole, summary = lab.run(**settings)
    rounds = summary["rounds"]
    parts = lab.new()
    for number in range(1, rounds + 1):
        lab.stopped(parts, number, resume=number > 1, **settings)
    _, again = lab.run(
        parts, options={"resume": True}, **settings
    )  # stopped after the last round: only the end is left
    assert lab.model(whole) == lab.model(parts)
    assert lab.history(whole) == lab.history(parts)
    for key in ("mean", "sites", "notes", "rounds", "central", "noisy_sites"):
        assert repr(summary[key]) == repr(again[key])  # NaN is not equal to itself
    selected = "model-selected.safetensors"
    assert (whole / selected).exists() == (parts / selected).exists() == ("evaluation.select" in settings)
    if (whole / selected).exists():
        assert (whole / selected).read_bytes() == (parts / selected).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_stopped_after_every_round(lab: Any, method: str) -> None:
    check_resume(lab, **METHODS[method])


def test_stopped_after_every_round_feda3i(lab: Any) -> None:
    check_resume(lab, **lab.segmentation, **FEDA3I)


def test_more_rounds_than_planned_at_first(lab: Any) -> None:
    whole, _ = lab.run(**{"federation.rounds": 3})
    parts, _ = lab.run(**{"federation.rounds": 1})
    lab.run(parts, options={"resume": True}, **{"federation.rounds": 3})
    assert lab.model(whole) == lab.model(parts) and lab.history(whole) == lab.history(parts)


def test_interrupted_in_the_middle_of_a_round(lab: Any) -> None:
    """Ctrl-C while the second site trains: the round in flight is lost, the rounds before are not."""
    settings = {"client.name": "local_norm", "optimizer.persist": True, "federation.checkpoint_every": 3}
    whole, _ = lab.run(**settings)

    def interrupt(call: Any) -> None:
        call()  # it has trained, and kept what it keeps
        raise KeyboardInterrupt

    parts = lab.new()
    with pytest.raises(KeyboardInterrupt):
        lab.run(parts, options={"intercept": lab.fault(interrupt, 3)}, **settings)
    assert CheckpointStore(parts / "checkpoint").rounds() == [2]  # written on the way out, though not due yet
    lab.run(parts, options={"resume": True}, **settings)
    assert lab.model(whole) == lab.model(parts) and lab.history(whole) == lab.history(parts)


def test_a_rule_that_fails_in_evaluation_loses_the_whole_round(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model and moments of the server must be of the same round in the checkpoint that is left."""
    settings = {"strategy.name": "fedadam", "strategy.args": {"lr": 0.01}}
    whole, _ = lab.run(**settings)
    from fedmed.federation import rounds

    original = rounds.RoundLoop._evaluate

    def fail(loop: Any, number: int, last: bool) -> None:
        if number == 2:
            raise RuntimeError("disk full")
        original(loop, number, last)

    monkeypatch.setattr(rounds.RoundLoop, "_evaluate", fail)
    parts = lab.new()
    with pytest.raises(RuntimeError, match="disk full"):
        lab.run(parts, **settings)
    monkeypatch.undo()
    assert CheckpointStore(parts / "checkpoint").rounds() == [1]
    lab.run(parts, options={"resume": True}, **settings)
    assert lab.model(whole) == lab.model(parts) and lab.history(whole) == lab.history(parts)


KILLED = """
import os, signal, sys
from pathlib import Path
from fedmed.config import from_yaml
from fedmed.engines import run

def intercept(message, call):
    reply = call()
    if message.metadata.message_type == "train" and message.metadata.group_id == "4" and message.metadata.dst_node_id == 1001:
        os.kill(os.getpid(), signal.SIGKILL)
    return reply

run(from_yaml(Path(sys.argv[1]).read_text()), intercept=intercept)
"""


def test_killed_in_the_middle_of_a_round(lab: Any, tmp_path: Path) -> None:
    """SIGKILL in round 4 with a checkpoint every second round: resumed from round 2, personal states included."""
    settings = {
        "client.name": "local_norm", "optimizer.persist": True, "federation.checkpoint_every": 2, "federation.rounds": 5,
        "evaluation.every": 5,
    }  # fmt: skip
    parts = lab.new()
    (tmp_path / "config.yaml").write_text(to_yaml(lab.config(parts, **settings)))
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    died = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "config.yaml")], env=environment, capture_output=True
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()[-2000:]
    assert CheckpointStore(parts / "checkpoint").rounds() == [2]
    assert [r["round"] for r in lab.history(parts, phase="train")] == [n for n in (1, 2, 3) for _ in range(3)]
    whole, _ = lab.run(**settings)
    lab.run(parts, options={"resume": True}, **settings)
    assert lab.model(whole) == lab.model(parts)
    assert lab.history(whole) == lab.history(parts)


def test_a_killed_first_round_leaves_nothing_behind(lab: Any) -> None:
    """No checkpoint yet: resuming begins anew, and the records of the first attempt do not count twice."""
    whole, _ = lab.run()
    parts = lab.new()
    with pytest.raises(KeyboardInterrupt):
        lab.run(parts, options={"callbacks": [Impatient()]})
    assert lab.history(parts)
    lab.run(parts, options={"resume": True})
    assert lab.model(whole) == lab.model(parts) and lab.history(whole) == lab.history(parts)


class Impatient:
    """Interrupts while the first round is evaluated."""

    def on_start(self, info: Any) -> None:
        """Nothing."""

    def on_record(self, record: Any) -> None:
        """Interrupt."""
        if record["phase"] == "evaluate":
            raise KeyboardInterrupt


# ---------------------------------------------------------------------- what is refused


def test_resume_with_another_configuration_is_refused_and_changes_nothing(lab: Any) -> None:
    out = lab.new()
    lab.stopped(out, 1)
    before = {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    for change in (
        {"optimizer.lr": 0.5},
        {"seed": 1},
        {"strategy.name": "fedadam"},
        {"model.args": {"widths": [4, 8]}},
    ):
        with pytest.raises(UserError, match=r"another configuration .* resume with the config\.yaml"):
            lab.run(out, options={"resume": True}, **change)
    assert {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()} == before
    config = from_yaml((out / "config.yaml").read_text())
    assert config.optimizer.lr == 0.01


def test_what_does_not_change_results_may_change(lab: Any) -> None:
    whole, _ = lab.run()
    out = lab.new()
    lab.stopped(out, 1)
    lab.run(out, options={"resume": True}, name="other", **{"federation.train_deadline_s": 99.0})
    assert lab.model(whole) == lab.model(out)


def test_a_damaged_checkpoint_can_be_removed(lab: Any) -> None:
    whole, _ = lab.run()
    out = lab.new()
    lab.stopped(out, 2)
    newest = out / "checkpoint" / "round-00002"
    (newest / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="remove this folder to go on from the one before"):
        lab.run(out, options={"resume": True})
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    lab.run(out, options={"resume": True})
    assert lab.model(whole) == lab.model(out) and lab.history(whole) == lab.history(out)


def test_the_folder_of_an_earlier_run_is_not_run_over(lab: Any) -> None:
    out, _ = lab.run(**{"federation.rounds": 1})
    with pytest.raises(UserError, match="holds a run that reached round 1; resume it"):
        lab.run(out, **{"federation.rounds": 1})
    with pytest.raises(UserError, match=r"is not empty .* add --resume"):
        prepare(out)
    assert prepare(out, resume=True).path == out
    with pytest.raises(UserError, match="nothing to go on with"):
        prepare(lab.new(), resume=True)
