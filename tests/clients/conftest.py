"""For tests of clients: a client with the initial model of a small synthetic site loaded, without a federation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmed.config import from_tree
from fedmed.data.phantom import make_phantom
from fedmed.data.site_file import SiteFile
from fedmed.federation.client import Client, Env, Moment
from fedmed.federation.layout import Layout
from fedmed.federation.site import make_addons
from fedmed.federation.state import clone_state
from fedmed.models.build import build_model
from fedmed.models.heads import num_outputs, resolve_activation

ClientFactory = Callable[..., Any]


@pytest.fixture(scope="session")
def site_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One site of 20 images of 32 x 32 pixels per task."""
    folder = tmp_path_factory.mktemp("sites")
    tasks = ("classification", "segmentation")
    return {t: make_phantom(folder / f"{t}.h5", t, num_sites=1, images_per_site=20, image_size=32) for t in tasks}


@pytest.fixture
def new_client(site_files: dict[str, Path]) -> ClientFactory:
    """`new_client(cls, task, activation, addons={...}, args={...})`: a client that has received the initial model."""

    def make(cls: type[Client], task: str = "classification", activation: str = "auto", **client: Any) -> Client:
        addons = client.pop("addons", {})
        config = from_tree({"client": {**client, **addons}, "training": {"batch_size": 4}})
        with SiteFile.open(site_files[task]) as file:
            data = file.site(file.sites[0].name)
        activation = resolve_activation(task, len(data.classes), activation)
        name, args = ("small_cnn", {}) if task == "classification" else ("unet", {"base_width": 4})
        outputs = num_outputs(task, len(data.classes), activation)
        model = build_model(name, args, len(data.channels), outputs, data.image_size, task, seed=1)
        layout = Layout.of(model, cls.is_personal)
        env = Env(config, data, model, layout, torch.device("cpu"), activation, data.name)
        made = cls(env, Moment(1, 4), make_addons(config))
        made.received = clone_state(layout.exchanged_state(model))
        return made

    return make
