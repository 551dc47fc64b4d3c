"""The benchmarks run and their equality checks hold; nothing is timed here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("script", "checks"),
    [
        ("aggregation.py", ["streaming mean = naive loop", "streaming mean = Flower's averaging", "dtypes"]),
        ("round_overhead.py", ["engine = bare loop, bit for bit", "leave the model as it was"]),
        ("losses.py", ["gated CRF = unfold form"]),
        ("site_reading.py", ["= flat memory map"]),
        ("importing.py", ["are those of the pictures"]),
    ],
)
def test_equality_checks_of_the_benchmarks(script: str, checks: list[str]) -> None:
    command = [sys.executable, str(FOLDER / script), "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for check in checks:
        assert any(line.startswith("checked: ") and check in line for line in done.stdout.splitlines()), done.stdout
