"""A second head on any classifier: same base, own draw, same features, and what each entry is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedmed.errors import UserError
from fedmed.federation.layout import Layout
from fedmed.models import Output, build_model
from fedmed.models.build import is_classifier
from fedmed.models.two_heads import TwoHeads, is_personal_head, linear_like

CNN = {"name": "small_cnn", "args": {"widths": [4, 8]}}
MONAI = [
    ("DenseNet121", {"block_config": [2, 2]}),
    ("EfficientNetBN", {"model_name": "efficientnet-b0"}),
    ("ViT", {"patch_size": 16, "hidden_size": 48, "num_heads": 4, "num_layers": 1, "mlp_dim": 32}),
]


def build(args: dict[str, Any], seed: int = 0, size: int = 32) -> TwoHeads:
    model = build_model("two_heads", args, 3, 5, (size, size), "classification", seed=seed)
    assert isinstance(model, TwoHeads)
    return model


def test_both_heads_on_one_feature() -> None:
    model = build(CNN).eval()
    output = model(torch.randn(2, 3, 32, 32))
    assert isinstance(output, Output) and output.features.shape == (2, 8)
    assert torch.equal(output.logits, model.base.head(output.features))
    assert torch.equal(output.aux["personal_logits"], model.personal_head(output.features))
    assert output.aux["personal_logits"].shape == output.logits.shape == (2, 5)
    assert model.classifier_prefixes == ("base.head",)


def test_defaults_of_the_base() -> None:
    assert build({}).personal_head.in_features == 128
    assert build({"name": "small_cnn"}).training


def test_the_base_is_what_it_is_alone_and_the_second_head_has_its_own_draw() -> None:
    model = build(CNN, seed=3)
    alone = build_model("small_cnn", CNN["args"], 3, 5, (32, 32), "classification", seed=3).state_dict()
    mine = model.state_dict()
    assert all(torch.equal(value, mine[f"base.{name}"]) for name, value in alone.items())
    assert set(mine) == {f"base.{name}" for name in alone} | {"personal_head.weight", "personal_head.bias"}
    head = model.personal_head.weight
    stream = torch.Generator().manual_seed(3)
    first = torch.rand(head.shape, generator=stream) * 2 - 1
    assert not torch.allclose(head * 8**0.5, first) and not torch.equal(head, model.base.head.weight)
    assert head.abs().max() <= 8**-0.5 and head.std() > 0.5 * 8**-0.5 / 3**0.5
    assert all(torch.equal(value, mine[name]) for name, value in build(CNN, seed=3).state_dict().items())
    assert not torch.equal(build(CNN, seed=4).personal_head.weight, head)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    build(CNN)
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_personal_and_what_is_the_classifier() -> None:
    model = build(CNN)
    layout = Layout.of(model, is_personal_head)
    assert layout.personal == ("personal_head.weight", "personal_head.bias")
    assert not any(name.startswith("personal_head") for name in (*layout.exchanged, *layout.trainable))
    assert Layout.of(model, is_classifier).personal == ("base.head.weight", "base.head.bias")


def test_groups_of_the_base_and_one_more() -> None:
    model = build(CNN)
    assert model.groups == {"depth": ("base.block1", "base.block2", "base.head", "personal_head")}
    groups = Layout.of(model, is_personal_head).group_of("depth")
    assert groups["base.block1.conv.weight"] == 0 and groups["personal_head.bias"] == 3


@pytest.mark.parametrize(("name", "args"), MONAI, ids=[name for name, _ in MONAI])
def test_networks_of_monai(name: str, args: dict[str, Any]) -> None:
    model = build({"name": f"monai:{name}", "args": args}, size=64)
    output = model(torch.randn(2, 3, 64, 64))
    assert output.logits.shape == output.aux["personal_logits"].shape == (2, 5)
    (output.logits.sum() + output.aux["personal_logits"].sum()).backward()
    assert model.personal_head.weight.grad is not None and model.training
    head = model.get_submodule(model.classifier_prefixes[0])
    assert torch.allclose(head(output.features), output.logits, atol=1e-5)  # the features are those behind the dropout


class Odd(nn.Module):
    """A classifier of the given kind between features and logits."""

    classifier_prefixes: tuple[str, ...] = ("head",)

    def __init__(self, in_channels: int, num_outputs: int, kind: str = "fits") -> None:
        super().__init__()
        self.stem = nn.Linear(in_channels, 4)
        self.head: nn.Module = nn.Linear(4, num_outputs, bias=kind != "no_bias")
        if kind == "two_layers":
            self.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, num_outputs))
        if kind == "no_name":
            self.classifier_prefixes = ()
        self.kind = kind
        self.inputs = ("shift",)

    def forward(self, images: Tensor, shift: Tensor | None = None) -> Output:
        features = self.stem(images.mean(dim=(2, 3)))
        features = features if shift is None else features + shift
        logits = self.head(features)
        aux = {"mine": 1}
        if self.kind == "no_features":
            return Output(logits, None, aux)
        return Output(2 * logits if self.kind == "behind" else logits, features, aux)


def odd(kind: str) -> TwoHeads:
    return build({"name": f"{__name__}:Odd", "args": {"kind": kind}})


def test_extras_and_aux_are_passed_on() -> None:
    model = odd("no_bias")
    assert model.personal_head.bias is None and model.inputs == ("shift",) and model.groups == {}
    images = torch.randn(2, 3, 32, 32)
    plain, shifted = model(images), model(images, shift=torch.ones(2, 4))
    assert torch.allclose(shifted.features, plain.features + 1) and set(plain.aux) == {"mine", "personal_logits"}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("two_layers", "has a Sequential"),
        ("no_name", "no classifier that it names"),
        ("no_features", "a Linear that does not"),
        ("behind", "a Linear that does not"),
    ],
)
def test_another_classifier_is_refused(kind: str, words: str) -> None:
    with pytest.raises(UserError, match=rf"model\.args\.name .*:Odd: .*one linear layer .*{words}"):
        odd(kind)


def test_wrong_arguments_of_the_base() -> None:
    with pytest.raises(UserError, match=r"model\.args\.width"):
        build({"name": "small_cnn", "args": {"width": [4]}})
    with pytest.raises(UserError, match="made for segmentation"):
        build({"name": "unet"})


def test_linear_like_of_no_input() -> None:
    made = linear_like(nn.Linear(1, 3), torch.Generator().manual_seed(0))
    assert made.weight.shape == (3, 1) and made.weight.abs().max() <= 1
