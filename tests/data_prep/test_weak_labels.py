from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy import ndimage

from data_prep.corruption import TrainPool, WeakSite
from data_prep.corruption.weak_draw import (
    background_places,
    box_around,
    components,
    inner_distance,
    interior_pixel,
    largest_rectangle,
    longest_path,
    shaken,
    shrunk,
    thin,
)
from data_prep.corruption.weak_labels import KINDS, WeakLabels
from data_prep.corruption.weak_marks import (
    block_marks,
    box_labels,
    class_boxes,
    class_tags,
    drawn_boxes,
    filled_boxes,
    point_marks,
    scribble_marks,
)
from data_prep.protocol import derive, describe
from data_prep.seeding import Seed
from fedmed.config import load_config, params_from
from fedmed.data.site_file import SiteFile, read_truth
from fedmed.data.writer import SiteArrays, write_site_file
from fedmed.errors import UserError

EIGHT = np.ones((3, 3), dtype=bool)
EXACT = {"point": point_marks, "scribble": scribble_marks, "block": block_marks}  # every mark lies inside its class
CLASSES = 3


def scene(seed: int, size: int = 48) -> np.ndarray:
    """Smooth blobs of two classes, some of them nested, at the border, or very small."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.normal(size=(size, size)), 3)
    mask = np.digitize(field, np.quantile(field, (0.75, 0.9))).astype(np.uint8)
    mask[0, 0], mask[size - 1, size // 2], mask[size - 2 :, :3] = 1, 2, 2
    return mask


def extremes() -> dict[str, np.ndarray]:
    """Masks at the edge of what there is, (16, 16), and images one pixel wide."""
    empty = np.zeros((16, 16), dtype=np.uint8)
    dot, ring, corner, diagonal, nested = (empty.copy() for _ in range(5))
    dot[7, 3] = 2
    ring[3:13, 3:13], ring[6:10, 6:10] = 1, 0
    corner[:4, :4], corner[12:, 12:] = 1, 2
    diagonal[np.arange(16), np.arange(16)] = 1
    nested[2:14, 2:14], nested[5:11, 5:11] = 1, 2
    square = empty.copy()
    square[4:6, 4:6] = 1
    column = np.zeros((16, 1), dtype=np.uint8)
    column[4:9] = 1
    open_pixels = nested.copy()
    open_pixels[:, 8] = CLASSES
    return {
        "empty": empty, "dot": dot, "ring": ring, "corner": corner, "diagonal": diagonal, "nested": nested,
        "square": square, "column": column, "row": column.T.copy(), "full": empty + 1, "open": open_pixels,
        "all open": empty + 9, "one pixel": np.ones((1, 1), dtype=np.uint8), "free pixel": np.zeros((1, 1), np.uint8),
        "full but one": np.where(np.arange(256).reshape(16, 16) == 40, 0, 2).astype(np.uint8),
    }  # fmt: skip


MASKS = {**extremes(), **{f"scene {seed}": scene(seed) for seed in range(5)}}


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("name", MASKS)
def test_marks_lie_inside_and_reach_every_component(kind: str, name: str) -> None:
    mask = MASKS[name]
    before = mask.copy()
    marks = EXACT[kind](mask, CLASSES, np.random.RandomState(0))
    assert np.array_equal(mask, before)
    assert marks.dtype == np.uint8 and marks.shape == mask.shape and marks.max(initial=0) <= CLASSES
    drawn = marks < CLASSES
    assert np.array_equal(marks[drawn], mask[drawn])
    for label in range(1, CLASSES):
        parts, count = ndimage.label(mask == label, EIGHT)
        assert set(np.unique(parts[drawn & (parts > 0)])) == set(range(1, count + 1))
    assert (marks == 0).any() == (mask == 0).any()
    assert np.array_equal(marks, EXACT[kind](mask, CLASSES, np.random.RandomState(0)))


@pytest.mark.parametrize("name", MASKS)
def test_boxes_are_tight_around_their_objects(name: str) -> None:
    mask = MASKS[name]
    boxes = box_labels(mask, CLASSES, np.random.RandomState(0))
    assert np.array_equal(boxes == CLASSES, mask >= CLASSES)
    assert (boxes[(mask > 0) & (mask < CLASSES)] > 0).all()  # inside its own box, or a smaller one on top
    outside = np.ones(mask.shape, dtype=bool)
    for _, frame, _ in components(mask, CLASSES):
        outside[frame] = False
    assert ((boxes == 0) == (outside & (mask < CLASSES))).all()


def test_boxes_by_hand() -> None:
    mask = np.zeros((20, 20), dtype=np.uint8)
    mask[4:7, 2:6] = 1
    assert box_around(mask == 1) == (slice(4, 7), slice(2, 6))
    assert box_around(mask == 1, (1, 2, 3, 4)) == (slice(3, 8), slice(0, 9))  # 5 x 9 pixels
    assert box_around(mask == 1, (0, 0, 0, 0)) == (slice(4, 6), slice(2, 5))  # the end is exclusive
    assert mask[box_around(mask == 2)].size == 0 and mask[box_around(mask[:1] > 5)].size == 0
    one = np.zeros((5, 5), dtype=bool)
    one[2, 2] = True
    assert one[box_around(one, (0, 0, 0, 0))].size == 0 and one[box_around(one, (9, 9, 9, 9))].size == 25
    mask[10:12, 10:12] = 1
    rng = np.random.RandomState
    assert (box_labels(mask, 2, rng(0)) == 1).sum() == 12 + 4
    assert (box_labels(mask, 2, rng(0), "class") == 1).sum() == 8 * 10
    grown = box_labels(mask, 2, rng(0), margin=(1, 1))
    assert (grown == 1).sum() == 5 * 6 + 4 * 4
    for seed in range(5):
        loose = box_labels(mask, 2, rng(seed), margin=(0, 3))
        assert (loose[mask > 0] == 1).all() and (loose == 1).sum() <= (box_labels(mask, 2, rng(0), margin=(3, 3))).sum()


def test_nested_boxes_stay_visible() -> None:
    boxes = box_labels(MASKS["nested"], CLASSES, np.random.RandomState(0))
    assert (boxes == 2).sum() == 36 and (boxes == 1).sum() == 144 - 36


def test_boxes_are_drawn_as_they_always_were() -> None:
    """Checksums of the labels and of what the generator gives afterwards, made before class boxes were kept as well."""
    expected = {
        ("component", (0, 0)): 2235919980, ("component", (0, 3)): 3825480151, ("component", (1, 9)): 638375307,
        ("class", (0, 0)): 4073953726, ("class", (0, 3)): 2358677624, ("class", (1, 9)): 2685212479,
    }  # fmt: skip
    for (per, margin), code in expected.items():
        found = 0
        for seed, mask in enumerate(MASKS.values()):
            rng = np.random.RandomState(seed)
            found = zlib.crc32(box_labels(mask, CLASSES, rng, per, margin).data, found)
            found = zlib.crc32(rng.randint(0, 1000, 3).astype(np.int64).data, found)
        assert found == code, (per, margin)
    sites = WeakLabels(kind="box", margin_high=4).annotate(make_pool([item % 3 for item in range(9)]), Seed(0))
    given = [site.targets for site in sites if site.targets is not None]
    assert [zlib.crc32(labels.data) for labels in given] == [2654095237, 3335496973, 1057702604]


def test_class_boxes_by_hand() -> None:
    mask = np.zeros((20, 20), dtype=np.uint8)
    mask[4:7, 2:6], mask[10:12, 10:12], mask[5, 3] = 1, 1, 2
    for per in ("component", "class"):
        found = class_boxes(drawn_boxes(mask, 4, np.random.RandomState(0), per), 4)
        assert found.tolist() == [[0] * 4, [4, 12, 2, 12], [5, 6, 3, 4], [0] * 4] and found.dtype == np.int16
    grown = class_boxes(drawn_boxes(mask, 3, np.random.RandomState(0), margin=(9, 9)), 3)
    assert grown.tolist() == [[0] * 4, [0, 20, 0, 20], [0, 15, 0, 13]]
    assert class_boxes([], 3).tolist() == [[0] * 4] * 3


@pytest.mark.parametrize("per", ["component", "class"])
@pytest.mark.parametrize("name", MASKS)
def test_class_boxes_hold_what_was_drawn(name: str, per: str) -> None:
    """With the same draws: all pixels of the class and all its filled boxes lie inside, and touch every side."""
    mask = MASKS[name]
    boxes = drawn_boxes(mask, CLASSES, np.random.RandomState(1), per, (0, 3))
    labels = box_labels(mask, CLASSES, np.random.RandomState(1), per, (0, 3))
    assert np.array_equal(filled_boxes(mask, CLASSES, boxes), labels)
    for label, (top, bottom, left, right) in enumerate(class_boxes(boxes, CLASSES).tolist()):
        whole = np.zeros(mask.shape, dtype=bool)
        for found, box in boxes:
            whole[box] |= found == label
        drawn = np.argwhere(whole)
        assert bool(len(drawn)) == (0 < label < CLASSES and bool((mask == label).any()))
        if len(drawn):
            assert [top, left] == drawn.min(axis=0).tolist() and [bottom - 1, right - 1] == drawn.max(axis=0).tolist()
            inside = whole[top:bottom, left:right]
            assert inside.sum() == whole.sum() and not ((labels == label) & ~whole).any()
        else:
            assert [top, bottom, left, right] == [0] * 4


def test_points() -> None:
    mask = MASKS["corner"]
    single = point_marks(mask, CLASSES, np.random.RandomState(0), radius=0, background=2)
    assert [(single == label).sum() for label in range(CLASSES)] == [2, 1, 1]
    assert np.argwhere(single == 1).tolist() == [[1, 1]]  # as deep as three others, the first in reading order
    apart = ndimage.distance_transform_edt(mask == 0)
    assert (apart[single == 0] >= 0.1 * 16).all()
    more = point_marks(mask, CLASSES, np.random.RandomState(0), points=6, radius=0)
    assert 6 >= (more == 1).sum() >= 5 and more[1, 1] == 1
    assert (point_marks(mask, CLASSES, np.random.RandomState(0), points=99, radius=0)[mask == 1] == 1).all()
    assert not (point_marks(mask, CLASSES, np.random.RandomState(0), background=0) == 0).any()
    wide = point_marks(mask, CLASSES, np.random.RandomState(0), radius=50)
    assert np.array_equal(wide, mask)


def test_background_places() -> None:
    rng = np.random.RandomState(0)
    assert background_places(np.ones((4, 4)), 3, rng).shape == (0, 2)
    assert len(background_places(np.zeros((2, 2)), 9, rng)) == 4
    near = np.ones((40, 40), dtype=np.uint8)
    near[10:13, 10:13] = 0  # nothing as far as a tenth of the side: the farthest pixel
    assert background_places(near, 5, rng).tolist() == [[11, 11]]


def test_thinning_keeps_connected_and_thin() -> None:
    for name, mask in MASKS.items():
        for _, _, region in components(mask, CLASSES):
            line = thin(region)
            assert not (line & ~region).any() and line.any(), name
            assert ndimage.label(line, EIGHT)[1] == 1
            whole = ndimage.minimum_filter(np.pad(line, 1).astype(int), size=2)
            assert not whole.any() or line.sum() <= 4  # no block of 2 x 2 is left
    bar = np.ones((5, 21), dtype=bool)
    assert set(np.argwhere(thin(bar))[:, 0]) == {2} and thin(bar).sum() >= 15


def test_longest_path_by_hand() -> None:
    tee = np.zeros((7, 9), dtype=bool)
    tee[3, :], tee[3:6, 4] = True, True
    path = longest_path(tee)
    assert len(path) == 9 and set(path[:, 0].tolist()) == {3}
    assert (np.abs(np.diff(path, axis=0)).max(axis=1) == 1).all()
    circle = np.zeros((9, 9), dtype=bool)
    circle[1:8, 1:8], circle[2:7, 2:7] = True, False
    closed = longest_path(circle)
    assert len(closed) == circle.sum() == len(np.unique(closed, axis=0))  # all round
    assert longest_path(np.ones((1, 1), dtype=bool)).tolist() == [[0, 0]]


def test_scribbles_follow_the_middle() -> None:
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[10:19, 5:55] = 1
    full = scribble_marks(mask, 2, np.random.RandomState(0), fraction=1.0)
    rows, columns = np.nonzero(full == 1)
    assert set(rows) <= {13, 14, 15} and np.ptp(columns) > 35
    part = scribble_marks(mask, 2, np.random.RandomState(0), fraction=0.5)
    assert (full[part < 2] == part[part < 2]).all()
    for label in (0, 1):
        assert (part == label).sum() == pytest.approx(0.5 * (full == label).sum(), abs=1)
        assert ndimage.label(part == label, EIGHT)[1] == 1  # in one piece
    wide = scribble_marks(mask, 2, np.random.RandomState(0), fraction=1.0, width=3)
    assert (wide[full < 2] == full[full < 2]).all() and 2.5 < (wide == 1).sum() / (full == 1).sum() < 3.5
    distance = ndimage.distance_transform_edt(mask == 0)
    assert np.abs(distance[full == 0] - distance.max() / 2).max() <= 1.0


def test_round_objects_get_a_curve_and_rings_are_followed() -> None:
    rows, columns = np.mgrid[:64, :64] - 32
    radius = np.hypot(rows, columns)
    ball = (radius < 16).astype(np.uint8)
    marks = scribble_marks(ball, 2, np.random.RandomState(0), fraction=1.0)
    assert (marks == 1).sum() > 40 and np.abs(radius[marks == 1] - 8).max() < 2
    annulus = ((radius < 24) & (radius > 14)).astype(np.uint8)
    marks = scribble_marks(annulus, 2, np.random.RandomState(0), fraction=1.0)
    angles = np.arctan2(rows, columns)[marks == 1]
    assert np.histogram(angles, bins=8, range=(-np.pi, np.pi))[0].min() > 5


def test_noisy_scribbles_leave_their_class_a_little() -> None:
    path = np.stack([np.full(50, 20), np.arange(50)], axis=1)
    moved = shaken(path, 5.0, np.random.RandomState(0))
    reach = np.hypot(*(moved - path).T)
    assert 4 < reach.max() < 6 and np.abs(np.diff(moved, axis=0)).max() <= 3
    wrong, drawn = 0, 0
    for seed in range(5):
        mask = scene(seed)
        marks = scribble_marks(mask, CLASSES, np.random.RandomState(0), shake=3.0)
        wrong, drawn = wrong + (marks != mask)[marks < CLASSES].sum(), drawn + (marks < CLASSES).sum()
    assert 0 < wrong < 0.5 * drawn
    for mask in MASKS.values():  # also where there is no room to move
        marks = scribble_marks(mask, CLASSES, np.random.RandomState(0), shake=30.0)
        assert not (marks < CLASSES)[mask >= CLASSES].any()


def naive_rectangle(region: np.ndarray) -> int:
    height, width = region.shape
    areas = [
        (b - t) * (r - l)
        for t in range(height)
        for b in range(t + 1, height + 1)
        for l in range(width)  # noqa: E741
        for r in range(l + 1, width + 1)
        if region[t:b, l:r].all()
    ]
    return max(areas, default=0)


def test_largest_rectangle_is_the_largest() -> None:
    rng = np.random.default_rng(0)
    for share in (0.0, 0.3, 0.7, 0.95, 1.0):
        for shape in ((1, 1), (1, 7), (7, 1), (6, 8)):
            region = rng.random(shape) < share
            found = region[largest_rectangle(region)]
            assert found.all() and found.size == naive_rectangle(region)
    assert shrunk((slice(2, 10), slice(4, 5)), 0.5) == (slice(4, 8), slice(4, 5))
    assert shrunk((slice(0, 3), slice(0, 3)), 0.01) == (slice(1, 2), slice(1, 2))


def test_blocks_by_hand() -> None:
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[4:12, 4:20] = 1
    marks = block_marks(mask, 2, np.random.RandomState(0))
    assert np.argwhere(marks == 1).min(axis=0).tolist() == [6, 8] and (marks == 1).sum() == 4 * 8
    assert 0 < (marks == 0).sum() <= 36  # a square of the same area, rounded
    assert (block_marks(mask, 2, np.random.RandomState(0), share=1.0) == 1).sum() == 8 * 16
    assert (block_marks(np.zeros_like(mask), 2, np.random.RandomState(1)) == 0).sum() in range(4, 17)


def test_tags_and_interior() -> None:
    tags = class_tags(np.stack([MASKS["empty"], MASKS["full"], MASKS["nested"]]), CLASSES)
    assert tags.tolist() == [[1, 0, 0], [0, 1, 0], [1, 1, 1]] and tags.dtype == np.uint8
    assert class_tags(np.zeros((0, 4, 4)), 2).shape == (0, 2)
    assert interior_pixel(MASKS["dot"] == 2) == (7, 3)
    assert inner_distance(np.ones((3, 3), dtype=bool)).tolist() == [[1, 1, 1], [1, 2, 1], [1, 1, 1]]


def make_pool(clients: list[int], num_clients: int | None = None) -> TrainPool:
    masks = np.stack([scene(item) for item in range(len(clients))])
    masks[-1] = 0
    groups = np.array([f"case {item}".encode() for item in range(len(clients))])
    return TrainPool(masks, masks, np.array(clients), groups, num_clients or max(clients) + 1, CLASSES)


def test_kinds_are_dealt_in_turn_and_facts_are_realised() -> None:
    kinds = ["point", "scribble", "block", "box", "image", "none", "mask", "noisy_scribble"]
    pool = make_pool([item % 9 for item in range(18)], 10)
    sites = WeakLabels(kind=kinds).annotate(pool, Seed(0))
    for client, site in enumerate(sites):
        kind, masks = kinds[client % 8], pool.targets[pool.client == client]
        given = masks if site.targets is None else site.targets
        assert site.label_kind == site.facts["label_kind"] == kind and site.facts["is_noisy"] is False
        assert site.annotation == {"box": "box", "mask": "mask"}.get(kind, "scribble")
        assert (site.targets is None) == (kind == "mask")
        assert list(site.extras) == {"image": ["class_tags"], "box": ["class_boxes"]}.get(kind, [])
        drawn = given < CLASSES
        facts = site.facts
        assert facts["drawn_fraction"] == (pytest.approx(drawn.mean()) if len(masks) else 0.0)
        for label, share in enumerate(facts["drawn_per_class"]):
            whole = (masks == label).sum()
            assert share == pytest.approx((given == label).sum() / whole if whole else 0.0)
        assert facts["n_items_without_foreground_mark"] == sum(not (image % CLASSES).any() for image in given)
        if kind in ("point", "scribble", "block", "mask", "image", "none"):
            assert facts["noise_rate"] == 0.0
        elif len(masks):
            assert facts["noise_rate"] == pytest.approx((given != masks)[drawn].mean()) and facts["noise_rate"] > 0
    assert sites[4].extras["class_tags"].tolist() == [[1, 1, 1]] * 2
    assert sites[3].extras["class_boxes"].shape == (2, CLASSES, 4)
    assert sites[5].facts["drawn_fraction"] == 0.0 and sites[6].facts["drawn_fraction"] == 1.0
    assert sites[8].facts["n_items_without_foreground_mark"] == 1  # the empty mask
    assert sites[9].facts["drawn_fraction"] == 0.0 and sites[9].targets.shape == (0, 48, 48)


def same(one: WeakSite, two: WeakSite) -> bool:
    return one.targets is not None and two.targets is not None and np.array_equal(one.targets, two.targets)


@pytest.mark.parametrize("kind", ["point", "scribble", "noisy_scribble", "block", "box"])
def test_labels_depend_on_the_seed_and_on_no_other_client(kind: str) -> None:
    pool = make_pool([item % 3 for item in range(9)])
    weak = WeakLabels(kind=kind, margin_high=4)
    first = weak.annotate(pool, Seed(0))
    assert all(map(same, first, weak.annotate(pool, Seed(0))))
    assert not same(first[0], weak.annotate(pool, Seed(1))[0])
    fixed = replace(weak, seed=3)
    assert all(map(same, fixed.annotate(pool, Seed(0)), fixed.annotate(pool, Seed(1))))
    others = pool.client != 1
    changed = replace(pool, targets=np.where(others[:, None, None], 0, pool.targets).astype(np.uint8))
    assert same(weak.annotate(changed, Seed(0))[1], first[1])
    mixed = replace(weak, kind=["none", kind, "box"]).annotate(pool, Seed(0))
    assert same(mixed[1], first[1])


@pytest.mark.parametrize(
    "args",
    [
        {"kind": "scribbles"},
        {"kind": []},
        {"kind": ["point", "dots"]},
        {"points": 0},
        {"point_radius": -1},
        {"point_radius": float("nan")},
        {"background_points": -1},
        {"stroke_fraction": 0},
        {"stroke_fraction": 1.1},
        {"stroke_width": 2},
        {"stroke_width": 0},
        {"shake": 0},
        {"block_share": 0},
        {"box_per": "image"},
        {"margin_low": 2, "margin_high": 1},
        {"margin_low": -1},
        {"kinds": "point"},
    ],
)
def test_bad_parameters_are_user_errors(args: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"data\.corruption\.args"):
        params_from(WeakLabels, args, "data.corruption.args")


SMALL = ["data.phantom.num_sites=4", "data.phantom.images_per_site=20"]
NAME = "data.corruption.name=weak_labels"


def source(tmp_path: Path, scribbles: bool = True, ignore: int | None = None) -> Path:
    """Two sites of ten images; the first has scribbles of its own, drawn at one row."""
    masks = np.stack([scene(item) for item in range(10)])
    drawn = np.where(np.arange(48)[:, None] == 20, masks, CLASSES if ignore is None else ignore).astype(np.uint8)
    rows = np.arange(10)
    splits = {"train": rows[:6], "val": rows[6:7], "test": rows[7:]}
    sites = [
        SiteArrays("north", masks * 80, {"mask": masks, **({"scribble": drawn} if scribbles else {})}, splits),
        SiteArrays("south", masks * 80, {"mask": masks}, splits),
    ]
    meta = {"task": "segmentation", "classes": ["background", "a", "b"], "channels": ["grey"], "image_size": [48, 48]}
    if ignore is not None:
        meta["ignore_value"] = ignore
    return write_site_file(tmp_path / "source.h5", meta, sites)


def test_protocol_example_hides_the_masks_it_drew_from(tmp_path: Path) -> None:
    data = load_config("data/weak_labels", ["data.path=phantom:segmentation", *SMALL]).data
    path = derive(data, 0, tmp_path)
    truth, rows = read_truth(path), describe(path)
    kinds = ["scribble", "point", "block", "box"]
    assert [row["label_kind"] for row in rows] == kinds and [row["is_noisy"] for row in rows] == [False] * 4
    with SiteFile.open(path) as file, h5py.File(path) as raw:
        for site, kind, row in zip(file.sites, kinds, rows, strict=True):
            data_of_site = file.site(site.name)
            clean = raw[site.group]["reference/mask"][:]
            train = data_of_site.splits["train"]
            given = data_of_site.split("train").targets.numpy()
            assert data_of_site.label_kind == kind and data_of_site.ignore_value == 2
            assert not any(np.array_equal(one, two) for one, two in zip(given, clean[train], strict=True))
            if kind != "box":
                assert np.array_equal(given[given < 2], clean[train][given < 2])
                assert 0 < row["drawn_fraction"] < 0.2
            assert row["drawn_fraction"] == pytest.approx((given < 2).mean()) == truth[site.name]["drawn_fraction"]
            for split in ("val", "test"):  # scored against full masks
                kept = data_of_site.split(split).targets.numpy()
                assert np.array_equal(kept, clean[data_of_site.splits[split]]) and kept.max() == 1
            assert (data_of_site.read("mask")[train] == 2).all()  # nothing left to train on by accident
            with pytest.raises(UserError, match="withheld"):
                file.site(site.name, annotation="mask")
            weak = raw[site.group]["box" if kind == "box" else "scribble"][:]
            assert (np.delete(weak, train, 0) == 2).all()
            assert len({"scribble", "box"} & set(raw[site.group])) == 1
        central = file.site("central")
        assert central.label_kind == "mask" and central.split("test").targets.max() == 1


def test_protocol_with_every_kind_and_masks_that_stay(tmp_path: Path) -> None:
    path_of_source = source(tmp_path)
    for kind in KINDS:
        kinds = f"data.corruption.args.kind=[{kind},mask]"
        path = derive(load_config("fedavg", [f"data.path={path_of_source}", NAME, kinds]).data, 0, tmp_path)
        with SiteFile.open(path) as file, SiteFile.open(path_of_source) as before:
            weak, full = file.site("north"), file.site("south")
            assert full.label_kind == "mask" and full.ignore_value is None  # so that `supervised` reads it
            assert np.array_equal(full.target, before.site("south").target)
            assert np.array_equal(
                weak.split("test").targets.numpy(), before.site("north").split("test").targets.numpy()
            )
            assert weak.label_kind == {"keep": "scribble"}.get(kind, kind)
            train = weak.splits["train"]
            assert (weak.target[train] < CLASSES).any() == (kind not in ("image", "none"))
            if kind == "image":
                tags = weak.extras["class_tags"]
                assert np.array_equal(tags[train], class_tags(full.target[train], CLASSES))
                assert not np.delete(tags, train, 0).any()
            if kind == "box":
                around = weak.read("class_boxes")
                assert around.shape == (10, CLASSES, 4) and not np.delete(around, train, 0).any()
                for (top, bottom, left, right), mask in zip(around[train][:, 1], full.target[train], strict=True):
                    assert (mask == 1)[top:bottom, left:right].sum() == (mask == 1).sum()
            if kind == "keep":
                assert np.array_equal(weak.target, before.site("north", annotation="scribble").target)
                assert describe(path)[0]["drawn_fraction"] == pytest.approx(1 / 48)


def test_files_with_an_ignore_value_of_their_own(tmp_path: Path) -> None:
    path_of_source = source(tmp_path, ignore=255)
    for kind in ("point", "keep"):
        args = [f"data.path={path_of_source}", NAME, f"data.corruption.args.kind=[{kind},block]"]
        with SiteFile.open(derive(load_config("fedavg", args).data, 0, tmp_path)) as file:
            north, south = file.site("north"), file.site("south")
            assert (north.ignore_value, south.ignore_value) == (255 if kind == "keep" else CLASSES, CLASSES)
            assert set(np.unique(north.target)) == {0, 1, 2, north.ignore_value}
            assert (north.read("mask")[north.splits["train"]] == CLASSES).all()


def test_with_a_partition_and_shrinking(tmp_path: Path) -> None:
    steps = ["data.resize=24", "data.partition.name=iid", "data.partition.args.num_clients=3"]
    path_of_source = source(tmp_path, scribbles=False)
    data = load_config("fedavg", [f"data.path={path_of_source}", NAME, *steps]).data
    with SiteFile.open(derive(data, 0, tmp_path)) as file:
        assert [file.site(site.name).label_kind for site in file.sites] == ["scribble"] * 3
        assert file.site("central").split("test").targets.shape[1:] == (24, 24)


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    path = source(tmp_path)

    def derived(*words: str) -> Path:
        return derive(load_config("fedavg", [f"data.path={path}", NAME, *words]).data, 0, tmp_path)

    with pytest.raises(UserError, match="no scribble or box to keep"):
        derived("data.corruption.args.kind=keep")  # the second site has none
    for annotation in ("mask", "scribble"):
        with pytest.raises(UserError, match=r"data\.annotation=auto"):
            derived(f"data.annotation={annotation}")
    weak = derived()
    with pytest.raises(UserError, match="withheld"):
        derive(load_config("fedavg", [f"data.path={weak}", NAME]).data, 0, tmp_path)
    labels = ["data.path=phantom:classification", "data.phantom.num_sites=2", "data.phantom.images_per_site=20", NAME]
    with pytest.raises(UserError, match="WeakLabels is for segmentation"):
        derive(load_config("fedavg", labels).data, 0, tmp_path)
