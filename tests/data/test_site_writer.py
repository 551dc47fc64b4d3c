"""Writing site files: round trip, long split lists, atomic replacement, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmed.data.site_file import SiteFile
from fedmed.data.writer import SiteArrays, write_site_file
from fedmed.errors import UserError


def test_round_trip(tmp_path: Path, make_site: Callable[..., Any], meta: dict[str, object]) -> None:
    site = make_site("ward 7", 2)
    site.item_id = [f"i{k}" for k in range(10)]
    site.group_id = [f"Fälle{k // 2}" for k in range(10)]
    site.extras = {"slice_no": np.arange(10)}
    site.attrs = {"natural_site": True}
    site.group = "site_07"
    path = write_site_file(tmp_path / "deep" / "a.h5", {**meta, "name": "trial", "citation": None}, [site])
    with SiteFile.open(path) as file:
        data = file.site("ward 7")
        assert file.sites[0].group == "site_07" and file.meta["name"] == "trial" and "citation" not in file.meta
        again = write_site_file(tmp_path / "b.h5", file.meta, [site])
    np.testing.assert_array_equal(data.image, site.image)
    np.testing.assert_array_equal(data.target, site.annotations["mask"])
    assert data.group_id[3] == "Fälle1" and data.item_id[3] == "i3"
    assert {k: v.tolist() for k, v in data.splits.items()} == {k: list(v) for k, v in site.splits.items()}
    with SiteFile.open(again) as file:
        assert file.meta["classes"] == ["background", "lesion"]


def test_long_splits_do_not_fit_an_attribute(tmp_path: Path) -> None:
    count = 40_000
    site = SiteArrays(
        name="large",
        image=np.zeros((count, 2, 2), np.uint8),
        annotations={"label": np.zeros(count, np.int64)},
        splits={"train": np.arange(20_000), "test": np.arange(20_000, count)},
    )
    meta = {"task": "classification", "classes": ["a", "b"], "channels": ["x"], "image_size": [2, 2]}
    with SiteFile.open(write_site_file(tmp_path / "l.h5", meta, [site])) as file:
        data = file.site("large")
        assert data.num_examples("train") == 20_000 and data.splits["test"][-1] == count - 1
        assert list(data.extras) == []


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, make_site: Callable[..., Any], meta: dict[str, object]
) -> None:
    path = write_site_file(tmp_path / "a.h5", meta, [make_site()])
    before = path.read_bytes()
    bad = make_site()
    bad.annotations = {"mask": np.zeros((9, 8, 8), np.uint8)}
    with pytest.raises(UserError, match="mask has 9 entries, image has 10"):
        write_site_file(path, meta, [bad])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.h5"]
    with pytest.raises(UserError, match="classes, channels"):
        write_site_file(path, {"task": "segmentation", "image_size": [8, 8]}, [make_site()])
