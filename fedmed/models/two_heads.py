"""A second classifier beside the one of any classification network: one head for everybody, one that stays at the site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedmed.errors import UserError
from fedmed.models.build import build_model
from fedmed.models.output import Output

PERSONAL_LOGITS = "personal_logits"  # of `Output.aux`


class TwoHeads(nn.Module):
    """Any classifier, held as `base`, with a second linear head on the same features.

    In: what the base takes. Out: the base's `Output`, logits (B, num_outputs) of its own head (the federated one), and in
    `aux` the entry `personal_logits` of the same shape. Both heads see the same features, after the same dropout.

    name, args: the base model, a registered one or `monai:<network>`; its classifier must be one linear layer that takes
    `features` (B, D) and gives the logits, else `UserError`. With equal seeds the base has the weights it has alone; the
    second head draws its own from a seed of its own, uniform in ±1/√D as PyTorch's linear layers do. Its module carries
    `is_personal_head`. Groups of the base are passed on, each kind with the second head as one more group at the end.
    """

    TASKS = ("classification", "multilabel")

    def __init__(
        self,
        in_channels: int,
        num_outputs: int,
        image_size: tuple[int, int],
        task: str,
        name: str = "small_cnn",
        args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        seed = torch.initial_seed() % 2**63  # of the run, when `build_model` is what builds this
        head_seed = int(torch.randint(2**62, ()))  # the stream itself would repeat the draws of the base
        self.base = build_model(name, args, in_channels, num_outputs, image_size, task, seed=seed)
        head = linear_classifier(self.base, name, torch.zeros(1, in_channels, *image_size))
        self.personal_head = linear_like(head, torch.Generator().manual_seed(head_seed))
        self.personal_head.is_personal_head = True  # type: ignore[assignment]
        self.inputs: tuple[str, ...] = tuple(getattr(self.base, "inputs", ()))
        self.classifier_prefixes = tuple(f"base.{prefix}" for prefix in self.base.classifier_prefixes)  # type: ignore[union-attr]
        self.groups: dict[str, tuple[str, ...]] = {
            kind: (*(f"base.{prefix}" for prefix in prefixes), "personal_head")
            for kind, prefixes in dict(getattr(self.base, "groups", {})).items()
        }

    def forward(self, images: Tensor, **extras: Tensor) -> Output:
        """Give the `Output` of images (B, in_channels, H, W)."""
        output = self.base(images, **extras)
        aux = {**(output.aux or {}), PERSONAL_LOGITS: self.personal_head(output.features)}
        return Output(output.logits, output.features, aux)


def is_personal_head(name: str, module: nn.Module) -> bool:
    """Whether an entry belongs to the second head of a `TwoHeads`; fits `Client.is_personal`."""
    return bool(getattr(module, "is_personal_head", False))


def linear_like(head: nn.Linear, generator: torch.Generator) -> nn.Linear:
    """A linear layer of the same shape, weights and bias uniform in ±1/√D (D inputs), drawn from `generator`."""
    made = nn.utils.skip_init(nn.Linear, head.in_features, head.out_features, bias=head.bias is not None)
    bound = max(head.in_features, 1) ** -0.5
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return made


def linear_classifier(model: nn.Module, name: str, image: Tensor) -> nn.Linear:
    """The classifier of a model, tried out on one image (1, channels, H, W).

    Raises `UserError` unless it is one linear layer between `features` (1, D) and the logits.
    """
    prefixes = tuple(getattr(model, "classifier_prefixes", ()))
    head = model.get_submodule(prefixes[0]) if len(prefixes) == 1 else None
    if isinstance(head, nn.Linear):
        was_training = model.training
        with torch.no_grad():
            output = model.eval()(image)
            model.train(was_training)
            features = output.features
            fits = features is not None and features.shape == (1, head.in_features)
            if fits and torch.allclose(head(features), output.logits, atol=1e-5):
                return head
    raise UserError(
        f"model.args.name {name}: two heads need a classifier that is one linear layer from the features to the logits, and "
        f"this model has {_described(head, prefixes)}; choose another, such as small_cnn or monai:DenseNet121"
    )


def _described(head: nn.Module | None, prefixes: tuple[str, ...]) -> str:
    """Words for what was found instead."""
    if head is None:
        return f"{len(prefixes)} classifier modules" if prefixes else "no classifier that it names"
    return f"a {type(head).__name__}" + (" that does not" if isinstance(head, nn.Linear) else "")
