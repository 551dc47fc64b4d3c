"""Running a comparison with runs that only pretend: order, skipping, going on, refusals, failures, Ctrl-C; and real child processes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmed.compare import command, write
from fedmed.compare.children import start_child, telling_lines
from fedmed.compare.command import Request, check_data, compare
from fedmed.compare.follow import Clock, Tail
from fedmed.compare.plan import Plan
from fedmed.compare.run import BEGUN, DONE, NEW, Outcome, alone, default_jobs, notes, run_cells, state_of, states
from fedmed.compare.show import Lines, ending, watcher
from fedmed.config import to_yaml
from fedmed.errors import FedMedError, UserError

Make = Callable[..., Plan]
QUIET = Request(jobs=1, probe=False, quiet=True)
ALL = ["easy/plain-0", "easy/plain-1", "easy/prox-0", "easy/prox-1", "told/prox-0"]


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The page is not made here; gives the folders it was asked for."""
    asked: list[Path] = []

    def write_html(folder: Path, say: Any, data: str) -> Path:
        asked.append(folder)
        return folder / "index.html"

    monkeypatch.setattr(write, "write_html", write_html)
    return asked


def go(plan: Plan, runs: Any, request: Request = QUIET) -> tuple[list[str], list[str]]:
    """Run a comparison; gives what was said and noted."""
    said: list[str] = []
    noted: list[str] = []
    compare(plan, request, said.append, noted.append, runs)
    return said, noted


def stored(plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((plan.out / "comparison.json").read_text())
    return found


def store(plan: Plan, folder: str, *, summary: bool = False, checkpoint: bool = False) -> Path:
    """A run folder as an earlier command left it."""
    cell = next(cell for cell in plan.cells if cell.folder == folder)
    path = plan.out / folder
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(cell.config))
    if checkpoint:
        (path / "checkpoint").mkdir()
    if summary:
        (path / "summary.json").write_text('{"seconds": 9.0}')
        (path / "history.jsonl").write_text("")
    return path


def test_all_runs_and_what_they_leave(plan_of: Make, runs: Any, no_page: list[Path]) -> None:
    plan = plan_of()
    said, noted = go(plan, runs)
    assert runs.folders == ALL and runs.most == 1 and not noted
    first = runs.made[0]
    assert first.command[:4] == [sys.executable, "-m", "fedmed.cli.main", "run"] and "--resume" not in first.command
    assert first.environment == {}
    content = stored(plan)
    assert content["kind"] == "comparison" and content["seeds"] == [0, 1] and content["baseline"] == "plain"
    assert [c["state"] for c in content["cells"]] == ["done"] * 5 and content["cells"][0]["seconds"] == 1.5
    assert content["cells"][0]["command"] == plan.cells[0].command
    assert content["settings"][1] == {"name": "told", "title": "Told", "arms": ["plain", "prox"], "against": "easy"}
    means = {(r["setting"], r["arm"]): r["mean"] for r in content["results"] if r["metric"] == "bacc"}
    assert means == {
        ("easy", "plain"): 0.5625,
        ("easy", "prox"): 0.6875,
        ("told", "plain"): 0.5,
        ("told", "prox"): 0.625,
    }
    assert {"tables.md", "tables.tex", "table.csv", "cells.csv"} < {p.name for p in plan.out.iterdir()}
    assert plan.cells[1].config_hash in (plan.out / "cells.csv").read_text()
    assert no_page == [plan.out] and said[-1] == f"page: {plan.out / 'index.html'}" and "prox" in said[0]


def test_finished_runs_are_skipped_and_begun_ones_go_on(plan_of: Make, runs: Any) -> None:
    plan = plan_of()
    store(plan, "easy/plain-0", summary=True, checkpoint=True)
    store(plan, "easy/plain-1", checkpoint=True)
    store(plan, "easy/prox-0")
    (plan.out / "easy" / "prox-1").mkdir()
    (plan.out / "easy" / "prox-1" / "ray.log").touch()
    assert list(states(plan).values()) == [DONE, BEGUN, BEGUN, NEW, NEW]
    go(plan, runs)
    assert runs.folders == ALL[1:]
    assert ["--resume" in run.command for run in runs.made] == [True, True, False, False]
    go(plan, runs)
    assert len(runs.made) == 4  # nothing is left


def test_other_configurations_are_refused(plan_of: Make, runs: Any) -> None:
    go(plan_of(), runs)
    before = {p: p.stat().st_mtime_ns for p in plan_of().out.rglob("*") if p.is_file()}
    with pytest.raises(
        UserError, match=r"easy/plain-0 holds a run .*: federation.quorum is 0.5 there and 0.25 now; .*fresh --out"
    ):
        go(plan_of("federation.quorum=0.25"), runs)
    with pytest.raises(UserError, match="variant small; choose another --out for mine, variant full"):
        go(plan_of(variant="full"), runs)
    assert len(runs.made) == 5 and before == {p: p.stat().st_mtime_ns for p in before}
    go(plan_of("engine.threads=2"), runs)  # results do not depend on it
    assert len(runs.made) == 5


def test_folders_that_are_no_runs_are_refused(plan_of: Make, runs: Any) -> None:
    plan = plan_of()
    cell, folder = plan.cells[0], plan.out / "easy" / "plain-0"
    assert state_of(folder, cell) == NEW
    folder.mkdir(parents=True)
    (folder / "photo.png").touch()
    with pytest.raises(UserError, match="something that is no run"):
        go(plan, runs)
    (folder / "config.yaml").write_text("optimizer: {lrr: 1}")
    with pytest.raises(UserError, match="cannot be read"):
        go(plan, runs)
    assert runs.made == [] and not (plan.out / "comparison.json").exists()


def test_another_content_of_the_data_is_refused(
    plan_of: Make, runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "check_data", lambda plan: None)
    data = tmp_path / "sites.h5"
    data.write_bytes(b"one")
    go(plan_of(data=str(data)), runs)
    (tmp_path / "moved").mkdir()
    go(plan_of(data=str(data.rename(tmp_path / "moved" / "sites.h5"))), runs)  # the same file in another place
    assert len(runs.made) == 5
    data.write_bytes(b"another")
    with pytest.raises(UserError, match=r"made with another content of sites.h5"):
        go(plan_of(data=str(data)), runs)


def test_a_failed_run_stops_nobody_else(plan_of: Make, runs: Any) -> None:
    plan = plan_of()
    runs.failing = {"easy/prox-0"}
    with pytest.raises(FedMedError, match="1 of 5 runs failed") as error:
        go(plan, runs)
    assert not isinstance(error.value, UserError)  # exit code 3
    assert runs.folders == ALL
    content = stored(plan)
    assert [c["state"] for c in content["cells"]] == ["done", "done", "failed", "done", "done"]
    assert content["cells"][2]["error"] == "it ended with exit code 3\nerror: 1 of 2 sites answered"
    prox = next(r for r in content["results"] if (r["setting"], r["arm"], r["metric"]) == ("easy", "prox", "bacc"))
    assert prox["values"] == {"0": None, "1": 0.75}
    assert (plan.out / "tables.md").is_file()
    go(plan, runs, Request(only=("told",), jobs=1, probe=False, quiet=True))
    assert stored(plan)["cells"][2]["state"] == "failed"  # still known
    runs.failing = set()
    go(plan, runs)
    assert runs.folders[5:] == ["easy/prox-0"] and "--resume" in runs.made[-1].command
    assert stored(plan)["cells"][2] | {"seconds": 0} == stored(plan)["cells"][2] | {
        "seconds": 0,
        "error": None,
        "state": "done",
    }


def test_several_at_a_time(plan_of: Make, runs: Any) -> None:
    go(plan_of("engine.threads=3"), runs, Request(jobs=3, probe=False, quiet=True))
    assert runs.most == 3 and runs.folders == ALL
    assert runs.made[0].environment == {"OMP_NUM_THREADS": "3"}
    with pytest.raises(UserError, match="--jobs"):
        go(plan_of(), runs, Request(jobs=0))


def test_parts_of_a_comparison_come_together(plan_of: Make, runs: Any) -> None:
    plan = plan_of()
    go(plan, runs, Request(only=("told",), jobs=1, probe=False, quiet=True))
    assert runs.folders == ["easy/plain-0", "told/prox-0"]
    assert [s["name"] for s in stored(plan)["settings"]] == ["told"]
    go(plan, runs, Request(only=("easy",), arms=("prox",), jobs=1, probe=False, quiet=True))
    assert runs.folders[2:] == ["easy/prox-0", "easy/prox-1"]
    assert [s["name"] for s in stored(plan)["settings"]] == ["easy", "told"]
    assert len(stored(plan)["cells"]) == 4


def test_stopping_ends_the_runs_under_way(plan_of: Make, runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of()
    runs.polls = 10**6
    todo = [(cell, False) for cell in plan.cells]

    class Watch(Lines):
        def tick(self, under_way: Any) -> None:
            assert len(under_way) == 2
            raise KeyboardInterrupt

    plan.out.mkdir()
    watch = Watch(plan, [cell.key for cell in plan.cells], {}, lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        run_cells(plan, todo, 2, watch, lambda outcome: None, runs)
    assert [run.signals for run in runs.made] == [["interrupt", "kill"]] * 2


def test_a_second_interrupt_kills_at_once(plan_of: Make, runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of()
    plan.out.mkdir()
    runs.polls = 10**6
    watch = Lines(plan, [cell.key for cell in plan.cells], {}, lambda line: None)
    times = iter(range(100))

    def sleep(seconds: float) -> None:
        if next(times) in (1, 2):
            raise KeyboardInterrupt

    def poll(self: Any) -> int | None:
        return -9 if "kill" in self.signals else None

    monkeypatch.setattr("fedmed.compare.run.time.sleep", sleep)
    monkeypatch.setattr(
        runs(["x", "run", "fedavg", "--out", str(plan.out / "a" / "b")], Path(), {}).__class__, "poll", poll
    )
    with pytest.raises(KeyboardInterrupt):
        run_cells(plan, [(plan.cells[0], False)], 1, watch, lambda outcome: None, runs)
    assert runs.made[-1].signals == ["interrupt", "kill"]


def test_two_commands_exclude_each_other(plan_of: Make, runs: Any) -> None:
    plan = plan_of()
    with alone(plan.out), pytest.raises(UserError, match=f"in use by another `fedmed compare`, process {os.getpid()}"):
        go(plan, runs)
    assert runs.made == []
    plan.out.joinpath(".lock").unlink()
    plan.out.rmdir()
    plan.out.touch()
    with pytest.raises(UserError, match="cannot write there"):
        go(plan, runs)


def test_a_dry_run_writes_nothing(plan_of: Make, runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedmed.compare.cost import Cost

    asked: list[str] = []

    def measure_all(cells: Any, jobs: int, say: Any) -> list[Cost]:
        asked.extend(cell.folder for cell in cells)
        return [Cost(c.setting, c.arm, c.config_hash, sites=2, rounds=3, rounds_seen=3, seconds=60.0) for c in cells]

    monkeypatch.setattr("fedmed.compare.measuring.measure_all", measure_all)
    plan = plan_of()
    said, _ = go(plan, runs, Request(jobs=2, dry_run=True))
    assert not plan.out.exists() and runs.made == []
    assert asked == ["easy/plain-0", "easy/prox-0", "told/prox-0"]
    assert [line for line in said if line.startswith("fedmed run")] == [cell.command for cell in plan.cells]
    assert "5 runs, 2 at a time: about 3:00" in said[-1]
    go(plan, runs, Request(jobs=1, quiet=True))
    assert [c["seconds"] for c in stored(plan)["cost"]] == [60.0] * 3
    (plan.out / "easy" / "plain-1" / "summary.json").unlink()
    del asked[:]
    go(plan, runs, Request(jobs=1, quiet=True))
    assert asked == []  # known from before


def test_tables_only(plan_of: Make, runs: Any) -> None:
    plan = plan_of()
    tables = Request(tables_only=True, quiet=True, jobs=1)
    with pytest.raises(UserError, match="no finished run"):
        go(plan, runs, tables)
    go(plan, runs)
    first = stored(plan)
    for name in ("comparison.json", "tables.md", "cells.csv"):
        (plan.out / name).unlink()
    go(plan, runs, tables)
    assert stored(plan) == first and len(runs.made) == 5 and (plan.out / "tables.md").is_file()


def test_data_of_another_task(plan_of: Make) -> None:
    check_data(plan_of())
    with pytest.raises(UserError, match="task classification; phantom:multimodal has the task segmentation"):
        check_data(plan_of(data="phantom:multimodal"))
    with pytest.raises(UserError, match=r"nowhere\.h5"):
        check_data(plan_of(data="nowhere.h5"))


def test_over_real_sites(file: Path, runs: Any, tmp_path: Path, plan_of: Make) -> None:
    from fedmed.deployment.coordinator_folder import CoordinatorFolder

    place = tmp_path / "fl"
    CoordinatorFolder.create(place, ["localhost"])
    plan = plan_of(engine="deployment", coordinator=str(place), out=None)
    assert plan.out == place / "runs" / "compare" / "mine-small" and plan.data == ""
    assert "data.path" not in plan.cells[0].command
    assert f"--engine deployment --coordinator {place} --out" in plan.cells[0].command
    assert default_jobs(plan) == 1 and "without effect (data.phantom)" in notes(plan)[0]
    _, noted = go(plan, runs, Request(jobs=4))  # nothing is measured either
    assert runs.most == 1 and any("one run at a time" in line for line in noted)


def test_jobs_by_default(plan_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmed.compare.run.num_cores", lambda: 8)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert default_jobs(plan_of()) == 8 and default_jobs(plan_of("engine.threads=3")) == 2
    assert default_jobs(plan_of("engine.threads=16")) == 1
    assert default_jobs(plan_of("engine.device=cuda:1")) == default_jobs(plan_of(engine="ray")) == 1
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert default_jobs(plan_of()) == 1 and default_jobs(plan_of("engine.device=cpu")) == 8


# ---------------------------------------------------------------------- what is shown


def line(number: int, value: float | None = None) -> str:
    metrics = {} if value is None else {"test/global/bacc": value}
    return json.dumps({"round": number, "phase": "central", "site": None, "metrics": metrics}) + "\n"


def test_following_a_history(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    tail = Tail(path, ["S:bacc"])
    assert (tail.round, tail.text) == (0, "")
    path.write_text(line(1, 0.5) + line(2)[:10])
    tail.look()
    assert (tail.round, tail.text) == (1, "bacc 0.500")
    path.write_text(line(1, 0.5) + line(2) + line(3) + line(4))
    tail.look()
    assert (tail.round, tail.text) == (4, "bacc 0.500")  # the last one known
    path.write_text(line(1, 0.25))  # resumed from the checkpoint of round 1
    tail.look()
    assert (tail.round, tail.text) == (1, "bacc 0.250")


def test_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("fedmed.compare.follow.time.monotonic", lambda: now[0])
    a, b = ("s", "a", 0), ("s", "b", 0)
    clock = Clock({a: 10.0, b: 30.0}, {a: 4, b: 4})
    clock.begin(a, 0)
    assert clock.left != clock.left  # NaN: nothing is done
    now[0] = 105.0
    clock.at(a, 2)
    assert clock.left == 35.0  # 5 of 40 took 5 s
    clock.over(a)
    clock.begin(b, 2)  # half of it was done before
    assert clock.left == 7.5  # 10 took 5 s, 15 are left


def test_lines_of_a_run(plan_of: Make, runs: Any) -> None:
    plan = plan_of()
    store(plan, "easy/plain-0", checkpoint=True).joinpath("history.jsonl").write_text(line(2, 0.25))
    runs.failing = {"easy/plain-1"}
    lines: list[str] = []
    keys = [cell.key for cell in plan.cells[:2]]
    watch = watcher(plan, keys, {}, False, lines.append)
    run_cells(plan, [(plan.cells[0], True), (plan.cells[1], False)], 1, watch, lambda outcome: None, runs)
    assert lines[0] == "started easy plain seed 0: 3 rounds, going on after round 2"
    assert lines[1].startswith("1/2 easy plain seed 0: ") and "bacc 0.500" in lines[1]
    assert lines[2] == "started easy plain seed 1: 3 rounds"
    assert lines[3].startswith("2/2 easy plain seed 1 failed after ") and lines[3].endswith(
        "\n  error: 1 of 2 sites answered"
    )
    lines.clear()
    watch = watcher(plan, keys, {}, True, lines.append)
    run_cells(plan, [(plan.cells[1], True)], 1, watch, lambda outcome: None, runs)
    assert len(lines) == 1 and "failed after" in lines[0]


def test_bars_on_a_terminal(plan_of: Make, runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from fedmed.compare.show import Bars

    plan = plan_of()
    plan.out.mkdir()
    watch = Bars(plan, [cell.key for cell in plan.cells], {})
    run_cells(plan, [(cell, False) for cell in plan.cells], 2, watch, lambda outcome: None, runs)
    watch.close()
    watch.close()
    shown = capsys.readouterr().err
    assert "5/5 told prox seed 0" in shown and "5/5" in shown.splitlines()[-1]


def test_ending_without_a_metric(plan_of: Make) -> None:
    outcome = Outcome(plan_of().cells[0], 75.0)
    assert ending(outcome, "", 1, 4) == "1/4 easy plain seed 0: 1:15"
    assert ending(outcome, "bacc 0.500", 1, 4, 30.0) == "1/4 easy plain seed 0: 1:15  bacc 0.500  left 30.0 s"


# ---------------------------------------------------------------------- real processes


def wait(child: Any) -> int:
    deadline = time.monotonic() + 30
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    code = child.poll()
    assert code is not None
    return int(code)


def test_a_child_and_its_output(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['X']); print('error: no data\\nlook there', file=sys.stderr); sys.exit(2)"
    child = start_child([sys.executable, "-c", code], tmp_path / "log", {"X": "seen"})
    assert wait(child) == 2
    assert "seen" in (tmp_path / "log").read_text()
    assert child.reason() == "it ended with exit code 2\nerror: no data\nlook there"
    assert (tmp_path / "log").stat().st_mode & 0o077 == 0


def test_a_child_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    child = start_child([sys.executable, "-c", code], tmp_path / "log", {})
    deadline = time.monotonic() + 30
    while "up" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.interrupt()
    time.sleep(0.1)
    assert child.poll() is None
    child.kill()
    assert child.poll() == -9 and "was killed" in child.reason() and "up" not in child.reason()
    child.kill()  # does no harm


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("", []),
        ("round 1\nround 2\nround 3\nround 4\n", ["round 2", "round 3", "round 4"]),
        ("error: old\nround 1\nerror: new\ngo on with:\n  x\n", ["error: new", "go on with:", "  x"]),
        ("internal error: KeyError\n" + "a\n" * 9, ["internal error: KeyError", "a", "a", "a", "a"]),
    ],
)
def test_telling_lines(log: str, said: list[str]) -> None:
    assert telling_lines(log.splitlines()) == said
