"""The page about a run: every part is there, nothing is fetched, nothing untrusted is markup, nobody is named."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import itertools
import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fedmed.errors import UserError
from fedmed.report import figures
from fedmed.report.page import communication, confusion, pictures, recipe, write_page
from fedmed.report.page.run_data import read_run
from fedmed.report.page.run_sites import weight_lines


def _load() -> ModuleType:
    """The module `page_fixture` (test folders are no packages, hence by path)."""
    spec = importlib.util.spec_from_file_location("page_fixture", Path(__file__).with_name("page_fixture.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


by_hand = _load()
SECTIONS = [
    "Summary", "Curves", "Sites beside each other", "Conditions and views", "Noisy sites", "Weights", "Communication",
    "Cases", "Confusion", "Data", "Configuration",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything, and the derived file it read."""
    folder = by_hand.make_run(tmp_path_factory.mktemp("page") / "run")
    by_hand.make_recipe(folder.parent / "cache")
    return folder


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    """Its page, with images."""
    return write_page(run).read_text()


@pytest.fixture(scope="module")
def page(text: str) -> Any:
    """The same, read."""
    return by_hand.Page(text)


# ---------------------------------------------------------------------- the page as a whole


def test_every_section_is_there_in_order(page: Any) -> None:
    assert page.headings[0] == (1, "by_hand")
    assert [title for level, title in page.headings if level == 2] == SECTIONS
    levels = [level for level, _ in page.headings]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_what_refers_finds_what_it_refers_to(page: Any, text: str) -> None:
    assert len(page.ids) == len(set(page.ids))
    named = [word for value in page.values("aria-labelledby") for word in value.split()]
    anchors = [value.removeprefix("#") for value in page.values("href")]
    drawn = re.findall(r"url\(#([^)]+)\)", text)
    assert named and anchors and drawn
    assert set(named + anchors + drawn) <= set(page.ids)
    assert all(value.startswith("#") for value in page.values("href"))


def test_nothing_is_fetched_and_the_policy_forbids_it(page: Any, text: str) -> None:
    assert all(value.startswith("data:image/") for value in page.values("src"))
    assert not re.search(r"(src|href|action|srcset|poster)\s*=\s*[\"']?\s*(https?:)?//", text)
    assert "@import" not in text and "url(http" not in text and "xmlns" not in text
    policy = next(v for tag, name, v in page.attributes if tag == "meta" and name == "content" and "default-src" in v)
    assert policy.startswith("default-src 'none'; ")
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.texts[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    # What the policy would block must not be there: styles and handlers in attributes.
    assert not [name for _, name, _ in page.attributes if name == "style" or name.startswith("on")]


def test_language_landmarks_tables_and_pictures_are_named(page: Any) -> None:
    tags = [tag for tag, _, _ in page.attributes]
    assert ("html", "lang", "en") in page.attributes
    assert "main" in tags and ("nav", "aria-label", "Sections") in page.attributes
    assert {v for tag, name, v in page.attributes if tag == "th" and name == "scope"} == {"col", "row"}
    images = [value for tag, name, value in page.attributes if tag == "img" and name == "alt"]
    assert len(images) == 9 and all(images)
    sizes = [name for tag, name, _ in page.attributes if tag == "img" and name in ("width", "height")]
    assert len(sizes) == 18  # nothing moves when an image is decoded


def test_figures_say_their_numbers(page: Any, text: str) -> None:
    roles = [tag for tag, name, value in page.attributes if name == "role" and value == "img"]
    assert len(roles) == 4  # loss, metric, bars, weights
    assert "Last values: north 0.800, south 0.700, west 0.600; mean of sites 0.700; central test, clean: 0.800" in text
    assert "bacc in the last evaluation: north 0.800, south 0.700, west 0.600; mean 0.700." in text


def test_numbers_of_the_summary(page: Any) -> None:
    words = "by_hand: 3 sites, 4 rounds. bacc is 0.700 on average over the sites and 0.600 at the worst, west; central test 0.800."
    assert words in page.text
    for part in ("worst site west (0.600)", "spread 0.200", "time 12.0 s", "judged by bacc (test/global)", "seed 3"):
        assert part in page.text
    assert "A run written by hand." in page.text and "has not finished" not in page.text


def test_same_bytes_twice(run: Path, tmp_path: Path) -> None:
    first, second = (write_page(run, tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_who_may_read_it(run: Path, tmp_path: Path) -> None:
    said: list[str] = []
    with_images = write_page(run, tmp_path / "a.html", say=said.append)
    assert with_images.stat().st_mode & 0o077 == 0 and any("patients" in line for line in said)
    said.clear()
    without = write_page(run, tmp_path / "b.html", images=False, say=said.append)
    assert without.stat().st_mode & 0o044 and said == []
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".html"]


def test_without_images_there_are_aggregates_only(run: Path, text: str, tmp_path: Path) -> None:
    found = write_page(run, tmp_path / "a.html", images=False).read_text()
    assert "data:image" not in found and "<img" not in found and "Images are left out of this page." in found
    assert [title for level, title in by_hand.Page(found).headings if level == 2] == SECTIONS
    assert text.count("data:image/jpeg;base64,") == 9  # three of each site
    for content in (text, found):
        assert "PATIENT" not in content and by_hand.ITEM not in content


# ---------------------------------------------------------------------- names nobody can trust


NASTY = ("<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "$x^2$ \x07& {{ 7*7 }}")


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run whose sites have such names."""
    folder = by_hand.make_run(tmp_path_factory.mktemp("nasty") / "run", NASTY, description="</style><script>x</script>")
    return write_page(folder).read_text()


def test_site_names_are_text(nasty: str) -> None:
    page = by_hand.Page(nasty)
    assert "<script>alert" not in nasty and "<img src=x" not in nasty
    assert nasty.count("<script>") == 1 and nasty.count("<style>") == 1
    for name in NASTY[:2]:
        assert name in page.text
    assert "{{ 7*7 }}" in page.text and "$x^2$" in page.text
    assert "\x07" not in re.sub(r"(?s)<pre.*?</pre>", "", nasty.split("<svg")[1].split("</svg>")[0])


# ---------------------------------------------------------------------- parts


def test_conditions_subsets_and_both_views(page: Any) -> None:
    assert "Clean and corrupted" in page.text and "central test, last round 0.800 0.500 0.650 0.300" in page.text
    assert "T1 0.400 T2 0.600 mean 0.500" in page.text
    assert "Global and personal view" in page.text and "south 0.700 0.750" in page.text


def test_noisy_sites_against_the_truth(page: Any) -> None:
    assert "truly noisy 1 0 truly clean 1 1" in page.text
    assert "precision 0.50 recall 1.00" in page.text
    assert "west clean noisy, wrong 0.000" in page.text


def test_weights_of_the_rule(page: Any) -> None:
    assert "weight in the new model" in page.text and "west 0.500 0.500" in page.text  # 3/6 beside 30/60 items
    assert "What else the rule noted, last value" in page.text and "west 0.200" in page.text


def test_shares_stand_in_for_weights(tmp_path: Path) -> None:
    folder = by_hand.make_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    kept = [r for r in lines if not (r["phase"] == "server" and "weights" in r["metrics"])]
    (folder / "history.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    found, what = weight_lines(read_run(folder))
    assert what == "share of the training items"
    assert found["north"] == {1: 10 / 60, 2: 10 / 40, 3: 10 / 60, 4: 10 / 60} and 2 not in found["south"]


def test_confusion_is_pooled(page: Any) -> None:
    assert "All 3 sites together (test items, global view)" in page.text
    assert "even 15 3 0 0.833 ragged 6 9 3 0.500 ringed 0 0 0 - precision 0.714 0.750 0.000" in page.text
    assert "Site by site" in page.text


def test_sensitivity_and_specificity_by_hand() -> None:
    found = {"task": "multilabel", "classes": ["a", "b"], "counts": np.array([[[8, 2], [1, 3]], [[0, 0], [0, 0]]])}
    table = confusion.counts_table("x", found)
    assert [list(row.cells) for row in table.rows] == [
        ["a", "3", "1", "2", "8", "0.750", "0.800"],
        ["b", "0", "0", "0", "0", "-", "-"],
    ]


@pytest.mark.parametrize("content", ['{"task": "classification"}', "[]", "no json", '{"task": "x", "classes": ["a"], "counts": [[1]]}',
                                     '{"task": "classification", "classes": ["a"], "counts": [[1, 2]]}'])  # fmt: skip
def test_broken_counts_are_left_out(tmp_path: Path, content: str) -> None:
    (tmp_path / "confusion.json").write_text(content)
    assert confusion.read_counts(tmp_path) is None


# ---------------------------------------------------------------------- what travelled


def record(round_number: int, phase: str, site: str | None, status: str = "ok") -> dict[str, Any]:
    """A record without numbers."""
    return {"round": round_number, "phase": phase, "site": site, "status": status}


def test_messages_by_hand() -> None:
    history = [
        record(1, "query", "a"), record(1, "train", "a"), record(1, "train", "b", "failed"), record(1, "train", "c", "empty"),
        record(1, "server", None), record(1, "evaluate", "a"), record(1, "central", None), record(1, "train", "all sites"),
    ]  # fmt: skip
    found = communication.messages(history, "separate")
    assert [(m[2], m[1], m[3], m[4]) for m in found] == [
        ("query", "a", False, False), ("train", "a", True, False), ("train", "b", False, True),
        ("train", "c", False, False), ("evaluate", "a", False, False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "scores", "evaluations"),
    [
        ("separate", [(1, "a"), (2, "a")], 2),
        ("before", [(1, "a"), (2, "a")], 1),  # the first rode on the training of round 2
        ("after", [(1, "a"), (2, "a"), (2, "a")], 1),  # one of each rode, the last is a message
    ],
)
def test_scores_that_ride_on_training_are_no_messages(
    mode: str, scores: list[tuple[int, str]], evaluations: int
) -> None:
    history = [record(t, "train", "a") for t in (1, 2)] + [record(t, "evaluate", s) for t, s in scores]
    phases = [m[2] for m in communication.messages(history, mode)]
    assert phases.count("train") == 2 and phases.count("evaluate") == evaluations


def test_bytes_of_the_run(page: Any) -> None:
    # 12 train messages (one failed), 12 evaluations; 4000 bytes each
    for part in (
        "one copy of the model 4.0 kB",
        "down 96.0 kB",
        "up 44.0 kB",
        "together 140.0 kB",
        "failed or dropped answers 1",
    ):
        assert part in page.text
    assert "south 8 32.0 kB 3 12.0 kB 1 4.0 s" in page.text
    assert "2 train south no answer within 5 s" in page.text
    assert "3 to 4 6 24.0 kB 3 12.0 kB 0" in page.text


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (2.5e6, "2.5 MB"), (7e12, "7000.0 GB")]
)
def test_amounts(size: float, words: str) -> None:
    assert communication.amount(size) == words


def test_without_a_checkpoint_the_size_is_an_upper_bound(tmp_path: Path) -> None:
    folder = by_hand.make_run(tmp_path / "run")
    for path in (folder / "checkpoint").rglob("*.safetensors"):
        path.unlink()
    assert communication.exchanged_bytes(read_run(folder)) == (by_hand.MODEL_BYTES, False)
    (folder / "model.safetensors").write_bytes(b"short")
    assert communication.exchanged_bytes(read_run(folder)) == (None, False)
    assert "only messages are counted" in write_page(folder).read_text()


# ---------------------------------------------------------------------- data


def test_recipe_of_the_derived_file(page: Any) -> None:
    assert "phantom-classification-0.h5 (sha256 abababababababab)" in page.text
    assert "dirichlet: alpha 2.0, num_clients 3" in page.text and "noisy_fraction 0.42" in page.text
    assert "south 10 yes 0.400" in page.text


def test_only_the_recipe_of_this_run_counts(tmp_path: Path) -> None:
    folder = by_hand.make_run(tmp_path / "run")
    by_hand.make_recipe(tmp_path / "cache", seed=4)
    by_hand.make_recipe(tmp_path / "cache", alpha=9.0)
    assert recipe.find_recipe(read_run(folder)) is None
    other = by_hand.make_recipe(tmp_path / "cache")
    assert recipe.find_recipe(read_run(folder)) is not None
    other.unlink()
    by_hand.make_recipe(tmp_path / "cache", sites=("elsewhere",))
    (tmp_path / "cache" / "phantom-classification-broken.h5").write_bytes(b"no file")
    assert recipe.find_recipe(read_run(folder)) is None


def test_the_file_is_gone(tmp_path: Path) -> None:
    folder = by_hand.make_run(tmp_path / "run")
    found = by_hand.Page(write_page(folder).read_text()).text
    assert "was not found any more" in found and "dirichlet: alpha 2.0" in found
    assert "south yes 0.400" in found  # the truth of the summary


@pytest.mark.parametrize(
    ("value", "words"),
    [(True, "yes"), (None, "-"), (0.25, "0.250"), (7, "7"), ("expansion", "expansion"), ("x" * 50, None), ([0.5, 1], "0.50, 1"), ([], "none"),
     (["PATIENT-0007"], None), ({"a": 1}, None), (list(range(9)), "0, 1, 2, 3, 4, 5, 6, 7, ...")],
)  # fmt: skip
def test_facts_for_a_table(value: Any, words: str | None) -> None:
    assert recipe.shown_fact(value) == words


# ---------------------------------------------------------------------- folders that are not whole


def test_without_matplotlib_the_page_says_so(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "available", lambda: False)
    said: list[str] = []
    page = by_hand.Page(write_page(run, tmp_path / "a.html", say=said.append).read_text())
    assert [title for level, title in page.headings if level == 2] == SECTIONS
    assert "fedmed[report]" in page.text and any("fedmed[report]" in line for line in said)
    assert not [value for _, name, value in page.attributes if name == "role" and value == "img"]
    assert "north 1.000 0.250 0.200 0.800" in page.text  # the curves as numbers


def test_a_run_that_has_not_finished(tmp_path: Path) -> None:
    folder = by_hand.make_run(tmp_path / "run")
    (folder / "summary.json").unlink()
    lines = (folder / "history.jsonl").read_text().splitlines()
    (folder / "history.jsonl").write_text("\n".join(lines[: len(lines) // 2]) + "\n")
    page = by_hand.Page(write_page(folder).read_text())
    assert "This run has not finished" in page.text and "2 rounds of 4" in page.text


def test_a_history_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text("")
    page = by_hand.Page(write_page(tmp_path).read_text())
    assert "Nothing was evaluated." in page.text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        write_page(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        write_page(tmp_path / "nowhere")
    folder = by_hand.make_run(tmp_path / "run")
    with pytest.raises(UserError, match="is a folder"):
        write_page(folder, tmp_path)
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("history.jsonl", b"\x89\x00 no text\n", "is not a text file"),
        ("summary.json", b"[]", "holds no keys and values"),
        ("model.json", b"[]", "holds no keys and values"),
        ("comparison.json", b"[1]", "is no comparison"),
        ("comparison.json", b"{}", "is no comparison"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    folder = by_hand.make_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} {said}"):
        write_page(folder)


# ---------------------------------------------------------------------- pictures


def test_segmentation_with_files_old_and_broken(tmp_path: Path, made_up: ModuleType) -> None:
    folder = by_hand.make_run(tmp_path / "run")
    for site in by_hand.SITES:
        (folder / "sites" / site / "examples.npz").unlink()
    made_up.make_overlay(folder / "sites" / "north" / "overlay.npz", num_cases=8)  # of old: without ranks, with names
    (folder / "sites" / "south" / "overlay.npz").write_bytes(b"broken")
    text = write_page(folder).read_text()
    page = by_hand.Page(text)
    assert text.count("data:image/jpeg") == 3 and "item_00" not in text
    assert "south: bacc 0.700, corrupted training data: the stored cases cannot be shown (UserError)." in page.text
    alt = next(value for _, name, value in page.attributes if name == "alt")
    assert alt.startswith("case 1: Dice 1.00: image; reference with 171 pixels of ragged")


@pytest.mark.parametrize("kept", [0, 100, 1000])
@pytest.mark.parametrize("name", ["overlay.npz", "examples.npz"])
def test_a_cut_off_file_costs_itself_only(tmp_path: Path, name: str, kept: int) -> None:
    folder = by_hand.make_run(tmp_path / "run")
    whole = (folder / "sites" / "north" / "examples.npz").read_bytes()
    (folder / "sites" / "south" / "examples.npz").unlink()
    (folder / "sites" / "south" / name).write_bytes(whole[:kept])
    text = write_page(folder).read_text()
    assert "the stored cases cannot be shown (UserError)" in text and text.count("data:image/jpeg") == 6


def test_what_the_coordinator_kept_of_its_own_file(tmp_path: Path) -> None:
    folder = by_hand.make_run(tmp_path / "run")
    shutil.copytree(folder / "sites" / "north", folder / "central")
    text = write_page(folder).read_text()
    assert by_hand.Page(text).text.count("Central test items") == 2 and text.count("data:image/jpeg") == 12
    assert "PATIENT" not in text


def test_worst_and_best_sites_are_shown_first() -> None:
    scores = {"a": 0.5, "b": 0.9, "c": 0.1, "d": 0.6, "e": float("nan")}
    assert pictures._extremes(scores, 2) == ["c", "e"]
    assert pictures._extremes({k: v for k, v in scores.items() if k != "e"}, 3) == ["b", "c", "d"]
    assert pictures._extremes(scores, 9) == ["a", "b", "c", "d", "e"]


def test_outline_is_inside_the_border_and_keeps_the_rest() -> None:
    image = np.full((48, 48, 3), 100, dtype=np.uint8)
    mask = np.zeros((48, 48), dtype=np.uint8)
    mask[12:36, 12:36] = 1
    mask[0:4] = 255
    tile = pictures._outlined(image, mask)  # 144 pixels a side: three per pixel
    yellow = (tile == pictures._OUTLINES[0]).all(axis=-1)
    assert yellow[36:38, 36:108].all() and yellow[106:108, 36:108].all()
    assert not yellow[:36].any() and not yellow[39:105, 39:105].any()
    assert (tile[0:12] == 50).all()


def test_modalities_become_tiles_of_their_own() -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    assert pictures._views(image, ["R", "G", "B"])[1] == ["image"]
    assert pictures._views(image, ["T1", "T2", "FLAIR"])[1] == ["T1", "T2", "FLAIR"]
    assert pictures._views(image[..., 0], [])[1] == ["image"]
    assert len(pictures._views(np.zeros((8, 8, 6), dtype=np.uint8), [])[0]) == pictures.MOST_CHANNELS
    five = pictures._picture([np.zeros((144, 144, 3), dtype=np.uint8)] * 5, "x", ["x"])
    assert (five.width, five.height) == (3 * 148 - 4, 2 * 148 - 4)


def test_many_sites_stay_small(tmp_path: Path) -> None:
    folder = by_hand.make_run(tmp_path / "run", tuple(f"site_{i:03d}" for i in range(40)))
    path = write_page(folder)
    text = path.read_text()
    assert text.count("data:image/jpeg") == 3 * pictures.MOST_SITES and "12 of 40 sites" in text
    assert path.stat().st_size < 1_500_000
