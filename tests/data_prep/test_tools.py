"""What is made of a site file: nothing is lost, patients stay together, the input stays as it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from data_prep.checks import examine
from data_prep.protocol import derive
from data_prep.tools import corrupt_file, phantom_file, split_file
from fedmed.config import DataConfig, StepConfig
from fedmed.data.phantom import make_phantom
from fedmed.data.site_file import SiteFile
from fedmed.data.writer import SiteArrays, write_site_file
from fedmed.errors import UserError
from fedmed.registry import CORRUPTIONS

Tool = Callable[..., int]


def quiet(*_: object) -> None:
    """A `say` that says nothing."""


def items(path: Path) -> list[tuple[str, str, int]]:
    """(item_id, split, sum of pixels) of every image, sorted."""
    with SiteFile.open(path) as file:
        sites = [file.site(info.name, allow_empty_train=True) for info in file.sites]
        return sorted(
            (site.item_id[row], split, int(np.asarray(site.image[row]).sum()))
            for site in sites
            for split, rows in site.splits.items()
            for row in rows
        )


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    """Two sites of 40 images, four of each patient; patient "shared" has four at both."""
    sites = []
    for index, name in enumerate(("north", "south")):
        rng = np.random.default_rng(index)
        group = [f"{name}-{row // 4}" if row >= 4 else "shared" for row in range(40)]
        label = np.repeat(np.arange(10) % 2, 4)
        image = rng.integers(0, 256, (40, 8, 8), dtype=np.uint8)
        splits = {"train": np.arange(40), "test": np.empty(0, int)}
        ids = [f"{name}/{row}" for row in range(40)]
        sites.append(SiteArrays(name, image, {"label": label}, splits, ids, group))
    meta = {"task": "classification", "classes": ["a", "b"], "channels": ["grey"], "image_size": [8, 8]}
    return write_site_file(tmp_path / "patients.h5", meta, sites)


def test_new_splits_keep_patients_together(patients: Path, tmp_path: Path) -> None:
    before = hashlib.sha256(patients.read_bytes()).hexdigest()
    out = tmp_path / "new" / "out.h5"
    assert split_file(str(patients), str(out), ratio="60/20/20", seed=3, say=quiet) == 0
    assert hashlib.sha256(patients.read_bytes()).hexdigest() == before
    assert [p.name for p in out.parent.iterdir()] == ["out.h5"]
    assert [item[::2] for item in items(out)] == [item[::2] for item in items(patients)]
    home: dict[str, set[str]] = {}
    with SiteFile.open(out) as file:
        for info in file.sites:
            assert (info.n_train, info.n_val, info.n_test) == (24, 8, 8)
            site = file.site(info.name)
            for split, rows in site.splits.items():
                for row in rows:
                    home.setdefault(site.group_id[row], set()).add(split)
                assert 0 < np.asarray(site.target)[rows].mean() < 1  # both classes in every split
        recipe = file.recipe
    assert len(home) == 19 and all(len(splits) == 1 for splits in home.values())  # "shared" too
    assert recipe is not None and recipe["split"] == "60/20/20" and recipe["source"]["sha256"] == before
    assert recipe["sites"][0] == {"site": "north", "n_train": 24, "n_val": 8, "n_test": 8}
    again = tmp_path / "again.h5"
    split_file(str(patients), str(again), ratio="60/20/20", seed=3, say=quiet)
    assert items(again) == items(out)
    split_file(str(patients), str(again), ratio="60/20/20", seed=4, force=True, say=quiet)
    assert items(again) != items(out)


def test_long_splits_become_datasets(patients: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.resplit.MAX_ATTRIBUTE", 10)
    for out in ("one.h5", "two.h5"):
        split_file(str(patients), str(tmp_path / out), ratio="70/10/20", say=quiet)
        patients = tmp_path / out  # a dataset is replaced, too
    with h5py.File(tmp_path / "two.h5") as file:
        assert "train_idx" in file["site_00"] and "train_idx" not in file["site_00"].attrs
    assert examine(tmp_path / "two.h5")[2].count("error") == 0


def test_clients_of_a_partition(patients: Path, tmp_path: Path) -> None:
    out, lines = tmp_path / "out.h5", list[str]()
    assert split_file(str(patients), str(out), ["alpha=5"], clients=3, by="dirichlet", seed=2, say=lines.append) == 0
    assert items(out) == items(patients)
    derived = derive(
        DataConfig(path=str(patients), partition=StepConfig("dirichlet", {"num_clients": 3, "alpha": 5})),
        2,
        tmp_path / "c",
    )
    assert items(derived) == items(out)
    with SiteFile.open(out) as file, SiteFile.open(derived) as other:
        assert [info.name for info in file.sites] == ["client_00", "client_01", "client_02"]
        assert file.recipe == other.recipe
    assert lines[0].split() == ["site", "images", "train", "val", "test"] and lines[-1] == f"wrote {out}"


@pytest.mark.parametrize(("clients", "sizes"), [(2, [40, 40]), (3, [20, 20, 40]), (5, [14, 13, 13, 20, 20])])
def test_natural_clients(patients: Path, tmp_path: Path, clients: int, sizes: list[int]) -> None:
    split_file(str(patients), str(tmp_path / "out.h5"), clients=clients, by="natural", say=quiet)
    with SiteFile.open(tmp_path / "out.h5") as file:
        assert [info.n for info in file.sites] == sizes


def test_separate_files_hold_a_site_each(tmp_path: Path) -> None:
    """Every byte that a site of the one file has, its own file has at the root."""
    source = make_phantom(tmp_path / "p.h5", "multimodal", num_sites=2, images_per_site=40, image_size=16)
    out, folder = tmp_path / "out.h5", tmp_path / "sites"
    split_file(str(source), str(out), ratio="50/25/25", separate=str(folder), say=quiet)
    assert sorted(p.name for p in folder.iterdir()) == ["phantom-00.h5", "phantom-01.h5"]
    with SiteFile.open(out) as file:
        for info in file.sites:
            path = folder / f"{info.name}.h5"
            assert examine(path)[2].count("error") == 0
            with SiteFile.open(path) as own:
                one, two = file.site(info.name), own.site(info.name)
                assert [site.group for site in own.sites] == [""] and own.recipe == file.recipe
            np.testing.assert_array_equal(one.image, two.image)
            np.testing.assert_array_equal(one.target, two.target)
            np.testing.assert_array_equal(one.extras["modality_present"], two.extras["modality_present"])
            assert one.item_id == two.item_id
            assert all(np.array_equal(one.splits[key], two.splits[key]) for key in one.splits)
    with pytest.raises(UserError, match="exists already"):
        split_file(str(source), str(tmp_path / "b.h5"), ratio="50/25/25", separate=str(folder), say=quiet)
    assert not (tmp_path / "b.h5").exists()


CORRUPTED: dict[str, tuple[str, list[str]]] = {
    "label_noise": ("classification", ["kind=random", "noisy_fraction=1"]),
    "contour_noise": ("segmentation", ["mean_high=4", "std=1"]),
    "image_quality": ("segmentation", ["kind=contrast", "num_corrupted=1"]),
    "dropped_annotation": ("segmentation", ["keep=[0.5]"]),
    "missing_classes": ("multilabel", ["annotation_num=2"]),
    "missing_modality": ("multimodal", ["rates=0.5"]),
    "weak_labels": ("segmentation", ["kind=[scribble,box]"]),
}


def test_every_corruption_has_a_case() -> None:
    assert set(CORRUPTED) == set(CORRUPTIONS)


@pytest.mark.parametrize("name", CORRUPTED)
def test_corrupting_is_what_a_run_does(tmp_path: Path, name: str) -> None:
    kind, words = CORRUPTED[name]
    source = make_phantom(tmp_path / "p.h5", kind, num_sites=2, images_per_site=40, image_size=16)
    out = tmp_path / "out.h5"
    assert corrupt_file(str(source), str(out), name, words, seed=5, say=quiet) == 0
    from fedmed.config import parse_overrides

    step = StepConfig(name, parse_overrides(words))
    derived = derive(DataConfig(path=str(source), corruption=step), 5, tmp_path / "cache")
    assert out.read_bytes() == derived.read_bytes()
    assert examine(out)[2].count("error") == 0
    with h5py.File(out) as file:
        assert json.loads(file.attrs["recipe"])["corruption"]["name"] == name


def test_phantom(tmp_path: Path) -> None:
    out, other = tmp_path / "a.h5", make_phantom(tmp_path / "b.h5", "multilabel", 2, [20, 30], image_size=16)
    words = ["num_sites=2", "images_per_site=[20,30]", "image_size=16"]
    assert phantom_file("multilabel", str(out), words, say=quiet) == 0
    assert items(out) == items(other)


WRONG: list[tuple[Tool, list[Any], dict[str, Any], str]] = [
    (split_file, ["in", "out"], {}, "either --ratio"),
    (split_file, ["in", "out"], {"ratio": "70/10/20", "by": "iid"}, "either --ratio"),
    (split_file, ["in", "out"], {"ratio": "70/10"}, "--ratio: expected three numbers"),
    (split_file, ["in", "out", ["alpha=1"]], {"ratio": "70/10/20"}, "takes no --clients"),
    (split_file, ["in", "out"], {"by": "idi"}, "did you mean 'iid'"),
    (split_file, ["in", "out", ["num_clients=2"]], {"by": "iid", "clients": 3}, "say the same thing"),
    (split_file, ["in", "out"], {"by": "natural", "clients": 1}, "at least 2, got 1"),
    (split_file, ["in", "out", ["alfa=1"]], {"by": "dirichlet"}, "unknown key 'dirichlet.alfa'; did you mean 'alpha'"),
    (split_file, ["in", "out"], {"ratio": "70/10/20", "seed": -1}, "--seed"),
    (split_file, ["in", "in"], {"ratio": "70/10/20", "force": True}, "expected the name of a file"),
    (split_file, ["absent", "out"], {"ratio": "70/10/20"}, "No site file"),
    (corrupt_file, ["in", "out", "label_nois"], {}, "did you mean 'label_noise'"),
    (corrupt_file, ["in", "out", "label_noise", ["kin=random"]], {}, "did you mean 'kind'"),
    (corrupt_file, ["in", "out", "contour_noise"], {}, "is for segmentation files"),
    (corrupt_file, ["in", "in", "label_noise"], {"force": True}, "expected the name of a file"),
    (phantom_file, ["segmentatio", "out"], {}, "did you mean 'segmentation'"),
    (phantom_file, ["segmentation", "out", ["num_site=2"]], {}, "did you mean 'num_sites'"),
    (phantom_file, ["segmentation", "out", ["num_sites=two"]], {}, "expected a whole number"),
    (phantom_file, ["segmentation", "out", ["difficulty=hard"]], {}, "expected a number"),
    (phantom_file, ["segmentation", "out", ["missing_contrasts=1"]], {}, "expected true or false"),
]


@pytest.mark.parametrize(("tool", "names", "options", "text"), WRONG)
def test_wrong_words_leave_nothing(
    patients: Path, tmp_path: Path, tool: Tool, names: list[Any], options: dict[str, Any], text: str
) -> None:
    before = hashlib.sha256(patients.read_bytes()).hexdigest()
    places = {"in": str(patients), "out": str(tmp_path / "out.h5"), "absent": str(tmp_path / "absent.h5")}
    with pytest.raises(UserError, match=text):
        tool(*[places.get(name, name) if isinstance(name, str) else name for name in names], **options, say=quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["patients.h5"]
    assert hashlib.sha256(patients.read_bytes()).hexdigest() == before


def test_a_file_in_the_way(patients: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    out.write_text("mine")
    for tool, words, options in (
        (split_file, [], {"ratio": "70/10/20"}),
        (corrupt_file, ["label_noise"], {}),
    ):
        with pytest.raises(UserError, match="--force replaces it"):
            tool(str(patients), str(out), *words, say=quiet, **options)  # type: ignore[operator]
    assert out.read_text() == "mine"
    corrupt_file(str(patients), str(out), "label_noise", force=True, say=quiet)
    assert SiteFile.open(out).task == "classification"


def test_a_derived_file_is_not_split_again(patients: Path, tmp_path: Path) -> None:
    split_file(str(patients), str(tmp_path / "s.h5"), ratio="70/10/20", say=quiet)
    corrupt_file(str(tmp_path / "s.h5"), str(tmp_path / "c.h5"), "label_noise", say=quiet)
    with pytest.raises(UserError, match="was derived with the splits it has"):
        split_file(str(tmp_path / "c.h5"), str(tmp_path / "d.h5"), ratio="70/10/20", say=quiet)
    assert not (tmp_path / "d.h5").exists()
