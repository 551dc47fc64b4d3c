"""Stored metrics of a short run per method: a change that moves them is seen."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
_spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
assert _spec is not None and _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.names())
def test_metrics_are_the_stored_ones(name: str, tmp_path: Path) -> None:
    stored = golden.stored(name)
    found = golden.measure(name, tmp_path / "run")
    assert set(found) == set(stored["metrics"])
    for key, expected in stored["metrics"].items():
        assert math.isclose(found[key], expected, abs_tol=stored["tolerance"]), (
            f"{key}: {found[key]} now, {expected} with {stored['versions']}"
        )
