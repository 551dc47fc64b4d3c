"""`fedmed data` from the words to the exit code; what the tools do is tested beside them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import pytest

from fedmed.cli import data as data_cli
from fedmed.cli import main as cli
from fedmed.cli.parameters import arguments, listed
from fedmed.data.phantom import PHANTOM_KINDS
from fedmed.registry import DATA_TOOLS, IMPORTERS, import_attribute


@pytest.fixture
def phantom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    out = tmp_path / "phantom.h5"
    words = ["num_sites=2", "images_per_site=20", "image_size=16"]
    assert cli.main(["data", "phantom", "segmentation", str(out), *words]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    return out


def test_from_phantom_to_picture(phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split, weak, sheet = tmp_path / "split.h5", tmp_path / "weak.h5", tmp_path / "sheet.png"
    assert cli.main(["data", "check", str(phantom)]) == 0
    assert "0 errors, 0 warnings, 0 notes" in capsys.readouterr().out
    assert (
        cli.main(["data", "split", str(phantom), str(split), "--ratio", "60/20/20", "--separate", str(tmp_path / "d")])
        == 0
    )
    assert len(list((tmp_path / "d").iterdir())) == 2
    assert cli.main(["data", "corrupt", str(split), str(weak), "weak_labels", "kind=box", "--seed", "1"]) == 0
    capsys.readouterr()
    assert cli.main(["data", "info", str(weak)]) == 0
    said = capsys.readouterr().out
    assert (
        "made from split.h5: corruption weak_labels" in said and "mask, box" in said and "40 images of 2 sites" in said
    )
    assert cli.main(["data", "show", str(weak), str(sheet), "--per-site", "2"]) == 0
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["data", "show", str(weak), str(sheet)]) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.main(["data", "show", str(weak), str(sheet), "--force"]) == 0
    assert cli.main(["data", "show", str(weak), str(weak), "--force"]) == 2
    clients = tmp_path / "clients.h5"
    assert cli.main(["data", "split", str(phantom), str(clients), "--clients", "3", "--by", "iid", "-q"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {clients}"


def test_exit_codes_of_the_check(phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File(phantom, "r+") as file:
        file["site_00"]["image"][0] = 7
    assert cli.main(["data", "check", str(phantom), "--quiet"]) == 0  # a warning
    said = capsys.readouterr().out
    assert said.splitlines()[0].startswith("warning  phantom-00: 1 of 20 images have one value")
    with h5py.File(phantom, "r+") as file:
        file["site_01"]["mask"][0] = 7
    assert cli.main(["data", "check", str(phantom), "--json", str(tmp_path / "f.json")]) == 4
    assert json.loads((tmp_path / "f.json").read_text())["errors"] == 1
    assert cli.main(["data", "check", str(tmp_path / "absent.h5")]) == 2
    assert cli.main(["data", "check", str(phantom), "--json", str(phantom)]) == 2
    capsys.readouterr()
    below = tmp_path / "f.json" / "below"  # a file where a folder would have to be
    assert cli.main(["data", "check", str(phantom), "--json", str(below), "--quiet"]) == 2
    assert "cannot write the findings file" in capsys.readouterr().err
    assert cli.main(["data", "show", str(phantom), str(below.with_suffix(".png"))]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["split", "{file}", "{out}"], "either --ratio"),
        (["split", "{file}", "{out}", "--clients", "0", "--by", "iid"], "0 is not in the range"),
        (["corrupt", "{file}", "{out}", "label_noise"], "is for classification files"),
        (["phantom", "skin", "{out}"], "No phantom 'skin'"),
        (["phantom", "segmentation", "{out}", "image_size"], "expected key=value"),
        (["show", "{file}", "{out}"], "ends in .png"),
        (["show", "{file}", "{out}.png", "--tile", "4"], "4 is not in the range"),
        (["info", "{out}"], "No site file"),
        (["chek", "{file}"], "No such command"),
    ],
)
def test_wrong_words_give_2(
    phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], text: str
) -> None:
    out = tmp_path / "out.h5"
    assert cli.main(["data", *[word.format(file=phantom, out=out) for word in words]]) == 2
    captured = capsys.readouterr()
    assert text in captured.err and "Traceback" not in captured.err
    assert [p.name for p in tmp_path.iterdir()] == ["phantom.h5"]


def test_import_hands_over_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def fake(*names: Any, **options: Any) -> int:
        calls.append((names, options))
        return 0

    monkeypatch.setattr(data_cli, "import_attribute", lambda path: fake if path == DATA_TOOLS["import"] else None)
    words = [
        "data",
        "import",
        "images",
        "in",
        "out.h5",
        "mask=m",
        "--size",
        "64x96",
        "--split",
        "80/0/20",
        "--seed",
        "3",
    ]
    words += [
        "--secret",
        "key",
        "--trace",
        "t.csv",
        "--compression",
        "2",
        "--workers",
        "4",
        "--site",
        "north",
        "--force",
        "-q",
    ]
    assert cli.main(words) == 0
    ((names, options),) = calls
    assert names == ("images", "in", "out.h5", ["mask=m"])
    plain = {key: value for key, value in options.items() if key not in ("say", "note")}
    assert plain == {
        "size": "64x96", "split": "80/0/20", "seed": 3, "secret": "key", "trace": "t.csv", "compression": 2, "workers": 4,
        "site": "north", "force": True, "quiet": True,
    }  # fmt: skip


def test_the_tools_exist() -> None:
    for name, path in DATA_TOOLS.items():
        assert callable(import_attribute(path)), name
    assert data_cli.PHANTOMS == PHANTOM_KINDS


def test_help_names_formats_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from fedmed.cli.main import main; main(['data', 'import', '--help']); main(['data', '-h'])\n"
        "print('HEAVY', sorted(m for m in ('torch', 'h5py', 'numpy', 'PIL', 'flwr') if m in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stderr
    for name in IMPORTERS:
        assert name in done.stdout


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "corrupt", "--list"]) == 0
    said = capsys.readouterr().out
    assert "contour_noise" in said and "mean_high=20" in said and "official code" in said
    assert "clients_per_site=1" in listed("partition")


def test_arguments_of_a_class() -> None:
    from data_prep.partition import Iid

    assert arguments(Iid)[0] == ("num_clients", "50", "K >= 1, official code of FedA3I")


def test_the_page_shows_what_comes_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command of docs/data-tools.md that stands before an output gives it."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "data-tools.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```bash\n(.*?)^```\n\n```text\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 8
    for commands, output in blocks:
        for line in commands.splitlines():
            assert cli.main(shlex.split(line)[1:]) == 0
        assert capsys.readouterr().out == output
