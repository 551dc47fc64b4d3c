"""The two networks of the package and the builder."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from fedmed.errors import UserError
from fedmed.models import Output, build_model
from fedmed.models.output import channels_last

CASES = [
    ("small_cnn", {}, 3, 7, "classification"),
    ("small_cnn", {"widths": [4, 8]}, 1, 2, "multilabel"),
    ("unet", {"base_width": 4}, 3, 1, "segmentation"),
    ("unet", {"base_width": 4, "upsampling": "transpose"}, 1, 3, "segmentation"),
]


def _build(name: str, args: dict, channels: int, outputs: int, task: str, seed: int = 0) -> torch.nn.Module:  # type: ignore[type-arg]
    return build_model(name, args, channels, outputs, (32, 32), task, seed=seed)


@pytest.mark.parametrize("case", CASES)
def test_contract(case: tuple) -> None:  # type: ignore[type-arg]
    _, _, channels, outputs, task = case
    model = _build(*case)
    images = torch.randn(2, channels, 32, 32)
    output = model(images)
    assert isinstance(output, Output)
    pixels = (32, 32) if task == "segmentation" else ()
    assert output.logits.shape == (2, outputs, *pixels)
    assert output.features.shape[0] == 2
    # The classifier applied to the features gives the logits.
    (prefix,) = model.classifier_prefixes
    assert torch.equal(model.get_submodule(prefix)(output.features), output.logits)
    output.logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("case", CASES)
def test_groups_cover_every_entry_once(case: tuple) -> None:  # type: ignore[type-arg]
    model = _build(*case)
    depth = model.groups["depth"]
    for name in model.state_dict():
        assert sum(name.startswith(prefix + ".") for prefix in depth) == 1


@pytest.mark.parametrize("case", CASES)
def test_seed_decides_the_weights_and_the_global_generator_is_left_alone(case: tuple) -> None:  # type: ignore[type-arg]
    before = torch.get_rng_state()
    first = _build(*case, seed=3).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    second, other = _build(*case, seed=3).state_dict(), _build(*case, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert all(value.is_contiguous() for value in first.values())


def _size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_numbers_of_parameters() -> None:
    assert _size(_build("small_cnn", {}, 3, 7, "classification")) == 98583
    assert _size(_build("unet", {}, 3, 1, "segmentation")) == 1080929
    assert _size(_build("unet", {"base_width": 43}, 3, 1, "segmentation")) == 7795127
    assert _size(_build("unet", {"base_width": 32, "upsampling": "transpose"}, 3, 1, "segmentation")) == 7763041


def test_unet_layers() -> None:
    model = _build("unet", {}, 3, 1, "segmentation")
    assert model.groups["depth"] == ("inc", "down1", "down2", "down3", "down4", "up1", "up2", "up3", "up4", "outc")
    shapes = {name: tuple(value.shape[:2]) for name, value in model.state_dict().items() if "conv" in name}
    assert shapes["inc.conv1.weight"] == (16, 3)
    assert shapes["down3.convs.conv2.weight"] == (128, 128)
    assert shapes["down4.convs.conv2.weight"] == (128, 128)
    # The first convolution of a decoder block halves what was concatenated.
    assert shapes["up1.convs.conv1.weight"] == (128, 256)
    assert [shapes[f"up{i}.convs.conv2.weight"][0] for i in (1, 2, 3, 4)] == [64, 32, 16, 16]
    assert len([m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]) == 18
    assert not any(isinstance(m, torch.nn.Dropout) for m in model.modules())


@pytest.mark.parametrize("upsampling", ["bilinear", "transpose"])
def test_unet_takes_any_image_size(upsampling: str) -> None:
    model = build_model("unet", {"base_width": 2, "upsampling": upsampling}, 1, 1, (37, 50), "segmentation")
    assert model(torch.randn(2, 1, 37, 50)).logits.shape == (2, 1, 37, 50)


def test_a_received_state_can_be_run_without_loading() -> None:
    model = _build("unet", {"base_width": 4}, 3, 1, "segmentation").eval()
    other = _build("unet", {"base_width": 4}, 3, 1, "segmentation", seed=9).eval()
    images = torch.randn(2, 3, 32, 32)
    got = torch.func.functional_call(model, other.state_dict(), (images,))
    assert torch.equal(got.logits, other(images).logits)
    assert torch.equal(copy.deepcopy(model)(images).logits, model(images).logits)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_changes_the_layout_only(channels: int) -> None:
    images = torch.randn(2, channels, 8, 6)
    laid_out = channels_last(images)
    assert torch.equal(laid_out, images)
    assert laid_out.stride() == (48 * channels, 1, 6 * channels, channels)
    assert channels_last(images[:0]).shape == (0, channels, 8, 6)


@pytest.mark.parametrize(
    ("name", "args", "task", "size", "message"),
    [
        ("smal_cnn", {}, "classification", 32, "did you mean 'small_cnn'"),
        ("small_cnn", {"width": [4]}, "classification", 32, "did you mean 'widths'"),
        ("small_cnn", {"widths": []}, "classification", 32, "widths"),
        ("unet", {"num_outputs": 3}, "segmentation", 32, "unknown argument"),
        ("unet", {"upsampling": "nearest"}, "segmentation", 32, "bilinear, transpose"),
        ("unet", {}, "classification", 32, "made for segmentation"),
        ("unet", {}, "segmentation", 8, "at least 16"),
    ],
)
def test_errors_say_what_to_do(name: str, args: dict, task: str, size: int, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(UserError, match=message):
        build_model(name, args, 3, 2, (size, size), task)


def test_monai_and_scikit_learn_are_not_imported_for_our_own_networks() -> None:
    code = (
        "import sys; from fedmed.models import build_model; import fedmed.metrics;"
        "build_model('small_cnn', {}, 3, 2, (32, 32), 'classification');"
        "assert not {'monai', 'sklearn', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
