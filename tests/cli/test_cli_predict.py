"""`fedmed predict` from the words to the exit code; what it does is tested in tests/predict."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedmed.cli import main as cli
from fedmed.cli.predict import parse_size, parse_window
from fedmed.errors import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run on grey images."""
    root = tmp_path_factory.mktemp("cli-predict")
    (root / "tiny.yaml").write_text(
        f"""
name: tiny
data: {{path: "phantom:segmentation", cache_dir: "{root}/cache", phantom: {{num_sites: 2, images_per_site: 12, image_size: 32, channels: 1}}}}
model: {{name: unet, args: {{base_width: 4}}}}
training: {{batch_size: 8}}
federation: {{rounds: 1}}
evaluation: {{central: none}}
engine: {{device: cpu}}
"""
    )
    assert cli.main(["run", str(root / "tiny.yaml"), "--out", str(root / "run"), "-q"]) == 0
    return root / "run"


def test_pictures_to_masks(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "images"
    source.mkdir()
    for number in range(3):
        Image.fromarray(np.full((40, 50), 40 * number, np.uint8)).save(source / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", str(trained), str(source), "--fit", "pad", "--size", "32", "--batch-size", "2"]) == 0
    shown = capsys.readouterr()
    assert "3 pictures -> masks (.png)" in shown.out and "contact sheet: " in shown.out
    assert shown.out.splitlines()[-1] == "wrote predictions/run"
    assert {path.name for path in Path("predictions/run").iterdir()} == {
        "0_mask.png",
        "1_mask.png",
        "2_mask.png",
        "contact.png",
    }
    assert Image.open("predictions/run/0_mask.png").size == (50, 40)
    assert cli.main(["predict", str(trained), str(source)]) == 2
    assert "is not empty; --force" in capsys.readouterr().err
    assert cli.main(["predict", str(trained), str(source), "--force", "-q"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "wrote predictions/run\n" and shown.err == ""
    assert cli.main(["predict", str(trained), str(source), "--out", "new", "--window", "40,400"]) == 0
    noted = capsys.readouterr().err
    assert "the run does not say how its images were prepared" in noted and "there are none" in noted


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "0"], "--size: expected HEIGHT"), (["--size", "16"], "--size 16x16: the model reads 32x32"),
        (["--window", "3"], "--window: expected centre,width"), (["--fit", "squash"], "--fit: expected stretch, pad, crop"),
        (["--split", "tests"], "did you mean 'test'"), (["--site", "phantom_00"], "did you mean 'phantom-00'"),
        (["--which", "best"], "expected last or selected"), (["--state", "."], "say which with --site"), (["--batch-size", "0"], "batch-size"),
    ],
)  # fmt: skip
def test_wrong_words(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "a.png")
    assert cli.main(["predict", str(trained), str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", str(tmp_path), str(tmp_path)]) == 2
    assert "is it a run folder?" in capsys.readouterr().err


def test_sizes_and_windows() -> None:
    assert (parse_size("128"), parse_size("96x128"), parse_size(None)) == ((128, 128), (96, 128), None)
    assert (parse_window("40,400"), parse_window("-600, 1500"), parse_window(None)) == ((40, 400), (-600, 1500), None)
    wrong: list[tuple[Any, str]] = [
        (parse_size, "a"),
        (parse_size, "1x2x3"),
        (parse_window, "1,2,3"),
        (parse_window, "1,0"),
        (parse_window, "nan,5"),
    ]
    for parse, text in wrong:
        with pytest.raises(UserError):
            parse(text)


def test_help_is_light() -> None:
    code = "import sys; from fedmed.cli import predict; print([m for m in ('torch', 'flwr', 'monai', 'h5py', 'numpy') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "[]"


def test_inputs_are_not_overwritten(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a/x.png", "a/x_mask.png", "b/x.png", "b/out/old.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32), 9, np.uint8)).save(tmp_path / name)
    before = (tmp_path / "a/x_mask.png").read_bytes()
    words = ["predict", str(trained), str(tmp_path / "a"), str(tmp_path / "b"), "--force", "--out"]
    assert cli.main([*words, str(tmp_path)]) == 2  # masks of a/x.png would become a/x_mask.png
    assert "is the folder of an input" in capsys.readouterr().err
    assert (tmp_path / "a/x_mask.png").read_bytes() == before
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert cli.main([*words, str(loop)]) == 2
    assert "cannot write to" in capsys.readouterr().err
    assert cli.main([*words, str(tmp_path / "b" / "out")]) == 0
    shown = capsys.readouterr()
    assert "what was in it before is left out" in shown.err and "3 pictures" in shown.out
