"""Getting a trained model back from a run folder: the client of the run with its model, which predicts as it did in the run's evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedmed.config import Config, folder_name, from_yaml, nearest
from fedmed.data.site_data import SiteData
from fedmed.data.split import Batch, make_decoder
from fedmed.errors import UserError
from fedmed.federation.case_files import evaluating
from fedmed.federation.case_files import predict as predict_batch
from fedmed.federation.checkpoint import CheckpointStore, read_safetensors
from fedmed.federation.client import Client, Env, Moment
from fedmed.federation.layout import Layout
from fedmed.federation.site import client_class, make_addons, make_model
from fedmed.federation.state import State
from fedmed.files import read_json
from fedmed.models.heads import label_map

_FILES = {"last": "model.safetensors", "selected": "model-selected.safetensors"}
_CPU = torch.device("cpu")


@dataclass
class TrainedModel:
    """A trained network with what it needs to read images as it did in training. `model` is in eval mode, on the CPU.

    client: predicts as in evaluation; view: `global` or `personal`; site: whose model it is, "" for nobody's; facts: content of model.json
    (`image_size`, and how training images were prepared, `preprocessing`, `stored_size`, where that is known).
    """

    model: nn.Module
    config: Config
    task: str
    classes: tuple[str, ...]
    channels: tuple[str, ...]
    activation: str
    client: Client
    view: str = "global"
    site: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def predict(
        self, images: np.ndarray[Any, Any], batch_size: int = 64, modality_present: np.ndarray[Any, Any] | None = None
    ) -> np.ndarray[Any, Any]:
        """Probabilities of images as a site file holds them, (N, H, W) or (N, H, W, C), uint8, uint16 or float in [0, 1].

        modality_present: (N, C) 0/1, which channels an image has, for models that are told (None: all). Out: float32, (N, classes), or per
        pixel (N, classes or foreground classes, H, W). Raises `UserError` for another number of channels.
        """
        stack = np.asarray(images)
        stack = stack[..., None] if stack.ndim == 3 else stack
        if stack.ndim != 4 or stack.shape[-1] != len(self.channels):
            shape = f"(N, H, W{', C' if len(self.channels) > 1 else ''})"
            raise UserError(f"expected images {shape} with {len(self.channels)} channels, got shape {np.shape(images)}")
        extras = {}
        if modality_present is not None:
            flags = np.asarray(modality_present)
            if flags.shape != (len(stack), len(self.channels)):
                raise UserError(
                    f"modality_present: expected shape {(len(stack), len(self.channels))}, got {flags.shape}"
                )
            extras["modality_present"] = torch.from_numpy(np.ascontiguousarray(flags))
        decode = make_decoder(
            self.config.data.mean, self.config.data.std, len(self.channels), unsigned16=stack.dtype == np.uint16
        )
        planes = np.ascontiguousarray(stack.transpose(0, 3, 1, 2))
        tensor = torch.from_numpy(planes.view(np.int16) if planes.dtype == np.uint16 else planes)
        out = []
        with evaluating(self.client):
            for rows in torch.arange(len(tensor)).split(batch_size) if len(tensor) else ():
                own = {name: values[rows] for name, values in extras.items()}
                batch = Batch(decode(tensor[rows]), torch.zeros(len(rows), dtype=torch.int64), rows, extras=own)
                out.append(predict_batch(self.client, batch, self.view).cpu().numpy())
        return np.concatenate(out) if out else np.zeros((0, len(self.classes)), dtype=np.float32)

    def predict_labels(
        self, images: np.ndarray[Any, Any], batch_size: int = 64, modality_present: np.ndarray[Any, Any] | None = None
    ) -> np.ndarray[Any, Any]:
        """Class ids (N,) or label maps (N, H, W), int64; for multi-label tasks 0/1 flags (N, L) at 0.5. Arguments as of `predict`."""
        prob = self.predict(images, batch_size, modality_present)
        if self.task == "segmentation":
            labels: np.ndarray[Any, Any] = label_map(torch.from_numpy(prob), self.activation).numpy()
            return labels
        return prob.argmax(axis=1) if self.task == "classification" else (prob > 0.5).astype(np.int64)


@dataclass(frozen=True)
class _Sites:
    """What a run folder says of its sites: place of each, and the last round whose reply was taken."""

    index: Mapping[str, int]
    accepted: Mapping[str, int]


def load(
    run_dir: str | Path, which: str = "last", site: str | None = None, state: str | Path | None = None
) -> TrainedModel:
    """Load the model of a finished run, ready to predict on the CPU. Files are read without executing code.

    which: `last`, or `selected` for the round chosen on the validation split. site: name of the site whose own model is wanted; a method
    without own models gives the common one, told which site it predicts for where it asks. state: the site's state folder of this run where it
    is not in the run folder (in a deployment it stays at the site). Raises `UserError` if there is no such model.
    """
    folder = Path(run_dir).expanduser()
    path = _model_file(folder, which)
    config = from_yaml((folder / "config.yaml").read_text(encoding="utf-8"))
    facts = read_json(folder / "model.json")
    model, activation = make_model(
        config, facts["task"], len(facts["classes"]), len(facts["channels"]), tuple(facts["image_size"])
    )
    stored = read_safetensors(path)
    try:
        model.load_state_dict(stored)
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit the model of config.yaml: {str(error).splitlines()[-1].strip()}"
        ) from error
    cls = client_class(config)
    sites = _known_sites(folder, config.federation.rounds)
    view = _view(cls, site, sites, state)
    if view == "personal" and which == "selected":
        raise UserError(
            "sites keep their own models of the last round only; --site needs the model `last`, not `selected`"
        )
    index = sites.index.get(site, -1) if site is not None else -1
    _check_told(model, site, index)
    layout = Layout.of(model, cls.is_personal)
    initial = {name: stored[name] for name in layout.personal}
    data = _blank(config, facts, site)
    env = Env(config, data, model, layout, _CPU, activation, data.name, initial)
    moment = Moment(site_index=index, num_sites=max(1, len(sites.index)))
    client = cls(env, moment, make_addons(config))
    client.received = {name: stored[name] for name in layout.exchanged}
    if view == "personal" and site is not None:
        client.personal = _personal(folder, site, state, sites.accepted.get(site))
    client.load_view(view)
    return TrainedModel(
        model.eval(), config, facts["task"], tuple(facts["classes"]), tuple(facts["channels"]), activation,
        client, view, site or "", facts,
    )  # fmt: skip


def _model_file(folder: Path, which: str) -> Path:
    """The file of the common model, when the folder has all that is needed."""
    if which not in _FILES:
        raise UserError(f"which: expected last or selected, got {which!r}")
    path = folder / _FILES[which]
    finished = "did the run finish, and was evaluation.select set?" if which == "selected" else "did the run finish?"
    for needed, hint in ((folder / "config.yaml", "is it a run folder?"), (path, finished)):
        if not needed.is_file():
            raise UserError(f"{needed} does not exist; {hint}")
    return path


def _known_sites(folder: Path, rounds_of_run: int) -> _Sites:
    """Sites by the newest checkpoint, else by the sorted names of summary.json; empty where neither is there.

    `accepted` only by the checkpoint of the last round: an older one knows nothing of the final model.
    """
    store = CheckpointStore(folder / "checkpoint")
    rounds = store.rounds()
    if rounds:
        meta = json.loads((store.folder / f"round-{rounds[-1]:05d}" / "meta.json").read_text(encoding="utf-8"))
        accepted = meta.get("accepted", {}) if rounds[-1] == rounds_of_run else {}
        return _Sites(dict(meta.get("sites", {})), dict(accepted))
    path = folder / "summary.json"
    names = sorted(read_json(path).get("sites", {})) if path.is_file() else []
    return _Sites({name: index for index, name in enumerate(names)}, {})


def _view(cls: type[Client], site: str | None, sites: _Sites, state: str | Path | None) -> str:
    """The view that is loaded. Raises `UserError` for a site that is not known, and where one must be named."""
    names: Sequence[str] = sorted(sites.index)
    if site is None:
        if state is not None:
            raise UserError("--state is the state folder of one site; say which with --site")
        if "global" not in cls.views:
            raise UserError(
                f"the run has no common model, every site has its own; choose one with --site (site=): {', '.join(names) or 'none known'}"
            )
        return "global"
    if names and site not in sites.index:
        raise UserError(f"the run has no site {site!r}{nearest(site, names)}")
    return "personal" if "personal" in cls.views else "global"


def _check_told(model: nn.Module, site: str | None, index: int) -> None:
    """Refuse a named site of unknown place where the model must be told it."""
    if site is not None and index < 0 and "site_index" in getattr(model, "inputs", ()):
        raise UserError(
            "the model is told the place of the site in the federation, which this folder does not say; it needs the run's checkpoint/ or summary.json"
        )


def _blank(config: Config, facts: Mapping[str, Any], site: str | None) -> SiteData:
    """A site without images, of the shape and kind of annotation that the client expects."""
    task, shape = facts["task"], tuple(facts["image_size"])
    annotation = "mask" if task == "segmentation" else "label"
    kind = facts.get("annotation_kinds", {}).get(site, annotation)
    target = {
        "segmentation": np.zeros((0, *shape), np.uint8),
        "classification": np.zeros(0, np.int64),
        "multilabel": np.zeros((0, len(facts["classes"])), np.uint8),
    }[task]
    channels = tuple(facts["channels"])
    return SiteData(
        site or "central", task, tuple(facts["classes"]), channels, (shape[0], shape[-1]), str(kind),
        np.zeros((0, shape[0], shape[-1], len(channels)), np.uint8), target, [], [],
        {split: np.zeros(0, np.int32) for split in ("train", "val", "test")}, mean=config.data.mean, std=config.data.std,
    )  # fmt: skip


def _personal(folder: Path, site: str, state: str | Path | None, accepted: int | None) -> State:
    """What the site keeps: of the round the server took last, else of the newest. Raises `UserError` where it keeps nothing."""
    place = folder / "sites" / folder_name(site) if state is None else Path(state).expanduser()
    found = {int(path.parent.name[6:]): path for path in place.glob("personal/round-[0-9]*/personal.safetensors")}
    if not found:
        hint = (
            "in a deployment it stays at the site: predict there, and name its state folder of this run with --state (state=)"
            if state is None
            else "expected the state folder of this run at the site, with personal/round-.../ in it"
        )
        raise UserError(f"no own model of site {site!r} below {place}; {hint}")
    return read_safetensors(found[accepted if accepted in found else max(found)])
