"""The U-Net with side outputs: sizes as published, side outputs when they are wanted, any image size."""

from __future__ import annotations

import pytest
import torch

from fedmed.errors import UserError
from fedmed.federation.layout import Layout
from fedmed.models.build import build_model
from fedmed.models.side_unet import SIDE_LOGITS, SideUNet


def size(module: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def test_sizes_are_those_of_the_official_code() -> None:
    model = SideUNet(1, 2)
    assert (size(model), size(model.encoder), size(model.decoder)) == (2_337_250, 1_180_464, 633_010)
    assert len(model.state_dict()) == 160
    assert len(list(model.decoder.parameters())) == 42


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 56), (33, 47)])
def test_outputs_have_the_size_of_the_image_and_its_parts(height: int, width: int) -> None:
    output = SideUNet(3, 4, base_width=2, side_width=3)(torch.rand(2, 3, height, width))
    assert output.logits.shape == (2, 4, height, width)
    assert output.features is not None and output.features.shape == (2, 2, height, width)
    assert output.aux is not None
    shapes = [tuple(side.shape[1:]) for side in output.aux[SIDE_LOGITS]]
    assert shapes == [(4, height // 4, width // 4), (4, height // 2, width // 2), (4, height, width)]


def test_side_outputs_are_made_only_where_they_are_read() -> None:
    model, images = SideUNet(1, 2, base_width=2, side_width=2), torch.rand(2, 1, 32, 32)
    model.give_sides = False
    assert model(images).aux is None
    model.give_sides = True
    assert model.eval()(images).aux is None
    with_sides = model.train()(images).aux
    assert with_sides is not None


def test_every_entry_belongs_to_a_stage() -> None:
    model = build_model("side_unet", {"base_width": 2, "side_width": 2}, 1, 2, (32, 32), "segmentation", seed=3)
    layout = Layout.of(model, lambda name, module: False)
    groups = layout.group_of("depth")
    assert set(groups) == set(layout.entries) and set(groups.values()) == set(range(layout.num_groups("depth")))


def test_equal_seeds_give_equal_weights() -> None:
    one, two, other = (
        build_model("side_unet", {"base_width": 2}, 1, 2, (32, 32), "segmentation", seed=seed).state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("args", [{"base_width": 0}, {"side_width": 0}])
def test_widths_below_one_are_refused(args: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(args))):
        SideUNet(1, 2, **args)
