"""Site files for the tests with real processes: cut from real images where these are at hand, else synthetic ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import ROOT, Loopback, cut, loopback

from fedmed.data.phantom import make_phantom

REAL = ROOT.parent / "shared" / "data" / "ham10000_cls.h5"
NAMES = ("alpha", "beta", "gamma")


@pytest.fixture(scope="session")
def small_sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three synthetic sites of 24 images of 16 x 16 pixels."""
    folder = tmp_path_factory.mktemp("small")
    source = make_phantom(folder / "all.h5", "classification", num_sites=3, images_per_site=24, image_size=16)
    return cut(source, folder / "sites", NAMES)


@pytest.fixture(scope="session")
def real_sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three sites of dermatoscopic images, or synthetic ones where those are not at hand."""
    folder = tmp_path_factory.mktemp("real")
    source = REAL
    if not REAL.exists():
        source = make_phantom(folder / "all.h5", "classification", num_sites=3, images_per_site=60, image_size=32)
    return cut(source, folder / "sites", NAMES)


@pytest.fixture
def federation(tmp_path: Path, small_sites: dict[str, Path]) -> Iterator[Loopback]:
    """Three small sites; nothing runs yet."""
    with loopback(tmp_path / "federation", small_sites) as made:
        yield made
