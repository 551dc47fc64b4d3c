"""Small site files for the tests of fedmed.data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from fedmed.data.writer import SiteArrays, write_site_file

META = {"task": "segmentation", "classes": ["background", "lesion"], "channels": ["R", "G", "B"], "image_size": [8, 8]}


def _make_site(name: str = "alpha", seed: int = 0, n: int = 10) -> SiteArrays:
    """n random RGB images of 8 x 8 with masks; 6 train, 1 validation, 3 test."""
    rng = np.random.default_rng(seed)
    return SiteArrays(
        name=name,
        image=rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8),
        annotations={"mask": rng.integers(0, 2, (n, 8, 8), dtype=np.uint8)},
        splits={"train": np.arange(n - 4), "val": np.array([n - 4]), "test": np.arange(n - 3, n)},
    )


@pytest.fixture
def make_site() -> Callable[..., SiteArrays]:
    """Maker of random segmentation sites: make_site(name, seed, n)."""
    return _make_site


@pytest.fixture
def meta() -> dict[str, object]:
    """Root attributes that fit the sites of `make_site`."""
    return dict(META)


@pytest.fixture
def seg_file(tmp_path: Path) -> Path:
    """Two segmentation sites, alpha and beta."""
    return write_site_file(tmp_path / "seg.h5", META, [_make_site("alpha", 0), _make_site("beta", 1)])


@pytest.fixture
def broken(seg_file: Path) -> Callable[[Callable[[h5py.File], None]], Path]:
    """Change the file of `seg_file` with a function and return its path."""

    def change(edit: Callable[[h5py.File], None]) -> Path:
        with h5py.File(seg_file, "r+") as file:
            edit(file)
        return seg_file

    return change


@pytest.fixture
def cls_file(tmp_path: Path) -> Path:
    """One classification site at the root of the file, grey images, labels 0..2."""
    path = tmp_path / "clinic.h5"
    rng = np.random.default_rng(3)
    with h5py.File(path, "w") as file:
        file.attrs.update({"task": "classification", "layout_version": "fedmed-data-1", "site_name": "clinic"})
        for key, value in {"classes": ["a", "b", "c"], "channels": ["CR"], "image_size": [8, 8]}.items():
            file.attrs[key] = json.dumps(value)
        file["image"] = rng.integers(0, 256, (9, 8, 8), dtype=np.uint8)
        file["label"] = np.array([0, 1, 2, 0, 1, 0, 0, 1, 2])
        for key, rows in {"train_idx": [0, 1, 2, 3, 4], "val_idx": [5], "test_idx": [6, 7, 8]}.items():
            file.attrs[key] = np.array(rows, dtype=np.int32)
    return path


@pytest.fixture(scope="session")
def public_folder() -> Path:
    """Folder with the public trial files; its tests are skipped where there is none."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("FEDMED_TEST_DATA", beside))
    if not sorted(folder.glob("*.h5")):
        pytest.skip("set FEDMED_TEST_DATA to the folder of the public trial files")
    return folder
