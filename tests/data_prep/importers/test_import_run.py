"""The framework with an importer made up here: order, bytes, memory, what is skipped, what is said, what is left when it ends early."""

from __future__ import annotations

import _thread
import csv
import io
import json
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import pytest

from data_prep.importers import options, reading
from data_prep.importers.base import Entry, Header, Row, Skipped
from data_prep.importers.fit import FitImage
from data_prep.importers.options import parse_size, read_words
from data_prep.importers.progress import ImportProgress
from data_prep.importers.reading import read_in_order
from fedmed.data.formats.limits import BadFile
from fedmed.data.site_file import SiteFile
from fedmed.errors import UserError

Run = Callable[..., Any]
JANE = "DOE_JANE_19700101"


@dataclass(frozen=True)
class MadeUpParams(FitImage):
    """Arguments of the importer made up here."""

    number: int = 12
    place: str = "here"
    words: tuple[str, ...] = ()
    table: dict[str, int] | None = None
    secret_place: str | None = None

    PRIVATE: ClassVar[tuple[str, ...]] = ("secret_place",)


@dataclass
class Plan:
    """What the importer does; set by tests."""

    entries: list[Entry] = field(default_factory=list)
    header: Header = field(default_factory=lambda: Header("classification", ("a", "b"), ("grey",)))
    read: Callable[[Entry], Sequence[Row]] | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)
    running: int = 0
    most: int = 0


class MadeUp:
    """Images of 4 x 4 pixels with the number of their entry, in threads that finish in any order."""

    Params: ClassVar[type[MadeUpParams]] = MadeUpParams
    plan = Plan()

    def __init__(self, source: Path, params: MadeUpParams, size: tuple[int, int] | None) -> None:
        self.params = params

    def scan(self, skipped: Skipped) -> tuple[Header, Sequence[Entry]]:
        """The entries of the plan, the last first."""
        for file, reason in self.plan.skipped:
            skipped.add(file, reason)
        return self.plan.header, self.plan.entries[::-1]

    def read(self, entry: Entry) -> Sequence[Row]:
        """What the plan says, else one row after a random wait."""
        plan = self.plan
        if plan.read is not None:
            return plan.read(entry)
        number = int(entry.item)
        time.sleep(0.002 * (number % 3))
        return [Row({"image": np.full((4, 4), number, np.uint8)}, {"label": number % 2})]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A fresh plan of the importer `made_up`."""
    made = Plan([entry(number) for number in range(12)])
    monkeypatch.setattr(MadeUp, "plan", made)
    monkeypatch.setattr(options, "resolve", lambda kind, name: MadeUp)
    return made


def entry(number: int, site: str = "", group: str | None = None, **values: Any) -> Entry:
    """An entry whose names hold a patient's name."""
    item, file = f"{number:03d}", Path(f"/data/{JANE}/{number}.png")
    return Entry(site, item, f"{JANE}/{number // 2}" if group is None else group, (file,), **values)


def names_in(folder: Path) -> list[str]:
    """Names in a folder, none where there is no folder."""
    return [child.name for child in folder.iterdir()] if folder.exists() else []


def image(shape: tuple[int, ...] = (4, 4), dtype: str = "uint8", value: int = 0) -> dict[str, np.ndarray]:
    return {"image": np.full(shape, value, dtype)}


def test_rows_are_in_order_and_bytes_the_same_whatever_the_workers(plan: Plan, importing: Run, tmp_path: Path) -> None:
    first = importing("made_up", tmp_path, workers=1)
    images, labels = first.read("image", "label")
    assert first.code == 0 and images[:, 0, 0].tolist() == list(range(12)) and labels.tolist() == [0, 1] * 6
    for name, workers in (("again/out.h5", 1), ("four/out.h5", 4), ("many/out.h5", 9)):
        assert importing("made_up", tmp_path, name=name, workers=workers).out.read_bytes() == first.out.read_bytes()
    packed = importing("made_up", tmp_path, name="packed/out.h5", compression=3)
    assert np.array_equal(packed.read("image")[0], images)
    with SiteFile.open(first.out) as file:
        assert file.sites[0].name == "out" and file.image_size == (4, 4)
        assert file.site("out").image.shape == (12, 4, 4)


def test_groups_stay_in_one_split(plan: Plan, importing: Run, tmp_path: Path) -> None:
    outcome = importing("made_up", tmp_path)
    found = outcome.split_of()
    assert len(found) == 6 and all(len(splits) == 1 for splits in found.values())
    assert {next(iter(splits)) for splits in found.values()} >= {"train", "test"}
    assert sum(len(outcome.attrs()[f"{split}_idx"]) for split in ("train", "val", "test")) == 12


def test_no_name_reaches_file_or_terminal(plan: Plan, importing: Run, tmp_path: Path) -> None:
    plan.skipped = [(f"/data/{JANE}/x.png", "empty file")]

    def read(entry: Entry) -> Sequence[Row]:
        if entry.item == "003":
            raise BadFile("truncated")
        if entry.item == "004":
            raise RuntimeError(f"broken: {entry.files[0]}")
        return [Row(image(), {"label": 0})]

    plan.read = read
    outcome = importing("made_up", tmp_path, f"place=/data/{JANE}", f"secret_place={JANE}")
    assert outcome.noted[-4:] == [
        "3 files skipped (--trace FILE lists which):",
        "  1  cannot be read (RuntimeError)",
        "  1  empty file",
        "  1  truncated",
    ]
    for word in ("DOE", "JANE", "19700101", "/data"):
        assert word.encode() not in outcome.out.read_bytes() and word not in outcome.text


def test_ids_are_those_of_the_key(plan: Plan, importing: Run, tmp_path: Path) -> None:
    first = importing("made_up", tmp_path, secret=str(tmp_path / "a.key"))
    items, groups = first.read("item_id", "group_id")
    assert len(set(items)) == 12 and len(set(groups)) == 6 and all(re.fullmatch(rb"[0-9a-f]{16}", i) for i in items)
    plan.entries.pop()
    again = importing("made_up", tmp_path, name="again.h5", secret=str(tmp_path / "a.key"))
    other = importing("made_up", tmp_path, name="other.h5", secret=str(tmp_path / "b.key"))
    assert set(again.read("item_id")[0]) < set(items) and not set(other.read("item_id")[0]) & set(items)
    assert any("made the import key" in line for line in other.noted)
    assert not any("made the import key" in line for line in again.noted)
    importing("made_up", tmp_path, name="default.h5")
    assert stat.S_IMODE((tmp_path / "config" / "fedmed" / "import.key").stat().st_mode) == 0o600


def test_rows_that_do_not_fit_are_skipped_with_a_reason(plan: Plan, importing: Run, tmp_path: Path) -> None:
    odd: dict[str, list[Row]] = {
        "001": [Row(image((4, 5)), {"label": 0})],
        "002": [Row(image(dtype="uint16"), {"label": 0})],
        "003": [Row(image((4, 4, 3)), {"label": 0})],
        "004": [Row(image(dtype="int64"), {"label": 0})],
        "005": [Row(image(), {"label": 2})],
        "006": [Row(image(), {"label": 0.5})],
        "007": [Row(image(), {"label": 0, "age": 3})],
        "008": [Row(image(), {})],
        "009": [],
        "010": [Row(image(), {"label": 1}, 0), Row(image((5, 5)), {"label": 1}, 1)],
    }
    plan.read = lambda entry: odd.get(entry.item, [Row(image(), {"label": 0})])
    outcome = importing("made_up", tmp_path)
    assert len(outcome.read("image")[0]) == 2
    assert sorted(line.split("  ")[-1] for line in outcome.noted[-9:]) == [
        "3 channels, expected 1",
        "annotation or values unlike those of the images before",
        "another size than most images (--size brings all to one)",
        "label of another shape or type",
        "label that is no class",
        "no image in it",
        "no label",
        "pixels of type int64, which site files do not hold",
        "pixels of type uint16, those before are uint8",
    ]


def test_masks_are_checked_too(plan: Plan, importing: Run, tmp_path: Path) -> None:
    plan.header = Header("segmentation", ("background", "x"), ("grey",), {"ignore_value_in_mask": 9})

    def read(entry: Entry) -> Sequence[Row]:
        mask = np.zeros((4, 4), np.uint8)
        mask[0, :3] = {"000": (0, 1, 9), "001": (0, 2, 1), "002": (0, 9, 3)}.get(entry.item, (0, 1, 1))
        wrong = np.zeros((4, 5), np.uint8)
        scribble = np.full((4, 4), 2, np.uint8)
        return [Row({**image(), "mask": wrong if entry.item == "003" else mask, "scribble": scribble})]

    plan.read = read
    outcome = importing("made_up", tmp_path)
    assert len(outcome.read("mask")[0]) == 9
    assert outcome.noted[-2:] == ["  2  mask with values that are no class", "  1  mask and image differ in size"]


def test_pixels_that_are_no_numbers_are_skipped(plan: Plan, importing: Run, tmp_path: Path) -> None:
    plan.read = lambda entry: [Row({"image": np.full((4, 4), float(entry.item) or np.nan, "f4")}, {"label": 0})]
    outcome = importing("made_up", tmp_path)
    assert outcome.noted[-1] == "  1  pixels that are infinite or no numbers"


def test_the_most_frequent_size_rules(plan: Plan, importing: Run, tmp_path: Path, monkeypatch: Any) -> None:
    def size(entry: Entry) -> tuple[int, int]:
        if entry.item == "011":
            raise BadFile("damaged")
        return (4, 4) if int(entry.item) % 3 else (2, 2)

    plan.read = lambda entry: [Row(image(size(entry)), {"label": 0})]
    first = importing("made_up", tmp_path)
    assert first.read("image")[0].shape == (4, 2, 2)  # without a look: the first
    monkeypatch.setattr(MadeUp, "look", lambda self, entry: size(entry), raising=False)
    most = importing("made_up", tmp_path, name="most.h5")
    assert most.read("image")[0].shape == (7, 4, 4)
    assert json.loads(most.attrs()["image_size"]) == [4, 4]


def test_nothing_left_is_an_error_with_reasons_and_trace(plan: Plan, importing: Run, tmp_path: Path) -> None:
    def read(entry: Entry) -> Sequence[Row]:
        raise BadFile("truncated")

    plan.read = read
    with pytest.raises(UserError, match="nothing could be imported, 12 files were skipped:\n  12  truncated"):
        importing("made_up", tmp_path, trace=str(tmp_path / "trace.csv"))
    assert not (tmp_path / "made" / "out.h5").exists() and len((tmp_path / "trace.csv").read_text().splitlines()) == 13
    plan.entries, plan.skipped = [], [("a", "empty file")]
    with pytest.raises(UserError, match="1 files were skipped:\n  1  empty file"):
        importing("made_up", tmp_path)
    plan.skipped = []
    with pytest.raises(UserError, match="holds no file of this kind"):
        importing("made_up", tmp_path)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("how", ["in a worker", "in the terminal"])
def test_ctrl_c_leaves_nothing(plan: Plan, importing: Run, tmp_path: Path, workers: int, how: str) -> None:
    def read(entry: Entry) -> Sequence[Row]:
        if entry.item == "006" and how == "in a worker":
            raise KeyboardInterrupt
        if entry.item == "006":
            _thread.interrupt_main()
        time.sleep(0.005)
        return [Row(image(), {"label": 0})]

    plan.read = read
    old = tmp_path / "made" / "out.h5"
    old.parent.mkdir()
    old.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        importing("made_up", tmp_path, workers=workers, force=True, trace=str(tmp_path / "made" / "trace.csv"))
    assert names_in(old.parent) == ["out.h5"] and old.read_bytes() == b"old"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("import")]


def test_an_error_of_ours_leaves_nothing(plan: Plan, importing: Run, tmp_path: Path, monkeypatch: Any) -> None:
    plan.read = lambda entry: [Row(image())]
    plan.header = Header("segmentation", ("background", "x"), ("grey",))
    with pytest.raises(UserError, match="the source gives no annotation"):
        importing("made_up", tmp_path)
    assert names_in(tmp_path / "made") == []


def test_a_full_disk_is_said(plan: Plan, importing: Run, tmp_path: Path, monkeypatch: Any) -> None:
    from fedmed.data import site_writer

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(site_writer.SiteRows, "append", full)
    with pytest.raises(UserError, match=r"cannot write .*out\.h5: No space left on device"):
        importing("made_up", tmp_path)
    assert names_in(tmp_path / "made") == []


def test_the_trace_is_private_and_complete(plan: Plan, importing: Run, tmp_path: Path) -> None:
    plan.skipped = [("/data/note.txt", "no picture")]

    def read(entry: Entry) -> Sequence[Row]:
        if entry.item == "001":
            raise BadFile("truncated")
        return [Row(image(), {"label": 0}, place) for place in range(2)]

    plan.read = read
    plan.entries = [entry(number) for number in range(3)]
    plan.entries[2] = Entry("", "002", os.fsdecode(b"\xff"), (Path(os.fsdecode(b"/data/\xff.png")),))
    path = tmp_path / "trace.csv"
    outcome = importing("made_up", tmp_path, trace=str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and f"({path} lists which)" in outcome.text
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [(row["row"], row["place"], row["state"], row["reason"]) for row in rows] == [
        ("0", "0", "imported", ""), ("1", "1", "imported", ""), ("", "", "skipped", "truncated"), ("2", "0", "imported", ""),
        ("3", "1", "imported", ""), ("", "", "skipped", "no picture"),
    ]  # fmt: skip
    items = outcome.read("item_id")[0]
    assert [row["item_id"].encode() for row in rows if row["row"]] == items.tolist()
    assert rows[0]["file"] == f"/data/{JANE}/0.png" and rows[0]["group_id"] and rows[-1]["item_id"] == ""
    with pytest.raises(UserError, match=r"trace .* exists already"):
        importing("made_up", tmp_path, name="other.h5", trace=str(path))


def test_natural_sites_get_groups_of_their_own(plan: Plan, importing: Run, tmp_path: Path) -> None:
    plan.entries = [entry(number, site="south" if number % 2 else "north", group=str(number)) for number in range(12)]
    plan.entries += [entry(12, site="west", group=JANE), entry(13, site="west", group=JANE), entry(14, site="empty")]
    plan.read = lambda entry: [] if entry.site == "empty" else [Row(image(), {"label": 0})]
    outcome = importing("made_up", tmp_path)
    with SiteFile.open(outcome.out) as file:
        assert [(site.name, site.n, site.n_train) for site in file.sites] == [
            ("north", 6, 4),
            ("south", 6, 4),
            ("west", 2, 2),
        ]
    assert outcome.attrs("site_00")["natural_site"]
    assert "note: all images are of one group at west, so all of them are in train" in outcome.noted
    assert outcome.said[0].split() == ["site", "images", "groups", "train", "val", "test"]
    with pytest.raises(UserError, match="--site names the only site"):
        importing("made_up", tmp_path, name="b.h5", site="here")


def test_a_patient_of_two_sites_is_in_one_split(plan: Plan, importing: Run, tmp_path: Path) -> None:
    plan.entries = [entry(n, site="ab"[n % 2], group=f"p{n // 2}") for n in range(40)]
    outcome = importing("made_up", tmp_path)
    first, second = outcome.split_of("site_00"), outcome.split_of("site_01")
    assert first == second and len(first) == 20


def test_splits_of_the_source_are_kept(plan: Plan, importing: Run, tmp_path: Path) -> None:
    plan.entries = [entry(n, group=f"{n:02d}", split=("test", "val", "train")[n % 3]) for n in range(12)]
    outcome = importing("made_up", tmp_path, split="100/0/0")
    assert outcome.attrs()["test_idx"].tolist() == [0, 3, 6, 9] and outcome.attrs()["val_idx"].tolist() == [1, 4, 7, 10]
    plan.entries = [entry(n, group=str(n), split="test") for n in range(10)]
    dealt = importing("made_up", tmp_path, name="dealt.h5")
    assert "note: the source has one split only (test); its groups are dealt anew" in dealt.noted
    assert [len(dealt.attrs()[f"{split}_idx"]) for split in ("train", "val", "test")] == [7, 1, 2]


def test_names_of_the_only_site(plan: Plan, importing: Run, tmp_path: Path) -> None:
    names = []
    for options_, attrs in (({"site": "ward 7"}, {"name": "set"}), ({}, {"name": "set"}), ({}, {})):
        plan.header = Header("classification", ("a", "b"), ("grey",), attrs)
        names.append(importing("made_up", tmp_path, force=True, **options_).attrs()["site_name"])
    assert names == ["ward 7", "set", "out"]


def test_what_the_file_says_of_how_it_was_made(plan: Plan, importing: Run, tmp_path: Path) -> None:
    plan.header = Header(
        "classification",
        ("a", "b"),
        ("MR",),
        {"modality": "MR", "preprocessing": "cut", "licence": "CC0"},
        ("a remark",),
    )
    plan.read = lambda entry: [Row(image((8, 9)), {"label": 0})]
    outcome = importing("made_up", tmp_path, "place=/srv/x", "number=3", "words=p,q", "secret_place=x", size="8x9")
    attrs = outcome.attrs()
    assert (attrs["modality"], attrs["licence"], attrs["channels"]) == ("MR", "CC0", '["MR"]')
    assert "note: a remark" in outcome.noted
    made = json.loads(attrs["preprocessing"])
    assert made.pop("version") and made == {
        "format": "made_up", "size": [8, 9], "split": "70/10/20", "seed": 0, "steps": "cut",
        "arguments": {"fit": "stretch", "filter": "bilinear", "number": 3, "words": ["p", "q"], "table": None},
    }  # fmt: skip


def test_an_existing_file_needs_force(plan: Plan, importing: Run, tmp_path: Path) -> None:
    importing("made_up", tmp_path)
    with pytest.raises(UserError, match="exists already; --force replaces it"):
        importing("made_up", tmp_path)
    assert importing("made_up", tmp_path, force=True).code == 0
    with pytest.raises(UserError, match="expected the name of a file"):
        importing("made_up", tmp_path / "made" / "out.h5", force=True)
    with pytest.raises(UserError, match="no file or folder at"):
        importing("made_up", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"size": "big"}, "--size"), ({"size": "4"}, "--size"), ({"size": "99999"}, "--size"), ({"split": "1/2"}, "--split"),
        ({"workers": 0}, "--workers"), ({"compression": 10}, "--compression"), ({"seed": -1}, "--seed"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(plan: Plan, importing: Run, tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        importing("made_up", tmp_path, **given)


@pytest.mark.parametrize("name", ["", " ", "a\nb", "\x1b[31mred", "a\0b", "\u202eleft", "x" * 201])
def test_names_that_no_table_can_show_are_refused(plan: Plan, importing: Run, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"the name of a site .*expected 1 to 200 printable"):
        importing("made_up", tmp_path, site=name)
    plan.header = Header("classification", ("a", name), ("grey",))
    with pytest.raises(UserError, match="the name of a class") as error:
        importing("made_up", tmp_path)
    assert len(name) < 2 or name not in str(error.value)
    plan.header = Header("classification", ("Größe\u00a0> 2 <b>", "b"), ("grey",))
    assert importing("made_up", tmp_path, site="Nord-Ost 1").code == 0


def test_words_and_sources_that_cannot_be_meant(
    plan: Plan, importing: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"expected key=value .*got 'place'"):
        importing("made_up", tmp_path, "place")
    with pytest.raises(UserError, match="the name of the source is empty"):
        importing("made_up", "")
    loop = tmp_path / "loop.key"
    loop.symlink_to(loop)
    with pytest.raises(UserError, match="cannot read the import key"):
        importing("made_up", tmp_path, secret=str(loop))
    monkeypatch.setattr(options, "resolve", lambda kind, name: Path)
    with pytest.raises(UserError, match="is no importer; expected a class with Params"):
        importing("os:path", tmp_path)


def test_size_is_height_by_width() -> None:
    assert parse_size("128") == (128, 128) and parse_size("64x96") == (64, 96) and parse_size(None) is None


def test_words_are_read_as_their_types_say() -> None:
    words = ["number=3", "place=*/x [1]: {y}", "words=a, b", "table={0: 1}", "secret_place=null", "fit=pad"]
    params = read_words(MadeUpParams, words, "made_up")
    assert params == MadeUpParams("pad", "bilinear", 3, "*/x [1]: {y}", ("a", "b"), {"0": 1}, None)
    assert (
        read_words(MadeUpParams, ["words=[a]"], "m").words == ("a",)
        and read_words(MadeUpParams, ["words="], "m").words == ()
    )
    for word, said in (
        ("numbr=3", "did you mean 'number'"),
        ("number=x", "made_up.number"),
        ("fit=x", "stretch or pad"),
        ("x", "key=value"),
    ):
        with pytest.raises(UserError, match=said):
            read_words(MadeUpParams, [word], "made_up")


def test_few_entries_are_in_memory(plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[str] = []
    monkeypatch.setattr(reading, "attempt", lambda importer, header, entry, size: started.append(entry.item) or "none")
    entries = [entry(number) for number in range(100)]
    results = read_in_order(MadeUp(tmp_path, MadeUpParams(), None), plan.header, entries, 3)
    next(results)
    time.sleep(0.05)
    assert len(started) <= 12
    results.close()
    assert len(started) <= 12
    volumes = [Entry("", str(number), "", (), rows=200) for number in range(100)]
    started.clear()
    results = read_in_order(MadeUp(tmp_path, MadeUpParams(), None), plan.header, volumes, 3)
    next(results)
    time.sleep(0.05)
    assert len(started) <= 4
    results.close()
    for size, most in (((64, 64), 4 * 32), ((4096, 4096), 4)):  # batches of small images, single large ones
        started.clear()
        results = read_in_order(MadeUp(tmp_path, MadeUpParams(), None), plan.header, entries * 2, 3, size)
        next(results)
        time.sleep(0.05)
        assert len(started) <= most
        results.close()


def test_images_of_another_size_do_not_wait_in_memory(plan: Plan, tmp_path: Path) -> None:
    importer = MadeUp(tmp_path, MadeUpParams(), None)
    whole = reading.attempt(importer, plan.header, entry(0))
    assert not isinstance(whole, str)
    size = whole[0].arrays["image"].shape[:2]
    assert not isinstance(reading.attempt(importer, plan.header, entry(0), size), str)
    assert reading.attempt(importer, plan.header, entry(0), (size[0] + 1, size[1])) == reading.OTHER_SIZE


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("data_prep.importers.progress._SECONDS", 0.0)
    with ImportProgress(3, lines.append, quiet=False, bar=False) as progress:
        progress.step(1)
        progress.step(0)
    assert re.fullmatch(r"imported 2 of 3 files, \d+ images/s, 1 skipped", lines[1])
    with ImportProgress(3, lines.append, quiet=True, bar=False) as progress:
        progress.step(1)
    assert len(lines) == 2
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with ImportProgress(3, lines.append, quiet=False, bar=True) as progress:
        progress.step(2)
    assert "1/3 files" in screen.getvalue() and len(lines) == 2


def test_the_result_can_be_read_by_hdf5_alone(plan: Plan, importing: Run, tmp_path: Path) -> None:
    with h5py.File(importing("made_up", tmp_path).out, "r") as file:
        assert file.attrs["layout_version"] == "fedmed-data-1" and sorted(file) == [
            "group_id",
            "image",
            "item_id",
            "label",
        ]


def test_site_file_trace_and_key_are_three_files(plan: Plan, importing: Run, tmp_path: Path) -> None:
    key = tmp_path / "import.key"
    importing("made_up", tmp_path, secret=str(key))
    before = key.read_bytes()
    for given in ({"trace": str(key)}, {"secret": str(tmp_path / "made" / "x.h5"), "name": "x.h5"}):
        with pytest.raises(UserError, match="expected three different files"):
            importing("made_up", tmp_path, force=True, **{"secret": str(key), **given})
    assert key.read_bytes() == before


def test_patients_taken_for_sites_are_noticed(plan: Plan, importing: Run, tmp_path: Path) -> None:
    plan.entries = [entry(number, site=f"{JANE}_{number}") for number in range(201)]
    with pytest.raises(UserError, match="201 sites were found, at most 200") as error:
        importing("made_up", tmp_path)
    assert JANE not in str(error.value) and names_in(tmp_path / "made") == []


def test_quiet_says_the_result_only(plan: Plan, importing: Run, tmp_path: Path) -> None:
    plan.skipped = [("x", "empty file")]
    outcome = importing("made_up", tmp_path, quiet=True)
    assert outcome.said == [f"wrote {outcome.out}"] and outcome.noted[-1] == "  1  empty file"


def test_room_is_not_kept_for_slices_that_do_not_come(plan: Plan, importing: Run, tmp_path: Path) -> None:
    plan.entries = [Entry("", str(number), str(number), (Path("x"),), rows=1000) for number in range(4)]
    plan.read = lambda entry: [Row(image((64, 64)), {"label": 0}, 0)]
    assert importing("made_up", tmp_path).out.stat().st_size < 4 << 20
