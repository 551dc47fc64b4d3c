"""Adapters of the adaptive element-wise aggregation: the canonical rule, and the released variant of FedICRA and FedLPPA.

The networks of the files are built here; what is learnt, and when, is the project's. Counters come from the received model
in these files, so all entries are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from conformance_methods import error
from torch import Tensor, nn

from clients.adaptive_merge import Learnt, initial_weights, learn_in_model, merge_due
from fedmed.federation.state import State, clone_state, copy_state
from fedmed.losses.partial import labelled_pixels, partial_cross_entropy

Arrays = Mapping[str, Any]
Compared = list[tuple[str, float, float]]
Labelled = tuple[Tensor, Tensor]

TOLERANCE = 1e-9
WARMUP = 50  # iterations in which the received model is copied
NO_LIMIT = 1_000_000  # passes; the published code stops only when the losses have settled
MLP_ENTRIES = tuple(f"{layer}.{kind}" for layer in ("body", "up1", "out_conv") for kind in ("weight", "bias"))


class Mlp(nn.Module):
    """y = out_conv(tanh(up1(tanh(body x)))) with linear layers."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.body, self.up1, self.out_conv = (linear(state, name) for name in ("body", "up1", "out_conv"))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (n, C) of inputs (n, cin)."""
        logits: Tensor = self.out_conv(torch.tanh(self.up1(torch.tanh(self.body(inputs)))))
        return logits


class ConvNet(nn.Module):
    """encoder = 1x1 convolution, BatchNorm, tanh; decoder = up1, tanh, out_conv, both 1x1; between them the mean of the
    universal prompt is added where the state has one."""

    def __init__(self, state: State) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(len(state["encoder.1.weight"]))
        self.encoder = nn.Sequential(conv(state, "encoder.0"), norm, nn.Tanh())
        self.decoder = nn.ModuleDict({name: conv(state, f"decoder.{name}") for name in ("up1", "out_conv")})
        for name in ("distribution_prompts", "uni_prompt"):
            if name in state:
                self.register_parameter(name, nn.Parameter(torch.empty_like(state[name])))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C, H, W) of images (B, cin, H, W)."""
        features = self.encoder(images)
        if hasattr(self, "uni_prompt"):
            features = features + self.uni_prompt.mean()
        logits: Tensor = self.decoder["out_conv"](torch.tanh(self.decoder["up1"](features)))
        return logits


def linear(state: State, name: str) -> nn.Module:
    """A linear layer of the size of its entries."""
    rows, columns = state[f"{name}.weight"].shape
    return nn.Linear(columns, rows)


def conv(state: State, name: str) -> nn.Module:
    """A convolution of the size of its entries."""
    shape = state[f"{name}.weight"].shape
    return nn.Conv2d(shape[1], shape[0], shape[2:])  # type: ignore[arg-type]


def states(arrays: Arrays, prefix: str) -> State:
    """Tensors of the arrays whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): torch.from_numpy(np.array(v)) for k, v in arrays.items() if k.startswith(prefix)}


def chosen(state: State, names: list[str]) -> State:
    """Some entries of a state."""
    return {name: state[name] for name in names}


def in_order(arrays: Arrays, inputs: str, targets: str) -> list[Labelled]:
    """Batches of `batch_size` in the order of the file, without it one; the last may be smaller."""
    images, labels = (torch.from_numpy(np.array(arrays[key])) for key in (inputs, targets))
    size = int(arrays.get("batch_size", len(images)))
    return list(zip(images.split(size), labels.long().split(size), strict=True))


def merged(
    arrays: Arrays, model: nn.Module, own: State, received: State, weights: State, batches: list[Labelled]
) -> Learnt:
    """Learn in `model`, which is given the received state first."""
    model.double()
    copy_state(received, model.state_dict())
    ignored = int(arrays["ignore_index"]) if "ignore_index" in arrays else None
    names = list(weights)

    def loss(batch: Labelled) -> Tensor | None:
        model.train(not int(arrays.get("mode_eval", 1)))
        logits = model(batch[0])
        if not labelled_pixels(batch[1], logits.shape[1], ignored).any():
            return None
        return partial_cross_entropy(logits, batch[1], ignored)

    passes = int(arrays.get("max_passes", NO_LIMIT)) if int(arrays.get("start_phase", 0)) else 1
    return learn_in_model(
        model, chosen(own, names), chosen(received, names), weights, loss, lambda: batches, float(arrays["eta"]), passes
    )


def canonical(arrays: Arrays) -> Compared:
    """W from what is kept to what is kept, and the whole model after the merge."""
    own, received, weights = (states(arrays, f"{prefix}__") for prefix in ("local", "global", "W_in"))
    names = list(MLP_ENTRIES[len(MLP_ENTRIES) - int(arrays["num_upper_tensors"]) :])
    weights, after = chosen(weights, names), clone_state(received)
    if merge_due(1, 0, chosen(own, names), chosen(received, names)):
        found = merged(arrays, Mlp(received), own, received, weights, in_order(arrays, "X", "Y"))
        weights, after = found.weights, {**after, **found.merged}
    return compared(arrays, {"W_out": weights, "merged": after})


def released(arrays: Arrays) -> Compared:
    """`ala_init` zeros, kept by nobody: V = 1 − W. Nothing is learnt while the iteration counter is within the warm-up."""
    own, received = states(arrays, "local_before__"), states(arrays, "received_global__")
    names = [name for name in received if name.startswith("decoder.")]
    outputs = {"after": clone_state(received)}
    if merge_due(int(arrays["iter_global"]), WARMUP, chosen(own, names), chosen(received, names)):
        weights = initial_weights(chosen(received, names), "zeros")
        found = merged(arrays, ConvNet(received), own, received, weights, in_order(arrays, "images", "labels"))
        outputs = {
            "after": {**outputs["after"], **found.merged},
            "V_out": {name: 1.0 - weight for name, weight in found.weights.items()},
        }
    return compared(arrays, outputs)


def compared(arrays: Arrays, outputs: Mapping[str, State]) -> Compared:
    """One entry per array of the groups in `outputs` (`<group>__<entry>`); what the file or we lack is an infinite error."""
    ours = {f"{group}__{name}": value for group, state in outputs.items() for name, value in state.items()}
    wanted = {key for key in arrays if key.partition("__")[0] in ("W_out", "merged", "after", "V_out")}
    both = wanted & set(ours)
    errors = [(key, error(ours[key], arrays[key]), TOLERANCE) for key in sorted(both)]
    return errors + [(key, float("inf"), TOLERANCE) for key in sorted(wanted ^ set(ours))]


ADAPTERS: dict[str, Callable[[Arrays], Compared]] = {
    "fedicra__adaptive_aggregation_canonical": canonical,
    "fedicra__adaptive_aggregation_released": released,
    "fedlppa__parameterwise_aggregation": released,
}
