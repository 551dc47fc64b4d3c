"""What `fedmed compare` does, from a plan to its tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmed.compare import write
from fedmed.compare.plan import DEPLOYMENT, Cell, Key, Plan
from fedmed.compare.run import BEGUN, DONE, NEW, Outcome, Start, alone, default_jobs, notes, run_cells, states
from fedmed.compare.show import watcher
from fedmed.config import nearest
from fedmed.errors import FedMedError, UserError

_TASK_OF_PHANTOM = {"multimodal": "segmentation"}  # the other kinds are named like their task
_STATE_WORDS = {NEW: "to run", BEGUN: "to go on with", DONE: "finished"}


@dataclass(frozen=True)
class Request:
    """What to do with a plan."""

    only: tuple[str, ...] = ()  # settings; none: all
    arms: tuple[str, ...] = ()
    jobs: int | None = None  # runs at a time; None: see `default_jobs`
    dry_run: bool = False
    probe: bool = True
    tables_only: bool = False
    quiet: bool = False


def compare(
    plan: Plan,
    request: Request,
    say: Callable[[str], None],
    note: Callable[[str], None],
    start: Start | None = None,
) -> None:
    """Estimate, run, tabulate. `say` takes the result (stdout), `note` what happens (stderr); `start` another way to start runs (tests).

    Raises `UserError` before anything is run or written, and `FedMedError` at the end when runs have failed.
    """
    selected = plan.select(request.only, request.arms)
    if not request.tables_only:
        check_data(plan)
    earlier, found = write.previous(plan), states(plan)
    jobs = _jobs(plan, request.jobs, note)
    for line in [] if request.quiet else notes(plan):
        note(line)
    if request.dry_run:
        _dry_run(plan, selected, found, earlier, jobs, request, say, note)
        return
    with alone(plan.out):
        earlier, found = write.previous(plan), states(plan)  # another command may have ended meanwhile
        shown = plan.restricted({c.key for c, state in found.items() if c.key in selected or state != NEW})
        failed: dict[Key, str] = {}
        costs: list[Any] = []
        if request.tables_only:
            if DONE not in found.values():
                raise UserError(f"{plan.out} has no finished run of this comparison; leave --tables-only out to run it")
        else:
            todo = [(cell, found[cell] == BEGUN) for cell in plan.cells if cell.key in selected and found[cell] != DONE]
            again = {cell.key for cell, _ in todo}
            kept = [c for c in earlier.get("cells", []) if (c["setting"], c["arm"], c["seed"]) not in again]
            earlier = {**earlier, "cells": kept}  # a failure that is tried again is none
            costs = _run(shown, todo, jobs, request, earlier, failed, note, start)
        content = write.comparison(shown, earlier, failed, costs)
        write.write_comparison(shown, content)
        _finish(shown, content, request.quiet, say, note)
    if failed:
        raise FedMedError(
            f"{len(failed)} of {len(todo)} runs failed; the tables show what there is. "
            f"Their output lies beside their folders as *.log; the same command tries them again"
        )


def _jobs(plan: Plan, wanted: int | None, note: Callable[[str], None]) -> int:
    if wanted is not None and wanted < 1:
        raise UserError(f"--jobs: expected a number >= 1, got {wanted}")
    if plan.engine == DEPLOYMENT and wanted not in (None, 1):
        note("note: over real sites there is one run at a time; --jobs is without effect")
        return 1
    return default_jobs(plan) if wanted is None else wanted


def check_data(plan: Plan) -> None:
    """Refuse data that are not there or of another task than the comparison is for. Raises `UserError`."""
    if plan.engine == DEPLOYMENT:
        return
    wanted = plan.task.split()[0] if plan.task else ""
    if plan.data.startswith("phantom:"):
        from fedmed.data.phantom import PHANTOM_KINDS

        kind = plan.data.removeprefix("phantom:")
        if kind not in PHANTOM_KINDS:
            raise UserError(f"no phantom {kind!r}{nearest(kind, PHANTOM_KINDS)}")
        task = _TASK_OF_PHANTOM.get(kind, kind)
    else:
        from fedmed.data.site_file import SiteFile

        with SiteFile.open(plan.data) as file:
            task = file.task
    if wanted and task != wanted:
        raise UserError(
            f"{plan.name} is for data of the task {plan.task}; {plan.data} has the task {task}; choose other --data"
        )


# ---------------------------------------------------------------------- before the runs


def plan_text(plan: Plan, selected: set[Key], found: Mapping[Cell, str], jobs: int) -> str:
    """What will be run: a line per setting and arm with the number of runs in each state."""
    from fedmed.report.tables import text_table

    rows = []
    for setting in plan.settings:
        for arm in setting.arms:
            runs = [c for c in plan.cells if (c.setting, c.arm) == (setting.name, arm) and c.key in selected]
            if not runs:
                continue
            counts = [sum(found[c] == state for c in runs) for state in _STATE_WORDS]
            rows.append([f"{setting.name} {arm}", *(str(n) if n else "-" for n in counts)])
    data = f"data {plan.data}" if plan.data else "data of the sites"
    head = f"{plan.name}, {plan.variant}: {data}, engine {plan.engine}, {jobs} at a time, results in {plan.out}"
    return f"{head}\n{text_table(['setting and arm', *_STATE_WORDS.values()], rows)}"


def _dry_run(
    plan: Plan,
    selected: set[Key],
    found: Mapping[Cell, str],
    earlier: Mapping[str, Any],
    jobs: int,
    request: Request,
    say: Callable[[str], None],
    note: Callable[[str], None],
) -> None:
    """Print plan, commands and cost; nothing is written."""
    say(plan_text(plan, selected, found, jobs))
    todo = [cell for cell in plan.cells if cell.key in selected and found[cell] != DONE]
    say("")
    for cell in todo:
        say(cell.command + (" --resume" if found[cell] == BEGUN else ""))
    costs = _costs(plan, todo, earlier, jobs, request, note)
    if costs:
        say("")
        say(_cost_text(costs, todo, jobs))


def _costs(
    plan: Plan,
    todo: Sequence[Cell],
    earlier: Mapping[str, Any],
    jobs: int,
    request: Request,
    note: Callable[[str], None],
) -> list[Any]:
    """Estimates for the arms that have a run to do, those of an earlier command first; none without measuring, or over real sites."""
    if not todo or not request.probe or plan.engine == DEPLOYMENT:
        return []
    from fedmed.compare.cost import Cost
    from fedmed.compare.measuring import measure_all, to_measure

    known = [c for c in earlier.get("cost", []) if not c.get("problem")]
    new = measure_all(to_measure(plan, {c.key for c in todo}, known), jobs, (lambda _: None) if request.quiet else note)
    hashes = {(cell.setting, cell.arm): cell.config_hash for cell in reversed(plan.cells)}
    old = [Cost(**c) for c in known if hashes.get((c["setting"], c["arm"])) == c["config_hash"]]
    found = {(c.setting, c.arm): c for c in [*old, *new]}
    return [found[key] for key in dict.fromkeys((c.setting, c.arm) for c in todo)]


def _cost_text(costs: Sequence[Any], todo: Sequence[Cell], jobs: int) -> str:
    from fedmed.compare.cost import cost_text

    runs: dict[tuple[str, str], int] = {}
    for cell in todo:
        runs[cell.setting, cell.arm] = runs.get((cell.setting, cell.arm), 0) + 1
    return cost_text(costs, runs, jobs)


# ---------------------------------------------------------------------- the runs and after them


def _run(
    plan: Plan,
    todo: list[tuple[Cell, bool]],
    jobs: int,
    request: Request,
    earlier: Mapping[str, Any],
    failed: dict[Key, str],
    note: Callable[[str], None],
    start: Start | None,
) -> list[Any]:
    """Estimate and run; after each run comparison.json is written anew. Gives the estimates, puts reasons of failures into `failed`."""
    cells = [cell for cell, _ in todo]
    if not request.quiet:
        found = {cell: BEGUN if begun else NEW for cell, begun in todo}
        chosen = {cell.key for cell in plan.cells}
        note(plan_text(plan, chosen, {c: found.get(c, DONE) for c in plan.cells}, jobs))
    costs = _costs(plan, cells, earlier, jobs, request, note)
    if costs and not request.quiet:
        note(_cost_text(costs, cells, jobs))

    def ended(outcome: Outcome) -> None:
        if outcome.error:
            failed[outcome.cell.key] = outcome.error
        write.write_comparison(plan, write.comparison(plan, earlier, failed, costs))

    arms = {(c.setting, c.arm): c.seconds for c in costs if not c.problem}
    weights = {c.key: arms[c.setting, c.arm] for c in cells if (c.setting, c.arm) in arms}
    watch = watcher(plan, [cell.key for cell in cells], weights, request.quiet)
    write.write_comparison(plan, write.comparison(plan, earlier, failed, costs))
    try:
        run_cells(plan, todo, jobs, watch, ended, **({} if start is None else {"start": start}))
    finally:
        watch.close()
    return costs


def _finish(
    plan: Plan, content: write.Comparison, quiet: bool, say: Callable[[str], None], note: Callable[[str], None]
) -> None:
    """Write tables and page, and print the tables."""
    from fedmed.compare.tables import text

    write.write_tables(plan.out, content)
    say(text(content))
    say("")
    say(f"tables: {plan.out / write.TABLES[0]}")
    page = write.write_html(plan.out, (lambda _: None) if quiet else note, plan.data)
    if page is not None:
        say(f"page: {page}")
