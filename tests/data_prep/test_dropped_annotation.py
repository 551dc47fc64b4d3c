from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy import ndimage

from data_prep.corruption import Corrupted, TrainPool
from data_prep.corruption.dropped_annotation import (
    DEFAULT_KEEP,
    DroppedAnnotation,
    drop_components,
    keep_components,
    label_components,
    label_volume,
)
from data_prep.geometry import mask_dice
from data_prep.protocol import derive, describe
from data_prep.seeding import Seed
from fedmed.config import load_config, params_from
from fedmed.data.site_file import SiteFile, read_truth
from fedmed.data.writer import SiteArrays, write_site_file
from fedmed.errors import UserError


def squares(number: int, rng: np.random.Generator, size: int = 32) -> np.ndarray:
    """`number` separate 3x3 squares on a coarse grid."""
    mask = np.zeros((size, size), dtype=np.uint8)
    for place in rng.permutation((size // 4) ** 2)[:number]:
        row, column = divmod(int(place), size // 4)
        mask[4 * row : 4 * row + 3, 4 * column : 4 * column + 3] = 1
    return mask


def image_pool(numbers: list[int], clients: list[int], num_clients: int | None = None) -> TrainPool:
    rng = np.random.default_rng(0)
    masks = np.stack([squares(number, rng) for number in numbers])
    groups = np.array([f"case {item}".encode() for item in range(len(masks))])
    return TrainPool(masks, masks, np.array(clients), groups, num_clients or max(clients) + 1, 2)


def volume_pool(cases: int = 6, clients: int = 2) -> TrainPool:
    """Blobs that run over several slices; slice numbers 0-5 and, after a gap, 8-9."""
    rng = np.random.default_rng(1)
    places = np.array([0, 1, 2, 3, 4, 5, 8, 9])
    masks = []
    for _ in range(cases):
        field = ndimage.gaussian_filter(rng.normal(size=(len(places), 32, 32)), (0.8, 2, 2))
        masks.append((field > np.quantile(field, 0.85)).astype(np.uint8))
    targets = np.concatenate(masks)
    groups = np.repeat([f"p{case}".encode() for case in range(cases)], len(places))
    client = np.repeat(np.arange(cases) % clients, len(places))
    return TrainPool(targets, targets, client, groups, clients, 2, np.tile(places, cases))


def reordered(pool: TrainPool, order: np.ndarray) -> TrainPool:
    slices = None if pool.slices is None else pool.slices[order]
    return replace(
        pool,
        images=pool.images[order],
        targets=pool.targets[order],
        client=pool.client[order],
        groups=pool.groups[order],
        slices=slices,
    )


def assert_whole(components: np.ndarray, count: int, given: np.ndarray) -> int:
    """Each component is kept whole or removed whole; the number that stayed."""
    kept = 0
    for number in range(1, count + 1):
        inside = given[components == number]
        assert inside.all() or not inside.any()
        kept += bool(inside.all())
    assert not given[components == 0].any()
    return kept


def test_neighbours_are_by_face_and_order_is_by_first_pixel():
    mask = np.array([[0, 0, 0, 1], [1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]], dtype=np.uint8)
    components, count = label_components(mask[None], 2)
    assert count == 3 and components.dtype == np.int32
    assert components[0].tolist() == [[0, 0, 0, 1], [2, 0, 2, 0], [2, 2, 2, 0], [0, 0, 0, 3]]
    assert label_components(np.zeros((1, 4, 4), np.uint8), 2)[1] == 0
    assert label_components(np.ones((1, 4, 4), np.uint8), 2)[1] == 1


def test_touching_classes_stay_apart_and_other_values_are_no_class():
    mask = np.array([[2, 2, 1, 255], [1, 1, 1, 255]], dtype=np.uint8)
    components, count = label_components(mask[None], 3)
    assert count == 2 and components[0].tolist() == [[2, 2, 1, 0], [1, 1, 1, 0]]


def test_numbers_agree_with_a_naive_search():
    rng = np.random.default_rng(3)
    stack = (rng.random((4, 9, 7)) < 0.4).astype(np.uint8) * rng.integers(1, 3, (4, 9, 7)).astype(np.uint8)
    naive, count = np.zeros(stack.shape, np.int32), 0
    for label in (1, 2):
        for start in np.argwhere(stack == label):
            if naive[tuple(start)]:
                continue
            count += 1
            front = [tuple(start)]
            while front:
                here = front.pop()
                if not all(0 <= p < n for p, n in zip(here, stack.shape, strict=True)):
                    continue
                if stack[here] != label or naive[here]:
                    continue
                naive[here] = count
                for axis in range(3):
                    for step in (-1, 1):
                        front.append(tuple(p + step * (a == axis) for a, p in enumerate(here)))
    components, found = label_components(stack, 3)
    assert found == count and np.array_equal(components, naive)


def test_a_gap_in_the_slice_numbers_separates():
    stack = np.ones((4, 2, 2), dtype=np.uint8)
    for places, step, expected in (
        ([1, 2, 3, 4], 1, [1, 1, 1, 1]),
        ([1, 2, 4, 5], 1, [1, 1, 2, 2]),
        ([1, 2, 4, 5], 2, [1, 1, 1, 1]),
        ([1, 3, 5, 9], 1, [1, 2, 3, 4]),
    ):
        components, count = label_volume(stack, 2, np.array(places), step)
        assert components[:, 0, 0].tolist() == expected and count == max(expected)
    shifted = np.stack([np.eye(2), 1 - np.eye(2)]).astype(np.uint8)  # diagonal neighbours in and across slices
    assert label_volume(shifted, 2, np.array([0, 1]))[1] == 4
    assert label_volume(stack[:1], 2, np.array([7]))[1] == 1


def test_rules_by_hand():
    rng = np.random.RandomState
    draws = rng(0).uniform(size=10)
    assert np.array_equal(keep_components(10, 0.6, "independent", rng(0)), draws < 0.6)
    for rate, kept in ((0.0, 0), (0.01, 1), (0.5, 5), (0.7, 7), (0.71, 8), (1.0, 10)):
        assert keep_components(10, rate, "exact", rng(0)).sum() == kept
    assert keep_components(1, 0.1, "exact", rng(0)).all()  # rounded up: the only one stays
    for rate in (0.0, 0.5, 1.0):
        assert keep_components(10, rate, "single", rng(0)).sum() == 1
    for rule in ("independent", "exact", "single"):
        state = rng(0)
        assert keep_components(0, 0.5, rule, state).shape == (0,)
        assert state.uniform() == rng(0).uniform()  # nothing was drawn


@pytest.mark.parametrize("rule", ["exact", "single"])
def test_choice_is_uniform(rule):
    rng = np.random.RandomState(0)
    times = np.sum([keep_components(4, 0.25, rule, rng) for _ in range(2000)], axis=0)
    assert times.sum() == 2000 and np.abs(times - 500).max() < 4 * np.sqrt(2000 * 0.25 * 0.75)


def test_small_components_stay_and_do_not_count():
    mask = np.zeros((1, 8, 8), dtype=np.uint8)
    mask[0, 0, 0] = 1
    mask[0, 3:6, 3:6] = 1
    components, count = label_components(mask, 2)
    given, found, gone = drop_components(mask, components, count, 0.0, "independent", np.random.RandomState(0), 2)
    assert (found, gone) == (1, 1) and given.sum() == 1 and given[0, 0, 0] == 1
    given, found, gone = drop_components(mask, components, count, 0.0, "single", np.random.RandomState(0), 10)
    assert (found, gone) == (0, 0) and np.array_equal(given, mask)


@pytest.mark.parametrize("rule", ["independent", "exact", "single"])
@pytest.mark.parametrize("kind", ["2d", "3d"])
def test_components_stay_whole_or_go_whole(rule, kind):
    pool = image_pool([5, 1, 0, 8, 3, 6], [0, 0, 0, 1, 1, 1]) if kind == "2d" else volume_pool()
    noise = DroppedAnnotation(keep=(0.5, 0.7), rule=rule, connectivity=kind)
    result = noise.apply(pool, Seed(0))
    assert result.targets.dtype == pool.targets.dtype and (result.targets <= pool.targets).all()
    assert not np.shares_memory(result.targets, pool.targets)
    totals = np.zeros((2, 2), dtype=int)
    cases = [[item] for item in range(len(pool.client))]
    if kind == "3d":
        cases = [np.flatnonzero(pool.groups == group) for group in np.unique(pool.groups)]
    for case in cases:
        if kind == "2d":
            components, count = label_components(pool.targets[case], 2)
        else:
            components, count = label_volume(pool.targets[case], 2, pool.slices[case])
        kept = assert_whole(components, count, result.targets[case])
        client = pool.client[case[0]]
        totals[client] += count, count - kept
        if rule == "single":
            assert kept == min(count, 1)
        if rule == "exact":
            assert kept == np.ceil((0.5, 0.7)[client] * count)
    for client, facts in enumerate(result.facts):
        count, gone = totals[client]
        assert (facts["n_components"], facts["n_dropped"]) == (count, gone)
        assert facts["completeness"] == pytest.approx(1 - gone / count)
        assert facts["noise_rate"] == pytest.approx(gone / count) and facts["is_noisy"] == (gone > 0)
        assert facts.get("keep_rate") == (None if rule == "single" else (0.5, 0.7)[client])


def test_a_lesion_over_several_slices_goes_everywhere_at_once():
    pool = volume_pool()
    flat = DroppedAnnotation(keep=(0.5,)).apply(pool, Seed(0)).facts[0]["n_components"]
    deep = DroppedAnnotation(keep=(0.5,), connectivity="3d").apply(pool, Seed(0)).facts[0]["n_components"]
    joined = DroppedAnnotation(keep=(0.5,), connectivity="3d", max_slice_step=3).apply(pool, Seed(0)).facts[0]
    assert flat > deep > joined["n_components"] > 3


def test_ends_of_the_range_of_rates():
    for kind, pool in (("2d", image_pool([5, 1, 0, 8], [0, 0, 1, 1])), ("3d", volume_pool())):
        for rule in ("independent", "exact"):
            complete = DroppedAnnotation(keep=(1.0,), rule=rule, connectivity=kind).apply(pool, Seed(0))
            assert np.array_equal(complete.targets, pool.targets)
            assert all(f["completeness"] == f["mean_dice"] == 1.0 and not f["is_noisy"] for f in complete.facts)
            empty = DroppedAnnotation(keep=(0.0,), rule=rule, connectivity=kind).apply(pool, Seed(0))
            assert not empty.targets.any()
            assert all(f["completeness"] == 0.0 and f["dropped_pixel_fraction"] == 1.0 for f in empty.facts)


def test_less_is_part_of_more():
    pool = image_pool([9] * 20, [0] * 20)
    for rule in ("independent", "exact"):
        masks = [
            DroppedAnnotation(keep=(rate,), rule=rule).apply(pool, Seed(0)).targets
            for rate in (0.0, 0.3, 0.31, 0.8, 1.0)
        ]
        assert all((low <= high).all() for low, high in pairwise(masks))


def test_share_is_as_asked_within_binomial_bounds():
    pool = image_pool([10] * 120, [item % 4 for item in range(120)])
    for facts, rate in zip(DroppedAnnotation().apply(pool, Seed(5)).facts, DEFAULT_KEEP, strict=True):
        assert facts["keep_rate"] == rate and facts["n_components"] == 300
        assert abs(facts["completeness"] - rate) <= 4 * np.sqrt(rate * (1 - rate) / 300)


def test_facts_of_images_with_one_lesion():
    pool = image_pool([1] * 40 + [0] * 5, [0] * 45)
    result = DroppedAnnotation(keep=(0.4,)).apply(pool, Seed(0))
    (facts,) = result.facts
    lost = int((result.targets[:40].sum(axis=(1, 2)) == 0).sum())
    assert 0 < lost < 40 and facts["n_emptied"] == facts["n_dropped"] == lost
    assert facts["completeness"] == pytest.approx(1 - lost / 40)
    assert facts["dropped_pixel_fraction"] == pytest.approx(lost / 40)
    scores = [mask_dice(a, b) for a, b in zip(pool.targets, result.targets, strict=True)]
    assert facts["mean_dice"] == pytest.approx(np.mean(scores)) == pytest.approx(1 - lost / 45)
    assert DroppedAnnotation(keep=(0.4,), rule="exact").apply(pool, Seed(0)).facts[0]["n_dropped"] == 0


def test_clients_without_items_or_lesions():
    pool = image_pool([0, 0, 3], [0, 0, 2], num_clients=4)
    facts = DroppedAnnotation(keep=(0.0,)).apply(pool, Seed(0)).facts
    for client in (0, 1, 3):
        expected = {"completeness": 1.0, "mean_dice": 1.0, "n_components": 0, "n_dropped": 0, "is_noisy": False}
        assert {key: facts[client][key] for key in expected} == expected
        assert facts[client]["dropped_pixel_fraction"] == facts[client]["noise_rate"] == 0.0
    assert facts[2]["n_emptied"] == 1 and facts[2]["is_noisy"]


def test_rates_are_repeated_or_drawn():
    pool = image_pool([3] * 10, list(range(10)))
    asked = [facts["keep_rate"] for facts in DroppedAnnotation(keep=(0.2, 0.5, 0.9)).apply(pool, Seed(0)).facts]
    assert asked == [0.2, 0.5, 0.9] * 3 + [0.2]
    drawn = [f["keep_rate"] for f in DroppedAnnotation(keep_low=0.3, keep_high=0.7).apply(pool, Seed(0)).facts]
    assert len(set(drawn)) == 10 and min(drawn) >= 0.3 and max(drawn) <= 0.7
    assert drawn[:4] == [
        facts["keep_rate"]
        for facts in DroppedAnnotation(keep_low=0.3, keep_high=0.7)
        .apply(image_pool([3] * 4, list(range(4))), Seed(0))
        .facts
    ]


def same(one: Corrupted, two: Corrupted) -> bool:
    return np.array_equal(one.targets, two.targets) and one.facts == two.facts


def test_masks_depend_on_the_seed_and_on_no_other_client():
    pool = image_pool([6] * 12, [0, 1, 2] * 4)
    noise = DroppedAnnotation(keep_low=0.2, keep_high=0.8)
    first = noise.apply(pool, Seed(0))
    assert same(first, noise.apply(pool, Seed(0)))
    assert not np.array_equal(first.targets, noise.apply(pool, Seed(1)).targets)
    fixed = replace(noise, seed=3)
    assert same(fixed.apply(pool, Seed(0)), fixed.apply(pool, Seed(1)))
    others = pool.client != 1
    changed = replace(pool, targets=np.where(others[:, None, None], 0, pool.targets).astype(np.uint8))
    assert np.array_equal(noise.apply(changed, Seed(0)).targets[~others], first.targets[~others])
    alone = reordered(pool, np.flatnonzero(~others))
    assert np.array_equal(noise.apply(alone, Seed(0)).targets, first.targets[~others])


def test_order_of_draws():
    pool = image_pool([3, 2, 0, 5], [1, 0, 1, 1])
    result = DroppedAnnotation(keep_low=0.2, keep_high=0.9).apply(pool, Seed(7))
    rng = Seed(7).rng("dropped_annotation/1")
    rate = rng.uniform(0.2, 0.9)
    assert result.facts[1]["keep_rate"] == rate
    for item, count in ((0, 3), (3, 5)):
        kept = np.flatnonzero(rng.uniform(size=count) < rate) + 1
        components, _ = label_components(pool.targets[item][None], 2)
        assert np.array_equal(result.targets[item], np.isin(components[0], kept))


def test_volumes_do_not_depend_on_the_order_of_the_pool():
    pool = volume_pool()
    order = np.random.default_rng(0).permutation(len(pool.client))
    for rule in ("independent", "exact", "single"):
        noise = DroppedAnnotation(keep=(0.5, 0.8), connectivity="3d", rule=rule)
        result, other = noise.apply(pool, Seed(0)), noise.apply(reordered(pool, order), Seed(0))
        assert np.array_equal(result.targets[order], other.targets)
        for one, two in zip(result.facts, other.facts, strict=True):
            assert one == pytest.approx(two)


def test_pixels_that_are_not_annotated_stay_and_count_nowhere():
    pool = image_pool([4, 4], [0, 0])
    open_pixels = np.zeros_like(pool.targets)
    open_pixels[:, ::4, 3] = 255
    marked = replace(pool, targets=pool.targets | open_pixels)
    result, plain = (DroppedAnnotation(keep=(0.5,)).apply(p, Seed(2)) for p in (marked, pool))
    assert np.array_equal(result.targets, plain.targets | open_pixels)
    assert result.facts == plain.facts


def test_volumes_need_slice_numbers():
    pool = volume_pool()
    noise = DroppedAnnotation(connectivity="3d")
    for slices in (None, np.full(len(pool.client), np.nan), np.zeros((len(pool.client), 2))):
        with pytest.raises(UserError, match="connectivity=2d"):
            noise.apply(replace(pool, slices=slices), Seed(0))
    twice = pool.slices.copy()
    twice[9] = twice[10]
    with pytest.raises(UserError, match="case p1 has two images"):
        noise.apply(replace(pool, slices=twice), Seed(0))


@pytest.mark.parametrize(
    "args",
    [
        {"keep": []},
        {"keep": [0.5, 1.1]},
        {"keep": [float("nan")]},
        {"keep": [0.5], "keep_low": 0.1, "keep_high": 0.9},
        {"keep_low": 0.1},
        {"keep_low": 0.9, "keep_high": 0.1},
        {"keep_low": 0.5, "keep_high": 1.5},
        {"rule": "each"},
        {"connectivity": "4"},
        {"min_area": 0},
        {"max_slice_step": 0},
        {"kepe": [0.5]},
    ],
)
def test_bad_parameters_are_user_errors(args):
    with pytest.raises(UserError, match=r"data\.corruption\.args"):
        params_from(DroppedAnnotation, args, "data.corruption.args")


SMALL = ["data.phantom.num_sites=2", "data.phantom.images_per_site=40", "data.phantom.lesions=5"]


def test_protocol_example_touches_training_masks_only(tmp_path: Path):
    data = load_config("data/dropped_annotation", ["data.path=phantom:segmentation", *SMALL]).data
    path = derive(data, 0, tmp_path)
    truth, rows = read_truth(path), describe(path)
    with SiteFile.open(path) as file, h5py.File(path) as raw:
        assert file.image_size == (64, 64) and len(file.sites) == 8
        assert "reference" not in raw["central"]
        for site in file.sites:
            node, facts = raw[site.group], truth[site.name]
            train, mask, clean = node.attrs["train_idx"], node["mask"][:], node["reference/mask"][:]
            assert np.array_equal(np.delete(mask, train, 0), np.delete(clean, train, 0))
            assert (mask <= clean).all()
            count = sum(label_components(image[None], 2)[1] for image in clean[train])
            left = sum(label_components(image[None], 2)[1] for image in mask[train])
            assert facts["n_components"] == count and facts["n_dropped"] == count - left
            assert facts["completeness"] == pytest.approx(left / count)
            assert facts["is_noisy"] == (left < count)
    assert [row["keep_rate"] for row in rows] == [0.4, 0.6, 0.8, 1.0] * 2
    assert [row["completeness"] for row in rows] == [truth[row["site"]]["completeness"] for row in rows]
    assert not rows[3]["is_noisy"] and rows[0]["is_noisy"]


def test_protocol_with_volumes(tmp_path: Path):
    pool = volume_pool(cases=10, clients=1)
    rows = np.arange(len(pool.client))
    splits = {"train": rows[:48], "val": rows[48:56], "test": rows[56:]}
    groups = [group.decode() for group in pool.groups]
    extras = {"slice_no": pool.slices.astype(np.int32)}
    sites = [
        SiteArrays(name, pool.targets * 200, {"mask": pool.targets}, splits, [], groups, extras)
        for name in ("north", "south")
    ]
    meta = {"task": "segmentation", "classes": ["background", "lesion"], "channels": ["grey"], "image_size": [32, 32]}
    source = write_site_file(tmp_path / "volumes.h5", meta, sites)
    corruption = ["data.corruption.name=dropped_annotation", "data.corruption.args.connectivity=3d"]
    keep = "data.corruption.args.keep=[0.5]"
    path = derive(load_config("fedavg", [f"data.path={source}", *corruption, keep]).data, 0, tmp_path)
    with h5py.File(path) as raw:
        for row, group in zip(describe(path), ("site_00", "site_01"), strict=True):
            mask, clean = raw[group]["mask"][:48], raw[group]["reference/mask"][:48]
            assert np.array_equal(raw[group]["mask"][48:], pool.targets[48:])
            kept = 0
            for case in range(6):
                chosen = slice(8 * case, 8 * case + 8)
                components, count = label_volume(clean[chosen], 2, pool.slices[chosen])
                kept += assert_whole(components, count, mask[chosen])
            assert row["n_components"] - row["n_dropped"] == kept and row["is_noisy"]
    with pytest.raises(UserError, match="slice_no"):
        derive(load_config("fedavg", ["data.path=phantom:segmentation", *SMALL, *corruption]).data, 0, tmp_path)
