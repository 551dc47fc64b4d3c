"""Contact sheets are readable pictures of every kind of file."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmed.data.phantom import PHANTOM_KINDS, make_phantom

matplotlib = pytest.importorskip("matplotlib")


def test_one_row_a_site_for_every_kind(tmp_path: Path) -> None:
    from PIL import Image

    from fedmed.report.sheets import contact_sheet

    files = [
        make_phantom(tmp_path / f"{kind}.h5", kind, num_sites=2, images_per_site=12, image_size=16)
        for kind in PHANTOM_KINDS
    ]
    out = contact_sheet(files, tmp_path / "figures" / "sheet.png", per_site=4, tile=32)
    with Image.open(out) as picture:
        width, height = picture.size
    assert width > 4 * 32 and height > 8 * 32
    assert [p.name for p in out.parent.iterdir()] == ["sheet.png"]
    single = contact_sheet(files[0], tmp_path / "one.png", per_site=100, max_sites=1, tile=16)
    assert single.stat().st_size > 100
