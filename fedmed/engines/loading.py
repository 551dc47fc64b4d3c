"""Getting a trained model back from a run folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedmed.config import Config, from_yaml
from fedmed.data.split import make_decoder
from fedmed.errors import UserError
from fedmed.federation.checkpoint import read_safetensors
from fedmed.federation.site import make_model
from fedmed.models.heads import label_map, probabilities


@dataclass
class TrainedModel:
    """A trained network with what it needs to read images as it did in training. `model` is in eval mode."""

    model: nn.Module
    config: Config
    task: str
    classes: tuple[str, ...]
    channels: tuple[str, ...]
    activation: str

    def predict(self, images: np.ndarray[Any, Any], batch_size: int = 64) -> np.ndarray[Any, Any]:
        """Probabilities of images as a site file holds them, (N, H, W) or (N, H, W, C), uint8 or float in [0, 1].

        Out: float32, (N, classes), or per pixel (N, classes or foreground classes, H, W). Raises `UserError` for another number of channels.
        """
        stack = np.asarray(images)
        stack = stack[..., None] if stack.ndim == 3 else stack
        if stack.ndim != 4 or stack.shape[-1] != len(self.channels):
            shape = f"(N, H, W{', C' if len(self.channels) > 1 else ''})"
            raise UserError(f"expected images {shape} with {len(self.channels)} channels, got shape {np.shape(images)}")
        decode = make_decoder(
            self.config.data.mean, self.config.data.std, len(self.channels), unsigned16=stack.dtype == np.uint16
        )
        planes = np.ascontiguousarray(stack.transpose(0, 3, 1, 2))
        tensor = torch.from_numpy(planes.view(np.int16) if planes.dtype == np.uint16 else planes)
        out = []
        with torch.no_grad():
            for start in range(0, len(tensor), batch_size):
                logits = self.model(decode(tensor[start : start + batch_size])).logits.float()
                out.append(probabilities(logits, self.activation).numpy())
        return np.concatenate(out) if out else np.zeros((0, len(self.classes)), dtype=np.float32)

    def predict_labels(self, images: np.ndarray[Any, Any], batch_size: int = 64) -> np.ndarray[Any, Any]:
        """Class ids (N,) or label maps (N, H, W), int64; for multi-label tasks 0/1 flags (N, L) at 0.5."""
        prob = self.predict(images, batch_size)
        if self.task == "segmentation":
            labels: np.ndarray[Any, Any] = label_map(torch.from_numpy(prob), self.activation).numpy()
            return labels
        return prob.argmax(axis=1) if self.task == "classification" else (prob > 0.5).astype(np.int64)


def load(run_dir: str | Path, which: str = "last") -> TrainedModel:
    """Load the model of a finished run, ready to predict on the CPU.

    `which`: `last`, or `selected` for the round chosen on the validation split. Raises `UserError` if the folder holds no such model.
    """
    folder = Path(run_dir).expanduser()
    files = {"last": "model.safetensors", "selected": "model-selected.safetensors"}
    if which not in files:
        raise UserError(f"which: expected last or selected, got {which!r}")
    path = folder / files[which]
    finished = "did the run finish, and was evaluation.select set?" if which == "selected" else "did the run finish?"
    for needed, hint in ((folder / "config.yaml", "is it a run folder?"), (path, finished)):
        if not needed.is_file():
            raise UserError(f"{needed} does not exist; {hint}")
    config = from_yaml((folder / "config.yaml").read_text(encoding="utf-8"))
    facts = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    model, activation = make_model(
        config, facts["task"], len(facts["classes"]), len(facts["channels"]), tuple(facts["image_size"])
    )
    try:
        model.load_state_dict(read_safetensors(path))
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit the model of config.yaml: {str(error).splitlines()[-1].strip()}"
        ) from error
    return TrainedModel(
        model.eval(), config, facts["task"], tuple(facts["classes"]), tuple(facts["channels"]), activation
    )
