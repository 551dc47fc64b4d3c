"""The stub app and the run config handed to `flwr run`."""

from __future__ import annotations

import hashlib
import importlib.util
import stat
import tomllib
from pathlib import Path

import pytest

from fedmed.engines import bundle
from fedmed.errors import UserError


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_stub_lists_apps_publisher_and_every_run_config_key(tmp_path: Path) -> None:
    folder = bundle.write_stub(tmp_path / "app")
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    app = project["tool"]["flwr"]["app"]
    assert app["publisher"] == "fedmed"
    assert app["components"] == {"serverapp": "fedmed_stub.server:app", "clientapp": "fedmed_stub.client:app"}
    assert app["config"] == {"experiment": "", "overrides": "", "config": "", "out": "", "resume": False}
    assert project["project"]["dependencies"] == []


def test_stub_content_is_constant_and_imports_the_installed_package(tmp_path: Path) -> None:
    first, second = tree(bundle.write_stub(tmp_path / "a")), tree(bundle.write_stub(tmp_path / "b" / "c"))
    assert first == second
    assert sorted(first) == [
        "fedmed_stub/__init__.py",
        "fedmed_stub/client.py",
        "fedmed_stub/server.py",
        "pyproject.toml",
    ]
    assert "from fedmed.server_app import app as _app" in first["fedmed_stub/server.py"]
    assert "from fedmed.client_app import app as _app" in first["fedmed_stub/client.py"]
    digest = hashlib.sha256("".join(f"{k}\0{v}" for k, v in first.items()).encode()).hexdigest()
    assert tree(bundle.write_stub(tmp_path / "a")) == first  # writing over an old stub
    assert hashlib.sha256("".join(f"{k}\0{v}" for k, v in first.items()).encode()).hexdigest() == digest


def test_stub_module_hands_on_the_named_object(tmp_path: Path) -> None:
    folder = bundle.write_stub(tmp_path, server="string:digits", client="json.decoder:JSONDecoder")
    spec = importlib.util.spec_from_file_location("stub_server", folder / "fedmed_stub" / "server.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.app == "0123456789"


@pytest.mark.parametrize("bad", ["nocolon", "a:b; import os", "a b:c", ":app", "pkg:", "pkg:app\nx"])
def test_stub_refuses_what_is_not_an_import_string(tmp_path: Path, bad: str) -> None:
    with pytest.raises(UserError, match=r"expected package\.module:attribute"):
        bundle.write_stub(tmp_path, server=bad)


AWKWARD = [
    "",
    "plain",
    'quotes " and \\" and """ three',
    "single 'quotes' ''' three",
    "lines\nand\r\nreturns\ttabs",
    "back\\slash \\n not a newline \\u0041 C:\\data\\x",
    "µ-CT Zürich 日本語 \U0001f600 e\u0301",
    "control \x00\x01\x1b\x1f\x7f\x80\u2028 end",
    "# not a comment\n[not.a.table]\nkey = 'no'",
    "name: 'x'\ndata:\n  path: \"/a b/c.h5\"\n  list: [1, 2.5, null, true]\n",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_toml_gives_every_text_back(tmp_path: Path, text: str) -> None:
    path = bundle.write_run_config(tmp_path / "run.toml", text, tmp_path / "out", True)
    assert path.suffix == ".toml"  # `flwr run -c` takes a file only by this ending
    assert tomllib.loads(path.read_text(encoding="utf-8")) == {
        "config": text,
        "out": str(tmp_path / "out"),
        "resume": True,
    }


def test_toml_scalars_and_unwritable_text() -> None:
    assert bundle.to_toml({"a": True, "b": 3, "c": 0.5, "d": 'x"y'}) == 'a = true\nb = 3\nc = 0.5\nd = "x\\"y"\n'
    with pytest.raises(UserError, match="UTF-8"):
        bundle.toml_value("broken \ud800")


def test_toml_is_read_alike_by_flower(tmp_path: Path) -> None:
    config = pytest.importorskip("flwr.common.config")
    for text in AWKWARD:
        path = bundle.write_run_config(tmp_path / "run.toml", text, tmp_path, False)
        assert config.parse_config_args([str(path)]) == {"config": text, "out": str(tmp_path), "resume": False}


def test_files_are_private_and_leave_no_partial_copy(tmp_path: Path) -> None:
    path = bundle.write_run_config(tmp_path / "run.toml", "x", tmp_path, False)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["run.toml"]


@pytest.mark.slow
def test_flower_builds_the_same_bundle_twice(tmp_path: Path) -> None:
    build = pytest.importorskip("flwr.cli.build")
    first = build.build_fab_from_disk(bundle.write_stub(tmp_path / "a"))
    assert first == build.build_fab_from_disk(bundle.write_stub(tmp_path / "b"))
