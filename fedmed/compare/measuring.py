"""Measures runs before they are started: which are worth it, a process for each, and what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmed.compare.children import Child, start_child
from fedmed.compare.cost import Cost, estimate
from fedmed.compare.plan import Cell, Key, Plan
from fedmed.compare.probe import ProbeRequest, read_result
from fedmed.config import to_yaml
from fedmed.files import write_json

LIMIT_S = 600.0  # for one measurement
TICK_S = 0.1


def to_measure(plan: Plan, keys: Iterable[Key], known: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """The first run of each (setting, arm) that has a run among `keys`, unless `known` estimates hold one for its configuration."""
    wanted = {(setting, arm) for setting, arm, _ in keys}
    have = {(c["setting"], c["arm"], c["config_hash"]) for c in known if not c.get("problem")}
    first: dict[tuple[str, str], Cell] = {}
    for cell in plan.cells:
        if (cell.setting, cell.arm) in wanted:
            first.setdefault((cell.setting, cell.arm), cell)
    return [cell for key, cell in first.items() if (*key, cell.config_hash) not in have]


def measure_all(cells: Sequence[Cell], jobs: int, say: Callable[[str], None]) -> list[Cost]:
    """Measure runs, `jobs` at a time and each in a process of its own; a configuration that several share is measured once.

    Nothing is left of it but the estimates; Ctrl-C ends the processes. A run that cannot be measured has its reason as `problem`.
    """
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(cell.config_hash, cell)
    waiting, number = list(first.values()), len(first)
    running, found = list[_Measurement](), dict[str, Cost]()
    with tempfile.TemporaryDirectory(prefix="fedmed-cost-") as place:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    cell = waiting.pop(0)
                    say(f"measuring {number - len(waiting)}/{number}: {cell.setting} {cell.arm}")
                    running.append(_Measurement(cell, Path(place), jobs))
                time.sleep(TICK_S)
                for one in [m for m in running if m.over()]:
                    running.remove(one)
                    found[one.cell.config_hash] = one.cost()
        finally:
            for one in running:
                one.child.kill()
    return [dataclasses.replace(found[c.config_hash], setting=c.setting, arm=c.arm) for c in cells]


class _Measurement:
    """One run being measured, in a folder of its own below `place`."""

    def __init__(self, cell: Cell, place: Path, jobs: int) -> None:
        self.cell, self._folder = cell, place / cell.config_hash
        self._folder.mkdir()
        self._result, request = self._folder / "result.json", self._folder / "request.json"
        write_json(request, ProbeRequest(config=to_yaml(cell.config), asked=time.time()))
        command = [sys.executable, "-m", "fedmed.compare.probe", str(request), str(self._result)]
        threads = {"OMP_NUM_THREADS": str(cell.config.engine.threads)} if jobs > 1 else {}
        self._deadline = time.monotonic() + LIMIT_S
        # The short runs go below this folder, so that they leave with it even where the process is killed.
        self.child: Child = start_child(command, self._folder / "log", {**threads, "TMPDIR": str(self._folder)})

    def over(self) -> bool:
        """Whether it has ended; after `LIMIT_S` it is ended."""
        if time.monotonic() > self._deadline:
            self.child.kill()
        return self.child.poll() is not None

    def cost(self) -> Cost:
        """The estimate, or why there is none."""
        if self.child.poll() == 0:
            found = estimate(self.cell, read_result(self._result))
        else:
            late = time.monotonic() > self._deadline
            problem = f"not measured within {LIMIT_S:g} s" if late else self.child.reason().splitlines()[-1]
            found = Cost(
                self.cell.setting, self.cell.arm, self.cell.config_hash, problem=problem.removeprefix("error: ")
            )
        with contextlib.suppress(OSError):
            shutil.rmtree(self._folder)
        return found
