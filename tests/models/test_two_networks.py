"""Two networks in one model: equal layers, different weights, one of them run where only one is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedmed.errors import UserError
from fedmed.federation.layout import Layout
from fedmed.models import Output, build_model
from fedmed.models.build import is_classifier
from fedmed.models.two_networks import TwoNetworks

UNET = {"name": "unet", "args": {"base_width": 2}}


def build(args: dict[str, Any], seed: int = 0, outputs: int = 2) -> TwoNetworks:
    model = build_model("two_networks", args, 3, outputs, (16, 16), "segmentation", seed=seed)
    assert isinstance(model, TwoNetworks)
    return model


def layout_of(model: nn.Module) -> Layout:
    return Layout.of(model, lambda name, module: False)


def test_logits_are_those_of_the_first_network() -> None:
    model, images = build(UNET), torch.randn(2, 3, 16, 16)
    output = model(images)
    assert isinstance(output, Output) and output.aux is not None
    assert output.logits.shape == output.aux["second_logits"].shape == (2, 2, 16, 16)
    model.eval()
    alone, second = model(images), model.second(images)
    assert alone.aux is None
    assert torch.equal(alone.logits, model.net1(images).logits)
    assert torch.equal(alone.features, model.net1(images).features)
    assert torch.equal(second, model.net2(images).logits) and not torch.equal(alone.logits, second)


def test_eval_mode_does_not_run_the_second_network() -> None:
    model, calls = build(UNET), list[int]()
    model.net2.register_forward_hook(lambda *_: calls.append(1))
    images = torch.randn(2, 3, 16, 16)
    model.eval()(images)
    assert not calls
    model.second(images)
    model.train()(images)
    assert len(calls) == 2


def test_the_first_is_what_it_is_alone_and_the_second_has_its_own_draw() -> None:
    mine = build(UNET, seed=3).state_dict()
    alone = build_model("unet", UNET["args"], 3, 2, (16, 16), "segmentation", seed=3).state_dict()  # type: ignore[arg-type]
    assert set(mine) == {f"{net}.{name}" for net in ("net1", "net2") for name in alone}
    assert all(torch.equal(value, mine[f"net1.{name}"]) for name, value in alone.items())
    for name in (n for n in alone if n.endswith("weight") and alone[n].ndim == 4):
        first, second = mine[f"net1.{name}"], mine[f"net2.{name}"]
        assert not torch.equal(first, second) and 0.5 < float(first.std() / second.std()) < 2
    assert all(torch.equal(value, mine[name]) for name, value in build(UNET, seed=3).state_dict().items())
    other = build(UNET, seed=4).state_dict()
    assert not torch.equal(other["net2.outc.weight"], mine["net2.outc.weight"])


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    build(UNET)
    assert torch.equal(before, torch.get_rng_state())


def test_losses_of_the_two_do_not_meet() -> None:
    model = build(UNET)
    output = model(torch.randn(2, 3, 16, 16))
    output.aux["second_logits"].sum().backward()
    assert all(p.grad is None for p in model.net1.parameters())
    assert all(p.grad is not None for p in model.net2.parameters())


def test_groups_and_classifiers_of_both() -> None:
    model = build(UNET)
    groups, layout = layout_of(model).group_of("depth"), layout_of(model)
    assert layout.num_groups("depth") == 20 and set(groups) == set(layout.exchanged)
    assert [groups[f"{net}.{place}.weight"] for place in ("inc.conv1", "outc") for net in ("net1", "net2")] == [
        0,
        1,
        18,
        19,
    ]
    assert model.classifier_prefixes == ("net1.outc", "net2.outc")
    assert set(Layout.of(model, is_classifier).personal) == {
        f"net{k}.outc.{n}" for k in (1, 2) for n in ("weight", "bias")
    }


class Odd(nn.Module):
    """A network that asks for an extra, and has side outputs and no groups."""

    inputs = ("shift",)

    def __init__(self, in_channels: int, num_outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, num_outputs, 1)

    def forward(self, images: Tensor, shift: Tensor | None = None) -> Output:
        logits = self.conv(images)
        return Output(logits if shift is None else logits + shift[:, None, None, None], None, {"mine": 1})


def test_extras_and_side_outputs_are_passed_on() -> None:
    model, images = build({"name": f"{__name__}:Odd"}), torch.randn(2, 3, 16, 16)
    assert model.inputs == ("shift",) and model.groups == {} and model.classifier_prefixes == ()
    plain, shifted = model(images), model(images, shift=torch.ones(2))
    assert set(plain.aux) == {"mine", "second_logits"} and set(model.eval()(images).aux) == {"mine"}
    for one, two in ((plain.logits, shifted.logits), (plain.aux["second_logits"], shifted.aux["second_logits"])):
        torch.testing.assert_close(two, one + 1)


def test_a_network_of_monai() -> None:
    args = {"channels": [4, 8], "strides": [2], "num_res_units": 0}
    output = build({"name": "monai:UNet", "args": args})(torch.randn(2, 3, 16, 16))
    assert output.logits.shape == output.aux["second_logits"].shape == (2, 2, 16, 16)


def test_what_does_not_fit_is_said() -> None:
    assert build({}).net1.outc.in_channels == 16
    with pytest.raises(UserError, match=r"model\.args\.width: unknown"):
        build({"name": "unet", "args": {"width": 4}})
    with pytest.raises(UserError, match="made for segmentation"):
        build_model("two_networks", UNET, 3, 2, (16, 16), "classification")
    with pytest.raises(UserError, match="made for classification"):
        build({"name": "small_cnn"})
