from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedmed.errors import UserError
from fedmed.report import figures, write
from fedmed.report.summary import build_summary

pytest.importorskip("matplotlib")


def size_of(path: Path) -> tuple[int, int]:
    """Width and height from the header of a PNG."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


@pytest.mark.parametrize("num_sites", [1, 5, 30])
def test_curves(tmp_path: Path, made_up, num_sites: int) -> None:
    path = figures.plot_curves(made_up.make_history(num_sites), tmp_path / "f" / "c.png", "test/global/dice", "title")
    assert path == tmp_path / "f" / "c.png"
    width, height = size_of(path)
    assert width > height > 200
    assert [p.name for p in path.parent.iterdir()] == ["c.png"]


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert figures.plot_curves([], tmp_path / "c.png", None) is None
    assert figures.plot_comparison({"a": [], "b": []}, tmp_path / "c.png", "test/global/dice") is None
    empty = {"image": np.zeros((0, 8, 8)), "reference": np.zeros((0, 8, 8)), "prediction": np.zeros((0, 8, 8))}
    assert figures.plot_overlays(empty, tmp_path / "o.png") is None
    assert list(tmp_path.iterdir()) == []


def test_a_site_keeps_its_style_and_styles_differ() -> None:
    sites = [f"s{i:02d}" for i in range(21)]
    styles = figures.site_styles(sites)
    assert styles == figures.site_styles(sites[::-1])
    assert len({(s["color"], s["linestyle"]) for s in styles.values()}) == 21


def test_comparison(tmp_path: Path, made_up) -> None:
    histories = {"base": made_up.make_history(3), "new": made_up.make_history(3, seed=1)}
    assert figures.plot_comparison(histories, tmp_path / "c.png", "test/global/dice") is not None
    only_sites = {arm: [r for r in h if r["phase"] != "central"] for arm, h in histories.items()}
    assert figures.plot_comparison(only_sites, tmp_path / "d.png", "test/global/dice") is not None
    assert size_of(tmp_path / "c.png")[0] > size_of(tmp_path / "d.png")[0]


def with_conditions(history: list[dict], *names: str) -> list[dict]:
    """The same history with the central items scored under conditions as well, a little worse each."""
    for record in history:
        if record["phase"] == "central":
            value = record["metrics"]["test/global/dice"]
            record["metrics"].update({f"test-{n}/global/dice": value - 0.1 * (i + 1) for i, n in enumerate(names)})
    return history


def test_conditions_are_further_broken_lines(tmp_path: Path, made_up, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str | None, object]] = []
    original = figures._draw

    def spy(axes, line, **style):
        drawn.append((style.get("label"), style.get("linestyle", "-")))
        original(axes, line, **style)

    monkeypatch.setattr(figures, "_draw", spy)
    history = with_conditions(made_up.make_history(3, rounds=4), "blur", "dark")
    assert list(figures._central_lines(history, "test/global/dice")) == ["clean", "blur", "dark"]
    assert figures._central_lines(history, "test/personal/dice") == {}
    assert figures.plot_curves(history, tmp_path / "c.png", "test/global/dice") is not None
    central = {label: style for label, style in drawn if label and label.startswith("central")}
    assert list(central) == ["central test", "central test, blur", "central test, dark"]
    assert len(set(central.values())) == 3

    drawn.clear()
    arms = {"base": made_up.make_history(3, rounds=4), "new": history}  # the first has none
    assert figures.plot_comparison(arms, tmp_path / "d.png", "test/global/dice") is not None
    assert [style for _, style in drawn].count("--") == [style for _, style in drawn].count(":") == 2
    assert figures._central_title(["blur", "dark"]) == "central test set (dashed: blur, dotted: dark)"


@pytest.mark.parametrize("channels", [1, 3])
def test_overlays(tmp_path: Path, made_up, channels: int) -> None:
    made_up.make_overlay(tmp_path / "overlay.npz", num_cases=4, size=16, channels=channels)
    cases = write.read_overlay(tmp_path / "overlay.npz")
    assert figures.plot_overlays(cases, tmp_path / "o.png", "x", max_cases=3) is not None
    bare = {name: cases[name] for name in ("image", "reference", "prediction")}
    bare["prediction"] = np.zeros_like(bare["prediction"])  # nothing predicted, nothing to outline
    assert figures.plot_overlays(bare, tmp_path / "p.png", max_cases=1) is not None


def test_flat_image_is_grey_and_range_is_used() -> None:
    assert np.all(figures._grey_or_colour(np.full((4, 4), 7, np.uint8)) == 0.5)
    rgb = figures._grey_or_colour(np.arange(16, dtype=np.uint16).reshape(4, 4, 1))
    assert rgb.shape == (4, 4, 3) and rgb.min() == 0.0 and rgb.max() == 1.0


def test_foreground_dice_by_hand() -> None:
    reference = np.array([[[1, 2], [0, 255]], [[0, 0], [0, 0]]], np.uint8)
    prediction = np.array([[[1, 0], [0, 1]], [[0, 0], [0, 0]]], np.uint8)
    assert np.allclose(figures._foreground_dice(reference, prediction), [2 / 3, np.nan], equal_nan=True)


def test_broken_overlay_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=np.zeros((1, 4, 4)))
    with pytest.raises(UserError, match="missing: reference, prediction"):
        write.read_overlay(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"b\.npz: not a readable npz"):
        write.read_overlay(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", image=np.array([{}], dtype=object))
    with pytest.raises(UserError):  # pickled objects are never loaded
        write.read_overlay(tmp_path / "c.npz")


def test_report_of_a_run(tmp_path: Path, made_up) -> None:
    history = made_up.make_run(tmp_path, made_up.make_history(3, rounds=4), overlays=2)
    (tmp_path / "sites" / "site_02" / "overlay.npz").write_bytes(b"broken")
    said: list[str] = []
    report = write.write_report(tmp_path, build_summary(tmp_path, history, made_up.make_config()), said.append)
    assert report == tmp_path / "report.md"
    names = {p.name for p in (tmp_path / "figures").iterdir()}
    assert names == {"curves.png", "overlay-site_00.png", "overlay-site_01.png"}
    assert len(said) == 1 and "site_02" in said[0]
    text = report.read_text()
    assert "| site_00 | 10 |" in text and "![curves](figures/curves.png)" in text
    assert (tmp_path / "cases.csv").is_file() and (tmp_path / "summary.json").is_file()
    assert write.write_report(tmp_path) == report  # again, from the stored summary


def test_without_matplotlib_one_line_and_no_failure(tmp_path: Path, made_up, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    history = made_up.make_run(tmp_path, made_up.make_history(2, rounds=2))
    said: list[str] = []
    report = write.write_report(tmp_path, build_summary(tmp_path, history, made_up.make_config()), said.append)
    assert said == [figures.NO_MATPLOTLIB]
    assert report.is_file() and "curves.png" not in report.read_text() and not (tmp_path / "figures").exists()


def test_the_report_modules_import_nothing_heavy() -> None:
    code = (
        "import sys, fedmed.report.write, fedmed.report.figures; "
        "print([m for m in ('matplotlib', 'torch', 'numpy', 'flwr', 'omegaconf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("site", "name"), [("a b/c", "a_b_c"), ("Zürich-1", "Zürich-1"), ("", "_")])
def test_file_names(site: str, name: str) -> None:
    assert write.file_name(site) == name
