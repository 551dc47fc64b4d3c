"""From a configuration to the site file a run reads."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from fedmed.config import load_config
from fedmed.data.phantom import make_phantom
from fedmed.data.site_file import SiteFile
from fedmed.engines.prepare import cache_folder, count_sites, site_file, with_absolute_paths
from fedmed.errors import UserError


def test_a_source_that_was_rewritten_is_derived_anew(tmp_path: Path) -> None:
    source = tmp_path / "sites.h5"
    words = [
        f"data.path={source}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.partition={name: iid, args: {num_clients: 3}}",
    ]
    config = load_config("fedavg", words)
    make_phantom(source, "classification", num_sites=2, images_per_site=10, image_size=16, seed=0)
    first = site_file(config)
    assert site_file(config) == first and count_sites(first) == 3
    make_phantom(source, "classification", num_sites=2, images_per_site=12, image_size=16, seed=1)
    os.utime(source, ns=(1, 1))  # even where the clock is too coarse to tell
    second = site_file(config)
    assert second != first
    with SiteFile.open(second) as file:
        assert sum(site.n for site in file.sites) > 20


def test_paths_mean_the_same_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["data.path=a.h5", "evaluation.central=b.h5", "evaluation.local_only=d", "data.cache_dir=c", "out=runs/x"]
    config = load_config("fedavg", words)
    moved = with_absolute_paths(config)
    assert moved.evaluation.local_only == str(tmp_path / "d")
    assert with_absolute_paths(load_config("fedavg", words[3:])).evaluation.local_only is None
    assert moved.data.path == str(tmp_path / "a.h5") and moved.evaluation.central == str(tmp_path / "b.h5")
    assert moved.out == str(tmp_path / "runs" / "x") and moved.data.cache_dir == str(tmp_path / "c")
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o700  # it holds copies of images
    phantom = dataclasses.replace(config, data=dataclasses.replace(config.data, path="phantom:classification"))
    assert with_absolute_paths(phantom).data.path == "phantom:classification"


def test_no_data_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.path is empty"):
        site_file(load_config("fedavg", ["data.path=''", f"data.cache_dir={tmp_path}"]))


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(load_config("fedavg")) == (tmp_path / "fedmed").resolve()
