"""Channel selection by site: its equations by hand and by a naive twin, its gradient, and the network it is put into."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedmed.errors import UserError
from fedmed.federation.layout import Layout
from fedmed.models import build_model
from fedmed.models.output import extra_inputs
from fedmed.models.side_unet import SIDE_LOGITS, SideUNet
from fedmed.models.site_unet import DEEPEST, HEATMAP, ChannelSelection, SiteUNet, selected, site_heatmaps

TINY = {"base_width": 2, "side_width": 4, "num_sites": 3}


def selection(channels: int = 16, num_sites: int = 3, seed: int = 0) -> ChannelSelection:
    """A selection in double precision with weights of the size of 1, so that sites differ visibly."""
    made, rng = ChannelSelection(channels, num_sites).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    return made


def features(batch: int = 2, channels: int = 16, size: tuple[int, int] = (3, 5)) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def build(args: dict[str, Any] | None = None, seed: int = 0, channels: int = 1, outputs: int = 2) -> SiteUNet:
    model = build_model("site_unet", {**TINY, **(args or {})}, channels, outputs, (32, 32), "segmentation", seed=seed)
    assert isinstance(model, SiteUNet)
    return model


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 1, 32, 32, generator=torch.Generator().manual_seed(2))


def naive_heatmap(block: ChannelSelection, x: Tensor, site: int) -> Tensor:
    """The equations with a one-hot vector and 1x1 convolutions, item by item. x (B, f, h, w). Out: (B, f)."""
    weights = [p.detach()[:, :, None, None] for p in (block.site_in.weight, block.site_out.weight)]
    mixing = [p.detach()[:, :, None, None] for p in (block.mix_in.weight, block.mix_out.weight)]
    one_hot = torch.zeros(1, weights[0].shape[1], 1, 1, dtype=x.dtype)
    one_hot[0, site] = 1
    e = nn.functional.conv2d(nn.functional.conv2d(one_hot, weights[0]).relu(), weights[1])
    rows = []
    for item in x:
        total = torch.zeros(1, x.shape[1], 1, 1, dtype=x.dtype)
        for pool in (nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)):
            u = torch.cat([pool(item[None]), e], dim=1)
            total = total + nn.functional.conv2d(nn.functional.conv2d(u, mixing[0]).relu(), mixing[1])
        rows.append(torch.sigmoid(total).flatten())
    return torch.stack(rows)


# ---------------------------------------------------------------------- the selection


def test_by_hand() -> None:
    """f = 1, one pixel, all weights 1: e = 1, q(u) = u + 1, h = sigmoid(2 (x + 1)); x = -1: h = 1/2 and x' = 1.5 x."""
    block = ChannelSelection(1, 2).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(1.0)
    for x, wanted in ((-1.0, 0.5), (0.5, 1 / (1 + math.exp(-3)))):
        value = torch.full((1, 1, 1, 1), x, dtype=torch.float64)
        h = block(value, torch.tensor([1]))
        assert h.item() == pytest.approx(wanted)
        assert selected(value, h).item() == pytest.approx(x * (1 + wanted))


def test_no_mixing_gives_one_half() -> None:
    block, x = selection(), features()
    with torch.no_grad():
        block.mix_out.weight.zero_()
    h = block(x, torch.tensor([0, 2]))
    assert torch.equal(h, torch.full_like(h, 0.5)) and torch.allclose(selected(x, h), 1.5 * x)
    every = site_heatmaps(block, x, torch.arange(3))
    assert torch.equal(every, torch.full_like(every, 0.5))


@pytest.mark.parametrize("channels", [3, 16, 48])  # f / 16 < 1 is one channel
def test_naive_twin(channels: int) -> None:
    block, x = selection(channels), features(channels=channels)
    assert block.mix_in.weight.shape == (max(1, channels // 16), 2 * channels)
    wanted = torch.stack([naive_heatmap(block, x, site) for site in range(3)])
    torch.testing.assert_close(site_heatmaps(block, x, torch.arange(3)), wanted, rtol=0, atol=1e-12)
    mixed = block(x, torch.tensor([2, 0]))  # every item with a site of its own
    torch.testing.assert_close(mixed, torch.stack([wanted[2, 0], wanted[0, 1]]), rtol=0, atol=1e-12)
    assert not torch.allclose(wanted[0], wanted[1])


def test_no_site_is_the_mean_embedding_and_site_0_is_a_site() -> None:
    block, x = selection(), features()
    rows = block.embedding(torch.arange(3))
    torch.testing.assert_close(block.embedding(None), rows.mean(dim=0, keepdim=True))
    torch.testing.assert_close(block(x), block.heatmap(x, rows.mean(dim=0, keepdim=True).expand(2, -1)))
    assert not torch.allclose(block(x), block(x, torch.tensor([0, 0])))


@pytest.mark.parametrize("site", [-1, 3])
def test_an_index_without_room(site: int) -> None:
    with pytest.raises(IndexError):
        selection()(features(), torch.tensor([site, 0]))


def test_gradient() -> None:
    block, x = selection(3, 2), features(2, 3, (2, 2)).requires_grad_()
    names, values = zip(*block.named_parameters(), strict=True)

    def run(maps: Tensor, *weights: Tensor) -> Tensor:
        state = dict(zip(names, weights, strict=True))
        h = torch.func.functional_call(block, state, (maps, torch.tensor([1, 0])))
        return selected(maps, h)

    assert torch.autograd.gradcheck(run, (x, *values))


def test_order_of_items_and_sites() -> None:
    block, x = selection(), features()
    every = site_heatmaps(block, x, torch.arange(3))
    torch.testing.assert_close(site_heatmaps(block, x.flip(0), torch.arange(3)), every.flip(1))
    torch.testing.assert_close(site_heatmaps(block, x, torch.tensor([2, 0])), every[[2, 0]])
    assert site_heatmaps(block, x, torch.arange(0)).shape == (0, 2, 16)


def test_low_precision_is_computed_in_the_type_of_the_weights() -> None:
    block, x = ChannelSelection(16, 3), features().float()
    wanted = block(x.bfloat16().float(), torch.tensor([0, 1]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = block(x.bfloat16(), torch.tensor([0, 1]))
        others = site_heatmaps(block, x.bfloat16(), torch.arange(3))
    assert found.dtype == others.dtype == torch.float32 and torch.equal(found, wanted)
    assert selected(x.bfloat16(), found).dtype == torch.bfloat16


# ---------------------------------------------------------------------- the network


def test_numbers_of_parameters() -> None:
    """The published sizes: K = 5, C = 2, gray images."""
    given = (1, 2, (32, 32), "segmentation")
    model, plain = build_model("site_unet", {"num_sites": 5}, *given), build_model("side_unet", {}, *given)
    sizes = [sum(p.numel() for p in one.parameters()) for one in (model, plain)]
    assert sizes[0] - sizes[1] == 79_104 and sizes[1] == 2_337_250
    assert len(model.state_dict()) - len(plain.state_dict()) == 4 and len(plain.state_dict()) == 160


def test_output() -> None:
    model, sites = build().train(), torch.tensor([2, 0])
    output = model(images(), site_index=sites)
    assert output.logits.shape == (2, 2, 32, 32) and output.features.shape == (2, 2, 32, 32)
    assert set(output.aux) == {SIDE_LOGITS, DEEPEST, HEATMAP}
    assert [tuple(side.shape) for side in output.aux[SIDE_LOGITS]] == [(2, 2, 8, 8), (2, 2, 16, 16), (2, 2, 32, 32)]
    assert output.aux[DEEPEST].shape == (2, 32, 2, 2) and output.aux[HEATMAP].shape == (2, 32)
    rows = site_heatmaps(model.selection, output.aux[DEEPEST], torch.arange(3))  # no second run of the network
    torch.testing.assert_close(output.aux[HEATMAP], torch.stack([rows[2, 0], rows[0, 1]]))
    output.logits.sum().backward()
    used = {name for name, p in model.named_parameters() if p.grad is not None}
    assert used == {name for name, _ in model.named_parameters() if not name.startswith("sides.")}
    assert model.selection.site_in.weight.grad[:, 1].abs().max() == 0  # site 1 is not in the batch
    assert set(model.eval()(images()).aux) == {DEEPEST, HEATMAP}


def test_the_site_matters_and_batches_may_mix_sites() -> None:
    model = build(seed=1).eval()
    pixels = 1e3 * images()  # far from 0 where nothing is normalised by the batch
    with torch.no_grad():
        model.selection.site_in.weight.mul_(100)
        first, third = (model(pixels, site_index=torch.full((2,), site)).logits for site in (0, 2))
        mixed, none = model(pixels, site_index=torch.tensor([0, 2])).logits, model(pixels).logits
    torch.testing.assert_close(mixed, torch.stack([first[0], third[1]]))
    assert not torch.allclose(first, third) and not torch.allclose(none, first)


def test_the_rest_is_a_side_unet() -> None:
    """Equal weights with equal seeds; with Q2 = 0 the deepest map is 1.5 times that of the plain network."""
    model, plain = build(seed=3), build_model("side_unet", {"base_width": 2, "side_width": 4}, 1, 2, (32, 32),
                                              "segmentation", seed=3)  # fmt: skip
    mine = model.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in plain.state_dict().items())
    assert isinstance(plain, SideUNet)
    model.eval(), plain.eval()
    with torch.no_grad():
        model.selection.mix_out.weight.zero_()
        maps = plain.encoder(images())
        wanted = plain.decode([*maps[:-1], 1.5 * maps[-1]]).logits
        torch.testing.assert_close(model(images(), site_index=torch.tensor([1, 1])).logits, wanted)


def test_groups_and_what_a_batch_must_bring() -> None:
    model = build()
    layout = Layout.of(model, lambda name, module: False)
    groups = layout.group_of("depth")
    assert layout.num_groups("depth") == 12
    assert groups["selection.mix_in.weight"] == 5 and groups["decoder.up1.reduce.weight"] == 6
    assert all(name in layout.exchanged for name, _ in model.named_parameters())
    given = {"site_index": torch.tensor([0]), "other": torch.tensor([1])}
    assert extra_inputs(model, given) == {"site_index": given["site_index"]}


def test_a_frozen_selection_neither_travels_nor_learns() -> None:
    model = build({"train_selection": False}, seed=4)
    layout = Layout.of(model, lambda name, module: False)
    frozen = {f"selection.{name}.weight" for name in ("site_in", "site_out", "mix_in", "mix_out")}
    assert set(layout.entries) - set(layout.exchanged) == frozen
    free = build(seed=4).state_dict()
    assert all(torch.equal(value, free[name]) for name, value in model.state_dict().items())
    model(images(), site_index=torch.tensor([0, 1])).logits.sum().backward()
    assert all(p.grad is None for p in model.selection.parameters())
    assert model.encoder.stages[0][0].weight.grad.abs().sum() > 0


def test_room_for_no_site_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.args\.num_sites: expected a whole number of at least 1, got 0"):
        build({"num_sites": 0})
