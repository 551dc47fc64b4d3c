from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from fedmed import files
from fedmed.errors import UserError
from fedmed.files import read_history, write_csv, write_json
from fedmed.report import run_folder
from fedmed.report.run_folder import RunFolder, prepare


def test_new_and_empty_folders_are_taken(tmp_path: Path) -> None:
    assert prepare(tmp_path / "a" / "b").path.is_dir()
    assert prepare(tmp_path / "a" / "b").path == tmp_path / "a" / "b"  # still empty


def test_full_folder_is_refused_without_resume(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x")
    with pytest.raises(UserError, match=r"not empty \(it holds config.yaml\); add --resume"):
        prepare(tmp_path)
    assert prepare(tmp_path, resume=True).config.is_file()


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        prepare(tmp_path / "none", resume=True)
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(UserError, match=r"neither config.yaml nor checkpoint"):
        prepare(tmp_path, resume=True)
    assert not (tmp_path / "none").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="found a file"):
        prepare(tmp_path / "file")


def test_default_out_never_names_an_existing_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "20250102-030405")
    first = run_folder.default_out("x", tmp_path)
    assert first.name == "x-20250102-030405"
    first.mkdir()
    assert run_folder.default_out("x", tmp_path).name == "x-20250102-030405-2"


def test_json_has_null_for_what_json_lacks(tmp_path: Path) -> None:
    value = {
        "a": math.nan,
        "b": [np.float32(0.5), np.array([1.0, math.inf])],
        "c": {3, 1},
        "d": np.int64(7),
        5: Path("x"),
    }
    write_json(tmp_path / "s.json", value)
    text = (tmp_path / "s.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {"a": None, "b": [0.5, [1.0, None]], "c": [1, 3], "d": 7, "5": "x"}


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_json(tmp_path / "s.json", {"old": 1})

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]


def test_csv_columns_are_the_union(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [{"a": 1, "b": math.nan}, {"c": "x,y", "a": 2}])
    assert path.read_text() == 'a,b,c\n1,,\n2,,"x,y"\n'


def test_torn_last_line_is_skipped_and_a_broken_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"round": 1}\n\n{"round": 2}\n{"rou')
    assert [r["round"] for r in read_history(tmp_path)] == [1, 2]
    path.write_text('{"round": 1}\n{"rou\n{"round": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        read_history(path)
    with pytest.raises(UserError, match=r"is .* a run folder"):
        read_history(tmp_path / "other" / "history.jsonl")


def test_cases_of_all_sites_are_joined(tmp_path: Path, made_up) -> None:
    made_up.make_run(tmp_path, made_up.make_history(2), overlays=0)
    path = run_folder.collect_cases(RunFolder(tmp_path))
    assert path is not None
    lines = path.read_text().splitlines()
    assert lines == [
        "site,round,item_id,dice",
        "site_00,12,a,0.9",
        "site_00,12,b,",
        "site_01,12,a,0.9",
        "site_01,12,b,",
    ]
    assert run_folder.collect_cases(RunFolder(tmp_path / "none")) is None
