"""The site's end of the protocol: what a node does with each message. The Flower client app is a thin shell around this module.

A process keeps one model and the data it has read (`Workshop`), whatever sites it is asked to be; everything else is made anew for
every message, so a site behaves the same in one long-lived process, in a pool of workers, or in one process per message.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor, nn

from fedmed.config import Config, params_from
from fedmed.data.site_file import SiteData, SiteFile
from fedmed.errors import UserError
from fedmed.federation import messages as names
from fedmed.federation.client import AddOn, Client, Env, Moment
from fedmed.federation.layout import Layout, hand_over
from fedmed.federation.local_only import alone
from fedmed.federation.messages import Identity, code_hash
from fedmed.federation.personal import PersonalStore
from fedmed.federation.scoring import Scored, score_subsets, score_view, write_case_files
from fedmed.federation.seeding import derive_seed
from fedmed.federation.state import State, clone_state
from fedmed.models.build import build_model
from fedmed.models.heads import num_outputs, resolve_activation
from fedmed.registry import resolve


@dataclass(frozen=True)
class Place:
    """Where a node finds its data and keeps its own files. `site`: name or group in the site file; None: the `partition`-th site of it."""

    data: Path
    site: str | None = None
    partition: int | None = None
    state: Path | None = None


def choose_device(name: str) -> torch.device:
    """`auto`: the first CUDA device if there is one, else the CPU. Raises `UserError` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"engine.device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"engine.device: {name!r} is not available here; use auto or cpu")
    return device


def checked(kind: str, name: str, base: type[Any]) -> Any:
    """The class that a name stands for. Raises `UserError` unless it is one that builds on `base`."""
    found = resolve(kind, name)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{name!r} is no {kind}: expected a class that builds on {base.__module__}.{base.__name__}")
    return found


def client_class(config: Config) -> type[Client]:
    """The client class of a configuration, the same at both ends: with `federation.local_only` nothing of it travels."""
    found: type[Client] = checked("client", config.client.name, Client)
    return alone(found) if config.federation.local_only else found


def make_addons(config: Config) -> dict[str, AddOn]:
    """The add-ons that are switched on, in the order of the configuration. Raises `UserError` for wrong arguments."""
    addons: dict[str, AddOn] = {}
    for name, values in config.client.addons.items():
        cls: type[AddOn] = checked("add-on", name, AddOn)
        params: Any = params_from(cls.Params, values, f"client.{name}")
        if getattr(params, "enabled", False):
            addons[name] = cls(params)
    return addons


def make_model(
    config: Config, task: str, num_classes: int, channels: int, image_size: tuple[int, ...]
) -> tuple[nn.Module, str]:
    """The network of a run with its seed's initial weights, and its activation; the same at both ends."""
    activation = resolve_activation(task, num_classes, config.model.activation)
    outputs = num_outputs(task, num_classes, activation)
    seed = derive_seed(config.seed, 0, "", "model")
    model = build_model(
        config.model.name, dict(config.model.args), channels, outputs, (image_size[0], image_size[-1]), task, seed=seed
    )
    return model, activation


class Workshop:
    """What one process keeps for one configuration: the resident model and the sites' data, read once."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = choose_device(config.engine.device)
        self._data: dict[tuple[Path, str], SiteData] = {}
        self._built: tuple[nn.Module, str, Layout, State] | None = None

    def data(self, place: Place) -> SiteData:
        """The data of a site, read when first asked for. Raises `UserError`."""
        key = (place.data, place.site if place.site is not None else f"#{place.partition}")
        if key not in self._data:
            with SiteFile.open(place.data) as file:
                name = place.site
                if name is None:
                    index = place.partition or 0
                    if index >= len(file.sites):
                        raise UserError(
                            f"{place.data} holds {len(file.sites)} sites, but the federation has a node number {index + 1}; start as many nodes as sites"
                        )
                    name = file.sites[index].name
                cfg = self.config.data
                self._data[key] = file.site(
                    name, cfg.annotation, cfg.mean, cfg.std, allow_empty_train=True, load=cfg.load
                )
        return self._data[key]

    def env(self, data: SiteData) -> Env:
        """The working place of a client on this data; builds the model when first asked for."""
        if self._built is None:
            model, activation = make_model(
                self.config, data.task, len(data.classes), len(data.channels), data.image_size
            )
            layout = Layout.of(model, client_class(self.config).is_personal)
            model.to(self.device)
            hand_over(model, layout, keep=True)
            full = model.state_dict()
            initial = clone_state({name: full[name] for name in layout.personal})
            self._built = model, activation, layout, initial
        model, activation, layout, initial = self._built
        return Env(self.config, data, model, layout, self.device, activation, data.name, initial)


def identify(config: Config, data: SiteData) -> RecordDict:
    """The answer to `query.identify`."""
    identity = Identity(
        site=data.name, task=data.task, classes=tuple(data.classes), channels=tuple(data.channels), image_size=tuple(data.image_size),
        label_kind=data.label_kind, num_train=data.num_examples("train"), num_val=data.num_examples("val"),
        num_test=data.num_examples("test"), code_hash=code_hash(),
    )  # fmt: skip
    content = RecordDict()
    content[names.IDENTITY] = names.encode_config(identity.as_config())
    return content


def _moment(config: Mapping[str, Any]) -> Moment:
    """Read what every message carries; Flower's own strategies send `server-round` only."""
    number = int(config.get("round", config.get("server-round", 0)))
    wanted = {f.name: int(config[f.name]) for f in dataclasses.fields(Moment) if f.name in config}
    return Moment(**{**wanted, "round": number})


def _seed_torch(seed: int, device: torch.device) -> None:
    """Seed the generators that dropout and the like draw from, of the CPU and of the device in use.

    `torch.manual_seed` would also queue a seed, with a formatted stack, for every kind of accelerator that is not in use, and keep them all.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)


class SiteSession:
    """One message at one site: client, personal state, scoring."""

    def __init__(self, workshop: Workshop, place: Place, config_record: Mapping[str, Any], arrays: State) -> None:
        self.started = time.monotonic()
        self.workshop, self.config, self.place = workshop, workshop.config, place
        self.message_config = dict(config_record)
        self.moment = _moment(config_record)
        data = workshop.data(place)
        self.client = client_class(self.config)(workshop.env(data), self.moment, make_addons(self.config))
        self.client.received = arrays
        self.store = PersonalStore(place.state / "personal") if place.state is not None else None
        kept = self.store.read(self.moment.personal_round) if self.store else None
        self.fresh = kept is None and self.moment.personal_round > 0
        self.client.personal = kept or {}
        torch.set_num_threads(self.config.engine.threads)
        _seed_torch(derive_seed(self.config.seed, self.moment.round, data.name, "torch"), workshop.device)

    # ------------------------------------------------------------------ train

    def train(self, extras: dict[str, Tensor]) -> RecordDict:
        """Train one round and give the reply."""
        client = self.client
        scores: dict[str, Any] = {}
        if self.message_config.get("evaluate") == "before":
            scores = self._scores(client.views, final=False)
        if len(client.train_set) == 0:
            return names.pack(metrics={names.NUM_EXAMPLES: 0, **scores})
        client.load_view("personal")
        client.begin_round(self.message_config, extras)
        for addon in client.addons.values():
            addon.begin_round(client, self.message_config, extras)
        metrics: dict[str, Any] = dict(client.fit()) if len(client.train_set) else {}
        more_arrays, more_metrics = client.end_round()
        count = len(client.train_set)
        self._keep_personal()
        arrays = hand_over(client.model, client.layout) if count else None
        if self.message_config.get("evaluate") == "after":
            client.received = arrays or client.received
            scores = self._scores(client.views, final=False)
        metrics = {
            names.NUM_EXAMPLES: count,
            **metrics,
            **more_metrics,
            **scores,
            "seconds": time.monotonic() - self.started,
        }
        if self.fresh and client.personal:
            metrics["personal_fresh"] = 1
        client.check_leaves(more_arrays, metrics)
        return names.pack(arrays=arrays, metrics=metrics, extras=more_arrays)

    def _keep_personal(self) -> None:
        """Write what the site keeps, before the reply leaves."""
        client = self.client
        if client.layout.personal:
            full = client.model.state_dict()
            client.personal = {**client.personal, **clone_state({n: full[n] for n in client.layout.personal})}
        if client.personal and self.store is not None:
            self.store.write(self.moment.round, client.personal, self.moment.personal_round, self.moment.durable_round)

    # ------------------------------------------------------------------ evaluate, query

    def evaluate(self) -> RecordDict:
        """Score the received model (and the personal view of it) and give the aggregates."""
        final = bool(self.message_config.get("final", False))
        metrics = self._scores(self.client.views, final=final)
        if final and self.config.evaluation.modality_subsets != "none":
            metrics |= score_subsets(self.client)
        self.client.check_leaves({}, metrics)
        return names.pack(metrics={names.NUM_EXAMPLES: metrics.get("n/test", 0), **metrics})

    def _scores(self, views: tuple[str, ...], *, final: bool) -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        details: list[Scored] = []
        for view in views:
            scores, scored = score_view(self.client, view, hd95=self.config.evaluation.hd95 and final)
            metrics.update(scores)
            details += scored
        if final and details and self.place.state is not None:
            write_case_files(self.place.state, details)
        return metrics

    def query(self, extras: dict[str, Tensor]) -> RecordDict:
        """Answer a method's query by the client's `query_<name>`."""
        name = str(self.message_config.get("query", ""))
        handler = getattr(self.client, f"query_{name}", None)
        if handler is None:
            raise UserError(
                f"{type(self.client).__name__} has no answer to the query {name!r}; strategy and client do not belong together"
            )
        self.client.load_view("personal")
        arrays, metrics = handler(self.message_config, extras)
        metrics = {names.NUM_EXAMPLES: self.client.data.num_examples("train"), **metrics}
        self.client.check_leaves(arrays, metrics)
        return names.pack(metrics=metrics, extras=arrays)


def answer(kind: str, workshop: Workshop, place: Place, content: RecordDict) -> RecordDict:
    """Answer one message of kind identify, train, evaluate or query. Raises whatever goes wrong; the app turns it into an error reply."""
    if kind == "identify":
        return identify(workshop.config, workshop.data(place))
    config = dict(names.part(content, names.CONFIG, ConfigRecord) or {})
    arrays, extras = names.arrays_of(content, names.ARRAYS), names.arrays_of(content, names.EXTRAS)
    session = SiteSession(workshop, place, config, arrays)
    if kind == "train":
        return session.train(extras)
    return session.evaluate() if kind == "evaluate" else session.query(extras)
