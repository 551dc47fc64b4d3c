"""Runs the cells of a plan, some at a time, each as the command that was printed; what is finished stays, what was begun goes on."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedmed.compare.children import Child, start_child
from fedmed.compare.identity import config_hash, first_difference
from fedmed.compare.plan import DEPLOYMENT, Cell, Plan
from fedmed.config import from_yaml
from fedmed.deployment.only_one import only_one
from fedmed.engines.signals import handled, leave
from fedmed.errors import UserError
from fedmed.report.run_folder import RAY_LOG, RunFolder

TICK_S = 0.2  # how soon the end of a run is seen
STOP_S = 15.0  # from Ctrl-C to SIGKILL
GO_ON = "the same command goes on: finished runs stay, those under way continue from their last checkpoint"
NEW, BEGUN, DONE = "new", "begun", "done"  # what a run folder holds

Start = Callable[[list[str], Path, dict[str, str]], Child]


@dataclass(frozen=True)
class Outcome:
    """How a run ended; `error` "" when it is done."""

    cell: Cell
    seconds: float
    error: str = ""


@dataclass
class Running:
    """A run under way. `begun`: it goes on from a checkpoint of an earlier command."""

    cell: Cell
    child: Child
    begun: bool
    started: float


class Watcher(Protocol):
    """Who shows what happens."""

    def started(self, run: Running) -> None:
        """A run has begun."""

    def tick(self, runs: Sequence[Running]) -> None:
        """Called several times a second with the runs under way."""

    def ended(self, outcome: Outcome) -> None:
        """A run is over."""


def state_of(folder: Path, cell: Cell) -> str:
    """What the folder of a run holds: nothing (`new`), this run unfinished (`begun`) or finished (`done`).

    Raises `UserError` for anything else; for a run with another configuration it names the first key that differs.
    """
    files = RunFolder(folder)
    held = [p.name for p in folder.iterdir() if p.name != RAY_LOG] if folder.is_dir() else []
    if not held and not folder.is_file():
        return NEW
    if not files.config.is_file():
        raise UserError(
            f"{folder} holds something that is no run ({', '.join(sorted(held)[:3])}); choose another --out"
        )
    try:
        stored = from_yaml(files.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"{files.config} cannot be read ({error}); choose another --out") from error
    if config_hash(stored) != cell.config_hash:
        raise UserError(
            f"{folder} holds a run with another configuration: {first_difference(stored, cell.config)}; "
            "change the command, or choose a fresh --out"
        )
    return DONE if files.summary.is_file() else BEGUN


def states(plan: Plan) -> dict[Cell, str]:
    """What the folders of all runs hold, see `state_of`."""
    return {cell: state_of(plan.out / cell.folder, cell) for cell in plan.cells}


def default_jobs(plan: Plan) -> int:
    """Runs at a time: one on a GPU, over real sites or on Ray (which takes all cores), else the cores this process may use over the threads of a run."""
    if plan.engine != "local":
        return 1
    devices = {cell.config.engine.device for cell in plan.cells}
    if any(device.startswith("cuda") for device in devices):
        return 1
    if "auto" in devices:
        import torch

        if torch.cuda.is_available():
            return 1
    threads = max(cell.config.engine.threads for cell in plan.cells)
    return max(1, num_cores() // threads)


def num_cores() -> int:
    """Cores this process may use."""
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Be the one `fedmed compare` of a folder, which is made. Raises `UserError` that names the other process."""

    def refusal(pid: str) -> UserError:
        return UserError(
            f"{out} is in use by another `fedmed compare`, process {pid}; wait for its end, or choose another --out"
        )

    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(only_one(out / ".lock", refusal))
        except OSError as error:
            raise UserError(f"--out {out}: cannot write there ({error.strerror}); choose another folder") from error
        yield


def run_cells(
    plan: Plan,
    todo: Sequence[tuple[Cell, bool]],
    jobs: int,
    watch: Watcher,
    done: Callable[[Outcome], None],
    start: Start = start_child,
) -> None:
    """Run cells in order, `jobs` at a time; `done` hears of each end, also of failures, which stop nobody else.

    todo: (cell, whether it was begun before). Whatever ends this early (Ctrl-C, SIGTERM, an error) ends the runs under way first: interrupt, and
    kill after `STOP_S`; a second Ctrl-C kills at once. Their folders keep the last checkpoint.
    """
    waiting, running = list(todo), list[Running]()
    asked = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    with handled(leave, *asked):
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(_start(plan, *waiting.pop(0), jobs, start))
                    watch.started(running[-1])
                time.sleep(TICK_S)
                watch.tick(running)
                for run in [r for r in running if r.child.poll() is not None]:
                    running.remove(run)
                    outcome = _outcome(plan, run)
                    watch.ended(outcome)
                    done(outcome)
        finally:
            _stop(running)


def _start(plan: Plan, cell: Cell, begun: bool, jobs: int, start: Start) -> Running:
    words = [*shlex.split(cell.command)[1:], *(["--resume"] if begun else [])]
    log = log_file(plan, cell)
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(cell.config.engine.threads)} if jobs > 1 else {}
    command = [sys.executable, "-m", "fedmed.cli.main", *words]
    return Running(cell, start(command, log, threads), begun, time.monotonic())


def log_file(plan: Plan, cell: Cell) -> Path:
    """What a run prints: beside its folder."""
    return plan.out / f"{cell.folder}.log"


def _outcome(plan: Plan, run: Running) -> Outcome:
    code, seconds = run.child.poll(), time.monotonic() - run.started
    if code == 0 and (plan.out / run.cell.folder / "summary.json").is_file():
        return Outcome(run.cell, seconds)
    return Outcome(run.cell, seconds, run.child.reason() or "it left no summary.json")


def _stop(running: Sequence[Running]) -> None:
    """End all runs; none is alive afterwards."""
    if not running:
        return
    try:
        for run in running:
            run.child.interrupt()
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline and any(run.child.poll() is None for run in running):
            time.sleep(TICK_S / 2)
    finally:  # also after a second Ctrl-C
        for run in running:
            run.child.kill()


def notes(plan: Plan) -> list[str]:
    """Remarks before anything is run: keys without effect over real sites."""
    if plan.engine != DEPLOYMENT:
        return []
    from fedmed.engines.deployment import ignored_keys

    keys = dict.fromkeys(key for cell in plan.cells for key in ignored_keys(cell.config, cell.words))
    where = f" ({', '.join(keys)})" if keys else ""
    return [
        f"note: every site reads the file that its own site.yaml names; what the comparison says of data files is without effect{where}"
    ]
