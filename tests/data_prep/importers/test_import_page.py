"""The commands of docs/importing.md have arguments and options that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from data_prep.importers.options import parse_size, read_words
from fedmed.registry import IMPORTERS, resolve

PAGE = Path(__file__).resolve().parents[3] / "docs" / "importing.md"
OPTIONS = {"--size", "--site", "--trace", "--secret", "--split", "--seed"}


def test_commands_of_the_page() -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [
        shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if "FORMAT" not in line
    ]
    imports = [line[3:] for line in lines if line[:3] == ["fedmed", "data", "import"]]
    assert {line[0] for line in imports} >= {"images", "nifti", "dicom", "medmnist"}
    for name, _, _, *rest in imports:
        assert name in IMPORTERS
        options = [word for word in rest if word.startswith("--")]
        assert set(options) <= OPTIONS
        values = [rest[rest.index(option) + 1] for option in options]
        if "--size" in options:
            assert parse_size(values[options.index("--size")])
        words = [word for word in rest if word not in options and word not in values]
        read_words(resolve("importer", name).Params, words, name)
