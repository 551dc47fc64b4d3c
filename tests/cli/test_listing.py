from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedmed import config as config_module
from fedmed import registry
from fedmed.cli import listing
from fedmed.errors import UserError


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, ""),
        ("", ""),
        ("One. Two.", "One"),
        ("A mean of\n    two lines. More.", "A mean of two lines"),
        ("Uses 0.5 of it, e.g. half, see eq. 3. Then more.", "Uses 0.5 of it, e.g. half, see eq. 3"),
        ("First\n\nSecond.", "First"),
        ("No full stop", "No full stop"),
    ],
)
def test_first_sentence(text: str | None, sentence: str) -> None:
    assert listing.first_sentence(text) == sentence


def test_descriptions_are_read_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "made_up_package"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import Thing as Renamed\nraise RuntimeError('imported')\n")
    (package / "inner.py").write_text(
        '"""The module."""\nraise RuntimeError\nclass Thing:\n    """A thing. More."""\ndef bare(): ...\nVALUE = 3\n'
    )
    (package / "broken.py").write_text("def (")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert listing.describe("made_up_package.inner:Thing") == "A thing"
    assert listing.describe("made_up_package:Renamed") == "A thing"
    assert listing.describe("made_up_package.inner:bare") == "The module"
    assert listing.describe("made_up_package.inner:VALUE") == "The module"
    assert listing.describe("made_up_package.broken:x") == ""
    assert listing.describe("made_up_package.absent:x") == ""
    assert "made_up_package" not in sys.modules


def test_every_registered_name_is_listed() -> None:
    assert set(listing.REGISTRY_KINDS.values()) == set(registry.KINDS)
    for word, kind in listing.REGISTRY_KINDS.items():
        assert list(listing.entries(word)) == sorted(registry.KINDS[kind])


def test_experiments_with_descriptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "compare").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "_base.yaml").write_text("description: base\n")
    (tmp_path / "b.yaml").write_text("description: >\n  Folded over\n  lines. More.\n")
    (tmp_path / "a.yaml").write_text("seed: 1\n")
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "compare" / "noise.yaml").write_text("description: A table.\n")
    (tmp_path / "data" / "noise.yaml").write_text("description: A protocol.\n")
    monkeypatch.setattr(config_module, "experiment_dirs", lambda: [tmp_path])
    found = listing.experiments()
    assert list(found) == ["a", "b", "broken"]
    assert found["a"] == "" and found["b"] == "Folded over lines"
    assert found["broken"].startswith("(cannot be read")


def test_demo_arms_are_known_and_described() -> None:
    found = listing.experiments()
    assert found["demo_fedavg"] and found["demo_feda3i"]


def test_render_cuts_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "entries", lambda kind: {"a": "x" * 50, "long": ""} if kind == "models" else {})
    assert listing.render(["models"], 30).splitlines() == ["  a     " + "x" * 19 + "...", "  long"]
    assert listing.render(["models"]).splitlines()[0].endswith("x" * 50)
    assert listing.render(["losses", "models"], 80).splitlines()[:3] == ["losses", "  (none)", ""]


def test_unknown_kind() -> None:
    with pytest.raises(UserError, match="did you mean 'losses'"):
        listing.entries("loses")
