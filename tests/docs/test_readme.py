"""The Python code of the pages runs as it stands there, in an empty folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Runs of the guide are cut to a federation that takes a second; everything else is executed as printed.
_SMALL = (
    '"federation.rounds=2", "data.phantom={num_sites: 2, images_per_site: 10, image_size: 16}", "training.epochs=1"'
)


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md", "docs/site-files.md"])
def test_python_blocks_run(
    page: str,
    pages: dict[str, str],
    blocks: Callable[[str, str], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = blocks(pages[page], "python")
    assert found
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names: dict[str, Any] = {}
    for block in found:
        small = block.replace('"federation.rounds=2"', _SMALL) if page == "docs/guide.md" else block
        exec(compile(small, page, "exec"), names)
    assert capsys.readouterr().out.strip()
    if page == "README.md":
        assert names["summary"]["rounds"] == 3
        assert set(names["summary"]["sites"]) == {"hospital-0", "hospital-1"}
        assert (tmp_path / "runs" / "mine" / "model.safetensors").is_file()
        assert len(names["trained"].classes) == 2
