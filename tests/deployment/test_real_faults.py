"""Real processes that are killed, stopped, late or wrong: the round goes on, the run goes on, and who failed is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from loopback import ROOT, Loopback, loopback, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(600)]

# A method with a model of each site's own, so that lost personal state would show.
DITTO = (
    "data.path=''", "training.epochs=1", "training.batch_size=8", "evaluation.mode=before", "optimizer.persist=true", "federation.min_sites=3",
)  # fmt: skip


def records(out: Path, **wanted: Any) -> list[dict[str, Any]]:
    """Records of a run's history with these values."""
    path = out / "history.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [r for r in found if all(r.get(key) == value for key, value in wanted.items())]


def model(out: Path) -> bytes:
    """The file of the final model."""
    return (out / "model.safetensors").read_bytes()


def reached(out: Path, round_number: int) -> bool:
    """Whether a round has been trained by all sites."""
    return len(records(out, round=round_number, phase="train")) >= 3


def test_a_site_that_is_killed_comes_back_with_its_personal_state(federation: Loopback, tmp_path: Path) -> None:
    sites = federation.start_all()
    out = tmp_path / "run"
    run = federation.begin_run(out, "ditto", *DITTO, "federation.rounds=8", "federation.quorum=0.5")
    wait_until(lambda: reached(out, 2), "round 2")
    sites["beta"].kill()  # its SuperNode and executor end with it
    wait_until(lambda: bool(records(out, phase="train", site="beta", status="failed")), "the failure of beta", 150)
    federation.start_site("beta")
    assert run.wait() == 0, run.text
    failed = {r["round"] for r in records(out, phase="train", site="beta") if r["status"] != "ok"}
    ok = {r["round"] for r in records(out, phase="train", site="beta", status="ok")}
    assert failed and max(ok) > max(failed), (failed, ok)
    others = {(r["site"], r["round"]) for r in records(out, phase="train", status="ok") if r["site"] != "beta"}
    assert len(others) == 16  # the others worked in all rounds
    back = [r for r in records(out, phase="train", site="beta", status="ok") if r["round"] > max(failed)]
    assert not any(r["metrics"].get("personal_fresh") for r in back), "the site began its personal state anew"


def test_whatever_of_the_coordinator_is_killed_the_model_is_the_same(federation: Loopback, tmp_path: Path) -> None:
    federation.start_all()
    settings = (*DITTO, "federation.rounds=4")
    whole = tmp_path / "whole"
    federation.run(whole, "ditto", *settings)
    coordinator = next(p for p in federation.processes if p.words[0] == "coordinator")

    out = tmp_path / "without-superlink-for-a-while"
    run = federation.begin_run(out, "ditto", *settings)
    wait_until(lambda: reached(out, 2), "round 2")
    (superlink,) = coordinator.children("fedmed.deployment.superlink")
    os.kill(superlink, signal.SIGKILL)
    if run.wait() != 0:  # a message that was on its way may be lost with it; the checkpoint is not
        assert "--resume" in run.text, run.text
        federation.run(out, "ditto", *settings, resume=True)
    assert model(out) == model(whole)

    out = tmp_path / "everything-killed"
    run = federation.begin_run(out, "ditto", *settings)
    wait_until(lambda: reached(out, 2), "round 2")
    run.kill()
    coordinator.kill()
    federation.start_coordinator()
    federation.run(out, "ditto", *settings, resume=True)
    assert model(out) == model(whole)


def test_a_late_site_and_one_that_sends_nan_are_named_and_dropped(tmp_path: Path, small_sites: dict[str, Path]) -> None:
    import h5py

    files = {name: Path(shutil.copy(path, tmp_path)) for name, path in small_sites.items()}
    with h5py.File(files["gamma"], "a") as broken:  # finite pixels, so large that training diverges
        images = broken["image"][...].astype("float32") * 1e30
        del broken["image"]
        broken["image"] = images
    with loopback(tmp_path / "federation", files) as federation:
        sites = federation.start_all()
        out = tmp_path / "run"
        settings = ("data.path=''", "training.epochs=1", "federation.rounds=3", "evaluation.sites=false")
        late = ("federation.train_deadline_s=12", "federation.quorum=0.3", "federation.min_sites=3")
        run = federation.begin_run(out, "fedavg", *settings, *late)
        run_started = lambda: bool(records(out, phase="train"))  # noqa: E731
        wait_until(run_started, "the first answer")
        (executor,) = sites["beta"].children("fedmed.deployment.executor")
        os.kill(executor, signal.SIGSTOP)
        try:
            assert run.wait() == 0, run.text
        finally:
            os.kill(executor, signal.SIGCONT)
        reasons = {r["site"]: r["reason"] for r in records(out, phase="train") if r["status"] != "ok"}
        assert "no answer within 12 s" in reasons["beta"]
        assert "NaN" in reasons["gamma"]
        assert len(records(out, phase="train", site="alpha", status="ok")) == 3


def test_other_code_and_another_schema_are_refused_at_the_start_by_name(
    tmp_path: Path, small_sites: dict[str, Path]
) -> None:
    import h5py

    other = tmp_path / "other-version"
    for package in ("fedmed", "strategies", "clients", "experiments", "data_prep"):
        shutil.copytree(ROOT / package, other / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "clients" / "supervised.py").open("a") as file:
        file.write("# a later version\n")
    files = {name: Path(shutil.copy(path, tmp_path)) for name, path in small_sites.items()}
    with h5py.File(files["gamma"], "a") as changed:
        classes = json.loads(changed.attrs["classes"])
        changed.attrs["classes"] = json.dumps([f"other {c}" for c in classes])
    with loopback(tmp_path / "federation", files) as federation:
        federation.init()
        federation.start_coordinator()
        for name in files:
            federation.make_site(name)
        federation.start_site("alpha")
        federation.start_site("beta", env={"PYTHONPATH": str(other)})
        federation.start_site("gamma")
        settings = ("data.path=''", "federation.rounds=2", "federation.start_deadline_s=25", "federation.min_sites=3")
        run = federation.run(tmp_path / "run", "fedavg", *settings, code=3)
        assert "beta" in run.text and "code" in run.text
        assert "classes" in run.text and "gamma" in run.text
        assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.fixture(autouse=True)
def _on_linux() -> None:
    """Killing and stopping are tried where processes end with the one that started them."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux")
