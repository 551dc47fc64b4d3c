"""`fedmed report` of a run that has really run: the command, its remarks, its errors."""

from __future__ import annotations

import ast
import csv
from pathlib import Path

import pytest

from fedmed.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of FedAvg on two tiny segmentation sites."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    size = ["data.phantom.num_sites=2", "data.phantom.images_per_site=12", "data.phantom.image_size=16"]
    words = [
        "fedavg",
        "data.path=phantom:segmentation",
        *size,
        f"data.cache_dir={folder.parent / 'cache'}",
        "client.args.loss=null",
    ]
    model = ["model.name=unet", "model.args=null", "model.args.base_width=4", "engine.device=cpu"]
    assert cli.main(["run", *words, *model, "client.args=null", "federation.rounds=2", "-q", "--out", str(folder)]) == 0
    return folder


def test_page_of_a_real_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run)]) == 0
    said = capsys.readouterr()
    assert f"report: {run / 'report.html'} (" in said.out and "images of patients" in said.err
    text = (run / "report.html").read_text()
    for title in (
        "Summary",
        "Curves",
        "Sites beside each other",
        "Communication",
        "Cases",
        "Confusion",
        "Data",
        "Configuration",
    ):
        assert f">{title}</h2>" in text
    assert text.count("data:image/jpeg") == 4  # two test items at each of two sites: the best and the worst
    assert "best case: Dice" in text and "worst case: Dice" in text


def test_no_images_and_another_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "page.html"
    assert cli.main(["report", str(run), "--no-images", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert f"report: {out} (" in said.out and "patients" not in said.err
    with (run / "cases.csv").open() as stream:
        items = [row["item"] for row in csv.DictReader(stream)]
    text = out.read_text()
    assert items and "data:image" not in text and not any(item in text for item in items)


def test_what_is_no_run_is_an_error_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "missing")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert cli.main(["report"]) == 2


def test_the_flower_side_does_without_the_page() -> None:
    """Flower's bundle holds .py files only, so nothing that runs inside it may need the templates."""
    users = []
    for path in sorted((ROOT / "fedmed").rglob("*.py")):
        modules = [n.module or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        if any(module.startswith("fedmed.report.page") for module in modules):
            users.append(path.relative_to(ROOT / "fedmed").parts[:2])
    assert {user[0] for user in users} <= {"report", "cli", "compare"}
    assert {user[1] for user in users if user[0] == "report"} <= {"page"}
