"""The worked example of `docs/extending.md`: the files it prints, written into a folder and run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmed.config import load_config
from fedmed.engines import run

_SMALL = [
    "data.phantom={num_sites: 3, images_per_site: 10, image_size: 16}",
    "training.epochs=1",
    "federation.rounds=2",
]


def test_the_worked_example_runs(
    pages: dict[str, str], blocks: Callable[[str, str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = pages["docs/extending.md"]
    *modules, check = blocks(page, "python")
    for block in modules:
        (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(block, encoding="utf-8")
    experiment = tmp_path / "loss_weighted.yaml"
    experiment.write_text(blocks(page, "yaml")[0], encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    exec(compile(check, "docs/extending.md", "exec"), {})

    config = load_config(experiment, [*_SMALL, f"data.cache_dir={tmp_path / 'cache'}", f"out={tmp_path / 'run'}"])
    summary = run(config)
    assert summary["rounds"] == 2 and summary["failures"] == []
    weights = summary["notes"]["weights"]
    assert set(weights) == set(summary["sites"]) and all(0 < weight < 10 for weight in weights.values())
    assert math.isfinite(summary["mean"])
