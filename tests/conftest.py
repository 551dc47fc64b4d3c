"""For all tests: one torch thread, since they compare bits and several threads on small tensors only get into each other's way, and Ctrl-C as
usual, since a shell starts what runs in the background with SIGINT ignored, and what the tests start would inherit that. What a command says of
the level of our log (`--quiet`) ends with its test."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
signal.signal(signal.SIGINT, signal.default_int_handler)


_LEVEL = logging.getLogger("fedmed").level


@pytest.fixture(autouse=True)
def _own_log_level() -> Iterator[None]:
    """Put the level of our own log back, also after a fixture of a whole module."""
    logger = logging.getLogger("fedmed")
    logger.setLevel(_LEVEL)
    yield
    logger.setLevel(_LEVEL)
