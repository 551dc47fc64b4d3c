"""The network with one encoder per modality: any non-empty subset works, and what is missing has exactly no influence."""

from __future__ import annotations

import math

import pytest
import torch

from fedmed.errors import UserError
from fedmed.federation.layout import Layout
from fedmed.models import build_model
from fedmed.models.build import is_classifier
from fedmed.models.multi_encoder_unet import MultiEncoderUNet, only, present_mean
from fedmed.models.output import extra_inputs


def _build(modalities: int = 3, outputs: int = 2, size: int = 16, seed: int = 0, **args: int) -> MultiEncoderUNet:
    model = build_model(
        "multi_encoder_unet", {"base_width": 4, **args}, modalities, outputs, (size, size), "segmentation", seed=seed
    )
    assert isinstance(model, MultiEncoderUNet)
    return model


def _images(items: int = 2, modalities: int = 3, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randn(items, modalities, height, width, generator=torch.Generator().manual_seed(1))


def _rows(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.uint8)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 23), (33, 20)])
@pytest.mark.parametrize("modalities", [1, 2, 6])
def test_shapes_for_any_parity_and_a_batch_of_one(modalities: int, height: int, width: int) -> None:
    model = _build(modalities).train()
    output = model(_images(1, modalities, height, width))
    assert output.logits.shape == (1, 2, height, width) and output.features.shape == (1, 4, height, width)
    sides = [(1, 2, math.ceil(height / 2**s), math.ceil(width / 2**s)) for s in (1, 2, 3)]
    assert [tuple(side.shape) for side in output.aux["deep"]] == sides
    assert torch.equal(model.shared.fusion.outc(output.features), output.logits)


def test_levels() -> None:
    model = _build(size=33)
    levels = model.encode(_images(2, 3, 33, 18))
    assert [tuple(maps.shape) for maps in levels] == [
        (2, 3, 4, 33, 18), (2, 3, 8, 17, 9), (2, 3, 16, 9, 5), (2, 3, 32, 5, 3)
    ]  # fmt: skip
    assert model.decode_single(levels, 2).shape == (2, 2, 33, 18)
    # Every level keeps the channels-last layout of one modality, which the convolutions go on with.
    assert all(maps[:, 1].is_contiguous(memory_format=torch.channels_last) for maps in levels)


def test_depth_and_width() -> None:
    model = _build(depth=5, base_width=2)  # 16 pixels end as one pixel, where a norm per channel has no variance
    output = model.train()(_images(1))
    assert output.features.shape[1] == 2 and len(output.aux["deep"]) == 4 and torch.isfinite(output.logits).all()
    assert len(_build(depth=2)(_images()).aux["deep"]) == 1
    for wrong, words in (({"depth": 1}, "2 to 5 levels"), ({"depth": 6}, "2 to 5 levels"), ({"base_width": 1}, "2")):
        with pytest.raises(UserError, match=words):
            _build(**wrong)
    usual = build_model("multi_encoder_unet", {}, 3, 1, (16, 16), "segmentation")
    assert sum(p.numel() for p in usual.parameters()) == 324141 and not list(usual.buffers())


def test_groups_and_classifier() -> None:
    model = _build()
    layout = Layout.of(model, lambda name, module: False)
    by_modality = layout.group_of("modality")
    assert layout.num_groups("modality") == 4 and set(by_modality.values()) == {0, 1, 2, 3}
    assert all(name.startswith(f"encoders.{g}.") == (g < 3) for name, g in by_modality.items())
    by_depth = layout.group_of("depth")
    assert set(by_depth.values()) == set(range(layout.num_groups("depth")))
    for name in model.state_dict():
        assert sum(name.startswith(prefix + ".") for prefix in model.groups["depth"]) == 1
    heads = {name for name, module in model.named_modules() if is_classifier(name, module)}
    assert "shared.fusion.outc" in heads and "shared.single.outc" in heads and "shared.fusion.deep.2" in heads
    assert not any(name.startswith(("encoders", "shared.mix", "shared.fusion.ups")) for name in heads)


def test_seed_decides_the_weights() -> None:
    first, second, other = _build(seed=3).state_dict(), _build(seed=3).state_dict(), _build(seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_all_present_is_the_same_as_no_mask_in_any_type() -> None:
    model = _build()
    images = _images()
    plain = model(images).logits
    for kind in (torch.uint8, torch.bool, torch.float32, torch.int64):
        assert torch.equal(model(images, modality_present=torch.ones(2, 3, dtype=kind)).logits, plain)


def test_a_mask_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected shape \(2, 3\), got \(3, 2\)"):
        _build()(_images(), torch.ones(3, 2))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_a_missing_modality_has_no_influence(garbage: float) -> None:
    model = _build()
    present = _rows([1, 0, 1], [0, 1, 0])
    images = _images()
    spoilt = images.masked_fill(present[:, :, None, None] == 0, garbage)
    clean, dirty = model(images, present), model(spoilt, present)
    assert torch.equal(clean.logits, dirty.logits) and torch.equal(clean.features, dirty.features)
    assert all(torch.equal(a, b) for a, b in zip(clean.aux["deep"], dirty.aux["deep"], strict=True))
    for maps in model.encode(spoilt, present):
        assert maps[0, 1].count_nonzero() == 0 and maps[1, 0].count_nonzero() == 0 and torch.isfinite(maps).all()


def test_the_encoder_of_a_missing_modality_gets_no_gradient() -> None:
    model = _build()
    present = _rows([1, 0, 1], [1, 0, 0])
    images = _images().requires_grad_()
    levels = model.encode(images, present)
    logits, _, deep = model.decode(levels, present)
    total = sum(side.square().sum() for side in (logits, *deep))
    total = total + sum(model.decode_single(levels, m).square().sum() for m in range(3))  # not even without a mask
    total.backward()
    assert all(p.grad.count_nonzero() == 0 for p in model.encoders[1].parameters())
    assert images.grad[:, 1].count_nonzero() == 0 and images.grad[1, 2].count_nonzero() == 0
    others = [p for name, p in model.named_parameters() if not name.startswith("encoders.1.")]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.count_nonzero() for p in others)


def test_a_subset_is_the_model_of_these_modalities_alone() -> None:
    model, small = _build(3), _build(2)
    own = model.state_dict()
    renamed = {f"encoders.{new}{name[10:]}": v for old, new in ((0, 0), (2, 1)) for name, v in own.items()
               if name.startswith(f"encoders.{old}.")}  # fmt: skip
    small.load_state_dict({**renamed, **{n: v for n, v in own.items() if n.startswith("shared")}})
    images = _images()
    both, alone = model(images, _rows([1, 0, 1], [1, 0, 1])), small(images[:, [0, 2]])
    torch.testing.assert_close(both.logits, alone.logits)
    torch.testing.assert_close(both.aux["deep"], alone.aux["deep"])


def test_a_student_from_the_same_maps_is_the_forward_pass_with_one_modality() -> None:
    model = _build()
    images, present = _images(), _rows([1, 1, 1], [0, 1, 1])
    levels = model.encode(images, present)
    for m in (1, 2):
        kept = only(present, m)
        assert kept.tolist() == [[int(j == m) for j in range(3)]] * 2
        logits, features, _ = model.decode(levels, kept)
        direct = model(images, kept)
        torch.testing.assert_close(logits, direct.logits)
        torch.testing.assert_close(features, direct.features)
    assert only(present, 0).tolist() == [[1, 0, 0], [0, 0, 0]]
    # With one modality teacher and student are the same computation: their distance is exactly 0.
    alone = _rows([0, 1, 0], [0, 1, 0])
    levels = model.encode(images, alone)
    assert torch.equal(model.decode(levels, alone)[1], model.decode(levels, only(alone, 1))[1])


def test_items_do_not_depend_on_their_batch() -> None:
    model = _build()
    images, present = _images(4), _rows([1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1])
    order = torch.tensor([2, 0, 3, 1])
    logits = model(images, present).logits
    torch.testing.assert_close(model(images[order], present[order]).logits, logits[order])
    torch.testing.assert_close(model(images[1:2], present[1:2]).logits, logits[1:2])


def test_an_item_without_any_modality_is_finite_and_says_nothing() -> None:
    model = _build()
    images, present = _images(), _rows([0, 0, 0], [1, 1, 0])
    images[0] = math.nan
    output = model(images, present)
    assert torch.isfinite(output.logits).all()
    assert torch.equal(output.logits[0], model(_images(2) * 9, present).logits[0])
    output.logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_mean_over_what_is_present() -> None:
    maps = torch.tensor([[1.0, 2.0, 6.0], [1.0, 2.0, 6.0], [1.0, 2.0, 6.0]])[:, :, None, None, None]
    mean = present_mean(maps, _rows([1, 1, 1], [1, 0, 1], [0, 0, 0]))
    assert mean.flatten().tolist() == [3.0, 3.5, 0.0]


def test_double_precision_and_what_the_client_asks_for() -> None:
    model = _build().double()
    output = model(_images().double(), _rows([1, 0, 1], [1, 1, 1]))
    assert output.logits.dtype == torch.float64 and torch.isfinite(output.logits).all()
    extras = {"modality_present": _rows([1, 0, 1]), "active_classes": _rows([1])}
    assert list(extra_inputs(model, extras)) == ["modality_present"]
