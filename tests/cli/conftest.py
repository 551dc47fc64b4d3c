"""Makes the made-up run of `history_fixture.py` available to the tests of this folder."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def made_up() -> ModuleType:
    """The module `history_fixture` (test folders are no packages, hence by path)."""
    path = Path(__file__).resolve().parents[1] / "report" / "history_fixture.py"
    spec = importlib.util.spec_from_file_location("history_fixture", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def restore_log_level() -> Iterator[None]:
    """Undo what `--quiet` and `--debug` set, so that other tests see warnings."""
    log = logging.getLogger("fedmed")
    level = log.level
    yield
    log.setLevel(level)
