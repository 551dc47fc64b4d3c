"""What the benchmarks of single losses share: one row per case, and the memory of one call.

A script of such benchmarks offers `measure() -> list[Row]`, which checks equality first, and `calls() -> {name: () -> call}`,
what `extra_mib` runs in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch

MIB = 2**20
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Row:
    """One case. Times by CPU; extra memory (MiB) above the inputs, gradients included, None where it cannot be measured."""

    name: str
    ours: common.Times
    reference: common.Times | None
    limit: common.Times | None
    extra_mib: float | None
    reference_mib: float | None = None
    target: str = ""


def milliseconds(times: common.Times | None) -> str:
    """Median CPU time."""
    return "–" if times is None else f"{1e3 * statistics.median(times.cpu):.1f}"


def show(rows: Sequence[Row]) -> None:
    """Print a table: milliseconds of both, their ratio with quartiles, the limit, extra memory of both."""
    width = max(len(row.name) for row in rows)
    print(
        f"{'':{width}}  {'ms':>7}  {'ref. ms':>8}  {'limit ms':>8}  {'MiB':>6}  {'ref. MiB':>8}  reference / ours, turn by turn"
    )
    for row in rows:
        mib, reference_mib = ("–" if m is None else f"{m:.1f}" for m in (row.extra_mib, row.reference_mib))
        ratio = "" if row.reference is None else common.spread(common.ratios(row.reference.cpu, row.ours.cpu))
        print(
            f"{row.name:{width}}  {milliseconds(row.ours):>7}  {milliseconds(row.reference):>8}  {milliseconds(row.limit):>8}  "
            f"{mib:>6}  {reference_mib:>8}  {ratio} {row.target}".rstrip()
        )


def extra_mib(script: str, name: str) -> float | None:
    """Growth of the peak resident size over one call, in a fresh process: `script --memory name`. None where not measured."""
    # glibc would otherwise keep freed memory, and what is kept already would hide what is taken.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, str(Path(script).resolve()), "--memory", name]
    last = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()[-1]
    return None if last == "None" else float(last) / MIB


def print_growth(calls: Mapping[str, Callable[[], Callable[[], Any]]], name: str) -> None:
    """In the process of `extra_mib`: make the inputs, call once for whatever is loaded lazily, call again and print the growth."""
    call = calls[name]()
    call()
    if not RESET.exists():  # not Linux
        print(None)
        return
    before = _bytes("VmRSS")
    RESET.write_text("5")  # the peak starts again
    kept = call()
    print(_bytes("VmHWM") - before)
    del kept


def _bytes(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def main(
    doc: str | None,
    calls: Callable[[], Mapping[str, Callable[[], Callable[[], Any]]]],
    measure: Callable[[bool, int], list[Row]],
) -> None:
    """The command line of such a script: check, then time; with `--memory` one call of `calls()` only."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small inputs, equality checks only")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--memory", metavar="CASE", help="measure memory only (used by the script itself)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print_growth(calls(), options.memory)
        return
    rows = measure(options.tiny, options.repetitions)
    if rows:
        print(common.machine())
        show(rows)
