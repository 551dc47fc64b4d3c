"""Weak annotation at the site: the terms by hand, the image on its own scale, who trains and who is refused."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clients.annotation_completion import AnnotationCompletion
from clients.supervised import Supervised
from clients.weak_annotation import WeakAnnotation, WeakParams, any_labelled, unit_range, weak_terms
from fedmed.config import from_tree
from fedmed.data.augment import Augment
from fedmed.data.loader import batches
from fedmed.data.site_file import SiteFile
from fedmed.data.split import Batch
from fedmed.errors import UserError
from fedmed.federation.client import Env, Moment
from fedmed.federation.layout import Layout
from fedmed.federation.site import make_addons
from fedmed.federation.state import clone_state
from fedmed.losses.gated_crf import Kernel, gated_crf
from fedmed.losses.partial import partial_cross_entropy
from fedmed.losses.tree_energy import tree_energy_loss
from fedmed.models.build import build_model
from fedmed.models.output import Output
from fedmed.models.side_unet import SIDE_LOGITS

F64 = torch.float64
SIDE = {"model": {"name": "side_unet", "args": {"base_width": 2, "side_width": 4}}}
UNET = {"model": {"name": "unet", "args": {"base_width": 4}}}
BOTH = {"crf_weight": 0.1, "tree_weight": 0.1}
Make = Callable[..., Any]
Draw = Callable[[np.ndarray], np.ndarray]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def batch_of(images: Tensor, targets: Tensor) -> Batch:
    return Batch(images, targets, torch.arange(len(images)))


def example(classes: int = 2, ignore: int | None = None, side: int = 8) -> tuple[Output, Batch]:
    """Two images with about a third of the pixels drawn, and side logits at 1/4, 1/2 and 1/1, all with gradient."""
    rng = torch.Generator().manual_seed(5)
    logits = drawn(2, classes, side, side).requires_grad_()
    sides = [drawn(2, classes, n, n, seed=n).requires_grad_() for n in (side // 4, side // 2, side)]
    targets = torch.randint(0, classes, (2, side, side), generator=rng)
    is_open = torch.rand(2, side, side, generator=rng) > 1 / 3
    targets[is_open] = classes if ignore is None else ignore
    return Output(logits, None, {SIDE_LOGITS: sides}), batch_of(drawn(2, 3, side, side, seed=9), targets)


def half_open(masks: np.ndarray) -> np.ndarray:
    """Every second column drawn, the others 2."""
    weak = masks.copy()
    weak[..., ::2] = 2
    return weak


def nothing(masks: np.ndarray) -> np.ndarray:
    return np.full_like(masks, 2)


def background_only(masks: np.ndarray) -> np.ndarray:
    return np.where(masks == 0, 0, 2).astype(masks.dtype)


@pytest.fixture
def site(site_files: dict[str, Path]) -> Make:
    """`site(draw, ...)`: a client of the site whose training masks are `draw(masks)`; None: its full masks."""

    def make(draw: Draw | None = half_open, args: dict[str, Any] | None = None, **config: Any) -> Any:
        cls, kind = config.pop("cls", WeakAnnotation), config.pop("kind", "scribble")
        withheld, ignore, number = config.pop("withheld", False), config.pop("ignore", 2), config.pop("round", 1)
        activation = config.pop("activation", "softmax")
        tree: dict[str, Any] = {"client": {"name": "weak", "args": args or {}}, "training": {"batch_size": 4}, **SIDE}
        settings = from_tree({**tree, **config})
        with SiteFile.open(site_files["segmentation"]) as file:
            data = file.site(file.sites[0].name, mean=settings.data.mean, std=settings.data.std)
        if draw is not None:
            truth = data.target.copy()
            if withheld:
                truth[data.splits["train"]] = 2
            weak = draw(data.target)
            weak[weak == 2] = ignore
            data = dataclasses.replace(data, target=weak, eval_target=truth, ignore_value=ignore, label_kind=kind)
        shape = (len(data.channels), len(data.classes) if activation == "softmax" else 1, data.image_size)
        model = build_model(settings.model.name, dict(settings.model.args), *shape, data.task, seed=1)
        layout = Layout.of(model, cls.is_personal)
        env = Env(settings, data, model, layout, torch.device("cpu"), activation, data.name)
        made = cls(env, Moment(number, 4), make_addons(settings))
        made.received = clone_state(layout.exchanged_state(model))
        return made

    return make


# ---------------------------------------------------------------------- the image


def test_unit_range_by_hand() -> None:
    images = torch.tensor([[[[2.0, 4.0, 6.0]]], [[[-1.0, 3.0, 1.0]]]])
    assert unit_range(images).flatten().tolist() == [0.0, 0.5, 1.0, 0.0, 1.0, 0.5]
    channels = torch.tensor([[[[0.0, 1.0]], [[2.0, 4.0]]]])
    assert unit_range(channels).flatten().tolist() == [0.0, 0.25, 0.5, 1.0]  # one scale for both


def test_unit_range_of_constant_and_of_no_images() -> None:
    images = torch.stack([torch.full((1, 3, 3), 0.7), torch.zeros(1, 3, 3), torch.rand(1, 3, 3)])
    scaled = unit_range(images)
    assert not scaled[:2].any() and scaled[2].min() == 0 and scaled[2].max() == 1
    assert unit_range(images[:0]).shape == (0, 1, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8, torch.float32, torch.float64])
def test_unit_range_keeps_its_input_and_computes_in_float32_at_least(dtype: torch.dtype) -> None:
    images = torch.tensor([[[[10, 200], [30, 250]]]]).to(dtype).transpose(2, 3)
    before = images.clone()
    scaled = unit_range(images)
    assert scaled.dtype == (torch.float64 if dtype == F64 else torch.float32)
    assert torch.equal(images, before) and images.dtype == dtype
    torch.testing.assert_close(scaled.flatten().double(), torch.tensor([0, 20 / 240, 190 / 240, 1], dtype=F64))


def test_unit_range_undoes_factor_and_offset_of_each_image() -> None:
    images = torch.rand(3, 2, 6, 6, dtype=F64)
    factor, offset = torch.tensor([0.5, 3.0, 40.0]).view(-1, 1, 1, 1), torch.tensor([-2.0, 0.0, 7.0]).view(-1, 1, 1, 1)
    torch.testing.assert_close(unit_range(images * factor + offset), unit_range(images))
    changed, _ = Augment(["intensity"])(images.float(), None, torch.Generator().manual_seed(0))
    assert (changed - images).abs().max() > 0.05
    torch.testing.assert_close(unit_range(changed), unit_range(images.float()), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- the terms


def test_terms_by_hand() -> None:
    """Two pixels, classes 0 and 1 for certain. The first is drawn, as 0; image and side outputs are constant."""
    logits = torch.tensor([[[[40.0, -40.0]], [[-40.0, 40.0]]]], dtype=F64)
    sides = [torch.zeros(1, 2, 1, 2, dtype=F64)] * 3
    batch = batch_of(torch.full((1, 1, 1, 2), 0.3, dtype=F64), torch.tensor([[[0, 2]]]))
    params = WeakParams(crf_weight=0.5, crf_sigma_xy=1.0, crf_radius=1, tree_weight=0.2)
    terms = weak_terms(Output(logits, None, {SIDE_LOGITS: sides}), batch, None, params)
    assert terms["pce"].item() == pytest.approx(0, abs=1e-12)
    assert terms["crf"].item() == pytest.approx(0.5 * 0.606531, abs=1e-6)  # k = exp(-1/2), both orders, two pixels
    assert terms["tree"].item() == pytest.approx(0.2)  # A = (1/2, 1/2), so |P - A| = 1 at the open pixel
    even = weak_terms(Output(torch.zeros_like(logits)), batch, None, WeakParams())
    assert even["pce"].item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(("form", "scale"), [("cascade", 1), ("single", 1), ("add", 2)])
def test_terms_are_the_weighted_losses(form: str, scale: int) -> None:
    output, batch = example(classes=3)
    params = WeakParams(0.3, 4.0, 0.2, 2, 0.7, form, scale)
    terms = weak_terms(output, batch, None, params)
    low = batch.images.amin(dim=(1, 2, 3), keepdim=True)
    image = (batch.images - low) / (batch.images.amax(dim=(1, 2, 3), keepdim=True) - low)
    assert output.aux is not None
    crf = gated_crf(output.logits.softmax(1), image, (Kernel(1.0, 4.0, 0.2),), 2)
    is_open, sides = batch.targets == 3, output.aux[SIDE_LOGITS]
    tree = tree_energy_loss(output.logits, image, sides, is_open, form=form, scale=scale)  # type: ignore[arg-type]
    expected = {"pce": partial_cross_entropy(output.logits, batch.targets), "crf": 0.3 * crf, "tree": 0.7 * tree}
    assert list(terms) == list(expected) and all(value > 0 for value in terms.values())
    torch.testing.assert_close(terms, expected, rtol=1e-12, atol=0)


def test_a_term_without_weight_is_not_made() -> None:
    output, batch = example()
    plain = Output(output.logits)  # no side outputs are asked for
    assert list(weak_terms(plain, batch, None, WeakParams())) == ["pce"]
    assert list(weak_terms(plain, batch, None, WeakParams(crf_weight=1.0))) == ["pce", "crf"]
    assert list(weak_terms(output, batch, None, WeakParams(tree_weight=1.0))) == ["pce", "tree"]


def test_gradient_of_the_sum() -> None:
    output, batch = example(side=4)
    assert output.aux is not None

    def total(logits: Tensor, *sides: Tensor) -> Tensor:
        one = Output(logits, None, {SIDE_LOGITS: list(sides)})
        return torch.stack(
            list(weak_terms(one, batch, None, WeakParams(crf_weight=0.6, tree_weight=0.8)).values())
        ).sum()

    assert torch.autograd.gradcheck(total, (output.logits, *output.aux[SIDE_LOGITS]))


def test_the_order_of_the_images_does_not_matter() -> None:
    output, batch = example()
    assert output.aux is not None
    turned = Output(output.logits.flip(0), None, {SIDE_LOGITS: [s.flip(0) for s in output.aux[SIDE_LOGITS]]})
    first = weak_terms(output, batch, None, WeakParams(**BOTH))
    second = weak_terms(turned, batch_of(batch.images.flip(0), batch.targets.flip(0)), None, WeakParams(**BOTH))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("ignore", [3, 255])
def test_another_ignore_value(ignore: int) -> None:
    output, batch = example()
    other = batch_of(batch.images, torch.where(batch.targets == 2, ignore, batch.targets))
    first = weak_terms(output, batch, None, WeakParams(**BOTH))
    torch.testing.assert_close(weak_terms(output, other, ignore, WeakParams(**BOTH)), first, rtol=0, atol=0)
    torch.testing.assert_close(weak_terms(output, batch, 2, WeakParams(**BOTH)), first, rtol=0, atol=0)


def test_full_masks_are_plain_cross_entropy() -> None:
    output, batch = example()
    full = batch_of(batch.images, batch.targets.clamp_max(1))
    terms = weak_terms(output, full, None, WeakParams(tree_weight=1.0))
    torch.testing.assert_close(terms["pce"], F.cross_entropy(output.logits, full.targets))
    assert output.aux is not None
    grads = torch.autograd.grad(terms["tree"], (output.logits, *output.aux[SIDE_LOGITS]))
    assert terms["tree"].item() == 0 and not any(bool(g.any()) for g in grads)


def test_a_batch_without_drawn_pixel() -> None:
    output, batch = example()
    blank = batch_of(batch.images, torch.full_like(batch.targets, 2))
    terms = weak_terms(output, blank, None, WeakParams(**BOTH))
    (gradient,) = torch.autograd.grad(terms["pce"], output.logits, retain_graph=True)
    assert terms["pce"].item() == 0 and not gradient.any()
    assert terms["crf"].item() > 0 and terms["tree"].item() > 0


def test_one_class_everywhere_costs_nothing_but_labels() -> None:
    """Why a site without labels must not train: the other two terms have their least value there."""
    output, batch = example()
    certain = torch.tensor([60.0, -60.0], dtype=F64).view(1, 2, 1, 1).expand_as(output.logits)
    terms = weak_terms(Output(certain, None, output.aux), batch, None, WeakParams(**BOTH))
    assert terms["crf"].item() == pytest.approx(0, abs=1e-12) and terms["tree"].item() == pytest.approx(0, abs=1e-12)
    assert terms["pce"].item() > 1


def test_a_model_without_side_outputs() -> None:
    output, batch = example()
    for aux in (None, {}, {"deep": []}):
        with pytest.raises(
            UserError, match=r"side outputs, .* set model\.name=side_unet .* client\.args\.tree_weight=0"
        ):
            weak_terms(Output(output.logits, None, aux), batch, None, WeakParams(tree_weight=0.1))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"crf_weight": -0.1}, "finite crf_weight >= 0 expected, got -0.1"),
        ({"tree_weight": math.inf}, "tree_weight"),
        ({"tree_weight": math.nan}, "tree_weight"),
        ({"crf_sigma_xy": 0.0}, "finite crf_sigma_xy > 0 expected, got 0"),
        ({"crf_sigma_rgb": -1.0}, "crf_sigma_rgb"),
        ({"crf_radius": 0}, "crf_radius >= 1"),
        ({"tree_scale": 0}, "tree_scale >= 1"),
        ({"tree_form": "chain"}, "tree_form: one of cascade, single, add expected, got 'chain'"),
    ],
)
def test_params_are_checked(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        WeakParams(**values)


# ---------------------------------------------------------------------- the client


def test_the_client_trains_all_of_the_network(site: Make) -> None:
    client = site(half_open, BOTH)
    before = clone_state(client.model.state_dict())
    client.begin_round({}, {})
    losses = client.fit()
    assert set(losses) == {"train_loss", "loss/pce", "loss/crf", "loss/tree"} and all(losses.values())
    moved = [n for n, p in client.model.named_parameters() if not torch.equal(before[n], p)]
    assert any(n.startswith("sides.0") for n in moved) and any(n.startswith("encoder") for n in moved)
    assert client.end_round() == ({}, {}) and not client.personal and client.leaves == ()


def test_terms_of_a_batch(site: Make) -> None:
    client = site(half_open, {**BOTH, "tree_form": "single"}, ignore=255)
    client.begin_round({}, {})
    client.model.train()
    batch = next(iter(batches(client.train_set, 4)))
    output = client.forward(batch)
    assert (batch.targets == 255).any()
    expected = weak_terms(output, batch, 255, client.params)
    torch.testing.assert_close(client.loss(output, batch, 0), expected, rtol=0, atol=0)


def test_normalised_images_have_the_same_crf(site: Make) -> None:
    """One number for mean and std is undone; the logits are given, so that only the image differs."""
    one, other = site(), site(data={"mean": [0.4], "std": [0.2]})
    params = WeakParams(crf_weight=1.0)
    found = []
    for client in (one, other):
        batch = next(iter(batches(client.train_set, 4)))
        logits = drawn(4, 2, 32, 32).float()
        found.append(weak_terms(Output(logits), batch, 2, params)["crf"].item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_an_add_on_rides_along(site: Make) -> None:
    client = site(half_open, client={"name": "weak", "args": {}, "prox": {"enabled": True, "mu": 10.0}})
    client.begin_round({}, {})
    for addon in client.addons.values():
        addon.begin_round(client, {}, {})
    assert set(client.fit()) == {"train_loss", "loss/pce", "loss/prox"}


@pytest.mark.parametrize(("number", "level"), [(1, "WARNING"), (2, "INFO")])
def test_no_labelled_pixel(site: Make, number: int, level: str, caplog: pytest.LogCaptureFixture) -> None:
    client = site(nothing, BOTH, round=number, ignore=255)
    caplog.set_level(logging.INFO)
    client.begin_round({}, {})
    assert len(client.train_set) == 0 and not any_labelled(client.train_set)
    (record,) = caplog.records
    assert record.levelname == level and "no training image has a labelled pixel" in record.getMessage()
    assert client.site in record.getMessage()


@pytest.mark.parametrize("draw", [background_only, half_open, None])
def test_sites_that_train(site: Make, draw: Draw | None, caplog: pytest.LogCaptureFixture) -> None:
    client = site(draw, BOTH)
    size = len(client.train_set)
    client.begin_round({}, {})
    losses = client.fit()
    assert len(client.train_set) == size and not caplog.records
    assert all(math.isfinite(value) for value in losses.values()) and losses["loss/pce"] > 0
    assert (losses["loss/tree"] > 0) == (draw is not None)  # full masks: no pixel is open


def test_one_labelled_pixel_is_enough(site: Make) -> None:
    def single(masks: np.ndarray) -> np.ndarray:
        weak = np.full_like(masks, 2)
        weak[:, 3, 4] = 1
        return weak

    client = site(single)
    assert any_labelled(client.train_set)
    client.begin_round({}, {})
    assert len(client.train_set) > 0


def test_sigmoid_outputs_are_refused(site: Make) -> None:
    client = site(half_open, activation="sigmoid")
    with pytest.raises(
        UserError, match=r"client 'weak' reads softmax outputs, not sigmoid; set model\.activation=softmax"
    ):
        client.begin_round({}, {})


def test_side_outputs_are_needed_for_the_tree_term_only(site: Make) -> None:
    client = site(half_open, BOTH, **UNET)
    client.begin_round({}, {})
    with pytest.raises(UserError, match="side outputs"):
        client.fit()
    client = site(half_open, {"crf_weight": 0.1}, **UNET)
    client.begin_round({}, {})
    assert set(client.fit()) == {"train_loss", "loss/pce", "loss/crf"}


# ---------------------------------------------------------------------- what `supervised` says of weak sites

ADVICE = "client.name=weak client.args=null model.activation=softmax"


def refused(client: Any) -> str:
    with pytest.raises(UserError) as caught:
        client.begin_round({}, {})
    return str(caught.value)


def test_supervised_names_the_full_masks_where_there_are_some(site: Make) -> None:
    supervised = {"cls": Supervised, "client": {"name": "supervised", "args": {}}}
    both, withheld = (refused(site(half_open, withheld=w, **supervised)) for w in (False, True))
    assert both.startswith("scribble annotation leaves pixels open, which client 'supervised' cannot read; set ")
    assert ADVICE in both and both.endswith("or data.annotation=mask for the full masks this site has, too")
    assert withheld.endswith(ADVICE) and "data.annotation" not in withheld


def test_supervised_says_what_boxes_are(site: Make) -> None:
    """They may leave no pixel open, and are refused all the same."""
    client = site(
        lambda m: m.copy(), kind="box", withheld=True, cls=Supervised, client={"name": "supervised", "args": {}}
    )
    assert (client.train_set.targets < 2).all()
    text = refused(client)
    assert "box annotation is filled rectangles, not contours" in text and text.endswith(ADVICE)


def test_open_masks_are_not_sent_to_themselves(site: Make) -> None:
    client = site(half_open, kind="mask", cls=Supervised, client={"name": "supervised", "args": {}})
    client.data.eval_target = None  # what is trained on is the mask
    assert "data.annotation" not in refused(client)


def test_a_client_that_builds_on_it_is_named(site: Make) -> None:
    client = site(half_open, cls=AnnotationCompletion, client={"name": "fedia", "args": {}})
    assert "client 'fedia' cannot read" in refused(client)
