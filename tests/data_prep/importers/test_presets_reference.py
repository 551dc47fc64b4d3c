"""Native samples of public sets, imported by the whole command path, against the reference site files: every value of every item, exactly.

Both lie in FEDMED_SAMPLES, or in shared/data beside the checkout; without them the tests are skipped.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]
FOLDER = Path(os.environ.get("FEDMED_SAMPLES") or ROOT.parent / "shared" / "data")
NAMES = ("item_id", "group_id")


@dataclass(frozen=True)
class Sample:
    """A native sample: importer, its arguments, folder, reference file, arrays compared, images in both, whether sites are to agree."""

    format: str
    words: Sequence[str]
    folder: str
    reference: str
    compared: set[str]
    images: int
    common: int
    sites: bool = True


SAMPLES = [
    Sample("ham10000", (), "raw_ham10000", "ham10000_seg.h5", {"image", "mask", "dx"}, 12, 12),
    Sample("ham10000", ("task=classification",), "raw_ham10000", "ham10000_cls.h5", {"image", "label"}, 12, 1),
    Sample("lgg", (), "raw_lgg", "lgg_mri.h5", {"image", "mask", "slice_no", "modality_present"}, 12, 12),
    Sample("acdc", (), "raw_acdc_scribble", "acdc_scribble.h5", {"image", "mask", "scribble"}, 12, 12),
    Sample("chase", (), "raw_chase", "chase_vessel.h5", {"image", "mask", "mask_rater2"}, 4, 4),
    Sample("chestxray14", (), "raw_nih_cxr", "nih_cxr.h5", {"image", "label", "view_position"}, 12, 12, sites=False),
]
IDS = [f"{sample.format}-{Path(sample.reference).stem}" for sample in SAMPLES]
Item = dict[str, Any]
Imported = tuple[
    Sample, dict[str, Item], dict[str, Item], Path
]  # sample, items of the reference, items by original name, file


def items_of(path: Path) -> dict[str, Item]:
    """Item by its id: its values, `group_id` and `site`."""
    found: dict[str, Item] = {}
    with h5py.File(path, "r") as file:
        groups = [file[key] for key in sorted(file) if key.startswith("site_")] or [file]
        for group in groups:
            ids = [name.decode() for name in group["item_id"][...]]
            columns = {name: group[name][...] for name in group if len(group[name]) == len(ids)}
            for row, name in enumerate(ids):
                found[name] = {key: column[row] for key, column in columns.items()}
                found[name] |= {"group_id": columns["group_id"][row].decode(), "site": group.attrs.get("site_name", "")}
    return found


def original(record: dict[str, str]) -> str:
    """Name an image has in the source, from a line of the trace."""
    path = Path(record["file"])
    return f"{path.parent.name}_{record['place']}" if record["place"] else path.stem


@pytest.fixture(params=SAMPLES, ids=IDS, scope="module")
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Imported:
    """Import a sample and read both files."""
    from data_prep.importers.run import import_data

    sample = request.param
    source, reference = FOLDER / sample.folder, FOLDER / sample.reference
    if not source.is_dir() or not reference.is_file():
        pytest.skip(f"no {sample.folder} and {sample.reference} here; set FEDMED_SAMPLES to a folder with them")
    tmp_path = tmp_path_factory.mktemp(sample.format)
    out, trace = tmp_path / "site.h5", tmp_path / "trace.csv"
    code = import_data(
        sample.format, str(source), str(out), sample.words, size=None, split="70/10/20", seed=0, secret=str(tmp_path / "key"),
        trace=str(trace), compression=0, workers=2, site=None, force=False, say=lambda _: None, note=lambda _: None, quiet=True,
    )  # fmt: skip
    assert code == 0
    with trace.open(encoding="utf-8", newline="") as stream:
        records = list(csv.DictReader(stream))
    assert {record["state"] for record in records} == {"imported"}
    by_id = items_of(out)
    return sample, items_of(reference), {original(record): by_id[record["item_id"]] for record in records}, out


def test_every_value_is_that_of_the_reference(imported: Imported) -> None:
    sample, reference, items, _ = imported
    common = sorted(items.keys() & reference.keys())
    assert (len(items), len(common)) == (sample.images, sample.common)
    for name in common:
        assert set(reference[name]) - {*NAMES, "site"} == sample.compared
        for key in sample.compared:
            found, expected = np.asarray(items[name][key]), np.asarray(reference[name][key])
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), key
            wrong = int((found != expected).sum())
            assert wrong == 0, f"{key}: {wrong} of {expected.size} values differ"


def test_groups_and_sites_are_those_of_the_reference(imported: Imported) -> None:
    sample, reference, items, _ = imported
    common = items.keys() & reference.keys()
    for key in ("group_id", "site") if sample.sites else ("group_id",):
        pairs = {(items[name][key], reference[name][key]) for name in common}
        assert len(pairs) == len({new for new, _ in pairs}) == len({old for _, old in pairs}), key


def test_no_name_of_the_source_is_in_the_file(imported: Imported) -> None:
    _, reference, items, out = imported
    content = out.read_bytes()
    names = {*items, *(reference[name]["group_id"] for name in items.keys() & reference.keys())}
    assert not [
        name for name in names if len(name) > 4 and name.encode() in content
    ]  # a number of two digits is anywhere


def test_the_file_opens_as_a_site_file(imported: Imported) -> None:
    from fedmed.data.site_file import SiteFile

    sample, _, _, out = imported
    with SiteFile.open(out) as file, h5py.File(FOLDER / sample.reference) as reference:
        assert file.task == reference.attrs["task"]
        assert list(file.classes) == json.loads(reference.attrs["classes"])
        assert sum(info.n for info in file.sites) == sample.images
        data = file.site(file.sites[0].name, allow_empty_train=True)
        if "scribble" in sample.compared:
            assert file.site(file.sites[0].name, annotation="scribble", allow_empty_train=True).ignore_value == 4
        assert len(data.item_id) == file.sites[0].n


def test_slices_of_a_case_are_chosen_as_in_the_reference() -> None:
    """The reference took up to 8 slices with tumour of a case; what it took says where tumour begins and ends. Those without show brain."""
    from data_prep.importers.presets.lgg import BRAIN, FLAIR, Lgg, LggParams

    path = FOLDER / "lgg_mri.h5"
    if not path.is_file():
        pytest.skip("no lgg_mri.h5 here; set FEDMED_SAMPLES to a folder with it")
    taken: dict[str, list[int]] = {}
    with h5py.File(path) as file:
        for group in file.values():
            tumour = group["mask"][...].any(axis=(1, 2))
            shown = (group["image"][...][~tumour][..., FLAIR] > BRAIN).mean(axis=(1, 2))
            assert (shown > LggParams().brain_fraction).all()
            for case, number in zip(group["group_id"][tumour], group["slice_no"][tumour], strict=True):
                taken.setdefault(case, []).append(int(number))
    importer = Lgg(path, LggParams(tumour_slices=8), None)
    assert len(taken) == 93
    for numbers in taken.values():
        first, last = min(numbers), max(numbers)
        masks = [np.ones((1, 1), dtype=np.uint8)] * (last - first + 1)
        assert [first + i for i in importer._chosen([], masks)] == sorted(numbers)
