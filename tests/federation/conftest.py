"""A small synthetic site file and what a site needs to answer messages from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedmed.config import Config, from_tree
from fedmed.data.phantom import make_phantom
from fedmed.federation.client import Client, Moment
from fedmed.federation.messages import pack
from fedmed.federation.records import decode_state
from fedmed.federation.site import Place, Workshop, answer, make_addons
from fedmed.federation.state import State, clone_state


@pytest.fixture(scope="session")
def site_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classification sites of 20 images of 16 x 16 pixels (14 train, 2 val, 4 test)."""
    path = tmp_path_factory.mktemp("data") / "sites.h5"
    return make_phantom(path, "classification", num_sites=2, images_per_site=20, image_size=16)


def config(**sections: Any) -> Config:
    """A configuration with a tiny network."""
    tree = {"model": {"args": {"widths": [4, 4]}}, "training": {"batch_size": 5}, "engine": {"device": "cpu"}}
    return from_tree({**tree, **sections})


class Bench:
    """One site of a workshop: `bench.client()` for the hooks, `bench.send(kind, ...)` for whole messages."""

    def __init__(self, path: Path, state: Path | None, cfg: Config) -> None:
        self.config, self.workshop = cfg, Workshop(cfg)
        self.place = Place(path, partition=0, state=state)
        self.env = self.workshop.env(self.workshop.data(self.place))
        self.layout = self.env.layout
        self.initial: State = clone_state(self.layout.exchanged_state(self.env.model))

    def client(self, cls: type[Client], moment: Moment | None = None) -> Any:
        """A client with the initial model loaded."""
        made = cls(self.env, moment or Moment(1, 4), make_addons(self.config))
        made.received = clone_state(self.initial)
        made.load_view("global")
        return made

    def send(
        self, kind: str, number: int = 1, personal_round: int = 0, arrays: State | None = None, **more: Any
    ) -> SimpleNamespace:
        """Send a message and give the parts of the reply: metrics, arrays, extras."""
        head = {"round": number, "rounds": 4, "personal_round": personal_round, "durable_round": 0}
        content = pack(arrays=self.initial if arrays is None else arrays, config={**head, **more})
        reply = answer(kind, self.workshop, self.place, content)
        parts = {name: decode_state(record) for name, record in reply.array_records.items()}
        metrics = dict(reply.metric_records["metrics"]) if "metrics" in reply.metric_records else {}
        return SimpleNamespace(
            metrics=metrics, arrays=parts.get("arrays"), extras=parts.get("extras", {}), content=reply
        )


@pytest.fixture
def bench(site_file: Path, tmp_path: Path) -> Callable[..., Bench]:
    """`bench(client={...}, ...)`: a site with these sections in its configuration; `keeps=False`: without a state folder."""

    def make(*, keeps: bool = True, **sections: Any) -> Bench:
        return Bench(site_file, tmp_path / "site" if keeps else None, config(**sections))

    return make
