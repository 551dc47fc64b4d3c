"""The tables of the documentation are those the code gives, and the script that makes them notices what is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def tables(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_tables", root / "docs" / "build_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_up_to_date(tables: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_every_key_is_in_the_configuration_page(tables: ModuleType, pages: dict[str, str]) -> None:
    for key in tables.MEANING:
        assert f"| `{key}` |" in pages["docs/configuration.md"]


def test_a_stale_table_is_named(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- table: registry model -->\n| old |\n<!-- end -->\nafter\n", encoding="utf-8")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.main(["--check"]) == 1
    assert "README.md" in capsys.readouterr().out
    assert tables.main([]) == 0
    text = page.read_text(encoding="utf-8")
    assert "| `unet` | `UNet` in `fedmed/models/unet.py` |" in text
    assert text.startswith("before\n<!-- table: registry model -->\n") and text.endswith("<!-- end -->\nafter\n")
    assert tables.main(["--check"]) == 0


def test_an_unexplained_key_is_an_error(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(tables.MEANING, "seed")
    with pytest.raises(SystemExit, match="seed"):
        tables.config_table("top")


@pytest.mark.parametrize(
    ("value", "written"), [(None, "null"), (True, "true"), ("", '""'), (1e-3, "0.001"), (3600.0, "3600"), ([], "[]")]
)
def test_defaults_are_written_as_yaml(tables: ModuleType, value: object, written: str) -> None:
    assert tables.show(value) == written
