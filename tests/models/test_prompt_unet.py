"""The U-Net with prompts: size as published, what each input changes, what other sites' maps leave alone, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedmed.errors import UserError
from fedmed.federation.layout import Layout
from fedmed.models import build_model
from fedmed.models.build import is_classifier
from fedmed.models.output import extra_inputs
from fedmed.models.prompt_unet import AUX_LOGITS, FUSED, PromptUNet, annotation_planes


def build(size: tuple[int, int] = (32, 32), outputs: int = 2, seed: int = 0, **args: Any) -> PromptUNet:
    args = {"base_width": 2, "num_sites": 3, **args}
    model = build_model("prompt_unet", args, 1, outputs, size, "segmentation", seed=seed)
    assert isinstance(model, PromptUNet)
    return model


def images(items: int = 2, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.rand(items, 1, *size, generator=torch.Generator().manual_seed(1))


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


def test_size_is_the_published_one() -> None:
    model = build((64, 64), base_width=16, num_sites=5)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert len(model.state_dict()) == 252 and sum(p.numel() for p in model.parameters()) == 2_895_990
    assert counts == {
        "encoder": 1_180_464, "decoder": 641_202, "aux_decoder": 641_202, "mlp": 50_768, "fusion": 374_976 + 7_282,
    }  # fmt: skip
    assert list(model.state_dict())[:2] == ["distribution_prompts", "universal_prompt"]
    usual = build_model("prompt_unet", {}, 1, 2, (64, 32), "segmentation")
    assert usual.distribution_prompts.shape == (8, 4, 2) and usual.universal_prompt.shape == (1, 4, 2)


def test_prompts_come_from_the_seed_and_room_changes_nothing_else() -> None:
    first, again, other, larger = build(), build(), build(seed=1), build(num_sites=7)
    for prompt in (first.distribution_prompts, first.universal_prompt):
        assert prompt.requires_grad and bool(((prompt >= 0) & (prompt < 1)).all())
    assert torch.equal(first.distribution_prompts, again.distribution_prompts)
    assert not torch.equal(first.distribution_prompts, other.distribution_prompts)
    kept = {n: v for n, v in first.state_dict().items() if n != "distribution_prompts"}
    assert all(torch.equal(value, larger.state_dict()[name]) for name, value in kept.items())


@pytest.mark.parametrize("outputs", [2, 3])
def test_output_in_training_and_in_use(outputs: int) -> None:
    model = build((32, 48), outputs)
    for width in (1, 3):
        assert build(base_width=width)(images(), ids(0, 1)).logits.shape == (2, 2, 32, 32)
    output = model.train()(images(2, (32, 48)), ids(0, 1), ids(0, -1))
    assert output.logits.shape == output.aux[AUX_LOGITS].shape == (2, outputs, 32, 48)
    assert output.features.shape == (2, 2, 32, 48) and output.aux[FUSED].shape == (2, 8, 2, 3)
    assert torch.equal(model.decoder.out_conv(output.features), output.logits)
    assert not torch.equal(output.logits, output.aux[AUX_LOGITS])
    assert model.eval()(images(2, (32, 48)), ids(0, 1)).aux is None
    assert bool(model.train()(images(1, (32, 48)), ids(0)).logits.isfinite().all())


def test_what_the_site_and_the_kind_change() -> None:
    """Each item has its own; the encoder does not see them. Without a site, the mean of the rows counts."""
    model = build().eval()
    both = model(images(), ids(0, 2), ids(1, -1)).logits
    alone = torch.cat([model(images()[i : i + 1], ids(s), ids(k)).logits for i, s, k in ((0, 0, 1), (1, 2, -1))])
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-5)
    assert not torch.equal(both, model(images(), ids(1, 2), ids(1, -1)).logits)
    assert not torch.equal(both, model(images(), ids(0, 2), ids(0, -1)).logits)
    assert torch.equal(model(images(), ids(0, 2)).logits, model(images(), ids(0, 2), ids(-1, -1)).logits)
    nobody = model(images()).logits
    with torch.no_grad():
        model.distribution_prompts[0] = model.distribution_prompts.mean(dim=0)
    torch.testing.assert_close(nobody, model(images(), ids(0, 0)).logits, rtol=0, atol=1e-6)
    batch = {"site_index": ids(0, 1), "annotation_kind": ids(0, 0), "modality_present": ids(1, 1)}
    assert list(extra_inputs(model, batch)) == ["site_index", "annotation_kind"]


def test_annotation_planes() -> None:
    planes = annotation_planes(ids(2, -1, 0), (1, 2))
    assert planes.shape == (3, 3, 1, 2)
    assert planes[:, :, 0, 0].tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]] and torch.equal(
        planes[..., 0], planes[..., 1]
    )


def test_split_first_convolution_is_the_one_on_everything() -> None:
    model = build().double().eval()
    deepest = model.encoder(images().double())[-1]
    prompts = model.prompts(2, ids(1, 2), ids(0, 1))
    own, kinds = model.distribution_prompts[1:], annotation_planes(ids(0, 1), (2, 2)).double()
    joined = torch.cat([own.unsqueeze(1), model.universal_prompt.expand(2, 1, 2, 2), kinds], dim=1)
    assert torch.equal(prompts, joined)
    fusion = model.fusion
    whole = fusion.mix_norm(fusion.mix(torch.cat([deepest, joined], dim=1)))
    expected = fusion.attention(torch.nn.functional.leaky_relu(fusion.reduce_norm(fusion.reduce(
        torch.nn.functional.leaky_relu(whole)
    ))))  # fmt: skip
    torch.testing.assert_close(fusion(fusion.image_part(deepest), prompts, None), expected, rtol=0, atol=1e-12)


def test_only_the_own_row_has_a_gradient() -> None:
    model = build().train()
    output = model(images(), ids(1, 1), ids(0, 0))
    (output.logits.square().mean() + output.aux[AUX_LOGITS].square().mean()).backward()
    gradient = model.distribution_prompts.grad
    assert float(gradient[1].abs().min()) > 0 and bool(gradient[[0, 2]].eq(0).all())
    assert float(model.universal_prompt.grad.abs().min()) > 0
    assert all(p.grad is not None for p in model.parameters())


def test_maps_of_other_sites() -> None:
    """They are what the site itself would give with the same dropped units; statistics and gradient know nothing of them."""
    model = build().train()
    output = model(images(), ids(1, 1), ids(2, 2))
    before = {name: value.clone() for name, value in model.named_buffers()}
    others = model.others_fused(output.aux, ids(0, 1, 2), ids(2, 2))
    assert others.shape == (3, 2, 8, 2, 2) and not others.requires_grad
    torch.testing.assert_close(others[1], output.aux[FUSED].detach(), rtol=0, atol=1e-6)
    assert float((others[0] - others[2]).abs().max()) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert model.others_fused(output.aux, ids()[:0].long(), ids(2, 2)).shape == (0, 2, 8, 2, 2)


def test_other_sizes_are_refused() -> None:
    for size in ((40, 32), (32, 50)):
        with pytest.raises(
            UserError, match=rf"multiples of 16 pixels, these are {size[0]} x {size[1]}; set data\.resize"
        ):
            build(size)
    with pytest.raises(UserError, match="at least 32 pixels"):
        build((16, 32))
    with pytest.raises(UserError, match="made for images of 32 x 32 pixels, got 48 x 32"):
        build()(images(2, (48, 32)))
    with pytest.raises(UserError, match=r"num_sites: expected a whole number of at least 1, got 0"):
        build(num_sites=0)
    with pytest.raises(UserError, match=r"base_width"):
        build(base_width=0)
    with pytest.raises(UserError, match="made for segmentation"):
        build_model("prompt_unet", {}, 1, 2, (32, 32), "classification")


def test_groups_and_classifier() -> None:
    model = build()
    layout = Layout.of(model, lambda name, module: False)
    assert set(layout.group_of("depth").values()) == set(range(layout.num_groups("depth")))
    heads = {name for name, module in model.named_modules() if is_classifier(name, module)}
    assert heads == {"decoder.out_conv", "aux_decoder.out_conv"}
    assert all(entry.kind != "buffer" or "running" in name for name, entry in layout.entries.items())
