"""`fedmed compare` on the command line, once with real runs."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedmed.cli import listing
from fedmed.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
TINY = """
description: Two arms on very small images. More words.
task: classification
data: phantom:classification
base: fedavg
overrides:
  - "data.phantom={num_sites: 2, images_per_site: 20, image_size: 16}"
  - model.args.widths=[4,8]
  - federation.rounds=1
  - training.max_steps=1
  - engine.device=cpu
metrics: ["global:bacc"]
findings: []
arms:
  plain: []
  prox: [client.prox.enabled=true]
settings:
  only: {title: The one setting, seeds: 1}
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a comparison, in the working folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def test_a_comparison_from_end_to_end(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "tiny.yaml", "--no-probe", "--jobs", "2"]) == 0
    shown = capsys.readouterr()
    out = Path("runs/compare/tiny-full")
    assert "The one setting" in shown.out and f"tables: {out}/tables.md" in shown.out
    assert "started only plain seed 0: 1 round\n" in shown.err and "2/2 only " in shown.err
    content = json.loads((out / "comparison.json").read_text())
    assert [c["state"] for c in content["cells"]] == ["done", "done"]
    assert content["command"] == "fedmed compare tiny.yaml" and content["data"] == "phantom:classification"
    assert all(0 <= r["mean"] <= 1 and len(r["sites"]["0"]) == 2 for r in content["results"])
    with (out / "cells.csv").open(newline="") as file:
        (first, _) = csv.DictReader(file)
    assert first["command"].startswith("fedmed run fedavg ") and first["command"].endswith(
        "--out runs/compare/tiny-full/only/plain-0"
    )
    assert (out / "only" / "prox-0" / "report.md").is_file() and "report: " in (out / "only" / "prox-0.log").read_text()
    times = {p: p.stat().st_mtime_ns for p in out.glob("only/*/*")}
    assert cli.main(["compare", "tiny.yaml", "-q"]) == 0  # nothing is left to run or to measure
    assert times == {p: p.stat().st_mtime_ns for p in out.glob("only/*/*")}
    assert cli.main(["compare", "tiny.yaml", "optimizer.lr=0.5"]) == 2
    assert "optimizer.lr is" in capsys.readouterr().err


def test_a_dry_run_prints_the_commands(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "compare",
        "tiny.yaml",
        "federation.quorum=0.25",
        "--dry-run",
        "--no-probe",
        "--arms",
        "prox",
        "--out",
        "there",
    ]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny, full: data phantom:classification, engine local, ")
    (command,) = (line for line in lines if line.startswith("fedmed run"))
    assert (
        "client.prox.enabled=true federation.quorum=0.25 data.path=phantom:classification seed=0 --out there/only/prox-0"
        in command
    )
    assert [p.name for p in tiny.parent.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["label_nois"], "did you mean 'label_noise'"),
        (["tiny.yaml", "--variant", "big"], "no variant 'big'"),
        (["tiny.yaml", "--only", "onli"], "did you mean 'only'"),
        (["tiny.yaml", "--arms", "plain,proxx"], "did you mean 'prox'"),
        (["tiny.yaml", "--data", "nowhere.h5"], "nowhere.h5"),
        (["tiny.yaml", "--data", "phantom:segmentation"], "choose other --data"),
        (["tiny.yaml", "--seeds", "0"], "--seeds: expected a number >= 1"),
        (["tiny.yaml", "--jobs", "0"], "--jobs: expected a number >= 1"),
        (["tiny.yaml", "--engine", "rey"], "did you mean 'ray'"),
        (["tiny.yaml", "--engine", "deployment"], "belong together"),
        (["tiny.yaml", "federation.round=2"], "setting only, arm plain: unknown key"),
        (["tiny.yaml", "--dry-run", "--tables-only"], "exclude each other"),
    ],
)
def test_wrong_words_give_2_and_leave_nothing(
    tiny: Path, capsys: pytest.CaptureFixture[str], words: list[str], text: str
) -> None:
    assert cli.main(["compare", *words]) == 2
    assert text in capsys.readouterr().err
    assert [p.name for p in tiny.parent.iterdir()] == ["tiny.yaml"]


def test_interrupt_says_how_to_go_on(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedmed.compare.command.compare", stopped)
    assert cli.main(["compare", "tiny.yaml", "federation.quorum=0.25", "--only", "only", "--jobs", "3"]) == 130
    assert "fedmed compare tiny.yaml federation.quorum=0.25 --only only --jobs 3\n" in capsys.readouterr().err


def test_list_shows_comparisons(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "comparisons" in listing.KINDS
    assert cli.main(["list", "comparisons"]) == 0
    assert "label_noise" in capsys.readouterr().out
    (tiny.parent / "broken.yaml").write_text("a: [")
    (tiny.parent / "own.yaml").write_text("description: One.\n")
    files = {path.stem: path for path in sorted(tiny.parent.glob("*.yaml"))}
    monkeypatch.setattr("fedmed.compare.spec.comparison_files", lambda: files)
    assert listing.entries("comparisons") == {
        "broken": "(cannot be read: ParserError)",
        "own": "One (--data FILE)",
        "tiny": "Two arms on very small images (phantom:classification)",
    }


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom fedmed.cli.main import main\ncode = main(['compare', '--help'])\n"
        "print('HEAVY', code, [m for m in ('torch', 'flwr', 'omegaconf', 'numpy', 'yaml', 'rich.progress') if m in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "HEAVY 0 []" in done.stderr and "--tables-only" in done.stdout
