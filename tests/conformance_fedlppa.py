"""Adapters from reference vectors to FedLPPA's functions; see `conformance_methods`.

Left out: outputs `after__*` beyond iteration 50, where the released code throws the mix away. The merge of the main decoder
is FedICRA's and has its own adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from conformance_methods import error
from torch import Tensor

from clients.prompted_decoders import pseudo_label_loss, pseudo_labels
from fedmed.models.dual_attention import DualAttention
from strategies.prompt_affinity import affinities, mixed, prompt_vectors

Arrays = Mapping[str, Any]
Compared = list[tuple[str, float, float]]

TOLERANCE = 1e-9
SMOOTH = 1e-5  # e of the partial Dice loss
LAST_KEPT = 50  # iterations up to which the released code keeps the mix


def tensor(arrays: Arrays, key: str) -> Tensor:
    return torch.from_numpy(np.array(arrays[key]))


def under(arrays: Arrays, prefix: str) -> dict[str, Tensor]:
    """The arrays whose keys begin with `prefix`, without it."""
    return {key.removeprefix(prefix): tensor(arrays, key) for key in arrays if key.startswith(prefix)}


def compared(arrays: Arrays, outputs: Mapping[str, Any]) -> Compared:
    """One line for each output; integers must be equal."""
    tolerance = {key: 0.0 if arrays[key].dtype.kind in "iub" else TOLERANCE for key in outputs}
    values = {key: v.detach().numpy() if isinstance(v, Tensor) else v for key, v in outputs.items()}
    return [(key, error(value, arrays[key]), tolerance[key]) for key, value in values.items()]


def prompt_affinity_aux_decoder(arrays: Arrays) -> Compared:
    """Affinities, their shares, and the auxiliary decoder mixed with them."""
    prompts = (tensor(arrays, f"server_{name}") for name in ("distribution_prompts", "universal_prompt"))
    found = affinities(prompt_vectors(*prompts), int(arrays["site_index"]))
    aux = {k: under(arrays, f"site{k}__") for k in range(int(arrays["num_sites"]))}
    result = mixed(found, {k: {n: v for n, v in state.items() if v.is_floating_point()} for k, state in aux.items()})
    outputs = {"affinity": np.array(found), "mixing_weights": np.array(found) / sum(found)}
    outputs |= {f"aggregated_aux__{name}": value for name, value in result.items()}
    if int(arrays["iter_global"]) <= LAST_KEPT:
        outputs |= {f"after__{name}": value for name, value in result.items() if f"after__{name}" in arrays}
    return compared(arrays, outputs)


def dual_attention(arrays: Arrays) -> Compared:
    """Both blocks and their sum; the state has the official names."""
    maps = tensor(arrays, "x")
    module = DualAttention(maps.shape[1]).double()
    module.load_state_dict(under(arrays, "state__"))
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eps = float(arrays["bn_eps"])
    module.train(not int(arrays.get("bn_eval", 1)))
    return compared(arrays, {"out": module(maps), "spatial_out": module.sab(maps), "channel_out": module.cab(maps)})


def dual_decoder_pseudo_label(arrays: Arrays) -> Compared:
    """Pseudo-labels, and their loss with gradients: as it is here, and with the released broadcast, e / B for e."""
    share, batch = float(arrays["mix_alpha"]), len(arrays["logits_main"])
    lines: Compared = []
    for smooth, loss, suffix in (
        (SMOOTH, "loss_pls_without_batch_broadcast", "_without_batch_broadcast"),
        (SMOOTH / batch, "loss_pls_official", ""),
    ):
        logits = [tensor(arrays, f"logits_{name}").requires_grad_() for name in ("main", "aux")]
        prob = [z.softmax(dim=1) for z in logits]
        labels = pseudo_labels(prob[0], prob[1], share)
        value = pseudo_label_loss(prob[0], prob[1], labels, smooth=smooth)
        main, aux = torch.autograd.grad(value, logits)
        outputs = {loss: value, f"grad_logits_main{suffix}": main, f"grad_logits_aux{suffix}": aux}
        lines += compared(arrays, {"pseudo_label": labels, **outputs})
    return lines


ADAPTERS: dict[str, Callable[[Arrays], Compared]] = {
    "fedlppa__prompt_affinity_aux_decoder": prompt_affinity_aux_decoder,
    "fedlppa__dual_attention": dual_attention,
    "fedlppa__dual_decoder_pseudo_label": dual_decoder_pseudo_label,
}
