"""The worked example of `docs/extending.md`: the files it prints, written into a folder, run, and held against the method that ships."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmed.config import load_config
from fedmed.engines import run
from fedmed.federation.checkpoint import read_safetensors

_SMALL = [
    "data.phantom={num_sites: 2, images_per_site: 40, image_size: 16}",
    "data.partition.args={num_clients: 3, num_corrupted: 1}",
    "data.corruption.args={kind: gaussian_noise, severity: 3, num_corrupted: 1}",
    "training.epochs=1",
    "optimizer={name: sgd, lr: 0.01}",  # Adam turns rounding into steps where a gradient is nearly 0
    "federation.rounds=2",
]


@pytest.fixture
def example(
    pages: dict[str, str], blocks: Callable[[str, str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with the files of the page, which Python finds; gives the experiment in it."""
    page = pages["docs/extending.md"]
    for block in blocks(page, "python"):
        (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(block, encoding="utf-8")
    (tmp_path / "sharpness.yaml").write_text(blocks(page, "yaml")[0], encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "sharpness.yaml"


def test_the_hand_worked_numbers(example: Path) -> None:
    check = example.with_name("check_sharpness.py")
    exec(compile(check.read_text(encoding="utf-8"), str(check), "exec"), {})


def test_the_worked_example_is_the_method_that_ships(example: Path, tmp_path: Path) -> None:
    def measured(name: str, *words: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        out = tmp_path / name
        summary = run(load_config(example, [*_SMALL, *words, f"data.cache_dir={tmp_path / 'cache'}", f"out={out}"]))
        return summary, read_safetensors(out / "model.safetensors")

    mine, model = measured("mine")
    ours, reference = measured("ours", "strategy.name=fedism", "client.name=fedism", "client.args.alpha=0.0")
    assert mine["rounds"] == 2 and mine["failures"] == []
    assert set(mine["notes"]["weights"]) == set(mine["sites"])
    assert mine["notes"]["weights"] == pytest.approx(ours["notes"]["weights"], rel=1e-3)
    # Equal to 4e-8 after one round; then the weights enlarge the rounding of a small difference of losses.
    for name, value in reference.items():
        torch.testing.assert_close(model[name], value, rtol=1e-3, atol=5e-4)
