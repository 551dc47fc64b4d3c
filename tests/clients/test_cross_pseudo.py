"""FedMix at the site: what is taken and why, what each network learns, and that hidden masks are never read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from clients.cross_pseudo import (
    CrossPseudo,
    SelectionRule,
    binary,
    box_planes,
    boxes_around,
    dice,
    dice_loss,
    lacks,
    select,
)
from data_prep.corruption.weak_draw import box_around
from data_prep.protocol import derive
from fedmed.config import from_tree, load_config
from fedmed.data.loader import batches
from fedmed.data.site_file import SiteFile
from fedmed.data.writer import SiteArrays, write_site_file
from fedmed.errors import UserError
from fedmed.federation.client import Env, Moment
from fedmed.federation.layout import Layout
from fedmed.federation.site import make_addons
from fedmed.federation.state import clone_state
from fedmed.models.build import build_model
from fedmed.models.output import Output

Make = Callable[..., Any]
KINDS = ("mask", "box", "image", "none", "scribble")
SIZE, CLASSES, F = 16, 3, 2
ALL = {"threshold": 0.0, "box_dice_min": 0.0, "reject_empty": 0}


# ------------------------------------------------------------------ the pure parts


def plane(*rows: str) -> Tensor:
    """One image of one class, drawn: `x` is 1."""
    return torch.tensor([[[[float(c == "x") for c in row] for row in rows]]])


def test_dice_by_hand() -> None:
    a, b = torch.tensor([[[[1.0, 1.0, 0.0]]]]), torch.tensor([[[[1.0, 0.0, 0.0]]]])
    assert dice(a, b).item() == pytest.approx((2 + 1e-4) / (3 + 1e-4)) == pytest.approx(0.666678, abs=1e-6)
    assert dice(a, a).item() == pytest.approx(1.0) and dice(0 * a, 0 * a).item() == 1.0
    assert dice(a, 0 * a).item() == pytest.approx(1e-4 / (2 + 1e-4))
    both = dice(torch.cat([a, 0 * a]), torch.cat([b, 0 * b]))
    assert both.shape == (2,) and dice_loss(torch.cat([a, 0 * a]), torch.cat([b, 0 * b])).item() == pytest.approx(
        1 - float(both.mean())
    )
    channels = dice(torch.cat([a, 0 * a], dim=1), torch.cat([b, b], dim=1))  # pooled: (2 + e) / (2 + 2 + e)
    assert channels.item() == pytest.approx((2 + 1e-4) / (4 + 1e-4))


def test_dice_loss_has_the_gradient_of_its_formula() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 3, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    target = (torch.rand(2, 2, 3, 3, generator=rng) > 0.5).double()
    target[1] = 0
    assert torch.autograd.gradcheck(lambda z: dice_loss(z.sigmoid(), target), logits)
    naive = [
        (2 * float((p * t).sum()) + 1e-4) / (float(p.sum()) + float(t.sum()) + 1e-4)
        for p, t in zip(logits.detach().sigmoid(), target, strict=True)
    ]
    assert dice_loss(logits.sigmoid(), target).item() == pytest.approx(1 - sum(naive) / 2, rel=1e-12)


def test_binary_is_above_one_half() -> None:
    assert binary(torch.tensor([-1.0, 0.0, 1e-9, 0.1])).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("margins", [(0, 1, 0, 1), (1, 2, 3, 4), (9, 9, 9, 9)])
def test_boxes_as_planes(margins: tuple[int, int, int, int]) -> None:
    """Rows 4..6, columns 2..5 of 20: with margins (1, 2, 3, 4) 5 x 9 pixels."""
    mask = np.zeros((20, 20), dtype=bool)
    mask[4:7, 2:6] = True
    rows, columns = box_around(mask, margins)
    box = torch.tensor([[[rows.start, rows.stop, columns.start, columns.stop], [0, 0, 0, 0]]])
    planes = box_planes(box, (20, 20))
    expected = np.zeros((20, 20))
    expected[rows, columns] = 1
    assert planes.shape == (1, 2, 20, 20) and planes.dtype == torch.float32
    assert np.array_equal(planes[0, 0].numpy(), expected) and not planes[0, 1].any()
    assert margins != (1, 2, 3, 4) or planes.sum() == 45


def test_boxes_around_pixels_are_the_tight_ones() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((12, 5, 7)) < rng.random((12, 1, 1)) * 0.3) * rng.integers(1, 5, (12, 5, 7))
    labels[0] = 0
    labels[1] = 2
    found = boxes_around(torch.from_numpy(labels), 4)  # 4 is no class: left open
    for image, boxes in zip(labels, found.tolist(), strict=True):
        assert boxes[0] == [0] * 4
        for label in (1, 2, 3):
            rows, columns = box_around(image == label)
            assert boxes[label] == [rows.start, rows.stop, columns.start, columns.stop]
    assert boxes_around(torch.zeros(0, 5, 7), 4).shape == (0, 4, 4)


RULE = SelectionRule()


def chosen(first: Tensor, second: Tensor, kind: str = "none", allowed: Any = None, rule: SelectionRule = RULE) -> Any:
    """`select` with predictions in the place of logits."""
    return select(10 * first - 5, 10 * second - 5, kind, allowed, rule)


def test_agreement_decides() -> None:
    one, two = plane("xxxxx", "xxxxx"), plane("xxxxx", "xxxx.")
    assert dice(one, two).item() == pytest.approx(18 / 19, abs=1e-5)
    assert chosen(one, two).keep.tolist() == [True]
    assert chosen(one, plane("xxxx.", "xxx..")).keep.tolist() == [False]
    found = chosen(one, two)
    assert torch.equal(found.first, one) and torch.equal(found.second, two)
    pair = plane("xxxx"), plane(".xxx")
    limit = float(dice(*pair))
    assert limit == pytest.approx((2 * 3 + 1e-4) / (4 + 3 + 1e-4))
    assert chosen(*pair, rule=SelectionRule(threshold=limit)).keep.tolist() == [True]  # equal is enough
    assert chosen(*pair, rule=SelectionRule(threshold=limit + 1e-6)).keep.tolist() == [False]


def test_two_empty_predictions_agree_unless_that_is_refused() -> None:
    nothing = plane("...")
    assert chosen(nothing, nothing).keep.tolist() == [True]  # as published
    strict = SelectionRule(reject_empty_unlabelled=True)
    assert chosen(nothing, nothing, rule=strict).keep.tolist() == [False]
    assert chosen(plane("x.."), plane("x.."), rule=strict).keep.tolist() == [True]


def test_boxes_cut_predictions_and_refuse_small_ones() -> None:
    box = plane("xxxx....")
    found = chosen(plane("xxx..xxx"), plane("xxx....x"), "box", box)  # they agree inside the box alone
    assert (
        found.keep.tolist() == [True]
        and torch.equal(found.first, plane("xxx....."))
        and torch.equal(found.first, found.second)
    )
    assert chosen(plane("x......."), plane("x......."), "box", box).keep.tolist() == [False]  # D with the box .4
    assert chosen(plane("........"), plane("........"), "box", box).keep.tolist() == [False]
    assert chosen(plane("xx......"), plane("xx......"), "box", 0 * box).keep.tolist() == [True]  # known to be empty
    assert not chosen(plane("xx......"), plane("xx......"), "box", 0 * box).first.any()
    assert chosen(plane("x......."), plane("x......."), "box", box, SelectionRule(box_dice_min=0.4)).keep.tolist() == [
        True
    ]
    # the box is held against network 1 alone
    loose = SelectionRule(threshold=0.3)
    assert chosen(plane("xxxx...."), plane("x......."), "box", box, loose).keep.tolist() == [True]
    assert chosen(plane("x......."), plane("xxxx...."), "box", box, loose).keep.tolist() == [False]


def test_tags_empty_absent_classes_and_want_present_ones() -> None:
    two = torch.cat([plane("xx.."), plane("..xx")], dim=1)
    only_first, both = torch.tensor([[1.0, 0.0]])[:, :, None, None], torch.ones(1, 2, 1, 1)
    found = chosen(two, two, "image", only_first)
    assert found.keep.tolist() == [True] and found.first[0, 0].any() and not found.first[0, 1].any()
    half = torch.cat([plane("xx.."), plane("....")], dim=1)
    assert chosen(half, half, "image", both).keep.tolist() == [False]
    assert chosen(half, half, "image", both, SelectionRule(reject_empty=False)).keep.tolist() == [True]
    assert chosen(two, half, "image", both, SelectionRule(threshold=0.6)).keep.tolist() == [False]  # either network
    nothing = chosen(two, half, "image", 0 * both)
    assert nothing.keep.tolist() == [True] and not nothing.second.any()  # tagged without any class: surely empty
    assert lacks(half, both).tolist() == [True] and lacks(half, only_first).tolist() == [False]


# ------------------------------------------------------------------ the client


def scenes(count: int, seed: int) -> np.ndarray:
    """Masks of two classes, (count, SIZE, SIZE): a square of class 1, and in every other image one of class 2."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, SIZE, SIZE), dtype=np.uint8)
    for item, mask in enumerate(masks):
        top, left = rng.integers(1, 5, 2)
        mask[top : top + 5, left : left + 6] = 1
        if item % 2:
            mask[top + 4 : top + 8, left + 3 : left + 7] = 2
    masks[-1] = 0
    return masks


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A derived file with a site of each of `KINDS`, named by it: 10 training images, the last without object."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = np.arange(14)
    splits = {"val": rows[:1], "test": rows[1:4], "train": rows[4:]}
    sites = []
    for seed, kind in enumerate(KINDS):
        masks = scenes(14, seed)
        sites.append(SiteArrays(kind, masks * 80 + 20, {"mask": masks}, splits))
    meta = {"task": "segmentation", "classes": ["none", "a", "b"], "channels": ["grey"], "image_size": [SIZE, SIZE]}
    source = write_site_file(folder / "source.h5", meta, sites)
    args = f"data.corruption.args={{kind: [{', '.join(KINDS)}], margin_low: 1, margin_high: 2}}"
    return derive(
        load_config("fedavg", [f"data.path={source}", "data.corruption.name=weak_labels", args]).data, 0, folder
    )


def opinionated(model: Any, images: Tensor) -> None:
    """Give untrained networks norm statistics of these images, and a last layer that says yes and no equally often."""
    with torch.no_grad():
        for net in (model.net1, model.net2):
            for _ in range(30):
                net(images)
            logits = net.eval()(images).logits
            net.outc.bias -= logits.mean(dim=(0, 2, 3))
            net.train()


@pytest.fixture
def make(path: Path) -> Make:
    """`make(kind, ...)`: a client of that site that has received the initial networks."""

    def new(kind: str, file: Path = path, model: str = "two_networks", activation: str = "sigmoid", **tree: Any) -> Any:
        config = from_tree({"training": {"batch_size": 3}, "optimizer": {"name": "adam", "persist": True}, **tree})
        with SiteFile.open(file) as sites:
            data = sites.site(kind)
        args = {"name": "unet", "args": {"base_width": 2}} if model == "two_networks" else {"base_width": 2}
        outputs = F if activation == "sigmoid" else CLASSES
        built = build_model(model, args, 1, outputs, (SIZE, SIZE), "segmentation", seed=1)
        if model == "two_networks":
            opinionated(built, data.split("train").batch(torch.arange(10)).images)
        layout = Layout.of(built, CrossPseudo.is_personal)
        env = Env(config, data, built, layout, torch.device("cpu"), activation, data.name)
        client = CrossPseudo(env, Moment(1, 4), make_addons(config))
        client.received = clone_state(layout.exchanged_state(built))
        return client

    return new


def predictions(client: Any, given: Any) -> tuple[Tensor, Tensor]:
    """b of both networks on the items of a split, image by image."""
    client.model.eval()
    with torch.no_grad():
        images = [given.batch(torch.tensor([i])).images for i in range(len(given))]
        pair = [torch.cat([binary(net(x).logits) for x in images]) for net in (client.model.net1, client.model.net2)]
    client.model.train()
    return pair[0], pair[1]


@pytest.mark.parametrize("kind", ["box", "image", "none"])
def test_weak_targets_are_predictions_and_nothing_else(make: Make, kind: str) -> None:
    client = make(kind, training={"batch_size": 2})  # read in two sweeps of 8 and 2
    given = client.train_set
    first, second = predictions(client, given)
    assert 0.01 < first.mean() < 0.99 and not torch.equal(first, second)
    if kind == "box":
        allowed = box_planes(
            torch.from_numpy(client.data.read("class_boxes").astype(int))[given.index, 1:], (SIZE, SIZE)
        )
    else:
        tags = (
            torch.from_numpy(client.data.read("class_tags"))[given.index, 1:] if kind == "image" else torch.ones(10, F)
        )
        allowed = tags.float()[:, :, None, None]
    client.begin_round(dict(ALL), {})
    assert torch.equal(client.train_set.index, given.index) and client.num_selected == client.num_total == 10
    targets = client.train_set.targets
    assert targets.dtype == torch.uint8 and targets.shape == (10, 2 * F, SIZE, SIZE)
    assert torch.equal(targets.float(), torch.cat([first * allowed, second * allowed], dim=1))
    assert client.model.training


@pytest.mark.parametrize("kind", ["box", "image", "none"])
def test_limits_of_the_message_are_those_applied(make: Make, kind: str) -> None:
    client = make(kind)
    client.begin_round(dict(ALL), {})
    given, pair = client.train_set.index, client.train_set.targets
    scores = dice(pair[:, F:].float(), pair[:, :F].float())
    middle = float(scores.sort().values[5])
    again = make(kind)
    again.begin_round({**ALL, "threshold": middle}, {})
    assert 0 < again.num_selected < again.num_total == 10
    assert torch.equal(again.train_set.index, given[scores >= middle])
    assert torch.equal(again.train_set.targets, pair[scores >= middle])


def test_only_the_image_known_to_be_empty_passes_strict_limits(make: Make) -> None:
    client = make("box")
    empty = client.train_set.index[9:]
    client.begin_round({"threshold": 1.0, "box_dice_min": 1.0}, {})
    assert torch.equal(client.train_set.index, empty) and not client.train_set.targets.any()


def test_a_labelled_site_keeps_all_its_masks(make: Make) -> None:
    client = make("mask")
    given = client.train_set
    client.begin_round({"threshold": 1.0, "box_dice_min": 1.0}, {})
    assert client.train_set is given and client.num_selected == client.num_total == 10
    batch = given.batch(torch.tensor([1, 9]))
    one, two = client.targets(batch.targets, F)
    assert torch.equal(one, two) and torch.equal(one[:, 1], (batch.targets == 2).float()) and not one[1].any()


def test_each_network_learns_what_the_other_says(make: Make) -> None:
    client = make("none")
    client.begin_round(dict(ALL), {})
    batch = next(iter(batches(client.train_set, 3)))
    output = client.forward(batch)
    terms = client.loss(output, batch, 0)
    first, second = batch.targets[:, :F].float(), batch.targets[:, F:].float()
    expected = dice_loss(output.logits.sigmoid(), second), dice_loss(output.aux["second_logits"].sigmoid(), first)
    assert list(terms) == ["net1", "net2"] and (terms["net1"], terms["net2"]) == expected
    assert client.num_steps == 1 and float(client.loss_sum) == terms["net1"].item()


@pytest.mark.parametrize("kind", ["mask", "none"])
def test_a_round_trains_both_networks_and_reports_the_first(make: Make, kind: str) -> None:
    client = make(kind)
    client.begin_round(dict(ALL), {})
    metrics = client.fit()
    arrays, sent = client.end_round()
    client.check_leaves(arrays, {**metrics, **sent})
    assert arrays == {} and sent["num_selected"] == sent["num_total"] == 10
    assert (
        sent["train_loss_net1"] == pytest.approx(metrics["loss/net1"]) and client.num_steps == 3
    )  # one item is left over
    moved = [
        n for n, v in client.layout.exchanged_state(client.model).items() if not torch.equal(v, client.received[n])
    ]
    assert {name.split(".")[0] for name in moved} == {"net1", "net2"}
    assert {"optimizer/net1.outc.weight/exp_avg", "optimizer/net2.outc.weight/exp_avg"} <= set(client.personal)


def test_networks_learn_a_mask(make: Make) -> None:
    client = make("mask", training={"batch_size": 5, "epochs": 60}, optimizer={"name": "adam", "lr": 0.01})
    client.begin_round({}, {})
    before = [
        dice_loss(p, t) for p, t in zip(predictions(client, client.train_set), [truth_of(client)] * 2, strict=True)
    ]
    client.fit()
    after = [
        dice_loss(p, t) for p, t in zip(predictions(client, client.train_set), [truth_of(client)] * 2, strict=True)
    ]
    assert all(late < early - 0.2 for early, late in zip(before, after, strict=True))


def truth_of(client: Any) -> Tensor:
    targets = client.train_set.targets
    return torch.stack([(targets == label).float() for label in range(1, CLASSES)], dim=1)


def test_image_and_pair_move_together(make: Make) -> None:
    """A flip of the image is the flip of both planes; `source` is the image as it was selected."""
    client = make("none", data={"augment": ["hflip", "rot90", "affine"]})
    client.begin_round(dict(ALL), {})
    marked = client.train_set.with_targets(
        (client.train_set.raw(torch.arange(10))[0] > 50).expand(-1, 2 * F, -1, -1).byte()
    )
    moved = 0
    for batch in batches(marked, 5, torch.Generator().manual_seed(0), client.augment):
        assert batch.targets.shape == (5, 2 * F, SIZE, SIZE) and set(batch.targets.unique().tolist()) <= {0, 1}
        bright = batch.images > 50 / 255
        agree = (bright == (batch.targets[:, :1] == 1)).float().mean()
        assert agree > 0.97 and torch.equal(
            batch.targets[:, 0], batch.targets[:, 3]
        )  # nearest and bilinear differ at edges
        moved += int((batch.images != batch.source).any())
    assert moved and marked.class_counts().shape == (CLASSES,)


def test_nothing_taken_is_nothing_trained(make: Make) -> None:
    client = make("box")
    client.train_set = client.train_set.subset(torch.arange(9))
    client.begin_round({"threshold": 1.0, "box_dice_min": 1.0}, {})
    assert len(client.train_set) == 0 and client.end_round() == ({}, {"num_selected": 0, "num_total": 9})


def test_one_image_is_no_step_and_has_no_loss(make: Make) -> None:
    client = make("none")
    given = client.train_set
    client.train_set = given.subset(torch.tensor([0]))
    client.begin_round(dict(ALL), {})
    client.fit()
    assert client.end_round() == ({}, {"num_selected": 1, "num_total": 1})


def test_hidden_masks_are_never_read(make: Make, path: Path, tmp_path: Path) -> None:
    """Rubbish in the place of what is withheld changes no selection and no weight."""
    poisoned = tmp_path / "poisoned.h5"
    poisoned.write_bytes(path.read_bytes())
    with h5py.File(poisoned, "r+") as file:
        for group in file.values():
            if group.attrs.get("label_kind") in ("box", "image", "none"):
                train = np.sort(group.attrs["train_idx"])
                assert (group["mask"][...][train] == CLASSES).all()
                for node in (group["mask"], group["reference/mask"]):
                    values = node[...]
                    values[train] = np.random.default_rng(5).integers(0, CLASSES, values[train].shape)
                    node[...] = values
    for kind in ("box", "image", "none"):
        results = []
        for file in (path, poisoned):
            client = make(kind, file)
            client.begin_round(dict(ALL), {})
            torch.manual_seed(0)
            metrics = client.fit()
            results.append(
                (client.train_set.targets, clone_state(client.layout.exchanged_state(client.model)), metrics)
            )
        assert torch.equal(results[0][0], results[1][0]) and results[0][2] == results[1][2]
        torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)


def test_a_file_with_filled_boxes_only(make: Make, path: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.h5"
    plain.write_bytes(path.read_bytes())
    with h5py.File(plain, "r+") as file:
        group = next(g for g in file.values() if g.attrs.get("site_name") == "box")
        del group["class_boxes"]
    client, full = make("box", plain), make("box")
    filled = client.train_set.targets
    boxes = client._known(client.train_set)
    assert torch.equal(boxes, boxes_around(filled, CLASSES)[:, 1:]) and boxes.any() and not boxes[9].any()
    around = full._known(full.train_set)
    assert torch.equal(around[:, 1], boxes[:, 1])  # the smaller box lies on top of the other
    there = boxes[:, 0].any(dim=1)
    low, high = (around[there, 0][:, places] - boxes[there, 0][:, places] for places in ([0, 2], [1, 3]))
    assert (low <= 0).all() and (high >= 0).all()
    client.begin_round(dict(ALL), {})
    assert client.num_selected == 10


def test_what_does_not_fit_is_said(make: Make, path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.name=two_networks"):
        make("mask", model="unet").begin_round({}, {})
    with pytest.raises(UserError, match=r"model\.activation=sigmoid"):
        make("mask", activation="softmax").begin_round({}, {})
    with pytest.raises(UserError, match=r"label_kind mask, box, image, none.*has scribble.*client\.name=weak"):
        make("scribble").begin_round({}, {})
    changed = tmp_path / "changed.h5"
    changed.write_bytes(path.read_bytes())
    with h5py.File(changed, "r+") as file:
        by_name = {g.attrs.get("site_name"): g for g in file.values()}
        by_name["mask"].attrs["ignore_value_in_mask"] = CLASSES
        for site, name, shape in (("box", "class_boxes", (14, CLASSES, 2)), ("image", "class_tags", (14, 1))):
            del by_name[site][name]
            by_name[site][name] = np.zeros(shape, dtype=np.int16)
    with pytest.raises(UserError, match="leaves pixels open"):
        make("mask", changed).begin_round({}, {})
    for site, name in (("box", "class_boxes"), ("image", "class_tags")):
        with pytest.raises(UserError, match=rf"{name} has shape .*expected"):
            make(site, changed).begin_round({}, {})
    with h5py.File(changed, "r+") as file:
        del next(g for g in file.values() if g.attrs.get("site_name") == "image")["class_tags"]
    with pytest.raises(UserError, match="no dataset 'class_tags'"):
        make("image", changed).begin_round({}, {})


def test_second_logits_may_come_in_half_precision(make: Make) -> None:
    client = make("mask")
    client.begin_round({}, {})
    batch = client.train_set.batch(torch.tensor([0, 1]))
    logits = torch.zeros(2, F, SIZE, SIZE)
    terms = client.loss(Output(logits, None, {"second_logits": logits.bfloat16()}), batch, 0)
    assert terms["net2"].dtype == torch.float32 and terms["net1"] == terms["net2"]
