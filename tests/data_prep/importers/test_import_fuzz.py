"""Imports of folders a third of whose files are broken in every way: the good ones come through, nothing else happens."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from fedmed.data.site_file import SiteFile

Run = Callable[..., Any]
JANE = "DOE_JANE_19700101"


def broken(content: bytes, rng: np.random.Generator) -> bytes:
    """The content cut, overwritten, filled up, emptied, repeated or replaced."""
    data = bytearray(content)
    how = rng.integers(7)
    if how == 0:
        return bytes(data[: rng.integers(0, len(data))])
    if how == 1:  # a few bytes of the header
        for place in rng.integers(0, min(64, len(data)), 6):
            data[place] = rng.integers(256)
    elif how == 2:  # a stretch anywhere
        start = int(rng.integers(len(data)))
        data[start : start + 40] = rng.bytes(40)
    elif how == 3:
        return b""
    elif how == 4:
        return rng.bytes(len(data))
    elif how == 5:
        return bytes(data[: len(data) // 2]) + bytes(data)
    else:
        return JANE.encode() * 20
    return bytes(data)


def spoil(files: list[Path], rng: np.random.Generator) -> None:
    """Break every third file; one becomes a folder, one a link to nowhere, one a pipe."""
    for number, path in enumerate(files[::3]):
        content = path.read_bytes()
        path.unlink()
        if number == 0:
            path.mkdir()
        elif number == 1:
            path.symlink_to(path.parent / "nowhere")
        elif number == 2:
            os.mkfifo(path)
        else:
            path.write_bytes(broken(content, rng))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_pictures(tmp_path: Path, importing: Run, suffix: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    source, good = tmp_path / "src", {}
    for number in range(45):
        for folder, ending in (("images", suffix), ("masks", "png")):
            path = source / folder / f"{JANE}_{number:02d}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            array = rng.integers(0, 256, (9, 11)) if folder == "images" else 255 * rng.integers(0, 2, (9, 11))
            Image.fromarray(array.astype(np.uint8)).save(path)
            good[path] = path.read_bytes()
    spoil(sorted((source / "images").iterdir()), rng)
    spoil(sorted((source / "masks").iterdir())[1:], rng)
    whole = [number for number in range(45) if all(
        (path := source / folder / f"{JANE}_{number:02d}.{ending}").is_file() and path.read_bytes() == good[path]
        for folder, ending in (("images", suffix), ("masks", "png"))
    )]  # fmt: skip
    outcome = importing("images", source, trace=str(tmp_path / "trace.csv"))
    with SiteFile.open(outcome.out) as file:
        found = file.site("out")
    trace = (tmp_path / "trace.csv").read_text()
    imported = [line for line in trace.splitlines() if ",imported," in line]
    assert len(found.image) == len(imported) >= len(whole) and 10 <= len(whole) < 30
    assert all(any(f"{JANE}_{number:02d}.{suffix}" in line for line in imported) for number in whole)
    assert JANE not in outcome.text and JANE.encode() not in outcome.out.read_bytes()
    assert "cannot be read (" not in outcome.text  # every way of being broken was foreseen


@pytest.mark.parametrize("seed", range(3))
def test_volumes(tmp_path: Path, importing: Run, seed: int) -> None:
    rng = np.random.default_rng(seed)
    source = tmp_path / "src"
    for folder in ("images", "masks"):
        (source / folder).mkdir(parents=True)
        for number in range(24):
            array = rng.integers(0, 2, (6, 7, 3)).astype(np.uint8)
            suffix = "nii.gz" if number % 2 else "nii"
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), source / folder / f"{JANE}_{number:02d}.{suffix}")
    spoil(sorted((source / "images").iterdir()), rng)
    spoil(sorted((source / "masks").iterdir())[1:], rng)
    bomb = source / "images" / "bomb.nii.gz"
    bomb.write_bytes(gzip.compress(bytes(5_000_000)))
    nibabel.save(nibabel.Nifti1Image(np.zeros((6, 7, 3), np.uint8), np.eye(4)), source / "masks" / "bomb.nii.gz")
    outcome = importing("nifti", source)
    with SiteFile.open(outcome.out) as file:
        assert file.sites[0].n >= 3 * 8 and file.image_size == (6, 7)
    assert JANE not in outcome.text and JANE.encode() not in outcome.out.read_bytes()
    assert "cannot be read (" not in outcome.text


def test_label_tables(tmp_path: Path, importing: Run) -> None:
    """Whatever a table holds, an import ends with a file or with an error that quotes no cell."""
    from fedmed.errors import UserError

    rng = np.random.default_rng(0)
    source = tmp_path / "src"
    (source / "images").mkdir(parents=True)
    for number in range(6):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(source / "images" / f"{number}.png")
    table = ("image,label,patient\n" + "".join(f"{n},{'ab'[n % 2]},{JANE}_{n}\n" for n in range(6))).encode()
    ended = 0
    for number in range(60):
        (source / "labels.csv").write_bytes(broken(table, rng) if number else table)
        try:
            text = importing("images", source, "labels=labels.csv", "group=patient", name=f"{number}.h5").text
            content = (tmp_path / "made" / f"{number}.h5").read_bytes()
            ended += 1
        except UserError as error:
            text, content = str(error), b""
        assert JANE not in text.replace("classes: ", "") or "classes: " in text
        assert f"{JANE}_".encode() not in content or "classes: " in text
    assert ended >= 5
