"""Networks of MONAI behind the model contract."""

from __future__ import annotations

import copy
import sys
import warnings

import pytest
import torch

from fedmed.errors import UserError
from fedmed.models import build_model
from fedmed.models.monai_wrapper import MonaiNet

SMALL_VIT = {"patch_size": 16, "hidden_size": 48, "num_heads": 4, "num_layers": 1, "mlp_dim": 32}
NETWORKS = [
    ("DenseNet121", {"block_config": [2, 2]}, "classification", (2, 128)),
    ("resnet18", {"widen_factor": 0.25}, "classification", (2, 128)),
    ("EfficientNetBN", {"model_name": "efficientnet-b0"}, "classification", (2, 1280)),
    ("ViT", SMALL_VIT, "multilabel", (2, 48)),
    ("SwinUNETR", {"feature_size": 12}, "segmentation", (2, 12, 64, 64)),
    ("UNet", {"channels": [4, 8, 16], "strides": [2, 2]}, "segmentation", (2, 8, 32, 32)),
    ("BasicUNet", {"features": [4, 4, 8, 8, 8, 4]}, "segmentation", (2, 4, 64, 64)),
    ("SegResNet", {"init_filters": 8}, "segmentation", (2, 8, 64, 64)),
    ("UNETR", {"hidden_size": 48, "num_heads": 4, "mlp_dim": 32, "feature_size": 4}, "segmentation", (2, 4, 64, 64)),
]


def _build(name: str, args: dict, task: str, channels: int = 3, seed: int = 0) -> MonaiNet:  # type: ignore[type-arg]
    model = build_model(f"monai:{name}", args, channels, 3, (64, 64), task, seed=seed)
    assert isinstance(model, MonaiNet)
    return model


@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: case[0])
def test_contract(case: tuple) -> None:  # type: ignore[type-arg]
    name, args, task, features = case
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = _build(name, args, task)
        output = model(torch.randn(2, 3, 64, 64))
        output.logits.sum().backward()
    assert output.logits.shape == ((2, 3, 64, 64) if task == "segmentation" else (2, 3))
    assert output.features.shape == features
    assert model._kept is None
    (classifier,) = model.classifier_prefixes
    assert f"{classifier}.weight" in model.state_dict()
    depth = model.groups["depth"]
    assert len(depth) > 2
    for entry in model.state_dict():
        assert sum(entry == prefix or entry.startswith(prefix + ".") for prefix in depth) == 1, entry
    assert classifier == depth[-1] or classifier.startswith(depth[-1] + ".")
    assert model.training


@pytest.mark.parametrize("name", ["DenseNet121", "SwinUNETR"])
def test_equal_seeds_equal_weights(name: str) -> None:
    _, args, task, _ = next(case for case in NETWORKS if case[0] == name)
    first = _build(name, args, task, seed=5).state_dict()
    torch.rand(3)
    second = _build(name, args, task, seed=5).state_dict()
    assert all(torch.equal(first[entry], second[entry]) for entry in first)


def test_wrapper_changes_nothing_but_the_form() -> None:
    model = _build("resnet18", {"widen_factor": 0.25}, "classification", channels=1).eval()
    images = torch.randn(2, 1, 64, 64)
    output = model(images)
    assert torch.allclose(output.logits, model.net(images), atol=1e-5)
    assert torch.allclose(model.net.fc(output.features), output.logits, atol=1e-6)
    assert torch.equal(copy.deepcopy(model)(images).features, output.features)
    other = _build("resnet18", {"widen_factor": 0.25}, "classification", channels=1, seed=1).eval()
    called = torch.func.functional_call(model, other.state_dict(), (images,))
    assert torch.equal(called.features, other(images).features)


def test_trial_run_leaves_the_statistics_alone() -> None:
    model = _build("DenseNet121", {"block_config": [2, 2]}, "classification")
    assert all(int(value) == 0 for name, value in model.state_dict().items() if name.endswith("num_batches_tracked"))


def test_deep_supervision_goes_to_aux() -> None:
    images = torch.randn(2, 3, 64, 64)
    args = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 8, 8]}
    stacked = _build("DynUNet", {**args, "deep_supervision": True}, "segmentation")
    output = stacked(images)
    assert output.logits.shape == (2, 3, 64, 64)
    assert [side.shape[1] for side in output.aux["deep_supervision"]] == [3]
    assert stacked.eval()(images).aux is None
    listed = _build("SegResNetDS", {"init_filters": 8, "dsdepth": 3}, "segmentation")(images)
    assert [tuple(side.shape) for side in listed.aux["deep_supervision"]] == [(2, 3, 32, 32), (2, 3, 16, 16)]
    last = _build("BasicUNetPlusPlus", {"features": [4] * 6, "deep_supervision": True}, "segmentation")
    output = last.eval()(images)
    assert len(output.aux["deep_supervision"]) == 3
    assert torch.equal(last.net.final_conv_0_4(output.features), output.logits)


@pytest.mark.parametrize(
    ("name", "args", "task", "message"),
    [
        ("ResNet18", {}, "classification", "did you mean 'monai:resnet18'"),
        ("DensNet121", {}, "classification", "did you mean 'monai:DenseNet121'"),
        ("Xyzzy", {}, "classification", "monai.networks.nets"),
        ("DenseNet121", {"grow_rate": 3}, "classification", "did you mean 'growth_rate'"),
        ("resnet18", {"layers": [1]}, "classification", "unknown argument"),
        ("resnet18", {"pretrained": True}, "classification", "nothing is downloaded"),
        ("HoVerNet", {"pretrained_url": "a.b"}, "segmentation", "nothing is downloaded"),
        ("UNet", {}, "segmentation", "channels"),
        ("DenseNet121", {"block_config": [2, 2]}, "segmentation", r"needs logits \(1, 3, 64, 64\)"),
        ("UNet", {"channels": [4, 8], "strides": [2]}, "classification", r"needs logits \(1, 3\)"),
    ],
)
def test_errors_say_what_to_do(name: str, args: dict, task: str, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(UserError, match=message):
        _build(name, args, task)


def test_image_size_that_does_not_fit() -> None:
    with pytest.raises(UserError, match="cannot process a 48x48 image"):
        build_model("monai:SwinUNETR", {"feature_size": 12}, 1, 1, (48, 48), "segmentation")


def test_no_torchvision() -> None:
    _build("DenseNet121", {"block_config": [2, 2]}, "classification")
    assert "torchvision" not in sys.modules
