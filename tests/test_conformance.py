"""Reference vectors, when a folder with them is at hand: FEDMED_VECTORS, or shared/vectors beside the checkout."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(os.environ.get("FEDMED_VECTORS") or ROOT.parent / "shared" / "vectors")
FILES = sorted(FOLDER.glob("*.npz")) if FOLDER.is_dir() else []


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fedmed_conformance", ROOT / "tests" / "conformance.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


CONFORMANCE = load()


@pytest.fixture(scope="module")
def known() -> dict[str, object]:
    adapters: dict[str, object] = CONFORMANCE.adapters()
    return adapters


@pytest.mark.skipif(not FILES, reason="no reference vectors here; set FEDMED_VECTORS to a folder with them")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_vector(path: Path, known: dict[str, object]) -> None:
    outcome = CONFORMANCE.check(path, known)
    if outcome.status == "no adapter":
        pytest.skip("no adapter")
    assert outcome.status == "pass", outcome.line()


def ramp_file(folder: Path, last: float) -> None:
    rounds = {"in__rounds": np.array([0, 1]), "in__begin": np.array(0), "in__end": np.array(1), "in__a": np.array(1.0)}
    np.savez(folder / "fednoro__rampup__case9.npz", **rounds, out__kd_weight=np.array([np.exp(-5.0), last]))


def test_main_reports_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ramp_file(tmp_path, 1.0)
    np.savez(tmp_path / "other__thing__case1.npz", in__x=np.zeros(1))
    assert CONFORMANCE.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "fednoro__rampup__case9.npz pass",
        "other__thing__case1.npz no adapter",
        "1 passed, 0 failed, 1 skipped",
    ]
    ramp_file(tmp_path, 0.5)
    assert CONFORMANCE.main([str(tmp_path)]) == 1
    assert "FAIL out__kd_weight 0.5" in capsys.readouterr().out
    np.savez(tmp_path / "fednoro__rampup__case9.npz", in__rounds=np.zeros(1))
    assert CONFORMANCE.main([str(tmp_path)]) == 1
    assert "FAIL raised KeyError" in capsys.readouterr().out


def test_main_without_files_is_an_error(tmp_path: Path) -> None:
    assert CONFORMANCE.main([str(tmp_path)]) == 2
    assert CONFORMANCE.main([str(tmp_path / "missing")]) == 2
    assert CONFORMANCE.main([]) == 2
