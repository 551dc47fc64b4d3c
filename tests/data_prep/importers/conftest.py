"""What the tests of importers share: a command run as `fedmed data import` runs it, with all its output kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest


@dataclass
class Outcome:
    """What an import left: exit code, file, lines on stdout (`said`) and stderr (`noted`)."""

    out: Path
    code: int = -1
    said: list[str] = field(default_factory=list)
    noted: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All output."""
        return "\n".join([*self.said, *self.noted])

    def read(self, *names: str, group: str = "") -> list[np.ndarray]:
        """Datasets of a site, the root by default."""
        with h5py.File(self.out, "r") as file:
            node = file[group] if group else file
            return [node[name][...] for name in names]

    def attrs(self, group: str = "") -> dict[str, Any]:
        """Attributes of the file or of a site."""
        with h5py.File(self.out, "r") as file:
            return dict((file[group] if group else file).attrs)

    def split_of(self, group: str = "") -> dict[str, set[str]]:
        """Splits in which each group_id lies."""
        attrs, (ids,) = self.attrs(group), self.read("group_id", group=group)
        found: dict[str, set[str]] = {}
        for split in ("train", "val", "test"):
            for row in attrs[f"{split}_idx"]:
                found.setdefault(ids[row].decode(), set()).add(split)
        return found


@pytest.fixture
def importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """`importing(format, source, *words, name="out.h5", **options)` imports with the defaults of the command line; the key lies in tmp_path."""
    from data_prep.importers.run import import_data

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def run(format: str, source: Path, *words: str, name: str = "out.h5", **options: Any) -> Outcome:
        outcome = Outcome(tmp_path / "made" / name)
        defaults: dict[str, Any] = {
            "size": None, "split": "70/10/20", "seed": 0, "secret": None, "trace": None, "compression": 0, "workers": 2, "site": None,
            "force": False, "quiet": False,
        }  # fmt: skip
        given: Sequence[str] = list(words)
        outcome.code = import_data(
            format, str(source), str(outcome.out), given,
            **{**defaults, **options, "say": outcome.said.append, "note": outcome.noted.append},
        )  # fmt: skip
        return outcome

    return run
