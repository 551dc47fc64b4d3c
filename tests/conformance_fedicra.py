"""Adapter from reference vectors to the channel selection of FedICRA and its contrast; see `conformance_methods.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conformance_methods import TOLERANCE, Arrays, Compared, _tensor, error

from clients.site_contrast import site_contrast
from fedmed.models.site_unet import ChannelSelection, selected, site_heatmaps

LAYERS = {"fc1.0": "site_in", "fc1.2": "site_out", "fc2.0": "mix_in", "fc2.2": "mix_out"}
RELATIVE_TOLERANCE = 1e-7  # of the largest entry: loss and gradients are 1e-7 to 1e-3 in size


def loaded(arrays: Arrays) -> ChannelSelection:
    """The layers with the weights of the file, 1x1 convolutions there."""
    block = ChannelSelection(arrays["x"].shape[1], int(arrays["num_sites"])).double()
    weights = {f"{ours}.weight": _tensor(arrays, f"param__{theirs}.weight") for theirs, ours in LAYERS.items()}
    block.load_state_dict({name: value.flatten(1) for name, value in weights.items()})
    return block


def channel_selection(arrays: Arrays) -> Compared:
    """Heatmaps of the own and of the other sites, the map they give, the contrast and its gradients."""
    block, x = loaded(arrays), _tensor(arrays, "x").requires_grad_()
    site = int(arrays["site_index"])
    own = block(x, torch.full((len(x),), site))
    others = site_heatmaps(block, x, _tensor(arrays, "other_sites"))
    loss = site_contrast(own, others)
    parameters = {name: block.get_parameter(f"{ours}.weight") for name, ours in LAYERS.items()}
    gradients = torch.autograd.grad(loss, [x, *parameters.values()])
    outputs = {"heatmap": own[..., None, None], "other_heatmaps": others[..., None, None]}
    outputs["features_out"] = selected(x, own)
    found: Compared = [(key, error(value.detach(), arrays[key]), TOLERANCE) for key, value in outputs.items()]
    small: dict[str, Any] = {"site_contrast_loss": loss.detach(), "grad_x": gradients[0]}
    for name, gradient in zip(parameters, gradients[1:], strict=True):
        small[f"gradparam__{name}.weight"] = gradient[..., None, None]
    for key, value in small.items():
        found.append((key, error(value, arrays[key]), RELATIVE_TOLERANCE * abs(arrays[key]).max()))
    return found


ADAPTERS: dict[str, Callable[[Arrays], Compared]] = {"fedicra__channel_selection": channel_selection}
