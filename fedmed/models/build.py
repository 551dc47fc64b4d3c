"""Build a registered model, with the same initial weights at both ends."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fedmed import registry
from fedmed.config import nearest
from fedmed.errors import UserError

_GIVEN = ("self", "in_channels", "num_outputs", "image_size", "task")


def build_model(
    name: str,
    args: Mapping[str, Any] | None,
    in_channels: int,
    num_outputs: int,
    image_size: tuple[int, int],
    task: str,
    seed: int = 0,
) -> nn.Module:
    """Build the model `name` on the CPU in training mode; its `forward(images)` returns an `Output`.

    name: a name of the registry, or `monai:<network>`. args: further arguments of its class. image_size: (H, W) in
    pixels. task: segmentation, classification or multilabel. seed: of the initial weights; the global generator is left
    as it was. Equal arguments give equal weights in every process. Raises `UserError` for an unknown name or argument,
    or a model that does not suit the task.
    """
    size = (int(image_size[0]), int(image_size[1]))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also touch the accelerator's generators
        if name.startswith("monai:"):
            from fedmed.models.monai_wrapper import build_monai

            model: nn.Module = build_monai(name, args or {}, in_channels, num_outputs, size, task)
        else:
            model = _build_own(name, args or {}, in_channels, num_outputs, size, task)
    mark_classifier(model)
    return model


def mark_classifier(model: nn.Module) -> None:
    """Set `is_classifier` on all modules below the model's `classifier_prefixes`, for rules that look at modules only."""
    prefixes = tuple(getattr(model, "classifier_prefixes", ()))
    for name, module in model.named_modules():
        if any(name == p or name.startswith(p + ".") for p in prefixes):
            module.is_classifier = True  # type: ignore[assignment]


def is_classifier(name: str, module: nn.Module) -> bool:
    """Whether an entry belongs to the classifier of a model made by `build_model`; fits `Client.is_personal`."""
    return bool(getattr(module, "is_classifier", False))


def _build_own(
    name: str, args: Mapping[str, Any], in_channels: int, num_outputs: int, image_size: tuple[int, int], task: str
) -> nn.Module:
    """Build a model of the registry after checking task, image size and argument names."""
    model_class = registry.resolve("model", name)
    tasks = getattr(model_class, "TASKS", (task,))
    if task not in tasks:
        raise UserError(
            f"model.name {name}: made for {', '.join(tasks)}, but the data's task is {task}; choose another model"
        )
    smallest = getattr(model_class, "MIN_IMAGE_SIZE", 1)
    if min(image_size) < smallest:
        raise UserError(
            f"model.name {name}: images must be at least {smallest} pixels wide and high, these are {image_size}"
        )
    parameters = inspect.signature(model_class).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    options = [option for option in parameters if option not in _GIVEN]
    for key in args:
        if key in _GIVEN or (key not in options and not open_ended):
            raise UserError(f"model.args.{key}: unknown argument of model {name}{nearest(key, options)}")
    given = {"in_channels": in_channels, "num_outputs": num_outputs, "image_size": image_size, "task": task}
    wanted = {key: value for key, value in given.items() if key in parameters}
    try:
        model: nn.Module = model_class(**wanted, **args)
    except (TypeError, ValueError) as error:
        raise UserError(f"model.name {name}: could not be built with {dict(args)}: {error}") from error
    return model
